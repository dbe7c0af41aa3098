"""OpenVINO GenAI: its continuous-batching pipeline, in-process. Weights compressed by NNCF."""

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

INT4_GROUP = 64
"""NNCF's default of 128 does not divide this model's hidden size of 576."""


class OpenVino:
    name = "openvino"
    title = "OpenVINO GenAI"
    formats: ClassVar[Mapping[Precision, str]] = {Precision.INT8: "int8", Precision.INT4: "int4"}
    starts_slowly = False

    def __init__(self, folder: Path, *, shares_prefix: bool = False) -> None:
        self._place = Place(folder)
        self._shares_prefix = shares_prefix

    def missing(self, precision: Precision) -> str | None:
        model = self._model(precision) / "openvino_model.bin"
        return self._place.not_installed(self.name, model)

    def start(self, precision: Precision, log: Path) -> AbstractAsyncContextManager[Entrant]:
        argv = worker_argv(
            self._place.python,
            self.name,
            self._model(precision),
            shares_prefix=self._shares_prefix,
        )
        return worker(f"{self.title} {precision}", argv, log, env={})

    def install_steps(self, sources: Sources) -> Sequence[Step]:
        """About 1.6 GB, most of it torch, which its exporter needs.

        torch's version is named so that the CPU build on this site is taken. torchvision comes
        along, does not fit that build and is not needed, so it is removed.
        """
        place, python = self._place, str(self._place.python)
        exporter = place.venv / "bin" / "optimum-cli"
        return [
            venv_step(place, system_python()),
            pip_step(
                place,
                "install OpenVINO GenAI and its exporter (1.6 GB)",
                *("torch==2.13.0", "optimum-intel", "nncf", "openvino-genai"),
                makes=exporter,
            ),
            Step(
                what="remove torchvision",
                argv=[python, "-m", "pip", "uninstall", "--yes", "torchvision"],
                makes=self._model(Precision.INT4) / "openvino_model.bin",
            ),
            *(
                Step(
                    what=f"export the model in {precision}",
                    argv=[
                        *(str(exporter), "export", "openvino"),
                        *("--model", str(sources.checkpoint)),
                        *("--task", "text-generation-with-past"),
                        *("--weight-format", str(precision), *group),
                        str(self._model(precision)),
                    ],
                    makes=self._model(precision) / "openvino_model.bin",
                    env={"HF_HUB_OFFLINE": "1"},
                )
                for precision, group in (
                    (Precision.INT8, ()),
                    (Precision.INT4, ("--group-size", str(INT4_GROUP))),
                )
            ),
        ]

    def _model(self, precision: Precision) -> Path:
        return self._place.model(self.formats[precision])
