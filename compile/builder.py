"""What a target must do to become an artifact, and the one for `cpu`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from headrace.compile.artifact_key import ArtifactKey, graph_digest, weights_digest
from headrace.compile.families.base import Model, Weights
from headrace.compile.memory import CpuFootprint, Footprint
from headrace.compile.progress import Progressing
from headrace.compile.quantize import WEIGHTS_FILE, quantize_decoder
from headrace.compile.tensors import Array, Checkpoint
from headrace.compile.verify import TEXT_TOKENS_MAX, verify
from headrace.serving.domain.artifact import Manifest, Precision, TensorRt, Verification
from headrace.serving.engine.base import Engine as LoadedEngine
from headrace.serving.engine.loader import open_engine
from headrace.serving.engine.onnx_engine import GRAPH_FILE, GRAPH_VERSION
from headrace.serving.errors import DoesNotFit, UnsupportedModel

Prompts = Sequence[Sequence[int]]

FAMILY_CODE = tuple(f"headrace.compile.families.{name}" for name in ("base", "qwen", "rope"))
"""Modules that every graph depends on."""

_ONNX_CODE = ("headrace.compile.export", "headrace.compile.families.decoder", *FAMILY_CODE)
_NATIVE_CODE = (
    "headrace.compile.quantize",
    "headrace.serving.engine.native_weights",
    *FAMILY_CODE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What a builder wrote into an artifact's folder."""

    kind: str
    """Which engine loads it; see `Manifest.engine`."""
    weight_bytes: int
    tensorrt: TensorRt | None = None


class Builder(Protocol):
    """Writes one target's engines."""

    @property
    def footprint(self) -> Footprint:
        """What a model occupies on the target."""
        ...

    def require(self, model: Model) -> None:
        """Refuse what the target does not compute, before anything is read.

        Raises:
            UnsupportedModel: that.
        """
        ...

    def key(self, checkpoint: Checkpoint, model: Model) -> ArtifactKey:
        """What decides the artifact. Reads every file of the checkpoint."""
        ...

    def write(
        self, checkpoint: Checkpoint, model: Model, folder: Path, work: Path, progress: Progressing
    ) -> Engine:
        """Write the engine's files into `folder`.

        Args:
            checkpoint: its weights.
            model: what they are.
            folder: becomes the artifact, or is lost with whatever fails.
            work: of this artifact alone, on the same disk; it need not exist. What is in it stays
                until the artifact is whole, so that an interrupted build can go on.
            progress: told of every stage.

        Raises:
            CheckpointUnreadable: a tensor is damaged.
            UnsupportedModel, DoesNotFit, StorageFull: it could not be built.
        """
        ...

    def verify(
        self,
        checkpoint: Checkpoint,
        model: Model,
        manifest: Manifest,
        folder: Path,
        prompts: Prompts,
        references: Iterable[Array],
        reference: str,
    ) -> Verification:
        """Compare what is in `folder` with the reference.

        Raises:
            OutsideTolerance: it differs more than its precision may.
        """
        ...


@dataclass(frozen=True, slots=True)
class CpuBuilder:
    """The engines of this machine: ONNX Runtime in fp32, our own in int8 and int4."""

    precision: Precision
    threads: int

    @property
    def footprint(self) -> Footprint:
        return CpuFootprint(self.precision)

    def require(self, model: Model) -> None:
        if model.decoder.experts:
            raise UnsupportedModel(
                f"The model is a mixture of {model.decoder.experts} experts.",
                why="The engines of the target cpu compute dense models only.",
                fix="Compile a dense model, choose a TensorRT target, or add --dry-run to see the "
                "arithmetic only.",
            )

    def key(self, checkpoint: Checkpoint, model: Model) -> ArtifactKey:
        code = _ONNX_CODE if self.precision is Precision.FP32 else _NATIVE_CODE
        facts = {"family": model.family, "decoder": model.decoder, "contract": GRAPH_VERSION}
        packages = ["headrace", "numpy"]
        if self.precision is Precision.FP32:
            packages += ["torch", "onnx", "onnxscript"]
        return ArtifactKey(
            weights_digest=weights_digest(checkpoint),
            graph_digest=graph_digest(code, facts),
            target="cpu",
            libraries={package: version(package) for package in packages},
            precision=self.precision,
        )

    def write(
        self, checkpoint: Checkpoint, model: Model, folder: Path, work: Path, progress: Progressing
    ) -> Engine:
        progress.stage(f"build {self.precision}")
        weights = Weights(checkpoint, model)
        if self.precision is Precision.FP32:
            # torch is imported here alone: quantising needs none of it.
            from headrace.compile.export import export_decoder

            export_decoder(model.decoder, weights, folder / GRAPH_FILE)
            return Engine(kind="onnx", weight_bytes=(folder / f"{GRAPH_FILE}.data").stat().st_size)
        quantized = quantize_decoder(model.decoder, weights, self.precision, folder / WEIGHTS_FILE)
        return Engine(kind="native", weight_bytes=quantized.weight_bytes)

    def verify(
        self,
        checkpoint: Checkpoint,
        model: Model,
        manifest: Manifest,
        folder: Path,
        prompts: Prompts,
        references: Iterable[Array],
        reference: str,
    ) -> Verification:
        return verify_engine(manifest, folder, prompts, references, reference, threads=self.threads)


def verify_engine(
    manifest: Manifest,
    folder: Path,
    prompts: Prompts,
    references: Iterable[Array],
    reference: str,
    *,
    threads: int,
    device: str = "cpu",
) -> Verification:
    """Load the engine of `folder` as serving would, and compare it with the reference.

    Its files are known to be right: written just now, by this process, or verified.

    Args:
        manifest: of the artifact.
        folder: where it lies.
        prompts: token ids.
        references: of each prompt.
        reference: what they are of, for the record.
        threads: of engines that compute on the CPU.
        device: what it runs on, for the record.

    Raises:
        DeviceUnsuitable, DoesNotFit: it cannot be run here.
        OutsideTolerance: it differs more than its precision may.
    """
    engine = _open_for(len(prompts), manifest, folder, threads=threads)
    try:
        return verify(
            engine,
            prompts,
            references,
            precision=manifest.precision,
            reference=reference,
            target=manifest.target,
            device=device,
        )
    finally:
        engine.close()


def _open_for(num_texts: int, manifest: Manifest, folder: Path, *, threads: int) -> LoadedEngine:
    """All texts at once, or one where the device has no room for as many of the longest cache."""
    facts = manifest.tensorrt
    text_tokens = facts.cache_tokens if facts else 2 * TEXT_TOKENS_MAX

    def open_with(rows: int) -> LoadedEngine:
        return open_engine(
            folder,
            manifest,
            rows_max=rows,
            batch_tokens_max=TEXT_TOKENS_MAX,
            kv_tokens=rows * text_tokens,
            threads=threads,
        )

    rows = num_texts
    if facts is not None:
        rows = min(rows, max(profile.rows[2] for profile in facts.profiles))
    try:
        return open_with(rows)
    except DoesNotFit:
        return open_with(1)
