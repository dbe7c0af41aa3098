"""`headrace prices`: publish price books, for good, and show which is in force."""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

from headrace.deploy.tables import money, show_table
from headrace.serving.clock import SystemClock
from headrace.serving.config import Config
from headrace.serving.errors import InvalidRequest
from headrace.serving.metering import price_book
from headrace.serving.metering.price_book import PriceBook
from headrace.serving.metering.price_shelf import PriceShelf


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "prices",
        help="publish and show price books",
        description="A request keeps the prices that were in force when it was accepted. A "
        "published book never changes; running frontends take a new one in by themselves.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    publish = actions.add_parser("publish", help="check a book and publish it, for good")
    publish.add_argument("file", type=Path, help="YAML or JSON; see serving/metering/README.md")
    publish.set_defaults(run=_publish)
    listing = actions.add_parser("list", help="show which books there are")
    listing.set_defaults(run=_list)
    show = actions.add_parser("show", help="show a book's rates")
    show.add_argument("version", nargs="?", help="default: the one in force")
    show.set_defaults(run=_show)
    for action in (publish, listing, show):
        action.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")
        action.add_argument("--json", action="store_true", help="print JSON")


def _publish(args: argparse.Namespace) -> int:
    published, is_new = _shelf(args).publish(args.file)
    book = published.book
    if args.json:
        print(json.dumps(_as_json(book) | {"sha256": published.sha256, "is_new": is_new}))
    elif is_new:
        print(f"Price book {book.version} is in force from {_moment(book)} (UTC).")
    else:
        print(f"Price book {book.version} was published before; nothing has changed.")
    return 0


def _list(args: argparse.Namespace) -> int:
    shelf = _shelf(args)
    in_force = shelf.at(SystemClock().unix_ms()).version
    books = _books(args, shelf)
    if args.json:
        rows = [_as_json(book) | {"in_force": book.version == in_force} for book in books]
        print(json.dumps(rows))
        return 0
    rows = [
        [
            book.version,
            book.currency,
            _moment(book),
            str(len(book.models)),
            "in force" if book.version == in_force else "",
        ]
        for book in books
    ]
    show_table(["version", "currency", "from (UTC)", "models", ""], rows, numbers=("models",))
    return 0


def _show(args: argparse.Namespace) -> int:
    shelf = _shelf(args)
    version = args.version or shelf.at(SystemClock().unix_ms()).version
    book = next((each for each in _books(args, shelf) if each.version == version), None)
    if book is None:
        raise InvalidRequest(
            f"There is no price book {version!r}.",
            why="It was not published in this home.",
            fix="See `headrace prices list`.",
            field="version",
        )
    if args.json:
        print(json.dumps(_as_json(book)))
        return 0
    named = [*sorted(book.models.items()), *([("(others)", book.default)] if book.default else [])]
    rows = [
        [model, unit, money(rate, book.currency)]
        for model, rates in named
        for unit, rate in rates.items()
    ]
    show_table(["model", "unit", "for a million"], rows, numbers=("for a million",))
    print(", ".join(f"{tier.value} {percent} %" for tier, percent in book.tiers.items()))
    return 0


def _shelf(args: argparse.Namespace) -> PriceShelf:
    config = Config.load(args.home)
    config.prepare_home()
    return PriceShelf(config.prices_dir, price_book.embedded(config.prices))


def _books(args: argparse.Namespace, shelf: PriceShelf) -> list[PriceBook]:
    embedded = price_book.embedded(Config.load(args.home).prices)
    return [embedded, *(each.book for each in shelf.published())]


def _as_json(book: PriceBook) -> dict[str, object]:
    return {
        "version": book.version,
        "currency": book.currency,
        "effective_unix_ms": book.effective_unix_ms,
        "models": {model: dict(rates) for model, rates in book.models.items()},
        "default": None if book.default is None else dict(book.default),
        "tiers": {tier.value: percent for tier, percent in book.tiers.items()},
    }


def _moment(book: PriceBook) -> str:
    if book.effective_unix_ms == 0:
        return "config.yaml"
    return datetime.fromtimestamp(book.effective_unix_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
