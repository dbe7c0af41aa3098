"""Runs inside a peer's own environment and drives its engine in-process, without any transport.

Started as a file by the peer's Python, so it imports only the standard library and the peer. Each
line on standard input is a load, each line on standard output its answers:

    {"prompts": [[1, 2], …], "streams": 8, "tokens_out": 128, "time_s_max": 20}
    [{"asked_s": 0.0, "arrivals": [[0.12, 1], …]}, …]

The first line said is {"ready": true, "version": …}. Times are this process's monotonic clock. The
peer gains by it: no frontend, no client and no network take part.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TextIO


class Batcher(Protocol):
    """An engine that batches in flight."""

    version: str

    def begin(self, streams: int) -> None:
        """Get ready for a closed loop of so many streams."""

    def add(self, index: int, prompt: Sequence[int], tokens_out: int) -> None: ...

    def step(self) -> Iterable[tuple[int, int, bool]]:
        """Advance; for each answer that moved: index, tokens that came, whether it is whole."""
        ...

    def drop(self, indexes: Iterable[int]) -> None:
        """Cancel what still runs, and leave nothing behind."""


class OpenVino:
    """OpenVINO GenAI: paged attention, continuous batching, chunked prefill."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        genai = importlib.import_module("openvino_genai")
        self._openvino = importlib.import_module("openvino")
        self._numpy = importlib.import_module("numpy")
        self._genai = genai
        self.version = genai.__version__
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 1
        scheduler.max_num_seqs = options["rows_max"]
        scheduler.max_num_batched_tokens = options["batch_tokens_max"]
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = options["shares_prefix"]
        properties = {"INFERENCE_NUM_THREADS": options["threads"]}
        self._pipe = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self._handles: dict[int, Any] = {}
        self._left: dict[int, int] = {}
        self._requests = 0

    def begin(self, streams: int) -> None:
        pass  # It takes requests as they come.

    def add(self, index: int, prompt: Sequence[int], tokens_out: int) -> None:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = tokens_out
        config.ignore_eos = True
        config.do_sample = False
        ids = self._openvino.Tensor(self._numpy.array([prompt], self._numpy.int64))
        self._requests += 1
        self._handles[index] = self._pipe.add_request(self._requests, ids, config)
        self._left[index] = tokens_out

    def step(self) -> Iterable[tuple[int, int, bool]]:
        self._pipe.step()
        moved: list[tuple[int, int, bool]] = []
        for index, handle in list(self._handles.items()):
            if not handle.can_read():
                continue
            tokens = sum(len(output.generated_ids) for output in handle.read().values())
            self._left[index] -= tokens
            whole = self._left[index] <= 0
            if whole:
                del self._handles[index]
            moved.append((index, tokens, whole))
        return moved

    def drop(self, indexes: Iterable[int]) -> None:
        for index in indexes:
            self._handles.pop(index).cancel()
        while self._pipe.has_non_finished_requests():
            self._pipe.step()


class OnnxRuntimeGenai:
    """ONNX Runtime GenAI: its engine with a static batch, and for one stream its generator."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self._numpy = importlib.import_module("numpy")
        self._genai = importlib.import_module("onnxruntime_genai")
        self.version = self._genai.__version__
        config = self._genai.Config(model)
        config.overlay(
            json.dumps(
                {
                    "engine": {"static_batching": {"max_batch_size": options["rows_max"]}},
                    "model": {
                        "decoder": {"session_options": {"intra_op_num_threads": options["threads"]}}
                    },
                }
            )
        )
        self._model = self._genai.Model(config)
        self._engine: Any = self._genai.Engine(self._model)
        self._events: Any = self._engine.create_event_buffer(4 * options["rows_max"])
        self._requests: dict[int, Any] = {}
        self._index: dict[int, int] = {}

    def begin(self, streams: int) -> None:
        pass  # Its batch is as large as what is there.

    def add(self, index: int, prompt: Sequence[int], tokens_out: int) -> None:
        request = self._engine.create_request()
        options = self._genai.TurnOptions(request)
        options.set_do_sample(False)
        options.set_max_generated_tokens(tokens_out)
        options.set_min_generated_tokens(tokens_out)
        request.begin_turn(self._numpy.array(prompt, self._numpy.int32), options)
        self._requests[index] = request

    def step(self) -> Iterable[tuple[int, int, bool]]:
        flags = self._genai.EngineEventFlags
        moved: list[tuple[int, int, bool]] = []
        for event in self._engine.run(self._events):
            index = self._find(event.request)
            if event.flags.value & flags.FAILED.value:
                raise RuntimeError(f"request {index} failed: {event.error_code}")
            tokens = int(bool(event.flags.value & flags.TOKEN.value))
            whole = bool(event.flags.value & flags.TURN_FINISHED.value)
            if whole:
                self._requests.pop(index).close()
            if tokens or whole:
                moved.append((index, tokens, whole))
        return moved

    def drop(self, indexes: Iterable[int]) -> None:
        for index in indexes:
            self._requests.pop(index).close()

    def _find(self, request: Any) -> int:
        for index, each in self._requests.items():
            if each is request or each == request:
                return index
        raise RuntimeError("an event of a request that is not ours")


ENGINES = {"openvino": OpenVino, "onnxruntime-genai": OnnxRuntimeGenai}


def closed_loop(engine: Batcher, load: dict[str, Any]) -> list[dict[str, Any]]:
    """Keep `streams` prompts running until all are answered, or the time is up."""
    prompts: list[list[int]] = load["prompts"]
    answers: list[dict[str, Any]] = []
    running: set[int] = set()
    engine.begin(load["streams"])
    ends_s = time.monotonic() + load["time_s_max"]
    while len(answers) < len(prompts) or running:
        while len(running) < load["streams"] and len(answers) < len(prompts):
            index = len(answers)
            answers.append({"asked_s": time.monotonic(), "arrivals": []})
            engine.add(index, prompts[index], load["tokens_out"])
            running.add(index)
        moved = engine.step()
        now_s = time.monotonic()
        for index, tokens, whole in moved:
            if tokens:
                answers[index]["arrivals"].append((now_s, tokens))
            if whole:
                running.discard(index)
        if now_s > ends_s:
            engine.drop(running)
            break
    return answers


def main() -> None:
    kind, model, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    # What a library prints must not mix with what we say.
    said: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = ENGINES[kind](model, options)
    _say(said, {"ready": True, "version": engine.version})
    for line in sys.stdin:
        _say(said, closed_loop(engine, json.loads(line)))


def _say(said: TextIO, message: object) -> None:
    said.write(json.dumps(message) + "\n")
    said.flush()


if __name__ == "__main__":
    main()
