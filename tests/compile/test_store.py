"""Names lead to artifacts; a damaged index or a missing folder says so."""

from pathlib import Path

import pytest

from headrace.compile.artifact_writer import UNVERIFIED, write_manifest
from headrace.compile.store import Store
from headrace.serving.domain.artifact import Decoder, Manifest, Precision
from headrace.serving.errors import ArtifactTampered, InvalidRequest, ModelNotFound

DECODER = Decoder(
    layers=1,
    hidden=32,
    heads=2,
    kv_heads=1,
    head_dim=16,
    ffn=32,
    vocab=64,
    rms_eps=1e-5,
    qkv_bias=False,
    qk_norm=False,
    tied=True,
    context_tokens=64,
)


def manifest(model: str, precision: Precision, digit: str) -> Manifest:
    return Manifest(
        artifact_id=digit * 64,
        model=model,
        family="qwen",
        target="cpu",
        precision=precision,
        engine="native",
        decoder=DECODER,
        eos_token_ids=(1,),
        bos_token_id=None,
        weight_bytes=1,
        verification=UNVERIFIED,
        source="file://x",
    )


class Shelf:
    """A store with things put into it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.store = Store(home)

    def put(self, model: str, precision: Precision, digit: str) -> Path:
        stated = manifest(model, precision, digit)
        folder = self.store.folder(stated.artifact_id)
        folder.mkdir(parents=True)
        write_manifest(folder, stated, UNVERIFIED)
        self.store.register(stated)
        return folder


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def test_a_name_and_a_precision_lead_to_a_folder(shelf: Shelf) -> None:
    wide = shelf.put("m", Precision.FP32, "a")
    narrow = shelf.put("m", Precision.INT4, "b")

    assert shelf.store.resolve("m", Precision.FP32) == wide
    assert shelf.store.resolve("m", Precision.INT4) == narrow


def test_without_a_precision_the_most_accurate_fast_one_is_taken(shelf: Shelf) -> None:
    shelf.put("m", Precision.FP32, "a")
    narrow = shelf.put("m", Precision.INT4, "b")
    assert shelf.store.resolve("m") == narrow

    middle = shelf.put("m", Precision.INT8, "c")
    assert shelf.store.resolve("m") == middle


def test_a_newer_build_takes_the_name(shelf: Shelf) -> None:
    shelf.put("m", Precision.INT8, "a")
    newer = shelf.put("m", Precision.INT8, "b")

    assert shelf.store.resolve("m", Precision.INT8) == newer


def test_the_list_has_every_named_build(shelf: Shelf) -> None:
    shelf.put("z", Precision.INT8, "a")
    shelf.put("m", Precision.INT8, "b")
    shelf.put("m", Precision.FP32, "c")

    listed = [(s.manifest.model, s.manifest.precision.value) for s in shelf.store.list()]
    assert listed == [("m", "fp32"), ("m", "int8"), ("z", "int8")]


def test_an_unknown_name_says_how_to_build_it(shelf: Shelf) -> None:
    with pytest.raises(ModelNotFound, match="headrace compile m --precision int8"):
        shelf.store.resolve("m")


def test_a_missing_precision_says_what_there_is(shelf: Shelf) -> None:
    shelf.put("m", Precision.FP32, "a")

    with pytest.raises(ModelNotFound, match="has fp32 under"):
        shelf.store.resolve("m", Precision.INT4)


@pytest.mark.parametrize("name", ["../m", "M", "", "a/b", ".hidden", "x" * 65])
def test_a_name_that_is_no_file_name_is_refused(name: str, shelf: Shelf) -> None:
    with pytest.raises(InvalidRequest):
        shelf.store.resolve(name)


@pytest.mark.parametrize("text", ["{", "[]", '{"int8": "../../etc"}', '{"fp7": "a"}'])
def test_a_damaged_index_is_refused(text: str, shelf: Shelf) -> None:
    shelf.put("m", Precision.INT8, "a")
    (shelf.home / "names" / "m.json").write_text(text)

    with pytest.raises(ArtifactTampered, match="index"):
        shelf.store.resolve("m")


def test_a_folder_that_is_gone_is_said_to_be(shelf: Shelf) -> None:
    folder = shelf.put("m", Precision.INT8, "a")
    (folder / "manifest.json").unlink()
    folder.rmdir()

    with pytest.raises(ArtifactTampered, match="is gone"):
        shelf.store.resolve("m")
