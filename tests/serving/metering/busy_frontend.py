"""A frontend process that serves until it is killed, and says on stdout what was acknowledged.

`busy_frontend.py LEDGER EPOCH [FILE_BYTES_MAX]`. One line for each acknowledgement: `O id` opened,
`S id tokens` settled. With a bound for the file's size it is a process on a full disk: it serves
until it is refused, then gets room, and says `HEALED` once it can serve again.
"""

import asyncio
import os
import random
import resource
import sys
from pathlib import Path

from headrace.serving.clock import SystemClock
from headrace.serving.domain.record import Opening, Settlement
from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.errors import MeterUnavailable
from headrace.serving.metering.usage_store import UsageStore

PRICE = Price.text(
    version="p",
    prompt_nano_per_mtok=1_000_000_000,
    cached_nano_per_mtok=0,
    completion_nano_per_mtok=1_000_000_000,
)


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def serve_one(store: UsageStore, clock: SystemClock, request_id: str) -> None:
    opening = Opening(
        tenant_id="acme",
        request_id=request_id,
        key_id="k",
        model="m",
        version="v",
        price=PRICE,
        accepted_unix_ms=clock.unix_ms(),
    )
    await store.open(opening)
    say("O", request_id)
    tokens = 0
    for _ in range(random.randrange(20)):
        tokens += 1
        usage = Usage(prompt_tokens=10, completion_tokens=tokens)
        store.checkpoint(tenant_id="acme", request_id=request_id, usage=usage)
        await asyncio.sleep(0)
    usage = Usage(prompt_tokens=10, completion_tokens=tokens)
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
    await store.settle(settlement)
    say("S", request_id, tokens)


async def main() -> None:
    ledger, epoch = Path(sys.argv[1]), sys.argv[2]
    clock = SystemClock()
    store = UsageStore(
        ledger, clock=clock, epoch=epoch, checkpoint_tokens=4, checkpoint_s=0.01, probe_s=0.0
    )
    say("READY", store.recovered)
    if len(sys.argv) > 3:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), hard))
        try:
            for i in range(100_000):
                await serve_one(store, clock, f"{epoch}-{i}")
        except MeterUnavailable as refusal:
            say("FULL", refusal.reason)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        while not store.healthy:
            await asyncio.gather(store.flush(), return_exceptions=True)
        await serve_one(store, clock, f"{epoch}-after")
        say("HEALED")
        store.close()
        return

    async def client(number: int) -> None:
        for i in range(1_000_000):
            await serve_one(store, clock, f"{epoch}-{number}-{i}")

    await asyncio.gather(*(client(number) for number in range(8)))


asyncio.run(main())
