"""A real S3 server of its own for these tests, and a folder that fails when it is told to."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import fsspec
import pytest

from headrace.compile.progress import Silent
from headrace.compile.remote.fetch import Fetched, fetch
from headrace.compile.remote.objects import Folder, Objects
from headrace.compile.remote.patience import Remote
from headrace.compile.remote.push import Pushed, push
from headrace.compile.signing import SigningKey, signing_key, trust
from headrace.serving.domain.artifact import Precision
from headrace.serving.domain.signature import Purpose
from tests.compile.shelf import Shelf

T = TypeVar("T")

PART_BYTES = 1000
WEIGHTS = bytes(number % 251 for number in range(5300))
"""Six parts; with tokenizer, manifest (two or three parts) and signature some ten in all."""

_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class S3Server:
    """`moto` in a process of its own, on a port that the system chose."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for line in self._process.stdout:
            if line.strip().isdecimal():
                self.url = f"http://127.0.0.1:{line.strip()}"
                break

    def make_bucket(self, name: str) -> None:
        files = fsspec.filesystem("s3", endpoint_url=self.url, skip_instance_cache=True)
        files.mkdir(name)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="session")
def aws_key() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing-secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield


@pytest.fixture(scope="session")
def s3(aws_key: None) -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.kill()


@pytest.fixture
def doomed_s3(aws_key: None) -> Iterator[S3Server]:
    """One that a test may kill."""
    server = S3Server()
    yield server
    server.kill()


@dataclass
class Flaky:
    """Objects that count what is asked of them, and fail when told to."""

    objects: Objects
    calls: list[str] = field(default_factory=list)
    fails: Callable[[str, int], bool] = lambda call, number: False
    """Given a call and how many of its kind came before."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def holds(self, key: str, content: bytes) -> bool:
        return self._asked("holds", lambda: self.objects.holds(key, content))

    def put(self, key: str, content: bytes) -> None:
        self._asked("put", lambda: self.objects.put(key, content))

    def create(self, key: str, content: bytes) -> bool:
        return self._asked("create", lambda: self.objects.create(key, content))

    def get(self, key: str, *, bytes_max: int) -> bytes:
        return self._asked("get", lambda: self.objects.get(key, bytes_max=bytes_max))

    def names(self, prefix: str) -> Sequence[str]:
        return self._asked("names", lambda: self.objects.names(prefix))

    def _asked(self, call: str, answer: Callable[[], T]) -> T:
        with self._lock:
            before = self.calls.count(call)
            self.calls.append(call)
        if self.fails(call, before):
            raise ConnectionError("the line is dead")
        return answer()


class World:
    """Two homes and a store between them; `theirs` has a model and is trusted by `ours`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "store"
        self.theirs, self.ours = Shelf(folder / "theirs"), Shelf(folder / "ours")
        self.artifact = self.put("m", "a", WEIGHTS)
        trust(self.ours.home, signing_key(self.theirs.home).public_pem.encode(), where="a test")
        self.pauses: list[float] = []
        self.objects = Flaky(Folder(str(self.folder)))

    @property
    def remote(self) -> Remote:
        return Remote(self.objects, f"file://{self.folder}", self.pauses.append)

    def put(self, model: str, digit: str, weights: bytes) -> Path:
        tokenizer = b"{}" + b" " * 500
        return self.theirs.put(
            model, Precision.INT8, digit, weights=weights, tokenizer=tokenizer, empty=b""
        )

    def push(
        self, remote: Remote | None = None, folder: Path | None = None, model: str = "m"
    ) -> Pushed:
        return push(
            self.theirs.store,
            folder or self.artifact,
            remote or self.remote,
            model=model,
            progress=Silent(),
            part_bytes=PART_BYTES,
        )

    def fetch(
        self,
        remote: Remote | None = None,
        number: int | None = None,
        *,
        model: str = "m",
        variant: str | None = None,
    ) -> Fetched:
        return fetch(
            self.ours.store,
            remote or self.remote,
            model=model,
            number=number,
            variant=variant,
            progress=Silent(),
        )

    def descriptor(self, number: int = 1, model: str = "m") -> Path:
        return self.folder / "models" / model / f"{number:06}.json"

    def sign(self, path: Path, key: SigningKey | None = None) -> None:
        """Sign a descriptor that was changed, as `theirs` would, who is trusted."""
        stated = json.loads(path.read_text())["descriptor"]
        content = json.dumps(stated, sort_keys=True).encode()
        signature = (key or signing_key(self.theirs.home)).signature(content, Purpose.DESCRIPTOR)
        path.write_text(json.dumps({"descriptor": stated, "signature": signature.fields()}))

    def arrived(self) -> list[str]:
        """What can be seen in our home."""
        found = [path.name for path in self.ours.store.artifacts.glob("[!.]*")]
        assert len(found) == len(self.ours.versions("m"))
        return found

    def is_whole(self, folder: Path) -> bool:
        return {path.name: path.read_bytes() for path in folder.iterdir()} == {
            path.name: path.read_bytes() for path in self.artifact.iterdir()
        }

    def blobs(self) -> list[Path]:
        return sorted(self.folder.glob("blobs/sha256/[!.]*"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)
