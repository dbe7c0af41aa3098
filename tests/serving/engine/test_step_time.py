"""The model of step times: what it says before it has seen a step, and after."""

import random

import pytest

from headrace.serving.engine.step_time import StepTimeModel


def taught(model: StepTimeModel, *, steps: int, noise: float = 0.0, seed: int = 1) -> StepTimeModel:
    """An engine of 10 ms, 0.5 a row and 0.1 a prompt token."""
    rng = random.Random(seed)
    for _ in range(steps):
        rows, tokens = rng.randint(0, 32), rng.choice([0, 0, 64, 128])
        ms = (10 + 0.5 * rows + 0.1 * tokens) * (1 + rng.gauss(0, noise))
        model.observe(rows, tokens, ms)
    return model


@pytest.mark.parametrize("seed", range(5))
def test_it_learns_an_engine_within_two_hundred_steps(seed: int) -> None:
    model = taught(StepTimeModel(), steps=200, noise=0.05, seed=seed)

    assert model.ms(16, 128) == pytest.approx(10 + 8 + 12.8, rel=0.05)
    assert model.ms(32, 0) == pytest.approx(26, rel=0.1)


def test_it_answers_what_fits_into_a_time() -> None:
    """28 ms at a spread of a tenth are 20 predicted; 10 of them are the base and the rows."""
    model = StepTimeModel(base_ms=5.0, row_ms=0.5, token_ms=0.25)

    assert model.tokens_within(28.0, rows=10) == 40
    assert model.tokens_within(5.0, rows=10) < 0


def test_a_load_that_never_varies_does_not_lead_it_astray() -> None:
    """Nothing tells rows from the base then; the prior does."""
    model = StepTimeModel()
    for _ in range(2_000):
        model.observe(8, 0, 20.0)

    assert model.ms(8, 0) == pytest.approx(20.0, rel=0.05)
    assert 5.0 < model.ms(1, 0) < 20.0 < model.ms(16, 0) < 40.0


def test_one_stolen_second_changes_little() -> None:
    model = taught(StepTimeModel(), steps=100)
    before = model.ms(16, 64)

    model.observe(16, 64, 1_000.0)
    taught(model, steps=8)

    assert model.ms(16, 64) == pytest.approx(before, rel=0.05)


def test_no_coefficient_is_ever_zero() -> None:
    """The scheduler divides by them."""
    model = StepTimeModel()
    for _ in range(500):
        model.observe(4, 16, 0.0)

    assert min(model.base_ms, model.row_ms, model.token_ms) > 0


@pytest.mark.parametrize("noise", [0.05, 0.1, 0.2])
def test_what_is_sized_for_a_longest_time_hardly_ever_takes_longer(noise: float) -> None:
    """However much an engine's steps vary: of 10,000 steps at most ten are late."""
    model = taught(StepTimeModel(), steps=1_000, noise=noise)
    rng = random.Random(7)

    tokens = model.tokens_within(100.0, rows=16)
    taken = [(18 + 0.1 * tokens) * (1 + rng.gauss(0, noise)) for _ in range(10_000)]

    assert model.spread == pytest.approx(noise, rel=0.3)
    assert sum(ms > 100.0 for ms in taken) <= 10
