"""Which replica a request goes to, and why."""

import pytest

from headrace.serving.router.endpoint import (
    PREFIX_BLOCK_TOKENS,
    Endpoint,
    PrefixMemory,
    ReplicaFacts,
    ReplicaLoad,
    prefix_chain,
)
from headrace.serving.router.picker import Ask, Picked, cost_tokens, pick

NOW_MS = 100_000.0
PROMPT = list(range(400))
CHAIN = prefix_chain(PROMPT, b"tenant")


def replica(
    replica_id: str,
    *,
    model: str = "m",
    version: str = "v1",
    ready: bool = True,
    is_connected: bool = True,
    age_ms: float = 100,
    **load: int,
) -> Endpoint:
    facts = ReplicaFacts(
        replica_id=replica_id,
        address="127.0.0.1:1",
        model=model,
        version=version,
        ready=ready,
        context_tokens=2048,
    )
    endpoint = Endpoint(facts, is_connected=is_connected)
    endpoint.heard(ReplicaLoad(rows_max=32, **load), now_ms=NOW_MS - age_ms)
    return endpoint


def ask(**changes: object) -> Ask:
    values: dict[str, object] = {"model": "m", "prompt_tokens": len(PROMPT), "chain": CHAIN}
    return Ask(**(values | changes))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [
        pytest.param(replica("r", is_connected=False), "r: not connected", id="its channel broke"),
        pytest.param(replica("r", ready=False), "r: not ready", id="it is loading or leaving"),
        pytest.param(replica("r", draining=True), "r: draining", id="it is draining"),
        pytest.param(replica("r", age_ms=3_001), "r: silent for over 3 s", id="it fell silent"),
        pytest.param(
            replica("lost"), "lost: was lost under this request", id="the request lost it before"
        ),
        pytest.param(
            replica("r", model="n"), "no replica of it is known", id="it serves another model"
        ),
    ],
)
def test_a_replica_is_passed_over_when(endpoint: Endpoint, why: str) -> None:
    assert pick([endpoint], ask(without={"lost"}), now_ms=NOW_MS) == why


def test_an_idle_replica_is_preferred_to_a_busy_one() -> None:
    picked = pick([replica("a", running=8), replica("b", running=2)], ask(), now_ms=NOW_MS)

    assert isinstance(picked, Picked)
    assert picked.endpoint.facts.replica_id == "b"
    assert picked.why == (
        "b costs 432 tokens (0 of 400 resident, 2 running, 0 waiting); 1 others cost more, 0 cannot"
    )


@pytest.mark.parametrize(
    ("running", "chosen"),
    [
        pytest.param(16, "warm", id="a resident prefix is worth half a batch"),
        pytest.param(30, "cold", id="but not a full one"),
    ],
)
def test_a_resident_prefix_weighs_against_load(running: int, chosen: str) -> None:
    """384 of 400 tokens resident: 16 + 512 * 16 / 32 = 272 < 400, and 16 + 480 = 496 > 400."""
    warm = replica("warm", running=running)
    warm.prefixes.remember(CHAIN)

    picked = pick([warm, replica("cold")], ask(), now_ms=NOW_MS)

    assert isinstance(picked, Picked)
    assert picked.endpoint.facts.replica_id == chosen


def test_what_was_just_sent_counts_before_the_replica_reports_it() -> None:
    """A burst between two steps must not all land on the replica that looked idle."""
    endpoints = [replica("a"), replica("b")]
    for _ in range(6):
        picked = pick(endpoints, ask(chain=()), now_ms=NOW_MS)
        assert isinstance(picked, Picked)
        picked.endpoint.sent((), sequences=1, prompt_tokens=400)

    assert [endpoint.sent_sequences for endpoint in endpoints] == [3, 3]


def test_a_load_report_replaces_what_was_guessed() -> None:
    endpoint = replica("a")
    endpoint.sent((), sequences=2, prompt_tokens=100)
    assert cost_tokens(endpoint, ask())[0] == 400 + 100 + 32

    endpoint.heard(ReplicaLoad(rows_max=32, running=2, pending_tokens=7), now_ms=NOW_MS)
    assert cost_tokens(endpoint, ask())[0] == 400 + 7 + 32


def test_the_tokenizer_s_version_is_preferred_while_it_is_there() -> None:
    old, new = replica("old", version="v1", running=20), replica("new", version="v2")

    picked = pick([old, new], ask(version="v1"), now_ms=NOW_MS)
    assert isinstance(picked, Picked)
    assert picked.endpoint is old

    picked = pick([new], ask(version="v1"), now_ms=NOW_MS)
    assert isinstance(picked, Picked)
    assert picked.endpoint is new


def test_prefixes_of_two_tenants_never_meet() -> None:
    memory = PrefixMemory()
    memory.remember(prefix_chain(PROMPT, b"one"))

    assert memory.matched_tokens(prefix_chain(PROMPT, b"one")) == 384
    assert memory.matched_tokens(prefix_chain(PROMPT, b"two")) == 0


def test_a_shared_beginning_matches_as_far_as_it_goes() -> None:
    memory = PrefixMemory()
    memory.remember(CHAIN)
    other = [*PROMPT[: 3 * PREFIX_BLOCK_TOKENS], *range(1000, 1100)]

    assert memory.matched_tokens(prefix_chain(other, b"tenant")) == 3 * PREFIX_BLOCK_TOKENS


def test_the_memory_of_prefixes_is_bounded_and_forgets_ends_first() -> None:
    memory = PrefixMemory(blocks_max=10)
    memory.remember(CHAIN)

    assert len(memory) == 10
    assert memory.matched_tokens(CHAIN) == 10 * PREFIX_BLOCK_TOKENS
