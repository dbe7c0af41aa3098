"""`headrace compile` and `headrace models`, as a person and as a script see them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.deploy.amounts import parse_bytes
from headrace.deploy.cli import main
from headrace.serving.errors import InvalidRequest


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def source(checkpoint: Callable[[str], Path]) -> str:
    return str(checkpoint("llama"))


def test_a_model_is_compiled_once_and_listed(
    source: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = ["compile", source, "--precision", "fp32", "--home", str(home)]

    assert main([*order, "--name", "small"]) == 0
    assert "Built small in fp32" in capsys.readouterr().out
    assert main([*order, "--name", "small"]) == 0
    assert "Nothing was done" in capsys.readouterr().out
    assert main([*order, "--name", "small", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["is_new"] is False
    assert main(["models", "--home", str(home), "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["model"], listed["precision"], listed["engine"]) == ("small", "fp32", "onnx")
    assert main(["models", "list", "--home", str(home)]) == 0
    assert "small" in capsys.readouterr().out


def test_a_dry_run_builds_nothing(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = ["compile", source, "--dry-run", "--json", "--home", str(tmp_path / "home")]

    assert main([*order, "--tp", "2", "--device-memory", "1GiB"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert len(found["ranks"]) == 2
    assert found["ranks"][0].keys() == {
        "weight_bytes",
        "kv_bytes_per_token",
        "activation_bytes",
        "kv_tokens_max",
    }
    assert not (tmp_path / "home").exists()


def test_a_dry_run_that_does_not_fit_ends_with_3(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = ["compile", source, "--dry-run", "--json", "--home", str(tmp_path)]

    assert main([*order, "--device-memory", "1KB"]) == 3
    assert json.loads(capsys.readouterr().out)["fits"] is False


def test_a_refusal_says_what_why_and_how(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", "hf://a/b", "--home", str(tmp_path)]) == 3

    said = capsys.readouterr().err
    assert "hf://a/b" in said
    assert "why:" in said
    assert "fix:" in said


def test_no_models_says_how_to_begin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--home", str(tmp_path)]) == 0

    assert "headrace models pull smollm2-135m" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1000", 1000),
        ("24GiB", 24 * 2**30),
        ("1.5k", 1500),
        ("700 MB", 700_000_000),
        ("2ti", 2**41),
    ],
)
def test_amounts_are_read_with_their_unit(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-1", "0", "5XB", "1e3"])
def test_other_amounts_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--device-memory"):
        parse_bytes(text)


def test_serving_code_never_imports_torch() -> None:
    """Store, loader and the listing command belong to processes that must stay small."""
    program = (
        "import sys\n"
        "import headrace.compile.store, headrace.serving.engine.loader\n"
        "import headrace.serving.engine.onnx_engine, headrace.deploy.commands.models\n"
        "assert not {'torch', 'transformers', 'gguf', 'onnx'} & sys.modules.keys()\n"
    )

    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
