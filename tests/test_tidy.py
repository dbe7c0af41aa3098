"""House rules a linter does not know. Each failure names the file, the line and the fix.

A rule lives here when breaking it once is cheap and breaking it a hundred times is not. To
change a limit, change the number here in a commit that says why.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("serving", "compile", "deploy")
SOURCES = sorted(
    path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if "pb" not in path.relative_to(ROOT).parts
)

FILE_LINES_MAX = 450
FUNCTION_LINES_MAX = 75

# A dependency has one home, so replacing it is one folder's work.
HOMES: dict[str, tuple[str, ...]] = {
    "grpc": ("serving/frontend", "serving/channel", "serving/testing", "deploy"),
    "ray": ("deploy",),
    "torch": ("compile", "deploy/bench"),
    "transformers": ("compile", "deploy/bench"),
    "onnxruntime": ("serving/engine/onnx_engine.py",),
    "cuda": ("serving/engine/cuda_device.py",),
    "tensorrt": ("serving/engine/tensorrt_library.py", "compile/tensorrt"),
    "tensorrt_rtx": ("serving/engine/tensorrt_library.py", "compile/tensorrt"),
    "sqlite3": (
        "serving/metering",
        "serving/admission",
        "serving/idempotency",
        "serving/jobs",
        "deploy/checkup.py",
    ),
    "joserfc": ("serving/admission/operator_token.py", "serving/metering/sla_signature.py"),
    "yaml": ("serving/config", "deploy"),
    "psycopg": (
        "serving/metering/ledger/postgres_database.py",
        "serving/admission/database_postgres.py",
        "serving/idempotency",
        "serving/testing/postgres.py",
    ),
    "pyarrow": ("serving/metering/ledger/focus_parquet.py",),
    "prometheus_client": ("serving/observe", "serving/frontend"),
    "google_crc32c": ("serving/metering/meterlog",),
    "llguidance": ("serving/engine/structured.py",),
    "fsspec": ("compile/remote/objects.py",),
    "s3fs": ("compile/remote/objects.py",),
    "botocore": ("compile/remote/objects.py",),
    "aiohttp": ("serving/frontend", "deploy/bench"),
}

# Nothing from outside is ever unpickled or evaluated.
BANNED = re.compile(r"import (pickle|cloudpickle|marshal)|torch\.load|(?<![.\w])(eval|exec)\(")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
VAGUE = {"utils", "util", "helpers", "common", "misc", "manager", "types"}


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module


def long_functions(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                yield f"{node.lineno}: {node.name} has {lines} lines; split it"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_is_tidy(path: Path) -> None:
    where = path.relative_to(ROOT).as_posix()
    text = path.read_text()
    tree = ast.parse(text)
    problems = [f"{where}:{problem}" for problem in long_functions(tree)]

    if path.stem in VAGUE:
        problems.append(f"{where}: name it after what it does, not where code was left")
    if text.strip() and not ast.get_docstring(tree):
        problems.append(f"{where}:1: say in one line what this module is for")
    if (lines := text.count("\n")) > FILE_LINES_MAX:
        problems.append(f"{where}: {lines} lines; split at the seam that made it grow")
    for line, name in imports(tree):
        homes = HOMES.get(name.split(".")[0])
        if homes and not where.startswith(homes):
            problems.append(f"{where}:{line}: {name} lives in {homes}; depend on a protocol here")
    for number, line in enumerate(text.splitlines(), 1):
        code = line.split("#")[0]
        if BANNED.search(code):
            problems.append(f"{where}:{number}: nothing from outside is unpickled or evaluated")
        if UNFINISHED.search(line):
            problems.append(f"{where}:{number}: unfinished work does not reach main")

    assert not problems, "\n".join(problems)


def test_every_package_is_packed() -> None:
    """A folder missing from pyproject.toml imports here and is absent from the wheel."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packed = set(pyproject["tool"]["setuptools"]["packages"])

    present = {
        "headrace." + init.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for package in PACKAGES
        for init in (ROOT / package).rglob("__init__.py")
    }
    present = {name.replace("headrace.serving.pb", "headrace.v1") for name in present}

    assert present == packed


def test_serving_never_imports_torch() -> None:
    """The serving install stays small: torch and transformers are for export only."""
    script = (
        "import pkgutil, importlib, sys\n"
        "import headrace.serving as s\n"
        "for m in pkgutil.walk_packages(s.__path__, 'headrace.serving.'):\n"
        "    if '_native' not in m.name and '.pb' not in m.name:\n"
        "        importlib.import_module(m.name)\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_generated_messages_are_current(tmp_path: Path) -> None:
    """serving/pb is what protoc makes of protos/ today."""
    protos = sorted(str(path) for path in (ROOT / "protos").rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "protos")]
    command += [f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}", *protos]
    subprocess.run(command, check=True, timeout=60)

    for made in (tmp_path / "headrace" / "v1").glob("*.py"):
        assert (ROOT / "serving" / "pb" / made.name).read_text() == made.read_text()


def test_imports_point_one_way() -> None:
    """The layers of pyproject.toml hold: the edge knows the core, never the other way round."""
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stdout[-3000:]
