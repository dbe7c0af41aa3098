"""ONNX Runtime GenAI: its batching engine, in-process. int4 in blocks of 32, accuracy level 4."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import ClassVar

from headrace.deploy.bench.peers.base import (
    Entrant,
    Place,
    Sources,
    Step,
    pip_step,
    system_python,
    venv_step,
)
from headrace.deploy.bench.peers.in_process import worker, worker_argv
from headrace.serving.domain.artifact import Precision


class OnnxRuntimeGenai:
    name = "onnxruntime-genai"
    title = "ONNX Runtime GenAI"
    formats: ClassVar[Mapping[Precision, str]] = {Precision.INT4: "int4"}
    starts_slowly = False

    def __init__(self, folder: Path, *, shares_prefix: bool = False) -> None:
        """It has no prefix cache, so `shares_prefix` changes nothing."""
        self._place = Place(folder)

    def missing(self, precision: Precision) -> str | None:
        return self._place.not_installed(self.name, self._model / "genai_config.json")

    def start(self, precision: Precision, log: Path) -> AbstractAsyncContextManager[Entrant]:
        argv = worker_argv(self._place.python, self.name, self._model, shares_prefix=False)
        return worker(f"{self.title} {precision}", argv, log, env={})

    def install_steps(self, sources: Sources) -> Sequence[Step]:
        """About 1.3 GB, most of it torch, which its model builder needs."""
        place = self._place
        return [
            venv_step(place, system_python()),
            pip_step(
                place,
                "install ONNX Runtime GenAI and its builder (1.3 GB)",
                *("torch==2.13.0", "onnxruntime-genai", "transformers", "onnx", "onnx_ir"),
                makes=place.site_packages / "onnx_ir",
            ),
            Step(
                what="build the model in int4",
                argv=[
                    *(str(place.python), "-m", "onnxruntime_genai.models.builder"),
                    *("--input", str(sources.checkpoint), "--output", str(self._model)),
                    *("--precision", "int4", "--execution_provider", "cpu"),
                    *("--cache_dir", str(place.folder / "cache")),
                    *("--extra_options", "int4_accuracy_level=4", "int4_block_size=32"),
                ],
                makes=self._model / "genai_config.json",
                env={"HF_HUB_OFFLINE": "1"},
            ),
        ]

    @property
    def _model(self) -> Path:
        return self._place.model("int4")
