"""The product as an operator starts it, with a real model: what it promises when pieces die.

One `headrace serve` for all of them, in the order of the file. The answers are greedy, so an
answer that was moved, resumed or upgraded under can be compared with an undisturbed one.
"""

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from headrace.deploy import ledgers
from headrace.deploy.client import RemoteRefusal
from headrace.deploy.testing import Platform
from headrace.serving.config import Config
from headrace.serving.metering.ledger.reader import LedgerReader, Which
from headrace.v1 import inference_pb2 as pb

pytestmark = [
    pytest.mark.model,
    pytest.mark.ray,
    pytest.mark.timeout(900),  # The first one may have to compile the model.
]

MODEL = "smollm2-135m"
TWO_REPLICAS = {"name": MODEL, "precision": "int8", "replicas": 2, "kv_tokens": 4096}
UPGRADED = {**TWO_REPLICAS, "precision": "int4"}
SECOND = {"name": "smollm2-second", "precision": "int4", "kv_tokens": 2048}
TOKENS = 192
"""Long enough that something can happen in between: six at once take about four seconds."""


@dataclass(eq=False)
class Stream:
    """One answer, read in a thread of its own."""

    text: str = ""
    usage: pb.Done | None = None
    token_ids: list[int] = field(default_factory=list)
    reached: threading.Event = field(default_factory=threading.Event)
    """Set once a few tokens have arrived, and at the end."""
    result: "Future[Stream]" = field(default_factory=Future)

    def read(self, platform: Platform, request: pb.GenerateRequest) -> "Stream":
        try:
            with platform.client() as client, client.generate(request) as chunks:
                for chunk in chunks:
                    self.text += chunk.text
                    self.token_ids += chunk.token_ids
                    if len(self.token_ids) >= 4:
                        self.reached.set()
                    if chunk.HasField("done"):
                        self.usage = chunk.done
        finally:
            self.reached.set()
        return self

    @property
    def answer(self) -> tuple[str, Sequence[int], int, int]:
        """What must not depend on what happened meanwhile."""
        assert self.usage is not None
        used = self.usage.usage
        return self.text, tuple(self.token_ids), used.prompt_tokens, used.completion_tokens


class Crowd:
    """Several questions at once."""

    def __init__(self, platform: Platform, size: int, *, model: str = MODEL) -> None:
        self._platform = platform
        self._requests = [question(number, model=model) for number in range(size)]
        self._pool = ThreadPoolExecutor(size)
        self.streams: list[Stream] = []
        self._results: list[Future[Stream]] = []

    def __enter__(self) -> "Crowd":
        for request in self._requests:
            stream = Stream()
            self.streams.append(stream)
            self._results.append(self._pool.submit(stream.read, self._platform, request))
        for stream in self.streams:
            assert stream.reached.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def answers(self) -> list[tuple[str, Sequence[int], int, int]]:
        """Once all have ended; raises what any of them raised."""
        return [result.result(120).answer for result in self._results]


def question(number: int, *, model: str = MODEL, tokens: int = TOKENS) -> pb.GenerateRequest:
    content = f"Tell me story number {number}."
    return pb.GenerateRequest(
        model=model,
        chat=pb.Chat(messages=[pb.Message(role="user", content=content)]),
        sampling=pb.Sampling(temperature=0),
        max_tokens=tokens,
        ignore_eos=True,
    )


def ask(platform: Platform, number: int = 0, *, model: str = MODEL) -> Stream:
    return Stream().read(platform, question(number, model=model, tokens=8))


@pytest.fixture(scope="module")
def platform(compiled_home: Path) -> Iterator[Platform]:
    # A short path: Ray's sockets are below it.
    home = Path(tempfile.mkdtemp(prefix="hr-"))
    (home / "artifacts").symlink_to(compiled_home / "artifacts")
    shutil.copytree(compiled_home / "names", home / "names")
    shutil.copytree(compiled_home / "trust", home / "trust")
    shutil.copy(home / "names" / f"{MODEL}.json", home / "names" / "smollm2-second.json")
    with Platform(home, [TWO_REPLICAS]) as started:
        yield started
    shutil.rmtree(home)


@pytest.fixture(scope="module")
def undisturbed(platform: Platform) -> Sequence[Any]:
    """What six questions are answered when nothing happens."""
    with Crowd(platform, 6) as crowd:
        return crowd.answers()


def test_the_three_printed_commands_work_and_the_table_matches_the_answers(
    platform: Platform,
) -> None:
    printed = [line for line in platform.output if " chat " in line or line.endswith(" usage\n")]
    first, second, third = (line.strip().split("headrace.deploy.cli ")[-1] for line in printed)
    spoken = shell(platform, f"{first} --json")
    shaped = shell(platform, f"{second} --json")
    table = {
        row["request_id"]: row for row in json.loads(shell(platform, f"{third} --json", raw=True))
    }

    assert len(spoken["text"]) > 40
    assert json.loads(shaped["text"]).keys() == {"city", "country"}
    for answer in (spoken, shaped):
        row = table[answer["request_id"]]
        assert {name: row[name] for name in answer["usage"]} == answer["usage"]
        assert row["charge_nano"] == answer["charge_nano"] > 0
        assert row["outcome"] == "ok"


def shell(platform: Platform, line: str, *, raw: bool = False) -> Any:
    ran = subprocess.run(
        f"{sys.executable} -m headrace.deploy.cli {line}",
        shell=True,
        env={"HEADRACE_HOME": str(platform.home), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout if raw else json.loads(ran.stdout)


def test_torch_is_in_no_serving_process(platform: Platform) -> None:
    mapped = {pid: Path(f"/proc/{pid}/maps").read_text() for pid, _ in platform.processes()}

    assert len(mapped) > 6
    assert not [pid for pid, maps in mapped.items() if "libtorch" in maps]


def test_an_engine_with_the_int8_model_takes_less_than_900_mb(platform: Platform) -> None:
    for pid in platform.replicas():
        status = Path(f"/proc/{pid}/status").read_text()
        (peak_kb,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))

        assert int(peak_kb) * 1024 <= 900e6


def test_nothing_listens_beyond_this_machine(platform: Platform) -> None:
    """A laptop in a café must not offer its engines to the room."""
    inodes: set[str] = set()
    for pid, _ in platform.processes():
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            target = descriptor.readlink().name if descriptor.is_symlink() else ""
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    listening = {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "0" * 24 + "01000000"}

    assert listening
    assert listening <= loopback


def test_a_second_platform_at_the_same_home_is_refused(platform: Platform) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        platform.command("serve")

    assert refused.value.returncode == 3
    assert "Another `headrace serve` runs with" in refused.value.stderr


def test_an_engine_that_is_killed_is_not_noticed(
    platform: Platform, undisturbed: Sequence[Any]
) -> None:
    """Answers go on elsewhere from the tokens that had arrived, to the same end and charge."""
    with Crowd(platform, 6) as crowd:
        platform.kill(platform.replicas()[0])
        answers = crowd.answers()

    assert answers == undisturbed
    wait_until_whole(platform)


def test_a_dead_control_store_stops_nothing_and_comes_back(
    platform: Platform, undisturbed: Sequence[Any]
) -> None:
    before = platform.replicas()
    with Crowd(platform, 6) as crowd:
        platform.kill(platform.pid_of("gcs_server"))
        answers = crowd.answers()
    platform.until("control store was started again")

    assert answers == undisturbed
    assert platform.replicas() == before


def test_engines_are_still_healed_after_that_and_after_a_dead_controller(
    platform: Platform,
) -> None:
    before = platform.replicas()
    platform.kill(platform.pid_of("ray::ServeController"))
    platform.kill(before[0])
    wait_until_whole(platform)

    assert before[0] not in platform.replicas()


def test_a_dead_control_process_stops_nothing_and_comes_back(
    platform: Platform, undisturbed: Sequence[Any]
) -> None:
    before = platform.replicas()
    with Crowd(platform, 6) as crowd:
        platform.kill(platform.pid_of("headrace.deploy.control"))
        answers = crowd.answers()
    platform.until("control is back")

    assert answers == undisturbed
    assert platform.replicas() == before


def test_an_upgrade_under_load_fails_no_answer(platform: Platform) -> None:
    """New engines come beside the old ones, which finish what they have."""
    old_version, old_engines = served(platform)[MODEL].version, platform.replicas()
    failures: list[BaseException] = []
    versions: set[str] = set()
    is_over = threading.Event()

    def keep_asking() -> None:
        while not is_over.is_set():
            try:
                stream = ask(platform)
            except RemoteRefusal as refusal:
                failures.append(refusal)
            else:
                assert stream.usage is not None
                versions.add(stream.usage.model_version)

    askers = [threading.Thread(target=keep_asking) for _ in range(3)]
    with Crowd(platform, 4) as crowd:
        for asker in askers:
            asker.start()
        platform.configure([UPGRADED])
        platform.until_ended(old_engines)
        answers = crowd.answers()
    is_over.set()
    for asker in askers:
        asker.join()

    assert failures == []
    assert len(answers) == 4
    assert old_version in versions
    assert served(platform)[MODEL].version != old_version
    assert ask(platform).usage is not None


def served(platform: Platform) -> dict[str, pb.Model]:
    with platform.client() as client:
        return {model.name: model for model in client.models()}


def test_a_second_model_comes_and_goes_beside_the_first(platform: Platform) -> None:
    before = platform.replicas(MODEL)
    platform.configure([UPGRADED, SECOND])
    platform.until("smollm2-second: running (1 running)")
    answer = ask(platform, model="smollm2-second")
    platform.configure([UPGRADED])
    platform.until("smollm2-second: no longer served")

    assert len(answer.token_ids) == 8
    assert platform.replicas(MODEL) == before


def test_a_change_that_asks_for_what_is_not_there_changes_nothing(platform: Platform) -> None:
    before = platform.replicas(MODEL)
    platform.configure([UPGRADED, {"name": "no-such-model"}])
    said = platform.until("the change was not applied")

    assert "no-such-model" in said
    assert platform.replicas(MODEL) == before
    assert len(ask(platform).token_ids) == 8
    platform.configure([UPGRADED])


def test_a_dead_frontend_comes_back_at_its_address_and_closes_its_books(
    platform: Platform,
) -> None:
    request = question(1, tokens=400)
    request.request_id = "cut-off"
    stream = Stream()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(stream.read, platform, request)
        assert stream.reached.wait(60)
        platform.kill(platform.pid_of("headrace.deploy.frontend_main"))
        with pytest.raises(RemoteRefusal):
            reading.result(60)
    platform.until("frontend is back")
    wait_for_answer(platform)
    with ledgers.local(Config.load(platform.home)) as ledger:
        (record,) = LedgerReader(ledger).records(Which(request_id="cut-off"))

    # Expired: it died before the first checkpoint, a second or 64 tokens after the first token.
    assert record.outcome in ("recovered", "expired")
    assert record.usage.completion_tokens <= len(stream.token_ids)


def wait_until_whole(platform: Platform) -> None:
    """Until two engines are ready again."""
    for _ in range(600):
        if served(platform)[MODEL].replicas_ready == len(platform.replicas()) == 2:
            return
        threading.Event().wait(0.1)
    raise AssertionError("the lost engine was not replaced in a minute")


def wait_for_answer(platform: Platform) -> Stream:
    """The first answer after an outage; refusals say when to try again."""
    for _ in range(240):
        try:
            return ask(platform)
        except RemoteRefusal as refusal:
            threading.Event().wait((refusal.retry_after_ms or 500) / 1000)
    raise AssertionError("no answer in two minutes")


def test_a_dead_ray_comes_back_with_its_engines(platform: Platform) -> None:
    before = platform.replicas()
    platform.kill(platform.pid_of("raylet/raylet"))
    platform.until("control is back")
    answer = wait_for_answer(platform)

    assert len(answer.token_ids) == 8
    assert not set(platform.replicas()) & set(before)


def ask_for_ever(platform: Platform) -> None:
    while True:
        ask(platform)


def test_sigterm_lets_answers_finish_refuses_new_ones_and_leaves_nothing(
    platform: Platform,
) -> None:
    left = platform.processes()
    with Crowd(platform, 4) as crowd:
        platform.terminate()
        platform.until("Draining")
        with pytest.raises(RemoteRefusal) as refused:
            ask_for_ever(platform)
        answers = crowd.answers()

    assert refused.value.remote_reason in ("DRAINING", "UNAVAILABLE")
    assert [len(token_ids) for _, token_ids, _, _ in answers] == [TOKENS] * 4
    assert platform.wait() == 0
    # The kernel ends Ray's processes when their parent has ended, which takes a moment.
    platform.until_ended([pid for pid, _ in left], timeout_s=20)


def test_a_port_that_is_taken_is_named(platform: Platform) -> None:
    """After the platform above has ended: its home is free."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(subprocess.CalledProcessError) as refused:
            platform.command(
                "serve",
                *("--role", "frontend", "--set", f"frontend.grpc_port={port}"),
                *("--set", "directory.address=127.0.0.1:0"),
            )

    assert refused.value.returncode == 3
    assert f"headrace: 127.0.0.1:{port} cannot be listened on." in refused.value.stderr
