"""Every rule that inference.proto states about a request, as refusals that name the field."""

import math
import re
from collections.abc import Iterable

from headrace.serving.errors import InvalidRequest, InvalidSchema, PromptTooLong
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import usage_pb2

ANSWER_TOKENS_DEFAULT = 512
CHOICES_MAX = 16
STOPS_MAX = 8
STOP_BYTES_MAX = 128
STOP_TOKENS_MAX = 128
LOGIT_BIASES_MAX = 1024
LOGPROBS_MAX = 20
SCHEMA_BYTES_MAX = 64 << 10
REGEX_BYTES_MAX = 8 << 10
OPTIONS_MAX = 256
OPTIONS_BYTES_MAX = 64 << 10
MODEL_CHARS_MAX = 128

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_BATCH_LINE = re.compile(r"batch_[0-9a-f]{32}\..*")


def valid_request_id(request_id: str) -> bool:
    return _REQUEST_ID.fullmatch(request_id) is not None


def is_of_batch(request_id: str) -> bool:
    """Whether it has the form that the lines of batches have; see `domain/batch.py`."""
    return _BATCH_LINE.fullmatch(request_id) is not None


def check_request(message: pb.GenerateRequest) -> None:
    """Refuse what no model could take; needs no tokenizer.

    Raises:
        InvalidRequest, InvalidSchema: a field is out of range.
    """
    if message.request_id and not valid_request_id(message.request_id):
        raise refused(
            "request_id",
            f"request_id has {len(message.request_id)} characters, or one that is not allowed.",
            why="It is 1 to 64 characters of [A-Za-z0-9_.:-], or empty.",
            fix="Send a UUID, or leave it empty and the server chooses one.",
        )
    check_model_name(message.model)
    if message.tier not in usage_pb2.Tier.values():
        raise refused(
            "tier",
            f"tier is {message.tier}.",
            why="It is one of the Tier values of usage.proto.",
            fix="Correct it, or leave it unset for the key's own tier.",
        )
    check_input(message)
    _check_range("n", message.n, 0, CHOICES_MAX)
    _check_range("min_tokens", message.min_tokens, 0, math.inf)
    if message.HasField("max_tokens"):
        _check_range("max_tokens", message.max_tokens, 1, math.inf)
    if message.HasField("logprobs"):
        _check_range("logprobs", message.logprobs, 0, LOGPROBS_MAX)
    _check_stops(message)
    _check_sampling(message.sampling)
    _check_format(message)


def check_model_name(name: str) -> None:
    if not 1 <= len(name) <= MODEL_CHARS_MAX:
        raise refused(
            "model",
            f"model has {len(name)} characters.",
            why=f"A model's name has 1 to {MODEL_CHARS_MAX}.",
            fix="Use a name that ListModels returns.",
        )


def check_input(message: pb.GenerateRequest | pb.CountTokensRequest) -> None:
    """One of prompt, chat and tokens is there and is not empty."""
    kind = message.WhichOneof("input")
    if kind is None:
        raise refused(
            "prompt",
            "The request has no prompt.",
            why="The model continues a prompt; there is nothing to continue.",
            fix="Set one of `prompt`, `chat` and `tokens`.",
        )
    is_empty = (
        (kind == "prompt" and not message.prompt)
        or (kind == "chat" and not message.chat.messages)
        or (kind == "tokens" and isinstance(message, pb.GenerateRequest) and not message.tokens.ids)
    )
    if is_empty:
        raise refused(
            kind,
            f"`{kind}` is empty.",
            why="The model continues a prompt; there is nothing to continue.",
            fix="Send at least one character, message or token.",
        )


def check_token_ids(field: str, ids: Iterable[int], vocab: int) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocab:
            raise refused(
                field,
                f"{field} has the token id {token_id}.",
                why=f"This model's ids are 0 to {vocab - 1:,}.",
                fix="Use ids of this model's own tokenizer.",
            )


def check_prompt_tokens(ids_found: int) -> None:
    if not ids_found:
        raise refused(
            "prompt",
            "The prompt has no tokens.",
            why="The model continues a prompt; there is nothing to continue.",
            fix="Send text that is not empty.",
        )


def answer_tokens(message: pb.GenerateRequest, *, prompt_tokens: int, context_tokens: int) -> int:
    """Most tokens of one answer, with the default resolved.

    Raises:
        PromptTooLong: prompt and answer do not fit the context together.
        InvalidRequest: min_tokens is over it.
    """
    left = context_tokens - prompt_tokens
    asked = message.max_tokens if message.HasField("max_tokens") else None
    if left < (asked or 1):
        raise PromptTooLong(
            f"The prompt has {prompt_tokens:,} tokens"
            + (f" and max_tokens is {asked:,}." if asked else "."),
            why=f"The model's context holds {context_tokens:,} tokens, prompt and answer together.",
            fix="Shorten the prompt" + (", or lower max_tokens." if asked else "."),
            field="max_tokens" if asked and left > 0 else message.WhichOneof("input"),
        )
    max_tokens = asked or min(left, ANSWER_TOKENS_DEFAULT)
    if message.min_tokens > max_tokens:
        raise refused(
            "min_tokens",
            f"min_tokens is {message.min_tokens:,} and max_tokens {max_tokens:,}.",
            why="An answer cannot be both that long and that short.",
            fix="Lower min_tokens, or raise max_tokens.",
        )
    return max_tokens


def _check_stops(message: pb.GenerateRequest) -> None:
    _check_count("stop", len(message.stop), STOPS_MAX)
    for stop in message.stop:
        size = len(stop.encode())
        if not 1 <= size <= STOP_BYTES_MAX:
            raise refused(
                "stop",
                f"A stop string has {size} bytes.",
                why=f"Each has 1 to {STOP_BYTES_MAX}: that much text may have to be held back.",
                fix="Shorten it, or leave it out.",
            )
    _check_count("stop_token_ids", len(message.stop_token_ids), STOP_TOKENS_MAX)


def _check_sampling(sampling: pb.Sampling) -> None:
    ranges = (
        ("temperature", 0.0, 2.0, False, False),
        ("top_p", 0.0, 1.0, True, False),
        ("top_k", 0, math.inf, False, False),
        ("min_p", 0.0, 1.0, False, True),
        ("repetition_penalty", 0.0, 2.0, True, False),
        ("presence_penalty", -2.0, 2.0, False, False),
        ("frequency_penalty", -2.0, 2.0, False, False),
    )
    for name, low, high, above_low, below_high in ranges:
        if sampling.HasField(name):
            value = getattr(sampling, name)
            is_outside = (above_low and value == low) or (below_high and value == high)
            if is_outside or not low <= value <= high:
                opening, closing = "(" if above_low else "[", ")" if below_high else "]"
                raise refused(
                    f"sampling.{name}",
                    f"sampling.{name} is {value:g}.",
                    why=f"It lies in {opening}{low:g}, {high:g}{closing}.",
                    fix="Correct it, or leave it unset for the model's default.",
                )
    _check_count("sampling.logit_bias", len(sampling.logit_bias), LOGIT_BIASES_MAX)
    for bias in sampling.logit_bias.values():
        # Written so that a NaN, which no comparison is true of, is refused too.
        if not -100 <= bias <= 100:
            raise refused(
                "sampling.logit_bias",
                f"A logit bias is {bias:g}.",
                why="Each lies in [-100, 100]: beyond it a token is certain or impossible anyway.",
                fix="Correct it, or leave it out.",
            )


def _check_format(message: pb.GenerateRequest) -> None:
    match message.WhichOneof("format"):
        case "json_schema":
            _check_grammar("json_schema", message.json_schema, SCHEMA_BYTES_MAX)
        case "regex":
            _check_grammar("regex", message.regex, REGEX_BYTES_MAX)
        case "choice":
            options = message.choice.options
            if not 1 <= len(options) <= OPTIONS_MAX or not all(options):
                raise _bad_grammar(
                    "choice",
                    f"There are {len(options)} options, or one is empty.",
                    why=f"The answer is one of 1 to {OPTIONS_MAX} options with text in them.",
                )
            _check_grammar("choice", "".join(options), OPTIONS_BYTES_MAX)


def _check_grammar(field: str, text: str, bytes_max: int) -> None:
    size = len(text.encode())
    if not 1 <= size <= bytes_max:
        raise _bad_grammar(
            field, f"`{field}` has {size:,} bytes.", why=f"It has 1 to {bytes_max:,}."
        )


def _bad_grammar(field: str, what: str, *, why: str) -> InvalidSchema:
    return InvalidSchema(what, why=why, fix="Correct it, or leave the constraint out.", field=field)


def _check_range(field: str, value: int, low: int, high: float) -> None:
    if not low <= value <= high:
        upper = "" if high == math.inf else f" and at most {high:g}"
        raise refused(
            field,
            f"{field} is {value}.",
            why=f"It is at least {low}{upper}.",
            fix="Correct it, or leave it unset.",
        )


def _check_count(field: str, count: int, count_max: int) -> None:
    if count > count_max:
        raise refused(
            field,
            f"{field} has {count:,} entries.",
            why=f"It has at most {count_max:,}.",
            fix="Send fewer.",
        )


def refused(field: str, what: str, *, why: str, fix: str) -> InvalidRequest:
    return InvalidRequest(what, why=why, fix=fix, field=field)
