"""A decoder's network, or one rank's part of it: what is built as `rtx` is what is built as `h200`.

The contract of inputs and outputs is `serving/engine/plan_io.py`; the computation is that of
`families/decoder.py`. Tokens are flat, [M, D] with M = B x T, so that every product is of two
matrices; only attention sees rows.

Tensor parallel ranks hold heads, ffn columns and rows of the vocabulary: one sum after attention,
one after the MLP, one after the embedding, and a gathering of logits. Context parallel ranks
(Ulysses) each take M / cp tokens, and exchange tokens for heads before attention and back after it.

A mixture of experts is spelt densely: every expert computes every token, and the weights of those
that were not chosen are zero. SM90 has no fused mixture (IMoELayer needs SM 10.x or 11.x). A decode
step of many rows reads every expert anyway; prefill pays experts / experts_per_token times the
arithmetic.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from headrace.compile.families.rope import ROPE_TENSOR
from headrace.compile.sharding import Part
from headrace.compile.tensorrt.network import DYNAMIC, Network, Tensor
from headrace.compile.tensorrt.weight_forms import bf16
from headrace.compile.tensors import Array
from headrace.serving.domain.artifact import Sharding
from headrace.serving.engine import plan_io

Tensors = Mapping[str, Array]

WHOLE = slice(None)
_GATED = ("gate", "up")


class Products(Protocol):
    """Adds products of the layers, with their matrices in whatever form they are held."""

    def __call__(
        self, net: Network, x: Tensor, matrices: Mapping[str, Array], columns: slice
    ) -> list[Tensor]:
        """Return [M, out] bf16 of x [M, in] and each of `matrices` [out, in].

        Args:
            net: where they are added.
            x: bf16.
            matrices: the rank's part of each, by its canonical name.
            columns: which of the whole matrix's columns these are.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be written for one rank."""

    part: Part
    sharding: Sharding
    cache_tokens: int


def write_decoder(net: Network, plan: Plan, tensors: Tensors, products: Products) -> None:
    """Write the rank's network.

    Args:
        net: empty.
        plan: which rank, of which split, with how long a cache.
        tensors: the whole model's canonical tensors, float32; read one at a time and cut.
        products: how those of the layers are made; embedding, head and experts are bf16.

    Raises:
        UnsupportedModel: the library refused a layer.
    """
    _Writer(net, plan, tensors, products).write()


class _Writer:
    def __init__(self, net: Network, plan: Plan, tensors: Tensors, products: Products) -> None:
        self.net, self.plan, self.tensors, self.products = net, plan, tensors, products
        self.part, self.facts = plan.part, plan.part.decoder
        self.tp, self.cp = plan.sharding.tp, plan.sharding.cp
        # Ranks are numbered within the stage: that is the communicator.
        at = self.part.cp_index * self.tp
        self.tp_ranks = range(at, at + self.tp)
        self.cp_ranks = range(self.part.tp_index, self.cp * self.tp, self.tp)

    def write(self) -> None:
        net, part = self.net, self.part
        hidden = self._enter()
        self._tables()
        if self.cp > 1:
            hidden = self._own_tokens(hidden)
        for index in part.layer_numbers:
            hidden = self._layer(hidden, index)
        if self.cp > 1:
            hidden = net.collective(hidden, "ALL_GATHER", self.cp_ranks, name="gather_tokens")
        if part.is_last:
            self._logits(hidden)
        else:
            shape = self._rows_by(self.facts.hidden, name="hidden_out.shape")
            net.output(
                net.reshape(hidden, shape, name="hidden_out.rows"), plan_io.HIDDEN_OUT, "bf16"
            )

    # In and out.

    def _enter(self) -> Tensor:
        """The step's inputs; the hidden states [M, D] it begins with."""
        net, facts = self.net, self.facts
        if self.part.is_first:
            ids = net.input(plan_io.INPUT_IDS, "int32", (DYNAMIC, DYNAMIC))
            entered = net.reshape(ids, (DYNAMIC,), name="flat_ids")
        else:
            given = net.input(plan_io.HIDDEN_IN, "bf16", (DYNAMIC, DYNAMIC, facts.hidden))
            entered = net.reshape(given, (DYNAMIC, facts.hidden), name="flat_hidden")
        self.write_indices = net.input(plan_io.WRITE_INDICES, "int32", (DYNAMIC,))
        self.positions = net.input(plan_io.POSITION_IDS, "int32", (DYNAMIC, DYNAMIC))
        self.kv_lengths = net.input(plan_io.KV_LENGTHS, "int32", (DYNAMIC,))
        # Every shape that a step decides is read off here.
        self.rows_tokens = net.shape(self.positions, name="rows_tokens")
        return self._embedded(entered) if self.part.is_first else entered

    def _embedded(self, ids: Tensor) -> Tensor:
        net = self.net
        self.embedding = net.constant("embed", bf16(self._vocabulary("embed")), "bf16")
        if self.tp == 1:
            return net.gather(self.embedding, ids, axis=0, name="embedded")
        # Ids of other ranks' rows embed as zero here and are added from there.
        rows = self.facts.vocab
        first = net.constant("embed.first", np.array([self.part.tp_index * rows], np.int32))
        local = net.elementwise(ids, first, "SUB", name="embed.local")
        zero = net.constant("embed.zero", np.array([0], np.int32))
        end = net.constant("embed.end", np.array([rows], np.int32))
        minus = net.constant("embed.minus", np.array([-1], np.int32))
        is_ours = net.elementwise(
            net.elementwise(local, minus, "GREATER", name="embed.from"),
            net.elementwise(local, end, "LESS", name="embed.to"),
            "AND",
            name="embed.ours",
        )
        row = net.select(is_ours, local, zero, name="embed.row")
        found = net.gather(self.embedding, row, axis=0, name="embed.found")
        counted = net.cast(is_ours, "bf16", name="embed.counted")
        counted = net.reshape(counted, (DYNAMIC, 1), name="embed.column")
        ours = net.multiply(found, counted, name="embed.share")
        return self._summed(ours, "embedded")

    def _logits(self, hidden: Tensor) -> None:
        net, facts = self.net, self.facts
        chosen = net.input(plan_io.SAMPLE_INDEX, "int32", (DYNAMIC,))
        rows = net.gather(hidden, chosen, axis=0, name="sampled")
        normed = self._normed(rows, "final_norm")
        if facts.tied and self.part.is_first:
            head = self.embedding
        else:
            source = "embed" if facts.tied else "lm_head"
            head = net.constant("lm_head", bf16(self._vocabulary(source)), "bf16")
        logits = net.matmul(normed, head, name="head")
        if self.tp > 1:
            # Gathering stacks the ranks' columns as rows: [tp x B, V / tp].
            stacked = net.collective(logits, "ALL_GATHER", self.tp_ranks, name="gather_logits")
            split = net.reshape(
                stacked, (self.tp, DYNAMIC, facts.vocab), name="logits.split", after=(1, 0, 2)
            )
            logits = net.reshape(split, (DYNAMIC, self.tp * facts.vocab), name="logits.joined")
        net.output(logits, plan_io.LOGITS, "float32")

    def _vocabulary(self, name: str) -> Array:
        """The rank's rows of a (vocabulary, hidden) matrix; rows that pad it are zero."""
        whole, rows, at = self.tensors[name], self.facts.vocab, self.part.tp_index
        share = whole[at * rows : (at + 1) * rows]
        return np.pad(share, ((0, rows - len(share)), (0, 0))) if len(share) < rows else share

    # Layers.

    def _layer(self, hidden: Tensor, index: int) -> Tensor:
        net, name = self.net, f"layers.{index}"
        attended = self._attention(self._normed(hidden, f"{name}.attn_norm"), index)
        hidden = net.add(hidden, attended, name=f"{name}.after_attention")
        normed = self._normed(hidden, f"{name}.mlp_norm")
        mixed = self._experts(normed, name) if self.facts.experts else self._mlp(normed, name)
        return net.add(hidden, mixed, name=f"{name}.after_mlp")

    def _attention(self, x: Tensor, index: int) -> Tensor:
        net, facts, name, h = self.net, self.facts, f"layers.{index}", self.facts.head_dim
        heads, kv = facts.heads, facts.kv_heads
        widths = {"q": heads, "k": kv, "v": kv}
        q, k, v = self._projected(x, {f"{name}.{each}": n * h for each, n in widths.items()})
        if self.cp > 1:
            q, k, v = (
                self._tokens_for_heads(each, count * h, f"{name}.{letter}")
                for each, count, letter in ((q, heads, "q"), (k, kv, "k"), (v, kv, "v"))
            )
            heads, kv = heads // self.cp, kv // self.cp
        q = self._turned(self._by_head(q, heads, f"{name}.q"), f"{name}.q", scale=h**-0.5)
        k = self._turned(self._by_head(k, kv, f"{name}.k"), f"{name}.k", scale=1.0)
        keys = self._cached("k", index, k, kv)
        values = self._cached("v", index, self._by_head(v, kv, f"{name}.v"), kv)
        out = net.attention(q, keys, values, self.kv_lengths, name=f"{name}.attention")
        out = net.reshape(out, (DYNAMIC, heads * h), name=f"{name}.attended", before=(0, 2, 1, 3))
        if self.cp > 1:
            out = self._heads_for_tokens(out, heads * h, name)
        whole = self.tensors[f"{name}.o"]
        cut = self._cut(whole.shape[1])
        (out,) = self.products(net, out, {f"{name}.o": whole[:, cut]}, cut)
        out = self._summed(out, f"{name}.o.sum")
        if facts.o_bias:
            bias = net.constant(f"{name}.o_bias", self._row(self.tensors[f"{name}.o_bias"]), "bf16")
            out = net.add(out, bias, name=f"{name}.o.biased")
        return out

    def _projected(self, x: Tensor, widths: Mapping[str, int]) -> list[Tensor]:
        """q, k and v of the rank's heads, [M, width] each."""
        net = self.net
        shares = {name: self._heads(self.tensors[name], width) for name, width in widths.items()}
        found = self.products(net, x, shares, WHOLE)
        if not self.facts.qkv_bias:
            return found
        biased: list[Tensor] = []
        for out, (name, width) in zip(found, widths.items(), strict=True):
            bias = self._heads(self.tensors[f"{name}_bias"], width)
            held = net.constant(f"{name}_bias", self._row(bias), "bf16")
            biased.append(net.add(out, held, name=f"{name}.biased"))
        return biased

    def _by_head(self, x: Tensor, heads: int, name: str) -> Tensor:
        """[M, heads x H] to [B, heads, T, H]."""
        shape = self._rows_by(heads, self.facts.head_dim, name=f"{name}.shape")
        return self.net.reshape(x, shape, name=f"{name}.heads", after=(0, 2, 1, 3))

    def _turned(self, x: Tensor, name: str, *, scale: float) -> Tensor:
        """Norm each head where the model does, turn it, scale it: in float32, then bf16."""
        net, facts = self.net, self.facts
        if facts.qk_norm:
            x = self._normed(x, f"{name}_norm")
        wide = net.cast(x, "float32", name=f"{name}.wide")
        turned = net.rope(
            wide, self.cos, self.sin, self.positions, width=facts.head_dim, name=f"{name}.turned"
        )
        if scale != 1.0:
            factor = net.scalar(scale, rank=4, name=f"{name}.softmax_scale")
            turned = net.multiply(turned, factor, name=f"{name}.scaled")
        return net.cast(turned, "bf16", name=f"{name}.ready")

    def _cached(self, kind: str, index: int, fresh: Tensor, heads: int) -> Tensor:
        net = self.net
        shape = (DYNAMIC, heads, self.plan.cache_tokens, self.facts.head_dim)
        cache = net.input(plan_io.past(kind, index), "bf16", shape)
        held = net.kv_update(cache, fresh, self.write_indices, name=plan_io.present(kind, index))
        held.name = plan_io.present(kind, index)
        net.definition.mark_output(held)
        return held

    def _mlp(self, x: Tensor, name: str) -> Tensor:
        net, tensors = self.net, self.tensors
        shares = {f"{name}.{each}": self._rows(tensors[f"{name}.{each}"]) for each in _GATED}
        gate, up = self.products(net, x, shares, WHOLE)
        gated = net.multiply(net.silu(gate, name=f"{name}.silu"), up, name=f"{name}.gated")
        whole = tensors[f"{name}.down"]
        cut = self._cut(whole.shape[1])
        (down,) = self.products(net, gated, {f"{name}.down": whole[:, cut]}, cut)
        return self._summed(down, f"{name}.down.sum")

    def _experts(self, x: Tensor, name: str) -> Tensor:
        """Every expert's [E, M, F] of x [M, D], and the weighted sum of the chosen, [M, D]."""
        net, facts = self.net, self.facts
        weights = self._routed(x, name)
        each = net.reshape(x, (1, DYNAMIC, facts.hidden), name=f"{name}.to_experts")
        gate = net.matmul(each, self._stacked(name, "gate"), name=f"{name}.gate.product")
        up = net.matmul(each, self._stacked(name, "up"), name=f"{name}.up.product")
        gated = net.multiply(net.silu(gate, name=f"{name}.silu"), up, name=f"{name}.gated")
        down = net.matmul(gated, self._stacked(name, "down"), name=f"{name}.down.product")
        weighted = net.multiply(
            net.cast(down, "float32", name=f"{name}.down.wide"), weights, name=f"{name}.weighted"
        )
        mixed = net.reduce(weighted, "SUM", axis=0, name=f"{name}.mixed", keeps=False)
        return self._summed(net.cast(mixed, "bf16", name=f"{name}.mixed.narrow"), f"{name}.sum")

    def _routed(self, x: Tensor, name: str) -> Tensor:
        """Each expert's weight for each token, [E, M, 1] float32; zero where it was not chosen."""
        net, facts = self.net, self.facts
        router = net.constant(f"{name}.router", bf16(self.tensors[f"{name}.router"]), "bf16")
        scores = net.cast(
            net.matmul(x, router, name=f"{name}.scores"), "float32", name=f"{name}.scores.wide"
        )
        shares = net.softmax(scores, axis=1, name=f"{name}.shares")
        best, which = net.top(shares, facts.experts_per_token, axis=1, name=f"{name}.best")
        if facts.norm_topk:
            total = net.reduce(best, "SUM", axis=1, name=f"{name}.best.total")
            best = net.elementwise(best, total, "DIV", name=f"{name}.best.normed")
        hot = net.one_hot(which, facts.experts, name=f"{name}.hot")
        column = net.reshape(
            best, (DYNAMIC, facts.experts_per_token, 1), name=f"{name}.best.column"
        )
        spread = net.reduce(
            net.multiply(hot, column, name=f"{name}.spread"),
            "SUM",
            axis=1,
            name=f"{name}.weights",
            keeps=False,
        )
        return net.reshape(
            spread, (facts.experts, DYNAMIC, 1), name=f"{name}.by_expert", before=(1, 0)
        )

    def _stacked(self, name: str, part: str) -> Tensor:
        """One matrix of every expert, cut for the rank: [E, out, in]."""
        cut = self._columns if part == "down" else self._rows
        held = [
            bf16(cut(self.tensors[f"{name}.experts.{expert}.{part}"]))
            for expert in range(self.facts.experts)
        ]
        return self.net.constant(f"{name}.experts.{part}", np.stack(held), "bf16")

    # Parts of tensors.

    def _heads(self, whole: Array, width: int) -> Array:
        """Rows of the rank's heads; KV heads fewer than ranks are held by several of them."""
        held_by = max(1, self.tp * width // len(whole))
        at = self.part.tp_index // held_by * width
        return whole[at : at + width]

    def _rows(self, whole: Array) -> Array:
        return whole[self._cut(len(whole))]

    def _columns(self, whole: Array) -> Array:
        return whole[:, self._cut(whole.shape[1])]

    def _cut(self, count: int) -> slice:
        """The rank's share of `count` rows or columns."""
        each = count // self.tp
        return slice(self.part.tp_index * each, (self.part.tp_index + 1) * each)

    def _row(self, values: Array) -> Any:
        return bf16(values.reshape(1, -1))

    def _normed(self, x: Tensor, name: str) -> Tensor:
        rank = len(x.shape)
        values = self.tensors[name].reshape((1,) * (rank - 1) + (-1,))
        weight = self.net.constant(name, bf16(values), "bf16")
        return self.net.rms_norm(x, weight, eps=self.facts.rms_eps, name=f"{name}.out")

    def _summed(self, x: Tensor, name: str) -> Tensor:
        if self.tp == 1:
            return x
        return self.net.collective(x, "ALL_REDUCE", self.tp_ranks, name=name, reduces=True)

    # Tokens.

    def _tables(self) -> None:
        """Make cos and sin of every place of the cache, [S, H/2] float32."""
        places = np.arange(self.plan.cache_tokens, dtype=np.float32)
        angles = places[:, None] * self.tensors[ROPE_TENSOR][None, :]
        scale = np.float32(self.facts.rope_scale)
        self.cos = self.net.constant("rope.cos", np.cos(angles) * scale)
        self.sin = self.net.constant("rope.sin", np.sin(angles) * scale)

    def _rows_by(self, *sizes: int, name: str) -> Tensor:
        """The shape (B, T, *sizes), where B and T are the step's."""
        rest = self.net.constant(f"{name}.rest", np.array(sizes, np.int64))
        return self.net.concatenate([self.rows_tokens, rest], axis=0, name=name)

    def _own_tokens(self, hidden: Tensor) -> Tensor:
        """[M, D] to this rank's [M / cp, D]."""
        net, width = self.net, self.facts.hidden
        split = net.reshape(hidden, (self.cp, DYNAMIC, width), name="own_tokens.split")
        at = net.constant("own_tokens.index", np.array([self.part.cp_index], np.int32))
        own = net.gather(split, at, axis=0, name="own_tokens.chosen")
        return net.reshape(own, (DYNAMIC, width), name="own_tokens")

    def _tokens_for_heads(self, x: Tensor, width: int, name: str) -> Tensor:
        """[M / cp, width] of all heads to [M, width / cp] of this rank's."""
        net, each = self.net, width // self.cp
        parts = net.reshape(x, (DYNAMIC, self.cp, each), name=f"{name}.parts", after=(1, 0, 2))
        swapped = net.collective(parts, "ALL_TO_ALL", self.cp_ranks, name=f"{name}.swapped")
        return net.reshape(swapped, (DYNAMIC, each), name=f"{name}.all_tokens")

    def _heads_for_tokens(self, x: Tensor, each: int, name: str) -> Tensor:
        """[M, each] of this rank's heads to [M / cp, each x cp] of all."""
        net = self.net
        parts = net.reshape(x, (self.cp, DYNAMIC, each), name=f"{name}.attended.parts")
        swapped = net.collective(
            parts, "ALL_TO_ALL", self.cp_ranks, name=f"{name}.attended.swapped"
        )
        return net.reshape(
            swapped,
            (DYNAMIC, each * self.cp),
            name=f"{name}.attended.own",
            before=(1, 0, 2),
        )
