"""The command as such: help, version, exit codes."""

import importlib
import subprocess
import sys

import pytest

from headrace.deploy.cli import VERBS, main


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])

    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert set(VERBS) <= {line.split()[0] for line in shown.splitlines() if line.startswith("    ")}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])

    assert ended.value.code == 0
    assert f"usage: headrace {verb}" in capsys.readouterr().out


def test_help_imports_no_verb() -> None:
    """`headrace --help` answers at once: grpc, rich and Ray are a second of imports."""
    code = (
        "import sys, headrace.deploy.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'grpc', 'ray', 'rich', 'numpy', 'torch', 'yaml'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert ran.stdout.splitlines()[-1] == "[]"


def test_an_unknown_verb_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serv"])

    assert ended.value.code == 2
    assert "invalid choice: 'serv'" in capsys.readouterr().err


def test_the_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])

    assert ended.value.code == 0
    assert capsys.readouterr().out == "headrace 0.1.0\n"


@pytest.mark.parametrize("module", ["serve", "chat"])
def test_torch_stays_out_of_the_serving_commands(module: str) -> None:
    importlib.import_module(f"headrace.deploy.commands.{module}")
    code = f"import sys, headrace.deploy.commands.{module}; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert ran.stdout == "False\n"
