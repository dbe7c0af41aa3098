"""`headrace serve` before anything runs: what it builds, refuses and prints."""

import fcntl
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

from headrace.deploy.cli import main
from headrace.deploy.commands.serve import build_missing, three_commands
from headrace.deploy.supervisor import Addresses
from headrace.serving.config import Config, ModelConfig
from headrace.serving.domain.artifact import Precision
from headrace.serving.errors import ModelNotFound
from tests.compile.shelf import Shelf, manifest, split

ADDRESSES = Addresses(grpc="127.0.0.1:50051", http="127.0.0.1:8080", directory="127.0.0.1:50052")


def test_a_model_that_can_be_neither_found_nor_fetched_is_named(tmp_path: Path) -> None:
    config = Config(home=tmp_path, models=(ModelConfig(name="my-own"),))

    with pytest.raises(ModelNotFound, match=r"my-own \(int8\) is configured and not built"):
        build_missing(config, Console())


def test_a_model_that_is_built_for_another_target_says_how_to_ask_for_it(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.put_manifest(split(manifest("my-own", Precision.BF16, "a"), tp=2))
    config = Config(home=tmp_path, models=(ModelConfig(name="my-own"),))

    with pytest.raises(ModelNotFound, match="`variant: rtx/bf16/tp2` beside `name: my-own`"):
        build_missing(config, Console())
    asked = config.with_overrides({"models.my-own.variant": "rtx/bf16/tp2"})
    build_missing(asked, Console())


def test_a_model_without_replicas_is_not_built(tmp_path: Path) -> None:
    build_missing(Config(home=tmp_path, models=(ModelConfig(name="off", replicas=0),)), Console())


def test_a_home_that_is_in_use_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of them would fight over ports, books and Ray's folder."""
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "frontend.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        assert main(["serve", "--role", "frontend", "--home", str(tmp_path)]) == 3
    assert f"Another `headrace serve` runs with {tmp_path}." in capsys.readouterr().err


def test_a_misspelled_setting_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["serve", "--home", str(tmp_path), "--set", "frontend.grpc_prot=1"]

    assert main(words) == 3
    assert "grpc_prot" in capsys.readouterr().err


def test_the_commands_to_try_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newcomer's shell has neither our PATH nor our HEADRACE_HOME."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / ".venv/bin/headrace"), "serve"])
    config = Config(home=tmp_path / "my home")
    first, second, third = three_commands(config, ADDRESSES)

    assert first.startswith(f"HEADRACE_HOME='{tmp_path}/my home' .venv/bin/headrace chat \"")
    assert 'chat --json-schema \'{"type":"object"' in second
    assert third == f"HEADRACE_HOME='{tmp_path}/my home' .venv/bin/headrace usage"


def test_the_commands_are_short_where_they_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "headrace"
    script.touch(mode=0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(script))
    monkeypatch.setattr(sys, "argv", [str(script), "serve"])
    monkeypatch.setenv("HOME", str(tmp_path))
    commands = three_commands(Config(home=tmp_path / ".headrace"), ADDRESSES)

    assert commands[0].startswith('headrace chat "')
    assert commands[2] == "headrace usage"


def test_the_commands_name_the_model_and_the_address_where_they_must(tmp_path: Path) -> None:
    models = (ModelConfig(name="large"), ModelConfig(name="small"))
    moved = Addresses(grpc="127.0.0.1:7", http="127.0.0.1:8", directory="127.0.0.1:9")
    first, _, _ = three_commands(Config(home=tmp_path, models=models), moved)

    assert "chat --model large --address 127.0.0.1:7" in first
