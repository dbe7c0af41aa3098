"""Amounts of memory as people write them on the command line."""

import re

from headrace.serving.errors import InvalidRequest

_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_UNITS = {
    "": 1,
    **{unit: 1000**power for power, unit in enumerate("kmgt", start=1)},
    **{f"{unit}i": 1024**power for power, unit in enumerate("kmgt", start=1)},
}


def parse_bytes(text: str, *, flag: str = "--device-memory", least: int = 1) -> int:
    """`24GiB`, `512M` or a plain number of bytes.

    Raises:
        InvalidRequest: it is none of these, or less than `least`.
    """
    match = _AMOUNT.fullmatch(text.strip())
    amount = -1 if match is None else int(float(match[1]) * _UNITS[(match[2] or "").lower()])
    if amount < least:
        raise InvalidRequest(
            f"The amount {text!r} is not understood.",
            why="A number, and then perhaps one of KB, MB, GB, TB, KiB, MiB, GiB, TiB.",
            fix=f"Write it as {flag} 24GiB.",
            field=flag.removeprefix("--").replace("-", "_"),
        )
    return amount
