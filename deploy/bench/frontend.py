"""`headrace bench frontend`: what our frontend costs, beside bare gRPC and Ray Serve's proxy.

No model takes part: a paced generator stands for the engine. Three servers answer the same client
in turns: `grpc.aio` with the generator inline, our frontend with a replica behind its step channel
(authenticating and metering as always), and Serve's gRPC proxy with a replica of its own. The pace
is a reader's (64 streams of 45 tokens/s), then several times that, until servers fall behind.
"""

import asyncio
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from headrace.deploy.bench import machine, procfs
from headrace.deploy.bench.figures import medians, ratio
from headrace.deploy.bench.frontend_client import Asked
from headrace.deploy.bench.frontend_servers import SERVE_APPLICATION
from headrace.deploy.bench.grpc_client import Metadata, bearer
from headrace.deploy.bench.peers.base import PeerFailed, peer_process, tail
from headrace.deploy.bench.report import OURS, Report, Row
from headrace.deploy.supervisor import Supervisor
from headrace.serving.admission.accounts import demo_key
from headrace.serving.admission.key_store import cluster_token
from headrace.serving.config import Config
from headrace.serving.errors import ServingError
from headrace.serving.testing.signing import trust_key

MODEL = "paced"
BARE, SERVE = "bare grpc.aio", "ray serve proxy"
START_S_MAX = 60.0
CLIENT_SLACK_S = 30.0
READER_TOKENS_PER_S = 45.0
FASTER_TOKENS_PER_S = (150.0, 300.0)
"""Where servers saturate. What each delivers at most, at any pace, is its saturated rate: offering
ever more would only measure how a server drops what it cannot send."""
TOKENS_OUT = 128
SATURATED = "frontend/saturated"

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One load."""

    name: str
    streams: int
    tokens_per_s: float
    """Of each stream."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    streams: int = 64
    rounds: int = 3
    seconds: float = 5.0
    """Of each loop, after a second in which its streams begin."""

    @property
    def scenarios(self) -> Sequence[Scenario]:
        return [
            Scenario(
                name=f"frontend/{self.streams} streams at {pace:.0f} tok/s",
                streams=self.streams,
                tokens_per_s=pace,
                seconds=self.seconds,
            )
            for pace in (READER_TOKENS_PER_S, *FASTER_TOKENS_PER_S)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server that runs."""

    address: str
    metadata: Metadata
    roots: Sequence[int]


Start = Callable[[float, Path], AbstractAsyncContextManager[Target]]
"""Tokens a second of each stream, and a log; leaving the block ends the server."""


def run(options: Options, home: Path, tell: Tell) -> Report:
    """Measure the three in turns. A turn that fails is left out, and said to be."""
    tell("looking at the machine")
    report = Report(kind="frontend", machine=machine.measure(), roofline={})
    if not report.machine.quiet:
        tell(f"warning: other processes use {report.machine.others_cores:.2f} cores")
    results = asyncio.run(_rounds(options, home / "bench" / "logs", report.skipped, tell))
    report.rows = to_rows(results)
    report.notes = [
        f"Medians of {options.rounds} rounds of {options.seconds:.0f} s; the client has a process "
        "of its own on the same cores.",
        "cpu: of all server processes, for each message that reached the client.",
        f"Ratios: ours over {BARE}'s; saturated, over {SERVE}'s.",
    ]
    return report


async def _rounds(
    options: Options, logs: Path, skipped: dict[str, str], tell: Tell
) -> dict[tuple[str, str], list[Mapping[str, float]]]:
    """Figures by scenario and server, one mapping for each round."""
    starts: Sequence[tuple[str, Start]] = ((BARE, bare), (OURS, ours), (SERVE, ray_serve))
    results: defaultdict[tuple[str, str], list[Mapping[str, float]]] = defaultdict(list)
    for round_ in range(options.rounds):
        shift = round_ % len(starts)
        for scenario in options.scenarios:
            for name, start in (*starts[shift:], *starts[:shift]):
                log = logs / f"{name.replace(' ', '-')}.log"
                try:
                    async with start(scenario.tokens_per_s, log) as target:
                        values = await _measure(target, scenario)
                except ServingError as failure:
                    skipped[f"{name}, {scenario.name}, round {round_ + 1}"] = (
                        f"{failure.what} {failure.why}"
                    )
                    tell(f"{name} is left out of this turn: {failure.what}")
                    continue
                results[scenario.name, name].append(values)
                tell(
                    f"round {round_ + 1}/{options.rounds}  {scenario.name:<36} {name:<16}"
                    f" {values['messages_s']:8.0f} messages/s  ttft {values['ttft_p50_ms']:6.1f} ms"
                    f"  {values['cpu_us']:5.0f} us/message"
                )
    return results


async def _measure(target: Target, scenario: Scenario) -> Mapping[str, float]:
    asked = Asked(
        address=target.address,
        metadata=target.metadata,
        model=MODEL,
        streams=scenario.streams,
        tokens_out=TOKENS_OUT,
        seconds=scenario.seconds,
    )
    before_s = _cpu_s(target.roots)
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "headrace.deploy.bench.frontend_client"),
        json.dumps(asdict(asked)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, errors = await asyncio.wait_for(
            client.communicate(), scenario.seconds + CLIENT_SLACK_S
        )
    except TimeoutError as error:
        client.kill()
        await client.wait()
        raise _client_failed("It did not end in time.") from error
    if client.returncode != 0:
        raise _client_failed(errors.decode("utf-8", "replace").strip().rpartition("\n")[2])
    got: dict[str, float] = json.loads(out)
    messages = got.pop("messages_in_all")
    return got | {"cpu_us": (_cpu_s(target.roots) - before_s) / messages * 1e6}


def _client_failed(why: str) -> PeerFailed:
    return PeerFailed(
        "The client of the benchmark stopped.", why=why, fix="Read the server's log beside it."
    )


def _cpu_s(roots: Sequence[int]) -> float:
    return sum(process.cpu_s for process in procfs.tree(roots, procfs.read_all()))


def bare(tokens_per_s: float, log: Path) -> AbstractAsyncContextManager[Target]:
    return _other_server(BARE, "bare", tokens_per_s, log)


def ray_serve(tokens_per_s: float, log: Path) -> AbstractAsyncContextManager[Target]:
    return _other_server(SERVE, "serve", tokens_per_s, log)


@asynccontextmanager
async def _other_server(
    name: str, kind: str, tokens_per_s: float, log: Path
) -> AsyncIterator[Target]:
    argv = [
        *(sys.executable, "-m", "headrace.deploy.bench.frontend_servers", kind),
        *("--tokens-per-s", str(tokens_per_s)),
    ]
    environment = {"RAY_USAGE_STATS_ENABLED": "0"}
    async with peer_process(name, argv, log=log, env=environment, pipes=True) as running:
        assert running.process.stdin is not None
        assert running.process.stdout is not None
        try:
            line = await asyncio.wait_for(running.process.stdout.readline(), START_S_MAX)
        except TimeoutError as error:
            raise running.failed(f"It was not ready after {START_S_MAX:.0f} s.") from error
        if not line:
            raise running.failed("It ended before it was ready.")
        # What Serve's proxy finds the application by; the bare server does not look.
        metadata = (("application", SERVE_APPLICATION),)
        yield Target(address=json.loads(line)["address"], metadata=metadata, roots=[running.pid])
        running.process.stdin.close()
        await running.process.wait()


@asynccontextmanager
async def ours(tokens_per_s: float, log: Path) -> AsyncIterator[Target]:
    """The frontend as the supervisor runs it, and a paced replica that announces itself to it."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        config = _config(Path(folder))
        # Both sides read it; made here, they cannot both make it.
        cluster_token(config.cluster_token_file)
        trust_key(config.trust_dir)  # Of what the paced replica announces.
        key = demo_key(config)
        supervisor = Supervisor(config, report=lambda _: None, assignments=())
        try:
            await supervisor.start(frontend=True, control=False)
            assert supervisor.addresses is not None
            argv = [
                *(sys.executable, "-m", "headrace.serving.testing.paced_replica"),
                *("--directory", supervisor.addresses.directory),
                *("--cluster-token-file", str(config.cluster_token_file)),
                *("--model", MODEL, "--tokens-per-s", str(tokens_per_s)),
            ]
            async with peer_process("paced replica", argv, log=log, env={}) as replica:
                try:
                    await supervisor.until_serving(START_S_MAX)
                except ServingError as error:
                    raise replica.failed(f"{error.what} {tail(log)}") from error
                roots = [*supervisor.pids.values(), replica.pid]
                yield Target(address=supervisor.addresses.grpc, metadata=bearer(key), roots=roots)
        finally:
            await supervisor.stop()


def _config(folder: Path) -> Config:
    settings = {
        "models": [{"name": MODEL}],
        "frontend": {"grpc_port": 0, "http_port": 0, "drain_s": 1.0},
        "directory": {"address": "127.0.0.1:0"},
    }
    (folder / "config.yaml").write_text(json.dumps(settings), "utf-8")  # JSON is YAML.
    config = Config.load(folder)
    config.prepare_home()
    return config


_UNITS = {
    "tok_s": "tok/s",
    "messages_s": "1/s",
    "ttft_p50_ms": "ms",
    "ttft_p99_ms": "ms",
    "itl_p50_ms": "ms",
    "itl_p99_ms": "ms",
    "cpu_us": "us",
}


def to_rows(results: Mapping[tuple[str, str], Sequence[Mapping[str, float]]]) -> list[Row]:
    """Medians with ours over bare gRPC's, the overhead of a first token, and saturated rates."""
    found = {key: medians(rounds) for key, rounds in results.items()}
    rows: list[Row] = []
    for (scenario, server), values in found.items():
        bare_values = found.get((scenario, BARE), {})
        rows += [
            Row(
                name=scenario,
                peer=server,
                metric=metric,
                value=value,
                unit=_UNITS[metric],
                ratio=ratio(value, bare_values.get(metric)) if server == OURS else None,
            )
            for metric, value in values.items()
        ]
        if server == OURS and bare_values:
            rows.append(
                Row(
                    name=scenario,
                    peer=OURS,
                    metric="ttft_over_bare_p50_ms",
                    value=values["ttft_p50_ms"] - bare_values["ttft_p50_ms"],
                    unit="ms",
                )
            )
    return rows + saturated_rows(found)


def saturated_rows(found: Mapping[tuple[str, str], Mapping[str, float]]) -> list[Row]:
    """The most that each server delivered at any pace; ours over Serve's proxy's."""
    most: defaultdict[str, float] = defaultdict(float)
    for (_, server), values in found.items():
        most[server] = max(most[server], values["messages_s"])
    return [
        Row(
            name=SATURATED,
            peer=server,
            metric="messages_s",
            value=rate,
            unit=_UNITS["messages_s"],
            ratio=ratio(rate, most.get(SERVE)) if server == OURS else None,
        )
        for server, rate in most.items()
    ]
