"""Turns, from the first start to the last figure, with engines that answer at once."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio

from headrace.deploy.bench.contender import Contender, to_rows
from headrace.deploy.bench.figures import Answer
from headrace.deploy.bench.frontend_servers import Bare
from headrace.deploy.bench.grpc_client import closed_loop, inference_stub
from headrace.deploy.bench.llm import Bench, Options
from headrace.deploy.bench.machine import Roofline
from headrace.deploy.bench.peers.base import Entrant, PeerFailed
from headrace.deploy.bench.workload import Load
from headrace.serving.domain.artifact import Precision
from headrace.v1 import inference_pb2_grpc

INT8 = Precision.INT8


class InstantPeer:
    """Answers every prompt with a token each `token_ms`; may break in a given turn."""

    formats = {INT8: "int8"}  # noqa: RUF012
    starts_slowly = False

    def __init__(self, name: str, diary: list[str], *, token_ms: float, breaks_in: int = 0):
        self.name = name
        self._diary = diary
        self._token_s = token_ms / 1000
        self._turns_left = breaks_in
        self.roots: Sequence[int] = ()

    def missing(self, precision: Precision) -> str | None:
        return None

    @asynccontextmanager
    async def start(self, precision: Precision, log: Path) -> AsyncIterator[Entrant]:
        self._diary.append(self.name)
        self._turns_left -= 1
        if self._turns_left == 0:
            raise PeerFailed("It broke.", why="As told.", fix="None.")
        yield self

    async def run(self, load: Load) -> Sequence[Answer]:
        times = [(i + 1) * self._token_s for i in range(load.tokens_out)]
        return [Answer(0.0, [(at, 1) for at in times]) for _ in load.prompts]


def bench(peers: Sequence[InstantPeer], tmp_path: Path, **options) -> tuple[Bench, dict, list]:
    contenders = [Contender(peer, INT8) for peer in peers]
    skipped: dict[str, str] = {}
    chosen = Options(streams=(8,), precisions=(INT8,), **options)
    made = Bench(chosen, lambda text: text.encode(), tmp_path, contenders, skipped, lambda _: None)
    return made, skipped, contenders


def test_turns_are_interleaved_and_their_order_rotates(tmp_path: Path) -> None:
    """A machine that slows down over minutes slows everybody down alike."""
    diary: list[str] = []
    peers = [InstantPeer(name, diary, token_ms=1) for name in ("headrace", "a", "b")]
    made, _, _ = bench(peers, tmp_path, rounds=3)

    asyncio.run(made.run())

    assert diary == ["headrace", "a", "b", "a", "b", "headrace", "b", "headrace", "a"]


def test_a_peer_that_breaks_is_left_out_and_the_others_are_measured(tmp_path: Path) -> None:
    diary: list[str] = []
    peers = [
        InstantPeer("headrace", diary, token_ms=1),
        InstantPeer("openvino", diary, token_ms=1, breaks_in=2),
    ]
    made, skipped, contenders = bench(peers, tmp_path, rounds=3)

    asyncio.run(made.run())

    assert skipped == {"openvino int8": "It broke. As told."}
    assert [len(each.results[8]) for each in contenders] == [3, 1]


def test_a_peer_far_behind_is_measured_once(tmp_path: Path) -> None:
    diary: list[str] = []
    peers = [
        InstantPeer("headrace", diary, token_ms=1),
        InstantPeer("openvino", diary, token_ms=2),
        InstantPeer("llama-cpp", diary, token_ms=4),
    ]
    made, _, contenders = bench(peers, tmp_path, rounds=3)

    asyncio.run(made.run())

    assert [len(each.results[8]) for each in contenders] == [3, 3, 1]


def test_rows_hold_medians_ratios_and_the_bound(tmp_path: Path) -> None:
    """16 prompts of 128 tokens, a token a millisecond: 16,000 tokens/s, the other's half."""
    diary: list[str] = []
    peers = [
        InstantPeer("headrace", diary, token_ms=1),
        InstantPeer("openvino", diary, token_ms=2),
    ]
    made, _, contenders = bench(peers, tmp_path, rounds=1)
    asyncio.run(made.run())
    bound = Roofline(weight_bytes=10**8, weights=10**8, read_gb_s=20.0, int8_gop_s=None)

    rows = {(row.peer, row.metric): row for row in to_rows(contenders, {INT8: bound})}

    assert round(rows["headrace", "tok_s"].value) == 16_000
    assert round(rows["headrace", "tok_s"].ratio or 0, 3) == 2.0
    assert round(rows["headrace", "itl_p99_ms"].ratio or 0, 3) == 0.5
    assert round(rows["roofline", "tok_s"].value) == 1_600
    assert rows["roofline", "tok_s"].name == "llm/int8/streams=8"


def test_the_grpc_client_asks_every_prompt_once_over_a_real_channel() -> None:
    async def story() -> Sequence[Answer]:
        server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServicer_to_server(Bare(tokens_per_s=0), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        load = Load(prompts=[(1, 2, 3)] * 5, streams=2, tokens_out=7, time_s_max=30)
        try:
            async with inference_stub(f"127.0.0.1:{port}") as stub:
                return await closed_loop(stub, "any", "no key", load)
        finally:
            await server.stop(None)

    answers = asyncio.run(story())

    assert [answer.tokens for answer in answers] == [7] * 5
