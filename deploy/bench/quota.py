"""What admission costs: a decision over six limits, the cover of a chunk, a settlement, a lease.

The six are the typical ones: requests, input and output tokens a minute, requests at once, KV
tokens, and a hard monthly budget that is leased from a real authority with its file. Nobody else is
measured: what other gateways do in process has no money and no reservation in it.
"""

import asyncio
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from time import perf_counter_ns

from headrace.deploy.bench import machine
from headrace.deploy.bench.report import OURS, Report, Row
from headrace.serving.admission.lease_keeper import LeaseKeeper
from headrace.serving.admission.quota import Quota
from headrace.serving.admission.quota_thread import AuthorityThread
from headrace.serving.clock import SystemClock
from headrace.serving.domain.generate import Generate
from headrace.serving.domain.limit import Limit, Metric
from headrace.serving.domain.record import Caller
from headrace.serving.domain.request import Sampling
from headrace.serving.domain.usage import Outcome, Price, Usage

Tell = Callable[[str], None]

PROMPT_TOKENS = 200
OUTPUT_TOKENS = 128
PLENTY = 10**15
"""Of every limit: what is measured is the way that passes."""
BLOCK = 100
"""Requests that are open at once."""
PRICE = Price.text(
    version="bench",
    prompt_nano_per_mtok=50_000_000,
    cached_nano_per_mtok=5_000_000,
    completion_nano_per_mtok=200_000_000,
)
LIMITS = (
    Limit(subject="key:k1", metric=Metric.REQUESTS, limit=PLENTY),
    Limit(subject="project:acme/search", metric=Metric.INPUT_TOKENS, limit=PLENTY),
    Limit(subject="project:acme/search", metric=Metric.OUTPUT_TOKENS, limit=PLENTY),
    Limit(subject="organisation:acme", metric=Metric.CONCURRENCY, limit=PLENTY),
    Limit(subject="organisation:acme", metric=Metric.KV_TOKENS, limit=PLENTY),
    Limit(subject="organisation:acme", metric=Metric.BUDGET_MONTH, limit=PLENTY, hard=True),
)
REQUEST = Generate(
    caller=Caller("acme", "k1", "search"),
    request_id="r",
    model="m",
    version="v",
    prompt_ids=range(PROMPT_TOKENS),
    sampling=Sampling(max_tokens=OUTPUT_TOKENS),
    price=PRICE,
    accepted_unix_ms=0,
    accepted_ms=0,
)
USAGE = Usage(prompt_tokens=PROMPT_TOKENS, completion_tokens=OUTPUT_TOKENS)
LONG = Usage(prompt_tokens=PROMPT_TOKENS, completion_tokens=OUTPUT_TOKENS // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    rounds: int = 5
    blocks: int = 50
    """Of BLOCK requests each, in a round."""


def bench_quota(options: Options, home: Path, tell: Tell) -> Report:
    """Measure on this machine; the authority's file lies under `home`, on its disk."""
    tell("looking at the machine")
    report = Report(kind="admission", machine=machine.measure(), roofline={})
    if not report.machine.quiet:
        tell(f"warning: other processes use {report.machine.others_cores:.2f} cores")
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with TemporaryDirectory(dir=home, prefix="bench-quota-") as folder:
        report.rows = asyncio.run(_measure(options, Path(folder), tell))
    report.notes = [
        f"Medians of {options.rounds} rounds of {options.blocks * BLOCK:,} requests, each timed "
        "by itself, the timer's 0.04 us included.",
        "lease: a durable debit in the authority's file, and the way to its thread and back.",
    ]
    return report


async def _measure(options: Options, folder: Path, tell: Tell) -> list[Row]:
    clock = SystemClock()
    authority = AuthorityThread(folder / "quota.db", clock=clock)
    await authority.open(LIMITS)
    leases = LeaseKeeper(authority, holder="bench", epoch="1", clock=clock)
    leases.start()
    rows: list[Row] = []
    for limits in (LIMITS, ()):
        quota = Quota(clock=clock, leases=leases, limits=limits)
        name = f"admission/{len(limits)} limits"
        found: dict[str, list[float]] = {}
        for round_ in range(options.rounds):
            for metric, us in (await _round(quota, options.blocks)).items():
                found.setdefault(metric, []).append(us)
            tell(f"round {round_ + 1}/{options.rounds}  {name}")
        rows += [_row(name, metric, values, "us") for metric, values in found.items()]
    rows.append(_row("admission/lease", "lease_p50_ms", await _leases(quota, leases), "ms"))
    await leases.close()
    await authority.close()
    return rows


async def _round(quota: Quota, blocks: int) -> dict[str, float]:
    """Microseconds of each act. The collector rests, as it mostly does in a frontend."""
    decide: list[int] = []
    cover: list[int] = []
    settle: list[int] = []
    charge_femto = PRICE.charge_femto(USAGE)
    (await quota.admit(REQUEST)).release()
    gc.collect()
    gc.disable()
    try:
        for _ in range(blocks):
            holds = []
            for _ in range(BLOCK):
                began = perf_counter_ns()
                hold = await quota.admit(REQUEST)
                decide.append(perf_counter_ns() - began)
                holds.append(hold)
            for hold in holds:
                began = perf_counter_ns()
                is_covered = hold.covers(LONG)
                cover.append(perf_counter_ns() - began)
                # On a busy machine the keeper of leases may be late.
                assert is_covered or await hold.extend(LONG)
                began = perf_counter_ns()
                hold.settle(usage=USAGE, outcome=Outcome.OK, charge_femto=charge_femto)
                settle.append(perf_counter_ns() - began)
            await asyncio.sleep(0)  # The keeper of leases has its turn.
    finally:
        gc.enable()
    return {
        "decision_p50_us": median(decide) / 1000,
        "decision_p99_us": quantiles(decide, n=100)[98] / 1000,
        "cover_p50_us": median(cover) / 1000,
        "settle_p50_us": median(settle) / 1000,
    }


async def _leases(quota: Quota, leases: LeaseKeeper) -> list[float]:
    """Milliseconds of an answer for which a lease had to be fetched."""
    quota.use(LIMITS[-1:])
    (bucket,) = leases.buckets.values()
    found: list[float] = []
    for _ in range(50):
        bucket.charge(max(0, bucket.account.free))
        began = perf_counter_ns()
        hold = await quota.admit(REQUEST)
        found.append((perf_counter_ns() - began) / 1e6)
        hold.release()
    return found


def _row(name: str, metric: str, values: Sequence[float], unit: str) -> Row:
    return Row(name=name, peer=OURS, metric=metric, value=median(values), unit=unit)
