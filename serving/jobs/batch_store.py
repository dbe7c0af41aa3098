"""Durable batches: one row each, and the commit that makes a result count exactly once.

A group of results is appended to the batch's file and fsynced, and then one transaction moves the
committed length, the bitmap of done lines and the counts. The transaction begins before the file is
touched and checks the lease, so of two frontends that both believe they run a batch one writes.
What a process had appended without committing is cut off by the next append: a torn tail repairs
itself, and no line ever has two results.

A lease has an owner and an end. It is free when the end has passed or its owner's process is dead.
"""

import os
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from headrace.serving.domain.batch import MOVES, Batch, BatchState, LineResult
from headrace.serving.errors import AccountNotFound, ConfigRefused, InvalidRequest, Overloaded
from headrace.serving.jobs import batch_files
from headrace.serving.jobs import batch_rows as rows
from headrace.serving.jobs.batch_rows import DoneLines, Execute

LEASE_MS = 15_000
"""Three missed renewals; a dead process on this machine is noticed at once anyway."""
SWEEP_BATCHES = 10
"""Batches that one round removes: each may be 400 MB of files."""
DEBTS_MAX = 100
"""Debts of one round."""
BUSY_MS = 5_000
"""How long a transaction waits for another process's, which may be syncing a results file."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run a batch until it lapses."""

    batch: Batch
    done: DoneLines
    begun: int
    """Lines after this one were never run, by any process."""


class LeaseLost(Exception):
    """Another frontend runs the batch, or it was deleted."""


class BatchStore:
    """The batches of one home, shared by its frontends. Blocks; any thread may call.

    Every method raises Overloaded when the database does not answer, and StorageFull when the disk
    takes no more; trying again is harmless.
    """

    def __init__(
        self, folder: Path, *, owner: str, is_alive: Callable[[str], bool] = lambda _: True
    ) -> None:
        """Open `folder`/batches.db, made when missing.

        Args:
            folder: of all batches; each has one of its own in it.
            owner: names this life of this process.
            is_alive: whether another owner's process lives.

        Raises:
            ConfigRefused: the file is of another version, or cannot be opened.
        """
        self._folder = folder
        self._owner = owner
        self._is_alive = is_alive
        self._lock = threading.Lock()
        path = folder / "batches.db"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._connection = sqlite3.connect(
                path, timeout=BUSY_MS / 1000, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._ensure_schema(path)
        except (OSError, sqlite3.Error, Overloaded) as error:
            raise ConfigRefused(
                f"The batches in {folder} cannot be opened: {error}.",
                why="Requests, results and their states are kept there.",
                fix="Check the folder's owner and its free space.",
            ) from error

    def folder_of(self, batch_id: str) -> Path:
        return self._folder / batch_id

    def create(self, batch: Batch, *, now_unix_ms: int, open_max: int, bytes_max: int) -> None:
        """Note a batch whose upload begins; it is VALIDATING until `enqueue` or `forget`.

        Raises:
            InvalidRequest: the project has `open_max` batches that have not ended, or all
                batches together occupy `bytes_max`.
        """
        with self._transaction() as execute:
            whose = (batch.tenant_id, batch.project_id)
            (num_open,) = execute(rows.COUNT_OPEN, whose).fetchone()
            (stored,) = execute("SELECT coalesce(sum(input_bytes), 0) FROM batch", ()).fetchone()
            if num_open >= open_max:
                raise _too_many(num_open)
            if stored >= bytes_max:
                raise _too_large(stored)
            execute(
                rows.INSERT,
                (
                    batch.batch_id,
                    batch.tenant_id,
                    batch.project_id,
                    batch.key_id,
                    batch.created_unix_ms,
                    batch.expires_unix_ms,
                    self._owner,
                    now_unix_ms + LEASE_MS,
                ),
            )

    def enqueue(self, batch_id: str, *, lines: int, input_bytes: int) -> Batch:
        """Its requests are durable: it may be run."""
        with self._transaction() as execute:
            self._check_move(execute, batch_id, BatchState.QUEUED)
            execute(
                "UPDATE batch SET state = 'queued', lines = ?, input_bytes = ?, owner = '', "
                "lease_unix_ms = 0 WHERE batch_id = ?",
                (lines, input_bytes, batch_id),
            )
            return self._get(execute, batch_id)

    def get(self, batch_id: str, *, tenant_id: str, project_id: str) -> Batch:
        """One batch of this project.

        Raises:
            AccountNotFound: it has no such batch.
        """
        with self._reading() as execute:
            found = execute(
                f"{rows.SELECT} WHERE batch_id = ? AND tenant_id = ? AND project_id = ?",
                (batch_id, tenant_id, project_id),
            ).fetchall()
        if not found:
            raise not_found(batch_id)
        return rows.batch_of(found[0])

    def list(self, *, tenant_id: str, project_id: str, limit: int) -> Sequence[Batch]:
        """The newest first."""
        with self._reading() as execute:
            found = execute(
                f"{rows.SELECT} WHERE tenant_id = ? AND project_id = ? "
                "ORDER BY created_unix_ms DESC, batch_id LIMIT ?",
                (tenant_id, project_id, limit),
            ).fetchall()
        return [rows.batch_of(row) for row in found]

    def cancel(self, batch_id: str) -> Batch:
        """Ask for its end; whoever runs it, or a runner that finds it, brings it about."""
        with self._transaction() as execute:
            batch = self._get(execute, batch_id)
            if BatchState.CANCELLING in MOVES[batch.state]:
                execute("UPDATE batch SET state = 'cancelling' WHERE batch_id = ?", (batch_id,))
            return self._get(execute, batch_id)

    def forget(self, batch_id: str) -> None:
        """Remove its row, then its files; a crash between is made good by the next sweep."""
        with self._transaction() as execute:
            execute("DELETE FROM batch WHERE batch_id = ?", (batch_id,))
        batch_files.remove(self.folder_of(batch_id))

    def lease(self, *, now_unix_ms: int, without: Collection[str] = ()) -> Lease | None:
        """Take a batch that nobody runs, to run it or to end it; None when there is none.

        `without` are those that this process runs: after a stall our own lease may have lapsed.
        """
        with self._transaction() as execute:
            found = execute(rows.SELECT_CANDIDATES, (now_unix_ms,)).fetchall()
            for owner, lease_unix_ms, *row in found:
                batch = rows.batch_of(row)
                if batch.batch_id in without:
                    continue
                is_held = bool(owner) and lease_unix_ms > now_unix_ms
                if is_held and (owner == self._owner or self._is_alive(owner)):
                    continue
                execute(rows.SET_LEASE, (self._owner, now_unix_ms + LEASE_MS, batch.batch_id))
                if batch.state is BatchState.QUEUED:
                    self._move(execute, batch.batch_id, BatchState.RUNNING, now_unix_ms)
                bits, begun = execute(
                    "SELECT done, begun FROM batch WHERE batch_id = ?", (batch.batch_id,)
                ).fetchone()
                return Lease(self._get(execute, batch.batch_id), DoneLines(bits), begun)
        return None

    def renew(self, batch_id: str, *, now_unix_ms: int) -> Batch:
        """Keep the lease; says what became of the batch meanwhile.

        Raises:
            LeaseLost: it is another's.
        """
        with self._transaction() as execute:
            self._check_lease(execute, batch_id)
            execute(rows.SET_LEASE, (self._owner, now_unix_ms + LEASE_MS, batch_id))
            return self._get(execute, batch_id)

    def begin(self, batch_id: str, *, up_to: int) -> None:
        """Lines up to this one may have been run, whatever becomes of this process.

        Raises:
            LeaseLost: the batch is another's.
        """
        with self._transaction() as execute:
            self._check_lease(execute, batch_id)
            execute("UPDATE batch SET begun = ? WHERE batch_id = ?", (up_to, batch_id))

    def commit(
        self, batch_id: str, results: Sequence[LineResult], *, now_unix_ms: int
    ) -> Sequence[LineResult]:
        """Make results durable, once for each line; answers those that were new.

        Raises:
            LeaseLost: it is another's to write.
        """
        with self._transaction() as execute:
            self._check_lease(execute, batch_id)
            at, bits = execute(
                "SELECT results_bytes, done FROM batch WHERE batch_id = ?", (batch_id,)
            ).fetchone()
            done = DoneLines(bits)
            fresh: list[LineResult] = []
            for result in results:
                if result.line not in done:
                    done.add(result.line)
                    fresh.append(result)
            text = b"".join(result.text for result in fresh)
            try:
                end = batch_files.append_results(self.folder_of(batch_id), at=at, text=text)
            except OSError as error:
                raise batch_files.full(error) from error
            execute(
                rows.ADD_RESULTS,
                (
                    *rows.results_row(fresh),
                    end,
                    bytes(done),
                    now_unix_ms + LEASE_MS,
                    batch_id,
                ),
            )
        return fresh

    def move(self, batch_id: str, state: BatchState, *, now_unix_ms: int, why: str = "") -> Batch:
        """Our batch enters `state`, and is no longer ours unless it runs.

        Raises:
            LeaseLost: it is another's, or it may not go there from where it is meanwhile.
        """
        with self._transaction() as execute:
            self._check_lease(execute, batch_id)
            if state not in MOVES[self._get(execute, batch_id).state]:
                raise LeaseLost
            self._move(execute, batch_id, state, now_unix_ms, why)
            execute(rows.SET_LEASE, ("", 0, batch_id))
            return self._get(execute, batch_id)

    def owe(self, *, tenant_id: str, request_id: str) -> None:
        """Remember that this request's charge is to be given back. Idempotent."""
        with self._transaction() as execute:
            execute("INSERT OR IGNORE INTO debt VALUES (?, ?)", (tenant_id, request_id))

    def debts(self) -> Sequence[tuple[str, str]]:
        """Tenant and request id, at most DEBTS_MAX."""
        with self._reading() as execute:
            return execute("SELECT * FROM debt LIMIT ?", (DEBTS_MAX,)).fetchall()

    def paid(self, *, tenant_id: str, request_id: str) -> None:
        with self._transaction() as execute:
            execute(
                "DELETE FROM debt WHERE tenant_id = ? AND request_id = ?", (tenant_id, request_id)
            )

    def sweep(self, *, now_unix_ms: int, keep_ms: int) -> int:
        """End uploads of dead processes, and remove what ended long ago; answers how many.

        At most SWEEP_BATCHES of each.
        """
        with self._transaction() as execute:
            uploads = execute(
                "SELECT batch_id, owner, lease_unix_ms FROM batch WHERE state = 'validating'", ()
            ).fetchall()
            dead = [
                batch_id
                for batch_id, owner, _ in uploads
                if owner != self._owner and not self._is_alive(owner)
            ][:SWEEP_BATCHES]
            for batch_id in dead:
                self._move(
                    execute, batch_id, BatchState.FAILED, now_unix_ms, "its upload was cut off"
                )
            old = execute(
                "SELECT batch_id FROM batch WHERE finished_unix_ms <= ? LIMIT ?",
                (now_unix_ms - keep_ms, SWEEP_BATCHES),
            ).fetchall()
        for (batch_id,) in old:
            self.forget(batch_id)
        return len(dead) + len(old) + self._remove_strays()

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._connection.close()

    def _remove_strays(self) -> int:
        """Folders without a row: a crash came between the two. A row is always made first."""
        with self._reading() as execute:
            known = {name for (name,) in execute("SELECT batch_id FROM batch", ()).fetchall()}
            strays = [
                entry
                for entry in self._folder.iterdir()
                if entry.is_dir() and entry.name not in known
            ]
        for folder in strays[:SWEEP_BATCHES]:
            batch_files.remove(folder)
        return len(strays[:SWEEP_BATCHES])

    def _check_lease(self, execute: Execute, batch_id: str) -> None:
        row = execute("SELECT owner FROM batch WHERE batch_id = ?", (batch_id,)).fetchone()
        if row is None or row[0] != self._owner:
            raise LeaseLost

    def _check_move(self, execute: Execute, batch_id: str, state: BatchState) -> None:
        now = self._get(execute, batch_id).state
        assert state in MOVES[now], f"a batch does not go from {now} to {state}"

    def _move(
        self,
        execute: Execute,
        batch_id: str,
        state: BatchState,
        now_unix_ms: int,
        why: str = "",
    ) -> None:
        self._check_move(execute, batch_id, state)
        started = now_unix_ms if state is BatchState.RUNNING else None
        finished = now_unix_ms if state.is_final else None
        execute(rows.SET_STATE, (state.value, why, started, finished, batch_id))

    def _get(self, execute: Execute, batch_id: str) -> Batch:
        row = execute(f"{rows.SELECT} WHERE batch_id = ?", (batch_id,)).fetchone()
        if row is None:
            raise not_found(batch_id)
        return rows.batch_of(row)

    def _ensure_schema(self, path: Path) -> None:
        with self._transaction() as execute:
            (version,) = execute("PRAGMA user_version", ()).fetchone()
            if version == rows.SCHEMA_VERSION:
                return
            if version:
                raise ConfigRefused(
                    f"{path} has format {version}; this Headrace writes {rows.SCHEMA_VERSION}.",
                    why="Writing to a newer file could lose what its format added.",
                    fix="Upgrade Headrace, or set HEADRACE_HOME to another folder.",
                )
            for statement in rows.SCHEMA.split(";\n"):
                execute(statement, ())
            execute(f"PRAGMA user_version = {rows.SCHEMA_VERSION}", ())

    @contextmanager
    def _reading(self) -> Iterator[Execute]:
        try:
            with self._lock:
                yield self._connection.execute
        except sqlite3.Error as error:
            raise _unavailable(error) from error

    @contextmanager
    def _transaction(self) -> Iterator[Execute]:
        with self._reading() as execute:
            execute("BEGIN IMMEDIATE", ())
            try:
                yield execute
                execute("COMMIT", ())
            except BaseException:
                if self._connection.in_transaction:
                    execute("ROLLBACK", ())
                raise


def not_found(batch_id: str) -> AccountNotFound:
    return AccountNotFound(
        f"There is no batch {batch_id[:64]!r}.",
        why="It was deleted, or belongs to another project.",
        fix="See `headrace batch list`.",
        field="batch_id",
    )


def _unavailable(error: sqlite3.Error) -> Overloaded:
    return Overloaded(
        f"The batches cannot be looked up: {error}.",
        why="Their database is busy, or its disk does not answer.",
        fix="Retry with jitter. Operator: check the disk under HEADRACE_HOME.",
        retry_after_ms=1_000,
    )


def _too_many(num_open: int) -> InvalidRequest:
    return InvalidRequest(
        f"This project has {num_open} batches that have not ended.",
        why="That is the bound of batch.open_max.",
        fix="Wait for one of them, or cancel it.",
    )


def _too_large(stored: int) -> InvalidRequest:
    return InvalidRequest(
        f"All batches together occupy {stored:,} bytes.",
        why="That is the bound of batch.stored_mb_max.",
        fix="Delete batches that have ended.",
    )
