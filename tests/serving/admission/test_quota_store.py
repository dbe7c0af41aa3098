"""Limits that operators set: kept, replaced, removed; followed while frontends run."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.serving.admission import quota_store as module
from headrace.serving.admission.quota_store import LimitsSource, LimitStore, in_force
from headrace.serving.clock import SystemClock
from headrace.serving.domain.limit import Limit, Metric
from headrace.serving.errors import AccountNotFound, ConfigRefused, InvalidRequest

RATE = Limit(subject="key:k1", metric=Metric.REQUESTS, limit=5, burst=2, model="m")
BUDGET = Limit(
    subject="organisation:acme",
    metric=Metric.BUDGET_DAY,
    limit=(1 << 63) - 1,
    hard=True,
    currency="EUR",
)


def store(home: Path) -> LimitStore:
    return LimitStore(home / "limits.db", clock=SystemClock())


def test_what_was_set_is_read_back_in_every_field(tmp_path: Path):
    for limit in (BUDGET, RATE):
        store(tmp_path).set(limit)

    assert store(tmp_path).read() == [RATE, BUDGET]
    assert (tmp_path / "limits.db").stat().st_mode & 0o777 == 0o600


def test_setting_again_replaces_and_another_model_is_another_limit(tmp_path: Path):
    limits = store(tmp_path)
    limits.set(RATE)
    limits.set(replace(RATE, limit=9, burst=None))
    limits.set(replace(RATE, model=None))

    assert [(each.model, each.limit, each.burst) for each in limits.read()] == [
        (None, 5, 2),
        ("m", 9, None),
    ]


def test_removing_needs_the_same_name(tmp_path: Path):
    limits = store(tmp_path)
    limits.set(RATE)
    with pytest.raises(AccountNotFound):
        limits.remove(replace(RATE, model="other"))

    limits.remove(replace(RATE, limit=1))

    assert limits.read() == []


def test_a_limit_too_many_is_refused_and_changes_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "LIMITS_MAX", 1)
    limits = store(tmp_path)
    limits.set(RATE)
    with pytest.raises(InvalidRequest, match="2 limits"):
        limits.set(BUDGET)

    assert limits.read() == [RATE]


def test_a_file_that_is_no_database_is_refused(tmp_path: Path):
    (tmp_path / "limits.db").write_text("not a database, but long enough to be looked at " * 9)

    with pytest.raises(ConfigRefused, match="cannot be used"):
        store(tmp_path).read()


def test_an_operators_word_stands_in_place_of_the_configurations():
    stored = [replace(RATE, limit=1)]

    assert in_force([RATE, BUDGET], stored) == [replace(RATE, limit=1), BUDGET]


def test_changes_are_noticed_once_and_a_mistake_is_not_tried_twice(tmp_path: Path):
    config = tmp_path / "config.yaml"
    answers: list[object] = []

    def configured():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    limits = store(tmp_path)
    source = LimitsSource(limits, config_path=config, configured=configured, initial=[RATE])
    assert source.read() == [RATE]
    assert source.changes() is None
    limits.set(BUDGET)
    assert source.changes() == [RATE, BUDGET]
    config.write_text("x")
    os.utime(config, ns=(1, 1))
    answers.append(ConfigRefused("Bad.", why="x.", fix="y."))
    with pytest.raises(ConfigRefused):
        source.changes()
    assert source.changes() is None
    os.utime(config, ns=(2, 2))
    answers.append([])
    assert source.changes() == [BUDGET]
