"""Key to caller, by digest, in constant time."""

import hmac
import re
import secrets

from headrace.serving.admission.account_view import AccountView
from headrace.serving.clock import Clock
from headrace.serving.domain.record import Caller
from headrace.serving.errors import AccountsUnavailable, AccountSuspended, Unauthenticated

KEY_CHARS_MAX = 128
"""Ours have 44. A longer text is refused before it is looked at."""

_SHAPE = re.compile(r"hr_([0-9a-z]{1,16})_[0-9A-Za-z]{16,64}")


class Authenticator:
    """Checks presented keys against what is known of accounts. Any thread; no lock, no I/O.

    A check takes 5 us, whether the key is good, wrong or unknown.
    """

    def __init__(self, view: AccountView, *, clock: Clock) -> None:
        """`view` is somebody else's to refresh and to close."""
        self._view = view
        self._clock = clock
        # What an unknown id is compared with, so that it takes the time of a known one.
        self._nobody = secrets.token_bytes(32)

    def authenticate(self, presented: str) -> Caller:
        """Who presents this key. `presented` is the bare key, without "Bearer ".

        Raises:
            Unauthenticated: it is not a key that is in force. Which part was wrong is not said.
            AccountSuspended: it is, and its organisation or project is suspended.
            AccountsUnavailable: it was, when the accounts could last be read, too long ago.
        """
        if len(presented) > KEY_CHARS_MAX or not (shape := _SHAPE.fullmatch(presented)):
            raise _refusal()
        view = self._view
        known = view.key(shape[1])
        pepper = view.peppers.get(known.pepper_id) if known else None
        expected = known.digest if known and pepper else self._nobody
        matches = hmac.compare_digest(expected, (pepper or view.pepper).digest(presented))
        now_unix_ms = self._clock.unix_ms()
        if known is None or not matches or now_unix_ms >= known.expires_unix_ms:
            raise _refusal()
        if view.is_stale:
            raise _stale()
        if view.is_suspended(known.caller):
            raise _suspended(known.caller)
        view.used(shape[1], now_unix_ms)
        return known.caller

    def still_admits(self, key_id: str) -> Caller:
        """Who a key belongs to that was checked before, for work that goes on without its caller.

        Raises:
            Unauthenticated: it is no longer in force.
            AccountSuspended, AccountsUnavailable: as `authenticate`.
        """
        known = self._view.key(key_id)
        if known is None or self._clock.unix_ms() >= known.expires_unix_ms:
            raise _refusal()
        if self._view.is_stale:
            raise _stale()
        if self._view.is_suspended(known.caller):
            raise _suspended(known.caller)
        return known.caller

    def cache_salt(self, tenant_id: str) -> bytes:
        """16 bytes that keep a tenant's prefix cache apart from every other's.

        From our secret, never from what a caller sends: a salt that could be chosen or guessed
        would let one tenant probe for another's prompts.
        """
        return self._view.pepper.derive(f"cache-salt/{tenant_id}")[:16]


def _refusal() -> Unauthenticated:
    return Unauthenticated(
        "The key is missing, expired, revoked or unknown.",
        why="Every call needs metadata `authorization: Bearer hr_…` with a key in force.",
        fix="Make one with `headrace keys create --tenant NAME`, or show the demo key with "
        "`headrace keys demo`.",
    )


def _suspended(caller: Caller) -> AccountSuspended:
    return AccountSuspended(
        f"The organisation {caller.tenant_id!r} or its project {caller.project_id!r} is suspended.",
        why="While it is, its keys are refused.",
        fix="Ask whoever runs this platform; `headrace orgs resume` and `headrace projects resume` "
        "end it.",
    )


def _stale() -> AccountsUnavailable:
    return AccountsUnavailable(
        "The key cannot be checked.",
        why="The accounts have not been readable for longer than accounts.stale_s, and the key may "
        "have been revoked meanwhile.",
        fix="Retry with jitter. Operator: look for `accounts_unreadable` in the log.",
        retry_after_ms=1_000,
    )
