"""The client of the frontend benchmark: many streams for a while, from a process of its own.

`python -m headrace.deploy.bench.frontend_client '<JSON of Asked>'` prints the JSON of `Got`.
Each stream asks again as soon as its answer is whole. Streams begin one after the other during the
first second, which is not counted, so that first tokens are timed in the middle of running streams.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass

import uvloop

from headrace.deploy.bench.figures import Answer, percentile
from headrace.deploy.bench.grpc_client import (
    Metadata,
    follow,
    generate_request,
    inference_stub,
)
from headrace.v1 import inference_pb2_grpc

RAMP_S = 1.0
PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to do."""

    address: str
    metadata: Metadata
    model: str
    streams: int
    tokens_out: int
    seconds: float
    """After the ramp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Got:
    """What came, in the counted time; `messages_in_all` is from the first to the last."""

    tok_s: float
    messages_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    messages_in_all: int


async def drive(asked: Asked) -> Got:
    answers: list[Answer] = []
    began_s = time.monotonic()
    async with inference_stub(asked.address) as stub:
        callers = [
            asyncio.create_task(_stream(stub, asked, RAMP_S * i / asked.streams, answers))
            for i in range(asked.streams)
        ]
        _, running = await asyncio.wait(
            callers, timeout=RAMP_S + asked.seconds, return_when=asyncio.FIRST_EXCEPTION
        )
        ended_s = time.monotonic()
        for caller in running:
            caller.cancel()
        outcomes = await asyncio.gather(*callers, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return summarise(answers, from_s=began_s + RAMP_S, to_s=ended_s)


async def _stream(
    stub: inference_pb2_grpc.InferenceStub, asked: Asked, wait_s: float, answers: list[Answer]
) -> None:
    await asyncio.sleep(wait_s)
    request = generate_request(asked.model, [1] * PROMPT_TOKENS, asked.tokens_out)
    metadata = [(name, value) for name, value in asked.metadata]
    while True:
        answer = Answer(time.monotonic())
        answers.append(answer)
        await follow(stub, request, metadata, answer)


def summarise(answers: list[Answer], *, from_s: float, to_s: float) -> Got:
    """Count what arrived between two moments.

    Raises:
        ValueError: nothing arrived.
    """
    inside = [
        (at, tokens) for answer in answers for at, tokens in answer.arrivals if from_s <= at <= to_s
    ]
    begun = [answer for answer in answers if answer.arrivals]
    # A server that is far behind answers nobody twice: then the first questions have to do.
    later = [answer for answer in begun if answer.asked_s >= from_s] or begun
    ttfts = [ttft for answer in later if (ttft := answer.ttft_ms) is not None]
    gaps = [gap for answer in answers for gap in answer.gaps_ms]
    return Got(
        tok_s=sum(tokens for _, tokens in inside) / (to_s - from_s),
        messages_s=len(inside) / (to_s - from_s),
        ttft_p50_ms=percentile(ttfts, 50),
        ttft_p99_ms=percentile(ttfts, 99),
        itl_p50_ms=percentile(gaps, 50),
        itl_p99_ms=percentile(gaps, 99),
        messages_in_all=sum(len(answer.arrivals) for answer in answers),
    )


def main() -> None:
    got = uvloop.run(drive(Asked(**json.loads(sys.argv[1]))))
    print(json.dumps(asdict(got)))


if __name__ == "__main__":
    main()
