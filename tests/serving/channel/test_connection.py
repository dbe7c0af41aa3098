"""What a frontend is told when it reads slower than the engine steps."""

import asyncio

import pytest

from headrace.serving.channel import connection as module
from headrace.serving.channel.connection import Connection
from headrace.serving.domain.request import Delta, FinishReason, TokenLogprob
from headrace.v1 import step_pb2


@pytest.fixture
def connection() -> Connection:
    async def make() -> Connection:
        task = asyncio.create_task(asyncio.sleep(0))
        await task
        return Connection(task)

    return asyncio.run(make())


def said(connection: Connection) -> list[step_pb2.StepResult]:
    """Everything there is to write, message by message."""
    messages = []
    while (message := connection.next_message()) is not None:
        messages.append(message.step)
    return messages


def test_a_frontend_that_keeps_up_gets_one_message_for_each_step(connection: Connection) -> None:
    for step in (1, 2):
        connection.put(7, Delta(token_ids=(step,), text="a"), None)
        connection.put(8, Delta(token_ids=(step,), text="b"), None)
        connection.tell(step_pb2.Load(running=2), step=step)
        (message,) = said(connection)

        assert (message.step, message.load.running) == (step, 2)
        assert [list(delta.token_ids) for delta in message.deltas] == [[step], [step]]


def test_one_that_is_behind_gets_them_merged(connection: Connection) -> None:
    """However long it does not read, there is one delta for each of its sequences."""
    first = Delta(token_ids=(0,), text="a", cached_tokens=5, logprobs=(TokenLogprob(0, -1.0),))
    connection.put(7, first, 2.5)
    for step in range(1, 100):
        connection.put(7, Delta(token_ids=(step,), text="a"), None)
        connection.tell(step_pb2.Load(running=step), step=step)
    connection.put(7, Delta(token_ids=(100,), text="z", finish=FinishReason.STOP), None)
    connection.tell(step_pb2.Load(running=0), step=100)

    (message,) = said(connection)
    (delta,) = message.deltas
    assert list(delta.token_ids) == list(range(101))
    assert delta.text == "a" * 100 + "z"
    assert (delta.cached_tokens, delta.queue_wait_ms, delta.finish) == (5, 2.5, "stop")
    assert len(delta.logprobs) == 1
    assert (message.step, message.load.running) == (100, 0)


def test_no_message_outgrows_the_limit(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MESSAGE_BYTES", 1_000)
    for sequence in range(10):
        connection.put(sequence, Delta(token_ids=(1,) * 50, text="x" * 150), None)
    connection.tell(step_pb2.Load(running=10))

    messages = said(connection)
    assert len(messages) == 5
    assert [delta.sequence for message in messages for delta in message.deltas] == list(range(10))
    assert all(message.load.running == 10 for message in messages)


def test_a_closed_connection_says_nothing(connection: Connection) -> None:
    connection.put(1, Delta(token_ids=(1,)), None)
    connection.close()
    connection.tell(step_pb2.Load())

    assert said(connection) == []
    assert connection.is_flushed.is_set()
