"""`headrace batch` against a real frontend: what a person and a script see."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from headrace.deploy.batch_client import BatchClient
from headrace.deploy.cli import main
from headrace.deploy.commands import batch as command
from headrace.serving.testing.platform import MODEL, Platform
from headrace.v1 import batch_pb2, batch_pb2_grpc

LINES = '{"custom_id":"a","prompt":"hello","max_tokens":3}\n{"custom_id":"b","prompt":"world"}\n'


class Shell:
    """Runs `headrace batch` beside the platform."""

    def __init__(self, platform: Platform, capsys: pytest.CaptureFixture[str]) -> None:
        self._platform = platform
        self._capsys = capsys

    async def runs(self, action: str, *words: str) -> tuple[int, str, str]:
        connection = ("--address", self._platform.addresses.grpc, "--key", self._platform.key)
        code = await asyncio.to_thread(
            main, ["batch", action, *words, *connection, "--home", str(self._platform.home)]
        )
        shown = self._capsys.readouterr()
        return code, shown.out, shown.err


def play(home: Path, story: Callable[[Platform], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), Platform(home) as platform:
            await story(platform)

    asyncio.run(run())


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines.jsonl"
    path.write_text(LINES)
    return path


def test_a_file_is_run_and_its_results_are_saved(
    tmp_path: Path,
    lines: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "LOOK_S", 0.01)
    saved = tmp_path / "results.jsonl"

    async def story(platform: Platform) -> None:
        shell = Shell(platform, capsys)
        code, out, _ = await shell.runs("submit", str(lines), "--model", MODEL, "--wait", "--json")
        batch = json.loads(out)
        assert code == 0
        assert (batch["state"], batch["lines"], batch["succeeded"]) == ("completed", 2, 2)
        assert batch["charge_nano"] > 0

        name = batch["batch_id"]
        code, out, err = await shell.runs("results", name, "--out", str(saved))
        assert (code, out) == (0, "")
        found = [json.loads(each) for each in saved.read_text().splitlines()]
        assert {each["custom_id"] for each in found} == {"a", "b"}
        assert f"{saved.stat().st_size:,} bytes" in err
        code, out, _ = await shell.runs("results", name)
        assert out == saved.read_text()

        code, out, _ = await shell.runs("get", name)
        assert "2 of 2 lines succeeded" in out
        code, out, _ = await shell.runs("list", "--json")
        assert [each["batch_id"] for each in json.loads(out)] == [name]
        code, out, _ = await shell.runs("list")
        assert name in out
        assert (await shell.runs("delete", name))[0] == 0
        code, _, err = await shell.runs("get", name)
        assert code == 3
        assert "There is no batch" in err

    play(tmp_path, story)


def test_a_line_that_cannot_be_run_is_told_with_its_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"custom_id":"a","prompt":"hello"}\n{"custom_id":"b","promt":"world"}\n')

    async def story(platform: Platform) -> None:
        code, out, err = await Shell(platform, capsys).runs("submit", str(path), "--model", MODEL)

        assert (code, out) == (3, "")
        assert "Line 2: The field 'promt' is not known." in err

    play(tmp_path, story)


def test_a_batch_is_cancelled(
    tmp_path: Path, lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def story(platform: Platform) -> None:
        platform.replicas[0].engine.hold()
        shell = Shell(platform, capsys)
        _, out, _ = await shell.runs("submit", str(lines), "--model", MODEL, "--json")
        name = json.loads(out)["batch_id"]
        _, out, _ = await shell.runs("cancel", name, "--json")
        platform.replicas[0].engine.release()

        assert json.loads(out)["state"] in ("cancelling", "cancelled")

    play(tmp_path, story)


class FlakyServer(batch_pb2_grpc.BatchServicer):
    """Breaks the first stream of results after one part."""

    def __init__(self) -> None:
        self.offsets: list[int] = []

    def Results(
        self, request: batch_pb2.BatchResultsRequest, context: grpc.ServicerContext
    ) -> Iterator[batch_pb2.BatchResultsChunk]:
        self.offsets.append(request.offset)
        for offset in range(request.offset, 30, 10):
            yield batch_pb2.BatchResultsChunk(jsonl=b"123456789\n", next_offset=offset + 10)
            if len(self.offsets) == 1:
                context.abort(grpc.StatusCode.UNAVAILABLE, "the frontend went away")


def test_results_go_on_where_the_line_broke() -> None:
    server = FlakyServer()
    with ThreadPoolExecutor(2) as pool:
        grpc_server = grpc.server(pool)
        batch_pb2_grpc.add_BatchServicer_to_server(server, grpc_server)
        port = grpc_server.add_insecure_port("127.0.0.1:0")
        grpc_server.start()
        with BatchClient(f"127.0.0.1:{port}", "hr_key") as client:
            raw = b"".join(client.results("batch_1"))
        grpc_server.stop(None).wait()

    assert raw == b"123456789\n" * 3
    assert server.offsets == [0, 10]


def test_a_file_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["batch", "submit", "nowhere.jsonl", "--home", str(tmp_path)]) == 3
    assert "nowhere.jsonl cannot be read" in capsys.readouterr().err
