"""`headrace bench tiers`: the real scheduler against FCFS and strict priority, in virtual time.

Arrival times and lengths are those of the Azure conversation trace of 2023, sped up to a multiple
of the capacity; tiers are drawn by a stated mix, tenants by the rates of ServeGen's clients. The
engine is a stated model of step times. Nothing is run but the scheduler, so a figure holds for the
policy, not for a machine; only the time of a plan is this machine's.

Goodput counts every offered request: one that was refused, or was late, is a miss.
"""

import csv
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from headrace.deploy.bench import machine
from headrace.deploy.bench.report import OURS, Report, Row
from headrace.serving.domain.tier import Tier
from headrace.serving.errors import InvalidRequest
from headrace.serving.testing import tier_simulation as sim
from headrace.serving.testing.tier_load import (
    MIX,
    OBJECTIVES,
    TENANT_RATES,
    Arrival,
    assigned,
    at_rate,
    synthetic,
)

TRACES = Path("shared", "traces")
CONVERSATION = Path("azure2023", "AzureLLMInferenceTrace_conv.csv")
SERVEGEN = Path("servegen", "reason", "deepseek-r1")
TENANTS = len(TENANT_RATES)
ROWS, WAITING, PLANS = 32, 256, 1_000
"""A full engine of the default size, and a full queue."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is played."""

    requests: int = 4_000
    load: float = 1.5
    """Offered over capacity."""
    seed: int = 1
    traces: Path | None = None
    """Folder of the public traces; unset: `shared/traces` beside the repository."""


def run(options: Options, tell: Tell) -> Report:
    """Play the same arrivals under every policy.

    Raises:
        InvalidRequest: a folder of traces was named that has none.
    """
    report = Report(kind="tiers", machine=machine.measure(), roofline={})
    folder = options.traces or found_traces()
    if folder is None:
        bare, rates = synthetic(options.requests, seed=options.seed), TENANT_RATES
        source = "a synthetic trace: the public ones are not beside this repository"
    else:
        bare = read_conversation(folder / CONVERSATION, options.requests)
        rates = client_rates(folder / SERVEGEN)
        source = f"{len(bare):,} requests of {CONVERSATION.name}, tenants as in ServeGen"
    drawn = assigned(bare, seed=options.seed, rates=rates)
    capacity = sim.capacity_rps(drawn)
    arrivals = at_rate(drawn, options.load * capacity)
    played: dict[str, sim.Simulation] = {}
    for policy in (sim.OURS, sim.FCFS, sim.STRICT):
        tell(f"{policy.name}: {len(arrivals):,} requests at {options.load:g} times the capacity")
        played[policy.name] = simulation = sim.Simulation(policy, arrivals, seed=options.seed)
        simulation.run()
    report.rows = to_rows(f"tiers/load={options.load:g}", played)
    name = f"tiers/plan/running={ROWS}/waiting={WAITING}"
    report.rows += [
        Row(name=name, peer=OURS, metric=metric, value=value, unit="us")
        for metric, value in plan_us(seed=options.seed).items()
    ]
    report.notes = [
        f"Arrivals: {source}. Capacity {capacity:.2f} requests/s: all of them at once, first come, "
        "first served.",
        f"Engine: {sim.H200_32B.name}; a step takes {sim.H200_32B.base_ms} ms, "
        f"{sim.H200_32B.row_ms} a row, {sim.H200_32B.token_ms} a prompt token, "
        f"{sim.H200_32B.context_ms} a thousand tokens of context, with 5 % noise.",
        "Mix: " + ", ".join(f"{tier} {share:.0%}" for tier, share in MIX.items()) + ".",
        "Promises: "
        + ", ".join(
            f"{tier} TTFT {each.ttft_ms_max / 1000:g} s"
            + (f" ITL p99 {each.itl_ms_max} ms" if each.itl_ms_max else "")
            for tier, each in OBJECTIVES.items()
            if each.ttft_ms_max
        )
        + ", batch 24 h.",
        "Goodput: share of all offered requests that got what was promised. Queues of the others "
        "have no bound and nothing is refused; all size their steps in the same way.",
    ]
    return report


def to_rows(name: str, played: dict[str, sim.Simulation]) -> list[Row]:
    """Figures of each policy; ours over the others' goodput."""
    rows: list[Row] = []

    def add(peer: str, metric: str, value: float, unit: str) -> None:
        rows.append(Row(name=name, peer=peer, metric=metric, value=value, unit=unit))

    for peer, simulation in played.items():
        add(peer, "goodput_share", simulation.attained(), "share")
        for tier in Tier:
            add(peer, f"{tier}_share", simulation.attained(tier), "share")
    ours = played[OURS]
    for peer, simulation in played.items():
        if peer != OURS:
            ratio = ours.attained() / simulation.attained()
            add(OURS, f"over {peer}_ratio", ratio, "x")
    add(OURS, "fairness gap_tokens", ours.fairness.gap, "tokens")
    add(OURS, "fairness bound_tokens", ours.fairness.bound, "tokens")
    return rows


def plan_us(*, seed: int) -> Mapping[str, float]:
    """How long `Scheduler.plan` takes with all rows and places taken, in four tiers."""
    drawn = assigned(synthetic(ROWS + WAITING + PLANS, seed=seed), seed=seed)
    arrivals = [replace(each, at_ms=0.0, prompt_tokens=200) for each in drawn]
    limits = replace(sim.H200_32B.limits, rows_max=ROWS)
    cost = replace(sim.H200_32B, limits=limits)
    simulation = sim.Simulation(sim.OURS, [], cost=cost, seed=seed)
    coming = iter(arrivals)
    taken: list[float] = []
    while len(taken) < PLANS:
        while simulation.num_live < ROWS + WAITING and (arrival := next(coming, None)):
            simulation.submit(replace(arrival, at_ms=simulation.now_ms))
        began = time.perf_counter()
        plan = simulation.scheduler.plan(simulation.now_ms)
        taken.append((time.perf_counter() - began) * 1e6)
        simulation.play(plan)
    taken.sort()
    return {"p50_us": taken[PLANS // 2], "p99_us": taken[PLANS * 99 // 100]}


def found_traces() -> Path | None:
    """`shared/traces` beside the repository, or beside any folder that it lies in."""
    above = Path(__file__).resolve().parents[2].parents
    return next((folder / TRACES for folder in above if (folder / TRACES).is_dir()), None)


def read_conversation(path: Path, most: int) -> list[Arrival]:
    """The first requests of the trace: TIMESTAMP, ContextTokens, GeneratedTokens.

    Raises:
        InvalidRequest: there is no such file, or it is another kind of file.
    """
    limit = sim.H200_32B.limits.sequence_tokens_max
    try:
        with path.open(newline="") as file:
            lines = [line for line, _ in zip(csv.DictReader(file), range(most), strict=False)]
        if len(lines) < 2:
            raise ValueError("it has no two requests")
        moments = [datetime.fromisoformat(line["TIMESTAMP"][:26]).timestamp() for line in lines]
        return [
            Arrival(
                at_ms=(moment - moments[0]) * 1000,
                prompt_tokens=min(max(int(line["ContextTokens"]), 1), limit // 2),
                answer_tokens=min(max(int(line["GeneratedTokens"]), 1), limit // 2),
            )
            for moment, line in zip(moments, lines, strict=True)
        ]
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise InvalidRequest(
            f"{path} cannot be read as a trace: {error}.",
            why="It is the conversation trace of Azure/AzurePublicDataset, 2023.",
            fix="Name the folder that holds the traces with --traces, or none.",
            field="traces",
        ) from error


def client_rates(folder: Path) -> Sequence[float]:
    """Mean rates of the largest clients, as shares; the second column of each client's trace.

    Raises:
        InvalidRequest: there are no such files, or they are other ones.
    """
    try:
        means: list[float] = []
        for path in sorted(folder.glob("*-trace.csv")):
            with path.open(newline="") as file:
                rates = [float(line[1]) for line in csv.reader(file)]
            means.append(sum(rates) / len(rates))
        largest = sorted(means, reverse=True)[:TENANTS]
        return [mean / sum(largest) for mean in largest] or _none(folder)
    except (OSError, ValueError, IndexError, ZeroDivisionError) as error:
        raise InvalidRequest(
            f"The clients in {folder} cannot be read: {error}.",
            why="They are the per-client traces of alibaba/ServeGen.",
            fix="Name the folder that holds the traces with --traces, or none.",
            field="traces",
        ) from error


def _none(folder: Path) -> Sequence[float]:
    raise ValueError(f"no client's trace is in {folder.name}")
