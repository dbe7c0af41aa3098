"""Nothing is loaded that is not exactly what was built."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.serving.domain.artifact import Decoder, Manifest, Precision, Verification
from headrace.serving.engine.loader import load_engine, read_manifest, verify_files
from headrace.serving.errors import ArtifactTampered

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
    """Write an artifact's folder, with changes to its manifest."""

    def write(**changes: object) -> Path:
        for name, content in CONTENT.items():
            (tmp_path / name).write_bytes(content)
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
        (tmp_path / "manifest.json").write_text(json.dumps(raw))
        return tmp_path

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

    with pytest.raises(ArtifactTampered):
        load_engine(folder)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactTampered, match="manifest"):
        load_engine(tmp_path)


def test_an_engine_nobody_knows_is_refused(artifact: Callable[..., Path]) -> None:
    with pytest.raises(ArtifactTampered, match="'steam'"):
        load_engine(artifact())
