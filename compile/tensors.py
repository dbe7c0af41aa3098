"""What a checkpoint is to the build: a config and named tensors, read one at a time.

A checkpoint comes from outside, so everything in it is doubted: sizes are checked against the file
before anything is allocated, and a number that is not finite stops the build.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from headrace.serving.errors import CheckpointUnreadable

Config = Mapping[str, object]
Array = npt.NDArray[np.float32]

JSON_BYTES_MAX = 64 * 2**20
"""A config or tokenizer file larger than this is not one: the largest known has 35 MB."""


class Described(Protocol):
    """Something with a config: a checkpoint, or a config alone."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> Config:
        """What `config.json` says, in `transformers`' words whatever the format."""
        ...


class Checkpoint(Protocol):
    """A model as its authors publish it. Tensor names are those of `transformers`."""

    @property
    def path(self) -> Path:
        """The folder or file that was opened."""
        ...

    @property
    def config(self) -> Config:
        """What `config.json` says, in `transformers`' words whatever the format."""
        ...

    @property
    def generation(self) -> Config:
        """What `generation_config.json` says; empty when there is none."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor, known from the headers alone."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """Every file that decides what is built from this checkpoint."""
        ...

    def read(self, name: str) -> Array:
        """Return one tensor, widened to float32.

        Raises:
            CheckpointUnreadable: the data is cut short or holds a number that is not finite.
        """
        ...

    def write_tokenizer(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` (with the chat template) there.

        Raises:
            CheckpointUnreadable: the checkpoint has no tokenizer that can be carried over.
        """
        ...


def unreadable(where: Path | str, why: str, *, fix: str | None = None) -> CheckpointUnreadable:
    return CheckpointUnreadable(
        f"The checkpoint {where} cannot be read.",
        why=why,
        fix=fix or "Download or convert it again, and compare its checksum with the publisher's.",
    )


def finite(array: Array, *, name: str, where: Path) -> Array:
    """Return `array`, or refuse it.

    Raises:
        CheckpointUnreadable: it holds NaN or infinity.
    """
    if not np.isfinite(array).all():
        raise unreadable(where, f"Tensor {name!r} holds numbers that are not finite.")
    return array


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object from a checkpoint.

    Raises:
        CheckpointUnreadable: the file is missing, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > JSON_BYTES_MAX:
            raise unreadable(path, f"It is larger than {JSON_BYTES_MAX:,} bytes.")
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, f"It is not readable JSON: {error}.") from error
    if not isinstance(value, dict):
        raise unreadable(path, "It is JSON, but not an object.")
    return value


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex; reads 1 MiB at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
