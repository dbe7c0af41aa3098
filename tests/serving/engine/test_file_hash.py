"""A long file is hashed in parts, by several threads, and one changed byte of any part shows."""

from hashlib import sha256
from pathlib import Path

import pytest

from headrace.serving.domain.file_digest import PART_BYTES, fits
from headrace.serving.engine.file_hash import found_digests, stated_digests


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """Two parts and three bytes, zeros up to the last."""
    path = tmp_path / "plan"
    with path.open("wb") as file:
        file.truncate(2 * PART_BYTES)
        file.seek(2 * PART_BYTES)
        file.write(b"end")
    return path


def by_hand() -> str:
    zeros, end = sha256(bytes(PART_BYTES)).digest(), sha256(b"end").digest()
    return "tree:" + sha256(zeros + zeros + end).hexdigest()


def test_a_long_file_has_a_tree_and_a_short_one_its_own_hash(long: Path) -> None:
    short = long.with_name("short")
    short.write_bytes(b"x")

    assert stated_digests([long, short]) == {
        "plan": by_hand(),
        "short": sha256(b"x").hexdigest(),
    }


def test_a_file_is_hashed_as_it_was_stated(long: Path) -> None:
    """Manifests from before trees stay true, and are proved by one stream."""
    with long.open("rb") as file:
        stream = sha256(file.read()).hexdigest()

    assert list(found_digests(long.parent, {"plan": stream})) == [("plan", stream)]
    assert list(found_digests(long.parent, {"plan": by_hand()})) == [("plan", by_hand())]
    assert fits(long.read_bytes(), stream)
    assert fits(long.read_bytes(), by_hand())


@pytest.mark.parametrize("at", [0, PART_BYTES, 2 * PART_BYTES + 2])
def test_one_changed_byte_of_any_part_shows(long: Path, at: int) -> None:
    with long.open("r+b") as file:
        file.seek(at)
        file.write(b"!")

    assert [found for _, found in found_digests(long.parent, {"plan": by_hand()})] != [by_hand()]
    assert not fits(long.read_bytes(), by_hand())


def test_parts_that_changed_places_show(long: Path) -> None:
    content = long.read_bytes()
    long.write_bytes(content[PART_BYTES:] + content[:PART_BYTES])

    assert not fits(long.read_bytes(), by_hand())


def test_what_cannot_be_read_is_told_in_its_turn(long: Path) -> None:
    stated = {"plan": by_hand(), "gone": "tree:" + "0" * 64, "lost": "0" * 64}

    (_, right), (gone, missing), (lost, absent) = found_digests(long.parent, stated)

    assert (right, gone, lost) == (by_hand(), "gone", "lost")
    assert isinstance(missing, FileNotFoundError)
    assert isinstance(absent, FileNotFoundError)
