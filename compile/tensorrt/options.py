"""What may be asked of a TensorRT build beside target, precision and split."""

from dataclasses import dataclass
from pathlib import Path

from headrace.compile.tensorrt.profiles import CHUNK, ROWS_MAX
from headrace.serving.errors import InvalidRequest

CHUNK_MIN = 2
"""A profile of one token is one for decoding, and an engine without one for prompts is none."""
ROWS_LIMIT, CHUNK_LIMIT = 1024, 16_384
"""Of an engine's own settings, rows_max; and more prompt tokens than any step gains from."""


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

    def __post_init__(self) -> None:
        """Refuse sizes that no engine can be made of.

        Raises:
            InvalidRequest: that, and what would do.
        """
        for name, value, least, most in (
            ("rows_max", self.rows_max, 1, ROWS_LIMIT),
            ("chunk", self.chunk, CHUNK_MIN, CHUNK_LIMIT),
        ):
            if not least <= value <= most:
                flag = "--" + name.replace("_", "-")
                raise InvalidRequest(
                    f"{flag} is {value:,}.",
                    why=f"It is at least {least:,} and at most {most:,}.",
                    fix=f"Choose a number between them, or leave {flag} out.",
                    field=name,
                )

    @property
    def flags(self) -> tuple[str, ...]:
        """As the manifest spells them."""
        stated = {"weight_streaming": self.weight_streaming, "refit": self.refit}
        return tuple(name for name, is_set in stated.items() if is_set)
