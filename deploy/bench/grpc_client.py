"""Closed and open loops of streaming calls to an Inference service, each answer timed."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import grpc
import grpc.aio

from headrace.deploy.bench.figures import Answer
from headrace.deploy.bench.workload import Load
from headrace.v1 import inference_pb2, inference_pb2_grpc

CALL_S_MAX = 600.0

Metadata = Sequence[tuple[str, str]]


def bearer(key: str) -> Metadata:
    return (("authorization", f"Bearer {key}"),)


@asynccontextmanager
async def inference_stub(address: str) -> AsyncIterator[inference_pb2_grpc.InferenceStub]:
    """A stub on a channel of its own; leaving closes it."""
    async with grpc.aio.insecure_channel(address, [("grpc.enable_retries", 0)]) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


def generate_request(
    model: str, prompt: Sequence[int], tokens_out: int
) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(model=model, max_tokens=tokens_out, ignore_eos=True)
    request.tokens.ids.extend(prompt)
    request.sampling.temperature = 0
    return request


async def closed_loop(
    stub: inference_pb2_grpc.InferenceStub, model: str, key: str, load: Load
) -> Sequence[Answer]:
    """Each of the callers asks its next prompt when its answer is whole.

    Raises:
        grpc.aio.AioRpcError: a call was refused or lost.
    """
    answers: list[Answer] = []
    waiting = iter(load.prompts)
    try:
        async with asyncio.timeout(load.time_s_max), asyncio.TaskGroup() as callers:
            for _ in range(load.streams):
                callers.create_task(_caller(stub, model, key, load.tokens_out, waiting, answers))
    except TimeoutError:
        pass  # The load is cut off; what arrived until then counts.
    except ExceptionGroup as group:
        raise group.exceptions[0] from group
    return answers


async def _caller(
    stub: inference_pb2_grpc.InferenceStub,
    model: str,
    key: str,
    tokens_out: int,
    waiting: Iterator[Sequence[int]],
    answers: list[Answer],
) -> None:
    for prompt in waiting:
        request = generate_request(model, prompt, tokens_out)
        answer = Answer(time.monotonic())
        answers.append(answer)
        await follow(stub, request, bearer(key), answer)


async def follow(
    stub: inference_pb2_grpc.InferenceStub,
    request: inference_pb2.GenerateRequest,
    metadata: Metadata,
    answer: Answer,
) -> None:
    """Read one answer to its end; cancels the call when it is left early."""
    call = stub.Generate(request, metadata=metadata, timeout=CALL_S_MAX)
    try:
        async for chunk in call:
            if chunk.token_ids:
                answer.arrivals.append((time.monotonic(), len(chunk.token_ids)))
    finally:
        call.cancel()
