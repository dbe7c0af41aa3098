"""Who keeps a store can refuse to answer, and cannot make a name mean something else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.compile.remote import seen
from headrace.compile.remote.patience import Remote
from headrace.compile.signing import distrust, signing_key, trust
from headrace.deploy.cli import main
from headrace.serving.domain.artifact import Precision
from headrace.serving.domain.signature import Purpose
from headrace.serving.errors import ArtifactTampered, ArtifactUntrusted, ModelNotFound
from tests.compile.remote.conftest import WEIGHTS, World
from tests.compile.shelf import Shelf


def restate(path: Path, **changes: object) -> None:
    """What who keeps the store can do: change what is written, and sign nothing."""
    raw = json.loads(path.read_text())
    raw["descriptor"] |= changes
    path.write_text(json.dumps(raw))


@pytest.fixture
def two(world: World) -> World:
    """`bank-approved` and `tiny-untuned` on the store, both by a home that we trust."""
    world.push(folder=world.put("tiny-untuned", "c", b"untuned"), model="tiny-untuned")
    world.push(folder=world.put("bank-approved", "b", WEIGHTS), model="bank-approved")
    return world


@pytest.mark.parametrize(
    "renamed",
    [
        pytest.param(lambda path: restate(path, model="bank-approved", version=2), id="edited"),
        pytest.param(lambda path: None, id="replayed as it was"),
    ],
)
def test_a_model_is_not_replaced_by_another_that_is_signed_too(
    two: World, renamed: Callable[[Path], None]
) -> None:
    other, newest = two.descriptor(1, "tiny-untuned"), two.descriptor(2, "bank-approved")
    newest.write_bytes(other.read_bytes())
    renamed(newest)

    for number in (None, 2):
        with pytest.raises(ArtifactTampered, match="is not what was signed there"):
            two.fetch(number=number, model="bank-approved")
    assert two.fetch(number=1, model="bank-approved").artifact_id[0] == "b"


def test_a_variant_is_not_replaced_by_another(world: World) -> None:
    narrow = world.theirs.put("m", Precision.INT4, "b", weights=b"int4")
    world.push(folder=narrow)

    with pytest.raises(ModelNotFound, match="It is cpu/int4"):
        world.fetch(number=1, variant="cpu/fp32")
    restate(world.descriptor(), variant="cpu/fp32")
    with pytest.raises(ArtifactTampered, match="is not what was signed there"):
        world.fetch(variant="cpu/fp32")
    assert world.arrived() == []


def test_an_old_version_is_not_shown_as_the_newest(world: World) -> None:
    """Copied to a higher number, it would be what everybody fetches."""
    world.push()
    world.push(folder=world.put("m", "b", WEIGHTS + b"x"))
    world.descriptor(3).write_bytes(world.descriptor(1).read_bytes())

    with pytest.raises(ArtifactTampered, match="What was signed is 'm', version 1"):
        world.fetch()


def test_a_descriptor_without_a_signature_is_refused_and_replaced_by_the_next_push(
    world: World,
) -> None:
    world.push()
    raw = json.loads(world.descriptor().read_text())
    world.descriptor().write_text(json.dumps(raw["descriptor"]))

    with pytest.raises(ArtifactTampered, match="no descriptor with a signature"):
        world.fetch()
    assert world.push().version == 2
    assert world.fetch().remote_version == 2


def test_a_descriptor_by_a_stranger_is_refused_whoever_signed_the_artifact(
    world: World, tmp_path: Path
) -> None:
    """And to his friends it is his word: they trust him, and still the artifact's builder too."""
    stranger = signing_key(Shelf(tmp_path / "stranger").home)
    world.push()
    world.sign(world.descriptor(), stranger)

    with pytest.raises(ArtifactUntrusted, match=f"000001.json was signed .*{stranger.key_id}"):
        world.fetch()
    assert world.push().version == 2
    trust(world.ours.home, stranger.public_pem.encode(), where="a test")
    assert world.fetch(number=1).is_new
    distrust(world.ours.home, stranger.key_id)
    assert world.fetch().remote_version == 2


def test_a_signature_of_a_manifest_signs_no_descriptor(world: World) -> None:
    world.push()
    raw = json.loads(world.descriptor().read_text())
    content = json.dumps(raw["descriptor"], sort_keys=True).encode()
    wrong = signing_key(world.theirs.home).signature(content, Purpose.MANIFEST)
    raw["signature"] = wrong.fields()
    world.descriptor().write_text(json.dumps(raw))

    with pytest.raises(ArtifactTampered, match="does not fit it"):
        world.fetch()


def test_a_newest_version_that_was_seen_cannot_be_hidden(world: World) -> None:
    """Taking it away would bring back the version whose fault it mended."""
    world.push()
    world.push(folder=world.put("m", "b", WEIGHTS + b"x"))
    world.fetch()
    world.descriptor(2).unlink()

    with pytest.raises(ArtifactTampered, match=r"is 1, and this home has seen 2.*m@1 file://"):
        world.fetch()
    assert world.fetch(number=1).artifact_id[0] == "a"
    with pytest.raises(ArtifactTampered, match="has seen 2"):
        world.fetch()


def test_a_version_counts_as_seen_even_if_its_parts_were_withheld(world: World) -> None:
    world.push()
    world.push(folder=world.put("m", "b", WEIGHTS + b"x"))
    for path in world.blobs():
        path.unlink()
    with pytest.raises(ArtifactTampered, match="is gone"):
        world.fetch()
    world.descriptor(2).unlink()

    with pytest.raises(ArtifactTampered, match="has seen 2"):
        world.fetch()


def test_each_variant_and_each_store_has_a_newest_version_of_its_own(world: World) -> None:
    world.push()
    world.push(folder=world.theirs.put("m", Precision.INT4, "b", weights=b"int4"))
    world.push(folder=world.put("m", "c", WEIGHTS + b"x"))
    elsewhere = Remote(world.objects, f"file://{world.folder}", endpoint_url="https://other")
    world.fetch()
    assert world.fetch(variant="cpu/int4").remote_version == 2

    world.descriptor(3).unlink()

    assert world.fetch(variant="cpu/int4").remote_version == 2
    with pytest.raises(ArtifactTampered, match=r"newest cpu/int8 .* is 1, and .* seen 3"):
        world.fetch(variant="cpu/int8")
    assert world.fetch(elsewhere).remote_version == 2


def test_what_was_seen_is_bounded_and_the_least_recent_goes_first(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen, "SEEN_MAX", 2)
    world.push()
    for name in ("x", "y", "x", "z"):
        world.fetch(Remote(world.objects, f"file:///{name}"))

    raw = json.loads((world.ours.home / "remotes.json").read_text())
    assert [each["place"] for each in raw["seen"]] == ["file:///x", "file:///z"]


@pytest.mark.parametrize("text", ["", "[]", '{"seen_version": 1, "seen": [{}]}', "[" * 99_999])
def test_what_was_seen_is_not_guessed_where_it_is_damaged(text: str, world: World) -> None:
    world.push()
    world.ours.home.mkdir(exist_ok=True)
    (world.ours.home / "remotes.json").write_text(text)

    with pytest.raises(ArtifactTampered, match=r"Restore it .* or delete it"):
        world.fetch()


def test_versions_at_a_store_are_listed_as_they_were_signed(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.push()
    words = ["models", "versions", "m", "--at", f"file://{world.folder}"]

    assert main([*words, "--home", str(world.ours.home)]) == 0
    restate(world.descriptor(), variant="cpu/fp32")
    assert main([*words, "--home", str(world.ours.home)]) == 3
    assert "is not what was signed there" in capsys.readouterr().err
