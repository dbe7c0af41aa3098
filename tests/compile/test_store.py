"""Names lead to versions, versions to artifacts; what is damaged or missing says so."""

import json
from pathlib import Path

import pytest

from headrace.compile import names_index
from headrace.compile.names_index import Cause, Index
from headrace.serving.config import ModelConfig
from headrace.serving.domain.artifact import Precision
from headrace.serving.errors import ArtifactTampered, InvalidRequest, ModelNotFound
from tests.compile.shelf import Shelf, manifest, split


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

    listed = [(each.model, each.version.variant) for each in shelf.store.list()]
    assert listed == [("m", "cpu/fp32"), ("m", "cpu/int8"), ("z", "cpu/int8")]


def test_an_unknown_name_says_how_to_build_it(shelf: Shelf) -> None:
    with pytest.raises(ModelNotFound, match="headrace compile m --precision int8"):
        shelf.store.resolve("m")


def test_a_missing_precision_says_what_there_is(shelf: Shelf) -> None:
    shelf.put("m", Precision.FP32, "a")

    with pytest.raises(ModelNotFound, match="has cpu/fp32 under"):
        shelf.store.resolve("m", Precision.INT4)


@pytest.mark.parametrize("name", ["../m", "M", "", "a/b", ".hidden", "x" * 65])
def test_a_name_that_is_no_file_name_is_refused(name: str, shelf: Shelf) -> None:
    with pytest.raises(InvalidRequest):
        shelf.store.resolve(name)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"int8": "../../etc"}',
        '{"fp7": "a"}',
        '{"index_version": 3}',
        '{"index_version": 2, "next_version": 0, "versions": [], "history": []}',
        '{"index_version": 2, "next_version": 2, "versions": [{"version": 1}], "history": []}',
        "[" * 100_000,
        " " * 2**21,
    ],
)
def test_a_damaged_index_is_refused(text: str, shelf: Shelf) -> None:
    shelf.put("m", Precision.INT8, "a")
    (shelf.home / "names" / "m.json").write_text(text)

    with pytest.raises(ArtifactTampered, match="index"):
        shelf.store.resolve("m")


def test_a_folder_that_is_gone_is_said_to_be(shelf: Shelf) -> None:
    folder = shelf.put("m", Precision.INT8, "a")
    folder.rename(folder.with_name("elsewhere"))

    with pytest.raises(ArtifactTampered, match="is gone"):
        shelf.store.resolve("m")


def test_every_build_is_a_version_and_becomes_current(shelf: Shelf) -> None:
    for number, digit in enumerate("abc", start=1):
        shelf.put("m", digit=digit)
        assert shelf.current("m") == number

    assert [each.artifact_id[0] for each in shelf.versions("m")] == ["a", "b", "c"]


def test_the_same_artifact_is_one_version_and_current_again(shelf: Shelf) -> None:
    """Somebody takes a change of the checkpoint back and compiles: the old build is meant again."""
    shelf.put("m", digit="a")
    shelf.put("m", digit="b")

    shelf.store.register(manifest("m", Precision.INT8, "a"))

    assert shelf.current("m") == 1
    assert len(shelf.versions("m")) == 2


def test_variants_are_current_side_by_side(shelf: Shelf) -> None:
    whole = shelf.put("m", Precision.BF16, "a")
    halves = shelf.put_manifest(split(manifest("m", Precision.BF16, "b"), tp=2))

    assert shelf.store.resolve("m", Precision.BF16) == whole
    assert shelf.store.resolve("m", variant="rtx/bf16/tp2") == halves
    with pytest.raises(ModelNotFound, match=r"compile m --target h200 --precision fp8 --tp 4"):
        shelf.store.resolve("m", variant="h200/fp8/tp4")


def test_a_command_that_names_no_variant_means_the_only_one_or_the_preferred(shelf: Shelf) -> None:
    assert shelf.store.variant_of("m") is None
    shelf.put_manifest(split(manifest("m", Precision.BF16, "b"), tp=2))
    assert shelf.store.variant_of("m") == "rtx/bf16/tp2"

    shelf.put_manifest(split(manifest("m", Precision.BF16, "c"), tp=4))
    with pytest.raises(InvalidRequest, match=r"rtx/bf16/tp2, rtx/bf16/tp4.*--variant"):
        shelf.store.variant_of("m")
    shelf.put("m", Precision.INT4, "a")
    assert shelf.store.variant_of("m") == "cpu/int4"


def test_promoting_twice_changes_nothing_more(shelf: Shelf) -> None:
    shelf.put("m", digit="a")
    shelf.put("m", digit="b")

    shelf.store.promote("m", 1)
    once = (shelf.home / "names" / "m.json").read_text()
    shelf.store.promote("m", 1)

    assert shelf.current("m") == 1
    assert (shelf.home / "names" / "m.json").read_text() == once


def test_rollbacks_go_back_step_by_step_and_history_is_kept(shelf: Shelf) -> None:
    for digit in "abc":
        shelf.put("m", digit=digit)

    assert shelf.store.rollback("m").version == 2
    assert shelf.store.rollback("m").version == 1
    with pytest.raises(ModelNotFound, match="Nothing of 'm' was current"):
        shelf.store.rollback("m")

    changes = [(each.cause, each.version) for each in shelf.store.index("m").history]
    assert changes[3:] == [(Cause.ROLLBACK, 2), (Cause.ROLLBACK, 1)]
    assert shelf.store.promote("m", 3).version == 3
    assert shelf.store.rollback("m").version == 1


def test_a_rollback_among_several_variants_must_name_one(shelf: Shelf) -> None:
    shelf.put("m", Precision.INT8, "a")
    shelf.put("m", Precision.INT4, "b")
    shelf.put("m", Precision.INT4, "c")

    with pytest.raises(InvalidRequest, match="--variant"):
        shelf.store.rollback("m")
    assert shelf.store.rollback("m", "cpu/int4").version == 2
    assert shelf.current("m", "cpu/int8") == 1


def test_what_cannot_be_served_is_not_made_current(shelf: Shelf) -> None:
    (shelf.put("m", digit="a") / "manifest.sig").unlink()
    shelf.put("m", digit="b")

    for change in (lambda: shelf.store.promote("m", 1), lambda: shelf.store.rollback("m")):
        with pytest.raises(ArtifactTampered, match=r"manifest\.sig"):
            change()
    assert shelf.current("m") == 2


def test_a_pinned_version_stays_whatever_is_current(shelf: Shelf) -> None:
    first = shelf.put("m", digit="a")
    second = shelf.put("m", digit="b")

    assert shelf.store.configured(ModelConfig(name="m", version=1)) == first
    assert shelf.store.configured(ModelConfig(name="m")) == second
    with pytest.raises(ModelNotFound, match="no version 7"):
        shelf.store.configured(ModelConfig(name="m", version=7))


def test_an_index_from_before_versions_is_taken_over(shelf: Shelf) -> None:
    """A home that was used before keeps its builds, numbered in the order of their names."""
    folder = shelf.put("m", Precision.INT8, "a")
    shelf.put("m", Precision.INT4, "b")
    index = shelf.home / "names" / "m.json"
    index.write_text(json.dumps({"int8": "a" * 64, "int4": "b" * 64}))

    assert shelf.store.resolve("m") == folder
    assert (shelf.current("m", "cpu/int4"), shelf.current("m", "cpu/int8")) == (1, 2)
    shelf.put("m", Precision.INT8, "c")
    assert shelf.current("m") == 3
    assert json.loads(index.read_text())["index_version"] == 2


def test_an_artifact_from_before_signatures_is_listed_with_what_to_do(shelf: Shelf) -> None:
    folder = shelf.put("m")
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"manifest_version": 1}))
    (folder / "manifest.sig").unlink()

    (listed,) = shelf.store.list()

    assert listed.manifest is None
    assert "headrace compile" in listed.problem


def test_an_index_never_grows_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go, but never what is current or a rollback away, of any variant."""
    monkeypatch.setattr(names_index, "VERSIONS_MAX", 6)
    monkeypatch.setattr(names_index, "HISTORY_MAX", 9)
    index = Index()
    for digit in "ab":
        index = index.registered(digit * 64, "cpu/int4", cause=Cause.BUILD, at="t")
    for number in range(40):
        index = index.registered(f"{number:064}", "cpu/int8", cause=Cause.BUILD, at="t")

    assert (len(index.versions), len(index.history)) == (6, 6)
    assert (index.current("cpu/int4").version, index.before("cpu/int4").version) == (2, 1)
    assert (index.current("cpu/int8").version, index.before("cpu/int8").version) == (42, 41)
    assert names_index.parse_index(index.to_json(), at="t") == index
