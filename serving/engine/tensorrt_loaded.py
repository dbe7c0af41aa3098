"""Everything a rank's plan holds once it is loaded, taken in one order and given back in the other.

A context must be gone before its plan and before the communicator it was given; memory, before the
device is; and all of it also when loading stops half way or the device has failed.
"""

from pathlib import Path
from typing import Final

from headrace.serving.domain.artifact import Manifest, RankPlan, TensorRt
from headrace.serving.engine.communicator import Communicator, HiddenChannel
from headrace.serving.engine.cuda_device import CudaDevice
from headrace.serving.engine.device import Device
from headrace.serving.engine.tensorrt_api import ICudaEngine, Library, Runtime
from headrace.serving.engine.tensorrt_lane import Lane
from headrace.serving.engine.tensorrt_library import (
    library_log,
    open_library,
    read_plan,
    require_capability,
)
from headrace.serving.engine.tensorrt_memory import (
    InputLayout,
    Memory,
    attempt,
    device_needs,
    require_free,
)
from headrace.serving.engine.tensorrt_plan import PlanFacts, read_facts
from headrace.serving.engine.tensorrt_sizes import Bucket, ChunkSize, Sizes
from headrace.serving.errors import ArtifactTampered, ConfigRefused

WEIGHT_STREAMING: Final = "weight_streaming"
"""A flag of the manifest: weights that do not fit stay on the host and come as they are needed."""

SPARE_BYTES: Final = 512 << 20
"""Left free for what no call tells: the contexts' own state, recorded steps, NCCL's buffers."""


class LoadedPlan:
    """A device, a plan on it, its memory and its contexts. Owned by the engine.

    Args:
        device: where to run; the first GPU by default.
        communicator: of the rank's stage, or None.
        channel: to the neighbouring stages, or None. All three are closed by `close`.
    """

    facts: PlanFacts
    memory: Memory
    device: Device

    def __init__(
        self,
        device: Device | None,
        communicator: Communicator | None,
        channel: HiddenChannel | None,
    ) -> None:
        self.channel = channel
        self.decoding: dict[Bucket, Lane] = {}
        self.chunks: dict[ChunkSize, Lane] = {}
        self._communicator = communicator
        self._opened = device
        self._runtime: Runtime | None = None
        self._engine: ICudaEngine | None = None
        self._stream: int | None = None
        self._memory: Memory | None = None
        self._lanes: list[Lane] = []

    def open(
        self,
        folder: Path,
        manifest: Manifest,
        ranked: RankPlan,
        sizes: Sizes,
        *,
        runs_max: int,
        library: Library | None,
    ) -> None:
        """Load a rank's plan; for the errors see `TensorRtEngine`. `close` afterwards in any case.

        Args:
            folder: has the plan.
            manifest: of the artifact.
            ranked: of `described`.
            sizes: that the engine runs.
            runs_max: most runs of a step.
            library: what reads the plan; the manifest's by default.
        """
        facts = manifest.tensorrt
        assert facts is not None
        require_peers(facts, ranked.rank, self._communicator, self.channel)
        self.device = device = self._opened = self._opened or CudaDevice()
        device.make_current()
        require_capability(facts, device)
        streams_weights = WEIGHT_STREAMING in facts.flags
        if not streams_weights:
            require_free(device, {"weights": ranked.plan_bytes})
        library = library or open_library(facts)
        said = library_log(library)
        self._runtime = library.Runtime(said)
        self._engine = engine = read_plan(self._runtime, folder / ranked.file, said)
        self.facts = read_facts(engine, facts, ranked, manifest.decoder)
        if streams_weights:
            _choose_budget(engine, device, self.facts, sizes)
        self._stream = device.open_stream()
        layout = InputLayout.of(self.facts, sizes)
        self.memory = self._memory = Memory(device, self._stream, layout)
        self._memory.allocate(
            self.facts,
            sizes,
            activation_bytes=engine.device_memory_size_v2,
            spare_bytes=SPARE_BYTES,
            runs=runs_max,
            vocab=manifest.decoder.vocab,
        )
        for bucket in sizes.buckets:
            self.decoding[bucket] = self._lane(library, bucket.profile, bucket.rows)
        for chunk in sizes.chunks:
            self.chunks[chunk] = self._lane(library, chunk.profile, 1)

    def _lane(self, library: Library, profile: int, rows: int) -> Lane:
        assert self._engine is not None
        lane = Lane(
            library,
            self._engine,
            self.memory,
            self.facts,
            profile=profile,
            rows=rows,
            communicator=self._communicator,
            said=library_log(library),
        )
        self._lanes.append(lane)
        return lane

    def close(self) -> None:
        """Give everything back. Idempotent; what a failed device does not free is logged."""
        device = self._opened
        if device is not None:
            attempt("the device", device.make_current)
            if self._stream is not None:
                attempt("the last step", device.synchronize, self._stream)
        while self._lanes:
            self._lanes.pop().close()
        self.decoding.clear()
        self.chunks.clear()
        self._engine = None
        self._runtime = None
        for what, held in (("communicator", self._communicator), ("channel", self.channel)):
            if held is not None:
                attempt(what, held.close)
        if self._memory is not None:
            self._memory.close()
        if device is not None:
            if self._stream is not None:
                attempt("the stream", device.close_stream, self._stream)
            attempt("the device", device.close)
        self._communicator = self.channel = self._memory = self._stream = self._opened = None


def described(folder: Path, manifest: Manifest, rank: int) -> tuple[TensorRt, RankPlan]:
    """The manifest's TensorRT facts and the rank's plan.

    Raises:
        ArtifactTampered: the manifest has none.
        ConfigRefused: there is no such rank.
    """
    facts = manifest.tensorrt
    if facts is None or len(facts.ranks) != facts.sharding.ranks:
        raise ArtifactTampered(
            f"The manifest in {folder} does not say how its plans are run.",
            why="It names the engine tensorrt, and not one plan for each rank.",
            fix="Build the artifact again with `headrace compile`.",
        )
    for ranked in facts.ranks:
        if ranked.rank == rank:
            return facts, ranked
    raise ConfigRefused(
        f"{manifest.model} has no rank {rank}.",
        why=f"It was compiled for {facts.sharding.ranks} ranks, counted from 0.",
        fix="Start as many ranks as it was compiled for, or compile it for more.",
        field="rank",
    )


def require_peers(
    facts: TensorRt, rank: int, communicator: Communicator | None, channel: HiddenChannel | None
) -> None:
    """Compare what reaches other ranks with the ranks there are.

    Raises:
        ConfigRefused: a rank of several was started by itself, or the other way round.
    """
    sharding = facts.sharding
    stage_ranks = sharding.tp * sharding.cp
    shares, passes = communicator is not None, channel is not None
    if (stage_ranks > 1, sharding.pp > 1) != (shares, passes):
        raise ConfigRefused(
            f"Rank {rank} of tp {sharding.tp}, pp {sharding.pp}, cp {sharding.cp} is not connected "
            "as it was compiled.",
            why=f"Its stage has {stage_ranks} ranks, which share a communicator where they are "
            f"several, and of its {sharding.pp} stages each hands hidden states to the next.",
            fix="Start all ranks together as one replica, or compile the model for one device.",
            field="rank",
        )


def _choose_budget(engine: ICudaEngine, device: Device, facts: PlanFacts, sizes: Sizes) -> None:
    """Keep as many weights on the device as its memory has room for beside everything else."""
    # With none of them on the device, what is free is known.
    engine.weight_streaming_budget_v2 = 0
    free, _ = device.memory_bytes()
    needs = device_needs(
        facts,
        sizes,
        activation_bytes=engine.device_memory_size_v2,
        spare_bytes=SPARE_BYTES,
    )
    room = free - sum(needs.values())
    engine.weight_streaming_budget_v2 = max(0, min(engine.streamable_weights_size, room))
