"""What is refused at once because it could not be in time, and what never is."""

import pytest

from headrace.serving.domain.tier import Objective, Terms, Tier
from headrace.serving.errors import Overloaded
from headrace.serving.router.endpoint import Endpoint, ReplicaFacts, ReplicaLoad, TierLoad
from headrace.serving.router.picker import Ask, cost_tokens
from headrace.serving.router.prediction import predicted_ttft_ms, refuse_hopeless

FACTS = ReplicaFacts(
    replica_id="r", address="", model="m", version="v", ready=True, context_tokens=2048
)
ASK = Ask(model="m", prompt_tokens=1_000, chain=())


def busy(tier: Tier, *, ahead: int, tokens_per_s: float) -> Endpoint:
    """A replica that computes 5,000 prompt tokens a second, with a queue in one tier."""
    queue = TierLoad(waiting=9, pending_tokens=ahead, ahead_tokens=ahead, tokens_per_s=tokens_per_s)
    endpoint = Endpoint(FACTS)
    endpoint.heard(ReplicaLoad(prompt_tokens_per_s=5_000, tiers={tier: queue}), now_ms=0)
    return endpoint


def promising(tier: Tier, ttft_ms: int | None = 10_000) -> Terms:
    return Terms(tier_asked=tier, tier_served=tier, objective=Objective(ttft_ms_max=ttft_ms))


def test_the_first_token_follows_the_queue_and_the_prompt() -> None:
    """2,000 tokens at the 500 a second that flex was admitted with, then 1,000 at 5,000."""
    load = busy(Tier.FLEX, ahead=2_000, tokens_per_s=500).load

    assert predicted_ttft_ms(load, Tier.FLEX, prompt_tokens=1_000) == 4_200
    assert predicted_ttft_ms(load, Tier.STANDARD, prompt_tokens=1_000) == 200
    assert predicted_ttft_ms(ReplicaLoad(), Tier.FLEX, prompt_tokens=1_000) == 0


def test_flex_that_could_not_be_in_time_is_told_so_at_once() -> None:
    with pytest.raises(Overloaded, match="after about 16 s") as refusal:
        refuse_hopeless(busy(Tier.FLEX, ahead=8_000, tokens_per_s=500), ASK, promising(Tier.FLEX))

    assert refusal.value.retry_after_ms == 6_200


def test_flex_that_can_be_in_time_is_let_in() -> None:
    refuse_hopeless(busy(Tier.FLEX, ahead=4_000, tokens_per_s=500), ASK, promising(Tier.FLEX))


@pytest.mark.parametrize("tier", [Tier.RESERVED, Tier.PRIORITY, Tier.STANDARD])
def test_the_stronger_tiers_are_never_refused_by_a_prediction(tier: Tier) -> None:
    refuse_hopeless(busy(tier, ahead=10**9, tokens_per_s=1), ASK, promising(tier))


def test_batch_is_refused_only_if_its_day_would_not_do() -> None:
    day = Terms(tier_served=Tier.BATCH, objective=Objective(deadline_ms_max=86_400_000))

    refuse_hopeless(busy(Tier.BATCH, ahead=1_000_000, tokens_per_s=0), ASK, day)
    with pytest.raises(Overloaded):
        refuse_hopeless(busy(Tier.BATCH, ahead=10**7, tokens_per_s=0), ASK, day)


def test_what_waits_in_weaker_tiers_does_not_keep_a_request_from_a_replica() -> None:
    endpoint = busy(Tier.FLEX, ahead=8_000, tokens_per_s=500)
    load = endpoint.load
    endpoint.load = ReplicaLoad(pending_tokens=8_500, rows_max=32, tiers=load.tiers)

    def cost(tier: Tier) -> float:
        return cost_tokens(endpoint, Ask(model="m", prompt_tokens=0, chain=(), tier=tier))[0]

    assert cost(Tier.PRIORITY) == 500
    assert cost(Tier.FLEX) == 8_500
