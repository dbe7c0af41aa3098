"""`headrace bench meter`: what a durable usage event costs, beside a bare fdatasync.

Producers in closed loops: each opens a request, waits until its Reserve is durable, settles it,
waits again, and takes the next. Nothing else runs in the process, so the rate is the most that one
frontend's log takes. The bare disk writes and syncs 300 bytes at a time to a file of the same kind
in the same folder, one after the other, just before each loop.
"""

import asyncio
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from headrace.deploy.bench import machine
from headrace.deploy.bench.figures import medians, percentile, ratio
from headrace.deploy.bench.report import OURS, Report, Row
from headrace.serving.clock import SystemClock
from headrace.serving.domain.record import Opening, Refused, Settlement
from headrace.serving.domain.tier import Receipt, Tier, Verdict
from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.metering.meter import Meter
from headrace.serving.metering.meterlog.meter_log import DEFAULTS, MeterLog

RAW, NO_METER = "bare fdatasync", "no meter"
RAW_BYTES = 300
"""About a Reserve."""
RAW_WRITES = 300
_UNITS = {"events_s": "1/s", "commit_p50_ms": "ms", "commit_p99_ms": "ms", "cpu_us": "us"}
_PRICE = Price.text(
    version="bench-1",
    prompt_nano_per_mtok=50_000_000,
    cached_nano_per_mtok=5_000_000,
    completion_nano_per_mtok=200_000_000,
)
_USAGE = Usage(prompt_tokens=180, cached_tokens=64, completion_tokens=128)
_VERSION = "sha256:4f1a9c0e5d7b2386"
_RECEIPT = Receipt(
    tier_asked=Tier.STANDARD,
    tier_served=Tier.STANDARD,
    ttft_us=44_120,
    itl_p50_us=8_930,
    itl_p99_us=12_480,
    verdict=Verdict.MET,
)

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    producers: Sequence[int] = (1, 16, 64, 256)
    rounds: int = 3
    seconds: float = 3.0
    """Of each loop."""


class _NoMeter:
    """Implements Meter and forgets: what is left of the loop's cost is the producers' own."""

    async def open(self, opening: Opening) -> None:
        await asyncio.sleep(0)

    def checkpoint(self, *, tenant_id: str, request_id: str, usage: Usage) -> None:
        pass

    async def settle(self, settlement: Settlement) -> None:
        await asyncio.sleep(0)

    async def refuse(self, refused: Refused) -> None:
        pass


@dataclass(slots=True, eq=False)
class _Loop:
    """One closed loop."""

    meter: Meter
    ends_s: float
    waits_s: list[float] = field(default_factory=list[float])
    requests: int = 0

    async def produce(self, clock: SystemClock) -> None:
        while time.perf_counter() < self.ends_s:
            self.requests += 1
            request_id = f"01890a5d-ac96-774b-bcce-{self.requests:012x}"
            now = clock.unix_ms()
            opening = Opening(
                tenant_id="acme",
                project_id="search",
                key_id="k3m9x2qp",
                request_id=request_id,
                model="smollm2-135m",
                version=_VERSION,
                price=_PRICE,
                accepted_unix_ms=now,
                hold_femto=61_600_000_000_000,
            )
            await self._wait(self.meter.open(opening))
            settlement = Settlement(
                tenant_id="acme",
                request_id=request_id,
                usage=_USAGE,
                outcome=Outcome.OK,
                charge_femto=_PRICE.charge_femto(_USAGE),
                version=_VERSION,
                first_token_unix_ms=now,
                settled_unix_ms=now,
                receipt=_RECEIPT,
            )
            await self._wait(self.meter.settle(settlement))
            if isinstance(self.meter, MeterLog):
                self.meter.projected(self.meter.durable_seq)

    async def _wait(self, event: Awaitable[None]) -> None:
        began_s = time.perf_counter()
        await event
        self.waits_s.append(time.perf_counter() - began_s)


def run(options: Options, home: Path, tell: Tell) -> Report:
    """Measure the disk and the log in turns."""
    tell("looking at the machine")
    looked = machine.measure()
    if not looked.quiet:
        tell(f"warning: other processes use {looked.others_cores:.2f} cores")
    results: defaultdict[tuple[int, str], list[Mapping[str, float]]] = defaultdict(list)
    (home / "bench").mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="meter-", dir=home / "bench") as folder:
        for turn in range(options.rounds):
            for producers in options.producers:
                tell(f"round {turn + 1} of {options.rounds}: {producers} producers")
                results[producers, RAW].append(bare_disk(Path(folder)))
                results[producers, NO_METER].append(
                    uvloop.run(_closed_loop(_NoMeter(), producers, min(options.seconds, 0.5)))
                )
                log = Path(folder) / f"{turn}-{producers}"
                results[producers, OURS].append(_metered(log, producers, options.seconds))
    raw_ms = medians(
        [found for key, rounds in results.items() if key[1] == RAW for found in rounds]
    )
    return Report(
        kind="meter",
        machine=looked,
        roofline={
            "fdatasync_p50_ms": round(raw_ms["commit_p50_ms"], 4),
            "fdatasync_bytes": RAW_BYTES,
            "segment_bytes": DEFAULTS.segment_bytes,
        },
        rows=to_rows(results),
        notes=[
            f"Medians of {options.rounds} rounds of {options.seconds:g} s. An event is a Reserve "
            "or a Settle; commit is from the call to the durable answer.",
            f"cpu: of the whole process, with the producers' own work, which '{NO_METER}' shows.",
            f"Ratios: ours over the {RAW}'s in the same round.",
        ],
    )


def bare_disk(folder: Path) -> Mapping[str, float]:
    """Write and sync 300 bytes at a time to a file whose room was set aside."""
    path = folder / "raw"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    waits_s: list[float] = []
    try:
        os.posix_fallocate(descriptor, 0, DEFAULTS.segment_bytes)
        os.fsync(descriptor)
        data = os.urandom(RAW_BYTES)
        for i in range(RAW_WRITES):
            began_s = time.perf_counter()
            os.pwrite(descriptor, data, i * RAW_BYTES)
            os.fdatasync(descriptor)
            waits_s.append(time.perf_counter() - began_s)
    finally:
        os.close(descriptor)
        path.unlink()
    return _latencies(waits_s) | {"events_s": len(waits_s) / sum(waits_s)}


def to_rows(results: Mapping[tuple[int, str], Sequence[Mapping[str, float]]]) -> list[Row]:
    """Medians, with our commits over the bare disk's."""
    found = {key: medians(rounds) for key, rounds in results.items()}
    rows: list[Row] = []
    for (producers, peer), values in found.items():
        raw = found.get((producers, RAW), {})
        rows += [
            Row(
                name=f"meter/producers={producers}",
                peer=peer,
                metric=metric,
                value=values[metric],
                unit=unit,
                ratio=ratio(values[metric], raw.get(metric)) if peer == OURS else None,
            )
            for metric, unit in _UNITS.items()
            if metric in values
        ]
    return rows


def _metered(folder: Path, producers: int, seconds: float) -> Mapping[str, float]:
    log = MeterLog(folder, clock=SystemClock(), epoch="bench", was_used=lambda *_: False)
    try:
        return uvloop.run(_closed_loop(log, producers, seconds))
    finally:
        log.close()


async def _closed_loop(meter: Meter, producers: int, seconds: float) -> Mapping[str, float]:
    began_s, cpu_s = time.perf_counter(), time.process_time()
    loop = _Loop(meter, began_s + seconds)
    await asyncio.gather(*(loop.produce(SystemClock()) for _ in range(producers)))
    took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    events = len(loop.waits_s)
    figures = {"cpu_us": cpu_s / events * 1e6}
    if isinstance(meter, MeterLog):
        figures |= {"events_s": events / took_s} | _latencies(loop.waits_s)
    return figures


def _latencies(waits_s: Sequence[float]) -> dict[str, float]:
    return {
        "commit_p50_ms": percentile(waits_s, 50) * 1000,
        "commit_p99_ms": percentile(waits_s, 99) * 1000,
    }
