"""What one home pushes another fetches, exactly, whatever fails in between."""

import json
import threading
from pathlib import Path

import pytest

from headrace.compile.collector import collect
from headrace.compile.names_index import Cause
from headrace.compile.remote.parallel import PARTS_AT_ONCE
from headrace.compile.remote.patience import PAUSES_S
from headrace.compile.signing import distrust, signing_key
from headrace.deploy.cli import main
from headrace.serving.domain.artifact import Precision
from headrace.serving.errors import (
    ArtifactTampered,
    ArtifactUntrusted,
    ModelNotFound,
    RemoteStoreFault,
)
from tests.compile.remote.conftest import WEIGHTS, World
from tests.compile.shelf import Shelf, manifest, split


def test_an_artifact_goes_from_home_to_home(world: World) -> None:
    pushed = world.push()
    fetched = world.fetch()

    assert (pushed.version, pushed.is_new, pushed.kept_bytes) == (1, True, 0)
    assert world.is_whole(fetched.folder)
    assert world.ours.store.resolve("m") == fetched.folder
    assert [each.cause for each in world.ours.store.index("m").history] == [Cause.FETCH]


def test_pushing_and_fetching_twice_moves_nothing(world: World) -> None:
    world.push()
    world.fetch()

    again = world.push()

    assert (again.version, again.is_new, again.sent_bytes) == (1, False, 0)
    assert not world.fetch().is_new
    assert len(world.ours.versions("m")) == 1


def test_the_only_variant_there_is_is_pushed_and_of_several_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf, order = Shelf(tmp_path / "home"), ["models", "push", "m", f"file://{tmp_path}/store"]
    order += ["--home", str(shelf.home), "--json"]
    shelf.put_manifest(split(manifest("m", Precision.BF16, "b"), tp=2))

    assert main(order) == 0
    assert json.loads(capsys.readouterr().out)["artifact_id"] == "b" * 64

    shelf.put_manifest(split(manifest("m", Precision.BF16, "c"), tp=4))
    assert main(order) == 3
    assert "rtx/bf16/tp2, rtx/bf16/tp4" in capsys.readouterr().err
    assert main([*order, "--variant", "rtx/bf16/tp4"]) == 0
    assert json.loads(capsys.readouterr().out)["artifact_id"] == "c" * 64


def test_a_version_that_differs_in_a_little_sends_a_little(world: World) -> None:
    """Parts are named by their content, so what two versions share is there once."""
    world.push()
    other = world.put("m", "b", WEIGHTS[:-100] + b"x" * 100)

    pushed = world.push(folder=other)

    assert pushed.version == 2
    assert pushed.kept_bytes >= 5000 + 502
    assert pushed.sent_bytes < 2000
    assert world.fetch().artifact_id[0] == "b"
    assert world.fetch(number=1).artifact_id[0] == "a"


def test_a_push_that_fails_anywhere_is_invisible_and_goes_on_where_it_was(world: World) -> None:
    """The line dies after each single part; every run gets one more through."""
    world.objects.fails = lambda call, before: call == "put" and before > 0

    failures = 0
    while failures < 20:
        world.objects.calls.clear()
        try:
            pushed = world.push()
            break
        except RemoteStoreFault:
            failures += 1
            assert len(world.blobs()) == failures
            with pytest.raises(ModelNotFound):
                world.fetch()

    assert len(world.blobs()) == failures + 1
    assert pushed.sent_bytes <= 1000
    assert world.is_whole(world.fetch().folder)


def test_a_fetch_that_fails_anywhere_leaves_nothing_to_see_and_goes_on(world: World) -> None:
    world.push()
    world.objects.calls.clear()

    received: list[int] = []
    for number in range(1, 20):
        world.objects.calls.clear()
        world.objects.fails = lambda call, before, n=number: call == "get" and before >= n
        try:
            received.append(world.fetch().received_bytes)
        except RemoteStoreFault:
            assert world.arrived() == []
            continue
        break

    assert world.is_whole(world.ours.store.resolve("m"))
    assert received[0] < len(WEIGHTS)


def test_a_store_that_is_away_for_a_moment_is_waited_for(world: World) -> None:
    world.objects.fails = lambda call, before: call == "put" and before in (0, 2, 4)

    world.push()

    assert 3 <= len(world.pauses) <= 4
    assert set(world.pauses) <= set(PAUSES_S)


def test_a_store_that_stays_away_is_given_up_in_bounded_time(world: World) -> None:
    world.objects.fails = lambda call, before: True

    with pytest.raises(RemoteStoreFault, match="Run the same command again"):
        world.push()
    assert len(world.pauses) <= len(PAUSES_S) * PARTS_AT_ONCE


def test_a_part_that_was_changed_on_the_store_is_not_taken(world: World) -> None:
    world.push()
    biggest = max(world.blobs(), key=lambda path: (path.stat().st_size, path.name))
    content = biggest.read_bytes()
    biggest.write_bytes(content[:-1] + b"?")

    with pytest.raises(ArtifactTampered, match="Push the version again"):
        world.fetch()
    assert world.arrived() == []
    pushed = world.push()
    assert (pushed.is_new, pushed.sent_bytes) == (False, 1000)
    assert world.is_whole(world.fetch().folder)


def test_a_part_that_is_gone_is_said_to_be(world: World) -> None:
    world.push()
    world.blobs()[0].unlink()

    with pytest.raises(ArtifactTampered, match="is gone"):
        world.fetch()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"descriptor_version": 2', '"descriptor_version": 1'),
        ('"version": 1', '"version": "1"'),
        ('"descriptor": {', '"statement": {'),
        ('"key_id"', '"signer"'),
        ('"weights"', '"../../weights"'),
        ('"weights"', '".weights"'),
        ('"weights"', '"tokenizer"'),
        ('"part_bytes": 1000', '"part_bytes": 100000000'),
        ('"part_bytes": 1000', '"part_bytes": "1000"'),
        ('"pushed_at"', '"pushed_by"'),
        ('"files": [', '"files": ' + "[" * 5000),
        ('"artifact_id": "a', '"artifact_id": "/'),
    ],
)
def test_a_damaged_descriptor_brings_nothing(old: str, new: str, world: World) -> None:
    world.push()
    path = world.descriptor()
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))

    with pytest.raises(ArtifactTampered):
        world.fetch()
    assert world.arrived() == []
    assert list(world.ours.store.artifacts.glob("*")) == []


@pytest.mark.parametrize(
    ("old", "new", "refused"),
    [
        ('"artifact_id": "a', '"artifact_id": "b', "manifest is that of aaaa"),
        ('"variant": "cpu/int8"', '"variant": "cpu/fp32"', "says that it is cpu/int8"),
        ('"name": "empty"', '"name": "hollow"', "others than those in the manifest"),
        ('"name": "manifest.sig"', '"name": "manifest.asc"', r"no manifest\.sig"),
    ],
)
def test_a_descriptor_that_is_signed_and_wrong_brings_nothing(
    old: str, new: str, refused: str, world: World
) -> None:
    """Two signatures, of descriptor and manifest, must say the same."""
    world.push()
    path = world.descriptor()
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    world.sign(path)

    with pytest.raises(ArtifactTampered, match=refused):
        world.fetch()
    assert world.arrived() == []


def test_files_that_changed_places_on_the_store_are_refused(world: World) -> None:
    """All parts are right, and so are the signatures; only that the files are in wrong places."""
    world.push()
    path = world.descriptor()
    text = path.read_text().replace('"name": "weights"', '"name": "x"')
    path.write_text(text.replace('"tokenizer"', '"weights"').replace('"x"', '"tokenizer"'))
    world.sign(path)

    with pytest.raises(ArtifactTampered, match="SHA-256"):
        world.fetch()
    assert world.arrived() == []


def test_whoever_is_not_trusted_cannot_send_us_anything(world: World) -> None:
    world.push()
    distrust(world.ours.home, signing_key(world.theirs.home).key_id)

    with pytest.raises(ArtifactUntrusted, match="models trust add"):
        world.fetch()
    assert world.objects.calls.count("get") <= 5
    assert list(world.ours.store.artifacts.glob("*")) == []


def test_what_is_damaged_here_is_not_sent(world: World) -> None:
    (world.artifact / "weights").write_bytes(b"?" * len(WEIGHTS))

    with pytest.raises(ArtifactTampered, match="weights"):
        world.push()
    assert world.blobs() == []


def test_several_who_push_at_once_get_a_version_each(world: World) -> None:
    folders = [world.artifact, *(world.put("m", digit, WEIGHTS + b"x") for digit in "bcdef")]
    ready, pushed = threading.Barrier(12), []

    def work(folder: Path) -> None:
        ready.wait(timeout=10)
        pushed.append(world.push(folder=folder))

    threads = [threading.Thread(target=work, args=(folder,)) for folder in folders * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)

    versions = {each.artifact_id: each.version for each in pushed}
    assert len(pushed) == 12
    assert sorted(versions.values()) == [1, 2, 3, 4, 5, 6]
    for artifact_id, version in versions.items():
        assert world.fetch(number=version).artifact_id == artifact_id


def test_the_answer_that_was_lost_makes_no_second_version(world: World) -> None:
    """The store wrote the descriptor and the line broke before it said so."""
    create = world.objects.objects.create
    answers = iter([False])

    def lost(key: str, content: bytes) -> bool:
        wrote = create(key, content)
        return next(answers, wrote)

    world.objects.objects.create = lost

    assert world.push().version == 1
    assert world.push().version == 1


def test_what_a_killed_fetch_left_is_removed_by_the_collector(world: World) -> None:
    world.push()
    world.objects.calls.clear()
    world.objects.fails = lambda call, before: call == "get" and before >= 6
    with pytest.raises(RemoteStoreFault):
        world.fetch()

    found = collect(world.ours.store, [], keep_bytes=1 << 40, dry_run=False)

    assert len(found.leavings) == 1
    assert list(world.ours.store.artifacts.glob("*")) == []
