"""The builder of TensorRT targets: plans, their facts, and what can be verified here.

Where a device answers, the engine is verified as serving runs it. Where none does, its networks
are: computed on the CPU, layer by layer, sharded builds over processes. The manifest says which.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from headrace.compile.artifact_key import ArtifactKey, graph_digest, weights_digest
from headrace.compile.builder import FAMILY_CODE, Engine, Prompts, verify_engine
from headrace.compile.calibration import (
    CALIBRATION_FILE,
    OWN_TEXTS,
    CalibrationSet,
    activation_scales,
    read_calibration_set,
)
from headrace.compile.checkpoint import open_checkpoint
from headrace.compile.families.base import Model, Weights
from headrace.compile.families.registry import describe
from headrace.compile.memory import Footprint
from headrace.compile.progress import Progressing
from headrace.compile.sharding import parts
from headrace.compile.tensorrt.build import BuildOrder, build_plans
from headrace.compile.tensorrt.decoder_network import Plan, write_decoder
from headrace.compile.tensorrt.library import TENSORRT, library_version, open_library
from headrace.compile.tensorrt.linear_forms import INPUTS_FILE, Calibrated, held
from headrace.compile.tensorrt.network import Network
from headrace.compile.tensorrt.options import PlanOptions
from headrace.compile.tensorrt.profiles import default_profiles
from headrace.compile.tensorrt.targets import RTX_TARGET, Target, find_target
from headrace.compile.tensorrt_memory import TensorRtFootprint
from headrace.compile.tensors import Array, Checkpoint
from headrace.serving.domain.artifact import (
    Manifest,
    Precision,
    Profile,
    Sharding,
    TensorRt,
    Verification,
)
from headrace.serving.engine.cuda_device import capability_here, device_here
from headrace.serving.errors import ArtifactTampered, UnsupportedModel
from headrace.serving.tokenizer import TOKENIZER_FILE, Tokenizer

_CODE = (
    "headrace.compile.calibration",
    "headrace.compile.input_facts",
    "headrace.compile.safetensors_checkpoint",
    "headrace.compile.sharding",
    "headrace.serving.engine.plan_io",
    *(
        f"headrace.compile.tensorrt.{name}"
        for name in (
            "builder",
            "decoder_network",
            "inspection",
            "linear_forms",
            "network",
            "rank_build",
            "smoothing",
            "weight_forms",
            "weight_layers",
        )
    ),
    *FAMILY_CODE,
)
"""Modules that decide what an artifact holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRtBuilder:
    """Writes the plans of one TensorRT target."""

    target: str
    precision: Precision
    sharding: Sharding
    options: PlanOptions
    home: Path

    @property
    def footprint(self) -> Footprint:
        return self._footprint

    @property
    def _footprint(self) -> TensorRtFootprint:
        return TensorRtFootprint.of(self.precision, self.options, self.sharding)

    def require_library(self) -> None:
        """Refuse where the target cannot be built here, before anything else is done.

        Raises:
            UnsupportedModel: the library is missing, or builds for another device than the target.
        """
        open_library(self._target.library)
        if self._target.library != TENSORRT:
            return
        # TensorRT builds for the device it runs on, whatever it is told.
        found, wanted = capability_here(), self._target.compute_capabilities
        if found not in wanted:
            here = f"compute capability {found}" if found else "no GPU that answers"
            raise UnsupportedModel(
                f"The target {self.target} cannot be built here.",
                why=f"TensorRT builds for the GPU it runs on; here is {here}, and the target needs "
                f"{', '.join(wanted)}.",
                fix=f"Build on such a machine, choose --target {RTX_TARGET}, or add --dry-run.",
            )

    def require(self, model: Model) -> None:
        parts(model.decoder, self.sharding)
        if self.options.refit and self._target.library != TENSORRT:
            raise UnsupportedModel(
                f"Plans for {self.target} cannot be refitted.",
                why="TensorRT-RTX 1.7.1 makes such plans for one compute capability only, and only "
                "where a GPU answers.",
                fix="Leave --refit out.",
            )
        if self.options.activations and model.decoder.experts:
            raise UnsupportedModel(
                "Activations of a mixture of experts cannot be calibrated.",
                why="Calibration computes dense layers only.",
                fix="Leave --activations out: attention is fp8 then, by its weights.",
            )

    def key(self, checkpoint: Checkpoint, model: Model) -> ArtifactKey:
        library = self._target.library
        facts = {
            "family": model.family,
            "decoder": model.decoder,
            "cache_tokens": self._cache_tokens(model),
            "capabilities": list(self._target.capabilities(self.precision)),
            "flags": list(self.options.flags),
            "activations": self.options.activations,
            "calibration": self._texts().digest if self._is_calibrated else "",
        }
        return ArtifactKey(
            weights_digest=weights_digest(checkpoint),
            graph_digest=graph_digest(_CODE, facts),
            target=self.target,
            libraries={
                library: library_version(library),
                **{package: version(package) for package in ("headrace", "numpy")},
            },
            precision=self.precision,
            profiles=self._profiles,
            sharding=self.sharding,
        )

    def write(
        self, checkpoint: Checkpoint, model: Model, folder: Path, work: Path, progress: Progressing
    ) -> Engine:
        occupied = [
            self.footprint.weight_bytes(part) for part in parts(model.decoder, self.sharding)
        ]
        found = self._calibrate(checkpoint, model, work, progress)
        built = build_plans(
            BuildOrder(
                checkpoint=checkpoint.path,
                decoder=model.decoder,
                sharding=self.sharding,
                precision=self.precision,
                library=self._target.library,
                compute_capabilities=self._target.capabilities(self.precision),
                profiles=self._profiles,
                cache_tokens=self._cache_tokens(model),
                flags=self.options.flags,
                is_calibrated=found is not None,
                activations=self.options.activations,
                timing_cache=self._timing_cache(),
            ),
            work,
            weight_bytes=occupied,
            progress=progress,
        )
        # The files stay in `work` too, so that a verification that fails costs no build.
        calibration = () if found is None else (CALIBRATION_FILE, INPUTS_FILE)
        for name in (*built.files, *calibration):
            os.link(work / name, folder / name)
        return Engine(
            kind="tensorrt",
            weight_bytes=sum(rank.weight_bytes for rank in built.ranks),
            tensorrt=TensorRt(
                library=self._target.library,
                version=library_version(self._target.library),
                compute_capabilities=tuple(self._target.capabilities(self.precision)),
                cache_tokens=self._cache_tokens(model),
                profiles=tuple(self._profiles),
                sharding=self.sharding,
                ranks=tuple(built.ranks),
                flags=self.options.flags,
                calibration="" if found is None else found.scales.set_digest,
                device=device_here() if self._target.library == TENSORRT else "",
            ),
        )

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
        if self._can_run():
            return verify_engine(
                manifest,
                folder,
                prompts,
                references,
                reference,
                threads=1,
                device=device_here(),
            )
        # torch computes the networks, and is wanted for nothing else here.
        from headrace.compile.tensorrt.network_check import verify_network

        return verify_network(
            partial(_make_network, self, checkpoint.path, folder, self._cache_tokens(model)),
            prompts,
            references,
            decoder=model.decoder,
            sharding=self.sharding,
            precision=self.precision,
            reference=reference,
            target=self.target,
        )

    @property
    def _target(self) -> Target:
        return find_target(self.target)

    @property
    def _profiles(self) -> Sequence[Profile]:
        return default_profiles(self.options.rows_max, self.options.chunk, cp=self.sharding.cp)

    def _cache_tokens(self, model: Model) -> int:
        """The longest sequence and one chunk of padding; see `serving/engine/plan_io.py`."""
        return self._footprint.cache_tokens(model.decoder)

    def _can_run(self) -> bool:
        """Whether a device answers that the plans are for; one process verifies one rank."""
        return self.sharding.ranks == 1 and capability_here() in self._target.capabilities(
            self.precision
        )

    @property
    def _is_calibrated(self) -> bool:
        return self.precision is Precision.INT4 or self.options.activations

    def _texts(self) -> CalibrationSet:
        return read_calibration_set(self.options.calibration or OWN_TEXTS)

    def _calibrate(
        self, checkpoint: Checkpoint, model: Model, work: Path, progress: Progressing
    ) -> Calibrated | None:
        """What the inputs of the matrices are like, where the precision needs to know.

        A mixture in int4 goes without: nothing here computes its layers in float32.
        """
        if not self._is_calibrated or model.decoder.experts:
            return None
        texts = self._texts()
        work.mkdir(parents=True, exist_ok=True)
        if (work / CALIBRATION_FILE).is_file():
            # Half a file is what an interrupted try may leave: it is measured again.
            with suppress(ArtifactTampered):
                return Calibrated.read(work)
        progress.stage("calibrate")
        # torch computes the layers, and is wanted for nothing else here.
        from headrace.compile.input_facts import measure_inputs

        checkpoint.write_tokenizer(work)
        text = (work / TOKENIZER_FILE).read_text("utf-8")
        tokenizer = Tokenizer(text, vocab_size=model.decoder.vocab)
        prompts = texts.prompts(tokenizer, context_tokens=model.decoder.context_tokens)
        facts = measure_inputs(model.decoder, Weights(checkpoint, model), prompts)
        found = Calibrated(activation_scales(facts, texts, prompts), facts)
        found.write(work)
        return found

    def _timing_cache(self) -> Path | None:
        """TensorRT's measurements of kernels; the next build of this target takes fewer.

        TensorRT-RTX compiles its kernels when it loads a plan, and has none.
        """
        if self._target.library != TENSORRT:
            return None
        folder = self.home / "timings"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{self.target}-{library_version(TENSORRT)}.cache"


def open_network(library: str) -> Network:
    """An empty network of the library.

    Raises:
        UnsupportedModel: the library is missing.
    """
    trt = open_library(library)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return Network(trt, builder.create_network(strongly_typed))


def _make_network(
    builder: TensorRtBuilder, path: Path, artifact: Path, cache_tokens: int, rank: int
) -> tuple[Any, Any]:
    """The network of a rank, as its build made it, and its constants; in any process."""
    checkpoint = open_checkpoint(path)
    model = describe(checkpoint)
    is_calibrated = (artifact / CALIBRATION_FILE).is_file()
    forms = held(
        builder.precision,
        model.decoder,
        Weights(checkpoint, model),
        calibrated=Calibrated.read(artifact) if is_calibrated else None,
        activations=builder.options.activations,
    )
    net = open_network(find_target(builder.target).library)
    write_decoder(
        net,
        Plan(
            part=parts(model.decoder, builder.sharding)[rank],
            sharding=builder.sharding,
            cache_tokens=cache_tokens,
        ),
        forms.tensors,
        forms.products,
    )
    return net.definition, net.constants
