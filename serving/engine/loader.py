"""Artifact folder to engine. Nothing is loaded before every file matched its hash."""

import hashlib
from pathlib import Path

from headrace.serving.domain.artifact import MANIFEST_FILE, Manifest
from headrace.serving.engine.base import Engine
from headrace.serving.errors import ArtifactTampered

MANIFEST_BYTES_MAX = 2**20
_READ_BYTES = 2**20


def read_manifest(folder: Path) -> Manifest:
    """Read the folder's manifest, strictly.

    Raises:
        ArtifactTampered: it is missing, or not a manifest of this version.
    """
    path = folder / MANIFEST_FILE
    try:
        if path.stat().st_size > MANIFEST_BYTES_MAX:
            raise _tampered(folder, f"{MANIFEST_FILE} is larger than {MANIFEST_BYTES_MAX:,} bytes.")
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _tampered(folder, f"{MANIFEST_FILE} is not readable: {error}.") from error
    return Manifest.from_json(text, where=str(path))


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest's SHA-256.

    Raises:
        ArtifactTampered: a file is missing, differs, or lies outside the folder.
    """
    for name, expected in manifest.files.items():
        if Path(name).name != name:
            raise _tampered(folder, f"The manifest names {name!r}, which is not in the folder.")
        try:
            found = _sha256(folder / name)
        except OSError as error:
            raise _tampered(folder, f"{name} is not readable: {error.strerror}.") from error
        if found != expected:
            raise _tampered(
                folder, f"{name} has SHA-256 {found[:12]}…, the manifest {expected[:12]}…."
            )


def load_engine(
    folder: Path,
    *,
    rows_max: int = 32,
    batch_tokens_max: int = 512,
    kv_tokens: int = 32_768,
    sequence_tokens_max: int | None = None,
    threads: int = 2,
) -> tuple[Engine, Manifest]:
    """Verify the folder and load its engine; the caller closes it.

    Args:
        folder: an artifact.
        rows_max: sequences a step may advance.
        batch_tokens_max: tokens a step may take.
        kv_tokens: tokens the KV pool holds, over all sequences.
        sequence_tokens_max: a bound below the model's own context; None keeps that.
        threads: of the engine's arithmetic.

    Raises:
        ArtifactTampered: the folder is not what was built, or names an engine that is unknown.
    """
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    # One engine is imported, not both: the other one costs memory that serving never uses.
    match manifest.engine:
        case "onnx":
            from headrace.serving.engine.onnx_engine import OnnxEngine as kind
        case "native":
            from headrace.serving.engine.native_engine import NativeEngine as kind
        case "tensorrt":
            from headrace.serving.engine.tensorrt import TensorRtEngine as kind
        case _:
            raise _tampered(folder, f"The manifest asks for an engine {manifest.engine!r}.")
    engine = kind(
        folder,
        manifest,
        rows_max=rows_max,
        batch_tokens_max=batch_tokens_max,
        kv_tokens=kv_tokens,
        threads=threads,
        sequence_tokens_max=sequence_tokens_max,
    )
    return engine, manifest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _tampered(folder: Path, why: str) -> ArtifactTampered:
    return ArtifactTampered(
        f"The artifact {folder} is not what was built.",
        why=why,
        fix="Delete the folder and build it again with `headrace compile`.",
    )
