"""SIGKILL under batches and under calls with a key: nothing is lost, and nothing charged twice."""

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from headrace.deploy import ledgers
from headrace.serving.admission.accounts import demo_key
from headrace.serving.config import Config
from headrace.serving.metering.ledger.reader import LedgerReader
from headrace.serving.testing.platform import MODEL
from headrace.v1 import batch_pb2 as pb
from headrace.v1 import batch_pb2_grpc, inference_pb2, inference_pb2_grpc

BUSY_HOME = Path(__file__).parent / "busy_home.py"
LINES = 200


class Life:
    """One life of the platform's process, and a client of it."""

    def __init__(self, home: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(BUSY_HOME), str(home)], stdout=subprocess.PIPE, text=True
        )
        self.home = home

    async def begins(self) -> None:
        word, address = (await self._says()).split()
        assert word == "READY"
        key = demo_key(Config(home=self.home))
        self.metadata = (("authorization", f"Bearer {key}"),)
        self.channel = grpc.aio.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self.batches = batch_pb2_grpc.BatchStub(self.channel)
        self.inference = inference_pb2_grpc.InferenceStub(self.channel)

    async def is_killed(self) -> None:
        self._process.kill()
        await asyncio.to_thread(self._process.communicate)
        await self.channel.close()

    async def ends(self) -> None:
        self._process.terminate()
        await asyncio.to_thread(self._process.communicate)
        assert self._process.returncode == 0
        await self.channel.close()

    async def _says(self) -> str:
        assert self._process.stdout
        return (await asyncio.to_thread(self._process.stdout.readline)).strip()

    async def submits(self) -> str:
        request = inference_pb2.GenerateRequest(model=MODEL, max_tokens=30)

        async def parts() -> AsyncIterator[pb.CreateBatchRequest]:
            for number in range(LINES):
                request.prompt = f"hello world {number}"
                line = pb.BatchLine(custom_id=f"c{number}", request=request)
                yield pb.CreateBatchRequest(line=line)

        return (await self.batches.Create(parts(), metadata=self.metadata)).batch_id

    async def follows(self, batch_id: str, *, commits_max: int = LINES + 2) -> pb.BatchInfo:
        """Until it has ended, or for so many commits."""
        request = pb.GetBatchRequest(batch_id=batch_id)
        for _ in range(commits_max):
            info = await self.batches.Get(request, metadata=self.metadata)
            if info.finished_unix_ms:
                break
            assert await self._says() == "PROGRESS"
        return info

    async def results(self, batch_id: str) -> list[dict[str, Any]]:
        request = pb.BatchResultsRequest(batch_id=batch_id)
        raw = [part.jsonl async for part in self.batches.Results(request, metadata=self.metadata)]
        return [json.loads(line) for line in b"".join(raw).splitlines()]


def net_nano(home: Path) -> int:
    """What the ledger says is owed: every charge, and every correction."""
    with ledgers.local(Config(home=home)) as ledger:
        balances = LedgerReader(ledger).balances()
    femto = sum(each.charge_femto + each.adjusted_femto for each in balances)
    assert femto % 10**6 == 0, "the demo prices are whole nano for each token"
    return femto // 10**6


@pytest.mark.parametrize("seed", range(2))
def test_a_batch_ends_with_one_result_a_line_however_often_it_is_killed(
    seed: int, tmp_path: Path
) -> None:
    """Lives that end after a random number of commits; the ledger equals the results' charges."""
    rng = random.Random(seed)

    async def story() -> None:
        life = Life(tmp_path)
        await life.begins()
        batch_id = await life.submits()
        for _ in range(4):
            await life.follows(batch_id, commits_max=rng.randrange(1, 5))
            await life.is_killed()
            life = Life(tmp_path)
            await life.begins()
        ended = await life.follows(batch_id)
        results = await life.results(batch_id)
        await life.is_killed()

        assert ended.state == pb.BATCH_STATE_COMPLETED
        assert sorted(each["line"] for each in results) == list(range(1, LINES + 1))
        assert {each["status"] for each in results} == {"succeeded"}
        charges = sum(each["response"]["charge_nano"] for each in results)
        assert ended.charge.nano == charges == net_nano(tmp_path)

    asyncio.run(asyncio.wait_for(story(), 120))


@pytest.mark.parametrize("seed", range(2))
def test_a_call_that_is_retried_after_a_kill_is_answered_and_charged_once(
    seed: int, tmp_path: Path
) -> None:
    """Clients repeat each call under its key until it is whole, while the process is killed."""
    rng = random.Random(seed)
    answers: dict[str, inference_pb2.GenerateChunk] = {}

    async def asks(life: Life, key: str) -> None:
        request = inference_pb2.GenerateRequest(model=MODEL, prompt=f"hello {key}", max_tokens=60)
        metadata = (*life.metadata, ("idempotency-key", key))
        with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            async for chunk in life.inference.Generate(request, metadata=metadata):
                if chunk.HasField("done"):
                    known = answers.setdefault(key, chunk)
                    assert known.done == chunk.done

    async def story() -> None:
        keys = [f"k{number}" for number in range(24)]
        for number in range(4):
            life = Life(tmp_path)
            await life.begins()
            calls = [asyncio.ensure_future(asks(life, key)) for key in keys]
            if number < 3:
                await asyncio.wait(calls[: rng.randrange(1, 12)])
                await life.is_killed()
            await asyncio.wait(calls)
        await asyncio.wait([asyncio.ensure_future(asks(life, key)) for key in keys])
        await life.ends()
        assert answers.keys() == set(keys)

        charges = sum(chunk.done.charge.nano for chunk in answers.values())
        assert net_nano(tmp_path) == charges

    asyncio.run(asyncio.wait_for(story(), 120))
