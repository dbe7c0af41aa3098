"""What is counted and priced: one name for each unit, and the quantities of a piece of work.

A quantity is a whole number of a unit; a price book gives each unit a rate. Which units a kind of
work has is decided here and nowhere else, so that log, ledger, invoice and export agree:

| work | units |
|---|---|
| text, read | `prompt_tokens`, `cache_read_tokens`, `cache_write_tokens` |
| text, written | `completion_tokens`, `reasoning_tokens` |
| image | `image_pixels`: images times width times height |
| video | `video_ms/<class>/<fps>fps/<audio or silent>`: milliseconds of one class of video |

Units are disjoint: no token, pixel or millisecond is in two of them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from headrace.serving.errors import AmountOutOfRange, UnknownUnit

PROMPT = "prompt_tokens"
"""Computed for this request and not kept: neither read from the prefix cache nor written to it."""
CACHE_READ = "cache_read_tokens"
"""Prompt tokens whose KV was already resident."""
CACHE_WRITE = "cache_write_tokens"
"""Prompt tokens computed for this request whose KV stays resident for later ones."""
COMPLETION = "completion_tokens"
"""Delivered tokens outside thinking sections."""
REASONING = "reasoning_tokens"
"""Delivered tokens inside thinking sections."""
TEXT_UNITS = (PROMPT, CACHE_READ, CACHE_WRITE, COMPLETION, REASONING)
IMAGE_PIXELS = "image_pixels"

QUANTITY_MAX = (1 << 63) - 1
"""What a signed 64-bit column holds."""

RESOLUTION_CLASSES: Mapping[str, int] = {
    "480p": 854 * 480,
    "720p": 1280 * 720,
    "1080p": 1920 * 1080,
    "2160p": 3840 * 2160,
}
"""Most pixels of a frame of each class, smallest first. A larger frame has no class."""

_VIDEO = re.compile(r"video_ms/([0-9]+p)/([1-9][0-9]{0,2})fps/(audio|silent)")

Quantities = Mapping[str, int]
"""Unit to whole number; units that are not there are zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageUsage:
    """Images of one request, all of one size."""

    images: int
    width: int
    height: int

    def quantities(self) -> Quantities:
        return {IMAGE_PIXELS: _whole(self.images * self.width * self.height)}


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoUsage:
    """One video, by what its viewer gets."""

    duration_ms: int
    width: int
    height: int
    fps: int
    has_audio: bool = False

    def quantities(self) -> Quantities:
        unit = video_unit(
            width=self.width, height=self.height, fps=self.fps, has_audio=self.has_audio
        )
        return {unit: _whole(self.duration_ms)}


def video_unit(*, width: int, height: int, fps: int, has_audio: bool) -> str:
    """The unit that a video is counted in.

    Raises:
        UnknownUnit: the frame is larger than every class, or fps is not 1 to 999.
    """
    pixels = width * height
    for name, pixels_max in RESOLUTION_CLASSES.items():
        if 0 < pixels <= pixels_max and 1 <= fps <= 999:
            return f"video_ms/{name}/{fps}fps/{'audio' if has_audio else 'silent'}"
    raise UnknownUnit(
        f"No unit counts {width}x{height} video at {fps} frames/s.",
        why=f"Classes are {', '.join(RESOLUTION_CLASSES)}, at 1 to 999 frames/s.",
        fix="Ask for a smaller frame or another rate.",
        field="size",
    )


def check_unit(unit: str) -> str:
    """`unit`, if it is one that can be counted.

    Raises:
        UnknownUnit: it is not.
    """
    video = _VIDEO.fullmatch(unit)
    if unit in TEXT_UNITS or unit == IMAGE_PIXELS:
        return unit
    if video and video[1] in RESOLUTION_CLASSES:
        return unit
    raise UnknownUnit(
        f"There is no unit {unit[:64]!r}.",
        why=f"Units are {', '.join(TEXT_UNITS)}, {IMAGE_PIXELS} and video_ms/<class>/<n>fps/"
        "<audio or silent>.",
        fix="Correct the name.",
        field="unit",
    )


def _whole(quantity: int) -> int:
    if not 0 <= quantity <= QUANTITY_MAX:
        raise AmountOutOfRange(
            f"The quantity {quantity:,} cannot be recorded.",
            why=f"Quantities are whole numbers from 0 to {QUANTITY_MAX:,}.",
            fix="Check the arithmetic of the caller.",
        )
    return quantity
