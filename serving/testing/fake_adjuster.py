"""Corrections of charges in memory, applied once for each id, as the meter log does."""

from headrace.serving.metering.give_back import Adjustment


class FakeAdjuster:
    """An `Adjust`. Asserts that a repeated correction is the same correction."""

    def __init__(self) -> None:
        self.applied: dict[tuple[str, str], Adjustment] = {}

    async def __call__(self, adjustment: Adjustment) -> None:
        name = (adjustment.tenant_id, adjustment.adjustment_id)
        known = self.applied.setdefault(name, adjustment)
        assert known == adjustment, "one id stands for one correction"

    @property
    def given_back_nano(self) -> int:
        """What all corrections together give back."""
        return -sum(each.amount_femto for each in self.applied.values()) // 10**6

    @property
    def request_ids(self) -> set[str]:
        return {each.request_id for each in self.applied.values()}
