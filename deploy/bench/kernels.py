"""The native engine's step alone: milliseconds by rows, beside what the memory allows.

`python -m headrace.deploy.bench.kernels <artifact folder> …` prints for each artifact the shortest
and the median step of one token for each row at a context, the prefill of a chunk, and the
roofline: the bytes that a step must read (all weights, and the rows' keys and values) over the
read bandwidth that this machine has in the same run.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from headrace.serving.domain.artifact import Manifest
from headrace.serving.engine.base import Row
from headrace.serving.engine.loader import signed_manifest, verify_files
from headrace.serving.engine.native_engine import NativeEngine
from headrace.serving.engine.native_library import native_library

ROWS = (1, 2, 4, 8, 16, 32)
PREFILL_TOKENS = 256
BANDWIDTH_BYTES = 256 * 2**20
"""Beyond every cache."""
KV_BYTES = 2
"""Of one number in the KV cache: bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One kind of step, measured."""

    rows: int
    shortest_ms: float
    median_ms: float
    roofline_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One artifact on this machine."""

    model: str
    precision: str
    threads: int
    context_tokens: int
    read_gb_s: float
    prefill_ms_per_token: float
    steps: Sequence[Step]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m headrace.deploy.bench.kernels")
    parser.add_argument("folders", nargs="+", type=Path, help="artifacts of the native engine")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--context", type=int, default=224, help="tokens before the step's own")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    for folder in options.folders:
        measured = measure(folder, options.threads, options.context, options.repeats)
        print(json.dumps(asdict(measured)) if options.json else _table(measured))
    return 0


def measure(folder: Path, threads: int, context_tokens: int, repeats: int) -> Measured:
    """Time the artifact's steps.

    Raises:
        ArtifactError: the folder is not an artifact of the native engine.
    """
    manifest = signed_manifest(folder)
    verify_files(folder, manifest)
    kv_tokens = max(ROWS) * _whole_blocks(context_tokens + 1) + PREFILL_TOKENS
    engine = NativeEngine(
        folder,
        manifest,
        rows_max=max(ROWS),
        batch_tokens_max=PREFILL_TOKENS,
        kv_tokens=kv_tokens,
        threads=threads,
    )
    random = np.random.default_rng(1)
    bandwidth = read_bandwidth(threads)
    sequences = [_prefilled(engine, random, i, context_tokens) for i in range(max(ROWS))]
    steps: list[Step] = []
    for rows in ROWS:
        taken = [_timed(engine, sequences[:rows]) for _ in range(repeats)]
        kv = rows * context_tokens * manifest.decoder.kv_values_per_token * KV_BYTES
        steps.append(
            Step(
                rows=rows,
                shortest_ms=min(taken),
                median_ms=statistics.median(taken),
                roofline_ms=(engine.weight_bytes + kv) / bandwidth * 1000,
            )
        )
    chunk = _random_ids(random, manifest, PREFILL_TOKENS)
    last = engine.limits.kv_blocks - PREFILL_TOKENS // engine.limits.kv_block_tokens
    row = Row(chunk, 0, range(last, engine.limits.kv_blocks), False)
    prefill = min(_timed(engine, [row]) for _ in range(5)) / PREFILL_TOKENS
    engine.close()
    return Measured(
        model=manifest.model,
        precision=manifest.precision,
        threads=threads,
        context_tokens=context_tokens,
        read_gb_s=bandwidth / 1e9,
        prefill_ms_per_token=prefill,
        steps=steps,
    )


def read_bandwidth(threads: int) -> float:
    """Bytes a second that so many threads read from memory; the best of several tries."""
    data = np.ones(BANDWIDTH_BYTES // 8, np.uint64)
    read = native_library().hr_read_bandwidth
    return max(read(data.ctypes.data, data.nbytes, threads) for _ in range(8))


def _prefilled(
    engine: NativeEngine, random: np.random.Generator, index: int, context_tokens: int
) -> Row:
    """A sequence whose keys and values are in the pool, as the row that continues it."""
    blocks_each = _whole_blocks(context_tokens + 1) // engine.limits.kv_block_tokens
    blocks = range(index * blocks_each, (index + 1) * blocks_each)
    ids = [int(i) for i in random.integers(0, engine.limits.vocab, context_tokens)]
    for begin in range(0, context_tokens, PREFILL_TOKENS):
        engine.step([Row(ids[begin : begin + PREFILL_TOKENS], begin, blocks, False)])
    return Row([ids[0]], context_tokens, blocks, True)


def _timed(engine: NativeEngine, rows: Sequence[Row]) -> float:
    began = time.perf_counter()
    engine.step(rows)
    return (time.perf_counter() - began) * 1000


def _random_ids(random: np.random.Generator, manifest: Manifest, count: int) -> list[int]:
    return [int(i) for i in random.integers(0, manifest.decoder.vocab, count)]


def _whole_blocks(tokens: int) -> int:
    """Rounded up to whole KV blocks of 16."""
    return -(-tokens // 16) * 16


def _table(measured: Measured) -> str:
    lines = [
        f"{measured.model} {measured.precision}: {measured.threads} threads, context "
        f"{measured.context_tokens}, reads {measured.read_gb_s:.1f} GB/s, prefill "
        f"{measured.prefill_ms_per_token:.3f} ms a token",
        f"{'rows':>6} {'shortest':>10} {'median':>10} {'roofline':>10}  ms a step",
    ]
    lines += [
        f"{s.rows:>6} {s.shortest_ms:>10.2f} {s.median_ms:>10.2f} {s.roofline_ms:>10.2f}"
        for s in measured.steps
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
