"""The fp32 engine: ONNX Runtime over a pool of KV slots.

It is the reference on CPU and what runs where the native engine cannot. The graph's contract is
`compile/export.py`. All buffers are allocated at load and every input size is rounded up to a
bucket, so that a step binds memory that exists and allocates nothing; the pools are bound as input
and output at once, which ONNX Runtime updates in place (measured: a step takes 20 ms with 1,024
slots and with 32,768).

Shapes: B rows, T tokens a row, S context tokens a row, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import (
    onnxruntime_pybind11_state as ort_state,  # pyright: ignore[reportAttributeAccessIssue]
)

from headrace.serving.domain.artifact import Manifest
from headrace.serving.engine.base import Limits, Logits, Row
from headrace.serving.errors import ArtifactTampered, EngineFault

GRAPH_FILE = "decoder.onnx"
GRAPH_VERSION = 1
"""Raised when the graph's inputs and outputs mean something else; part of an artifact's id."""

KV_BLOCK_TOKENS = 16

_LIKE_CONTEXT_MIN = 255
"""Contexts up to here run together; beyond, those between the same two powers of two."""

# What the runtime raises, at load and in a bound run; it has no base of its own.
_ORT_ERRORS = (
    RuntimeError,
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoSuchFile,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
)


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """One size of input: views into the engine's buffers, bound once and used again."""

    binding: ort.IOBinding
    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    write_slots: npt.NDArray[np.int64]
    read_slots: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]
    sample_index: npt.NDArray[np.int64]
    logits: Logits


class OnnxEngine:
    """Runs rows of one token together, and every longer chunk of a prompt on its own."""

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
    ) -> None:
        """Load the graph and allocate the pool.

        Raises:
            ArtifactTampered: the runtime does not accept the graph.
        """
        facts = manifest.decoder
        blocks = kv_tokens // KV_BLOCK_TOKENS
        longest = min(facts.context_tokens, blocks * KV_BLOCK_TOKENS)
        self._limits = Limits(
            rows_max=rows_max,
            batch_tokens_max=batch_tokens_max,
            sequence_tokens_max=min(longest, sequence_tokens_max or longest),
            kv_blocks=blocks,
            kv_block_tokens=KV_BLOCK_TOKENS,
            vocab=facts.vocab,
        )
        self._session: ort.InferenceSession | None = _open(folder / GRAPH_FILE, threads=threads)
        # Block 0 of the pool is scratch: padding is written to it and read from it. Callers' block
        # b is block b + 1. Zeroed, since a masked NaN would still poison its row.
        shape = ((blocks + 1) * KV_BLOCK_TOKENS, facts.kv_heads, facts.head_dim)
        self._pools = {
            f"{kind}_{layer}": np.zeros(shape, np.float32)
            for layer in range(facts.layers)
            for kind in "kv"
        }
        self._row_sizes = _buckets(rows_max, smallest=1)
        self._token_sizes = _buckets(batch_tokens_max, smallest=16)
        self._context_sizes = _buckets(self._limits.sequence_tokens_max, smallest=64)
        tokens, context = max(rows_max, self._token_sizes[-1]), self._context_sizes[-1]
        self._tokens = np.zeros((3, tokens), np.int64)
        self._read_slots = np.zeros(rows_max * context, np.int64)
        self._mask = np.zeros(tokens * context, np.bool_)
        self._sample_index = np.zeros(rows_max, np.int64)
        self._run_logits = np.zeros((rows_max, facts.vocab), np.float32)
        self._logits = np.zeros((rows_max, facts.vocab), np.float32)
        self._runs: dict[tuple[int, int, int], _Run] = {}

    @property
    def limits(self) -> Limits:
        return self._limits

    def step(self, rows: Sequence[Row]) -> Logits:
        self._check(rows)
        place = np.cumsum([row.samples for row in rows]) - 1
        for group in _groups(rows):
            logits = self._advance([row for _, row in group])
            if len(group) == len(rows) and all(row.samples for row in rows):
                return logits[: len(rows)]
            for index, (at, row) in enumerate(group):
                if row.samples:
                    self._logits[place[at]] = logits[index]
        return self._logits[: sum(row.samples for row in rows)]

    def close(self) -> None:
        self._session = None
        self._runs.clear()
        self._pools.clear()

    def _check(self, rows: Sequence[Row]) -> None:
        """What the loop guarantees; a row past its blocks would write into another's cache."""
        assert 0 < len(rows) <= self._limits.rows_max
        assert sum(len(row.token_ids) for row in rows) <= self._limits.batch_tokens_max
        for row in rows:
            end = row.position + len(row.token_ids)
            assert row.token_ids, "a row feeds at least one token"
            assert end <= self._limits.sequence_tokens_max
            assert end <= len(row.block_ids) * KV_BLOCK_TOKENS

    def _advance(self, rows: Sequence[Row]) -> Logits:
        """Run `rows`, which are one chunk or many single tokens; logits of each one's last."""
        tokens = len(rows[0].token_ids)
        context = max(row.position + len(row.token_ids) for row in rows)
        run = self._sized(
            rows=_round_up(len(rows), self._row_sizes),
            tokens=1 if tokens == 1 else _round_up(tokens, self._token_sizes),
            context=_round_up(context, self._context_sizes),
        )
        self._tokens[:] = 0
        run.read_slots[:] = 0
        run.mask[:] = False
        # Padding attends to one scratch slot, so that its softmax is finite.
        run.mask[..., 0] = True
        run.sample_index[:] = 0
        for index, row in enumerate(rows):
            self._fill(run, index, row)
        self._execute(run)
        return run.logits

    def _fill(self, run: _Run, index: int, row: Row) -> None:
        count, end = len(row.token_ids), row.position + len(row.token_ids)
        blocks = np.asarray(row.block_ids[: -(-end // KV_BLOCK_TOKENS)], np.int64) + 1
        slots = (blocks[:, None] * KV_BLOCK_TOKENS + np.arange(KV_BLOCK_TOKENS)).reshape(-1)[:end]
        positions = np.arange(row.position, end)
        run.input_ids[index, :count] = row.token_ids
        run.position_ids[index, :count] = positions
        run.write_slots[index, :count] = slots[row.position :]
        run.read_slots[index, :end] = slots
        seen = run.mask[index, 0, :count, :end]
        np.less_equal(np.arange(end), positions[:, None], out=seen)
        # The last real token of the row, in the flattened (B, T).
        run.sample_index[index] = index * run.input_ids.shape[1] + count - 1

    def _execute(self, run: _Run) -> None:
        if self._session is None:
            raise _fault("The engine is closed.")
        try:
            self._session.run_with_iobinding(run.binding)
        except _ORT_ERRORS as error:
            self.close()
            raise _fault(f"ONNX Runtime stopped: {error}.") from error

    def _sized(self, *, rows: int, tokens: int, context: int) -> _Run:
        """The bound buffers of one size. There are as many as buckets, so the cache is bounded."""
        key = (rows, tokens, context)
        if key not in self._runs:
            if self._session is None:
                raise _fault("The engine is closed.")
            self._runs[key] = self._bind(self._session, rows, tokens, context)
        return self._runs[key]

    def _bind(self, session: ort.InferenceSession, rows: int, tokens: int, context: int) -> _Run:
        inputs = {
            name: self._tokens[row, : rows * tokens].reshape(rows, tokens)
            for row, name in enumerate(("input_ids", "position_ids", "write_slots"))
        }
        read_slots = self._read_slots[: rows * context].reshape(rows, context)
        mask = self._mask[: rows * tokens * context].reshape(rows, 1, tokens, context)
        sample_index = self._sample_index[:rows]
        logits = self._run_logits[:rows]
        binding = session.io_binding()
        more = {"read_slots": read_slots, "mask": mask, "sample_index": sample_index}
        for name, array in {**inputs, **more}.items():
            _bind_input(binding, name, array)
        _bind_output(binding, "logits", logits)
        for name, pool in self._pools.items():
            _bind_input(binding, f"past_{name}", pool)
            _bind_output(binding, f"present_{name}", pool)
        return _Run(
            binding=binding,
            **inputs,
            read_slots=read_slots,
            mask=mask,
            sample_index=sample_index,
            logits=logits,
        )


def _groups(rows: Sequence[Row]) -> list[list[tuple[int, Row]]]:
    """Which rows run together, each with its index: single tokens of like context; chunks alone.

    All rows of a run read as much context as the longest, so one long sequence among many short
    ones would have each of them read its length.
    """
    groups: dict[tuple[bool, int], list[tuple[int, Row]]] = {}
    for at, row in enumerate(rows):
        is_single = len(row.token_ids) == 1
        length = max(_LIKE_CONTEXT_MIN, row.position).bit_length()
        groups.setdefault((is_single, length if is_single else at), []).append((at, row))
    return list(groups.values())


def _open(path: Path, *, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Idle threads sleep: the frontend and other replicas share these cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except _ORT_ERRORS as error:
        raise ArtifactTampered(
            f"ONNX Runtime does not accept {path}.",
            why=f"{error}.",
            fix="Build the artifact again with `headrace compile`.",
        ) from error


def _bind_input(binding: ort.IOBinding, name: str, array: npt.NDArray[np.generic]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _bind_output(binding: ort.IOBinding, name: str, array: npt.NDArray[np.generic]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _buckets(largest: int, *, smallest: int) -> tuple[int, ...]:
    """Sizes that inputs are rounded up to: powers of two, and their middles from 128 on.

    Rounding wastes at most half of a size; the middles, a third.
    """
    sizes = [size for power in range(32) if smallest <= (size := 2**power) < largest]
    middles = [(low + high) // 2 for low, high in pairwise(sizes) if low >= 128]
    return tuple(sorted({*sizes, *middles, largest}))


def _round_up(size: int, buckets: Sequence[int]) -> int:
    return next(bucket for bucket in buckets if bucket >= size)


def _fault(why: str) -> EngineFault:
    return EngineFault(
        "The engine cannot run this step.",
        why=why,
        fix="Send the request again: another replica, or a restarted one, will serve it.",
    )
