"""Every metric, in one table, each with what an operator does about it.

Labels come from closed sets: outcomes and refusal reasons from our own code, models from the
configuration (at most `MODELS_MAX`; any further one is counted as "other"). Nothing a caller
sends becomes a label, so a scrape has a bounded size.

The engine's numbers reach the frontend with each step message, so the one process that clients
talk to is the one process that has to be scraped.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from headrace.serving.domain.load import Load
from headrace.serving.domain.usage import Outcome, Usage
from headrace.serving.errors import ServingError

MODELS_MAX = 64
"""Distinct model labels: a label costs about 100 time series."""

OTHER = "other"


class TokenKind(StrEnum):
    """Disjoint parts of a request's tokens, so that their sum counts each token once."""

    PROMPT = "prompt"
    """Prompt tokens that were computed: cached ones are not in it."""
    CACHED = "cached"
    COMPLETION = "completion"
    """Delivered tokens outside the model's thinking marks."""
    REASONING = "reasoning"


@dataclass(frozen=True, slots=True)
class Spec:
    """One row of the table of metrics."""

    name: str
    what: str
    act: str
    """What an operator does about it."""
    labels: Sequence[str] = ()
    buckets: Sequence[float] = ()
    """Upper bounds of a histogram; empty for counters and gauges."""


_TTFT = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60)
_GAP = (0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.1, 0.2, 0.5, 1, 2.5, 10)
_WAIT = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_WRITE = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5)
_RATIO = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1)

TTFT = Spec(
    "headrace_ttft_seconds",
    "From acceptance of a request to its first delivered token.",
    "High with a high queue wait: add replicas. High without: prompts are long, or replicas slow.",
    ("model",),
    _TTFT,
)
INTER_TOKEN = Spec(
    "headrace_inter_token_seconds",
    "Gap between two chunks of one answer, as the frontend sends them.",
    "High with a high step time: lower rows_max or add replicas. High without: look at the "
    "frontend's CPU.",
    ("model",),
    _GAP,
)
QUEUE_WAIT = Spec(
    "headrace_queue_wait_seconds",
    "From a replica's receipt of a sequence to the first step that ran it.",
    "Rising: the replicas are full; add some before the waiting bound refuses requests.",
    ("model",),
    _WAIT,
)
STEP = Spec(
    "headrace_step_seconds",
    "Wall time of one engine step.",
    "Rising at the same occupancy: another process takes the cores, or the clock was throttled.",
    ("model",),
    _GAP,
)
STEP_OVERHEAD = Spec(
    "headrace_step_overhead_ratio",
    "Share of a step's wall time spent outside the engine call: schedule, sample, deliver.",
    "Above 0.1: grammars or logprobs weigh on the loop, or the replica shares its cores.",
    ("model",),
    _RATIO,
)
BATCH_OCCUPANCY = Spec(
    "headrace_batch_occupancy_ratio",
    "Rows of a step that advanced a sequence, of rows_max.",
    "Always near 1 with a rising queue wait: raise rows_max or add replicas. Near 0: remove some.",
    ("model",),
    _RATIO,
)
STEP_TOKENS = Spec(
    "headrace_step_tokens_total",
    "Tokens that engine steps ran, prompt and answer alike.",
    "Its rate is the work done; compare it with tokens delivered when throughput falls.",
    ("model",),
)
RECOMPUTED = Spec(
    "headrace_recomputed_tokens_total",
    "Tokens computed again after a preemption or for a lost replica. Never charged.",
    "More than a few per cent of step tokens: raise kv_tokens or lower rows_max.",
    ("model",),
)
KV_USED = Spec(
    "headrace_kv_used_ratio",
    "KV blocks in use, of the pool, on the model's fullest replica.",
    "Near 1 for long: sequences are preempted; raise kv_tokens or add replicas.",
    ("model",),
)
RUNNING = Spec(
    "headrace_sequences_running",
    "Sequences in the batch, over the model's replicas.",
    "Compare with rows_max times replicas: the room that is left.",
    ("model",),
)
WAITING = Spec(
    "headrace_sequences_waiting",
    "Sequences that wait for a row, over the model's replicas.",
    "Steadily above 0: add replicas.",
    ("model",),
)
REPLICAS_READY = Spec(
    "headrace_replicas_ready",
    "Replicas that take new sequences.",
    "Below what is configured: see the log of the control process. 0: the model is down.",
    ("model",),
)
TOKENS = Spec(
    "headrace_tokens_total",
    "Tokens of settled requests by disjoint kind, as written to the meter log.",
    "Telemetry, not the bill: `headrace usage` is. A difference between the two is a defect.",
    ("model", "kind"),
)
REQUESTS = Spec(
    "headrace_requests_total",
    "Accepted requests that ended, by outcome.",
    'Alert on the rate of outcome="failed": faults of ours, which are never charged.',
    ("model", "outcome"),
)
REJECTIONS = Spec(
    "headrace_rejections_total",
    "Requests refused, by the stable reason that the caller was given.",
    "OVERLOADED: add replicas. METER_UNAVAILABLE: check the disk. UNAUTHENTICATED: check keys.",
    ("reason",),
)
FAILOVERS = Spec(
    "headrace_failovers_total",
    "Sequences that moved to another replica because theirs was lost.",
    "Any outside an upgrade: a replica died; see the log of the control process.",
    ("model",),
)
STREAMS_OPEN = Spec(
    "headrace_streams_open",
    "Answers being streamed.",
    "Near frontend.streams_max: start another frontend, or raise the bound.",
)
METER_WRITE = Spec(
    "headrace_meter_write_seconds",
    "Time in which the meter log's writer makes one batch of events durable.",
    "Above 0.025: the disk is slow or shared; every request waits for it twice.",
    (),
    _WRITE,
)
METER_SYNC = Spec(
    "headrace_meter_sync_seconds",
    "Time of the fdatasync of a batch: the part of a write that is the disk's.",
    "Near headrace_meter_write_seconds, and high: get a faster disk. Well below: the frontend "
    "lacks CPU.",
    (),
    _WRITE,
)
METER_SEGMENT_AGE = Spec(
    "headrace_meter_segment_age_seconds",
    "Since the meter log's segment was begun; 0 while it holds nothing to seal.",
    "Well above meter.seal_s: no room for another segment; free space under HEADRACE_HOME.",
)
METER_EVENTS = Spec(
    "headrace_meter_events_total",
    "Events for the meter log, by whether they were stored.",
    'Any stored="no": requests were refused with METER_UNAVAILABLE; check the disk.',
    ("stored",),
)
METER_QUEUE = Spec(
    "headrace_meter_queue",
    "Events that wait for the meter log's writer.",
    "Near meter.queue_max: the disk cannot follow; requests will be refused next.",
)
METER_HEALTHY = Spec(
    "headrace_meter_healthy",
    "1 while usage can be recorded, 0 while no work is accepted because it cannot.",
    "0: free space on, or replace, the disk under HEADRACE_HOME.",
)
BUILD = Spec(
    "headrace_build_info",
    "Always 1; its label says which version runs.",
    "Compare across frontends during an upgrade.",
    ("version",),
)

TABLE: Sequence[Spec] = tuple(value for value in list(vars().values()) if isinstance(value, Spec))


class ModelMetrics:
    """One model's metrics with labels bound, so that an observation costs under a microsecond."""

    def __init__(self, owner: "Metrics", label: str) -> None:
        self._ttft = owner.ttft.labels(label)
        self._gap = owner.inter_token_gap.labels(label)
        self._queue_wait = owner.queue_wait.labels(label)
        self._step = owner.step_time.labels(label)
        self._overhead = owner.step_overhead.labels(label)
        self._occupancy = owner.occupancy.labels(label)
        self._step_tokens = owner.step_tokens.labels(label)
        self._recomputed = owner.recomputed.labels(label)
        self._failovers = owner.failovers.labels(label)
        self._tokens = {kind: owner.tokens.labels(label, kind) for kind in TokenKind}
        self._requests = {end: owner.requests.labels(label, end) for end in Outcome}
        self._replicas = owner.replicas
        self.label = label

    def first_token(self, ttft_s: float) -> None:
        self._ttft.observe(ttft_s)

    def inter_token(self, gap_s: float) -> None:
        """One gap between two chunks of one answer. 0.6 us: it may be called for every chunk."""
        self._gap.observe(gap_s)

    def queued(self, wait_s: float) -> None:
        self._queue_wait.observe(wait_s)

    def failed_over(self) -> None:
        self._failovers.inc()

    def step(self, replica_id: str, load: Load) -> None:
        """One engine step of a replica, from the message that reported it."""
        if load.step_rows:
            self._step.observe(load.step_ms / 1000)
            self._overhead.observe(load.overhead_share)
            self._occupancy.observe(load.step_rows / max(load.rows_max, 1))
            self._step_tokens.inc(load.step_tokens)
        self.heartbeat(replica_id, load)

    def heartbeat(self, replica_id: str, load: Load) -> None:
        """A replica's state when no step is reported."""
        known = self._replicas.states.get(replica_id)
        before = known.recomputed_tokens_total if known else load.recomputed_tokens_total
        if load.recomputed_tokens_total > before:
            self._recomputed.inc(load.recomputed_tokens_total - before)
        self._replicas.states[replica_id] = _ReplicaState(
            self.label,
            load.running,
            load.waiting,
            1 - load.kv_blocks_free / load.kv_blocks_total if load.kv_blocks_total else 0.0,
            load.recomputed_tokens_total,
        )

    def settled(self, outcome: Outcome, usage: Usage) -> None:
        """A request that was opened has ended."""
        self._requests[outcome].inc()
        tokens = self._tokens
        tokens[TokenKind.PROMPT].inc(usage.prompt_tokens - usage.cached_tokens)
        tokens[TokenKind.CACHED].inc(usage.cached_tokens)
        tokens[TokenKind.COMPLETION].inc(usage.completion_tokens - usage.reasoning_tokens)
        tokens[TokenKind.REASONING].inc(usage.reasoning_tokens)


class Metrics:
    """One process's metrics, in a registry of their own.

    `prometheus_client` locks each observation, so any thread may call any method; only
    `ModelMetrics.step` and `.heartbeat` belong to one thread for each replica.
    """

    def __init__(self, *, version: str = "") -> None:
        self.registry = CollectorRegistry()
        self.ttft = self._histogram(TTFT)
        self.inter_token_gap = self._histogram(INTER_TOKEN)
        self.queue_wait = self._histogram(QUEUE_WAIT)
        self.step_time = self._histogram(STEP)
        self.step_overhead = self._histogram(STEP_OVERHEAD)
        self.occupancy = self._histogram(BATCH_OCCUPANCY)
        self.step_tokens = self._counter(STEP_TOKENS)
        self.recomputed = self._counter(RECOMPUTED)
        self.tokens = self._counter(TOKENS)
        self.requests = self._counter(REQUESTS)
        self.failovers = self._counter(FAILOVERS)
        self._ready = self._gauge(REPLICAS_READY)
        self._streams_open = self._gauge(STREAMS_OPEN)
        self._meter_write = self._histogram(METER_WRITE)
        self._meter_sync = self._histogram(METER_SYNC)
        self._meter_segment_age = self._gauge(METER_SEGMENT_AGE)
        stored = self._counter(METER_EVENTS)
        self._meter_stored = stored.labels("yes")
        self._meter_refused = stored.labels("no")
        self._meter_queue = self._gauge(METER_QUEUE)
        self._meter_healthy = self._gauge(METER_HEALTHY)
        self._meter_healthy.set(1)
        rejections = self._counter(REJECTIONS)
        self._rejections = {name: rejections.labels(name) for name in sorted(_reasons())}
        self._gauge(BUILD).labels(version or "unknown").set(1)
        self.replicas = _Replicas()
        self.registry.register(self.replicas)
        ProcessCollector(registry=self.registry)
        self._models: dict[str, ModelMetrics] = {}

    def model(self, name: str) -> ModelMetrics:
        """The metrics of one served model. Ask once and keep the answer where calls are frequent.

        Call it with names that the directory or the configuration knows, never with what a
        caller sent.
        """
        bound = self._models.get(name)
        if bound is None:
            label = name if len(self._models) < MODELS_MAX else OTHER
            bound = self._models.get(label) or ModelMetrics(self, label)
            self._models[label] = bound
        return bound

    def rejected(self, reason: str) -> None:
        """A request was refused with this `ServingError.reason`."""
        self._rejections.get(reason, self._rejections[OTHER]).inc()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Counts an answer as open for as long as the block runs."""
        self._streams_open.inc()
        try:
            yield
        finally:
            self._streams_open.dec()

    def replicas_ready(self, model: str, count: int) -> None:
        self._ready.labels(self.model(model).label).set(count)

    def replica_left(self, replica_id: str) -> None:
        """Forget the state of a replica whose channel closed."""
        self.replicas.states.pop(replica_id, None)

    def meter_wrote(self, *, seconds: float, events: int) -> None:
        self._meter_write.observe(seconds)
        self._meter_stored.inc(events)

    def meter_synced(self, *, seconds: float) -> None:
        self._meter_sync.observe(seconds)

    def meter_segment_age(self, seconds: float) -> None:
        self._meter_segment_age.set(seconds)

    def meter_refused(self, *, events: int) -> None:
        self._meter_refused.inc(events)

    def meter_queue(self, waiting: int) -> None:
        self._meter_queue.set(waiting)

    def meter_healthy(self, *, healthy: bool) -> None:
        self._meter_healthy.set(1 if healthy else 0)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The body and content type of a scrape, in the format the `Accept` header prefers."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _histogram(self, spec: Spec) -> Histogram:
        return Histogram(
            spec.name,
            _help(spec),
            spec.labels,
            buckets=spec.buckets,
            registry=self.registry,
        )

    def _counter(self, spec: Spec) -> Counter:
        return Counter(spec.name, _help(spec), spec.labels, registry=self.registry)

    def _gauge(self, spec: Spec) -> Gauge:
        return Gauge(spec.name, _help(spec), spec.labels, registry=self.registry)


@dataclass(frozen=True, slots=True)
class _ReplicaState:
    model: str
    running: int
    waiting: int
    kv_used: float
    recomputed_tokens_total: int


class _Replicas(Collector):
    """Gauges over the replicas whose channels are open; computed when scraped."""

    def __init__(self) -> None:
        self.states: dict[str, _ReplicaState] = {}

    def describe(self) -> Iterable[Metric]:
        return [_family(spec) for spec in (KV_USED, RUNNING, WAITING)]

    def collect(self) -> Iterable[Metric]:
        kv_used, running, waiting = (_family(spec) for spec in (KV_USED, RUNNING, WAITING))
        states = list(self.states.values())
        for model in sorted({state.model for state in states}):
            mine = [state for state in states if state.model == model]
            kv_used.add_metric([model], max(state.kv_used for state in mine))
            running.add_metric([model], sum(state.running for state in mine))
            waiting.add_metric([model], sum(state.waiting for state in mine))
        return [kv_used, running, waiting]


def _family(spec: Spec) -> GaugeMetricFamily:
    return GaugeMetricFamily(spec.name, _help(spec), labels=spec.labels)


def _help(spec: Spec) -> str:
    return f"{spec.what} {spec.act}"


def _reasons() -> set[str]:
    """Every reason a ServingError can have: the closed set of the rejection label."""
    reasons = {OTHER}
    kinds: list[type[ServingError]] = [ServingError]
    while kinds:
        kind = kinds.pop()
        reasons.add(kind.reason)
        kinds += kind.__subclasses__()
    return reasons
