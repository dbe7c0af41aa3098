"""Key to caller, by digest, in constant time."""

import hmac
import os
import re
from collections.abc import Mapping

from headrace.serving import log
from headrace.serving.admission.key_store import KeyStore, StoredKey
from headrace.serving.clock import Clock
from headrace.serving.domain.record import Caller
from headrace.serving.errors import ConfigRefused, Unauthenticated

KEY_CHARS_MAX = 128
"""Ours have 44. A longer text is refused before it is looked at."""
RELOAD_MS = 500
"""How often the key file's time stamp is looked at: a revocation holds within a second."""

_SHAPE = re.compile(r"hr_([0-9a-z]{1,16})_[0-9A-Za-z]{16,64}")
_FileStamp = tuple[int, int, int] | None


class Authenticator:
    """Checks presented keys against the key file, which it reads again when it has changed.

    Belongs to one thread, the event loop's. A check takes about 3 us and no lock.
    """

    def __init__(self, keys: KeyStore, *, clock: Clock) -> None:
        """Reads the key file once.

        Raises:
            ConfigRefused: the file is there and cannot be read.
        """
        self._store = keys
        self._clock = clock
        self._stamp = self._file_stamp()
        self._keys: Mapping[str, StoredKey] = keys.read()
        self._checked_ms = clock.monotonic_ms()
        # What an unknown id is compared with, so that it takes the time of a known one.
        self._nobody = keys.digest("nobody")

    def authenticate(self, presented: str) -> Caller:
        """Who presents this key. `presented` is the bare key, without "Bearer ".

        Raises:
            Unauthenticated: it is not a key that is in force. Which part was wrong is not said.
        """
        self._reload_if_changed()
        if len(presented) > KEY_CHARS_MAX or not (shape := _SHAPE.fullmatch(presented)):
            raise _refusal()
        stored = self._keys.get(shape[1])
        expected = stored.digest if stored else self._nobody
        matches = hmac.compare_digest(expected, self._store.digest(presented))
        if stored is None or not matches or stored.revoked_unix_ms is not None:
            raise _refusal()
        return Caller(stored.tenant_id, stored.key_id)

    def cache_salt(self, tenant_id: str) -> bytes:
        """16 bytes that keep a tenant's prefix cache apart from every other's.

        From our secret, never from what a caller sends: a salt that could be chosen or guessed
        would let one tenant probe for another's prompts.
        """
        return self._store.derive(f"cache-salt/{tenant_id}")[:16]

    def _reload_if_changed(self) -> None:
        now = self._clock.monotonic_ms()
        if now - self._checked_ms < RELOAD_MS:
            return
        self._checked_ms = now
        stamp = self._file_stamp()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = self._store.read()
        except ConfigRefused as error:
            # Our own writer replaces the file whole, so this is someone's editor: what held a
            # moment ago holds on, and the log says so.
            log.keys_unreadable(path=str(self._store.path), why=error.what)

    def _file_stamp(self) -> _FileStamp:
        try:
            status = os.stat(self._store.path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size


def _refusal() -> Unauthenticated:
    return Unauthenticated(
        "The key is missing, revoked or unknown.",
        why="Every call needs metadata `authorization: Bearer hr_…` with a key in force.",
        fix="Make one with `headrace keys create --tenant NAME`, or show the demo key with "
        "`headrace keys demo`.",
    )
