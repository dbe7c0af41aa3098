"""One engine over a whole run: what it reached, where it need not run again, and its rows."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from headrace.deploy.bench import figures
from headrace.deploy.bench.machine import Roofline
from headrace.deploy.bench.peers.base import Peer
from headrace.deploy.bench.report import OURS, Row, with_ratios
from headrace.serving.domain.artifact import Precision

SIT_OUT_SHARE = 0.6
"""Of the best peer's rate. Rounds of one engine differ by up to a quarter, so what reaches less
cannot be the best in another round."""
OWN = (OURS, "headrace-engine")
"""Whose rows are compared with the others'."""


@dataclass(slots=True, eq=False)
class Contender:
    """One engine with one precision over the whole run."""

    peer: Peer
    precision: Precision
    results: defaultdict[int, list[Mapping[str, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """By number of streams, one for each round it ran."""
    sits_out: set[int] = field(default_factory=set[int])
    facts: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """What is not about a number of streams: times to start, memory of single processes."""

    @property
    def label(self) -> str:
        return f"{self.peer.name} {self.peer.formats[self.precision]}"

    @property
    def is_ours(self) -> bool:
        return self.peer.name in OWN


def sit_out(contenders: Sequence[Contender], levels: Sequence[int]) -> None:
    """Note who need not run again, and where."""
    for streams in levels:
        for precision in {contender.precision for contender in contenders}:
            rates = {
                id(each): median(values["tok_s"] for values in each.results[streams])
                for each in contenders
                if each.precision == precision and not each.is_ours and each.results[streams]
            }
            for each in contenders:
                rate = rates.get(id(each))
                if rate is not None and rate < SIT_OUT_SHARE * max(rates.values()):
                    each.sits_out.add(streams)


def to_rows(contenders: Sequence[Contender], rooflines: Mapping[Precision, Roofline]) -> list[Row]:
    """Medians with ratios, then the bounds, then what is about us alone."""
    rows = [
        Row(
            name=f"llm/{each.precision}/streams={streams}",
            peer=each.peer.name,
            metric=metric,
            value=value,
            unit=figures.UNITS[metric],
        )
        for streams in dict.fromkeys(n for each in contenders for n in each.results)
        for each in contenders
        for metric, value in figures.medians(each.results[streams]).items()
    ]
    bounds = [
        Row(
            name=name,
            peer="roofline",
            metric="tok_s",
            value=rooflines[precision].tok_s_max(streams),
            unit="tok/s",
        )
        for name, precision, streams in dict.fromkeys(
            (f"llm/{each.precision}/streams={streams}", each.precision, streams)
            for each in contenders
            for streams in each.results
        )
        if precision in rooflines
    ]
    facts = [
        Row(
            name=f"llm/{each.precision}/start and run",
            peer=each.peer.name,
            metric=metric,
            value=median(values),
            unit=_FACT_UNITS[metric],
        )
        for each in contenders
        for metric, values in each.facts.items()
    ]
    return [*with_ratios(rows, ours=OWN), *bounds, *facts]


_FACT_UNITS = {
    "ready_s": "s",
    "engine_load_s": "s",
    "step_overhead_share": "share",
    "replica_rss_mb": "MB",
    "frontend_rss_mb": "MB",
}
