"""The credits of a month's SLA statement, as the adjustments that give them."""

from collections.abc import Sequence

from headrace.serving.admission.accounts import local_actor
from headrace.serving.domain.record import Adjustment
from headrace.serving.domain.usage import FEMTO_PER_NANO, nano_of
from headrace.serving.errors import InvalidRequest
from headrace.serving.metering.corrections import REASON_CHARS_MAX
from headrace.serving.metering.sla import Statement
from headrace.serving.metering.sla_month import Month


def adjustments(made: Statement) -> Sequence[Adjustment]:
    """One for each line that has a credit. Their ids follow from the lines: twice is once.

    Whole nano, rounded in the tenant's favour: the same amount here and over the wire.
    """
    return [
        Adjustment(
            adjustment_id=each.adjustment_id,
            tenant_id=each.tenant_id,
            amount_femto=-nano_of(-each.amount_femto) * FEMTO_PER_NANO,
            currency=each.currency,
            reason=each.reason[:REASON_CHARS_MAX],
            actor=local_actor(),
        )
        for each in made.adjustments()
    ]


def check_over(month: Month, *, unix_ms: int) -> None:
    """Whether nothing can be added to the month any more.

    Raises:
        InvalidRequest: it is not over.
    """
    if unix_ms < month.ends_unix_ms:
        raise InvalidRequest(
            f"The month {month} is not over.",
            why="A credit is written once, and what is still to come would change it.",
            fix="Apply it when the month has ended, UTC; without --apply it is only shown.",
            field="month",
        )
