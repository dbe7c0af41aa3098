"""Whatever bytes a line holds, it becomes a request or a refusal that names it."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.serving.errors import InvalidRequest
from headrace.serving.frontend.batch_lines import parse_line
from headrace.serving.frontend.idle_capacity import idle_rows
from headrace.serving.router.endpoint import Endpoint, ReplicaFacts, ReplicaLoad
from headrace.v1 import batch_pb2
from headrace.v1 import inference_pb2 as pb


def parsed(line: object) -> batch_pb2.BatchLine:
    return parse_line(json.dumps(line).encode(), number=3, model="m")


def test_every_field_of_ours_arrives() -> None:
    line = parsed(
        {
            "custom_id": "a",
            "model": "other",
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 7,
            "min_tokens": 1,
            "n": 2,
            "stop": "END",
            "stop_token_ids": [4],
            "ignore_eos": True,
            "logprobs": 3,
            "temperature": 0.5,
            "top_p": 1,
            "top_k": 5,
            "min_p": 0.25,
            "repetition_penalty": 1.5,
            "presence_penalty": -1,
            "frequency_penalty": 0.5,
            "logit_bias": {"7": -100},
            "seed": -3,
            "json_schema": {"type": "object"},
        }
    )

    assert line.request == pb.GenerateRequest(
        model="other",
        chat=pb.Chat(messages=[pb.Message(role="user", content="Hi")]),
        max_tokens=7,
        min_tokens=1,
        n=2,
        stop=["END"],
        stop_token_ids=[4],
        ignore_eos=True,
        logprobs=3,
        sampling=pb.Sampling(
            temperature=0.5,
            top_p=1,
            top_k=5,
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=-1,
            frequency_penalty=0.5,
            logit_bias={7: -100},
            seed=-3,
        ),
        json_schema='{"type": "object"}',
    )


def test_a_line_of_openai_is_the_same_request() -> None:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "max_completion_tokens": 7,
        "stop": ["a", "b"],
        "logprobs": True,
        "top_logprobs": 2,
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "null"}}},
        "stream": False,
    }
    theirs = parsed(
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    )
    ours = parsed(
        {
            "custom_id": "a",
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 7,
            "stop": ["a", "b"],
            "logprobs": 2,
            "json_schema": '{"type": "null"}',
        }
    )

    assert theirs == ours


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"url": "/v1/embeddings", "body": {}}, id="another endpoint"),
        pytest.param({"url": "/v1/completions", "body": {"messages": []}}, id="another input"),
        pytest.param(
            {"method": "GET", "url": "/v1/completions", "body": {"prompt": "x"}}, id="GET"
        ),
        pytest.param(
            {"url": "/v1/completions", "body": {"prompt": "x", "stream": True}}, id="stream"
        ),
        pytest.param(
            {"url": "/v1/completions", "body": {"prompt": "x", "top_logprobs": 1}},
            id="top_logprobs alone",
        ),
        pytest.param({"prompt": "x", "regex": "a", "choice": ["b"]}, id="two formats"),
        pytest.param({"prompt": "x", "request_id": "mine"}, id="a request_id"),
        pytest.param({"prompt": "x", "messages": [{"role": "user"}]}, id="no content"),
        pytest.param({"prompt": "x", "logit_bias": {"x": 1}}, id="a bias without a token"),
        pytest.param({"prompt": "x", "\ud800": 1}, id="a name that is no Unicode"),
    ],
)
def test_what_would_be_ignored_is_refused(more: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parsed({"custom_id": "a"} | more)

    assert str(refusal.value).startswith("Line 3: ")
    refusal.value.what.encode()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_NAMES = st.sampled_from(
    [
        *("custom_id", "model", "messages", "prompt", "tokens", "stop", "n", "seed"),
        *("logit_bias", "max_tokens", "temperature", "json_schema", "choice", "body"),
        *("url", "method", "logprobs"),
    ]
)


# Hypothesis makes its tables of Unicode at the first use, which takes a second on a busy machine.
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.binary(max_size=200) | st.dictionaries(_NAMES, _JSON, max_size=6))
def test_nothing_but_a_request_or_a_refusal_comes_of_it(given_: object) -> None:
    raw = given_ if isinstance(given_, bytes) else json.dumps(given_).encode()
    try:
        told = parse_line(raw, number=1, model="m").custom_id
    except InvalidRequest as refusal:
        told = f"{refusal.field}"
        told.encode()

    assert told


def endpoint(running: int, *, waiting: int = 0, sent: int = 0, rows_max: int = 32) -> Endpoint:
    facts = ReplicaFacts(
        replica_id="r", address="", model="m", version="v", ready=True, context_tokens=8
    )
    found = Endpoint(facts, is_connected=True)
    found.heard(ReplicaLoad(running=running, waiting=waiting, rows_max=rows_max), now_ms=0)
    found.sent((), sequences=sent, prompt_tokens=0)
    return found


@pytest.mark.parametrize(
    ("endpoints", "idle"),
    [
        pytest.param([endpoint(5)], 19, id="a quarter of the rows stays free"),
        pytest.param([endpoint(5, waiting=1)], 0, id="nothing starts where something waits"),
        pytest.param([endpoint(30), endpoint(0)], 24, id="a full replica takes nothing away"),
        pytest.param([endpoint(0, sent=3)], 21, id="what was sent counts"),
        pytest.param([endpoint(0, rows_max=1)], 1, id="a single row is used when it is idle"),
        pytest.param([], 0, id="no replica"),
    ],
)
def test_lines_take_what_nobody_wants(endpoints: list[Endpoint], idle: int) -> None:
    assert idle_rows(endpoints, "m", now_ms=1) == idle
    assert idle_rows(endpoints, "other", now_ms=1) == 0
    assert idle_rows(endpoints, "m", now_ms=10_000) == 0, "what was heard is too old"
