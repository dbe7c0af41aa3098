"""Our engine and its loop alone, driven in-process: what the peers' workers are compared with.

`python -m headrace.deploy.bench.engine_worker <artifact folder> <options>` speaks the lines of
`peers/worker.py`. No frontend, no channel and no Ray take part.
"""

import importlib.metadata
import json
import os
import queue
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from headrace.deploy.bench.peers.worker import closed_loop
from headrace.serving.clock import SystemClock
from headrace.serving.domain.request import FinishReason, Sampling, SequenceSpec
from headrace.serving.engine.loader import load_engine
from headrace.serving.engine.loop import EngineLoop
from headrace.serving.engine.loop_report import StepReport
from headrace.serving.engine.sampler import Sampler
from headrace.serving.tokenizer import Tokenizer

REPORTS_MAX = 1024
"""Steps that the loop may be ahead of the reader; then it waits."""
ENGINE_OPTIONS = ("rows_max", "batch_tokens_max", "prefill_tokens_max", "kv_tokens", "threads")
"""Of `ModelConfig`: what an engine and its loop are made with."""


class Headrace:
    """`EngineLoop` as a `Batcher`."""

    def __init__(self, folder: Path, options: Mapping[str, int]) -> None:
        began_s = time.monotonic()
        engine, manifest = load_engine(
            folder,
            rows_max=options["rows_max"],
            batch_tokens_max=options["batch_tokens_max"],
            kv_tokens=options["kv_tokens"],
            threads=options["threads"],
        )
        self.load_s = time.monotonic() - began_s
        self.version = importlib.metadata.version("headrace")
        self._reports: queue.Queue[StepReport] = queue.Queue(REPORTS_MAX)
        self._loop = EngineLoop(
            engine,
            Sampler(manifest.decoder.vocab, options["rows_max"], threads=options["threads"]),
            Tokenizer.from_folder(folder, manifest),
            manifest,
            clock=SystemClock(),
            sink=self._reports.put,
            prefill_tokens_max=options["prefill_tokens_max"],
        )
        self._loop.start()
        self._rounds = 0

    @property
    def overhead_share(self) -> float:
        return self._loop.load().overhead_share

    def begin(self, streams: int) -> None:
        self._rounds += 1

    def add(self, index: int, prompt: Sequence[int], tokens_out: int) -> None:
        sampling = Sampling(max_tokens=tokens_out, ignore_eos=True)
        spec = SequenceSpec(prompt_ids=tuple(prompt), sampling=sampling)
        self._loop.submit((self._rounds, index), spec)

    def step(self) -> Iterable[tuple[int, int, bool]]:
        report = self._reports.get()
        moved: list[tuple[int, int, bool]] = []
        for key, delta, _ in report.deltas:
            assert isinstance(key, tuple)
            round_, index = key
            if delta.finish is FinishReason.ERROR:
                raise RuntimeError("the engine failed") from delta.error
            if round_ == self._rounds:
                moved.append((index, len(delta.token_ids), delta.finish is not None))
        return moved

    def drop(self, indexes: Iterable[int]) -> None:
        for index in indexes:
            self._loop.abort((self._rounds, index))

    def close(self) -> None:
        self._loop.stop()


def main() -> None:
    options = json.loads(sys.argv[2])
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What a library prints must not mix with what we say.
    engine = Headrace(Path(sys.argv[1]), options)
    ready: object = {"ready": True, "version": engine.version, "load_s": engine.load_s}
    for message in _messages(ready, engine):
        said.write(json.dumps(message) + "\n")
        said.flush()
    engine.close()


def _messages(ready: object, engine: Headrace) -> Iterable[object]:
    yield ready
    for line in sys.stdin:
        yield closed_loop(engine, json.loads(line))


if __name__ == "__main__":
    main()
