"""Which part of a decoder each rank holds. Pure arithmetic: memory, network and runtime read it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from headrace.serving.domain.artifact import Decoder, Sharding
from headrace.serving.engine.native_weights import source_shapes
from headrace.serving.errors import InvalidRequest

RANKS_MAX = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One rank's share of a decoder."""

    rank: int
    stage: int
    cp_index: int
    tp_index: int
    first_layer: int
    last_layer: int
    """One past the last layer of its stage."""
    decoder: Decoder
    """The facts of its weights: `layers` of the stage, heads, ffn and vocabulary split over tp."""
    kv_heads: int
    """KV heads whose cache it keeps: its weights' under tp, of which cp keeps a share each."""
    is_first: bool
    """Whether it embeds."""
    is_last: bool
    """Whether it makes logits."""

    @property
    def layer_numbers(self) -> range:
        return range(self.first_layer, self.last_layer)


def parts(decoder: Decoder, sharding: Sharding) -> Sequence[Part]:
    """Split a decoder over its ranks, in the order of their numbers.

    Layers go to stages as evenly as they can, the earlier stages taking the odd ones. KV heads that
    are fewer than tp are held by several ranks. The vocabulary is padded up to a multiple of tp.

    Raises:
        InvalidRequest: heads, ffn, experts or layers do not divide.
    """
    _require(decoder, sharding)
    tp, cp, kv = sharding.tp, sharding.cp, decoder.kv_heads
    each, odd = divmod(decoder.layers, sharding.pp)
    bounds = [stage * each + min(stage, odd) for stage in range(sharding.pp + 1)]
    found: list[Part] = []
    for rank in range(sharding.ranks):
        stage, cp_index, tp_index = sharding.place(rank)
        share = replace(
            decoder,
            layers=bounds[stage + 1] - bounds[stage],
            heads=decoder.heads // tp,
            kv_heads=max(1, kv // tp),
            ffn=decoder.ffn // tp,
            expert_ffn=decoder.expert_ffn // tp,
            vocab=-(-decoder.vocab // tp),
        )
        found.append(
            Part(
                rank=rank,
                stage=stage,
                cp_index=cp_index,
                tp_index=tp_index,
                first_layer=bounds[stage],
                last_layer=bounds[stage + 1],
                decoder=share,
                kv_heads=max(1, share.kv_heads // cp),
                is_first=stage == 0,
                is_last=stage == sharding.pp - 1,
            )
        )
    return found


def held_shapes(part: Part) -> dict[str, tuple[int, ...]]:
    """Canonical name to the shape of the rank's share of every tensor that it holds.

    Layers keep their numbers over all stages. The first stage holds `embed`, the last one
    `final_norm` and `lm_head`; where the head is tied, a last stage that is not the first holds
    `embed` as well. Every rank holds `rope.inv_freq`.
    """
    ends = {
        "embed": part.is_first or (part.is_last and part.decoder.tied),
        "final_norm": part.is_last,
        "lm_head": part.is_last,
    }
    held: dict[str, tuple[int, ...]] = {}
    for name, shape in source_shapes(part.decoder).items():
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            held[f"layers.{int(index) + part.first_layer}.{rest}"] = shape
        elif ends.get(name, True):
            held[name] = shape
    return held


def _require(decoder: Decoder, sharding: Sharding) -> None:
    tp, pp, cp = sharding.tp, sharding.pp, sharding.cp
    if min(tp, pp, cp) < 1 or sharding.ranks > RANKS_MAX:
        raise InvalidRequest(
            f"A split of tp {tp}, pp {pp}, cp {cp} is not possible.",
            why=f"Each is at least 1, and their product at most {RANKS_MAX}.",
            fix="Choose smaller numbers.",
            field="shards",
        )
    kv, width = decoder.kv_heads, decoder.expert_ffn or decoder.ffn
    if decoder.heads % tp or width % tp or (kv % tp and tp % kv):
        raise InvalidRequest(
            f"The model cannot be split over {tp} ranks by tensor parallelism.",
            why=f"It has {decoder.heads} heads, {kv} KV heads and an ffn of {width}.",
            fix="Choose a --tp that divides all three, or that its KV heads divide.",
            field="tp",
        )
    if cp > 1 and (decoder.heads // tp % cp or max(1, kv // tp) % cp):
        raise InvalidRequest(
            f"The model cannot be split over {cp} ranks by context parallelism.",
            why=f"Each of {tp} tensor ranks has {decoder.heads // tp} heads and "
            f"{max(1, kv // tp)} KV heads, and context parallelism splits both.",
            fix="Choose a --cp that divides both.",
            field="cp",
        )
    if pp > decoder.layers:
        raise InvalidRequest(
            f"The model cannot be split into {pp} stages.",
            why=f"It has {decoder.layers} layers.",
            fix="Choose a smaller --pp.",
            field="pp",
        )
