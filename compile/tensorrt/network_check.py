"""The verification of a plan that no GPU is there to run: its networks, computed on the CPU.

The same texts, steps and tolerances as for every engine (`compile/verify.py`). A sharded build is
verified as it is served: one process a rank, each with its own network, which meet at the
collectives and hand hidden states from stage to stage.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from headrace.compile.sharding import parts
from headrace.compile.tensorrt.interpreter import Interpreter
from headrace.compile.tensorrt.interpreter_values import Constants
from headrace.compile.tensorrt.process_group import Peers
from headrace.compile.tensorrt.rank_processes import RUN_TIMEOUT_S, run_ranks
from headrace.compile.tensors import Array
from headrace.compile.verify import TEXT_TOKENS_MAX, Stepped, compare, step_through
from headrace.serving.domain.artifact import (
    Decoder,
    Precision,
    Sharding,
    Verification,
    VerifyMethod,
)
from headrace.serving.engine import plan_io
from headrace.serving.engine.base import Limits, Logits, Row

MakeNetwork = Callable[[int], tuple[Any, Constants]]
"""A rank's number to its INetworkDefinition and the values of its constants. For more ranks than
one it is called in other processes: a module's own function, or a `functools.partial` of one."""


def verify_network(
    make: MakeNetwork,
    prompts: Sequence[Sequence[int]],
    references: Iterable[Array],
    *,
    decoder: Decoder,
    sharding: Sharding,
    precision: Precision,
    reference: str,
    target: str = "rtx",
    exact: bool = False,
    timeout_s: float = RUN_TIMEOUT_S,
) -> Verification:
    """Compare the networks of a build with the reference.

    Args:
        make: constructs a rank's network.
        prompts: token ids, each of 2 to `TEXT_TOKENS_MAX`.
        references: (tokens, vocab) float32 for each prompt.
        decoder: the whole model's facts.
        sharding: how the build is split.
        precision: whose tolerance applies, with `target`.
        reference: what it is compared with, for the record.
        target: what it is built for.
        exact: compute in float32 throughout, which proves the structure, not the precision.
        timeout_s: of a sharded build's ranks.

    Raises:
        OutsideTolerance: the networks differ from the reference more than their precision may.
        UnsupportedModel: a network has a layer that the interpreter does not compute.
        EngineFault: a rank ended or hung.
    """
    run = partial(_stepped, make, prompts, decoder, sharding, exact)
    if sharding.ranks == 1:
        with _one_thread():
            stepped = run(None)
    else:
        with TemporaryDirectory(prefix="headrace-verify-") as folder:
            file = Path(folder) / "logits.npz"
            run_ranks(partial(_write, run, sharding, file), sharding.ranks, timeout_s=timeout_s)
            stepped = _read(file, prompts)
    return compare(
        stepped,
        prompts,
        references,
        precision=precision,
        reference=reference,
        method=VerifyMethod.NETWORK,
        target=target,
    )


def _stepped(
    make: MakeNetwork,
    prompts: Sequence[Sequence[int]],
    decoder: Decoder,
    sharding: Sharding,
    exact: bool,
    peers: Peers | None,
) -> Stepped:
    engine = NetworkEngine.made(make, decoder, sharding, peers, rows_max=len(prompts), exact=exact)
    return step_through(engine, prompts)


def _write(run: Callable[[Peers], Stepped], sharding: Sharding, file: Path, peers: Peers) -> None:
    """A rank's work: every rank has the same logits, and the last stage's first writes them."""
    stepped = run(peers)
    if peers.rank == sharding.ranks - sharding.tp * sharding.cp:
        with file.open("xb") as out:
            np.savez(
                out, decoded=np.concatenate(stepped.decoded), chunked=np.stack(stepped.chunked)
            )


def _read(file: Path, prompts: Sequence[Sequence[int]]) -> Stepped:
    ends = np.cumsum([len(prompt) for prompt in prompts])[:-1]
    with np.load(file, allow_pickle=False) as stored:
        return Stepped(np.split(stored["decoded"], ends), list(stored["chunked"]))


@contextmanager
def _one_thread() -> Iterator[None]:
    """A decode step's products are too small to share, and waiting threads cost more than work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class NetworkEngine:
    """Steps a rank's interpreted network as `plan_io` says. One block is one row's whole cache.

    Rows of a step that lie apart are stepped with the rows between them, which write where padding
    may: behind what they hold.
    """

    def __init__(
        self,
        interpreter: Interpreter,
        decoder: Decoder,
        sharding: Sharding,
        peers: Peers | None,
        *,
        rows_max: int,
    ) -> None:
        self._interpreter, self._sharding, self._peers = interpreter, sharding, peers
        self._hidden, self._vocab = decoder.hidden, decoder.vocab
        part = parts(decoder, sharding)[0 if peers is None else peers.rank]
        self._caches: dict[str, torch.Tensor] = {}
        self._aliases: dict[str, str] = {}
        for kind, layer in product("kv", part.layer_numbers):
            past = plan_io.past(kind, layer)
            stated = interpreter.inputs[past]
            self._caches[past] = torch.zeros((rows_max, *stated.shape[1:]), dtype=stated.dtype)
            self._aliases[past] = plan_io.present(kind, layer)
        places = next(iter(self._caches.values())).shape[2]
        self._held = np.zeros(rows_max, np.int32)
        """Tokens of each row's cache that count."""
        self._limits = Limits(
            rows_max=rows_max,
            batch_tokens_max=rows_max * TEXT_TOKENS_MAX,
            sequence_tokens_max=places,
            # As in the engine itself: the pool's scratch block has no memory.
            kv_blocks=rows_max + 1,
            # Texts never need a second block, however short the cache.
            kv_block_tokens=max(places, TEXT_TOKENS_MAX),
            vocab=decoder.vocab,
        )

    @classmethod
    def made(
        cls,
        make: MakeNetwork,
        decoder: Decoder,
        sharding: Sharding,
        peers: Peers | None,
        *,
        rows_max: int,
        exact: bool,
    ) -> "NetworkEngine":
        """Make this rank's network and its engine.

        Args:
            make: constructs a rank's network.
            decoder: the whole model's facts.
            sharding: how it is split; `peers` are all its ranks.
            peers: this rank among them; None for a build of one.
            rows_max: rows of the KV cache.
            exact: see `Interpreter`.
        """
        rank = 0 if peers is None else peers.rank
        each = sharding.tp * sharding.cp
        first = rank // each * each
        network, constants = make(rank)
        interpreter = Interpreter(
            network,
            exact=exact,
            constants=constants,
            collective=peers and peers.communicator(range(first, first + each)),
        )
        return cls(interpreter, decoder, sharding, peers, rows_max=rows_max)

    @property
    def limits(self) -> Limits:
        return self._limits

    def step(self, rows: Sequence[Row]) -> Logits:
        slots = [row.block_ids[0] - 1 for row in rows]
        low, high = min(slots), max(slots) + 1
        count = high - low
        tokens = max(len(row.token_ids) for row in rows)
        # Context parallel ranks take equal shares of the tokens.
        while count * tokens % self._sharding.cp:
            tokens += 1
        ids = np.zeros((count, tokens), np.int32)
        at = self._held[low:high].copy()
        last = np.zeros(count, np.int32)
        for slot, row in zip(slots, rows, strict=True):
            ids[slot - low, : len(row.token_ids)] = row.token_ids
            at[slot - low], last[slot - low] = row.position, len(row.token_ids) - 1
            self._held[slot] = row.position + len(row.token_ids)
        order = np.arange(tokens, dtype=np.int32)
        logits = self._through_stages(
            low,
            {
                plan_io.INPUT_IDS: ids,
                plan_io.WRITE_INDICES: at,
                plan_io.POSITION_IDS: at[:, None] + order,
                plan_io.KV_LENGTHS: at + np.int32(tokens),
                plan_io.SAMPLE_INDEX: np.arange(count, dtype=np.int32) * tokens + last,
            },
        )
        wanted = [slot - low for slot, row in zip(slots, rows, strict=True) if row.samples]
        return np.ascontiguousarray(logits[wanted, : self._vocab].numpy())

    def close(self) -> None:
        """Nothing to free: memory goes with the object."""

    def _through_stages(self, low: int, arrays: dict[str, np.ndarray]) -> torch.Tensor:
        """Run this rank's stage between those before and after it; logits on every rank."""
        count, tokens = arrays[plan_io.INPUT_IDS].shape
        inputs = self._interpreter.inputs
        given = {name: torch.from_numpy(array) for name, array in arrays.items() if name in inputs}
        caches = {name: cache[low : low + count] for name, cache in self._caches.items()}
        each, rank = self._sharding.tp * self._sharding.cp, self._peers and self._peers.rank
        if plan_io.HIDDEN_IN in inputs:
            assert self._peers is not None
            assert rank is not None
            given[plan_io.HIDDEN_IN] = self._peers.receive(
                (count, tokens, self._hidden),
                inputs[plan_io.HIDDEN_IN].dtype,
                source=rank - each,
            )
        made = self._interpreter.run(given | caches)
        for name, cache in caches.items():
            # A device writes in place, and binds one address for both.
            assert made[self._aliases[name]] is cache, name
        if self._peers is None:
            return made[plan_io.LOGITS]
        return self._shared(self._peers, made, each, count)

    def _shared(
        self, peers: Peers, made: Mapping[str, torch.Tensor], each: int, count: int
    ) -> torch.Tensor:
        """Hand hidden states to the next stage, and the last one's logits to all before it."""
        first_of_last = self._sharding.ranks - each
        if plan_io.HIDDEN_OUT in made:
            peers.send(made[plan_io.HIDDEN_OUT], to=peers.rank + each)
            width = -(-self._vocab // self._sharding.tp) * self._sharding.tp
            source = first_of_last + peers.rank % each
            return peers.receive((count, width), torch.float32, source=source)
        logits = made[plan_io.LOGITS]
        for rank in range(peers.rank % each, first_of_last, each):
            peers.send(logits, to=rank)
        return logits
