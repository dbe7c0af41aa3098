"""What the store of batches promises: legal moves, one writer, one result a line, whatever dies."""

import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.serving.domain.batch import MOVES, Batch, BatchState, LineResult, LineStatus
from headrace.serving.domain.usage import Usage
from headrace.serving.errors import AccountNotFound, InvalidRequest
from headrace.serving.jobs import batch_files
from headrace.serving.jobs.batch_store import LEASE_MS, BatchStore, Lease, LeaseLost

LINES = 12
MINE = {"tenant_id": "acme", "project_id": "default"}


def a_batch(name: str = "batch_1", tenant_id: str = "acme") -> Batch:
    return Batch(
        batch_id=name,
        tenant_id=tenant_id,
        project_id="default",
        key_id="k1",
        state=BatchState.VALIDATING,
        created_unix_ms=1,
        expires_unix_ms=1_000_000,
    )


def result(line: int, status: LineStatus = LineStatus.SUCCEEDED) -> LineResult:
    is_paid = status is LineStatus.SUCCEEDED
    return LineResult(
        line=line,
        status=status,
        text=json.dumps({"line": line}).encode() + b"\n",
        usage=Usage(prompt_tokens=3, completion_tokens=2) if is_paid else Usage(),
        charge_nano=7 if is_paid else 0,
        currency="USD" if is_paid else "",
    )


def uploads(store: BatchStore, name: str = "batch_1", lines: int = LINES) -> None:
    store.create(a_batch(name), now_unix_ms=1, open_max=10, bytes_max=1 << 30)
    writer = batch_files.RequestsWriter(store.folder_of(name))
    for number in range(lines):
        writer.add(b"request %d" % number)
    writer.finish()
    store.enqueue(name, lines=lines, input_bytes=writer.size)


def lines_in(folder: Path, batch: Batch) -> list[int]:
    """What a reader gets: the committed part of the file."""
    if not batch.results_bytes:
        return []
    raw = batch_files.read_results(folder, offset=0, size=batch.results_bytes)
    assert len(raw) == batch.results_bytes
    return [json.loads(line)["line"] for line in raw.splitlines()]


def leased(store: BatchStore, now_unix_ms: int = 1) -> Lease:
    lease = store.lease(now_unix_ms=now_unix_ms)
    assert lease is not None
    return lease


def test_one_frontend_runs_a_batch_until_its_lease_lapses(tmp_path: Path) -> None:
    a, b = BatchStore(tmp_path, owner="a"), BatchStore(tmp_path, owner="b")
    uploads(a)
    assert leased(a).batch.state is BatchState.RUNNING
    assert b.lease(now_unix_ms=LEASE_MS) is None
    a.renew("batch_1", now_unix_ms=LEASE_MS)
    assert b.lease(now_unix_ms=2 * LEASE_MS - 1) is None
    assert leased(b, 2 * LEASE_MS).batch.batch_id == "batch_1"

    for stale in (
        lambda: a.renew("batch_1", now_unix_ms=1),
        lambda: a.commit("batch_1", [result(1)], now_unix_ms=1),
        lambda: a.move("batch_1", BatchState.COMPLETED, now_unix_ms=1),
        lambda: a.begin("batch_1", up_to=5),
    ):
        with pytest.raises(LeaseLost):
            stale()


def test_a_dead_process_has_no_lease(tmp_path: Path) -> None:
    a = BatchStore(tmp_path, owner="a")
    b = BatchStore(tmp_path, owner="b", is_alive=lambda owner: owner != "a")
    uploads(a)
    leased(a)

    assert leased(b).batch.batch_id == "batch_1"


def test_results_go_on_after_what_was_committed(tmp_path: Path) -> None:
    """The dead process had appended half a line without committing it."""
    a = BatchStore(tmp_path, owner="a")
    uploads(a)
    leased(a)
    a.begin("batch_1", up_to=6)
    a.commit("batch_1", [result(3), result(1)], now_unix_ms=1)
    with open(a.folder_of("batch_1") / "results.jsonl", "ab") as file:
        file.write(b'{"line": 4}\n{"li')
    b = BatchStore(tmp_path, owner="b", is_alive=lambda _: False)
    lease = leased(b)
    fresh = b.commit("batch_1", [result(3), result(4)], now_unix_ms=1)

    assert [1 in lease.done, 3 in lease.done, 4 in lease.done] == [True, True, False]
    assert lease.begun == 6
    assert [each.line for each in fresh] == [4]
    batch = b.get("batch_1", **MINE)
    assert lines_in(b.folder_of("batch_1"), batch) == [3, 1, 4]
    assert (batch.counts.succeeded, batch.charge_nano, batch.usage.prompt_tokens) == (3, 21, 9)


def test_whatever_statement_is_the_last_one_the_batch_is_whole(tmp_path: Path) -> None:
    """The folder is copied before every statement, as a kill would leave it, and opened again."""
    home = tmp_path / "home"
    copies: list[tuple[Path, set[int]]] = []
    committed: set[int] = set()
    store = BatchStore(home, owner="a")
    uploads(store)

    def before(_: str) -> None:
        copy = tmp_path / f"killed-at-{len(copies)}"
        shutil.copytree(home, copy, ignore=shutil.ignore_patterns("*-shm"))
        copies.append((copy, set(committed)))

    store._connection.set_trace_callback(before)
    leased(store)
    for group in ([1, 2], [3], [4, 5, 6]):
        store.commit("batch_1", [result(each) for each in group], now_unix_ms=1)
        committed.update(group)
    store.move("batch_1", BatchState.QUEUED, now_unix_ms=1)
    store._connection.set_trace_callback(None)
    assert len(copies) > 15

    for copy, was_committed in copies:
        after = BatchStore(copy, owner="b", is_alive=lambda _: False)
        lease = leased(after)
        missing = [each for each in range(1, LINES + 1) if each not in lease.done]
        after.commit("batch_1", [result(each) for each in missing], now_unix_ms=1)
        batch = after.move("batch_1", BatchState.COMPLETED, now_unix_ms=1)

        assert not was_committed & set(missing)
        found = lines_in(after.folder_of("batch_1"), batch)
        assert sorted(found) == list(range(1, LINES + 1))
        assert batch.charge_nano == 7 * LINES
        after.close()


def test_an_upload_that_died_has_failed_and_its_files_go(tmp_path: Path) -> None:
    a = BatchStore(tmp_path, owner="a")
    a.create(a_batch(), now_unix_ms=1, open_max=10, bytes_max=1 << 30)
    batch_files.RequestsWriter(a.folder_of("batch_1")).close()
    (tmp_path / "batch_stray").mkdir()
    b = BatchStore(tmp_path, owner="b", is_alive=lambda owner: owner == "b")
    assert a.sweep(now_unix_ms=5, keep_ms=10) == 1, "only the stray folder: its own upload goes on"
    assert b.sweep(now_unix_ms=5, keep_ms=10) == 1
    assert b.get("batch_1", **MINE).state is BatchState.FAILED
    assert b.sweep(now_unix_ms=15, keep_ms=10) == 1

    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == []
    with pytest.raises(AccountNotFound):
        b.get("batch_1", **MINE)


def test_a_project_has_so_many_open_batches_and_no_more(tmp_path: Path) -> None:
    store = BatchStore(tmp_path, owner="a")
    for number in range(2):
        store.create(a_batch(f"batch_{number}"), now_unix_ms=1, open_max=2, bytes_max=1)
    with pytest.raises(InvalidRequest, match=r"batch\.open_max"):
        store.create(a_batch("batch_3"), now_unix_ms=1, open_max=2, bytes_max=1)

    store.create(a_batch("batch_4", "globex"), now_unix_ms=1, open_max=2, bytes_max=1)
    store.enqueue("batch_4", lines=1, input_bytes=5)
    with pytest.raises(InvalidRequest, match=r"batch\.stored_mb_max"):
        store.create(a_batch("batch_5", "initech"), now_unix_ms=1, open_max=2, bytes_max=5)


def test_tenants_take_turns(tmp_path: Path) -> None:
    store = BatchStore(tmp_path, owner="a")
    for number, tenant in enumerate(["acme", "acme", "globex"]):
        name = f"batch_{number}"
        store.create(a_batch(name, tenant), now_unix_ms=1, open_max=9, bytes_max=1 << 30)
        store.enqueue(name, lines=1, input_bytes=1)
    order = [leased(store).batch.batch_id for _ in range(3)]

    assert order == ["batch_0", "batch_2", "batch_1"]


def test_requests_that_were_damaged_are_not_run(tmp_path: Path) -> None:
    store = BatchStore(tmp_path, owner="a")
    uploads(store)
    path = store.folder_of("batch_1") / "requests"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(batch_files.Damaged):
        list(batch_files.requests(path.parent, lines=LINES, without=()))
    path.write_bytes(raw[:-20])
    with pytest.raises(batch_files.Damaged):
        list(batch_files.requests(path.parent, lines=LINES, without=()))


class LifeOfABatch(RuleBasedStateMachine):
    """Two frontends do what they like with one batch, stop, die and come again."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.now = 1
        self.dead: set[str] = set()
        self.lives = 0
        self.stores = [self.opened(), self.opened()]
        self.leases: dict[int, bool] = {0: False, 1: False}
        uploads(self.stores[0])
        self.state = BatchState.QUEUED

    def opened(self) -> BatchStore:
        self.lives += 1
        return BatchStore(
            self.folder, owner=f"life-{self.lives}", is_alive=lambda owner: owner not in self.dead
        )

    @property
    def batch(self) -> Batch:
        return self.stores[0].get("batch_1", **MINE)

    @rule(who=st.integers(0, 1))
    def takes(self, who: int) -> None:
        lease = self.stores[who].lease(now_unix_ms=self.now)
        self.leases[who] = self.leases[who] or lease is not None

    @rule(
        who=st.integers(0, 1),
        lines=st.lists(st.integers(1, LINES), max_size=4, unique=True),
        status=st.sampled_from(list(LineStatus)),
    )
    def commits(self, who: int, lines: list[int], status: LineStatus) -> None:
        try:
            self.stores[who].commit(
                "batch_1", [result(each, status) for each in lines], now_unix_ms=self.now
            )
        except LeaseLost:
            self.leases[who] = False

    @rule(who=st.integers(0, 1), state=st.sampled_from(list(BatchState)))
    def moves(self, who: int, state: BatchState) -> None:
        before = self.batch.state
        try:
            self.stores[who].move("batch_1", state, now_unix_ms=self.now)
        except LeaseLost:
            assert self.batch.state is before

    @rule()
    def is_cancelled(self) -> None:
        self.stores[0].cancel("batch_1")

    @rule(who=st.integers(0, 1))
    def dies(self, who: int) -> None:
        self.dead.add(self.stores[who]._owner)
        self.stores[who].close()
        self.stores[who] = self.opened()

    @rule(ms=st.integers(0, 2 * LEASE_MS))
    def time_passes(self, ms: int) -> None:
        self.now += ms

    @precondition(lambda self: not self.state.is_final)
    @rule(junk=st.binary(max_size=20))
    def a_tail_is_torn(self, junk: bytes) -> None:
        with open(self.folder / "batch_1" / "results.jsonl", "ab") as file:
            file.write(junk)

    @invariant()
    def every_move_is_legal(self) -> None:
        state = self.batch.state
        # A rule may take it through RUNNING: a lease, and nothing else, does so.
        assert state is self.state or state in MOVES[self.state]
        self.state = state

    @invariant()
    def each_line_has_at_most_one_result_and_counts_agree(self) -> None:
        batch = self.batch
        found = lines_in(self.folder / "batch_1", batch)
        assert max(Counter(found).values(), default=1) == 1
        assert len(found) == batch.counts.done <= LINES
        assert batch.charge_nano == 7 * batch.counts.succeeded

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        shutil.rmtree(self.folder)


TestLifeOfABatch = LifeOfABatch.TestCase
TestLifeOfABatch.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
