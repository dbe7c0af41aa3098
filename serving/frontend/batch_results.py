"""A line's one result as a JSON line; see batch.proto for what it holds."""

import json
from collections.abc import Mapping

from headrace.serving.domain.batch import LineResult, LineStatus
from headrace.serving.domain.generate import Settled
from headrace.serving.errors import ServingError
from headrace.v1 import inference_pb2 as pb

_FINISH: Mapping[int, str] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_BUDGET: "budget",
}


def succeeded(
    line: int, custom_id: str, response: pb.GenerateResponse, settled: Settled
) -> LineResult:
    usage = response.usage
    body = {
        "model_version": response.model_version,
        "choices": [_choice(choice) for choice in response.choices],
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "reasoning_tokens": usage.reasoning_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
        },
        "charge_nano": settled.charge_nano,
        "currency": settled.price.currency,
    }
    return LineResult(
        line=line,
        status=LineStatus.SUCCEEDED,
        text=_line(line, custom_id, response.request_id, LineStatus.SUCCEEDED, response=body),
        usage=settled.usage,
        charge_nano=settled.charge_nano,
        currency=settled.price.currency,
    )


def ended(
    line: int,
    custom_id: str,
    *,
    request_id: str,
    status: LineStatus,
    error: ServingError | None = None,
) -> LineResult:
    """The result of a line that has no answer, and why where its status does not say it."""
    told: dict[str, Mapping[str, object]] = {}
    if error is not None:
        told["error"] = {
            "reason": error.reason,
            "what": error.what,
            "why": error.why,
            "fix": error.fix,
        }
    text = _line(line, custom_id, request_id, status, **told)
    return LineResult(line=line, status=status, text=text)


def _line(
    line: int, custom_id: str, request_id: str, status: LineStatus, **more: Mapping[str, object]
) -> bytes:
    head: dict[str, object] = {
        "line": line,
        "custom_id": custom_id,
        "request_id": request_id,
        "status": status.value,
    }
    return json.dumps(head | more, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _choice(choice: pb.Choice) -> dict[str, object]:
    found: dict[str, object] = {
        "index": choice.index,
        "text": choice.text,
        "finish_reason": _FINISH.get(choice.finish_reason, ""),
    }
    if choice.logprobs:
        found["logprobs"] = [
            {
                "token_id": each.token_id,
                "logprob": each.logprob,
                "top": [[top.token_id, top.logprob] for top in each.top],
            }
            for each in choice.logprobs
        ]
    return found
