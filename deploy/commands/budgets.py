"""`headrace budgets`: what of each budget is spent, held and left."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from headrace.deploy.commands.limits import limits_on_disk, standings
from headrace.deploy.tables import money, show_table
from headrace.serving.admission.quota_authority import QuotaAuthority, Standing
from headrace.serving.admission.quota_book import QuotaBook
from headrace.serving.clock import SystemClock
from headrace.serving.config import Config
from headrace.serving.domain.usage import FEMTO_PER_NANO

_NUMBERS = ("budget", "spent", "held", "left")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "budgets",
        help="show what of each budget is spent, held and left",
        description="Budgets in their current period. `held` is leased to frontends: for what "
        "runs, and for the next seconds. Spending is reported once a second.",
    )
    parser.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config = Config.load(args.home)
    known = standings(config)
    budgets = [
        each
        for each in (known if known is not None else _from_book(config))
        if each.limit.metric.is_budget
    ]
    if args.json:
        print(json.dumps([as_json(each) for each in budgets]))
    elif not budgets:
        print("No budgets. Set one with `headrace limits set --metric budget_nano_per_month`.")
    else:
        _show(budgets)
    return 0


def as_json(standing: Standing) -> dict[str, str | int | bool | None]:
    """What scripts rely on. Femto-currency: exact."""
    limit = standing.limit
    return {
        "subject": limit.subject,
        "model": limit.model,
        "metric": limit.metric.value,
        "period": standing.period,
        "hard": limit.hard,
        "currency": limit.currency,
        "budget_femto": standing.total,
        "spent_femto": standing.spent,
        "held_femto": standing.held,
        "left_femto": standing.left,
    }


def _show(budgets: Sequence[Standing]) -> None:
    rows = [
        [
            each.limit.subject,
            each.limit.model or "all",
            each.period or "in all",
            "hard" if each.limit.hard else "soft",
            # Spending is rounded up and what is left down: nobody is promised a fraction.
            money(each.total // FEMTO_PER_NANO, each.limit.currency),
            money(-(-each.spent // FEMTO_PER_NANO)),
            money(-(-each.held // FEMTO_PER_NANO)),
            money(each.left // FEMTO_PER_NANO),
        ]
        for each in sorted(budgets, key=lambda each: each.limit.name)
    ]
    show_table(["subject", "model", "period", "kind", *_NUMBERS], rows, numbers=_NUMBERS)


def _from_book(config: Config) -> Sequence[Standing]:
    """What stands in the home's book, when no frontend runs to be asked."""
    if not config.quota_path.exists():
        config.prepare_home()
    book = QuotaBook(config.quota_path)
    try:
        limits = limits_on_disk(config)
        return QuotaAuthority(book, clock=SystemClock(), limits=limits).standings()
    finally:
        book.close()
