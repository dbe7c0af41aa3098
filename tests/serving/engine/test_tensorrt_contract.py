"""Every call we make of TensorRT exists, with that signature, in the libraries themselves.

`tensorrt` 11.4 cannot be installed without NVIDIA's own index, but its bindings are on PyPI and ask
for a handful of C symbols: three stub libraries have them, and the docstrings say the rest. They
are fetched by pip, once for each machine. `tensorrt_rtx` is asked where it is installed.
"""

import ast
import fcntl
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from headrace.serving.engine import tensorrt_api
from headrace.serving.testing import fake_tensorrt

ROOT = Path(__file__).parents[3]
RUNNING = sorted((ROOT / "serving" / "engine").glob("tensorrt*.py"))
BUILDING = sorted((ROOT / "compile").rglob("tensorrt/*.py"))
DUMP = Path(__file__).with_name("tensorrt_dump.py")

VERSION = fake_tensorrt.VERSION
WHEEL_SHA256 = "d072ac2a095e2be749fefc847adfb25d5ebe70303401df62ede8fe67a59f27fc"
STUBS = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)

Api = Mapping[str, Mapping[str, list[list[str]]]]
"""Class to member to its overloads' parameters; see tensorrt_dump.py."""

LAYER = "a layer"
MODULE = "the module"

RECEIVERS: dict[str, str] = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "definition": "INetworkDefinition",
    "layer": LAYER,
    "rank_build.py:made": "IOptimizationProfile",
    "weight_layers.py:back": LAYER,
    "weight_layers.py:network": "INetworkDefinition",
    "weight_layers.py:rounded": LAYER,
    "interpreter.py:network": "INetworkDefinition",
    "interpreter_attention.py:facts": "IAttention",
    "trt": MODULE,
}
"""What our building code calls an object of TensorRT, by the last word of the expression: its
class."""

DYNAMIC: dict[str, tuple[str, ...]] = {
    "ActivationType": ("SIGMOID",),
    "BuilderFlag": ("WEIGHT_STREAMING", "REFIT_INDIVIDUAL"),
    "CollectiveOperation": ("ALL_REDUCE", "ALL_GATHER", "ALL_TO_ALL"),
    "ComputeCapability": ("SM80", "SM86", "SM89", "SM120"),
    "DataType": ("FLOAT", "BF16", "FP8", "INT4", "INT32", "INT64", "BOOL"),
    "ElementWiseOperation": ("SUM", "PROD", "SUB", "DIV", "LESS"),
    "ReduceOperation": ("SUM", "AVG", "MAX", "NONE"),
    "UnaryOperation": ("SQRT",),
}
"""Enumerators that our code takes by a name it was given: `getattr(trt.ReduceOperation, name)`."""

ONLY_RTX = {"ComputeCapability", "set_compute_capability", "num_compute_capabilities"}
"""What TensorRT-RTX has besides; our code asks with hasattr before it uses them."""


@pytest.fixture(scope="session")
def tensorrt_11(tmp_path_factory: pytest.TempPathFactory) -> Api:
    """The API of `tensorrt` 11.4, out of its bindings."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the pinned wheel of the bindings is for Python 3.11")
    unpacked = tmp_path_factory.mktemp("bindings")
    with zipfile.ZipFile(_fetched()) as wheel:
        wheel.extractall(unpacked)
    source = unpacked / "stub.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for name in STUBS:
        stub = f"{name}.so.11"
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{stub}", "-o", unpacked / stub, source]
        subprocess.run(command, check=True, timeout=60)
    found = _dumped("tensorrt_bindings", PYTHONPATH=unpacked, LD_LIBRARY_PATH=unpacked)
    assert found["version"] == VERSION
    return found["api"]


@pytest.fixture(scope="session")
def tensorrt_rtx() -> Api:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13")
    return _dumped("tensorrt_rtx")["api"]


@pytest.fixture(params=["tensorrt_11", "tensorrt_rtx"])
def api(request: pytest.FixtureRequest) -> Api:
    return request.getfixturevalue(request.param)


def _fetched() -> Path:
    """The wheel, fetched by pip against its hash; kept for later runs."""
    kept = Path(os.environ.get("HEADRACE_TEST_HOME") or ROOT / "build" / "test-home")
    folder = kept / f"tensorrt-bindings-{VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (found := sorted(folder.glob("*.whl"))):
            wanted = folder / "requirements.txt"
            wanted.write_text(f"tensorrt-cu13-bindings=={VERSION} --hash=sha256:{WHEEL_SHA256}\n")
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
            pip += ["--require-hashes", "--dest", str(folder), "-r", str(wanted), "--quiet"]
            ran = subprocess.run(pip, capture_output=True, text=True, timeout=120)
            if ran.returncode:
                pytest.skip(f"the bindings are not here and pip cannot fetch them: {ran.stderr}")
            found = sorted(folder.glob("*.whl"))
    return found[0]


def _dumped(module: str, **paths: Path) -> dict:
    environment = {**os.environ, **{name: str(path) for name, path in paths.items()}}
    done = subprocess.run(
        [sys.executable, DUMP, module],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return json.loads(done.stdout)


# At run time: type checkers hold our code to the protocols, this holds the protocols.


PROTOCOLS = [
    tensorrt_api.ICudaEngine,
    tensorrt_api.IExecutionContext,
    tensorrt_api.Runtime,
    tensorrt_api.ExecutionContextAllocationStrategy,
    tensorrt_api.DataType,
    tensorrt_api.TensorIOMode,
]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda each: each.__name__)
def test_what_the_runtime_calls_has_the_signature_we_give_it(protocol: type, api: Api) -> None:
    members = api[protocol.__name__]

    for name, ours in _members(protocol):
        assert name in members, f"{protocol.__name__} has no {name}"
        if callable(ours):
            given = list(inspect.signature(ours).parameters)[1:]
            overloads = [[each.rstrip("=") for each in one] for one in members[name]]
            assert given in overloads, f"{protocol.__name__}.{name} takes {overloads}"


def test_a_logger_of_ours_is_one_of_theirs(api: Api) -> None:
    assert api["ILogger"]["log"] == [["severity", "msg"]]
    assert api["ILogger"]["__init__"] == [[]]
    assert api["Runtime"]["__init__"] == [["logger"]]
    assert {each.name for each in fake_tensorrt.Severity} <= api["ILogger"].keys()


def test_the_fake_answers_as_the_library_does(api: Api) -> None:
    """Type names that the plan's check compares, and every method of the fakes."""
    assert {each.name for each in fake_tensorrt.DataType} <= api["DataType"].keys()
    assert {each.name for each in fake_tensorrt.TensorIOMode} == {"NONE", "INPUT", "OUTPUT"}
    for fake, real in (
        (fake_tensorrt.FakeContext, "IExecutionContext"),
        (fake_tensorrt.FakeEngine, "ICudaEngine"),
        (fake_tensorrt.FakeRuntime, "Runtime"),
    ):
        for name, ours in _members(fake):
            assert name in api[real]
            if callable(ours):
                given = list(inspect.signature(ours).parameters)[1:]
                assert given in [[each.rstrip("=") for each in one] for one in api[real][name]]


def _members(kind: type) -> Iterator[tuple[str, object]]:
    annotated = dict.fromkeys(inspect.get_annotations(kind))
    for name, value in {**annotated, **vars(kind)}.items():
        if not name.startswith("_"):
            yield name, value


@pytest.mark.parametrize("path", RUNNING, ids=lambda path: path.name)
def test_the_runtime_calls_nothing_that_the_protocols_do_not_have(path: Path, api: Api) -> None:
    ours = {name for protocol in PROTOCOLS for name, _ in _members(protocol)}
    theirs = {name for each in PROTOCOLS for name in api[each.__name__] if not name.startswith("_")}

    used = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }

    assert not (used & theirs) - ours


# At build time the library's objects are untyped: our source is read instead.


@pytest.mark.parametrize("path", BUILDING, ids=lambda path: path.name)
def test_what_the_builder_calls_exists(path: Path, api: Api) -> None:
    """Of receivers in the table: the member, and of a call an overload that takes so many."""
    problems = []
    for node, receiver in _accesses(path):
        if receiver == MODULE:
            found = [{}] if node.attr in api else []
        else:
            found = [api[each] for each in _classes(receiver, api) if node.attr in api[each]]
        if not found and node.attr not in ONLY_RTX:
            problems.append(f"{path.name}:{node.lineno}: {receiver} has no {node.attr}")
        overloads = [one for members in found for one in members.get(node.attr, [])]
        call = getattr(node, "call", None)
        if call and overloads and not any(_takes(one, call) for one in overloads):
            problems.append(f"{path.name}:{node.lineno}: {node.attr} takes {overloads}")

    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("path", BUILDING, ids=lambda path: path.name)
def test_the_builder_calls_nothing_on_an_object_that_the_table_does_not_know(
    path: Path, tensorrt_rtx: Api
) -> None:
    ours = {node.name for node in ast.walk(_tree(path)) if isinstance(node, ast.FunctionDef)}
    theirs = {
        member
        for name, members in tensorrt_rtx.items()
        if name.startswith("I") or name == "Builder"
        for member, overloads in members.items()
        if overloads and member.startswith(("add_", "set_", "get_", "create_", "mark_", "build_"))
    }

    called = {ast.unparse(node) for node in _attributes(path) if node.attr in theirs - ours}

    assert called <= {ast.unparse(node) for node, _ in _accesses(path)}


@pytest.mark.parametrize("name", DYNAMIC)
def test_enumerators_taken_by_name_exist(name: str, api: Api) -> None:
    if name not in ONLY_RTX or name in api:
        assert set(DYNAMIC[name]) <= api[name].keys()


@pytest.mark.parametrize("path", BUILDING, ids=lambda path: path.name)
def test_every_enumeration_taken_by_name_is_in_the_table(path: Path) -> None:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            taken = node.args[0]
            if isinstance(taken, ast.Attribute) and _receiver(path, taken) == MODULE:
                assert taken.attr in DYNAMIC, f"{path.name}:{node.lineno}"


@cache
def _tree(path: Path) -> ast.AST:
    """The file's tree, in which an attribute that is called knows its call, and a name that its
    function declares to be of ours knows that."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            vars(node.func)["call"] = node
        if isinstance(node, ast.FunctionDef):
            typed = [each for each in node.args.args if each.annotation]
            ours = {each.arg for each in typed if ast.unparse(each.annotation) != "Any"}
            for inner in ast.walk(node):
                if isinstance(inner, ast.Name) and inner.id in ours:
                    vars(inner)["is_ours"] = True
    return tree


def _attributes(path: Path) -> Iterator[ast.Attribute]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Attribute) and not node.attr.startswith("__"):
            yield node


def _accesses(path: Path) -> Iterator[tuple[ast.Attribute, str]]:
    """Attributes of receivers that the table knows."""
    for node in _attributes(path):
        if (receiver := _receiver(path, node)) is not None:
            yield node, receiver


def _receiver(path: Path, node: ast.Attribute) -> str | None:
    inner = node.value
    if isinstance(inner, ast.Attribute) and _receiver(path, inner) == MODULE:
        return inner.attr  # `trt.DataType.BF16`: the class is named.
    if hasattr(inner, "is_ours"):
        return None
    word = inner.id if isinstance(inner, ast.Name) else getattr(inner, "attr", "")
    return RECEIVERS.get(f"{path.name}:{word}") or RECEIVERS.get(word)


def _classes(receiver: str, api: Api) -> list[str]:
    if receiver == LAYER:
        return [name for name in api if name.endswith("Layer") or name == "IAttention"]
    return [receiver] if receiver in api else []


def _takes(overload: list[str], call: ast.Call) -> bool:
    if any(isinstance(each, ast.Starred) for each in call.args):
        return True  # As many as a list of ours holds.
    names = [each.rstrip("=") for each in overload]
    given = {*names[: len(call.args)], *(each.arg for each in call.keywords)}
    needed = {each for each in overload if not each.endswith("=")}
    return len(call.args) <= len(names) and needed <= given <= set(names)
