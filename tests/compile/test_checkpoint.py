"""Checkpoints come from outside: what is damaged, foreign or unsafe is refused by name."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from headrace.compile.checkpoint import open_checkpoint
from headrace.compile.safetensors_checkpoint import INDEX_FILE, WEIGHTS_FILE
from headrace.serving.errors import CheckpointUnreadable

GOOD = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def write(path: Path, header: object, data: bytes = b"\0" * 16) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_float_type_is_widened_exactly(kind: torch.dtype, folder: Path) -> None:
    values = torch.tensor([[1.5, -2.25], [0.0078125, 3e4]], dtype=kind)
    save_file({"a": values}, folder / WEIGHTS_FILE)

    read = open_checkpoint(folder).read("a")

    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values.float().numpy())


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        pytest.param(GOOD, b"\0" * 15, "header describes", id="the data is cut short"),
        pytest.param(GOOD, b"\0" * 17, "header describes", id="there is more than described"),
        pytest.param(b"{not json", b"", "not JSON", id="the header is no JSON"),
        pytest.param([1], b"", "not an object", id="the header is a list"),
        pytest.param({"a": 5}, b"", "not described", id="a tensor is no object"),
        pytest.param(
            {"a": {**GOOD["a"], "shape": [2, 3]}}, b"\0" * 16, "16 bytes for", id="a wrong shape"
        ),
        pytest.param(
            {"a": {**GOOD["a"], "data_offsets": [4, 20]}}, b"\0" * 20, "starts at", id="a gap"
        ),
        pytest.param(
            {"a": {**GOOD["a"], "shape": [-2, -2]}}, b"\0" * 16, "16 bytes for", id="negative sizes"
        ),
        pytest.param(
            {"a": {"dtype": "I4", "shape": [2], "data_offsets": [0, 1]}}, b"\0", "type", id="a type"
        ),
    ],
)
def test_a_tampered_header_is_refused(header: object, data: bytes, why: str, folder: Path) -> None:
    write(folder / WEIGHTS_FILE, header, data)

    with pytest.raises(CheckpointUnreadable, match=why):
        open_checkpoint(folder)


@pytest.mark.parametrize("length", [0, 7, 2**62], ids=["empty", "half a length", "huge"])
def test_a_header_longer_than_its_file_is_refused(length: int, folder: Path) -> None:
    content = struct.pack("<Q", length) if length > 8 else b"\0" * length
    (folder / WEIGHTS_FILE).write_bytes(content)

    with pytest.raises(CheckpointUnreadable, match="bytes"):
        open_checkpoint(folder)


def test_a_file_cut_anywhere_is_refused(checkpoint: Callable[[str], Path], folder: Path) -> None:
    """A download that stopped: at every length the refusal is ours, never a crash."""
    whole = (checkpoint("llama") / WEIGHTS_FILE).read_bytes()

    for length in [*range(0, 64, 7), *range(64, len(whole), len(whole) // 40)]:
        (folder / WEIGHTS_FILE).write_bytes(whole[:length])
        with pytest.raises(CheckpointUnreadable):
            open_checkpoint(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(value: float, folder: Path) -> None:
    save_file({"a": torch.tensor([1.0, value])}, folder / WEIGHTS_FILE)

    with pytest.raises(CheckpointUnreadable, match="not finite"):
        open_checkpoint(folder).read("a")


def test_a_missing_shard_is_named(folder: Path) -> None:
    save_file({"a": torch.zeros(2)}, folder / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / INDEX_FILE).write_text(json.dumps(index))

    with pytest.raises(CheckpointUnreadable, match=r"two\.safetensors"):
        open_checkpoint(folder)


def test_a_tensor_in_no_shard_is_named(folder: Path) -> None:
    save_file({"a": torch.zeros(2)}, folder / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (folder / INDEX_FILE).write_text(json.dumps(index))

    with pytest.raises(CheckpointUnreadable, match="'b' is in none"):
        open_checkpoint(folder)


def test_a_shard_outside_the_folder_is_refused(folder: Path) -> None:
    index = {"weight_map": {"a": "../../etc/passwd"}}
    (folder / INDEX_FILE).write_text(json.dumps(index))

    with pytest.raises(CheckpointUnreadable, match="outside the folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickles_are_refused_unopened(name: str, folder: Path, tmp_path: Path) -> None:
    """Loading a pickle runs what is in it; this one would leave a trace."""

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "was-run",))

    (folder / name).write_bytes(pickle.dumps(Trap()))

    for path in (folder, folder / name):
        with pytest.raises(CheckpointUnreadable, match="runs whatever code"):
            open_checkpoint(path)
    assert not (tmp_path / "was-run").exists()


def test_a_folder_without_weights_says_what_it_lacks(folder: Path) -> None:
    with pytest.raises(CheckpointUnreadable, match=WEIGHTS_FILE):
        open_checkpoint(folder)
