"""The home's key is made once, kept to its owner, and said to nobody; trust is given by people."""

import subprocess
import sys
from pathlib import Path

import pytest

from headrace.compile.signing import distrust, signing_key, trust, trusted
from headrace.deploy.cli import main
from headrace.serving.errors import ArtifactUntrusted, InvalidRequest, KeyNotFound
from tests.compile.shelf import Shelf


def private_text(home: Path) -> str:
    return (home / "keys" / "artifact-signing.pem").read_text()


def test_the_key_is_made_on_first_use_for_its_owner_only(tmp_path: Path) -> None:
    key = signing_key(tmp_path)

    path = tmp_path / "keys" / "artifact-signing.pem"
    assert path.stat().st_mode & 0o777 == 0o600
    assert signing_key(tmp_path).key_id == key.key_id
    assert [(each.key_id, each.is_own) for each in trusted(tmp_path)] == [(key.key_id, True)]
    assert key.key_id in repr(key)
    assert private_text(tmp_path).splitlines()[1] not in repr(key) + repr(vars(key))


def test_processes_that_come_at_once_agree_on_one_key(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "headrace.deploy.cli", "models", "key"]
    command += ["--home", str(tmp_path)]

    several = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = {one.communicate(timeout=60)[0] for one in several}

    assert len(said) == 1
    assert len(list((tmp_path / "trust").glob("*.pem"))) == 1


@pytest.mark.parametrize("text", ["", "nonsense", "-----BEGIN PRIVATE KEY-----\nsecret\n"])
def test_a_damaged_key_is_refused_without_quoting_it(text: str, tmp_path: Path) -> None:
    signing_key(tmp_path)
    (tmp_path / "keys" / "artifact-signing.pem").write_text(text)

    with pytest.raises(ArtifactUntrusted, match="backup") as refusal:
        signing_key(tmp_path)
    assert "secret" not in str(refusal.value)


def test_a_home_loads_anothers_artifacts_once_it_trusts_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole exchange as operators do it, with the commands that refusals name."""
    theirs, ours = Shelf(tmp_path / "theirs"), Shelf(tmp_path / "ours")
    folder, stated = theirs.put("m"), theirs.store.list()[0].manifest
    (ours.home / "artifacts").mkdir(parents=True)
    folder.rename(ours.store.folder(folder.name))
    ours.store.register(stated)
    assert main(["models", "key", "--home", str(theirs.home)]) == 0
    file = tmp_path / "their.pem"
    file.write_text(capsys.readouterr().out)

    with pytest.raises(ArtifactUntrusted, match="no key at all"):
        ours.store.resolve("m")
    assert main(["models", "trust", "add", str(file), "--home", str(ours.home)]) == 0
    assert ours.store.resolve("m").is_dir()
    key_id = signing_key(theirs.home).key_id
    assert main(["models", "trust", "list", "--home", str(ours.home)]) == 0
    assert main(["models", "trust", "remove", key_id, "--home", str(ours.home)]) == 0
    assert key_id in capsys.readouterr().out
    with pytest.raises(ArtifactUntrusted):
        ours.store.resolve("m")


def test_a_private_key_is_not_taken_for_a_public_one(tmp_path: Path) -> None:
    signing_key(tmp_path)

    with pytest.raises(InvalidRequest, match="models key") as refusal:
        trust(tmp_path, private_text(tmp_path).encode(), where="a file")
    assert private_text(tmp_path).splitlines()[1] not in str(refusal.value)


def test_distrusting_a_stranger_says_so(tmp_path: Path) -> None:
    with pytest.raises(KeyNotFound, match="trust list"):
        distrust(tmp_path, "0" * 32)


def test_a_file_among_the_trusted_that_is_no_key_is_refused(tmp_path: Path) -> None:
    """Left out silently, it would look like a key that lost its trust for no reason."""
    signing_key(tmp_path)
    (tmp_path / "trust" / "odd.pem").write_text("nonsense")

    with pytest.raises(ArtifactUntrusted, match=r"odd\.pem"):
        trusted(tmp_path)
