"""`make gpu-check` without a GPU: arguments, report, exit status, and the parts over fakes."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from headrace.deploy.bench import random_checkpoint
from headrace.serving.domain.artifact import Decoder
from headrace.serving.engine.tensorrt import TensorRtEngine
from headrace.serving.errors import OutsideTolerance
from headrace.serving.testing.fake_artifact import fake_manifest, write_fake_artifact
from headrace.serving.testing.fake_device import FakeDevice
from headrace.serving.testing.fake_tensorrt import FakeTensorRt

SMALL = Decoder(
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=96,
    vocab=300,
    rms_eps=1e-6,
    qkv_bias=False,
    qk_norm=True,
    tied=True,
    context_tokens=256,
)
CARD = {"name": "Fake GPU", "compute_capability": "9.0"}
RIGHT = {"name": "m", "weights": "random", "target": "h200", "is_right": True, "steps": []}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of this folder, which import each other as a script's do."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import check
    import engine_part

    yield SimpleNamespace(check=check, engine_part=engine_part)
    for name in ("check", "engine_part", "pytorch_part"):
        sys.modules.pop(name, None)


def pytorch(**changes: Any) -> SimpleNamespace:
    usual = {
        "has_gpu": lambda: True,
        "card": lambda: CARD,
        "ceilings": lambda: {"copy_gb_s": 4000.0},
        "agreements": dict,
        "is_right": lambda found: True,
        "steps": lambda copy_gb_s, until_s: iter([{"ms": 1.0}]),
        "SHAPES": {"qwen3-0.6b": SMALL, "smollm2-135m": SMALL},
    }
    return SimpleNamespace(**(usual | changes))


def engines(*results: dict[str, object], why: str | None = None) -> SimpleNamespace:
    left = iter(results)
    return SimpleNamespace(
        why_not=lambda capability: why,
        target_of=lambda capability: ("h200", "tensorrt"),
        models=lambda work, shapes, smollm2: results,
        check=lambda model, target, **rest: next(left),
    )


@pytest.mark.parametrize(
    ("torch_part", "engine_part", "status"),
    [
        pytest.param(pytorch(), engines(RIGHT), 0, id="all is right"),
        pytest.param(pytorch(has_gpu=lambda: False), engines(), 3, id="no gpu"),
        pytest.param(pytorch(), engines(why="none"), 4, id="no tensorrt"),
        pytest.param(pytorch(is_right=lambda found: False), engines(RIGHT), 1, id="torch wrong"),
        pytest.param(
            pytorch(),
            engines(RIGHT, RIGHT | {"is_right": False, "refused": {"what": "Off."}}),
            1,
            id="an engine is wrong",
        ),
    ],
)
def test_the_exit_status_says_what_was_checked(
    torch_part: SimpleNamespace, engine_part: SimpleNamespace, status: int,
    gpu: SimpleNamespace, tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "report.json"

    assert gpu.check.main(["--out", str(out)], pytorch=torch_part, engines=engine_part) == status


def test_without_tensorrt_the_report_says_so_plainly(
    gpu: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"

    gpu.check.main(["--out", str(out)], pytorch=pytorch(), engines=engines(why="none is here"))

    report = json.loads(out.read_text())
    assert report["engines"] == {"ran": False, "why": "none is here", "models": []}
    assert report["steps"] == [{"ms": 1.0}]
    assert "ENGINES ARE NOT CHECKED: none is here" in capsys.readouterr().out


def test_a_machine_with_pytorch_alone_still_measures_it(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "engine_part", None)
    out = tmp_path / "report.json"

    assert gpu.check.main(["--out", str(out)], pytorch=pytorch()) == gpu.check.NOT_CHECKED
    assert "engine_part is not installed" in json.loads(out.read_text())["engines"]["why"]


@pytest.mark.parametrize(
    ("capability", "said"),
    [
        pytest.param("7.5", "no target is for compute capability 7.5", id="an older card"),
        pytest.param("9.0", "tensorrt is not installed", id="tensorrt is not on PyPI"),
    ],
)
def test_a_card_without_an_engine_is_told_why(
    capability: str, said: str, gpu: SimpleNamespace
) -> None:
    assert said in gpu.engine_part.why_not(capability)


def test_each_card_has_its_target(gpu: SimpleNamespace) -> None:
    target_of = gpu.engine_part.target_of

    assert [target_of(each)[0] for each in ("9.0", "10.0", "8.9", "12.0")] == [
        "h200", "b200", "rtx", "rtx",
    ]  # fmt: skip


class Bench:
    """One check of a fake artifact by the real engine class, over a fake device."""

    def __init__(self, parts: SimpleNamespace, folder: Path, monkeypatch: Any) -> None:
        self.part: ModuleType = parts.engine_part
        self.manifest = write_fake_artifact(folder, fake_manifest(vocab=40))
        self.folder = folder
        monkeypatch.setattr(self.part, "load_engine", self._load)
        monkeypatch.setattr(self.part, "CONTEXTS", (40, 2048))
        monkeypatch.setattr(self.part, "CHUNKS", (16, 512))

    def _load(self, folder: Path, *, allow_unverified: bool, **sizes: int) -> Any:
        device = FakeDevice()
        library = FakeTensorRt(device)
        assert allow_unverified
        engine = TensorRtEngine(
            folder, self.manifest, threads=1, device=device, library=library, **sizes
        )
        return engine, self.manifest

    def check(self) -> dict[str, Any]:
        model = self.part.Model(name="m", source=str(self.folder), weights="random")
        return self.part.check(
            model,
            "h200",
            home=self.folder,
            copy_gb_s=1.0,
            until_s=float("inf"),
            build=lambda model, target, home: self.folder,
        )


def test_an_engine_is_timed_in_every_size_it_has_room_for(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(gpu, tmp_path, monkeypatch)
    monkeypatch.setattr(bench.part, "verified", lambda engine, manifest, source: {"logits": "same"})

    found = bench.check()

    assert found["is_right"]
    assert (found["rows_max"], found["plan_bytes"]) == (8, 1000)
    sizes = [(each["kind"], each["rows"], each["context"]) for each in found["steps"]]
    assert sizes == [("decode", 1, 40), ("decode", 8, 40), ("prefill", 1, 16)]
    assert all(each["ms"] > 0 for each in found["steps"])


def test_an_engine_that_is_wrong_is_reported_and_not_timed(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OutsideTolerance("It differs.", why="It does.", fix="Report it.")

    bench = Bench(gpu, tmp_path, monkeypatch)
    monkeypatch.setattr(bench.part, "verified", refuse)

    found = bench.check()

    assert not found["is_right"]
    assert found["refused"]["what"] == "It differs."
    assert "steps" not in found


def test_a_random_checkpoint_is_one_that_compile_and_transformers_read(
    gpu: SimpleNamespace, tmp_path: Path
) -> None:
    """The same decoder comes back, and its logits are finite and of some spread."""
    from headrace.compile.checkpoint import open_checkpoint
    from headrace.compile.families.registry import describe
    from headrace.compile.reference import reference_logits

    folder = random_checkpoint.write_random(tmp_path / "m", SMALL, rope_theta=1e6)
    checkpoint = open_checkpoint(folder)
    (logits,) = reference_logits(checkpoint, [[1, 2, 3]])

    assert describe(checkpoint).decoder == SMALL
    assert 0.1 < logits.std() < 100
