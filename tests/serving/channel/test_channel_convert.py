"""What crosses the step channel about tiers, there and back, between clocks that differ."""

from dataclasses import replace

from headrace.serving.channel.convert import (
    add_delta,
    delta_from_wire,
    load_from_wire,
    load_to_wire,
    spec_from_wire,
    submit_to_wire,
)
from headrace.serving.domain.request import Delta, Sampling, SequenceSpec
from headrace.serving.domain.tier import Promise, Tier
from headrace.serving.engine.loop_report import LoadSnapshot, QueueSnapshot
from headrace.serving.router.endpoint import TierLoad
from headrace.v1 import step_pb2

SPEC = SequenceSpec(
    prompt_ids=[1, 2],
    sampling=Sampling(max_tokens=3),
    promise=Promise(tier=Tier.PRIORITY, tenant=2**64 - 1, weight=5, due_ms=10_500.0, itl_ms_max=80),
)


def test_a_promise_arrives_as_time_left() -> None:
    """The frontend's clock says 10,000 and the replica's 77: 500 ms are left on both."""
    wire = submit_to_wire(SPEC, sequence=1, now_ms=10_000.0)

    assert spec_from_wire(wire, now_ms=77.0).promise == replace(SPEC.promise, due_ms=577.0)


def test_what_is_late_already_is_due_at_once() -> None:
    wire = submit_to_wire(SPEC, sequence=1, now_ms=99_000.0)

    assert spec_from_wire(wire, now_ms=0.0).promise.due_ms == 1.0


def test_a_frontend_that_knows_no_tiers_gets_standard() -> None:
    wire = step_pb2.Submit(sequence=1, prompt_ids=[1])

    assert spec_from_wire(wire, now_ms=0.0).promise == Promise()


def test_a_tier_of_a_later_release_is_served_as_standard() -> None:
    wire = submit_to_wire(SPEC, sequence=1, now_ms=0.0)
    wire.tier = "imperial"

    assert spec_from_wire(wire, now_ms=0.0).promise.tier is Tier.STANDARD


def test_queues_are_reported_by_tier() -> None:
    queue = QueueSnapshot(waiting=2, pending_tokens=30, ahead_tokens=20, tokens_per_s=4.0)
    load = LoadSnapshot(prompt_tokens_per_s=500.0, tiers={Tier.FLEX: queue})

    heard = load_from_wire(load_to_wire(load, is_draining=False))

    assert heard.prompt_tokens_per_s == 500.0
    assert heard.tiers == {
        Tier.FLEX: TierLoad(waiting=2, pending_tokens=30, ahead_tokens=20, tokens_per_s=4.0)
    }


def test_written_tokens_come_with_the_delta() -> None:
    step = step_pb2.StepResult()
    add_delta(step, sequence=1, delta=Delta(cache_write_tokens=16), queue_wait_ms=None)

    assert delta_from_wire(step.deltas[0]).cache_write_tokens == 16
