"""The table of what is charged when, row by row."""

import pytest

from headrace.serving.domain.usage import Outcome, Usage
from headrace.serving.metering import outcomes
from headrace.serving.testing.memory_log import PRICE, USED

ALL = 16_400 * 10**6


@pytest.mark.parametrize(
    ("outcome", "charged", "waived"),
    [
        pytest.param(Outcome.OK, ALL, 0, id="a whole answer is charged"),
        pytest.param(Outcome.BUDGET, ALL, 0, id="a budget ends what was delivered before"),
        pytest.param(Outcome.CANCELLED, ALL, 0, id="who hangs up pays for what came"),
        pytest.param(Outcome.DEADLINE, ALL, 0, id="who has no time pays for what came"),
        pytest.param(Outcome.RECOVERED, ALL, 0, id="a dead frontend charges its checkpoint"),
        pytest.param(Outcome.FAILED, 0, ALL, id="a fault of ours is free and kept as waived"),
        pytest.param(Outcome.REJECTED, 0, 0, id="a refusal is free"),
        pytest.param(Outcome.EXPIRED, 0, 0, id="what was never delivered is free"),
    ],
)
def test_what_is_charged(outcome, charged, waived):
    assert outcomes.charge_femto(PRICE, USED, outcome) == charged
    assert outcomes.waived_femto(PRICE, USED, outcome) == waived


def test_every_end_has_a_rule_with_a_reason():
    assert set(outcomes.RULES) == set(Outcome) - {Outcome.OPEN}
    assert all(rule.why.endswith(".") for rule in outcomes.RULES.values())


def test_a_request_that_is_cancelled_in_the_queue_is_free():
    """Nothing was delivered, the prompt included."""
    assert outcomes.charge_femto(PRICE, Usage(), Outcome.CANCELLED) == 0
