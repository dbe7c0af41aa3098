"""One sequence in the loop: its job, text, sampling state and grammar, and how it may end."""

from collections.abc import Collection, Hashable

from headrace.serving.domain.request import FinishReason, SequenceSpec
from headrace.serving.domain.tier import Tier
from headrace.serving.engine.job import Job
from headrace.serving.engine.prefix_cache import PrefixChain
from headrace.serving.engine.sampler import SampleRequest, SamplingState
from headrace.serving.engine.structured import Constraint
from headrace.serving.tokenizer import Tokenizer


class Sequence(Job):
    """Prepared on the submitting thread, then owned by the loop's.

    Everything a step needs of it is worked out beforehand, because a step has about 30 us for
    each sequence in which the engine does not run.
    """

    __slots__ = (
        "arrived_ms",
        "constraint",
        "ending_ids",
        "is_aborted",
        "is_ended",
        "is_resumed",
        "is_scheduled",
        "max_tokens",
        "min_tokens",
        "num_answered",
        "num_prompt",
        "queue_wait_ms",
        "request",
        "request_early",
        "spec",
        "state",
        "text",
        "tokens_max",
        "was_reported",
    )

    def __init__(
        self,
        key: Hashable,
        spec: SequenceSpec,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: Collection[int],
        block_tokens: int,
        tokens_max: int,
        arrived_ms: float,
    ) -> None:
        """Prepare `spec`.

        Args:
            key: the caller's name for it.
            spec: what to generate.
            tokenizer: the model's.
            eos_token_ids: the model's end-of-sequence tokens.
            block_tokens: tokens in a KV block.
            tokens_max: the longest sequence the engine takes, prompt and answer together.
            arrived_ms: now, on the loop's clock.
        """
        sampling = spec.sampling
        prompt_ids = list(spec.prompt_ids)
        is_resumed = bool(spec.resume_ids)
        is_reserved = spec.promise.tier is Tier.RESERVED
        super().__init__(
            key,
            prompt_ids + list(spec.resume_ids),
            PrefixChain(spec.cache_salt, block_tokens),
            computed_once=len(prompt_ids) + len(spec.resume_ids) if is_resumed else 0,
            promise=spec.promise,
            tokens_held=min(len(prompt_ids) + sampling.max_tokens, tokens_max)
            if is_reserved
            else 0,
        )
        self.spec = spec
        self.arrived_ms = arrived_ms
        self.queue_wait_ms: float | None = None
        """From arrival to the first step that ran it; None before that."""
        self.num_prompt = len(prompt_ids)
        self.num_answered = 0
        """Tokens of the answer so far, resumed ones included."""
        self.is_resumed = is_resumed
        self.was_reported = False
        """A delta with tokens has been delivered."""
        self.is_scheduled = False
        self.is_ended = False
        self.is_aborted = False
        """Written by the intake, under its lock."""
        self.max_tokens = sampling.max_tokens
        self.min_tokens = sampling.min_tokens
        self.tokens_max = tokens_max
        self.text = tokenizer.decoder(sampling.stop, min_tokens=sampling.min_tokens)
        ends_on_eos = not sampling.ignore_eos or sampling.grammar is not None
        self.ending_ids = frozenset(
            (*sampling.stop_token_ids, *(eos_token_ids if ends_on_eos else ()))
        )
        self.state = SamplingState(sampling, prompt_ids)
        self.constraint: Constraint | None = None
        self.request = SampleRequest(self.state)
        self.request_early = SampleRequest(self.state, None, tuple(self.ending_ids))
        """The request below `min_tokens`, where nothing may end the answer."""
        # The longest prefix that could be resident: hashing it here keeps the loop's steps even.
        if full := (len(self.token_ids) - 1) // block_tokens:
            self.chain.digest(full - 1, self.token_ids)

    def constrain(self, constraint: Constraint) -> None:
        """Bind the compiled grammar; before `replay`, and before the first step."""
        self.constraint = constraint
        mask = constraint.mask
        self.request = SampleRequest(self.state, mask)
        self.request_early = SampleRequest(self.state, mask, self.request_early.forbid)

    def replay(self) -> FinishReason | None:
        """Run the resumed tokens through text, penalties and grammar; their text was delivered.

        Returns why the sequence has ended already, if it has.

        Raises:
            InvalidSchema: the resumed tokens do not match the grammar.
        """
        finish = None
        for token_id in self.spec.resume_ids:
            _, finish = self._follow(token_id)
            if finish is not None:
                break
        return finish

    def take(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Add a sampled token; the text it completes, and why the sequence ends, if it does.

        Raises:
            InvalidSchema: the grammar cannot go on.
        """
        self.token_ids.append(token_id)
        return self._follow(token_id)

    def _follow(self, token_id: int) -> tuple[str, FinishReason | None]:
        self.state.append(token_id)
        self.num_answered += 1
        stream = self.text
        if token_id in self.ending_ids:
            return stream.flush(), FinishReason.STOP
        text = stream.push(token_id)
        if stream.stopped:
            return text, FinishReason.STOP
        if self.constraint is not None and self.constraint.advance(token_id):
            return text + stream.flush(), FinishReason.STOP
        if (
            self.num_answered >= self.max_tokens
            or self.num_prompt + self.num_answered >= self.tokens_max
        ):
            return text + stream.flush(), FinishReason.LENGTH
        return text, None
