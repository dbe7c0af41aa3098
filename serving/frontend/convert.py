"""Between public messages and domain values; the only module that knows both.

Whatever a client sends either becomes a `Generate` whose every field is in range, or is a
ServingError that names the field; nothing else escapes.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.serving.channel.fleet import ServedModel
from headrace.serving.domain.artifact import Manifest
from headrace.serving.domain.generate import Chunk, Generate, Settled
from headrace.serving.domain.record import Caller
from headrace.serving.domain.request import (
    FinishReason,
    Grammar,
    GrammarKind,
    Sampling,
    TokenLogprob,
)
from headrace.serving.domain.tier import PLAIN, Receipt, Terms, Tier
from headrace.serving.domain.usage import Price, Usage
from headrace.serving.frontend.rules import answer_tokens, check_prompt_tokens, check_token_ids
from headrace.serving.tokenizer import Tokenizer
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import usage_pb2

SEED_BITS = 64


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What the frontend needs of an artifact: no weights."""

    manifest: Manifest
    tokenizer: Tokenizer


def prompt_ids(
    message: pb.GenerateRequest | pb.CountTokensRequest, model: LoadedModel
) -> Sequence[int]:
    """The prompt in the model's tokens. May take a second for a megabyte of text.

    Raises:
        InvalidRequest: an id is outside the vocabulary, or the chat cannot be rendered.
        PromptTooLong: the text is longer than any prompt of this model.
    """
    kind = message.WhichOneof("input")
    if kind == "tokens" and isinstance(message, pb.GenerateRequest):
        ids = list(message.tokens.ids)
        check_token_ids("tokens.ids", ids, model.tokenizer.vocab_size)
        return ids
    if kind == "chat":
        messages = [(each.role, each.content) for each in message.chat.messages]
        return model.tokenizer.encode_chat(messages)
    return model.tokenizer.encode(message.prompt)


def text_chars(message: pb.GenerateRequest | pb.CountTokensRequest) -> int:
    """How much text there is to tokenise."""
    match message.WhichOneof("input"):
        case "prompt":
            return len(message.prompt)
        case "chat":
            return sum(len(each.content) for each in message.chat.messages)
        case _:
            return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """What the server decides about a request, beside what the client sent."""

    caller: Caller
    request_id: str
    price: Price
    cache_salt: bytes
    accepted_unix_ms: int
    accepted_ms: float
    deadline_ms: float | None
    terms: Terms = PLAIN


def generate_from_wire(
    message: pb.GenerateRequest,
    *,
    ids: Sequence[int],
    model: LoadedModel,
    served: ServedModel,
    acceptance: Acceptance,
) -> Generate:
    """Build the domain value of a message that passed `check_request`.

    Args:
        message: what the client sent.
        ids: from `prompt_ids`.
        model: whose tokenizer made them.
        served: the model as its replicas serve it; its context may be shorter than trained.
        acceptance: what the server decides.

    Raises:
        InvalidRequest: a token id is outside the vocabulary, or min_tokens is over max_tokens.
        PromptTooLong: prompt and answer exceed the context.
    """
    vocab = model.tokenizer.vocab_size
    check_prompt_tokens(len(ids))
    check_token_ids("stop_token_ids", message.stop_token_ids, vocab)
    check_token_ids("sampling.logit_bias", message.sampling.logit_bias.keys(), vocab)
    max_tokens = answer_tokens(
        message, prompt_tokens=len(ids), context_tokens=served.newest.context_tokens
    )
    return Generate(
        caller=acceptance.caller,
        request_id=acceptance.request_id,
        model=served.name,
        version=served.newest.version,
        prompt_ids=ids,
        sampling=_sampling_from_wire(message, model.manifest, max_tokens),
        n=message.n or 1,
        price=acceptance.price,
        terms=acceptance.terms,
        cache_salt=acceptance.cache_salt,
        reasoning_token_ids=model.manifest.reasoning_token_ids,
        accepted_unix_ms=acceptance.accepted_unix_ms,
        accepted_ms=acceptance.accepted_ms,
        deadline_ms=acceptance.deadline_ms,
    )


def tier_from_wire(tier: int, caller: Caller) -> Tier:
    """The tier that a request asks for: its own word, else its key's, else standard."""
    return _TIERS.get(tier) or caller.tier_default


_WIRE_TIERS: Mapping[Tier, usage_pb2.Tier] = {
    Tier.RESERVED: usage_pb2.TIER_RESERVED,
    Tier.PRIORITY: usage_pb2.TIER_PRIORITY,
    Tier.STANDARD: usage_pb2.TIER_STANDARD,
    Tier.FLEX: usage_pb2.TIER_FLEX,
    Tier.BATCH: usage_pb2.TIER_BATCH,
}
_TIERS: Mapping[int, Tier] = {wire: tier for tier, wire in _WIRE_TIERS.items()}


def _sampling_from_wire(
    message: pb.GenerateRequest, manifest: Manifest, max_tokens: int
) -> Sampling:
    """Every default resolved: the client's word, else the model's, else off."""
    wire, defaults = message.sampling, manifest.default_sampling

    def chosen(name: str, otherwise: float) -> float:
        return getattr(wire, name) if wire.HasField(name) else defaults.get(name, otherwise)

    seed = wire.seed % 2**SEED_BITS if wire.HasField("seed") else secrets.randbits(SEED_BITS)
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=message.min_tokens,
        temperature=chosen("temperature", 0.0),
        top_p=chosen("top_p", 1.0),
        top_k=int(chosen("top_k", 0)),
        min_p=chosen("min_p", 0.0),
        repetition_penalty=chosen("repetition_penalty", 1.0),
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        logit_bias=dict(wire.logit_bias),
        seed=seed,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        grammar=grammar_of(message),
    )


def grammar_of(message: pb.GenerateRequest) -> Grammar | None:
    match message.WhichOneof("format"):
        case "json_schema":
            return Grammar(GrammarKind.JSON_SCHEMA, message.json_schema)
        case "regex":
            return Grammar(GrammarKind.REGEX, message.regex)
        case "choice":
            text = json.dumps(list(message.choice.options), ensure_ascii=False)
            return Grammar(GrammarKind.CHOICE, text)
        case _:
            return None


class ChunkWriter:
    """Turns one request's chunks into messages, reusing one: it is serialised before the next.

    Measured with serialising: 1.2 us a chunk, against 1.8 us with a message made for each.
    """

    __slots__ = ("_message",)

    def __init__(self, request_id: str) -> None:
        self._message = pb.GenerateChunk(request_id=request_id)

    def chunk(self, chunk: Chunk) -> pb.GenerateChunk:
        """The message for `chunk`; valid until the next call."""
        message, delta, usage = self._message, chunk.delta, chunk.usage
        message.index = chunk.index
        message.text = delta.text
        message.token_ids[:] = delta.token_ids
        if delta.logprobs or message.logprobs:
            del message.logprobs[:]
            message.logprobs.extend(_logprob_to_wire(each) for each in delta.logprobs)
        message.finish_reason = _FINISH[delta.finish]
        wire = message.usage
        wire.prompt_tokens = usage.prompt_tokens
        wire.cached_tokens = usage.cached_tokens
        wire.completion_tokens = usage.completion_tokens
        wire.reasoning_tokens = usage.reasoning_tokens
        wire.cache_write_tokens = usage.cache_write_tokens
        return message

    def done(self, settled: Settled) -> pb.GenerateChunk:
        usage = usage_to_wire(settled.usage)
        return pb.GenerateChunk(
            request_id=self._message.request_id,
            usage=usage,
            done=pb.Done(
                usage=usage,
                charge=charge_to_wire(settled),
                model_version=settled.version,
                receipt=receipt_to_wire(settled.receipt),
            ),
        )


def response_to_wire(
    request_id: str, n: int, chunks: Sequence[Chunk], settled: Settled
) -> pb.GenerateResponse:
    """The whole answer as one message."""
    choices = [pb.Choice(index=index) for index in range(n)]
    texts: list[list[str]] = [[] for _ in range(n)]
    for chunk in chunks:
        choice, delta = choices[chunk.index], chunk.delta
        texts[chunk.index].append(delta.text)
        choice.token_ids.extend(delta.token_ids)
        choice.logprobs.extend(_logprob_to_wire(each) for each in delta.logprobs)
        if delta.finish is not None:
            choice.finish_reason = _FINISH[delta.finish]
    for choice, parts in zip(choices, texts, strict=True):
        choice.text = "".join(parts)
    return pb.GenerateResponse(
        request_id=request_id,
        choices=choices,
        usage=usage_to_wire(settled.usage),
        charge=charge_to_wire(settled),
        model_version=settled.version,
        receipt=receipt_to_wire(settled.receipt),
    )


def receipt_to_wire(receipt: Receipt | None) -> usage_pb2.Receipt | None:
    if receipt is None:
        return None
    return usage_pb2.Receipt(
        tier_asked=_WIRE_TIERS[receipt.tier_asked],
        tier_served=_WIRE_TIERS[receipt.tier_served],
        ttft_us=receipt.ttft_us or 0,
        itl_p50_us=receipt.itl_p50_us or 0,
        itl_p99_us=receipt.itl_p99_us or 0,
        verdict=receipt.verdict.value,
        missed=receipt.missed,
    )


def usage_to_wire(usage: Usage) -> usage_pb2.Usage:
    return usage_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        cache_write_tokens=usage.cache_write_tokens,
    )


def usage_from_wire(usage: usage_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        cache_write_tokens=usage.cache_write_tokens,
    )


def charge_to_wire(settled: Settled) -> usage_pb2.Charge:
    return usage_pb2.Charge(
        nano=settled.charge_nano,
        currency=settled.price.currency,
        price_version=settled.price.version,
    )


def model_to_wire(served: ServedModel, price: Price) -> pb.Model:
    newest = served.newest
    return pb.Model(
        name=served.name,
        version=newest.version,
        family=newest.family,
        precision=newest.precision,
        context_tokens=newest.context_tokens,
        replicas_ready=served.replicas_ready,
        price=pb.Price(
            currency=price.currency,
            prompt_nano_per_mtok=price.prompt_nano_per_mtok,
            cached_nano_per_mtok=price.cached_nano_per_mtok,
            completion_nano_per_mtok=price.completion_nano_per_mtok,
        ),
    )


_FINISH: Mapping[FinishReason | None, pb.FinishReason] = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.BUDGET: pb.FINISH_REASON_BUDGET,
}


def _logprob_to_wire(logprob: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=logprob.token_id,
        logprob=logprob.logprob,
        top=[pb.TopLogprob(token_id=token, logprob=value) for token, value in logprob.top],
    )
