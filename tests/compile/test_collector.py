"""Garbage goes, the longest unused first; what a deployment may ask for stays, whatever happens."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from headrace.compile import collector
from headrace.compile.collector import Collected, collect
from headrace.compile.storage import locked
from headrace.deploy.cli import main
from headrace.serving.config import ModelConfig
from headrace.serving.domain.artifact import Precision
from headrace.serving.engine.artifact_home import hold, stamp_file
from headrace.serving.errors import ArtifactTampered, ModelNotFound
from tests.compile.shelf import Shelf

CHAT = ModelConfig(name="chat")


class House:
    """A home with artifacts of 1,000 bytes of weights each, used at stated times."""

    def __init__(self, home: Path) -> None:
        self.shelf = Shelf(home)

    def put(self, model: str, digit: str, *, used: int, precision: Precision = Precision.INT8):
        folder = self.shelf.put(model, precision, digit, weights=b"x" * 1000)
        stamp_file(folder).touch()
        for path in (folder, stamp_file(folder)):
            os.utime(path, (used, used))
        return folder

    def collect(
        self, keep_bytes: int = 0, models: Sequence[ModelConfig] = (), *, dry_run: bool = False
    ) -> Collected:
        return collect(self.shelf.store, models, keep_bytes=keep_bytes, dry_run=dry_run)

    def there(self) -> str:
        """The first digits of the artifacts that can be seen."""
        return "".join(sorted(path.name[0] for path in self.shelf.store.artifacts.glob("[!.]*")))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_the_longest_unused_go_until_the_rest_is_small_enough(house: House) -> None:
    for digit, used in (("a", 30), ("b", 10), ("c", 20)):
        house.put(f"m{digit}", digit, used=used)
    each_bytes = house.collect(1 << 40).kept_bytes // 3

    collected = house.collect(2 * each_bytes + 10)

    assert [found.artifact_id[0] for found in collected.removed] == ["b"]
    assert house.there() == "ac"
    assert house.collect(2 * each_bytes + 10).removed == []


def test_what_is_removed_has_left_the_index_too(house: House) -> None:
    house.put("m", "a", used=1)

    house.collect()

    with pytest.raises(ModelNotFound, match="headrace compile m"):
        house.shelf.store.resolve("m")
    assert list((house.shelf.home / "uses").iterdir()) == []


def test_current_previous_and_pinned_versions_stay(house: House) -> None:
    for digit, used in (("a", 1), ("b", 2), ("c", 3), ("d", 4)):
        house.put("chat", digit, used=used)

    house.collect(models=[ModelConfig(name="chat", version=1)])

    assert house.there() == "acd"
    assert house.shelf.store.rollback("chat").version == 3


def test_other_variants_of_a_configured_model_may_go(house: House) -> None:
    house.put("chat", "a", used=1)
    house.put("chat", "b", used=2, precision=Precision.INT4)

    house.collect(models=[CHAT])

    assert house.there() == "a"
    assert house.shelf.store.index("chat").variants == ["cpu/int8"]


def test_an_older_version_never_takes_the_place_of_a_current_one_that_went(house: House) -> None:
    house.put("m", "a", used=9)
    house.put("m", "b", used=1)
    each_bytes = house.collect(1 << 40).kept_bytes // 2

    house.collect(each_bytes + 10)

    assert (house.there(), house.shelf.current("m")) == ("a", None)
    assert house.shelf.store.promote("m", 1).version == 1


def test_what_a_process_has_loaded_stays_until_it_lets_go(house: House) -> None:
    held = hold(house.put("m", "a", used=1))

    assert house.collect().needed == {"a" * 64: "loaded"}
    assert house.there() == "a"
    os.close(held)
    house.collect()
    assert house.there() == ""


def test_what_is_being_built_stays(house: House) -> None:
    house.put("m", "a", used=1)

    with locked(house.shelf.store.lock_file("a" * 64)):
        assert house.collect().removed == []
    assert house.there() == "a"


def test_what_was_promoted_meanwhile_stays(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the index and the removal somebody deploys the old version again."""
    for digit, used in (("a", 1), ("b", 2), ("c", 3)):
        house.put("chat", digit, used=used)
    look = collector._remove

    def late(*arguments: object, **options: object) -> str:
        house.shelf.store.promote("chat", 1)
        return look(*arguments, **options)

    monkeypatch.setattr(collector, "_remove", late)

    assert house.collect(models=[CHAT]).removed == []
    assert house.there() == "abc"


def test_a_dry_run_says_what_a_run_does(house: House) -> None:
    for digit, used in (("a", 1), ("b", 2)):
        house.put(f"m{digit}", digit, used=used)

    said = house.collect(dry_run=True)

    assert house.there() == "ab"
    assert house.collect() == said


def test_leavings_of_the_killed_go_and_those_of_the_living_stay(house: House) -> None:
    for digit in "ab":
        (house.shelf.store.artifacts / f".{digit * 64}.fetch").mkdir(parents=True)
        (house.shelf.home / "builds" / (digit * 64)).mkdir(parents=True)
    (house.shelf.home / "checkpoints" / ".qwen2.5-7b.k2j3").mkdir(parents=True)

    with locked(house.shelf.store.lock_file("b" * 64)):
        found = house.collect(1 << 40).leavings

    assert [Path(path).name[:3] for path in found] == [".aa", ".qw", "aaa"]
    assert [path.name[:3] for path in (house.shelf.home / "builds").iterdir()] == ["bbb"]
    assert [path.name[:3] for path in house.shelf.store.artifacts.iterdir()] == [".bb"]


class PowerIsLost(BaseException):
    """Nothing after it runs."""


@pytest.mark.parametrize("step", range(1, 8))
def test_interrupted_anywhere_an_artifact_is_whole_or_not_there(
    step: int, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th rename or removal is the last thing that happens; the next run ends the work."""
    house.put("m", "a", used=1)
    done = 0

    def counted(real: object) -> object:
        def call(*arguments: object, **options: object) -> object:
            nonlocal done
            done += 1
            if done == step:
                raise PowerIsLost
            return real(*arguments, **options)

        return call

    for name in ("rename", "unlink"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))

    with pytest.raises(PowerIsLost):
        house.collect()

    monkeypatch.undo()
    for folder in house.shelf.store.artifacts.glob("[!.]*"):
        assert {"manifest.json", "manifest.sig", "weights"} == {f.name for f in folder.iterdir()}
    house.collect()
    assert list(house.shelf.store.artifacts.iterdir()) == []
    assert list(house.shelf.store.list()) == []


def test_with_a_damaged_index_nothing_is_removed(house: House) -> None:
    house.put("chat", "a", used=1)
    (house.shelf.home / "names" / "chat.json").write_text("{")

    with pytest.raises(ArtifactTampered, match="index"):
        house.collect(models=[CHAT])
    assert house.there() == "a"


def test_the_command_keeps_what_the_configuration_names(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    house.put("chat", "a", used=1)
    house.put("other", "b", used=2)
    (house.shelf.home / "config.yaml").write_text("models: [chat]\n")

    words = ["models", "gc", "--keep-bytes", "0", "--home", str(house.shelf.home)]
    assert main([*words, "--json"]) == 0

    said = json.loads(capsys.readouterr().out)
    assert [each["artifact_id"][0] for each in said["removed"]] == ["b"]
    assert said["needed"] == {"a" * 64: "configured"}
    assert main(words) == 0
    assert "more than was asked for" in capsys.readouterr().out
    assert main([*words, "--keep-bytes", "much"]) == 3
