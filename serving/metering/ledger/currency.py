"""Currencies that can be charged in, and what their smallest coin is.

Amounts are kept in femto, 10^-15 of the currency. What is paid is whole minor units: cents, yen.
"""

from collections.abc import Mapping

from headrace.serving.errors import InvalidRequest

FEMTO_DIGITS = 15

MINOR_DIGITS: Mapping[str, int] = {
    "AED": 2,
    "AUD": 2,
    "BHD": 3,
    "BRL": 2,
    "CAD": 2,
    "CHF": 2,
    "CLP": 0,
    "CNY": 2,
    "CZK": 2,
    "DKK": 2,
    "EUR": 2,
    "GBP": 2,
    "HKD": 2,
    "IDR": 2,
    "ILS": 2,
    "INR": 2,
    "ISK": 0,
    "JOD": 3,
    "JPY": 0,
    "KRW": 0,
    "KWD": 3,
    "MXN": 2,
    "NOK": 2,
    "NZD": 2,
    "OMR": 3,
    "PLN": 2,
    "SAR": 2,
    "SEK": 2,
    "SGD": 2,
    "THB": 2,
    "TND": 3,
    "TRY": 2,
    "TWD": 2,
    "USD": 2,
    "VND": 0,
    "ZAR": 2,
}
"""ISO 4217: digits behind the point."""


def minor_digits(currency: str) -> int:
    """Digits behind the point of a currency's smallest coin.

    Raises:
        InvalidRequest: it is not in the table.
    """
    digits = MINOR_DIGITS.get(currency)
    if digits is None:
        raise InvalidRequest(
            f"The currency {currency[:16]!r} is not one that can be charged in.",
            why=f"Currencies are {', '.join(MINOR_DIGITS)} (ISO 4217).",
            fix="Choose one of these.",
            field="currency",
        )
    return digits


def minor_of(femto: int, currency: str) -> int:
    """Whole minor units, rounded to the nearest; a half goes to the even one.

    Half-even, so that over many lines the halves cancel out. 0.125 USD is 12 cents, 0.135 is 14.

    Raises:
        InvalidRequest: see `minor_digits`.
    """
    return round_half_even(femto, 10 ** (FEMTO_DIGITS - minor_digits(currency)))


def round_half_even(amount: int, unit: int) -> int:
    """`amount / unit` as the nearest integer, without a float."""
    whole, rest = divmod(amount, unit)
    return whole + (2 * rest > unit or (2 * rest == unit and whole % 2 == 1))


def decimal(amount: int, digits: int) -> str:
    """`amount` times 10^-digits as an exact decimal: (-12050, 3) is -12.050."""
    sign = "-" if amount < 0 else ""
    whole, rest = divmod(abs(amount), 10**digits)
    return f"{sign}{whole}.{rest:0{digits}d}" if digits else f"{sign}{whole}"
