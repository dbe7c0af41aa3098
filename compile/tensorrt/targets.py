"""The TensorRT targets, as data: which library, for which devices, in which precisions."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from headrace.serving.domain.artifact import Precision
from headrace.serving.errors import UnsupportedModel

RTX_TARGET = "rtx"
"""The one that needs no GPU to be built."""

RTX_DEVICE_BYTES = 24 * 10**9
"""What a memory plan for `rtx` assumes where nobody says: the portable plan is for many cards, and
24 GB is what the larger GeForce and small workstation ones have."""

RTX_CACHE_TOKENS_MAX = 22_528
"""TensorRT-RTX 1.7.1 has a fused attention of one token over 24,448 places and none over 24,512 (of
128 values; whatever the heads, rows and card); this many served every shape that was tried. A
decode profile that also allows two tokens has no such bound, but copies each row's cache for every
query head in each step."""

_FP8_SINCE = (8, 9)
"""TensorRT-RTX 1.7.1 for 8.0 and 8.6: "the model contains HW-specific datatypes: fp8_e4m3"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One `--target` that becomes a TensorRT plan."""

    name: str
    library: str
    """The Python module: "tensorrt_rtx" or "tensorrt"."""
    compute_capabilities: tuple[str, ...]
    device_bytes: int
    """Memory of one device, as its maker states it."""
    is_device_assumed: bool = False
    """Whether `device_bytes` is our guess, which --device-memory should replace."""
    cache_tokens_max: int | None = None
    """Places of a row's cache beyond which nothing is known to serve; None: no bound is known."""
    precisions: tuple[Precision, ...] = (Precision.BF16, Precision.FP8, Precision.INT4)

    def capabilities(self, precision: Precision) -> tuple[str, ...]:
        """The compute capabilities that a plan in `precision` can be made for."""
        if precision is not Precision.FP8:
            return self.compute_capabilities
        return tuple(
            each
            for each in self.compute_capabilities
            if tuple(int(part) for part in each.split(".")) >= _FP8_SINCE
        )


_TARGETS = (
    Target(
        name=RTX_TARGET,
        library="tensorrt_rtx",
        # What the library builds where no capability is set: one portable plan.
        compute_capabilities=("8.0", "8.6", "8.9", "12.0"),
        device_bytes=RTX_DEVICE_BYTES,
        is_device_assumed=True,
        cache_tokens_max=RTX_CACHE_TOKENS_MAX,
    ),
    # "141 GB" HBM3e: MLCommons inference v4.1, NVIDIA/systems/H200-SXM-141GBx8_TRT_MaxQ.json.
    Target(
        name="h200",
        library="tensorrt",
        compute_capabilities=("9.0",),
        device_bytes=141 * 10**9,
    ),
    # The SXM card, which calls itself "NVIDIA H100 80GB HBM3".
    Target(
        name="h100",
        library="tensorrt",
        compute_capabilities=("9.0",),
        device_bytes=80 * 10**9,
    ),
    # 1,440 GB over eight: NVIDIA's DGX B200 user guide, "Hardware Overview".
    Target(
        name="b200",
        library="tensorrt",
        compute_capabilities=("10.0",),
        device_bytes=180 * 10**9,
    ),
)

TENSORRT_TARGETS: Mapping[str, Target] = MappingProxyType({each.name: each for each in _TARGETS})


def find_target(name: str) -> Target:
    """Answer the TensorRT target of this name.

    Raises:
        UnsupportedModel: there is none.
    """
    if (found := TENSORRT_TARGETS.get(name)) is None:
        raise UnsupportedModel(
            f"There is no TensorRT target {name!r}.",
            why=f"There are {', '.join(TENSORRT_TARGETS)}.",
            fix="Name one of them with --target.",
        )
    return found
