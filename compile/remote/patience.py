"""A store that may fail for a while: what is tried again, how often, and what is said after that.

Everything here can be repeated: parts are named by their content, and what makes them a version is
written once. So a command that was refused, or killed, goes on where it was when it is run again.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from headrace.compile.remote.objects import Objects, open_objects
from headrace.serving.errors import RemoteStoreFault

T = TypeVar("T")

PAUSES_S = (0.2, 1.0, 5.0, 15.0)
"""Between tries of one request: a store that restarts, or asks for less, is back by then."""


@dataclass(frozen=True, slots=True)
class Remote:
    """Objects, asked again where they fail. Any thread may call."""

    objects: Objects
    url: str
    pause: Callable[[float], None] = time.sleep
    endpoint_url: str | None = None
    """Where the bucket is; None: where the AWS variables and files say."""

    def holds(self, key: str, content: bytes) -> bool:
        """Whether exactly this content is there.

        Raises:
            RemoteStoreFault: the store does not answer. So do all methods.
        """
        return self._patiently(lambda: self.objects.holds(key, content))

    def put(self, key: str, content: bytes) -> None:
        """Write an object, replacing one that is there."""
        self._patiently(lambda: self.objects.put(key, content))

    def create(self, key: str, content: bytes) -> bool:
        """Write an object unless one is there; whether it was written.

        False also where it was written and the answer was lost: read it to know.
        """
        return self._patiently(lambda: self.objects.create(key, content))

    def get(self, key: str, *, bytes_max: int) -> bytes | None:
        """Read an object, or its first `bytes_max + 1` bytes; None where it is not there."""
        return self._patiently(lambda: self._found(key, bytes_max))

    def names(self, prefix: str) -> Sequence[str]:
        """The last parts of the keys right below `prefix/`."""
        return self._patiently(lambda: self.objects.names(prefix))

    def _found(self, key: str, bytes_max: int) -> bytes | None:
        try:
            return self.objects.get(key, bytes_max=bytes_max)
        except FileNotFoundError:
            return None

    def _patiently(self, call: Callable[[], T]) -> T:
        for pause_s in PAUSES_S:
            try:
                return call()
            except (PermissionError, FileNotFoundError) as error:
                raise self._refused(error) from error
            except OSError:
                self.pause(pause_s)
        try:
            return call()
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> RemoteStoreFault:
        if isinstance(error, PermissionError):
            return RemoteStoreFault(
                f"The store {self.url} does not let us in.",
                why=f"It said: {error}.",
                fix="Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what they may do there; "
                "for a folder, who may write it.",
            )
        if isinstance(error, FileNotFoundError):
            return RemoteStoreFault(
                f"The store {self.url} is not there.",
                why=f"It said: {error}.",
                fix="Make the bucket first, or correct the URL and --endpoint-url.",
            )
        return RemoteStoreFault(
            f"The store {self.url} does not answer.",
            why=f"Tried {len(PAUSES_S) + 1} times, at last: {error}.",
            fix="Run the same command again once it does: what is there already is not moved "
            "again, and nothing is visible before it is whole.",
        )


def open_remote(url: str, *, endpoint_url: str | None = None) -> Remote:
    """The store at a URL. Nothing is asked of it yet.

    Raises:
        InvalidRequest: the URL is none of ours.
    """
    objects = open_objects(url, endpoint_url=endpoint_url)
    return Remote(objects, url, endpoint_url=endpoint_url)
