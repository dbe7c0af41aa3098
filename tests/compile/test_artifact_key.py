"""Two builds have one name exactly when nothing that decides their content differs."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.compile.artifact_key import ArtifactKey, graph_digest
from headrace.serving.domain.artifact import Precision, Profile, Sharding
from tests.compile.shelf import DECODER

KEY = ArtifactKey(
    weights_digest="1",
    graph_digest="2",
    target="rtx",
    libraries={"tensorrt_rtx": "1.7.1.116"},
    precision=Precision.BF16,
    profiles=(Profile(name="decode", rows=(1, 8, 32), tokens=(1, 1, 1)),),
    sharding=Sharding(tp=2),
)


def test_equal_keys_are_the_same_artifact() -> None:
    assert KEY.artifact_id == replace(KEY).artifact_id
    assert len(KEY.artifact_id) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"weights_digest": "x"},
        {"graph_digest": "x"},
        {"target": "h200"},
        {"libraries": {"tensorrt_rtx": "1.7.2"}},
        {"precision": Precision.FP8},
        {"profiles": ()},
        {"sharding": Sharding(pp=2)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_part_of_the_key_makes_another_artifact(change: dict[str, object]) -> None:
    assert replace(KEY, **change).artifact_id != KEY.artifact_id


def test_a_change_of_the_construction_is_another_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has to remember to raise a number."""
    module = tmp_path / "graph_of_a_test.py"
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    module.write_text("SCALE = 1\n")
    before = graph_digest(["graph_of_a_test"], {"decoder": DECODER})

    assert graph_digest(["graph_of_a_test"], {"decoder": DECODER}) == before
    assert graph_digest(["graph_of_a_test"], {"decoder": replace(DECODER, layers=2)}) != before
    module.write_text("SCALE = 2\n")
    assert graph_digest(["graph_of_a_test"], {"decoder": DECODER}) != before
