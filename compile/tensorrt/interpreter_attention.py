"""The layers that TensorRT has for decoders: rotary embedding, KV cache, attention, collectives."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.compile.tensorrt.interpreter_layers import Compute, Site, identity


class Collective(Protocol):
    """Exchanges tensors with the other ranks of the network's communicator."""

    @property
    def rank(self) -> int:
        """Its number within the communicator."""
        ...

    def all_gather(self, tensor: Tensor, group: Sequence[int]) -> Sequence[Tensor]:
        """The tensor of each rank of `group`, in that order, which counts this rank.

        Args:
            tensor: of the same type and shape on every rank of the group.
            group: numbers within the communicator.

        Raises:
            EngineFault: a rank ended or did not come in time.
        """
        ...


@dataclass(frozen=True, slots=True)
class CollectiveNote:
    """What a collective layer does: the bindings do not tell, the metadata we write does."""

    operation: str
    group: tuple[int, ...]
    """Ranks of the communicator that take part."""


def collective_note(site: Site) -> CollectiveNote:
    """Read what `Network.collective` wrote.

    Raises:
        UnsupportedModel: the layer says nothing of itself, or its `num_ranks` contradicts.
    """
    try:
        stated = json.loads(site.layer.metadata)
        note = CollectiveNote(str(stated["collective"]), tuple(map(int, stated["ranks"])))
    except (ValueError, KeyError, TypeError) as error:
        raise site.refuse("no metadata that says what it exchanges") from error
    if site.layer.num_ranks != len(note.group):
        raise site.refuse(f"{site.layer.num_ranks} ranks, and {note.group} in its metadata")
    return note


def collective(site: Site, with_others: Collective | None) -> Compute:
    """Cut here: the other ranks compute their networks in processes of their own.

    Sums are taken in float32 in the order of ranks and rounded once, so that every rank has the
    same bits. A device may round at every hop.
    """
    note, (wanted,) = collective_note(site), site.types
    if with_others is None:
        raise site.refuse("other ranks, and this run has none")
    group, size = note.group, len(note.group)
    if with_others.rank not in group:
        raise site.refuse(f"the ranks {group}, and this is rank {with_others.rank}")
    place = group.index(with_others.rank)

    def gathered(x: Tensor) -> Sequence[Tensor]:
        return with_others.all_gather(x.contiguous(), group)

    def total(x: Tensor) -> Tensor:
        first, *rest = gathered(x)
        out = first.float() if wanted.is_floating_point else first
        for each in rest:
            out = out + each
        return out.to(wanted)

    match note.operation:
        case "ALL_REDUCE":
            return total
        case "ALL_GATHER":
            return lambda x: torch.cat(tuple(gathered(x)))
        case "REDUCE_SCATTER":
            return lambda x: total(x).chunk(size)[place]
        case "ALL_TO_ALL":
            return lambda x: torch.cat([each.chunk(size)[place] for each in gathered(x)])
        case _:
            raise site.refuse(f"the operation {note.operation}")


def rotary_embedding(site: Site) -> Compute:
    """Turn pairs of x [B, N, T, H] by cos and sin [places, R/2] at positions [B, T].

    Without positions the tables are [B, T, R/2]. R is `rotary_embedding_dim`, or H where that is 0;
    pairs are (i, i + R/2), or (2i, 2i + 1) where interleaved. In float32, rounded once.
    """
    interleaved, stated, (wanted,) = (
        site.layer.interleaved,
        site.layer.rotary_embedding_dim,
        site.types,
    )

    def compute(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
        turning = stated or x.shape[-1]
        if positions is not None:
            cos, sin = F.embedding(positions, cos), F.embedding(positions, sin)
        cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
        wide = x[..., :turning].float()
        if interleaved:
            low, high = wide[..., 0::2], wide[..., 1::2]
        else:
            low, high = wide.chunk(2, dim=-1)
        turned = (low * cos - high * sin, low * sin + high * cos)
        out = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
        out = out.to(wanted)
        return out if turning == x.shape[-1] else torch.cat((out, x[..., turning:]), -1)

    return compute


def kv_cache_update(site: Site) -> Compute:
    """Write update [B, N, T, H] into cache [B, N, S, H] from places [B] on, in the cache itself."""
    layer = site.layer
    if layer.cache_mode.name != "LINEAR" or layer.update_form.name != "PADDED_BHND":
        raise site.refuse(f"the mode {layer.cache_mode.name}, {layer.update_form.name}")
    if not layer.get_input(0).is_network_input:
        raise site.refuse("a cache that is not an input of the network")

    def compute(cache: Tensor, update: Tensor, places: Tensor) -> Tensor:
        tokens, room, firsts = update.shape[2], cache.shape[2], places.tolist()
        if min(firsts) < 0 or max(firsts) + tokens > room:
            raise IndexError(f"{layer.name} writes {tokens} tokens at {firsts} into {room} places")
        if min(firsts) == max(firsts):
            cache[:, :, firsts[0] : firsts[0] + tokens] = update
            return cache
        for row, first in enumerate(firsts):
            cache[row, :, first : first + tokens] = update[row]
        return cache

    return compute


def attention(site: Site) -> Compute:
    """softmax(q k^T + mask) v over padded q [B, N, T, H] and k, v [B, K, S, H], unscaled.

    With lengths L [B], row b's keys from L[b] on do not count. LOWER_RIGHT lets query t see the
    keys j <= t + L[b] - T, UPPER_LEFT those j <= t. Heads N are a multiple of K.
    """
    facts = site.layer.attention
    forms = {facts.query_form.name, facts.key_value_form.name}
    if facts.norm_op.name != "SOFTMAX" or forms != {"PADDED_BHND"}:
        raise site.refuse(f"the normalisation {facts.norm_op.name} of {', '.join(forms)}")
    if facts.num_ranks != 1:
        raise site.refuse(f"{facts.num_ranks} ranks of its own")
    if facts.normalization_quantize_scale is not None:
        raise site.refuse("quantised weights of values")
    causal = facts.causal_kind.name

    def compute(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        places = k.shape[2]
        if lengths is not None:
            least, most = int(lengths.min()), int(lengths.max())
            if not 1 <= least <= most <= places:
                raise IndexError(f"{site.layer.name} sees {least} to {most} of {places} places")
            # Places that no row sees are not read: the cache is much longer than a sequence.
            k, v, places = k[:, :, :most], v[:, :, :most], most
            mask = None if mask is None else mask[..., :most]
        seen = _seen(causal, q.shape[2], places, lengths)
        if mask is None:
            mask = seen
        elif seen is not None:
            mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=1.0, enable_gqa=q.shape[1] != k.shape[1]
        )

    return compute


def _seen(causal: str, tokens: int, places: int, lengths: Tensor | None) -> Tensor | None:
    """Which key each query sees: bool [B or 1, 1, T, S]; None where all see all."""
    keys, queries = torch.arange(places), torch.arange(tokens)[:, None]
    whole = lengths[:, None, None, None] if lengths is not None else torch.tensor(places)
    match causal:
        case "LOWER_RIGHT":
            return (keys <= queries + whole - tokens).reshape(-1, 1, tokens, places)
        case "UPPER_LEFT":
            return ((keys <= queries) & (keys < whole)).reshape(-1, 1, tokens, places)
        case "NONE" if lengths is None:
            return None
        case _:
            assert causal == "NONE", causal
            return (keys < whole).expand(-1, 1, tokens, places)


ATTENTION: Mapping[str, Callable[[Site], Compute]] = {
    "ATTENTION_INPUT": attention,
    # The whole of it was computed at its input; nothing can stand between the two.
    "ATTENTION_OUTPUT": identity,
    "KV_CACHE_UPDATE": kv_cache_update,
    "ROTARY_EMBEDDING": rotary_embedding,
}


def attention_inputs(layer: Any) -> list[Any]:
    """The tensors that `attention` takes, which the layer's own inputs do not tell all."""
    facts = layer.attention
    return [*(facts.get_input(index) for index in range(3)), facts.mask, facts.key_value_lengths]
