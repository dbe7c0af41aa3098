"""`headrace doctor`: looks at this machine and installation, and says what to mend."""

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from headrace.deploy import checkup
from headrace.deploy.checkup import Finding, Status
from headrace.serving.config import Config
from headrace.serving.errors import ConfigRefused

_COLOURS = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine and installation",
        description="Look at machine, installation, models and running services; change nothing. "
        "Exit code 1 when something has to be mended.",
    )
    parser.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    findings = examine(args.home)
    if args.json:
        seen = list(findings)
        print(json.dumps([asdict(finding) for finding in seen]))
    else:
        seen = list(_shown(findings))
    return 1 if any(finding.status is Status.FAIL for finding in seen) else 0


def examine(home: Path | None) -> Iterator[Finding]:
    """Every check, in the order in which a newcomer meets the matters."""
    yield from checkup.check_python()
    yield from checkup.check_packages()
    yield from checkup.check_cpu()
    yield from checkup.check_memory()
    yield from checkup.check_native()
    try:
        config = Config.load(home)
    except ConfigRefused as refusal:
        # The rest depends on what it says.
        yield Finding("config", Status.FAIL, f"{refusal.what} {refusal.why}", refusal.fix)
        return
    yield Finding("config", Status.OK, f"{len(config.models)} models, home {config.home}")
    yield from checkup.check_home(config)
    yield from checkup.check_disk(config)
    yield from checkup.check_artifacts(config)
    yield from checkup.check_records(config)
    yield from checkup.check_frontend(config)
    yield from checkup.check_directory(config)


def _shown(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Prints each finding as soon as it is known; hashing a large artifact takes a while."""
    console = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        line = Text(f"{finding.status.value:<5}", style=_COLOURS[finding.status])
        line.append(f"{finding.name:<11}", style="bold")
        line.append(finding.what, style="")
        console.print(line)
        if finding.fix:
            console.print(Text(f"{'':16}{finding.fix}", style="italic"))
        yield finding
