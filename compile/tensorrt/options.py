"""What may be asked of a TensorRT build beside target, precision and split."""

from dataclasses import dataclass
from pathlib import Path

from headrace.compile.tensorrt.profiles import CHUNK, ROWS_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """The defaults serve."""

    rows_max: int = ROWS_MAX
    """Rows of the largest decode step."""
    chunk: int = CHUNK
    """Tokens of a prompt that one step takes."""
    weight_streaming: bool = False
    """Allow weights to stay in the machine's memory, within a budget given at load."""
    refit: bool = False
    """Allow weights to be replaced without a build."""
    activations: bool = False
    """In fp8: quantise what meets the matrices too, calibrated."""
    calibration: Path | None = None
    """Texts to calibrate with; the recorded set when None."""

    @property
    def flags(self) -> tuple[str, ...]:
        """As the manifest spells them."""
        stated = {"weight_streaming": self.weight_streaming, "refit": self.refit}
        return tuple(name for name, is_set in stated.items() if is_set)
