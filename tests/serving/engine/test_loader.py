"""Nothing is loaded that is not exactly what was built, and signed by somebody we trust."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from headrace.serving.domain.artifact import Decoder, Manifest, Precision, Verification
from headrace.serving.engine.artifact_home import hold, nobody_uses
from headrace.serving.engine.loader import (
    load_engine,
    read_manifest,
    signed_manifest,
    verify_files,
)
from headrace.serving.errors import ArtifactTampered, ArtifactUntrusted, ArtifactUnverified
from headrace.serving.testing.signing import sign_artifact, trust_key

DECODER = Decoder(
    layers=1,
    hidden=32,
    heads=2,
    kv_heads=1,
    head_dim=16,
    ffn=32,
    vocab=64,
    rms_eps=1e-5,
    qkv_bias=False,
    qk_norm=False,
    tied=True,
    context_tokens=64,
)
VERIFICATION = Verification(
    reference="none",
    tokens=1,
    max_abs_error=0.0,
    top1_agreement=1.0,
    perplexity=2.0,
    perplexity_reference=2.0,
    tolerance="none",
)
CONTENT = {"weights": b"numbers", "tokenizer.json": b"{}"}


@pytest.fixture
def artifact(tmp_path: Path) -> Callable[..., Path]:
    """Write a signed artifact into a home, with changes to its manifest."""
    folder = tmp_path / "artifacts" / "a"
    trust_key(tmp_path / "trust")

    def write(**changes: object) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in CONTENT.items():
            (folder / name).write_bytes(content)
        manifest = Manifest(
            artifact_id="0" * 64,
            model="m",
            family="qwen",
            target="cpu",
            precision=Precision.INT8,
            engine="steam",
            decoder=DECODER,
            eos_token_ids=(1,),
            bos_token_id=None,
            weight_bytes=7,
            verification=VERIFICATION,
            source="file://x",
            files={name: hashlib.sha256(data).hexdigest() for name, data in CONTENT.items()},
        )
        raw = json.loads(manifest.to_json()) | changes
        (folder / "manifest.json").write_text(json.dumps(raw))
        sign_artifact(folder)
        return folder

    return write


def test_a_folder_that_matches_its_manifest_passes(artifact: Callable[..., Path]) -> None:
    folder = artifact()

    verify_files(folder, read_manifest(folder))


@pytest.mark.parametrize("name", CONTENT)
def test_one_changed_byte_is_refused(name: str, artifact: Callable[..., Path]) -> None:
    folder = artifact()
    content = bytearray((folder / name).read_bytes())
    content[0] ^= 1
    (folder / name).write_bytes(content)

    with pytest.raises(ArtifactTampered, match=name):
        load_engine(folder)


def test_a_missing_file_is_named(artifact: Callable[..., Path]) -> None:
    folder = artifact()
    (folder / "weights").unlink()

    with pytest.raises(ArtifactTampered, match="weights is not readable"):
        load_engine(folder)


def test_a_file_outside_the_folder_is_refused(artifact: Callable[..., Path]) -> None:
    folder = artifact(files={"../../etc/passwd": "0" * 64})

    with pytest.raises(ArtifactTampered, match="not in the folder"):
        load_engine(folder)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"manifest_version": 1}, id="another version"),
        pytest.param({"surprise": 1}, id="an unknown field"),
        pytest.param({"precision": "fp7"}, id="an unknown precision"),
        pytest.param({"decoder": {}}, id="no facts"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(
    changes: dict[str, object], artifact: Callable[..., Path]
) -> None:
    with pytest.raises(ArtifactTampered, match="headrace compile"):
        load_engine(artifact(**changes))


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"{}" + b" " * 2**21])
def test_a_manifest_that_is_no_text_is_refused(text: bytes, artifact: Callable[..., Path]) -> None:
    folder = artifact()
    (folder / "manifest.json").write_bytes(text)
    sign_artifact(folder)

    with pytest.raises(ArtifactTampered):
        load_engine(folder)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactTampered, match="manifest"):
        load_engine(tmp_path)


def test_an_engine_nobody_knows_is_refused(artifact: Callable[..., Path]) -> None:
    with pytest.raises(ArtifactTampered, match="'steam'"):
        load_engine(artifact())


def test_one_changed_byte_of_the_manifest_is_refused(artifact: Callable[..., Path]) -> None:
    """Whoever changes a file would change its hash too; the signature is what he cannot make."""
    folder = artifact()
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"weight_bytes": 7', '"weight_bytes": 8'))

    with pytest.raises(ArtifactTampered, match="does not fit its manifest"):
        load_engine(folder)


@pytest.mark.parametrize(
    "text", [None, "", "{}", '{"key_id": "a", "signature": "!"}', "[" * 4000, "x" * 5000]
)
def test_without_a_signature_nothing_is_read(
    text: str | None, artifact: Callable[..., Path]
) -> None:
    folder = artifact()
    if text is None:
        (folder / "manifest.sig").unlink()
    else:
        (folder / "manifest.sig").write_text(text)

    with pytest.raises(ArtifactTampered, match=r"manifest\.sig.*headrace compile"):
        load_engine(folder)


def test_a_key_nobody_trusts_here_is_refused_by_name(artifact: Callable[..., Path]) -> None:
    folder, stranger = artifact(), Ed25519PrivateKey.generate()
    sign_artifact(folder, stranger)

    with pytest.raises(ArtifactUntrusted, match="models trust add"):
        load_engine(folder)


def test_trust_can_lie_elsewhere(artifact: Callable[..., Path], tmp_path: Path) -> None:
    """A cluster mounts the trusted keys apart from the artifacts that everybody may write."""
    folder = artifact()

    with pytest.raises(ArtifactUntrusted, match="no key at all"):
        load_engine(folder, trust=tmp_path / "elsewhere")
    with pytest.raises(ArtifactTampered, match="'steam'"):
        load_engine(folder, trust=trust_key(tmp_path / "elsewhere"))


def test_plans_of_two_ranks_that_changed_places_are_refused(artifact: Callable[..., Path]) -> None:
    """Each is a right file; rank 0 with the weights of rank 1 would answer nonsense."""
    folder = artifact()
    one, other = (folder / name for name in CONTENT)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)

    with pytest.raises(ArtifactTampered, match="SHA-256"):
        load_engine(folder)


@pytest.mark.parametrize("method", ["network", "none"])
def test_an_engine_that_was_never_run_is_refused_unless_allowed(
    method: str, artifact: Callable[..., Path]
) -> None:
    folder = artifact(verification={**asdict(VERIFICATION), "method": method})

    with pytest.raises(ArtifactUnverified, match="--allow-unverified"):
        load_engine(folder)
    with pytest.raises(ArtifactTampered, match="'steam'"):
        load_engine(folder, allow_unverified=True)


def test_loading_is_seen_by_whoever_wants_to_remove(
    artifact: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "uses").mkdir()

    held = hold(artifact())

    assert (tmp_path / "uses" / "a").exists()
    with (tmp_path / "artifacts" / "a" / "manifest.json").open() as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(held)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_manifest_that_is_replaced_while_it_is_opened_is_held_all_the_same(
    artifact: Callable[..., Path],
) -> None:
    """`headrace models verify` replaces it; a replica that starts just then is not refused."""
    folder = artifact()
    path = folder / "manifest.json"
    with path.open("r+b") as old, ThreadPoolExecutor(1) as pool:
        fcntl.flock(old, fcntl.LOCK_EX)
        holding = pool.submit(hold, folder)
        (folder / "anew").write_bytes(path.read_bytes())
        (folder / "anew").rename(path)
        fcntl.flock(old, fcntl.LOCK_UN)
        held = holding.result()

    assert os.path.samestat(os.fstat(held), path.stat())
    with nobody_uses(folder) as is_unused:
        assert not is_unused
    os.close(held)


def test_two_signatures_stand_where_a_manifest_is_being_replaced(
    artifact: Callable[..., Path],
) -> None:
    """One of them has to fit, and to be of a key that is trusted; three are none of ours."""
    folder, stranger = artifact(), Ed25519PrivateKey.generate()
    file = folder / "manifest.sig"
    right = file.read_text()
    sign_artifact(folder, stranger)
    theirs = file.read_text()

    file.write_text(theirs + right)
    assert signed_manifest(folder).model == "m"
    file.write_text(theirs + theirs)
    with pytest.raises(ArtifactUntrusted):
        signed_manifest(folder)
    file.write_text(right * 3)
    with pytest.raises(ArtifactTampered, match="3 lines"):
        signed_manifest(folder)
