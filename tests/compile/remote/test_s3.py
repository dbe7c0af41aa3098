"""The same over the wire: a real S3 server, killed clients and killed servers."""

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from headrace.compile.remote import objects
from headrace.compile.remote.objects import Bucket, Folder, Objects, open_objects
from headrace.compile.remote.patience import Remote, open_remote
from headrace.deploy.cli import main
from headrace.serving.errors import InvalidRequest, ModelNotFound, RemoteStoreFault
from tests.compile.remote.conftest import S3Server, World


@pytest.fixture
def url(s3: S3Server) -> str:
    """An empty prefix of the server's bucket."""
    name = f"b-{uuid.uuid4().hex[:8]}"
    s3.make_bucket(name)
    return f"s3://{name}/artifacts"


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    if request.param == "folder":
        return Folder(str(tmp_path / "objects"))
    url, server = request.getfixturevalue("url"), request.getfixturevalue("s3")
    return Bucket(url.removeprefix("s3://"), endpoint_url=server.url)


def test_a_folder_and_a_bucket_keep_the_same_promises(place: Objects) -> None:
    assert not place.holds("a/b", b"one")
    place.put("a/b", b"one")
    place.put("a/b", b"two")

    assert (place.holds("a/b", b"two"), place.holds("a/b", b"one")) == (True, False)
    assert place.get("a/b", bytes_max=3) == b"two"
    assert place.get("a/b", bytes_max=1) == b"tw"
    assert place.create("a/c", b"mine")
    assert not place.create("a/c", b"yours")
    assert place.get("a/c", bytes_max=10) == b"mine"
    assert sorted(place.names("a")) == ["b", "c"]
    assert list(place.names("nothing")) == []
    with pytest.raises(FileNotFoundError):
        place.get("a/d", bytes_max=1)


def test_an_artifact_goes_through_s3_by_commands(
    world: World, url: str, s3: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(home: Path, *words: str) -> dict[str, object]:
        words = ("models", *words, "--endpoint-url", s3.url, "--home", str(home), "--json")
        assert main(words) == 0
        return json.loads(capsys.readouterr().out)

    assert run(world.theirs.home, "push", "m", url)["version"] == 1
    assert run(world.theirs.home, "push", "m@1", url)["is_new"] is False
    assert run(world.ours.home, "fetch", "m", url)["is_new"] is True
    listed = run(world.ours.home, "versions", "m", "--at", url)["versions"]

    assert [each["artifact_id"] for each in listed] == ["a" * 64]
    assert world.is_whole(world.ours.store.resolve("m"))
    words = ["models", "fetch", "m@2", url, "--endpoint-url", s3.url]
    assert main([*words, "--home", str(world.ours.home)]) == 3
    assert "has no version 2" in capsys.readouterr().err


def test_a_server_that_dies_in_mid_upload_leaves_nothing_to_fetch(
    world: World, doomed_s3: S3Server, s3: S3Server, url: str
) -> None:
    """It is refused within its tries; a push to a server that lives is whole."""
    doomed_s3.make_bucket("bucket")
    world.objects.objects = open_objects("s3://bucket/a", endpoint_url=doomed_s3.url)

    def dies(call: str, before: int) -> bool:
        if call == "put" and before == 3:
            doomed_s3.kill()
        return False

    world.objects.fails = dies
    with pytest.raises(RemoteStoreFault, match="does not answer"):
        world.push()

    living = open_remote(url, endpoint_url=s3.url)
    with pytest.raises(ModelNotFound):
        world.fetch(living)
    world.push(living)
    assert world.is_whole(world.fetch(living).folder)


_KILLS_ITSELF = """
import os, signal, sys
from pathlib import Path
from headrace.compile.progress import Silent
from headrace.compile.remote.objects import Bucket
from headrace.compile.remote.{verb} import {verb}
from headrace.compile.remote.patience import open_remote
from headrace.compile.store import Store

home, url, endpoint = sys.argv[1:]
calls, real = 0, Bucket.{call}

def counted(self, *arguments, **options):
    global calls
    calls += 1
    if calls == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *arguments, **options)

Bucket.{call} = counted
store, remote = Store(Path(home)), open_remote(url, endpoint_url=endpoint)
{run}
"""
_PUSHES = "push(store, store.resolve('m'), remote, model='m', progress=Silent(), part_bytes=1000)"
_FETCHES = "fetch(store, remote, model='m', number=None, variant=None, progress=Silent())"


def kill_in_the_middle(verb: str, call: str, run: str, *arguments: str) -> None:
    program = _KILLS_ITSELF.format(verb=verb, call=call, run=run)
    ended = subprocess.run([sys.executable, "-c", program, *arguments], check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL


def test_a_push_and_a_fetch_that_were_killed_go_on(world: World, url: str, s3: S3Server) -> None:
    """SIGKILL at the sixth part of each; the next run moves only what is missing."""
    kill_in_the_middle("push", "put", _PUSHES, str(world.theirs.home), url, s3.url)
    remote = open_remote(url, endpoint_url=s3.url)
    with pytest.raises(ModelNotFound):
        world.fetch(remote)
    assert world.push(remote).kept_bytes >= 2000

    kill_in_the_middle("fetch", "get", _FETCHES, str(world.ours.home), url, s3.url)
    assert world.arrived() == []
    fetched = world.fetch(remote)
    assert world.is_whole(fetched.folder)
    assert fetched.received_bytes < sum(len(f.read_bytes()) for f in world.artifact.iterdir())


def test_a_bucket_that_is_not_there_is_said_at_once(world: World, s3: S3Server) -> None:
    remote = Remote(Bucket("nobody/a", endpoint_url=s3.url), "s3://nobody/a", world.pauses.append)

    with pytest.raises(RemoteStoreFault, match="Make the bucket first"):
        world.push(remote)
    assert world.pauses == []


def test_without_credentials_it_is_said_which(
    world: World, url: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", os.devnull)

    with pytest.raises(RemoteStoreFault, match="AWS_ACCESS_KEY_ID"):
        world.push(open_remote(url, endpoint_url=s3.url))


@pytest.mark.parametrize(
    "url", ["", "s3://", "https://host/x", "file://folder", "s3://key:secret@bucket/x", "/folder"]
)
def test_other_urls_are_refused_and_not_repeated(url: str) -> None:
    """Somebody's secret may stand in one."""
    with pytest.raises(InvalidRequest, match="s3://bucket/prefix") as refusal:
        objects.open_objects(url)
    assert "secret@" not in str(refusal.value)
