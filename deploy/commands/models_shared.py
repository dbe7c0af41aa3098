"""What the verbs of `headrace models` share: flags, and how a version is written."""

import argparse
from pathlib import Path

from headrace.serving.config import Config
from headrace.serving.errors import InvalidRequest


def add_shared(parser: argparse.ArgumentParser) -> None:
    # Suppressed, or a verb's absent flag would undo what stood before the verb.
    parser.add_argument(
        "--home",
        type=Path,
        default=argparse.SUPPRESS,
        help="state folder (default: HEADRACE_HOME)",
    )
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def config_of(args: argparse.Namespace) -> Config:
    return Config.load(getattr(args, "home", None))


def home_of(args: argparse.Namespace, *, prepared: bool = False) -> Path:
    """The home that was asked for; made where it is not there and is to be `prepared`."""
    config = config_of(args)
    if prepared:
        config.prepare_home()
    return config.home


def wants_json(args: argparse.Namespace) -> bool:
    return getattr(args, "json", False)


def model_and_version(text: str) -> tuple[str, int | None]:
    """`smollm2-135m@3` as a name and a number; the number is None where there is no `@`.

    Raises:
        InvalidRequest: what stands behind the `@` is no number.
    """
    model, at, number = text.partition("@")
    if not at:
        return model, None
    return model, version_number(number)


def version_number(text: str) -> int:
    """A version as people type it.

    Raises:
        InvalidRequest: it is no whole number above 0.
    """
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise InvalidRequest(
            f"The version {text!r} is not understood.",
            why="Versions count up from 1.",
            fix="`headrace models versions MODEL` shows them.",
            field="version",
        )
    return int(text)
