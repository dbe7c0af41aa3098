"""The real scheduler in virtual time: arrivals of several tiers, a stated model of step times.

Nothing sleeps and nothing is sampled: a step takes what the cost model says, and a job ends after
as many tokens as its arrival asked for. What refuses, orders, sizes and preempts is the code that
serves. `Fcfs` and `StrictPriority` are what it is compared with; they see the same arrivals and
size their steps in the same way, so that only the order and the refusals differ.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from headrace.serving.domain.tier import Objective, Promise, Tier, Verdict
from headrace.serving.domain.usage import Outcome
from headrace.serving.domain.verdict import Measured, judge
from headrace.serving.engine import tier_policy
from headrace.serving.engine.base import Limits
from headrace.serving.engine.job import Job
from headrace.serving.engine.prefix_cache import PrefixChain
from headrace.serving.engine.scheduler import Plan, Scheduler
from headrace.serving.engine.scheduler import Policy as UrgencyPolicy
from headrace.serving.engine.tier_policy import AT_STAKE, ON_TIME, Urgency
from headrace.serving.engine.tier_queue import ANSWER_WEIGHT, PROMPT_WEIGHT
from headrace.serving.gaps import Gaps
from headrace.serving.router.endpoint import ReplicaLoad, TierLoad
from headrace.serving.router.prediction import predicted_ttft_ms
from headrace.serving.testing.tier_load import OBJECTIVES, Arrival

LOOP_MS = 0.3
"""Around each step: what the loop takes for planning, sampling and delivery."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """How long a step takes, and what it is limited to."""

    name: str
    limits: Limits
    base_ms: float
    row_ms: float
    token_ms: float
    """Of one prompt token."""
    context_ms: float
    """Of a thousand tokens of context that decoding rows read."""
    jitter: float = 0.05
    """Standard deviation of a step's time, as a share."""

    def step_ms(self, *, rows: int, tokens: int, context: int, noise: float) -> float:
        work = self.base_ms + self.row_ms * rows + self.token_ms * tokens
        return (work + self.context_ms * context / 1000) * max(0.5, 1 + self.jitter * noise)


H200_32B = CostModel(
    name="one H200, a dense 32B model in bf16 (computed, not measured)",
    limits=Limits(
        rows_max=128,
        batch_tokens_max=2048,
        sequence_tokens_max=16_384,
        # 141 GB less 65.5 of weights, 8 % spare and 6 GB of activations, at 262 kB a token.
        kv_blocks=221_000 // 16,
        kv_block_tokens=16,
        vocab=1000,
    ),
    # 65.5 GB of weights at 75 % of 4.8 TB/s.
    base_ms=18.2,
    row_ms=0.02,
    # 65.6 GFLOP a token at 55 % of 989 TFLOP/s.
    token_ms=0.12,
    # 262 MB a thousand tokens at the same bandwidth.
    context_ms=0.073,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How arrivals are treated; everything that is compared."""

    name: str
    urgency: UrgencyPolicy = tier_policy.urgency
    has_deadlines: bool = True
    """Whether the scheduler is told when first tokens are due."""
    is_fair: bool = True
    """Whether it is told whose work it is."""
    has_tiers: bool = True
    refuses: bool = True
    """Whether flex and batch are refused that cannot be in time."""


def _fcfs(job: Job, now_ms: float, wait_ms: float, queue_ms: float) -> Urgency:
    return Urgency(ON_TIME, 0, 0.0, job.arrival)


def _strict(job: Job, now_ms: float, wait_ms: float, queue_ms: float) -> Urgency:
    return Urgency(AT_STAKE, job.rank, 0.0, job.arrival)


OURS = Policy(name="headrace")
FCFS = Policy(
    name="fcfs",
    urgency=_fcfs,
    has_deadlines=False,
    is_fair=False,
    has_tiers=False,
    refuses=False,
)
STRICT = Policy(
    name="strict-priority",
    urgency=_strict,
    has_deadlines=False,
    is_fair=False,
    refuses=False,
)


@dataclass(slots=True, eq=False)
class Served:
    """What one arrival got."""

    arrival: Arrival
    was_refused: bool = False
    first_ms: float | None = None
    last_ms: float = 0.0
    ended_ms: float | None = None
    gaps: Gaps = field(default_factory=Gaps)

    def verdict(self, objective: Objective) -> tuple[Verdict, tuple[str, ...]]:
        """As a receipt would say it. What had not ended when the simulation did, failed."""
        at_ms = self.arrival.at_ms
        measured = Measured(
            ttft_us=None if self.first_ms is None else int((self.first_ms - at_ms) * 1000),
            itl_p50_us=self.gaps.quantile_us(500_000),
            itl_p99_us=self.gaps.quantile_us(990_000),
            elapsed_us=int(((self.ended_ms or at_ms) - at_ms) * 1000),
        )
        if self.was_refused:
            return judge(objective, measured, Outcome.REJECTED, is_ours=True)
        return judge(objective, measured, Outcome.FAILED if self.ended_ms is None else Outcome.OK)


class _Job(Job):
    __slots__ = ("answer_left", "served")

    def __init__(self, served: Served, promise: Promise, number: int) -> None:
        arrival = served.arrival
        # Its own first token, so that nobody shares a prefix by accident.
        super().__init__(
            number,
            [number] + [1] * (arrival.prompt_tokens - 1),
            PrefixChain(b"", H200_32B.limits.kv_block_tokens),
            promise=promise,
            tokens_held=(
                arrival.prompt_tokens + arrival.answer_tokens
                if promise.tier is Tier.RESERVED
                else 0
            ),
        )
        self.served = served
        self.answer_left = arrival.answer_tokens
        # As a Sequence does, before the loop has it.
        if full := (arrival.prompt_tokens - 1) // H200_32B.limits.kv_block_tokens:
            self.chain.digest(full - 1, self.token_ids)


class Fairness:
    """The greatest lead that one backlogged tenant of a tier got over another.

    Two tenants are compared from the moment both have work waiting that can be in time until one of
    them has none; the lead is the range of the difference of their service, which is the most over
    any stretch of that time.
    """

    def __init__(self) -> None:
        self.gap = 0.0
        self.bound = 0.0
        """2 * max(longest prompt, 2 * tokens of the answers that ran at once), so far."""
        self._ranges: dict[tuple[int, int], tuple[float, float]] = {}
        self._prompt_max = 0

    def look(self, scheduler: Scheduler[_Job], service: Mapping[int, float]) -> None:
        """After each step. Tenants of different tiers have different numbers."""
        seen: set[tuple[int, int]] = set()
        for queue in scheduler.queues:
            for pair in combinations(sorted(queue.backlogged), 2):
                seen.add(pair)
                lead = service.get(pair[0], 0.0) - service.get(pair[1], 0.0)
                low, high = self._ranges.get(pair, (lead, lead))
                low, high = min(low, lead), max(high, lead)
                self._ranges[pair] = low, high
                self.gap = max(self.gap, high - low)
        for pair in self._ranges.keys() - seen:
            del self._ranges[pair]
        arrivals = [job.served.arrival for job in scheduler.running]
        answers = sum(each.answer_tokens for each in arrivals)
        longest = max((each.prompt_tokens for each in arrivals), default=0)
        self._prompt_max = max(self._prompt_max, longest)
        self.bound = max(self.bound, 2 * self._prompt_max, 2 * ANSWER_WEIGHT * answers)


class Simulation:
    """One policy over one list of arrivals."""

    def __init__(
        self,
        policy: Policy,
        arrivals: Sequence[Arrival],
        *,
        cost: CostModel = H200_32B,
        objectives: Mapping[Tier, Objective] = OBJECTIVES,
        seed: int = 1,
    ) -> None:
        """Prepare; queues have no bound, so that a policy that lets them grow is not helped."""
        self.policy = policy
        self.cost = cost
        self.objectives = objectives
        self.served = [Served(arrival) for arrival in arrivals]
        self.scheduler: Scheduler[_Job] = Scheduler(cost.limits, urgency=policy.urgency)
        self.now_ms = 0.0
        self.steps = 0
        self.fairness = Fairness()
        self.service: dict[int, float] = {}
        """Weighted tokens that each tenant was served."""
        self._noise = random.Random(seed)  # noqa: S311 - nothing secret
        self._next = 0

    def run(self) -> None:
        """Play all arrivals, until everything has ended."""
        while True:
            self._arrive()
            if self.scheduler.running or self.scheduler.num_waiting:
                self._step()
            elif self._next < len(self.served):
                self.now_ms = self.served[self._next].arrival.at_ms
            else:
                return

    def attained(self, tier: Tier | None = None) -> float:
        """Share of all offered requests, of one tier or of all, that got what was promised."""
        verdicts = [
            served.verdict(self.objectives[served.arrival.tier])[0]
            for served in self.served
            if tier is None or served.arrival.tier is tier
        ]
        return verdicts.count(Verdict.MET) / len(verdicts)

    def _arrive(self) -> None:
        while self._next < len(self.served):
            served = self.served[self._next]
            arrival = served.arrival
            if arrival.at_ms > self.now_ms:
                return
            self._next += 1
            if self._refuses(arrival, self.objectives[arrival.tier]):
                served.was_refused = True
            else:
                self._add(served)

    def submit(self, arrival: Arrival) -> None:
        """Queue one more request, now."""
        self.served.append(served := Served(arrival))
        self._next = len(self.served)
        self._add(served)

    @property
    def num_live(self) -> int:
        return len(self.scheduler.running) + self.scheduler.num_waiting

    def _add(self, served: Served) -> None:
        arrival, policy = served.arrival, self.policy
        objective = self.objectives[arrival.tier]
        ttft_ms = objective.ttft_ms_max
        promise = Promise(
            tier=arrival.tier if policy.has_tiers else Tier.STANDARD,
            tenant=arrival.tenant if policy.is_fair else 0,
            due_ms=arrival.at_ms + ttft_ms if ttft_ms and policy.has_deadlines else None,
            itl_ms_max=objective.itl_ms_max,
        )
        self.scheduler.add(_Job(served, promise, self._next), self.now_ms)

    def _refuses(self, arrival: Arrival, objective: Objective) -> bool:
        scheduler = self.scheduler
        if not (self.policy.refuses and arrival.tier.may_be_relegated):
            return False
        queue = scheduler.queues[arrival.tier.rank]
        load = ReplicaLoad(
            prompt_tokens_per_s=scheduler.prompt_tokens_per_s,
            tiers={
                arrival.tier: TierLoad(
                    ahead_tokens=queue.tokens_ahead, tokens_per_s=queue.tokens_per_s
                )
            }
            if len(queue)
            else {},
        )
        wait_ms = predicted_ttft_ms(load, arrival.tier, prompt_tokens=arrival.prompt_tokens)
        most_ms = objective.ttft_ms_max or objective.deadline_ms_max
        return most_ms is not None and wait_ms > most_ms

    def _step(self) -> None:
        self.play(self.scheduler.plan(self.now_ms))
        self.steps += 1
        if self.policy.is_fair:
            self.fairness.look(self.scheduler, self.service)

    def play(self, plan: Plan[_Job]) -> None:
        """Let the step of `plan` take its time."""
        rows = plan.num_decoding
        context = sum(job.num_computed for job, _ in plan.grants[:rows])
        tokens = sum(count for _, count in plan.grants) - rows
        step_ms = LOOP_MS + self.cost.step_ms(
            rows=rows, tokens=tokens, context=context, noise=self._noise.gauss(0, 1)
        )
        self.now_ms += step_ms
        for job, count in plan.grants:
            self._advance(job, count)
        self.scheduler.observe(plan, step_ms)

    def _advance(self, job: _Job, count: int) -> None:
        tenant = job.served.arrival.tenant
        fresh = job.num_computed + count - max(job.num_computed, job.computed_once)
        if fresh > 0:
            cost = ANSWER_WEIGHT if job.has_begun else PROMPT_WEIGHT
            self.service[tenant] = self.service.get(tenant, 0.0) + cost * fresh
        self.scheduler.advance(job, count)
        if job.num_pending:
            return
        served = job.served
        if served.first_ms is None:
            served.first_ms = self.now_ms
        else:
            served.gaps.add(int((self.now_ms - served.last_ms) * 1000))
        served.last_ms = self.now_ms
        job.answer_left -= 1
        job.token_ids.append(1)
        if not job.answer_left:
            served.ended_ms = self.now_ms
            self.scheduler.remove(job)


def capacity_rps(arrivals: Sequence[Arrival], *, cost: CostModel = H200_32B) -> float:
    """Requests per second that the engine finishes when all of them wait from the start.

    First come, first served, with steps sized by the same promises: what any policy could finish,
    late or not.
    """
    simulation = Simulation(FCFS, [replace(each, at_ms=0.0) for each in arrivals], cost=cost)
    simulation.run()
    return len(arrivals) * 1000 / simulation.now_ms
