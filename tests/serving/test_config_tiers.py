"""The `tiers:` section: what is promised, by model, by tier, by default."""

from pathlib import Path

import pytest

from headrace.serving.config import Config
from headrace.serving.config_tiers import Lease, Overflow
from headrace.serving.domain.tier import Tier
from headrace.serving.errors import ConfigRefused


def load(home: Path, text: str) -> Config:
    (home / "config.yaml").write_text(text)
    return Config.load(home)


def test_a_model_s_word_comes_before_the_tier_s_and_that_before_the_default(tmp_path) -> None:
    tiers = load(
        tmp_path,
        """
        tiers:
          priority:
            ttft_ms: 700
            availability_ppm: 990000
            models:
              small: {ttft_ms: 300}
        """,
    ).tiers

    small = tiers.objective("small", Tier.PRIORITY)
    other = tiers.objective("other", Tier.PRIORITY)
    assert (small.ttft_ms_max, small.itl_ms_max, small.availability_ppm) == (300, 80, 990_000)
    assert (other.ttft_ms_max, other.itl_ms_max) == (700, 80)
    assert tiers.objective("small", Tier.STANDARD).ttft_ms_max == 5_000


def test_zero_promises_nothing(tmp_path) -> None:
    tiers = load(tmp_path, "tiers: {standard: {itl_ms: 0, availability_ppm: 0}}").tiers

    objective = tiers.objective("m", Tier.STANDARD)
    assert (objective.itl_ms_max, objective.availability_ppm) == (None, 0)
    assert objective.ttft_ms_max == 5_000


def test_by_default_a_stronger_tier_promises_no_less_than_a_weaker_one(tmp_path) -> None:
    tiers = Config(home=tmp_path).tiers
    strong = [tiers.objective("m", tier) for tier in (Tier.RESERVED, Tier.PRIORITY, Tier.STANDARD)]

    assert [each.ttft_ms_max for each in strong] == [1_000, 1_500, 5_000]
    shares = [each.availability_ppm for each in strong]
    assert shares == sorted(shares, reverse=True)
    assert tiers.objective("m", Tier.BATCH).deadline_ms_max == 86_400_000


def test_leases_and_shares_are_by_tenant(tmp_path) -> None:
    tiers = load(
        tmp_path,
        """
        tiers:
          reserved_overflow: refuse
          leases: {acme: {kv_tokens: 4096}}
          shares: {acme: {weight: 3}}
        """,
    ).tiers

    assert tiers.reserved_overflow is Overflow.REFUSE
    assert tiers.leases["acme"] == Lease(kv_tokens=4096, requests=16)
    assert tiers.shares["acme"].weight == 3


@pytest.mark.parametrize(
    ("text", "blamed"),
    [
        pytest.param("{prioritary: {}}", "tiers.prioritary", id="a misspelt tier"),
        pytest.param("{flex: {ttft: 3}}", "tiers.flex.ttft", id="a misspelt objective"),
        pytest.param("{flex: {ttft_ppm: 1000001}}", "tiers.flex.ttft_ppm", id="more than all"),
        pytest.param("{flex: {ttft_ms: -1}}", "tiers.flex.ttft_ms", id="a negative time"),
        pytest.param("{flex: {ttft_ms: 0.5}}", "tiers.flex.ttft_ms", id="half a millisecond"),
        pytest.param("{reserved_overflow: drop}", "tiers.reserved_overflow", id="no such overflow"),
        pytest.param(
            "{leases: {a: {requests: 0}}}", "tiers.leases.a.requests", id="an empty lease"
        ),
        pytest.param("{shares: {a: {weight: 0}}}", "tiers.shares.a.weight", id="no share at all"),
    ],
)
def test_a_wrong_entry_is_refused(tmp_path, text: str, blamed: str) -> None:
    with pytest.raises(ConfigRefused) as refusal:
        load(tmp_path, f"tiers: {text}")

    assert refusal.value.field == blamed
