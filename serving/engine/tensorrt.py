"""The TensorRT engine: the plan of one rank on one GPU, for `tensorrt` and `tensorrt_rtx` alike.

A KV block is a whole row's place in linear caches (TensorRT's cache layer has no other kind), so a
sequence has one block, and block b is place b - 1: the pool's scratch block has no memory. Rows of
one token run together over places 0 to the highest that takes part. A place among them that is idle
in this step is run as well: it computes what nobody reads and writes at its own next position,
which its next real token overwrites. See `tensorrt_sizes.py` for what makes a step's runs,
`tensorrt_memory.py` for its buffers, `tensorrt_lane.py` for contexts and graphs.

With several ranks, all are stepped with the same rows at the same time, and so make the same runs.
"""

import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headrace.serving import log
from headrace.serving.clock import SystemClock
from headrace.serving.domain.artifact import Manifest
from headrace.serving.engine import plan_io
from headrace.serving.engine.base import Limits, Logits, Row
from headrace.serving.engine.communicator import Communicator, HiddenChannel
from headrace.serving.engine.device import Device, HostBuffer
from headrace.serving.engine.tensorrt_api import Library
from headrace.serving.engine.tensorrt_lane import Lane
from headrace.serving.engine.tensorrt_loaded import LoadedPlan, described
from headrace.serving.engine.tensorrt_memory import FLOAT32_BYTES, Ints
from headrace.serving.engine.tensorrt_plan import BF16_BYTES
from headrace.serving.engine.tensorrt_sizes import sizes_of
from headrace.serving.errors import EngineFault


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One enqueue: `rows` x T tokens from a place on."""

    lane: Lane
    place: int
    ids: Ints
    """(rows, T)"""
    starts: Ints
    """(rows,); each row's first position."""
    last: Ints
    """(rows,); index of each row's last real token among its T."""
    wanted: Sequence[tuple[int, int]] = ()
    """(row of the run, row of the step's logits) of those that sample, by the first."""


class TensorRtEngine:
    """Implements `Engine` for one rank of an artifact whose engine is "tensorrt".

    A rank of a stage that is not the last has no logits: its steps return (0, vocab).
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        rows_max: int,
        batch_tokens_max: int,
        kv_tokens: int,
        threads: int,
        sequence_tokens_max: int | None = None,
        rank: int = 0,
        communicator: Communicator | None = None,
        channel: HiddenChannel | None = None,
        device: Device | None = None,
        library: Library | None = None,
    ) -> None:
        """Load a rank's plan, allocate everything, run each context once.

        Args:
            folder: the artifact.
            manifest: its manifest, whose files have been verified.
            rows_max: most sequences at once; fewer where `kv_tokens` or the plan has no more.
            batch_tokens_max: most tokens in a step.
            kv_tokens: of all KV caches together; a sequence takes `cache_tokens` of them.
            threads: of the CPU engines; this one computes elsewhere.
            sequence_tokens_max: a bound below the plan's own.
            rank: whose plan it is.
            communicator: of the rank's stage, where tp or cp is above one. The engine closes it,
                with `channel` and `device`, also when it refuses to load.
            channel: to the stages before and after, where pp is above one.
            device: where to run; the first GPU by default.
            library: what reads the plan; the manifest's by default.

        Raises:
            ArtifactTampered: manifest or plan are not what was built, or the rank's is missing.
            ConfigRefused: the ranks, or `kv_tokens`, do not make an engine.
            DeviceUnsuitable: no driver, another GPU, or another version of the library.
            DoesNotFit: the device has too little memory.
            EngineFault: the device failed, or the library refused to run the plan.
        """
        assert min(rows_max, batch_tokens_max, kv_tokens, threads) > 0
        began_ms = SystemClock().monotonic_ms()
        self._is_closed = False
        self._plan = LoadedPlan(device, communicator, channel)
        try:
            facts, ranked = described(folder, manifest, rank)
            longest = min(
                sequence_tokens_max or facts.cache_tokens, manifest.decoder.context_tokens
            )
            self._sizes = sizes_of(
                facts, rows_max=rows_max, kv_tokens=kv_tokens, sequence_tokens_max=longest
            )
            self._limits = self._limits_of(manifest, facts.cache_tokens, batch_tokens_max)
            self._next = np.zeros(self._sizes.places, np.int32)
            """Each place's next position: where an idle row may write."""
            runs = self._sizes.runs_max(batch_tokens_max)
            self._plan.open(folder, manifest, ranked, self._sizes, runs_max=runs, library=library)
            self._warm_up()
        except BaseException as error:
            # The frames that raised still hold the plan, which must go before its memory does.
            traceback.clear_frames(error.__traceback__)
            self.close()
            raise
        log.engine_loaded(
            model=manifest.model,
            device=self._plan.device.name,
            rank=rank,
            rows_max=self._sizes.rows_max,
            device_bytes=ranked.weight_bytes + self._plan.memory.num_bytes,
            duration_ms=SystemClock().monotonic_ms() - began_ms,
        )

    @property
    def limits(self) -> Limits:
        return self._limits

    def _limits_of(self, manifest: Manifest, place_tokens: int, batch_tokens_max: int) -> Limits:
        return Limits(
            rows_max=self._sizes.rows_max,
            batch_tokens_max=batch_tokens_max,
            sequence_tokens_max=self._sizes.sequence_tokens_max,
            # The pool never hands out its scratch block.
            kv_blocks=self._sizes.rows_max + 1,
            kv_block_tokens=place_tokens,
            vocab=manifest.decoder.vocab,
        )

    def step(self, rows: Sequence[Row]) -> Logits:
        """See `Engine.step`. A row's one block is its place; longer chunks than a profile are cut.

        Raises:
            EngineFault: the device or the library failed; the engine is closed.
        """
        if self._is_closed:
            raise _closed()
        self._check(rows)
        memory = self._plan.memory
        try:
            memory.device.make_current()
            for index, run in enumerate(self._runs(rows)):
                self._enqueue(memory.pieces[index], run)
            memory.device.synchronize(memory.stream)
        except EngineFault:
            self.close()
            raise
        return memory.host_logits[: sum(row.samples for row in rows)]

    def close(self) -> None:
        """Free the device. Idempotent."""
        self._is_closed = True
        self._plan.close()

    def _warm_up(self) -> None:
        """Run each context over empty places, and record those of single tokens.

        Kernels are loaded on their first run: here, and not under the first request.
        """
        memory = self._plan.memory
        for chunk, lane in self._plan.chunks.items():
            self._compute(memory.pieces[0], _blank_run(lane, self._sizes.padded(chunk.most)))
            memory.device.synchronize(memory.stream)
        for lane in self._plan.decoding.values():
            self._compute(memory.pieces[0], _blank_run(lane, 1))
            memory.device.synchronize(memory.stream)
            lane.record()
        # Not being recorded is no fault; a device that failed meanwhile says so here.
        memory.device.synchronize(memory.stream)

    # A step.

    def _check(self, rows: Sequence[Row]) -> None:
        """What the loop guarantees; a row past its place would write into another's."""
        assert 0 < len(rows) <= self._limits.rows_max
        assert sum(len(row.token_ids) for row in rows) <= self._limits.batch_tokens_max
        for row in rows:
            assert row.token_ids, "a row feeds at least one token"
            assert row.position + len(row.token_ids) <= self._limits.sequence_tokens_max
            assert len(row.block_ids) == 1, "a sequence has one place"
            assert 1 <= row.block_ids[0] <= self._sizes.rows_max
        assert len({row.block_ids[0] for row in rows}) == len(rows), "two rows in one place"

    def _runs(self, rows: Sequence[Row]) -> Iterator[_Run]:
        """Cut a step into runs: all single tokens together, then each chunk's pieces."""
        target = 0
        singles: list[tuple[Row, int]] = []
        chunks: list[tuple[Row, int]] = []
        for row in rows:
            (singles if len(row.token_ids) == 1 else chunks).append((row, target))
            target += row.samples
        if singles:
            yield self._single_run(singles)
        for row, target in chunks:
            for first, end in self._sizes.pieces(len(row.token_ids)):
                yield self._chunk_run(row, first, end, target)

    def _single_run(self, rows: Sequence[tuple[Row, int]]) -> _Run:
        """Take `rows`, each with its row of the step's logits, and what lies idle among them."""
        placed = sorted((row.block_ids[0] - 1, row, target) for row, target in rows)
        bucket = self._sizes.bucket(placed[-1][0] + 1)
        ids = np.zeros((bucket.rows, 1), np.int32)
        starts = self._next[: bucket.rows].copy()
        for place, row, _ in placed:
            ids[place, 0] = row.token_ids[0]
            starts[place] = row.position
            self._next[place] = row.position + 1
        return _Run(
            lane=self._plan.decoding[bucket],
            place=0,
            ids=ids,
            starts=starts,
            last=np.zeros(bucket.rows, np.int32),
            wanted=[(place, target) for place, row, target in placed if row.samples],
        )

    def _chunk_run(self, row: Row, first: int, end: int, target: int) -> _Run:
        place = row.block_ids[0] - 1
        ids = np.zeros((1, self._sizes.padded(end - first)), np.int32)
        ids[0, : end - first] = row.token_ids[first:end]
        self._next[place] = row.position + end
        samples = row.samples and end == len(row.token_ids)
        return _Run(
            lane=self._plan.chunks[self._sizes.chunk(end - first)],
            place=place,
            ids=ids,
            starts=np.array([row.position + first], np.int32),
            last=np.array([end - first - 1], np.int32),
            wanted=[(0, target)] if samples else (),
        )

    def _enqueue(self, piece: HostBuffer, run: _Run) -> None:
        """Put a run on the stream, with what passes between stages, and its logits' way back."""
        memory, facts, channel = self._plan.memory, self._plan.facts, self._plan.channel
        state_bytes = run.ids.size * facts.hidden * BF16_BYTES
        if channel is not None and not facts.is_first:
            channel.receive(memory.states[plan_io.HIDDEN_IN], state_bytes, memory.stream)
        self._compute(piece, run)
        if channel is not None and not facts.is_last:
            channel.send(memory.states[plan_io.HIDDEN_OUT], state_bytes, memory.stream)
        if facts.is_last:
            self._fetch(run.wanted)

    def _compute(self, piece: HostBuffer, run: _Run) -> None:
        """Write a run's inputs, bring them over, and run it."""
        memory, facts = self._plan.memory, self._plan.facts
        rows, tokens = run.ids.shape

        def inputs(name: str, *shape: int) -> Ints:
            return memory.layout.view(piece, name, shape)

        steps = np.arange(tokens, dtype=np.int32)
        np.add(run.starts[:, None], steps, out=inputs(plan_io.POSITION_IDS, rows, tokens))
        inputs(plan_io.WRITE_INDICES, rows)[:] = run.starts
        inputs(plan_io.KV_LENGTHS, rows)[:] = run.starts + tokens
        if facts.is_first:
            inputs(plan_io.INPUT_IDS, rows, tokens)[:] = run.ids
        if facts.is_last:
            flat = np.arange(rows, dtype=np.int32) * tokens + run.last
            inputs(plan_io.SAMPLE_INDEX, rows)[:] = flat
        memory.device.copy_to_device(memory.inputs, piece, memory.stream)
        run.lane.prepare(tokens=tokens, place=run.place)
        run.lane.run()

    def _fetch(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Copy logits to the host: one copy for neighbours that stay neighbours."""
        memory, width = self._plan.memory, self._plan.facts.logits_width
        runs: list[tuple[int, int, int]] = []
        for source, target in wanted:
            if runs and width == self._limits.vocab:
                first, to, count = runs[-1]
                if (source, target) == (first + count, to + count):
                    runs[-1] = first, to, count + 1
                    continue
            runs.append((source, target, 1))
        for source, target, count in runs:
            memory.device.copy_to_host(
                memory.host_logits[target : target + count],
                memory.logits + source * width * FLOAT32_BYTES,
                memory.stream,
            )


def _blank_run(lane: Lane, tokens: int) -> _Run:
    zeros = np.zeros(lane.rows, np.int32)
    ids = np.zeros((lane.rows, tokens), np.int32)
    return _Run(lane=lane, place=0, ids=ids, starts=zeros, last=zeros)


def _closed() -> EngineFault:
    return EngineFault(
        "The engine is closed.",
        why="An earlier step failed, or the replica is stopping.",
        fix="Send the request again: another replica, or a restarted one, will serve it.",
    )
