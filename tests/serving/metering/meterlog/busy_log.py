"""A frontend process that serves until it is killed, and says on stdout what was acknowledged.

`busy_log.py FOLDER EPOCH`. One line for each acknowledgement: `O id` opened, `S id tokens` settled.
"""

import asyncio
import os
import random
import sys
from pathlib import Path

from headrace.serving.clock import SystemClock
from headrace.serving.config_metering import MeterConfig
from headrace.serving.domain.record import Opening, Settlement
from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.metering.meterlog.meter_log import MeterLog

PRICE = Price.text(
    version="p",
    prompt_nano_per_mtok=1_000_000_000,
    cached_nano_per_mtok=0,
    completion_nano_per_mtok=1_000_000_000,
)


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def serve_one(log: MeterLog, clock: SystemClock, request_id: str) -> None:
    opening = Opening(
        tenant_id="acme",
        request_id=request_id,
        key_id="k",
        model="m",
        version="v",
        price=PRICE,
        accepted_unix_ms=clock.unix_ms(),
    )
    await log.open(opening)
    say("O", request_id)
    usage = Usage(prompt_tokens=10)
    for tokens in range(1, random.randrange(2, 20)):
        usage = Usage(prompt_tokens=10, completion_tokens=tokens)
        log.checkpoint(tenant_id="acme", request_id=request_id, usage=usage)
        await asyncio.sleep(0)
    settlement = Settlement(
        tenant_id="acme",
        request_id=request_id,
        usage=usage,
        outcome=Outcome.OK,
        charge_femto=PRICE.charge_femto(usage),
        version="v",
        first_token_unix_ms=None,
        settled_unix_ms=clock.unix_ms(),
    )
    await log.settle(settlement)
    say("S", request_id, usage.completion_tokens)


async def main() -> None:
    folder, epoch = Path(sys.argv[1]), sys.argv[2]
    clock = SystemClock()
    log = MeterLog(
        folder,
        clock=clock,
        epoch=epoch,
        was_used=lambda *_: False,
        config=MeterConfig(checkpoint_tokens=4, checkpoint_s=0.01, segment_bytes=64 << 10),
    )

    async def client(number: int) -> None:
        for i in range(1_000_000):
            await serve_one(log, clock, f"{epoch}-{number}-{i}")
            log.projected(log.durable_seq)

    await asyncio.gather(*(client(number) for number in range(8)))


asyncio.run(main())
