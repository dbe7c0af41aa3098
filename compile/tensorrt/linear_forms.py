"""How the matrices of a decoder's layers are held, by precision, and what calibration found.

The embedding, the head, norms, routers and experts are bf16 in every precision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headrace.compile.calibration import CALIBRATION_FILE, ActivationScales, InputFacts
from headrace.compile.tensorrt.decoder_network import WHOLE, Products, Tensors
from headrace.compile.tensorrt.network import Network, Tensor
from headrace.compile.tensorrt.smoothing import Smoothed
from headrace.compile.tensorrt.weight_forms import Floats, fp8_scale, weight_form
from headrace.compile.tensorrt.weight_layers import add_activation_quantise, add_weight
from headrace.compile.tensors import Array
from headrace.serving.domain.artifact import Decoder, Precision

INPUTS_FILE = "calibration-inputs.npz"
"""In an artifact: for each matrix the mean square of each of its inputs, float32."""


@dataclass(frozen=True, slots=True, eq=False)
class Calibrated:
    """What was measured of the inputs of a model's matrices."""

    scales: ActivationScales
    facts: Mapping[str, InputFacts]

    def write(self, folder: Path) -> Sequence[str]:
        """Write both files; answer their names."""
        inputs: dict[str, Any] = {name: each.mean_square for name, each in self.facts.items()}
        with (folder / INPUTS_FILE).open("wb") as file:
            np.savez(file, **inputs)
        (folder / CALIBRATION_FILE).write_text(self.scales.to_json(), "utf-8")
        return [CALIBRATION_FILE, INPUTS_FILE]

    @classmethod
    def read(cls, folder: Path) -> "Calibrated":
        """Read what `write` wrote.

        Raises:
            ArtifactTampered: it is something else.
        """
        path = folder / CALIBRATION_FILE
        scales = ActivationScales.from_json(path.read_text("utf-8"), where=str(path))
        with np.load(folder / INPUTS_FILE, allow_pickle=False) as stored:
            facts = {
                name: InputFacts(largest, stored[name]) for name, largest in scales.largest.items()
            }
        return cls(scales, facts)


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """The tensors a network is written from, and how its products are."""

    tensors: Tensors
    products: Products


def held(
    precision: Precision,
    decoder: Decoder,
    tensors: Tensors,
    *,
    calibrated: Calibrated | None,
    activations: bool,
) -> Held:
    """Answer what `write_decoder` writes for a precision.

    Args:
        precision: BF16, FP8 or INT4.
        decoder: the whole model's facts.
        tensors: its canonical tensors.
        calibrated: what was measured; FP8 activations need it, INT4 is better for it.
        activations: FP8 only: what meets the matrices is FP8 too.
    """
    if precision is Precision.INT4 and calibrated is not None:
        smoothed = Smoothed(decoder, tensors, calibrated.facts)
        return Held(smoothed, _Forms(precision, importance=smoothed))
    if precision is Precision.FP8 and activations:
        assert calibrated is not None, "FP8 activations are calibrated"
        return Held(tensors, _Forms(precision, scales=calibrated.scales))
    return Held(tensors, _Forms(precision))


class _Forms:
    """Products with matrices in the form of a precision."""

    def __init__(
        self,
        precision: Precision,
        *,
        scales: ActivationScales | None = None,
        importance: Smoothed | None = None,
    ) -> None:
        self._precision = precision
        self._scales = scales
        self._importance = importance

    def __call__(
        self,
        net: Network,
        x: Tensor,
        matrices: Mapping[str, Array],
        columns: slice = WHOLE,
    ) -> list[Tensor]:
        first = next(iter(matrices))
        scale: Floats | None = None
        if self._scales is not None:
            # One input, one quantised copy, and one scale of all that it meets: the products
            # become one, which absorbs it.
            scale = fp8_scale(*matrices.values())
            x = add_activation_quantise(
                net.definition,
                net.trt,
                x,
                self._scales.scale(first),
                f"{first}.input",
                net.constants,
            )
        return [self._product(net, x, *each, scale, columns) for each in matrices.items()]

    def _product(
        self,
        net: Network,
        x: Tensor,
        name: str,
        matrix: Array,
        scale: Floats | None,
        columns: slice,
    ) -> Tensor:
        smoothed = self._importance
        form = weight_form(
            name,
            matrix,
            self._precision,
            scale=scale,
            importance=None if smoothed is None else smoothed.importance(name)[columns],
        )
        weight = add_weight(net.definition, net.trt, name, form, net.constants)
        return net.matmul(x, weight, name=f"{name}.product")
