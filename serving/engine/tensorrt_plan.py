"""What a plan says of itself, held against the manifest and `plan_io.py`.

A plan is machine code: given a buffer of the wrong size or meaning it computes nonsense or writes
past it. So every input and output is compared before the first one is bound.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from headrace.serving.domain.artifact import Decoder, RankPlan, TensorRt
from headrace.serving.engine import plan_io
from headrace.serving.engine.device import ALIGNMENT_BYTES
from headrace.serving.engine.tensorrt_api import ICudaEngine
from headrace.serving.errors import ArtifactTampered

BF16_BYTES = 2

_BY_ROW = (-1,)
_BY_TOKEN = (-1, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFacts:
    """One rank's plan, as the engine binds it."""

    layers: range
    cache_shape: tuple[int, int, int]
    """Of one row's place in one cache: K, S, H."""
    is_first: bool
    """Whether it takes tokens; a later stage takes hidden states."""
    is_last: bool
    """Whether it makes logits; an earlier stage makes hidden states."""
    hidden: int
    logits_width: int
    """Columns of the logits: the vocabulary, padded up to a multiple of tp. 0 if it makes none."""

    @property
    def place_bytes(self) -> int:
        """Of one row's place in one cache."""
        return math.prod(self.cache_shape) * BF16_BYTES

    @property
    def caches(self) -> Iterator[tuple[str, str]]:
        """(input, output) of every cache."""
        for layer in self.layers:
            for kind in "kv":
                yield plan_io.past(kind, layer), plan_io.present(kind, layer)


def read_facts(
    engine: ICudaEngine, facts: TensorRt, ranked: RankPlan, decoder: Decoder
) -> PlanFacts:
    """Read and check a plan.

    Raises:
        ArtifactTampered: it is not the plan that the manifest describes.
    """
    stage, _, _ = facts.sharding.place(ranked.rank)
    layers = range(*ranked.layers)
    found = _tensors(engine)
    kv_heads = _width(found, plan_io.past("k", layers.start), axis=1)
    last = stage == facts.sharding.pp - 1
    read = PlanFacts(
        layers=layers,
        cache_shape=(kv_heads, facts.cache_tokens, decoder.head_dim),
        is_first=stage == 0,
        is_last=last,
        hidden=decoder.hidden,
        logits_width=_width(found, plan_io.LOGITS, axis=1) if last else 0,
    )
    wanted = _wanted(read)
    if kv_heads < 1 or (last and read.logits_width < decoder.vocab):
        raise _another(ranked, "its caches or logits are too narrow")
    if read.place_bytes % ALIGNMENT_BYTES:
        raise _another(ranked, f"a place of its caches is no multiple of {ALIGNMENT_BYTES} bytes")
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise _another(
                ranked, f"{name} is {found.get(name)}, where {wanted.get(name)} was expected"
            )
    for past, present in read.caches:
        if engine.get_aliased_input_tensor(present) != past:
            raise _another(ranked, f"{present} is not written over {past}")
    if engine.num_optimization_profiles != len(facts.profiles):
        raise _another(ranked, f"it has {engine.num_optimization_profiles} profiles")
    return read


_Tensor = tuple[str, str, tuple[int, ...]]
"""Its mode, type and shape; -1 in a shape is a step's rows or tokens."""


def _tensors(engine: ICudaEngine) -> dict[str, _Tensor]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return {
        name: (
            engine.get_tensor_mode(name).name,
            engine.get_tensor_dtype(name).name,
            tuple(engine.get_tensor_shape(name)),
        )
        for name in names
    }


def _wanted(read: PlanFacts) -> dict[str, _Tensor]:
    wanted: dict[str, _Tensor] = {
        plan_io.WRITE_INDICES: ("INPUT", "INT32", _BY_ROW),
        plan_io.POSITION_IDS: ("INPUT", "INT32", _BY_TOKEN),
        plan_io.KV_LENGTHS: ("INPUT", "INT32", _BY_ROW),
    }
    states = (*_BY_TOKEN, read.hidden)
    if read.is_first:
        wanted[plan_io.INPUT_IDS] = ("INPUT", "INT32", _BY_TOKEN)
    else:
        wanted[plan_io.HIDDEN_IN] = ("INPUT", "BF16", states)
    if read.is_last:
        wanted[plan_io.SAMPLE_INDEX] = ("INPUT", "INT32", _BY_ROW)
        wanted[plan_io.LOGITS] = ("OUTPUT", "FLOAT", (-1, read.logits_width))
    else:
        wanted[plan_io.HIDDEN_OUT] = ("OUTPUT", "BF16", states)
    cache = (-1, *read.cache_shape)
    for past, present in read.caches:
        wanted[past] = ("INPUT", "BF16", cache)
        wanted[present] = ("OUTPUT", "BF16", cache)
    return wanted


def _width(found: dict[str, _Tensor], name: str, *, axis: int) -> int:
    shape = found.get(name, ("", "", ()))[2]
    return shape[axis] if axis < len(shape) else 0


def _another(ranked: RankPlan, why: str) -> ArtifactTampered:
    return ArtifactTampered(
        f"{ranked.file} is not the plan that the manifest describes.",
        why=f"Of rank {ranked.rank}: {why}.",
        fix="Build the artifact again with `headrace compile`.",
    )
