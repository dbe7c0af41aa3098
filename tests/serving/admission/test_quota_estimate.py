"""How long answers are expected to be: exact over a window, bounded, and silent until it knows."""

import random

from headrace.serving.admission import quota_estimate as module
from headrace.serving.admission.quota_estimate import (
    DEFAULT_TOKENS,
    LEARNED_AT,
    WINDOW,
    OutputEstimator,
    Percentile95,
)


def test_until_enough_answers_were_seen_the_default_is_expected():
    estimate = Percentile95()
    for _ in range(LEARNED_AT - 1):
        estimate.add(3)
    assert estimate.value == DEFAULT_TOKENS

    estimate.add(3)
    assert estimate.value == 3


def test_one_odd_answer_in_twenty_changes_nothing_and_two_do():
    estimate = Percentile95()
    for number in [10] * 19 + [5_000]:
        estimate.add(number)
    assert estimate.value == 10

    estimate.add(5_000)
    assert estimate.value == 5_000


def test_the_estimate_is_the_percentile_of_the_last_answers_and_of_no_others():
    rng, estimate, seen = random.Random(5), Percentile95(), []
    for _ in range(1_000):
        number = rng.randint(0, 2_000)
        estimate.add(number)
        seen = [*seen, number][-WINDOW:]
        if len(seen) >= LEARNED_AT:
            at_most = sum(each <= estimate.value for each in seen)
            below = sum(each < estimate.value for each in seen)
            assert at_most * 100 >= 95 * len(seen) > below * 100


def test_tenants_and_models_are_learned_apart_and_forgotten_in_turn(monkeypatch):
    monkeypatch.setattr(module, "CLASSES_MAX", 2)
    estimator = OutputEstimator()
    first = estimator.of("acme", "m")
    assert estimator.of("acme", "m") is first
    assert estimator.of("acme", "other") is not first
    estimator.of("acme", "m")
    estimator.of("ads", "m")

    assert estimator.of("acme", "m") is first
