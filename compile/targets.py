"""Every `--target`, and which precisions each one serves."""

from headrace.compile.tensorrt.targets import TENSORRT_TARGETS, find_target
from headrace.serving.domain.artifact import Precision
from headrace.serving.errors import InvalidRequest

CPU = "cpu"
TARGETS = (CPU, *TENSORRT_TARGETS)

_CPU_PRECISIONS = (Precision.FP32, Precision.INT8, Precision.INT4)


def precisions(target: str) -> tuple[Precision, ...]:
    """What the target's engines compute in.

    Raises:
        UnsupportedModel: there is no such target.
    """
    return _CPU_PRECISIONS if target == CPU else find_target(target).precisions


def default_precision(target: str) -> Precision:
    """int8 on `cpu`, bf16 on TensorRT.

    Raises:
        UnsupportedModel: there is no such target.
    """
    return Precision.INT8 if target == CPU else find_target(target).precisions[0]


def require_precision(target: str, precision: Precision) -> None:
    """Refuse what no engine of the target computes.

    Raises:
        InvalidRequest: the target does not serve the precision.
        UnsupportedModel: there is no such target.
    """
    served = precisions(target)
    if precision not in served:
        raise InvalidRequest(
            f"The target {target} does not serve {precision}.",
            why=f"It serves {', '.join(served)}.",
            fix=f"Use --precision {default_precision(target)}, or another of these.",
            field="precision",
        )
