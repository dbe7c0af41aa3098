"""`headrace limits`: set, list and remove limits, on the machine that keeps them."""

import argparse
import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path

from headrace.deploy.tables import show_table
from headrace.serving.admission.key_store import cluster_token
from headrace.serving.admission.quota_authority import Standing
from headrace.serving.admission.quota_store import LimitStore, in_force
from headrace.serving.channel.quota_service import RemoteAuthority
from headrace.serving.clock import SystemClock
from headrace.serving.config import Config
from headrace.serving.domain.limit import Limit, Metric
from headrace.serving.domain.usage import FEMTO_PER_NANO
from headrace.serving.errors import InvalidRequest, QuotaUnavailable

_AMOUNT = re.compile(r"([0-9]{1,10})(?:\.([0-9]{1,9}))?")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "limits",
        help="set, list and remove rates, numbers in use and budgets",
        description="Limits of organisations, projects and keys. All that apply to a request must "
        "pass. A running frontend follows within two seconds; one that is set here stands in place "
        "of the one in config.yaml.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    setting = actions.add_parser("set", help="put a limit in force, or change it")
    _add_name(setting)
    number = setting.add_mutually_exclusive_group(required=True)
    number.add_argument("--limit", type=int, help="in the metric's unit; budgets in nano-currency")
    number.add_argument("--amount", help="of a budget, in units of currency: 12.50")
    setting.add_argument("--burst", type=int, help="of a rate: most at once (a minute's worth)")
    setting.add_argument(
        "--hard", action="store_true", help="of a budget: end work where the money ends"
    )
    setting.set_defaults(run=_set)
    listing = actions.add_parser("list", help="show the limits in force and what is left of each")
    listing.set_defaults(run=_list)
    removing = actions.add_parser("remove", help="take a limit out of force")
    _add_name(removing)
    removing.set_defaults(run=_remove)
    for action in (setting, listing, removing):
        action.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")
        action.add_argument("--json", action="store_true", help="print JSON")


def standings(config: Config) -> Sequence[Standing] | None:
    """What a running authority says of the limits in force; None when none answers."""
    address = config.quota.authority or config.directory.address
    token = cluster_token(config.cluster_token_file)

    async def ask() -> Sequence[Standing]:
        authority = RemoteAuthority(address, cluster_token=token)
        try:
            return await authority.standings()
        finally:
            await authority.close()

    try:
        return asyncio.run(ask())
    except QuotaUnavailable:
        return None


def limits_on_disk(config: Config) -> Sequence[Limit]:
    return in_force(config.limits, LimitStore(config.limits_path, clock=SystemClock()).read())


def as_json(limit: Limit) -> dict[str, str | int | bool | None]:
    """What scripts rely on: names stay, more may be added."""
    return {
        "subject": limit.subject,
        "model": limit.model,
        "metric": limit.metric.value,
        "limit": limit.limit,
        "burst": limit.burst,
        "hard": limit.hard or not limit.metric.is_budget,
    }


def _add_name(parser: argparse.ArgumentParser) -> None:
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("--organisation", metavar="NAME")
    whose.add_argument("--project", metavar="ORGANISATION/NAME")
    whose.add_argument("--key", metavar="KEY_ID")
    parser.add_argument("--metric", required=True, choices=[each.value for each in Metric])
    parser.add_argument("--model", help="only this model's requests (default: all together)")


def _set(args: argparse.Namespace) -> int:
    config = Config.load(args.home)
    config.prepare_home()
    limit = _limit(args, config, number=_number(args))
    if args.hard and not limit.metric.is_budget:
        # A rate and a number in use are always enforced: the flag says what holds anyway.
        limit = _limit(args, config, number=limit.limit, hard=False)
    _store(config).set(limit)
    if args.json:
        print(json.dumps(as_json(limit)))
    else:
        print(f"{limit.subject}: {limit.metric} is limited to {limit.limit:,}.")
    return 0


def _list(args: argparse.Namespace) -> int:
    config = Config.load(args.home)
    known = standings(config)
    # A frontend of this home follows what is set here within two seconds; one elsewhere has others.
    is_elsewhere = known is not None and config.quota.authority is not None
    limits = [each.limit for each in known or ()] if is_elsewhere else limits_on_disk(config)
    left = {each.limit.name: _in_unit(each, each.left) for each in known or ()}
    if args.json:
        print(json.dumps([as_json(each) | {"left": left.get(each.name)} for each in limits]))
        return 0
    not_yet = "no frontend runs" if known is None else "in force in a moment"
    rows = [
        [
            limit.subject,
            limit.model or "all",
            limit.metric.value,
            f"{limit.limit:,}",
            "hard" if limit.hard or not limit.metric.is_budget else "soft",
            f"{left[limit.name]:,}" if limit.name in left else not_yet,
        ]
        for limit in sorted(limits, key=lambda each: each.name)
    ]
    show_table(
        ["subject", "model", "metric", "limit", "kind", "left"], rows, numbers=("limit", "left")
    )
    return 0


def _remove(args: argparse.Namespace) -> int:
    config = Config.load(args.home)
    config.prepare_home()
    limit = _limit(args, config, number=1, hard=False, burst=None)
    _store(config).remove(limit)
    if args.json:
        print(json.dumps({"subject": limit.subject, "metric": limit.metric.value}))
    else:
        print(f"{limit.subject}: {limit.metric} is not limited here any more.")
    return 0


def _limit(args: argparse.Namespace, config: Config, *, number: int, **other: object) -> Limit:
    subject = (
        f"organisation:{args.organisation}"
        if args.organisation
        else f"project:{args.project}"
        if args.project
        else f"key:{args.key}"
    )
    values = {
        "burst": getattr(args, "burst", None),
        "hard": getattr(args, "hard", False),
        **other,
    }
    return Limit(
        subject=subject,
        metric=Metric(args.metric),
        limit=number,
        model=args.model,
        currency=config.prices.currency,
        **values,  # pyright: ignore[reportArgumentType]
    )


def _number(args: argparse.Namespace) -> int:
    """`--limit` as it stands, or `--amount` in nano: exact, and never through a float."""
    if args.limit is not None:
        return args.limit
    amount = _AMOUNT.fullmatch(args.amount)
    if amount is None or not Metric(args.metric).is_budget:
        raise InvalidRequest(
            f"--amount is {args.amount!r} for {args.metric}.",
            why="It is money, in units of currency with at most nine decimals, of a budget.",
            fix="Write it like --amount 12.50, or use --limit.",
            field="amount",
        )
    return int(amount[1]) * 10**9 + int((amount[2] or "").ljust(9, "0"))


def _in_unit(standing: Standing, number: int) -> int:
    return number // FEMTO_PER_NANO if standing.limit.metric.is_budget else number


def _store(config: Config) -> LimitStore:
    return LimitStore(config.limits_path, clock=SystemClock())
