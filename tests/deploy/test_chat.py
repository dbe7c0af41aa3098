"""What a person and a script see of an answer, and of a refusal."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from headrace.deploy.cli import main
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import inference_pb2_grpc
from headrace.v1.usage_pb2 import Charge, Usage


class ScriptedServer(inference_pb2_grpc.InferenceServicer):
    """Answers every question with the same chunks; remembers what it was asked."""

    def __init__(self) -> None:
        self.models = ["tiny"]
        self.asked: list[pb.GenerateRequest] = []
        self.keys: list[object] = []
        self.texts = ["Hel", "lo"]
        self.refusal: Status | None = None
        self.ending = pb.FINISH_REASON_STOP

    def ListModels(self, request: object, context: grpc.ServicerContext) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[pb.Model(name=name) for name in self.models])

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateChunk]:
        self.asked.append(request)
        self.keys.append(dict(context.invocation_metadata())["authorization"])
        if self.refusal is not None:
            context.set_trailing_metadata(
                (("grpc-status-details-bin", self.refusal.SerializeToString()),)
            )
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, self.refusal.message)
        for text in self.texts:
            yield pb.GenerateChunk(request_id="r1", text=text, token_ids=[1])
        usage = Usage(prompt_tokens=9, cached_tokens=4, completion_tokens=2)
        yield pb.GenerateChunk(
            request_id="r1",
            finish_reason=self.ending,
            done=pb.Done(usage=usage, charge=Charge(nano=670, currency="USD")),
        )


@contextmanager
def serving(server: ScriptedServer) -> Iterator[str]:
    with ThreadPoolExecutor(2) as pool:
        grpc_server = grpc.server(pool)
        inference_pb2_grpc.add_InferenceServicer_to_server(server, grpc_server)
        port = grpc_server.add_insecure_port("127.0.0.1:0")
        grpc_server.start()
        yield f"127.0.0.1:{port}"
        grpc_server.stop(None).wait()


@pytest.fixture
def server() -> ScriptedServer:
    return ScriptedServer()


@pytest.fixture
def chat(server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs `headrace chat` against the server, with a home of its own."""
    monkeypatch.delenv("HEADRACE_API_KEY", raising=False)
    with serving(server) as address:
        yield lambda *words: main(["chat", "--address", address, "--home", str(tmp_path), *words])


def test_a_script_gets_one_object_with_everything(chat, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat("--json", "hi") == 0
    answer = json.loads(capsys.readouterr().out)

    assert answer.pop("ttft_ms") > 0
    assert answer.pop("tokens_per_s") > 0
    assert answer == {
        "request_id": "r1",
        "text": "Hello",
        "finish_reason": "stop",
        "usage": {
            "prompt_tokens": 9,
            "cached_tokens": 4,
            "completion_tokens": 2,
            "reasoning_tokens": 0,
        },
        "charge_nano": 670,
    }


def test_a_person_sees_the_answer_and_what_it_cost(
    chat, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answer alone is on standard output, so that it can be piped."""
    assert chat("hi") == 0
    shown = capsys.readouterr()

    assert shown.out == "Hello\n"
    assert "tokens/s" in shown.err
    assert "9 in (4 cached), 2 out · 0.000000670 USD · r1" in shown.err


@pytest.mark.parametrize(
    ("ending", "cut"), [("length", "at the longest answer"), ("budget", "where the budget ends")]
)
def test_an_answer_that_was_cut_says_why(
    chat, server: ScriptedServer, capsys: pytest.CaptureFixture[str], ending: str, cut: str
) -> None:
    server.ending = pb.FinishReason.Value(f"FINISH_REASON_{ending.upper()}")
    assert chat("hi") == 0
    assert f" · cut {cut}" in capsys.readouterr().err
    assert chat("--json", "hi") == 0
    assert json.loads(capsys.readouterr().out)["finish_reason"] == ending


def test_every_option_reaches_the_server(chat, server: ScriptedServer) -> None:
    chat(
        *("--system", "Be brief.", "--temperature", "0.5", "--top-p", "0.9", "--seed", "7"),
        *("--max-tokens", "12", "--stop", "END", "--stop", "STOP", "--regex", "[a-z]+", "hi"),
    )
    asked = server.asked[0]

    assert [(m.role, m.content) for m in asked.chat.messages] == [
        ("system", "Be brief."),
        ("user", "hi"),
    ]
    assert asked.model == "tiny"
    assert (asked.sampling.temperature, asked.sampling.seed) == (0.5, 7)
    assert asked.sampling.top_p == pytest.approx(0.9)
    assert (asked.max_tokens, list(asked.stop), asked.regex) == (12, ["END", "STOP"], "[a-z]+")


def test_options_that_were_not_given_are_left_to_the_server(chat, server: ScriptedServer) -> None:
    chat("hi")
    asked = server.asked[0]

    assert not asked.sampling.HasField("temperature")
    assert not asked.sampling.HasField("seed")
    assert not asked.HasField("max_tokens")
    assert asked.WhichOneof("format") is None


def test_a_schema_is_taken_from_a_file_or_in_place(
    chat, server: ScriptedServer, tmp_path: Path
) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object"}')
    chat("--json-schema", str(path), "hi")
    chat("--json-schema", '{"type": "array"}', "hi")

    assert [asked.json_schema for asked in server.asked] == [
        '{"type": "object"}',
        '{"type": "array"}',
    ]


def test_a_schema_that_is_not_there_is_refused_before_the_call(
    chat, server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat("--json-schema", "nowhere.json", "hi") == 3
    assert "nowhere.json cannot be read" in capsys.readouterr().err
    assert server.asked == []


def test_the_key_is_the_given_one_else_the_environments_else_the_demo_key(
    chat, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat("hi")
    monkeypatch.setenv("HEADRACE_API_KEY", "hr_env")
    chat("hi")
    chat("--key", "hr_flag", "hi")

    assert str(server.keys[0]).startswith("Bearer hr_demo0001_")
    assert server.keys[1:] == ["Bearer hr_env", "Bearer hr_flag"]


def test_a_refusal_is_told_in_the_servers_own_words(
    chat, server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    info = ErrorInfo(reason="INVALID_SCHEMA", domain="headrace")
    info.metadata.update({"why": "It has no type.", "fix": "Add one."})
    packed = Any()
    packed.Pack(info)
    server.refusal = Status(code=3, message="The schema cannot be compiled.", details=[packed])

    assert chat("hi") == 3
    assert capsys.readouterr().err == (
        "headrace: The schema cannot be compiled.\n  why: It has no type.\n  fix: Add one.\n"
    )


def test_a_server_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["chat", "--address", "127.0.0.1:1", "--home", str(tmp_path), "hi"]

    assert main(words) == 3
    shown = capsys.readouterr().err
    assert "The call to 127.0.0.1:1 ended with UNAVAILABLE." in shown
    assert "Is `headrace serve` running there?" in shown


def test_several_models_ask_for_a_choice(
    chat, server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.models = ["large", "small"]

    assert chat("hi") == 3
    assert "serves 2 models: large, small" in capsys.readouterr().err
    assert chat("--model", "small", "hi") == 0


def test_an_answer_cannot_command_the_terminal(
    chat, server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model repeats what it was fed; an escape sequence could rewrite the screen."""
    server.texts = ["a\x1b[2Jb\x07\n", "[bold]c\x9bd"]
    chat("hi")

    assert capsys.readouterr().out == "a[2Jb\n[bold]cd\n"


def test_a_conversation_remembers_until_it_is_told_to_forget(
    chat, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["one", "", "two", "/clear", "three"])

    def next_line(_: str = "") -> str:
        try:
            return next(lines)
        except StopIteration as error:
            raise EOFError from error

    monkeypatch.setattr("builtins.input", next_line)

    assert chat() == 0
    assert [[m.content for m in asked.chat.messages] for asked in server.asked] == [
        ["one"],
        ["one", "Hello", "two"],
        ["three"],
    ]


def test_one_object_needs_one_question(chat, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat("--json") == 3
    assert "--json was given without a question" in capsys.readouterr().err
