"""A request's terms, and the capacity that a reserved tenant holds."""

from dataclasses import replace

import pytest

from headrace.serving.admission.tiers import TierDesk, tenant_number
from headrace.serving.config import Config
from headrace.serving.config_tiers import Lease, Overflow, Share, TiersConfig
from headrace.serving.domain.generate import Generate
from headrace.serving.domain.record import Caller
from headrace.serving.domain.request import Sampling
from headrace.serving.domain.tier import Tier
from headrace.serving.errors import TierUnavailable

LEASES = TiersConfig(
    leases={"acme": Lease(kv_tokens=100, requests=3)}, shares={"acme": Share(weight=4)}
)
REFUSING = replace(LEASES, reserved_overflow=Overflow.REFUSE)


class Desk:
    def __init__(self, tmp_path, tiers: TiersConfig = LEASES) -> None:
        self.config = Config(home=tmp_path, tiers=tiers)
        self.desk = TierDesk(tiers, price_for=self.config.price_for)

    def request(
        self, tenant: str = "acme", *, prompt: int = 10, answer: int = 20, n: int = 1
    ) -> Generate:
        return Generate(
            caller=Caller(tenant, "k1"),
            request_id="r1",
            model="m",
            version="v1",
            prompt_ids=[1] * prompt,
            sampling=Sampling(max_tokens=answer),
            n=n,
            price=self.config.price_for("m", Tier.RESERVED),
            terms=self.desk.terms(tenant, model="m", tier=Tier.RESERVED),
            accepted_unix_ms=0,
            accepted_ms=0,
        )


def test_a_reserved_request_within_the_lease_is_served_as_reserved(tmp_path) -> None:
    desk = Desk(tmp_path)

    entry = desk.desk.enter(request := desk.request())

    assert entry.request is request


def test_beyond_the_lease_it_spills_to_standard_with_its_price_and_promise(tmp_path) -> None:
    """Two of 40 tokens fit into 100, the third does not."""
    desk = Desk(tmp_path)
    for _ in range(2):
        desk.desk.enter(desk.request(n=2, answer=15))

    spilled = desk.desk.enter(desk.request(n=2, answer=15)).request

    assert (spilled.terms.tier_asked, spilled.terms.tier_served) == (Tier.RESERVED, Tier.STANDARD)
    assert spilled.terms.objective == LEASES.objective("m", Tier.STANDARD)
    assert spilled.price == desk.config.price_for("m", Tier.STANDARD)


def test_an_answer_that_is_over_gives_its_share_back(tmp_path) -> None:
    desk = Desk(tmp_path, REFUSING)
    entries = [desk.desk.enter(desk.request()) for _ in range(3)]
    with pytest.raises(TierUnavailable):
        desk.desk.enter(desk.request())

    entries[0].leave()

    desk.desk.enter(desk.request())


def test_what_is_refused_says_whose_lease_and_how_much(tmp_path) -> None:
    desk = Desk(tmp_path, REFUSING)

    with pytest.raises(TierUnavailable) as refusal:
        desk.desk.enter(desk.request(prompt=90, answer=11))

    error = refusal.value
    assert (error.metric, error.limit) == ("reserved_kv_tokens", 100)
    assert error.subject == "organisation:acme"
    assert error.retry_after_ms


def test_a_tenant_without_a_lease_has_no_reserved_capacity(tmp_path) -> None:
    spilling, refusing = Desk(tmp_path), Desk(tmp_path, REFUSING)

    entry = spilling.desk.enter(spilling.request("other"))
    assert entry.request.terms.tier_served is Tier.STANDARD
    with pytest.raises(TierUnavailable, match="holds no reserved capacity"):
        refusing.desk.enter(refusing.request("other"))


def test_other_tiers_need_no_lease(tmp_path) -> None:
    desk = Desk(tmp_path, REFUSING)
    terms = desk.desk.terms("other", model="m", tier=Tier.PRIORITY)

    entry = desk.desk.enter(replace(desk.request("other"), terms=terms))

    assert entry.request.terms.tier_served is Tier.PRIORITY


def test_replicas_learn_a_number_and_a_share_not_a_name(tmp_path) -> None:
    desk = Desk(tmp_path).desk
    mine = desk.terms("acme", model="m", tier=Tier.STANDARD)
    other = desk.terms("other", model="m", tier=Tier.STANDARD)

    assert mine.tenant == tenant_number("acme") != other.tenant
    assert 0 <= mine.tenant < 2**64
    assert (mine.weight, other.weight) == (4, 1)
