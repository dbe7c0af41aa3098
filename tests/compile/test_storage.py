"""A folder appears whole or not at all, whatever interrupts the writer."""

import errno
import os
import threading
from pathlib import Path

import pytest

from headrace.compile.storage import locked, require_room, staged, write_atomically
from headrace.serving.errors import StorageFull


def test_a_folder_appears_when_its_block_ends(tmp_path: Path) -> None:
    place = tmp_path / "store" / "a"

    with staged(place) as folder:
        (folder / "file").write_text("x")
        assert not place.exists()

    assert [path.name for path in place.parent.iterdir()] == ["a"]
    assert (place / "file").read_text() == "x"


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    place = tmp_path / "a"
    with staged(place) as folder:
        (folder / "file").write_text("old")

    with pytest.raises(FileNotFoundError), staged(place) as folder:
        (folder / "file").rename(folder / "missing" / "file")

    assert (place / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_leavings_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    leaving = tmp_path / ".a.killed"
    leaving.mkdir()
    (leaving / "half").write_text("x")

    with staged(tmp_path / "a"):
        pass

    assert not leaving.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_is_a_refusal(code: int, tmp_path: Path) -> None:
    with pytest.raises(StorageFull, match="Free space"), staged(tmp_path / "a"):
        raise OSError(code, os.strerror(code))

    assert list(tmp_path.iterdir()) == []


def test_another_system_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), staged(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "no")


def test_what_cannot_fit_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(StorageFull, match="are free"):
        require_room(tmp_path / "store", needed_bytes=2**60)


def test_a_small_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "index.json"

    write_atomically(path, "one")
    write_atomically(path, "two")

    assert path.read_text() == "two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["index.json"]


def test_two_builders_of_one_place_take_turns(tmp_path: Path) -> None:
    """Both see either nothing or the finished folder; one of them builds."""
    lock, place = tmp_path / "locks" / "a", tmp_path / "store" / "a"
    ready, built = threading.Barrier(4), []

    def build(name: str) -> None:
        ready.wait(timeout=10)
        with locked(lock):
            if place.is_dir():
                assert (place / "file").read_text()
                return
            with staged(place) as folder:
                (folder / "file").write_text(name)
            built.append(name)

    threads = [threading.Thread(target=build, args=(str(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)

    assert len(built) == 1
    assert (place / "file").read_text() == built[0]
