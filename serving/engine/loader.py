"""Artifact folder to engine. Nothing is loaded that a trusted key did not sign, byte for byte."""

import os
import weakref
from pathlib import Path

from headrace.serving.domain.artifact import MANIFEST_FILE, Manifest, VerifyMethod
from headrace.serving.engine.artifact_home import hold, trust_folder
from headrace.serving.engine.base import Engine
from headrace.serving.engine.file_hash import found_digests
from headrace.serving.engine.signature import trusted_keys, verify_signature
from headrace.serving.errors import ArtifactTampered, ArtifactUnverified

MANIFEST_BYTES_MAX = 2**20
KV_TOKENS = 16_384
"""Of an engine whose sequences share blocks, where nobody said how many: 32 rows of 512, and what
is left over keeps prefixes. At 135 M parameters 0.38 GB in bf16 (int8 and int4 engines), 0.75 GB
in fp32."""


def read_manifest(folder: Path) -> Manifest:
    """Read the folder's manifest, strictly.

    Raises:
        ArtifactTampered: it is missing, or not a manifest of this version.
    """
    return _parse(folder, _manifest_bytes(folder))


def signed_manifest(folder: Path, *, trust: Path | None = None) -> Manifest:
    """Read the manifest of a folder, if a trusted key signed it.

    Args:
        folder: an artifact.
        trust: the public keys that count; None takes those of the home that it lies in.

    Raises:
        ArtifactTampered: manifest or signature is missing, or they do not fit.
        ArtifactUntrusted: whoever signed is not trusted.
    """
    content = _manifest_bytes(folder)
    # The bytes that were verified are the bytes that are read.
    verify_signature(folder, content, trusted_keys(trust or trust_folder(folder)))
    return _parse(folder, content)


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest's digest, several at once; see `file_hash.py`.

    Raises:
        ArtifactTampered: a file is missing, differs, or lies outside the folder.
    """
    for name in manifest.files:
        if Path(name).name != name:
            raise _tampered(folder, f"The manifest names {name!r}, which is not in the folder.")
    for name, found in found_digests(folder, manifest.files):
        if isinstance(found, OSError):
            raise _tampered(folder, f"{name} is not readable: {found.strerror}.") from found
        if found != (expected := manifest.files[name]):
            raise _tampered(
                folder, f"{name} has SHA-256 {found[:17]}…, the manifest {expected[:17]}…."
            )


def load_engine(
    folder: Path,
    *,
    rows_max: int = 32,
    batch_tokens_max: int = 512,
    kv_tokens: int | None = None,
    sequence_tokens_max: int | None = None,
    threads: int = 2,
    trust: Path | None = None,
    allow_unverified: bool = False,
) -> tuple[Engine, Manifest]:
    """Verify signature and files, in this order, and load the engine; the caller closes it.

    While the engine object lives, the artifact is locked against removal.

    Args:
        folder: an artifact.
        rows_max: sequences a step may advance.
        batch_tokens_max: tokens a step may take.
        kv_tokens: tokens the KV pool holds, over all sequences; None takes what suits the engine.
        sequence_tokens_max: a bound below the model's own context; None keeps that.
        threads: of the engine's arithmetic.
        trust: the public keys that count; None takes those of the home that it lies in.
        allow_unverified: load it even if the engine itself was never run against the reference.

    Raises:
        ArtifactTampered: the folder is not what was built, or names an engine that is unknown.
        ArtifactUntrusted: it was signed with a key that is not trusted.
        ArtifactUnverified: the engine itself was never run, and that is not allowed.
    """
    held = hold(folder)
    try:
        manifest = signed_manifest(folder, trust=trust)
        verify_files(folder, manifest)
        if not allow_unverified:
            _require_verified(manifest)
        engine = open_engine(
            folder,
            manifest,
            rows_max=rows_max,
            batch_tokens_max=batch_tokens_max,
            kv_tokens=kv_tokens or default_kv_tokens(manifest, rows_max=rows_max),
            sequence_tokens_max=sequence_tokens_max,
            threads=threads,
        )
    except BaseException:
        os.close(held)
        raise
    weakref.finalize(engine, os.close, held)
    return engine, manifest


def default_kv_tokens(manifest: Manifest, *, rows_max: int) -> int:
    """Tokens of KV cache where nobody said how many.

    A TensorRT plan's cache is linear: each row has its place, and any smaller number would only
    leave rows out, or all of them. So every row gets one: 32 rows of 4,608 are 147,456 tokens. The
    plan has no more rows than its device was planned for, and takes no more.
    """
    facts = manifest.tensorrt
    return KV_TOKENS if facts is None else rows_max * facts.cache_tokens


def open_engine(
    folder: Path,
    manifest: Manifest,
    *,
    rows_max: int,
    batch_tokens_max: int,
    kv_tokens: int,
    sequence_tokens_max: int | None = None,
    threads: int,
) -> Engine:
    """Load an engine of files that are known to be right: verified, or just written by the caller.

    Compile verifies what it builds through this, before there is anything to sign.

    Raises:
        ArtifactTampered: the manifest names an engine that is unknown, or it cannot be loaded.
    """
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
    return kind(
        folder,
        manifest,
        rows_max=rows_max,
        batch_tokens_max=batch_tokens_max,
        kv_tokens=kv_tokens,
        threads=threads,
        sequence_tokens_max=sequence_tokens_max,
    )


def _require_verified(manifest: Manifest) -> None:
    method = manifest.verification.method
    if method is VerifyMethod.ENGINE:
        return
    what = "only its network was computed" if method is VerifyMethod.NETWORK else "nothing was run"
    raise ArtifactUnverified(
        f"The {manifest.target} engine {manifest.artifact_id[:12]} of {manifest.model} was not "
        "verified.",
        why=f"Its manifest says that {what}; the engine itself was never compared with "
        f"{manifest.verification.reference}.",
        fix=f"Where its device is, run `headrace models verify {manifest.model} --variant "
        f"{manifest.variant}`; or serve it as it is with `headrace serve --allow-unverified`.",
    )


def _manifest_bytes(folder: Path) -> bytes:
    try:
        with (folder / MANIFEST_FILE).open("rb") as file:
            content = file.read(MANIFEST_BYTES_MAX + 1)
    except OSError as error:
        raise _tampered(folder, f"{MANIFEST_FILE} is not readable: {error}.") from error
    if len(content) > MANIFEST_BYTES_MAX:
        raise _tampered(folder, f"{MANIFEST_FILE} is larger than {MANIFEST_BYTES_MAX:,} bytes.")
    return content


def _parse(folder: Path, content: bytes) -> Manifest:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _tampered(folder, f"{MANIFEST_FILE} is not readable: {error}.") from error
    return Manifest.from_json(text, where=str(folder / MANIFEST_FILE))


def _tampered(folder: Path, why: str) -> ArtifactTampered:
    return ArtifactTampered(
        f"The artifact {folder} is not what was built.",
        why=why,
        fix="Delete the folder and build it again with `headrace compile`.",
    )
