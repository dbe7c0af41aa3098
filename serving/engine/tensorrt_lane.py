"""One execution context: a profile, so many rows, and every address bound.

Contexts never run at once, so they share the memory of their activations. A context of single
tokens keeps its shapes and addresses for ever and is recorded as a CUDA graph after its first run:
replayed, a step of hundreds of kernels costs the host one call. A context for chunks is given its
number of tokens and its place in the caches before each run, and is not recorded.
"""

from headrace.serving import log
from headrace.serving.engine import plan_io
from headrace.serving.engine.communicator import Communicator
from headrace.serving.engine.tensorrt_api import ICudaEngine, IExecutionContext, Library
from headrace.serving.engine.tensorrt_library import LibraryLog
from headrace.serving.engine.tensorrt_memory import Memory, attempt
from headrace.serving.engine.tensorrt_plan import PlanFacts
from headrace.serving.errors import EngineFault


class Lane:
    """Runs one profile of an engine. Owned by the engine, which closes it before its plan."""

    def __init__(
        self,
        library: Library,
        engine: ICudaEngine,
        memory: Memory,
        facts: PlanFacts,
        *,
        profile: int,
        rows: int,
        communicator: Communicator | None,
        said: LibraryLog,
    ) -> None:
        """Make the context and bind what never changes.

        Args:
            library: the engine's.
            engine: the plan, deserialised.
            memory: allocated.
            facts: of the plan.
            profile: index of the optimisation profile.
            rows: of every run.
            communicator: of the stage; None where it is of one rank.
            said: where the library gives reasons.

        Raises:
            EngineFault: the library refuses a part of it.
        """
        self._memory, self._facts, self._said = memory, facts, said
        self._device, self._stream = memory.device, memory.stream
        self._rows, self._tokens, self._place = rows, 0, 0
        self._graph: int | None = None
        strategy = library.ExecutionContextAllocationStrategy.USER_MANAGED
        context = engine.create_execution_context(strategy)
        if context is None:
            raise self._fault("make an execution context")
        self._context: IExecutionContext | None = context
        if communicator is not None:
            self._require(context.set_communicator(communicator.capsule), "take the communicator")
        chosen = context.set_optimization_profile_async(profile, self._stream)
        self._require(chosen, f"choose profile {profile}")
        self._device.synchronize(self._stream)
        context.set_device_memory(memory.activations, memory.activation_bytes)
        for name, offset in memory.layout.offsets.items():
            self._bind(name, memory.inputs + offset)
        for name, address in memory.states.items():
            self._bind(name, address)
        if facts.is_last:
            self._bind(plan_io.LOGITS, memory.logits)
        for name in (plan_io.WRITE_INDICES, plan_io.KV_LENGTHS, plan_io.SAMPLE_INDEX):
            if name in memory.layout.offsets:
                self._shape(name, (rows,))
        for past, _ in facts.caches:
            self._shape(past, (rows, *facts.cache_shape))
        self._bind_caches()

    @property
    def rows(self) -> int:
        return self._rows

    def prepare(self, *, tokens: int, place: int) -> None:
        """Give the next runs' tokens a row, and the place in the caches of their first row."""
        if tokens != self._tokens:
            self._tokens = tokens
            self._shape(plan_io.POSITION_IDS, (self._rows, tokens))
            if self._facts.is_first:
                self._shape(plan_io.INPUT_IDS, (self._rows, tokens))
            else:
                self._shape(plan_io.HIDDEN_IN, (self._rows, tokens, self._facts.hidden))
        if place != self._place:
            self._place = place
            self._bind_caches()

    def record(self) -> None:
        """Record the run that was prepared, which has run once; `run` replays it from here on.

        A library that cannot be recorded is only slower, and the log says so.
        """
        context = self._live()
        self._device.begin_capture(self._stream)
        accepted = context.execute_async_v3(self._stream)
        try:
            graph = self._device.end_capture(self._stream)
        except EngineFault as error:
            log.graph_refused(rows=self._rows, why=self._said.because(error.what))
            return
        if accepted:
            self._graph = graph
        else:
            self._device.free_graph(graph)
            log.graph_refused(rows=self._rows, why=self._said.because("The library gave none."))

    def run(self) -> None:
        """Put the prepared run on the stream."""
        if self._graph is not None:
            self._device.launch(self._graph, self._stream)
        else:
            self._require(self._live().execute_async_v3(self._stream), "run a step")

    def close(self) -> None:
        """Drop recording and context. Idempotent."""
        if self._graph is not None:
            attempt("a recorded step", self._device.free_graph, self._graph)
            self._graph = None
        self._context = None

    def _live(self) -> IExecutionContext:
        assert self._context is not None, "the lane was closed"
        return self._context

    def _bind_caches(self) -> None:
        """Bind each cache from the place on, as input and as output: it is updated in place."""
        offset = self._place * self._facts.place_bytes
        for past, present in self._facts.caches:
            self._bind(past, self._memory.caches[past] + offset)
            self._bind(present, self._memory.caches[past] + offset)

    def _bind(self, name: str, address: int) -> None:
        self._require(self._live().set_tensor_address(name, address), f"bind {name}")

    def _shape(self, name: str, shape: tuple[int, ...]) -> None:
        taken = self._live().set_input_shape(name, shape)
        self._require(taken, f"take {name} of shape {shape}")

    def _require(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise self._fault(what)

    def _fault(self, what: str) -> EngineFault:
        return EngineFault(
            f"TensorRT did not {what}.",
            why=self._said.because("It gave no reason."),
            fix="Restart the replica; if it comes again, build the artifact again.",
        )
