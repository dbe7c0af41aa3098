"""What a caller is told who asks for more than the key's scope covers."""

import ipaddress

import pytest

from headrace.serving.admission import permit
from headrace.serving.domain.record import Caller
from headrace.serving.domain.scope import Scope
from headrace.serving.domain.tier import Tier
from headrace.serving.errors import PermissionDenied

CALLER = Caller(
    "acme",
    "key1",
    scope=Scope(
        models=("qwen-*",),
        tiers=(Tier.FLEX, Tier.STANDARD, Tier.PRIORITY),
        max_tier=Tier.STANDARD,
        methods=("Inference/Generate",),
        addresses=("10.0.0.0/8",),
    ),
)


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (lambda: permit.check_model(CALLER, "llama"), "--models"),
        (lambda: permit.check_tier(CALLER, Tier.PRIORITY), "--tiers"),
        (lambda: permit.check_tier(CALLER, Tier.BATCH), "--tiers"),
        (lambda: permit.check_method(CALLER, "Inference/CountTokens"), "--methods"),
        (lambda: permit.check_address(CALLER, ipaddress.ip_address("8.8.8.8")), "--addresses"),
        (lambda: permit.check_address(CALLER, None), "--addresses"),
    ],
)
def test_a_refusal_says_what_would_widen_the_scope(check, said):
    with pytest.raises(PermissionDenied) as refusal:
        check()

    assert refusal.value.fix.endswith(f"`headrace keys update key1 {said} …`.")


def test_what_the_scope_covers_passes_without_a_word():
    permit.check_model(CALLER, "qwen-3")
    permit.check_tier(CALLER, Tier.STANDARD)
    permit.check_tier(CALLER, Tier.FLEX)
    permit.check_method(CALLER, "Inference/Generate")
    permit.check_address(CALLER, ipaddress.ip_address("10.1.2.3"))
