"""`headrace models verify`: an artifact's engine is run where its device is.

What was built where no device answers says that only its network was computed, and serving refuses
it. Here the engine itself is compared with `transformers` on the same texts as when it was built,
and the manifest is replaced by one that says so, signed by this home.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from headrace.compile.artifact_key import weights_digest
from headrace.compile.builder import verify_engine
from headrace.compile.checkpoint import open_checkpoint
from headrace.compile.pipeline import locate, prompts_for
from headrace.compile.progress import Progressing
from headrace.compile.signing import SigningKey, signing_key
from headrace.compile.storage import locked, write_atomically
from headrace.compile.store import Store
from headrace.compile.tensors import Checkpoint
from headrace.serving.domain.artifact import MANIFEST_FILE, Manifest, Verification
from headrace.serving.domain.signature import SIGNATURE_FILE, Purpose
from headrace.serving.engine.artifact_home import nobody_uses, trust_folder
from headrace.serving.engine.cuda_device import capability_here, device_here
from headrace.serving.engine.loader import signed_manifest, verify_files
from headrace.serving.engine.signature import trusted_keys, verify_signature
from headrace.serving.errors import (
    ArtifactInUse,
    ArtifactUntrusted,
    CheckpointUnreadable,
    DeviceUnsuitable,
    ModelNotFound,
    UnsupportedModel,
)
from headrace.serving.tokenizer import Tokenizer

Capability = Callable[[], str | None]
"""Answers the compute capability of the GPU here."""


def verify_stored(
    store: Store,
    folder: Path,
    *,
    checkpoint: Path | None,
    threads: int,
    progress: Progressing,
    capability: Capability = capability_here,
) -> Manifest:
    """Run an artifact's engine against the reference; the manifest that says so.

    Whatever is refused, and wherever it is killed, the artifact stays as it was.

    Args:
        store: of this home.
        folder: of the artifact in it.
        checkpoint: what it was built of; None takes what the manifest names, where that is here.
        threads: of engines that compute on the CPU.
        progress: told of every stage.
        capability: asks for the GPU.

    Raises:
        ArtifactTampered, ArtifactUntrusted: it is not what was built and signed.
        ArtifactInUse: a process has it loaded.
        CheckpointUnreadable: the checkpoint is not here, or another one.
        DeviceUnsuitable: this machine cannot run the engine, or lacks the reference.
        OutsideTolerance: the engine differs too much.
        StorageFull: the disk has no room for a manifest.
    """
    with locked(store.lock_file(folder.name)):
        manifest = signed_manifest(folder)
        _require_device(manifest, capability)
        _require_unused(folder)
        key = _trusted_key(store.home)
        progress.stage("read the checkpoint")
        source = _checkpoint(manifest, checkpoint, home=store.home)
        progress.stage("check the files")
        verify_files(folder, manifest)
        progress.stage("verify against transformers")
        found = _run(source, manifest, folder, threads=threads)
        stated = replace(manifest, verification=found)
        _restate(folder, stated, key)
    return stated


def _require_device(manifest: Manifest, capability: Capability) -> None:
    """Refuse what cannot run here, before anything large is read."""
    facts = manifest.tensorrt
    if facts is None:
        return
    what = f"The {manifest.variant} engine of {manifest.model} cannot be run here."
    if facts.sharding.ranks != 1:
        raise DeviceUnsuitable(
            what,
            why=f"It lies over {facts.sharding.ranks} devices, and one process runs one of them.",
            fix="Serve it as it is with `headrace serve --allow-unverified`, or verify a build "
            "that is not split.",
        )
    found, wanted = capability(), " or ".join(facts.compute_capabilities)
    if found not in facts.compute_capabilities:
        seen = f"The one here has {found}" if found else "No GPU answers here"
        raise DeviceUnsuitable(
            what,
            why=f"Its plan is for a GPU of compute capability {wanted}. {seen}.",
            fix="Run `headrace models verify` on a machine with such a GPU: `headrace models push` "
            "here and `headrace models fetch` there bring the artifact.",
        )


def _require_unused(folder: Path) -> None:
    with nobody_uses(folder) as is_unused:
        if not is_unused:
            raise _in_use(folder)


def _trusted_key(home: Path) -> SigningKey:
    """The home's own key; refused where what it signs would not be loaded here."""
    key = signing_key(home)
    if key.key_id not in trusted_keys(home / "trust"):
        raise ArtifactUntrusted(
            f"This home does not trust its own key {key.key_id}.",
            why="The manifest is signed with it, and would not be loaded here any more.",
            fix="Trust it again: `headrace models key > own.pem`, `headrace models trust add "
            "own.pem`.",
        )
    return key


def _checkpoint(manifest: Manifest, given: Path | None, *, home: Path) -> Checkpoint:
    """Open what the artifact was built of, file by file."""
    source = manifest.source
    if source.startswith("pypi://"):
        source = source.partition("#")[0]  # What follows is a file in the wheel.
    try:
        found = open_checkpoint(given or locate(source, home=home))
    except (CheckpointUnreadable, ModelNotFound, UnsupportedModel) as error:
        if given:
            raise
        raise CheckpointUnreadable(
            f"The checkpoint that {manifest.model} was built of is not here.",
            why=f"Its manifest names {manifest.source}. {error.what} {error.why}",
            fix="Name a copy of it: `--checkpoint PATH`. A model of the catalog can be pulled: "
            "`headrace models pull`.",
        ) from error
    digest = weights_digest(found)
    if digest != manifest.weights_digest:
        raise CheckpointUnreadable(
            f"The checkpoint {found.path} is not the one that {manifest.model} was built of.",
            why=f"The digest of its files is {digest[:12]}…; the manifest states "
            f"{manifest.weights_digest[:12] or 'none'}….",
            fix="Name the right one with --checkpoint: every file of it counts, the tokenizer's "
            "too.",
        )
    return found


def _run(checkpoint: Checkpoint, manifest: Manifest, folder: Path, *, threads: int) -> Verification:
    try:
        # torch and transformers are not part of every installation that serves.
        from headrace.compile.reference import NAME, reference_logits
    except ImportError as error:
        raise DeviceUnsuitable(
            "This installation cannot verify an engine.",
            why=f"The reference is not there: {error}.",
            fix="Install it: `pip install 'headrace[compile]'`.",
        ) from error
    prompts = prompts_for(Tokenizer.from_folder(folder, manifest), manifest)
    references = reference_logits(checkpoint, prompts)
    device = device_here() if manifest.tensorrt else "cpu"
    return verify_engine(
        manifest, folder, prompts, references, NAME, threads=threads, device=device
    )


def _restate(folder: Path, stated: Manifest, key: SigningKey) -> None:
    """Replace the manifest. At every instant one signature fits the manifest that is there.

    The caller holds the artifact's lock.
    """
    with nobody_uses(folder) as is_unused:
        # Users hold their lock on the file that goes away.
        if not is_unused:
            raise _in_use(folder)
        for leaving in folder.glob(".manifest.*"):
            leaving.unlink()
        text, before = stated.to_json(), (folder / MANIFEST_FILE).read_bytes()
        fitting = verify_signature(folder, before, trusted_keys(trust_folder(folder)))
        signatures = (key.signature(text.encode(), Purpose.MANIFEST), fitting)
        write_atomically(folder / SIGNATURE_FILE, "".join(each.to_json() for each in signatures))
        write_atomically(folder / MANIFEST_FILE, text)


def _in_use(folder: Path) -> ArtifactInUse:
    return ArtifactInUse(
        f"The artifact {folder.name[:12]} is in use.",
        why="A process has loaded it, or sends it to a store; its manifest cannot change under it.",
        fix="End that, verify, and start it again.",
    )
