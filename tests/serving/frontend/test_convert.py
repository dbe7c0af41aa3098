"""The wire conversion: every rule of inference.proto, and nothing else ever escapes."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.serving.channel.convert import (
    add_delta,
    delta_from_wire,
    spec_from_wire,
    submit_to_wire,
)
from headrace.serving.channel.fleet import ServedModel
from headrace.serving.domain.generate import Chunk, Generate, Settled
from headrace.serving.domain.record import Caller
from headrace.serving.domain.request import (
    Delta,
    FinishReason,
    Grammar,
    GrammarKind,
    Sampling,
    SequenceSpec,
    TokenLogprob,
)
from headrace.serving.domain.usage import Price, Usage
from headrace.serving.errors import InvalidRequest, InvalidSchema, PromptTooLong, ServingError
from headrace.serving.frontend import convert, rules
from headrace.serving.frontend.convert import Acceptance, ChunkWriter, LoadedModel
from headrace.serving.router.endpoint import ReplicaFacts
from headrace.serving.testing.tiny_artifact import tiny_manifest
from headrace.serving.testing.tiny_tokenizer import tiny_tokenizer
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import step_pb2

MODEL = LoadedModel(tiny_manifest(), tiny_tokenizer())
VOCAB = MODEL.tokenizer.vocab_size
CONTEXT = 1024
PRICE = Price.text(
    version="p", prompt_nano_per_mtok=1, cached_nano_per_mtok=1, completion_nano_per_mtok=1
)
SERVED = ServedModel(
    name="tiny",
    newest=ReplicaFacts(
        replica_id="r",
        address="a",
        model="tiny",
        version="v1",
        ready=True,
        context_tokens=CONTEXT,
    ),
    replicas_ready=1,
)
ACCEPTANCE = Acceptance(
    caller=Caller("t", "k"),
    request_id="r1",
    price=PRICE,
    cache_salt=b"salt",
    accepted_unix_ms=0,
    accepted_ms=0,
    deadline_ms=None,
)


def read(message: pb.GenerateRequest) -> Generate:
    """What the service does between the socket and the pipeline."""
    rules.check_request(message)
    ids = convert.prompt_ids(message, MODEL)
    return convert.generate_from_wire(
        message, ids=ids, model=MODEL, served=SERVED, acceptance=ACCEPTANCE
    )


def request(**fields: object) -> pb.GenerateRequest:
    values: dict[str, object] = {"model": "tiny", "prompt": "hello world"}
    return pb.GenerateRequest(**(values | fields))  # pyright: ignore[reportArgumentType]


def sampling(**fields: object) -> pb.GenerateRequest:
    return request(sampling=pb.Sampling(**fields))  # pyright: ignore[reportArgumentType]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("message", "field"),
    [
        pytest.param(request(model=""), "model", id="no model"),
        pytest.param(request(model="m" * 129), "model", id="a model name of 129 characters"),
        pytest.param(pb.GenerateRequest(model="tiny"), "prompt", id="no prompt"),
        pytest.param(request(prompt=""), "prompt", id="an empty prompt"),
        pytest.param(request(chat=pb.Chat()), "chat", id="an empty chat"),
        pytest.param(request(tokens=pb.TokenIds()), "tokens", id="no tokens"),
        pytest.param(request(tokens=pb.TokenIds(ids=[VOCAB])), "tokens.ids", id="a foreign token"),
        pytest.param(request(tokens=pb.TokenIds(ids=[-1])), "tokens.ids", id="a negative token"),
        pytest.param(
            request(chat=pb.Chat(messages=[pb.Message(role="root", content="hi")])),
            "chat.messages.role",
            id="an unknown role",
        ),
        pytest.param(request(request_id="a b"), "request_id", id="a space in the request id"),
        pytest.param(request(request_id="a" * 65), "request_id", id="a request id of 65"),
        pytest.param(request(request_id="r1#x"), "request_id", id="the mark of refusals"),
        pytest.param(request(max_tokens=0), "max_tokens", id="no tokens asked for"),
        pytest.param(request(max_tokens=-5), "max_tokens", id="fewer than none"),
        pytest.param(request(min_tokens=-1), "min_tokens", id="a negative minimum"),
        pytest.param(request(min_tokens=9, max_tokens=8), "min_tokens", id="minimum over maximum"),
        pytest.param(request(n=17), "n", id="seventeen answers"),
        pytest.param(request(n=-1), "n", id="minus one answer"),
        pytest.param(request(stop=["x"] * 9), "stop", id="nine stop strings"),
        pytest.param(request(stop=[""]), "stop", id="an empty stop string"),
        pytest.param(request(stop=["é" * 65]), "stop", id="a stop string of 130 bytes"),
        pytest.param(request(stop_token_ids=[VOCAB]), "stop_token_ids", id="a foreign stop token"),
        pytest.param(request(stop_token_ids=[1] * 129), "stop_token_ids", id="129 stop tokens"),
        pytest.param(request(logprobs=21), "logprobs", id="21 logprobs"),
        pytest.param(request(logprobs=-1), "logprobs", id="negative logprobs"),
        pytest.param(sampling(temperature=-0.1), "sampling.temperature", id="cold"),
        pytest.param(sampling(temperature=2.1), "sampling.temperature", id="hot"),
        pytest.param(sampling(temperature=NAN), "sampling.temperature", id="no temperature"),
        pytest.param(sampling(temperature=INF), "sampling.temperature", id="endless heat"),
        pytest.param(sampling(top_p=0), "sampling.top_p", id="top_p of zero"),
        pytest.param(sampling(top_p=1.5), "sampling.top_p", id="top_p over one"),
        pytest.param(sampling(top_k=-1), "sampling.top_k", id="negative top_k"),
        pytest.param(sampling(min_p=1), "sampling.min_p", id="min_p of one"),
        pytest.param(sampling(min_p=NAN), "sampling.min_p", id="min_p not a number"),
        pytest.param(
            sampling(repetition_penalty=0), "sampling.repetition_penalty", id="divided by zero"
        ),
        pytest.param(sampling(presence_penalty=2.5), "sampling.presence_penalty", id="presence"),
        pytest.param(sampling(frequency_penalty=-3), "sampling.frequency_penalty", id="frequency"),
        pytest.param(sampling(logit_bias={VOCAB: 1}), "sampling.logit_bias", id="a foreign bias"),
        pytest.param(sampling(logit_bias={1: 101}), "sampling.logit_bias", id="a bias of 101"),
        pytest.param(sampling(logit_bias={1: NAN}), "sampling.logit_bias", id="a bias of NaN"),
        pytest.param(
            sampling(logit_bias=dict.fromkeys(range(1025), 0)), "sampling.logit_bias", id="1,025"
        ),
        pytest.param(request(json_schema=""), "json_schema", id="an empty schema"),
        pytest.param(request(json_schema=" " * 65_537), "json_schema", id="a schema of 64 KiB + 1"),
        pytest.param(request(regex="x" * 8_193), "regex", id="a regex of 8 KiB + 1"),
        pytest.param(request(choice=pb.Choices()), "choice", id="no options"),
        pytest.param(request(choice=pb.Choices(options=["a"] * 257)), "choice", id="257 options"),
        pytest.param(request(choice=pb.Choices(options=["a", ""])), "choice", id="no text"),
    ],
)
def test_a_bad_field_is_refused_by_name(message: pb.GenerateRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read(message)

    assert refusal.value.field == field
    assert refusal.value.reason in ("INVALID_REQUEST", "INVALID_SCHEMA")
    assert all((refusal.value.what, refusal.value.why, refusal.value.fix))


def test_a_prompt_that_fills_the_context_is_too_long() -> None:
    full = request(tokens=pb.TokenIds(ids=[5] * CONTEXT))

    with pytest.raises(PromptTooLong, match=r"holds 1,024 tokens") as refusal:
        read(full)

    assert refusal.value.field == "tokens"


def test_an_answer_that_cannot_fit_beside_the_prompt_is_refused() -> None:
    with pytest.raises(PromptTooLong) as refusal:
        read(request(max_tokens=CONTEXT))

    assert refusal.value.field == "max_tokens"


def test_defaults_are_resolved() -> None:
    made = read(request())

    assert made.n == 1
    assert made.sampling.max_tokens == 512
    assert made.sampling.temperature == 0
    assert made.sampling.logprobs is None
    assert 0 <= made.sampling.seed < 2**64


def test_an_unset_maximum_is_what_is_left_of_the_context() -> None:
    made = read(request(tokens=pb.TokenIds(ids=[5] * 1000)))

    assert made.sampling.max_tokens == 24


def test_a_negative_seed_is_a_seed() -> None:
    assert read(sampling(seed=-1)).sampling.seed == 2**64 - 1


def test_no_prompt_and_no_schema_stand_in_a_repr() -> None:
    """Reprs end up in tracebacks, and tracebacks in logs."""
    made = read(request(prompt="a secret", json_schema='{"title": "secret"}'))

    assert "secret" not in repr(made)
    assert str(list(made.prompt_ids)) not in repr(made)


floats = st.floats(width=32)
ints = st.integers(-(2**31), 2**31 - 1)
texts = st.text(max_size=50)


@st.composite
def requests(draw: st.DrawFn) -> pb.GenerateRequest:
    """Any message that the wire format allows, most fields near their bounds."""
    message = pb.GenerateRequest()

    def sometimes(act: Callable[[], object]) -> None:
        if draw(st.booleans()):
            act()

    message.model = draw(st.just("tiny") | texts)
    sometimes(
        lambda: setattr(message, "request_id", draw(texts | st.from_regex(r"[a-z.:-]{1,64}")))
    )
    match draw(st.sampled_from(["prompt", "chat", "tokens", "none"])):
        case "prompt":
            message.prompt = draw(texts)
        case "chat":
            roles = st.sampled_from(["user", "system", "assistant", "x"])
            pairs = draw(st.lists(st.tuples(roles, texts), max_size=4))
            message.chat.messages.extend(pb.Message(role=r, content=c) for r, c in pairs)
        case "tokens":
            message.tokens.ids.extend(draw(st.lists(st.integers(-1, VOCAB) | ints, max_size=20)))
        case _:
            pass
    for name in ("min_tokens", "n", "max_tokens", "logprobs"):
        sometimes(lambda name=name: setattr(message, name, draw(st.integers(-1, 20) | ints)))
    sometimes(lambda: message.stop.extend(draw(st.lists(texts, max_size=10))))
    sometimes(lambda: message.stop_token_ids.extend(draw(st.lists(ints, max_size=5))))
    for name in (
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ):
        value = st.floats(-3, 3, width=32) | floats
        sometimes(lambda name=name, v=value: setattr(message.sampling, name, draw(v)))
    sometimes(lambda: setattr(message.sampling, "top_k", draw(ints)))
    sometimes(lambda: setattr(message.sampling, "seed", draw(st.integers(-(2**63), 2**63 - 1))))
    biases = st.dictionaries(st.integers(-1, VOCAB), floats, max_size=5)
    sometimes(lambda: message.sampling.logit_bias.update(draw(biases)))
    match draw(st.sampled_from(["json_schema", "regex", "choice", "none"])):
        case "choice":
            message.choice.options.extend(draw(st.lists(texts, max_size=4)))
        case "none":
            pass
        case name:
            setattr(message, name, draw(texts))
    return message


@st.composite
def good_requests(draw: st.DrawFn) -> pb.GenerateRequest:
    """A message whose every field keeps the rules, up to and including the bounds."""
    unit = st.floats(0, 1, width=32)
    tokens = st.integers(0, VOCAB - 1)
    max_tokens = draw(st.integers(1, 500))
    message = pb.GenerateRequest(
        request_id=draw(st.from_regex(r"[A-Za-z0-9_.:-]{0,64}", fullmatch=True)),
        model="tiny",
        tokens=pb.TokenIds(ids=draw(st.lists(tokens, min_size=1, max_size=CONTEXT - 500))),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        n=draw(st.integers(0, 16)),
        stop=draw(st.lists(st.text(min_size=1, max_size=32), max_size=8)),
        stop_token_ids=draw(st.lists(tokens, max_size=128)),
        ignore_eos=draw(st.booleans()),
        sampling=pb.Sampling(
            temperature=draw(st.none() | st.floats(0, 2, width=32)),
            top_p=draw(st.none() | unit.filter(bool)),
            top_k=draw(st.none() | st.integers(0, 2**31 - 1)),
            min_p=draw(st.none() | unit.filter(lambda share: share < 1)),
            repetition_penalty=draw(st.none() | st.floats(0, 2, width=32).filter(bool)),
            presence_penalty=draw(st.none() | st.floats(-2, 2, width=32)),
            frequency_penalty=draw(st.none() | st.floats(-2, 2, width=32)),
            logit_bias=draw(st.dictionaries(tokens, st.floats(-100, 100, width=32), max_size=9)),
            seed=draw(st.none() | st.integers(-(2**63), 2**63 - 1)),
        ),
        logprobs=draw(st.none() | st.integers(0, 20)),
    )
    kind = draw(st.sampled_from(["json_schema", "regex", "none"]))
    if kind != "none":
        setattr(message, kind, draw(st.text(min_size=1, max_size=50)))
    return message


@settings(max_examples=150, deadline=None)
@given(good_requests())
def test_a_request_that_keeps_the_rules_is_accepted_and_travels_unchanged(
    message: pb.GenerateRequest,
) -> None:
    made = read(pb.GenerateRequest.FromString(message.SerializeToString()))

    assert list(made.prompt_ids) == list(message.tokens.ids)
    assert (made.n, made.sampling.max_tokens) == (message.n or 1, message.max_tokens)
    # What the frontend accepts, the step channel carries unchanged.
    spec = SequenceSpec(prompt_ids=made.prompt_ids, resume_ids=[1, 2], sampling=made.sampling)
    wire = submit_to_wire(spec, sequence=1, now_ms=0).SerializeToString()
    assert spec_from_wire(step_pb2.Submit.FromString(wire), now_ms=0) == spec


def outcome(message: pb.GenerateRequest) -> Generate | ServingError:
    try:
        return read(message)
    except ServingError as refusal:
        return refusal


@settings(max_examples=400, deadline=None)
@given(requests())
def test_whatever_is_sent_becomes_a_request_or_a_refusal(message: pb.GenerateRequest) -> None:
    made = outcome(pb.GenerateRequest.FromString(message.SerializeToString()))
    if isinstance(made, ServingError):
        assert made.code == "INVALID_ARGUMENT"
        assert made.what
        return

    chosen = made.sampling
    assert 1 <= made.n <= 16
    assert len(made.prompt_ids) + chosen.max_tokens <= CONTEXT
    assert 0 <= chosen.min_tokens <= chosen.max_tokens
    assert 0 <= chosen.temperature <= 2
    assert 0 < chosen.top_p <= 1
    assert all(0 <= token < VOCAB for token in made.prompt_ids)


finite = st.floats(width=32, allow_nan=False)
logprobs = st.builds(
    TokenLogprob,
    ints,
    finite,
    st.lists(st.tuples(ints, finite), max_size=3).map(tuple),
)
deltas = st.builds(
    Delta,
    token_ids=st.lists(ints, max_size=5).map(tuple),
    text=texts,
    logprobs=st.lists(logprobs, max_size=3).map(tuple),
    cached_tokens=st.integers(0, 1000),
    finish=st.none() | st.sampled_from(FinishReason),
)


@given(deltas, st.none() | st.floats(0, 1000, width=32))
def test_a_delta_crosses_the_step_channel_unchanged(delta: Delta, wait_ms: float | None) -> None:
    step = step_pb2.StepResult()
    add_delta(step, sequence=3, delta=delta, queue_wait_ms=wait_ms)
    (wire,) = step_pb2.StepResult.FromString(step.SerializeToString()).deltas

    assert delta_from_wire(wire) == delta
    assert wire.queue_wait_ms == (wait_ms or 0)


@dataclass(frozen=True)
class _Sent:
    grammar: Grammar | None = None
    deadline_ms: float | None = None


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(_Sent(), id="plain"),
        pytest.param(_Sent(Grammar(GrammarKind.REGEX, "a+")), id="a regex"),
        pytest.param(_Sent(Grammar(GrammarKind.JSON_SCHEMA, "{}")), id="a schema"),
        pytest.param(_Sent(Grammar(GrammarKind.CHOICE, '["é"]')), id="a choice"),
        pytest.param(_Sent(deadline_ms=1_250), id="a deadline"),
    ],
)
def test_a_sequence_crosses_the_step_channel_unchanged(sent: _Sent) -> None:
    spec = SequenceSpec(
        prompt_ids=[1, 2],
        resume_ids=[3],
        sampling=Sampling(max_tokens=4, seed=2**64 - 1, stop=("x",), grammar=sent.grammar),
        cache_salt=b"\x00\xff",
        deadline_ms=sent.deadline_ms,
    )
    wire = submit_to_wire(spec, sequence=9, now_ms=1_000)

    # The clocks of both sides differ; what is left of the time is the same.
    back = spec_from_wire(wire, now_ms=1_000)
    assert back == spec


def test_an_error_crosses_the_step_channel_by_its_reason() -> None:
    step = step_pb2.StepResult()
    error = InvalidSchema("What.", why="Why.", fix="Fix.")
    add_delta(
        step,
        sequence=1,
        delta=Delta(finish=FinishReason.ERROR, error=error),
        queue_wait_ms=None,
    )
    back = delta_from_wire(step.deltas[0]).error

    assert type(back) is InvalidSchema
    assert str(back) == str(error)


def test_a_defect_of_a_replica_says_nothing_of_its_inside() -> None:
    step = step_pb2.StepResult()
    delta = Delta(finish=FinishReason.ERROR, error=ValueError("prompt: secret"))
    add_delta(step, sequence=1, delta=delta, queue_wait_ms=None)

    assert step.deltas[0].error.reason == "ENGINE_FAULT"
    assert b"secret" not in step.SerializeToString()


def test_one_message_is_reused_and_never_carries_the_last_chunk_over() -> None:
    writer = ChunkWriter("r1")
    first = Delta(token_ids=(1, 2), text="ab", logprobs=(TokenLogprob(1, -0.5, ((1, -0.5),)),))
    usage = Usage(prompt_tokens=3, completion_tokens=2)
    one = writer.chunk(Chunk(1, first, usage)).SerializeToString()
    last = Delta(finish=FinishReason.STOP)
    two = writer.chunk(Chunk(0, last, usage)).SerializeToString()

    assert pb.GenerateChunk.FromString(one).text == "ab"
    assert len(pb.GenerateChunk.FromString(one).logprobs) == 1
    message = pb.GenerateChunk.FromString(two)
    assert (message.index, message.text, list(message.token_ids)) == (0, "", [])
    assert not message.logprobs
    assert message.finish_reason == pb.FINISH_REASON_STOP


def test_the_last_message_says_what_was_charged() -> None:
    usage = Usage(prompt_tokens=3, cached_tokens=1, completion_tokens=2)
    settled = Settled(usage=usage, charge_nano=42, price=PRICE, version="v1", replicas_tried=1)

    done = ChunkWriter("r1").done(settled)

    assert done.done.charge.nano == 42
    assert done.done.charge.price_version == "p"
    assert done.done.usage.cached_tokens == 1
    assert done.usage == done.done.usage
