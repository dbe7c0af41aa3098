"""How the matrices of a decoder's layers are held, by precision."""

from collections.abc import Mapping

from headrace.compile.tensorrt.decoder_network import Linear, bf16_linear
from headrace.serving.domain.artifact import Precision


def linear_for(precision: Precision, scales: Mapping[str, float] | None) -> Linear:
    """Answer what adds a product of the layers.

    Args:
        precision: BF16.
        scales: of FP8 activations.
    """
    assert precision is Precision.BF16
    return bf16_linear
