"""What a frontend knows of accounts: all keys in memory, never more than a second behind.

A thread of its own asks the store twice a second what has changed, so that a check does no I/O and
the event loop never waits for a database. When the store cannot be read, what is known stays in
force for a bounded time; after that the view is stale, and every key is refused.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from headrace.serving import log
from headrace.serving.admission.account_reader import Changes
from headrace.serving.admission.account_store import AccountStore
from headrace.serving.admission.key_store import Pepper
from headrace.serving.clock import Clock
from headrace.serving.domain.account import AccountState, ApiKey, Organisation, Project
from headrace.serving.domain.record import Caller
from headrace.serving.errors import ServingError

POLL_S = 0.5
"""How often the store is asked, by a query of a few milliseconds: a revocation holds in 1 s."""
USED_EVERY_MS = 60_000
"""How often the use of one key is noted: to the minute is enough to find keys nobody uses."""
USED_KEYS_MAX = 1_000
"""Keys noted by one transaction: 20 ms."""
WRITE_EVERY_S = 30.0
"""Between two such transactions. A killed frontend forgets no more."""
NEVER_UNIX_MS = 1 << 62

_Subject = tuple[str, str]
"""Organisation and project; an empty project is the organisation itself."""


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A key that is not revoked, as a check needs it."""

    caller: Caller
    digest: bytes
    pepper_id: str
    expires_unix_ms: int


class AccountView:
    """Any thread may call.

    Whoever refreshes sets and removes single entries, so a check, which takes no lock, sees an
    entry as it was or as it is.
    """

    def __init__(self, store: AccountStore, *, clock: Clock, stale_s: float) -> None:
        """Reads everything once. Blocks.

        Raises:
            ConfigRefused: a pepper cannot be read.
            AccountsUnavailable: the store cannot be read.
        """
        self._store = store
        self._clock = clock
        self._stale_ms = stale_s * 1000
        self._version = 0
        self._keys: dict[str, KnownKey] = {}
        self._suspended: set[_Subject] = set()
        self._used: dict[str, int] = {}
        self._noted: dict[str, int] = {}
        self._fresh_ms = -1.0
        self._readable = True
        self._refreshing = threading.Lock()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self.refresh()

    @property
    def pepper(self) -> Pepper:
        """The current one."""
        return self._store.peppers.current

    @property
    def peppers(self) -> Mapping[str, Pepper]:
        """Those that are active, by id."""
        return self._store.peppers.active

    @property
    def is_stale(self) -> bool:
        """Whether the store has not been read for so long that no key may pass."""
        return self._clock.monotonic_ms() - self._fresh_ms > self._stale_ms

    def key(self, key_id: str) -> KnownKey | None:
        """None for a key that is unknown or revoked."""
        return self._keys.get(key_id)

    def is_suspended(self, caller: Caller) -> bool:
        suspended = self._suspended
        if not suspended:
            return False
        tenant_id = caller.tenant_id
        return (tenant_id, "") in suspended or (tenant_id, caller.project_id) in suspended

    def used(self, key_id: str, now_unix_ms: int) -> None:
        """The key opened the door. Written later, at most once a minute."""
        if now_unix_ms - self._noted.get(key_id, 0) >= USED_EVERY_MS:
            self._noted[key_id] = now_unix_ms
            self._used[key_id] = now_unix_ms

    def refresh(self) -> None:
        """One round: read what has changed. Blocks.

        Raises:
            ServingError: it cannot be read; what was known stays, and grows older.
        """
        with self._refreshing:
            began_ms = self._clock.monotonic_ms()
            # First: a key that stands on a fresh pepper was made after it.
            self._store.peppers.refresh()
            changes = self._store.changes_since(self._version)
            self._apply(changes)
            self._version = changes.version
            self._fresh_ms = began_ms

    def write_used(self) -> None:
        """Store what `used` has gathered, in bounded transactions.

        Raises:
            AccountsUnavailable: the store cannot be written; these uses are forgotten.
        """
        while self._used:
            # Taken one by one: the event loop may be adding others.
            count = min(len(self._used), USED_KEYS_MAX)
            self._store.note_used(dict(self._used.popitem() for _ in range(count)))

    def start(self) -> None:
        """Refresh twice a second from now on, in a thread; and write uses, in another.

        Writing may wait for another process's change, and a revocation must not.
        """
        loops = {"account-view": self._follow, "account-uses": self._note}
        for name, loop in loops.items():
            self._threads.append(threading.Thread(target=loop, name=name, daemon=True))
            self._threads[-1].start()

    def close(self) -> None:
        """Stop, and store what is gathered. Blocks for a transaction or two; idempotent."""
        self._stopping.set()
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.join()
        if threads:
            self._write_gathered()

    def _follow(self) -> None:
        while not self._stopping.wait(POLL_S):
            self._attempt()

    def _note(self) -> None:
        while not self._stopping.wait(WRITE_EVERY_S):
            self._write_gathered()

    def _attempt(self) -> None:
        """A round that says in the log when an outage begins, and when it ends."""
        try:
            self.refresh()
        except ServingError as error:
            if self._readable:
                log.accounts_unreadable(what=error.what, stale_s=self._stale_ms / 1000)
            self._readable = False
        except Exception as error:  # The thread's root: a defect must not end the rounds.
            log.crashed(during="reading accounts", error=error)
            self._readable = False
        else:
            if not self._readable:
                log.accounts_readable()
            self._readable = True

    def _write_gathered(self) -> None:
        try:
            self.write_used()
        except ServingError as error:
            log.refused(error, during="noting when keys were used")
        except Exception as error:  # The thread's root: a defect must not end the rounds.
            log.crashed(during="noting when keys were used", error=error)

    def _apply(self, changes: Changes) -> None:
        if changes.is_whole:
            # In one assignment each: between two of them a check sees at worst the older state.
            self._noted = {}
            self._keys = {key.key_id: _known(key) for key in changes.keys if _passes(key)}
            self._suspended = {
                _subject(each)
                for each in (*changes.organisations, *changes.projects)
                if each.state is AccountState.SUSPENDED
            }
            return
        for each in (*changes.organisations, *changes.projects):
            if each.state is AccountState.SUSPENDED:
                self._suspended.add(_subject(each))
            else:
                self._suspended.discard(_subject(each))
        for key in changes.keys:
            if _passes(key):
                self._keys[key.key_id] = _known(key)
            else:
                self._keys.pop(key.key_id, None)
                self._noted.pop(key.key_id, None)


def _passes(key: ApiKey) -> bool:
    return key.revoked_unix_ms is None


def _known(key: ApiKey) -> KnownKey:
    return KnownKey(
        caller=Caller(key.tenant_id, key.key_id, key.project_id, key.scope),
        digest=bytes.fromhex(key.digest),
        pepper_id=key.pepper_id,
        expires_unix_ms=NEVER_UNIX_MS if key.expires_unix_ms is None else key.expires_unix_ms,
    )


def _subject(each: Organisation | Project) -> _Subject:
    return each.tenant_id, each.project_id if isinstance(each, Project) else ""
