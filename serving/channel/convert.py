"""Between step-channel messages and domain values. The only module of the channel that knows both.

The proto's field names are the domain's; what differs is that the wire has no None and no enums.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from headrace.serving.domain.request import (
    Delta,
    FinishReason,
    Grammar,
    GrammarKind,
    Sampling,
    SequenceSpec,
    TokenLogprob,
)
from headrace.serving.domain.tier import Promise, Tier
from headrace.serving.errors import EngineFault, InvalidRequest, ServingError
from headrace.serving.router.endpoint import ReplicaFacts, ReplicaLoad, TierLoad
from headrace.v1 import directory_pb2, step_pb2

DEADLINE_MS_MAX = 2**32 - 1
"""49 days: the wire's field is 32 bits wide; a later deadline is as good as none."""


class QueueReport(Protocol):
    """One tier's part of it: one attribute for each field of `TierLoad`."""

    @property
    def waiting(self) -> int: ...
    @property
    def pending_tokens(self) -> int: ...
    @property
    def ahead_tokens(self) -> int: ...
    @property
    def tokens_per_s(self) -> float: ...


class LoadReport(Protocol):
    """The loop's snapshot: one attribute for each field of the `Load` message."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def pending_tokens(self) -> int: ...
    @property
    def kv_blocks_free(self) -> int: ...
    @property
    def kv_blocks_total(self) -> int: ...
    @property
    def step_ms(self) -> float: ...
    @property
    def step_rows(self) -> int: ...
    @property
    def step_tokens(self) -> int: ...
    @property
    def rows_max(self) -> int: ...
    @property
    def prompt_tokens_total(self) -> int: ...
    @property
    def cached_tokens_total(self) -> int: ...
    @property
    def completion_tokens_total(self) -> int: ...
    @property
    def recomputed_tokens_total(self) -> int: ...
    @property
    def overhead_share(self) -> float: ...
    @property
    def cache_write_tokens_total(self) -> int: ...
    @property
    def prompt_tokens_per_s(self) -> float: ...
    @property
    def tiers(self) -> Mapping[Tier, QueueReport]: ...


def submit_to_wire(spec: SequenceSpec, *, sequence: int, now_ms: float) -> step_pb2.Submit:
    """A sequence as a replica takes it; deadlines travel as time left, since clocks differ."""
    message = step_pb2.Submit(
        sequence=sequence,
        prompt_ids=spec.prompt_ids,
        resume_ids=spec.resume_ids,
        cache_salt=spec.cache_salt,
        sampling=sampling_to_wire(spec.sampling),
    )
    if spec.deadline_ms is not None:
        message.deadline_in_ms = _left_ms(spec.deadline_ms, now_ms)
    promise = spec.promise
    message.tier = promise.tier.value
    message.tenant = promise.tenant
    message.tenant_weight = promise.weight
    if promise.due_ms is not None:
        message.ttft_in_ms = _left_ms(promise.due_ms, now_ms)
    if promise.itl_ms_max is not None:
        message.itl_ms_max = promise.itl_ms_max
    return message


def _left_ms(until_ms: float, now_ms: float) -> int:
    """At least 1, since 0 is none: what is late already is due at once."""
    left_ms = max(1, int(until_ms - now_ms))
    return left_ms if left_ms <= DEADLINE_MS_MAX else 0


def spec_from_wire(message: step_pb2.Submit, *, now_ms: float) -> SequenceSpec:
    """The sequence that a frontend submits.

    Raises:
        InvalidRequest: a frontend of another version sent what this replica cannot read.
    """
    if not message.prompt_ids:
        raise InvalidRequest(
            "A sequence came without a prompt.",
            why="The model continues a prompt; there is nothing to continue.",
            fix="Run frontend and replica from the same release.",
        )
    return SequenceSpec(
        prompt_ids=list(message.prompt_ids),
        resume_ids=list(message.resume_ids),
        sampling=sampling_from_wire(message.sampling),
        cache_salt=message.cache_salt,
        deadline_ms=now_ms + message.deadline_in_ms if message.deadline_in_ms else None,
        promise=Promise(
            # A tier of a later release is served, and promised nothing that we do not know.
            tier=_TIERS.get(message.tier, Tier.STANDARD),
            tenant=message.tenant,
            weight=message.tenant_weight or 1,
            due_ms=now_ms + message.ttft_in_ms if message.ttft_in_ms else None,
            itl_ms_max=message.itl_ms_max or None,
        ),
    )


_TIERS: Mapping[str, Tier] = MappingProxyType({tier.value: tier for tier in Tier})


def sampling_to_wire(sampling: Sampling) -> step_pb2.StepSampling:
    message = step_pb2.StepSampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logprobs=-1 if sampling.logprobs is None else sampling.logprobs,
    )
    if sampling.grammar is not None:
        setattr(message, sampling.grammar.kind.value, sampling.grammar.text)
    return message


def sampling_from_wire(message: step_pb2.StepSampling) -> Sampling:
    kind = message.WhichOneof("grammar")
    return Sampling(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias),
        seed=message.seed,
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=None if message.logprobs < 0 else message.logprobs,
        grammar=Grammar(GrammarKind(kind), getattr(message, kind)) if kind else None,
    )


def add_delta(
    step: step_pb2.StepResult, *, sequence: int, delta: Delta, queue_wait_ms: float | None
) -> None:
    """Append what a step did for one sequence."""
    message = step.deltas.add(sequence=sequence, token_ids=delta.token_ids, text=delta.text)
    if delta.cached_tokens:
        message.cached_tokens = delta.cached_tokens
    if delta.cache_write_tokens:
        message.cache_write_tokens = delta.cache_write_tokens
    if queue_wait_ms is not None:
        message.queue_wait_ms = queue_wait_ms
    if delta.finish is not None:
        message.finish = delta.finish.value
    for logprob in delta.logprobs:
        message.logprobs.add(
            token_id=logprob.token_id,
            logprob=logprob.logprob,
            top_ids=[token_id for token_id, _ in logprob.top],
            top_logprobs=[value for _, value in logprob.top],
        )
    if delta.error is not None:
        message.error.CopyFrom(error_to_wire(delta.error))


_FINISH: Mapping[str, FinishReason | None] = MappingProxyType(
    {"": None} | {reason.value: reason for reason in FinishReason}
)


def delta_from_wire(message: step_pb2.SequenceDelta) -> Delta:
    """What arrived for one sequence. Fields are read once: this runs for every token."""
    finish = message.finish
    return Delta(
        token_ids=tuple(message.token_ids),
        text=message.text,
        logprobs=tuple(map(_logprob_from_wire, message.logprobs)) if message.logprobs else (),
        cached_tokens=message.cached_tokens,
        cache_write_tokens=message.cache_write_tokens,
        # A word of a later release ends the sequence all the same.
        finish=_FINISH.get(finish, FinishReason.ERROR) if finish else None,
        error=error_from_wire(message.error) if message.HasField("error") else None,
    )


def _logprob_from_wire(message: step_pb2.StepLogprob) -> TokenLogprob:
    return TokenLogprob(
        message.token_id,
        message.logprob,
        tuple(zip(message.top_ids, message.top_logprobs, strict=False)),
    )


def error_to_wire(error: Exception) -> step_pb2.StepError:
    """Only a ServingError's own sentences cross; anything else is a defect and says nothing."""
    if not isinstance(error, ServingError):
        error = EngineFault(
            "The replica failed.",
            why="A defect ended the sequence; the replica's log has it.",
            fix="Send the request again.",
        )
    return step_pb2.StepError(reason=error.reason, what=error.what, why=error.why, fix=error.fix)


def error_from_wire(message: step_pb2.StepError) -> ServingError:
    kind = _kinds().get(message.reason, EngineFault)
    return kind(message.what, why=message.why, fix=message.fix)


def _kinds() -> Mapping[str, type[ServingError]]:
    """The class tree by reason. Built when needed: errors are rare, and the tree may grow."""
    found = [ServingError]
    for kind in found:
        found.extend(kind.__subclasses__())
    return {kind.reason: kind for kind in found}


def load_to_wire(load: LoadReport, *, is_draining: bool) -> step_pb2.Load:
    return step_pb2.Load(
        running=load.running,
        waiting=load.waiting,
        pending_tokens=load.pending_tokens,
        kv_blocks_free=load.kv_blocks_free,
        kv_blocks_total=load.kv_blocks_total,
        step_ms=load.step_ms,
        draining=is_draining,
        step_rows=load.step_rows,
        step_tokens=load.step_tokens,
        rows_max=load.rows_max,
        prompt_tokens_total=load.prompt_tokens_total,
        cached_tokens_total=load.cached_tokens_total,
        completion_tokens_total=load.completion_tokens_total,
        recomputed_tokens_total=load.recomputed_tokens_total,
        overhead_share=load.overhead_share,
        cache_write_tokens_total=load.cache_write_tokens_total,
        prompt_tokens_per_s=load.prompt_tokens_per_s,
        tiers=[
            step_pb2.TierLoad(
                tier=tier.value,
                waiting=queue.waiting,
                pending_tokens=queue.pending_tokens,
                ahead_tokens=queue.ahead_tokens,
                tokens_per_s=queue.tokens_per_s,
            )
            for tier, queue in load.tiers.items()
        ],
    )


def load_from_wire(message: step_pb2.Load) -> ReplicaLoad:
    return ReplicaLoad(
        running=message.running,
        waiting=message.waiting,
        pending_tokens=message.pending_tokens,
        rows_max=message.rows_max,
        draining=message.draining,
        prompt_tokens_per_s=message.prompt_tokens_per_s,
        tiers={
            tier: TierLoad(
                waiting=each.waiting,
                pending_tokens=each.pending_tokens,
                ahead_tokens=each.ahead_tokens,
                tokens_per_s=each.tokens_per_s,
            )
            for each in message.tiers
            if (tier := _TIERS.get(each.tier)) is not None
        }
        if message.tiers
        else {},
    )


def facts_to_wire(facts: ReplicaFacts) -> directory_pb2.Replica:
    return directory_pb2.Replica(
        replica_id=facts.replica_id,
        address=facts.address,
        model=facts.model,
        version=facts.version,
        ready=facts.ready,
        context_tokens=facts.context_tokens,
        precision=facts.precision,
        family=facts.family,
        artifact_path=facts.artifact_path,
    )


def facts_from_wire(message: directory_pb2.Replica) -> ReplicaFacts:
    return ReplicaFacts(
        replica_id=message.replica_id,
        address=message.address,
        model=message.model,
        version=message.version,
        ready=message.ready,
        context_tokens=message.context_tokens,
        precision=message.precision,
        family=message.family,
        artifact_path=message.artifact_path,
    )
