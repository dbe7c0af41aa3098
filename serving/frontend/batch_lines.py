"""A line of a batch file to the request it stands for, strictly: what is not known is refused.

Two spellings: the fields of GenerateRequest and Sampling under their own names, and the lines of
OpenAI's batch files. Whatever bytes a line holds, it becomes a request or a refusal that names it.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from headrace.serving.domain.batch import CUSTOM_ID_CHARS_MAX, LINE_BYTES_MAX
from headrace.serving.errors import InvalidRequest, ServingError
from headrace.serving.frontend import rules
from headrace.v1 import batch_pb2
from headrace.v1 import inference_pb2 as pb
from headrace.v1.usage_pb2 import TIER_BATCH, TIER_UNSPECIFIED

_CUSTOM_ID = re.compile(rf"[ -~]{{1,{CUSTOM_ID_CHARS_MAX}}}")
_INPUT_OF = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
_ONE_OF = (
    ("messages", "prompt", "tokens"),
    ("json_schema", "regex", "choice"),
    ("max_tokens", "max_completion_tokens"),
)
"""Of each, a line has at most one: the others would be ignored."""
_FIX = "Correct the line; batch.proto lists the fields of both spellings."

Set = Callable[[pb.GenerateRequest, str, Any], None]


def parse_line(raw: bytes, *, number: int, model: str) -> batch_pb2.BatchLine:
    """The request of one line, checked as far as that needs no tokenizer.

    Args:
        raw: without its newline.
        number: of the line, from 1.
        model: for a line that names none.

    Raises:
        InvalidRequest: it cannot be run; `field` names the line.
    """
    try:
        line = _line(_json(raw), model)
        check_line(line)
    except ServingError as refusal:
        raise at_line(refusal, number=number) from refusal
    return line


def check_line(line: batch_pb2.BatchLine) -> None:
    """What holds for a line however it came.

    Raises:
        InvalidRequest: it cannot be run.
    """
    _check_custom_id(line.custom_id)
    if line.request.request_id:
        _refuse("request_id", "The line has a request_id.", "The batch gives each line its own.")
    if line.request.tier not in (TIER_UNSPECIFIED, TIER_BATCH):
        _refuse("tier", "The line asks for a tier of its own.", "The batch's tier is that of all.")
    if line.ByteSize() > LINE_BYTES_MAX:
        _refuse("line", f"It has {line.ByteSize():,} bytes.", f"It has at most {LINE_BYTES_MAX:,}.")
    rules.check_request(line.request)


def at_line(refusal: ServingError, *, number: int) -> InvalidRequest:
    """The refusal of a line as that of the file it stands in."""
    field = f"line {number}" + (f": {refusal.field}" if refusal.field else "")
    return InvalidRequest(
        f"Line {number}: {refusal.what}", why=refusal.why, fix=refusal.fix, field=field
    )


def _line(given: Mapping[str, Any], model: str) -> batch_pb2.BatchLine:
    custom_id = _text("custom_id", given.get("custom_id", ""))
    _check_custom_id(custom_id)
    line = batch_pb2.BatchLine(custom_id=custom_id)
    given = {name: value for name, value in given.items() if name != "custom_id"}
    request = line.request
    if "body" in given:
        body = _openai_body(given)
        _fill(request, body, _OPENAI)
        _openai_logprobs(request, body)
    else:
        _fill(request, given, _OURS)
    request.model = request.model or model
    return line


def _check_custom_id(custom_id: str) -> None:
    if not _CUSTOM_ID.fullmatch(custom_id):
        _refuse(
            "custom_id",
            f"custom_id has {len(custom_id)} characters, or one that is not allowed.",
            f"It is 1 to {CUSTOM_ID_CHARS_MAX} printable ASCII characters.",
        )


def _fill(request: pb.GenerateRequest, given: Mapping[str, Any], known: Mapping[str, Set]) -> None:
    for rivals in _ONE_OF:
        there = [name for name in rivals if name in given]
        if len(there) > 1:
            _refuse(there[1], f"The line has {' and '.join(there)}.", "It has at most one of them.")
    for name, value in given.items():
        setter = known.get(name)
        if setter is None:
            _refuse_field(name)
        try:
            setter(request, name, value)
        except (ValueError, TypeError, OverflowError):
            # Of protobuf: a number out of its field's range, or text that is not Unicode.
            _refuse(name, f"{name} has a value out of range.", "Its type cannot hold that.")


def _json(raw: bytes) -> Mapping[str, Any]:
    if len(raw) > LINE_BYTES_MAX:
        _refuse("line", f"It has {len(raw):,} bytes.", f"A line has at most {LINE_BYTES_MAX:,}.")
    try:
        found = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        why = error.args[0] if isinstance(error, _Twice) else "Each line is one JSON object."
        _refuse("line", "It is not JSON that can be read.", str(why))
    if not isinstance(found, dict):
        _refuse("line", "It is JSON, but no object.", "Each line is one JSON object.")
    return found


class _Twice(ValueError):
    pass


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys stand once; the standard takes the last one silently."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Twice("A key stands twice in one object.")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(text)  # NaN and Infinity are not JSON.


def _openai_body(given: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in given:
        if name not in ("method", "url", "body"):
            _refuse_field(name)
    url, body = given.get("url"), given["body"]
    if given.get("method", "POST") != "POST" or url not in _INPUT_OF:
        _refuse("url", "The line is for another endpoint.", f"Here are {', '.join(_INPUT_OF)}.")
    if not isinstance(body, dict) or _INPUT_OF[url] not in body:
        _refuse("body", f"body has no {_INPUT_OF[url]}.", f"The endpoint {url} takes them.")
    return body


def _openai_logprobs(request: pb.GenerateRequest, body: Mapping[str, Any]) -> None:
    """`logprobs` says whether, `top_logprobs` how many; for completions the first says both."""
    wanted, top = body.get("logprobs"), body.get("top_logprobs")
    if isinstance(wanted, bool) or wanted is None:
        if top is not None and not wanted:
            _refuse("top_logprobs", "top_logprobs is set.", "It needs logprobs to be true.")
        if wanted:
            request.logprobs = _whole("top_logprobs", 0 if top is None else top)
    else:
        request.logprobs = _whole("logprobs", wanted)


def _set(check: Callable[[str, Any], Any], field: str = "") -> Set:
    """Checks a value's type and sets the field of that name."""

    def set_(request: pb.GenerateRequest, name: str, value: Any) -> None:
        setattr(request, field or name, check(name, value))

    return set_


def _sample(check: Callable[[str, Any], Any]) -> Set:
    def set_(request: pb.GenerateRequest, name: str, value: Any) -> None:
        setattr(request.sampling, name, check(name, value))

    return set_


def _messages(request: pb.GenerateRequest, name: str, value: Any) -> None:
    request.chat.SetInParent()
    for each in _list(name, value):
        if not isinstance(each, dict) or set(each) != {"role", "content"}:
            _refuse(name, "A message is not a role and a content.", "It has these two fields.")
        content = each["content"]
        if isinstance(content, list):
            content = "".join(_part(part) for part in content)
        request.chat.messages.add(role=_text("role", each["role"]), content=_text(name, content))


def _part(part: Any) -> str:
    if not isinstance(part, dict) or set(part) != {"type", "text"} or part["type"] != "text":
        _refuse("messages", "A part of a message is no text.", "Only text is understood here.")
    return _text("messages", part["text"])


def _tokens(request: pb.GenerateRequest, name: str, value: Any) -> None:
    request.tokens.ids.extend(_whole(name, each) for each in _list(name, value))


def _stop(request: pb.GenerateRequest, name: str, value: Any) -> None:
    each = [value] if isinstance(value, str) else _list(name, value)
    request.stop.extend(_text(name, text) for text in each)


def _stop_ids(request: pb.GenerateRequest, name: str, value: Any) -> None:
    request.stop_token_ids.extend(_whole(name, each) for each in _list(name, value))


def _bias(request: pb.GenerateRequest, name: str, value: Any) -> None:
    if not isinstance(value, dict):
        _refuse(name, f"{name} is no object.", "It maps token ids to numbers.")
    for token, bias in value.items():
        if not re.fullmatch(r"[0-9]{1,9}", token):
            _refuse(name, f"{name} has a key that is no token id.", "It maps ids to numbers.")
        request.sampling.logit_bias[int(token)] = _number(name, bias)


def _schema(request: pb.GenerateRequest, name: str, value: Any) -> None:
    """A schema as an object, or as the text that GenerateRequest takes."""
    if isinstance(value, dict):
        request.json_schema = json.dumps(value, ensure_ascii=False)
    else:
        request.json_schema = _text(name, value)


def _choice(request: pb.GenerateRequest, name: str, value: Any) -> None:
    request.choice.options.extend(_text(name, each) for each in _list(name, value))


def _response_format(request: pb.GenerateRequest, name: str, value: Any) -> None:
    kind = value.get("type") if isinstance(value, dict) else None
    match kind:
        case "text":
            pass
        case "json_object":
            request.json_schema = '{"type": "object"}'
        case "json_schema" if isinstance(value.get("json_schema"), dict):
            _schema(request, name, value["json_schema"].get("schema"))
        case _:
            _refuse(name, f"{name} is of no known type.", "It is text, json_object or json_schema.")


def _no_stream(request: pb.GenerateRequest, name: str, value: Any) -> None:
    if value is not False:
        _refuse(name, f"{name} is set.", "A batch has no streams: results come as a file.")


def _checked_by_other(request: pb.GenerateRequest, name: str, value: Any) -> None:
    """See `_openai_logprobs`."""


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        _refuse(name, f"{name} is no text.", "It is a text in quotes.")
    return value


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        _refuse(name, f"{name} is no whole number.", "It is a whole number.")
    return value


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        _refuse(name, f"{name} is no number.", "It is a number.")
    return float(value)


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        _refuse(name, f"{name} is neither true nor false.", "It is one of the two.")
    return value


def _list(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list):
        _refuse(name, f"{name} is no list.", "It is a list.")
    return value


def _refuse_field(name: str) -> NoReturn:
    shown = ascii(name[:64])  # Whatever it holds, it travels in a status.
    _refuse("line", f"The field {shown} is not known.", "A field that is not known is not ignored.")


def _refuse(field: str, what: str, why: str) -> NoReturn:
    raise InvalidRequest(what, why=why, fix=_FIX, field=field)


_BOTH: Mapping[str, Set] = {
    "model": _set(_text),
    "messages": _messages,
    "prompt": _set(_text),
    "max_tokens": _set(_whole),
    "n": _set(_whole),
    "stop": _stop,
    "temperature": _sample(_number),
    "top_p": _sample(_number),
    "presence_penalty": _sample(_number),
    "frequency_penalty": _sample(_number),
    "logit_bias": _bias,
    "seed": _sample(_whole),
}
_OURS: Mapping[str, Set] = {
    **_BOTH,
    "tokens": _tokens,
    "min_tokens": _set(_whole),
    "stop_token_ids": _stop_ids,
    "ignore_eos": _set(_truth),
    "logprobs": _set(_whole),
    "top_k": _sample(_whole),
    "min_p": _sample(_number),
    "repetition_penalty": _sample(_number),
    "json_schema": _schema,
    "regex": _set(_text),
    "choice": _choice,
}
_OPENAI: Mapping[str, Set] = {
    **_BOTH,
    "max_completion_tokens": _set(_whole, "max_tokens"),
    "logprobs": _checked_by_other,
    "top_logprobs": _checked_by_other,
    "response_format": _response_format,
    "stream": _no_stream,
}
