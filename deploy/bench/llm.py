"""`headrace bench llm`: our tokens a second and everybody's, on the same prompts in the same run.

Turns are interleaved: in each round every engine has one turn, in an order that rotates, and only
the engine whose turn it is runs; the others are ended, or stopped in their tracks where starting
takes minutes. A turn warms up, then runs one closed loop for each number of streams. Figures are
medians over the rounds. Ours go through everything a client's request goes through: gRPC, frontend,
metering, step channel, replica; the in-process peers have no transport at all.

A peer that reaches less than `contender.SIT_OUT_SHARE` of the best peer's rate with some number of
streams sits out that level in later rounds: it cannot be the best, and its turns would take most of
the time. Its figures there are those of the first round.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from headrace.compile.store import Store
from headrace.deploy.bench import figures, machine, procfs
from headrace.deploy.bench.contender import Contender, sit_out, to_rows
from headrace.deploy.bench.peers.base import ROWS_MAX, THREADS, Entrant, Peer, PeerFailed
from headrace.deploy.bench.peers.headrace import Headrace, HeadraceEngine, HeadraceEntrant
from headrace.deploy.bench.peers.in_process import WorkerEntrant
from headrace.deploy.bench.peers.install import MODEL, NAMES, peer
from headrace.deploy.bench.report import Report
from headrace.deploy.bench.workload import PROMPT_TOKENS_MIN, Encode, Load, make_load
from headrace.serving.domain.artifact import Precision
from headrace.serving.engine.loader import signed_manifest
from headrace.serving.errors import ModelNotFound, ServingError
from headrace.serving.tokenizer import Tokenizer

WARM_UP_TOKENS = 8

Tell = Callable[[str], None]
"""Takes one line of progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to measure."""

    streams: Sequence[int] = (1, 8, 16, 32)
    peers: Sequence[str] = NAMES
    precisions: Sequence[Precision] = (Precision.INT8, Precision.INT4)
    rounds: int = 3
    per_stream: int = 2
    """Prompts for each stream in a round."""
    time_s_max: float = 20.0
    """Longest that one closed loop may take."""
    prefix_tokens: int = 0
    """Tokens that all prompts share at their beginning; prefix caches are on when there are any."""
    seed: int = 1


def run(options: Options, home: Path, tell: Tell) -> Report:
    """Measure everything that can run here; a peer that fails is left out from then on.

    Raises:
        ModelNotFound: no artifact of ours is built, or a peer's name is unknown.
    """
    skipped: dict[str, str] = {}
    contenders = assemble(options, home, skipped)
    folder = first_artifact(home, options.precisions)
    tell("looking at the machine")
    here = machine.measure()
    report = Report(kind="llm", machine=here, roofline={}, skipped=skipped)
    if not here.quiet:
        tell(f"warning: other processes use {here.others_cores:.2f} cores")
    bench = Bench(options, _encoder(folder), home, contenders, report.skipped, tell)
    asyncio.run(bench.run())
    rooflines = _rooflines(options.precisions, home, here)
    report.roofline = {
        str(precision): line.to_json(options.streams) for precision, line in rooflines.items()
    }
    report.rows = to_rows(contenders, rooflines)
    report.notes = _notes(options, here, bench.others_cores)
    return report


def first_artifact(home: Path, precisions: Sequence[Precision]) -> Path:
    """Any of our builds: its tokenizer is the one that prompts are counted with.

    Raises:
        ModelNotFound: there is none.
    """
    store = Store(home)
    for precision in precisions:
        try:
            return store.resolve(MODEL, precision)
        except ModelNotFound:
            continue
    raise ModelNotFound(
        f"No artifact of {MODEL} is built in {home}.",
        why="The benchmark measures what is served.",
        fix=f"Build them: `headrace compile {MODEL} --precision int8`, and int4.",
    )


def assemble(options: Options, home: Path, skipped: dict[str, str]) -> list[Contender]:
    """Who takes part; who does not is written to `skipped` with the reason.

    Raises:
        ModelNotFound: a peer's name is unknown.
    """
    shares = options.prefix_tokens > 0
    peers: list[Peer] = [Headrace(home, MODEL), HeadraceEngine(home, MODEL)]
    peers += [peer(home, name, shares_prefix=shares) for name in options.peers]
    found: list[Contender] = []
    for each in peers:
        for precision in options.precisions:
            if precision not in each.formats:
                continue
            contender = Contender(each, precision)
            if why := each.missing(precision):
                skipped[contender.label] = why
            else:
                found.append(contender)
    return found


class Bench:
    """One run. One event loop owns it."""

    def __init__(
        self,
        options: Options,
        encode: Encode,
        home: Path,
        contenders: Sequence[Contender],
        skipped: dict[str, str],
        tell: Tell,
    ) -> None:
        self._options = options
        self._encode = encode
        self._logs = home / "bench" / "logs"
        self._contenders = list(contenders)
        self._skipped = skipped
        self._tell = tell
        self._paused: dict[str, Entrant] = {}
        """By label: those that are stopped between their turns."""
        self.others_cores: list[float] = []
        """Work of processes that have nothing to do with this, during each loop."""

    async def run(self) -> None:
        async with AsyncExitStack() as stack:
            for round_ in range(self._options.rounds):
                shift = round_ % max(1, len(self._contenders))
                for contender in self._contenders[shift:] + self._contenders[:shift]:
                    if contender.label in self._skipped:
                        continue
                    try:
                        await self._turn(contender, round_, stack)
                    except ServingError as failure:
                        self._skipped[contender.label] = f"{failure.what} {failure.why}"
                        self._tell(f"{contender.label} is left out: {failure.what}")
                sit_out(self._contenders, self._options.streams)

    async def _turn(self, contender: Contender, round_: int, stack: AsyncExitStack) -> None:
        if all(streams in contender.sits_out for streams in self._options.streams):
            return
        async with self._running(contender, stack) as entrant:
            before = await _step_overhead(entrant)
            for streams in self._options.streams:
                if streams not in contender.sits_out:
                    await self._loop(contender, entrant, streams, round_)
            await _note_facts(contender, entrant, before)

    def _running(
        self, contender: Contender, stack: AsyncExitStack
    ) -> AbstractAsyncContextManager[Entrant]:
        """The contender's engine, warm, for one turn."""
        if contender.peer.starts_slowly:
            return self._resumed(contender, stack)
        return self._started(contender)

    @asynccontextmanager
    async def _started(self, contender: Contender) -> AsyncIterator[Entrant]:
        began_s = time.monotonic()
        async with contender.peer.start(contender.precision, self._log(contender)) as entrant:
            contender.facts["ready_s"].append(time.monotonic() - began_s)
            await self._warm_up(entrant)
            yield entrant

    @asynccontextmanager
    async def _resumed(self, contender: Contender, stack: AsyncExitStack) -> AsyncIterator[Entrant]:
        """Started once, stopped in its tracks between turns; `stack` ends it."""
        entrant = self._paused.get(contender.label)
        if entrant is None:
            began_s = time.monotonic()
            entrant = await stack.enter_async_context(
                contender.peer.start(contender.precision, self._log(contender))
            )
            self._paused[contender.label] = entrant
            contender.facts["ready_s"].append(time.monotonic() - began_s)
        signal_tree(entrant, signal.SIGCONT)
        try:
            await self._warm_up(entrant)
            yield entrant
        finally:
            signal_tree(entrant, signal.SIGSTOP)

    def _log(self, contender: Contender) -> Path:
        return self._logs / f"{contender.label.replace(' ', '-')}.log"

    async def _warm_up(self, entrant: Entrant) -> None:
        """A few tokens in a full batch: first touches of memory, thread pools, shapes."""
        streams = max(self._options.streams)
        prompts = self._load(streams, seed=-1).prompts[:streams]
        load = Load(
            prompts=[prompt[:PROMPT_TOKENS_MIN] for prompt in prompts],
            streams=streams,
            tokens_out=WARM_UP_TOKENS,
            time_s_max=self._options.time_s_max,
        )
        await entrant.run(load)

    async def _loop(
        self, contender: Contender, entrant: Entrant, streams: int, round_: int
    ) -> None:
        load = self._load(streams, seed=self._options.seed * 1000 + round_)
        interference = procfs.Interference(entrant.roots)
        answers = await entrant.run(load)
        others = interference.cores()
        self.others_cores.append(others)
        try:
            found = figures.summarise(answers, tokens_asked=load.tokens_asked)
        except ValueError as error:
            raise PeerFailed(
                f"{contender.label} delivered nothing with {streams} streams.",
                why=f"In {load.time_s_max:.0f} s {error}.",
                fix="Read its log.",
            ) from error
        values = {**found.values, "rss_mb": _rss_mb(entrant)}
        contender.results[streams].append(values)
        self._tell(
            f"round {round_ + 1}/{self._options.rounds}  {contender.label:<24} {streams:>3} streams"
            f"  {values['tok_s']:7.1f} tok/s  ttft {values['ttft_p50_ms']:6.0f} ms"
            f"  itl p99 {values.get('itl_p99_ms', 0):5.0f} ms  others {others:.2f} cores"
            f"{'  (cut off)' if found.cut else ''}"
        )

    def _load(self, streams: int, *, seed: int) -> Load:
        return make_load(
            self._encode,
            streams=streams,
            per_stream=self._options.per_stream,
            seed=seed,
            prefix_tokens=self._options.prefix_tokens,
            time_s_max=self._options.time_s_max,
        )


def signal_tree(entrant: Entrant, signum: signal.Signals) -> None:
    """To every process of the engine; children that ended meanwhile are gone already."""
    for process in procfs.tree(entrant.roots, procfs.read_all()):
        try:
            os.kill(process.pid, signum)
        except ProcessLookupError:
            continue


async def _note_facts(
    contender: Contender, entrant: Entrant, before: tuple[float, float] | None
) -> None:
    if isinstance(entrant, WorkerEntrant) and "load_s" in entrant.said:
        contender.facts["engine_load_s"].append(float(entrant.said["load_s"]))
    if not isinstance(entrant, HeadraceEntrant):
        return
    for name, value in entrant.rss_mb().items():
        contender.facts[f"{name}_rss_mb"].append(value)
    after = await entrant.step_overhead()
    if before is not None and after[1] > before[1]:
        share = (after[0] - before[0]) / (after[1] - before[1])
        contender.facts["step_overhead_share"].append(share)


async def _step_overhead(entrant: Entrant) -> tuple[float, float] | None:
    return await entrant.step_overhead() if isinstance(entrant, HeadraceEntrant) else None


def _rss_mb(entrant: Entrant) -> float:
    processes = procfs.tree(entrant.roots, procfs.read_all())
    return sum(process.rss_bytes for process in processes) / 1e6


def _encoder(folder: Path) -> Encode:
    return Tokenizer.from_folder(folder, signed_manifest(folder)).encode_text


def _rooflines(
    precisions: Sequence[Precision], home: Path, here: machine.Machine
) -> dict[Precision, machine.Roofline]:
    store = Store(home)
    found: dict[Precision, machine.Roofline] = {}
    for precision in precisions:
        try:
            manifest = signed_manifest(store.resolve(MODEL, precision))
        except ModelNotFound:
            continue  # Said already, where the contender was left out.
        decoder = manifest.decoder
        attention = decoder.hidden * decoder.head_dim * (2 * decoder.heads + 2 * decoder.kv_heads)
        found[precision] = machine.Roofline(
            weight_bytes=manifest.weight_bytes,
            weights=decoder.layers * (attention + 3 * decoder.hidden * decoder.ffn)
            + decoder.hidden * decoder.vocab,
            read_gb_s=here.read_gb_s[str(THREADS)],
            int8_gop_s=here.int8_gop_s,
        )
    return found


def _notes(options: Options, here: machine.Machine, others_cores: Sequence[float]) -> list[str]:
    notes = [
        f"{MODEL}; prompts of 64 to 256 tokens, 128 generated, greedy, {THREADS} threads, at most "
        f"{ROWS_MAX} rows; medians of {options.rounds} rounds.",
        "rss is the sum over all processes of an engine; shared pages count in each.",
        "roofline: tokens/s that reading the weights once a step (and their int8 products, where "
        "measured) would allow; prefill, attention and sampling come on top.",
    ]
    if others_cores:
        notes.append(
            f"Other processes used {median(others_cores):.2f} cores during the median loop, "
            f"{max(others_cores):.2f} at most."
        )
    if options.prefix_tokens:
        notes.append(f"All prompts begin with the same {options.prefix_tokens} tokens.")
    return notes
