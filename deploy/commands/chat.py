"""`headrace chat`: ask a served model, once or in a conversation, and see what it cost."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from headrace.deploy.client import Client
from headrace.deploy.connection import add_connection, address_and_key, certificates
from headrace.serving.errors import InvalidRequest, ServingError
from headrace.v1 import inference_pb2

GRAMMAR_BYTES_MAX = 64 << 10
"""The server's bound for a schema; a larger file is refused before it is read."""
HISTORY_MESSAGES_MAX = 64
"""Of a conversation; the oldest ones after the system message are forgotten."""

_ENDINGS = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_BUDGET: "budget",
}
_CUT = {"length": " · cut at the longest answer", "budget": " · cut where the budget ends"}
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""What a model says is text, never a command to the terminal."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk to a served model",
        description="Ask one question, or talk: without TEXT a conversation starts. "
        "The answer goes to standard output, speed and charge to standard error.",
    )
    parser.add_argument("text", nargs="?", help="the question; without it a conversation starts")
    parser.add_argument("--model", help="which served model (default: the only one)")
    parser.add_argument("--system", help="instructions that stand before the conversation")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, help="0 always takes the likeliest token")
    sampling.add_argument("--top-p", type=float)
    sampling.add_argument("--seed", type=int, help="same seed, same answer")
    sampling.add_argument("--max-tokens", type=int, help="longest answer (default: 512)")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before it; repeatable"
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json-schema", metavar="FILE|JSON", help="the answer follows this schema")
    shape.add_argument("--regex", help="the whole answer matches this expression")
    shape.add_argument(
        "--choice", action="append", metavar="TEXT", help="the answer is one of these; repeatable"
    )
    add_connection(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.json and args.text is None:
        raise InvalidRequest(
            "--json was given without a question.",
            why="One object is printed for one answer.",
            fix='Add the question: headrace chat --json "…"',
        )
    with Client(*address_and_key(args), root_certificates=certificates(args)) as client:
        asked = _request(args, args.model or client.only_model())
        if args.text is None:
            return _converse(client, asked)
        asked.chat.messages.add(role="user", content=args.text)
        if args.json:
            answer = Answer()
            for _ in answer.follow(client, asked):
                pass  # Collected, printed once it is whole.
            print(json.dumps(answer.to_json(), ensure_ascii=False))
        else:
            _show(client, asked)
    return 0


@dataclass(slots=True, eq=False)
class Answer:
    """One answer as it arrives, and its measures as this client sees them."""

    request_id: str = ""
    text: str = ""
    finish_reason: str = ""
    ttft_ms: float = 0.0
    seconds_after_first: float = 0.0
    done: inference_pb2.Done = field(default_factory=inference_pb2.Done)

    def follow(self, client: Client, request: inference_pb2.GenerateRequest) -> Iterator[str]:
        """Run the request; yields text as it comes."""
        started = time.monotonic()
        first: float | None = None
        with client.generate(request) as chunks:
            for chunk in chunks:
                if chunk.token_ids and first is None:
                    first = time.monotonic()
                    self.ttft_ms = (first - started) * 1000
                if chunk.token_ids and first is not None:
                    self.seconds_after_first = time.monotonic() - first
                self.request_id = chunk.request_id or self.request_id
                self.finish_reason = _ENDINGS.get(chunk.finish_reason, self.finish_reason)
                if chunk.HasField("done"):
                    self.done.CopyFrom(chunk.done)
                if chunk.text:
                    self.text += chunk.text
                    yield chunk.text

    @property
    def tokens_per_s(self) -> float:
        """Tokens after the first over the time after the first; 0 when there is but one."""
        later = self.done.usage.completion_tokens - 1
        return later / self.seconds_after_first if self.seconds_after_first > 0 < later else 0.0

    def to_json(self) -> dict[str, object]:
        usage = self.done.usage
        return {
            "request_id": self.request_id,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "ttft_ms": round(self.ttft_ms, 2),
            "tokens_per_s": round(self.tokens_per_s, 2),
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "completion_tokens": usage.completion_tokens,
                "reasoning_tokens": usage.reasoning_tokens,
            },
            "charge_nano": self.done.charge.nano,
        }

    def summary(self) -> str:
        """One line for people."""
        usage, charge = self.done.usage, self.done.charge
        cached = f" ({usage.cached_tokens:,} cached)" if usage.cached_tokens else ""
        cut = _CUT.get(self.finish_reason, "")
        return (
            f"{self.tokens_per_s:.1f} tokens/s · first after {self.ttft_ms:.0f} ms · "
            f"{usage.prompt_tokens:,} in{cached}, {usage.completion_tokens:,} out · "
            f"{charge.nano / 1e9:.9f} {charge.currency}{cut} · {self.request_id}"
        )


def _show(client: Client, request: inference_pb2.GenerateRequest) -> Answer:
    """Stream the answer to the terminal."""
    answer = Answer()
    out, note = Console(highlight=False, soft_wrap=True), _notes()
    try:
        for text in answer.follow(client, request):
            out.print(text.translate(_CONTROL), style="cyan", end="", markup=False)
    finally:
        out.print()
    note.print(answer.summary(), style="dim", markup=False)
    return answer


def _notes() -> Console:
    """Standard error: what is said about an answer must not end up in it."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def _converse(client: Client, asked: inference_pb2.GenerateRequest) -> int:
    """Question and answer until end of input. Ctrl-C cancels an answer, not the conversation."""
    note = _notes()
    note.print(
        f"{asked.model} at {client.address}. /clear forgets, Ctrl-D ends.",
        style="dim",
        markup=False,
    )
    num_fixed = len(asked.chat.messages)
    while (question := _read_line()) is not None:
        if question == "/clear":
            del asked.chat.messages[num_fixed:]
        elif question:
            _turn(client, asked, question, num_fixed, note)
    return 0


def _turn(
    client: Client,
    asked: inference_pb2.GenerateRequest,
    question: str,
    num_fixed: int,
    note: Console,
) -> None:
    messages = asked.chat.messages
    messages.add(role="user", content=question)
    try:
        answer = _show(client, asked)
    except KeyboardInterrupt:
        note.print("cancelled; what had arrived is charged", style="dim", markup=False)
        messages.pop()
    except ServingError as refusal:
        note.print(f"{refusal.what} {refusal.fix}", style="red", markup=False)
        messages.pop()
    else:
        messages.add(role="assistant", content=answer.text)
        while len(messages) - num_fixed > HISTORY_MESSAGES_MAX:
            del messages[num_fixed : num_fixed + 2]


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _request(args: argparse.Namespace, model: str) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(model=model, stop=args.stop)
    if args.system:
        request.chat.messages.add(role="system", content=args.system)
    for name in ("temperature", "top_p", "seed"):
        if (value := getattr(args, name)) is not None:
            setattr(request.sampling, name, value)
    if args.max_tokens is not None:
        request.max_tokens = args.max_tokens
    if args.json_schema is not None:
        request.json_schema = _schema(args.json_schema)
    elif args.regex is not None:
        request.regex = args.regex
    elif args.choice:
        request.choice.options.extend(args.choice)
    return request


def _schema(argument: str) -> str:
    """A schema given in place starts with a brace; anything else names a file."""
    if argument.lstrip().startswith("{"):
        return argument
    try:
        path = Path(argument)
        if path.stat().st_size > GRAMMAR_BYTES_MAX:
            raise InvalidRequest(
                f"{argument} is longer than {GRAMMAR_BYTES_MAX // 1024} KiB.",
                why="That is the longest schema the server takes.",
                fix="Shorten it.",
                field="json_schema",
            )
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"The schema {argument} cannot be read: {error}.",
            why="--json-schema takes a file, or JSON text that starts with a brace.",
            fix="Check the path.",
            field="json_schema",
        ) from error
