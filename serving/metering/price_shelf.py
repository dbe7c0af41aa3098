"""The published price books of a home, and which one is in force.

Publishing copies a book to `prices/<version>.yaml`, read-only, with its SHA-256 beside it. There is
no other verb: a book is never changed and never withdrawn, a later one takes its place. A file that
differs from its digest is refused, and with it every new request.
"""

import fcntl
import hashlib
import os
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from headrace.serving.domain.tier import Tier
from headrace.serving.domain.usage import Price
from headrace.serving.errors import ConfigRefused, InvalidRequest
from headrace.serving.metering import price_book
from headrace.serving.metering.price_book import PriceBook

BOOKS_MAX = 1_000
"""A book a day for three years; they are all read at a start."""


@dataclass(frozen=True, slots=True)
class Published:
    """A book on the shelf."""

    book: PriceBook
    sha256: str


class PriceShelf:
    """The books of a folder, and that of config.yaml before them. Any thread may ask."""

    def __init__(self, folder: Path, embedded: PriceBook) -> None:
        """Reads the folder.

        Raises:
            ConfigRefused: a book was changed after it was published, or cannot be read.
        """
        self._folder = folder
        self._embedded = embedded
        self._names: Sequence[str] = ()
        self._books: Sequence[PriceBook] = (embedded,)
        """By the moment they come into force; replaced as a whole."""
        self.refresh()

    def at(self, unix_ms: int) -> PriceBook:
        """The book in force at a time."""
        books = self._books
        return books[bisect_right(books, unix_ms, key=_effective) - 1]

    def price(self, model: str, tier: Tier, *, unix_ms: int, needs: Collection[str] = ()) -> Price:
        """The rates that a request accepted at this time keeps; see `PriceBook.price`.

        Raises:
            UnknownUnit: the book in force has none for this model, or for a unit it needs.
        """
        return self.at(unix_ms).price(model, tier, needs=needs)

    def refresh(self) -> bool:
        """Take in books that were published since; answers whether there were any.

        20 us when there were none. On a refusal the books that were known stay in force.

        Raises:
            ConfigRefused: as the constructor.
        """
        names = self._listed()
        if names == self._names:
            return False
        books = [self._embedded, *(each.book for each in self._read(names))]
        books.sort(key=_effective)
        self._books, self._names = books, names
        return True

    def published(self) -> Sequence[Published]:
        """Every book on the shelf, in the order in which they come into force.

        Raises:
            ConfigRefused: as the constructor.
        """
        return sorted(self._read(self._listed()), key=lambda each: _effective(each.book))

    def publish(self, path: Path) -> tuple[Published, bool]:
        """Check a book and put it on the shelf, for good.

        Returns:
            The book, and whether it is new: publishing the same file again changes nothing.

        Raises:
            InvalidRequest: the book has a fault (also UnknownUnit, AmountOutOfRange), or its
                version or its moment is taken by another one.
            ConfigRefused: the folder cannot be written.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self._folder):
                return self._publish(price_book.read(path), path.read_bytes())
        except OSError as error:
            raise ConfigRefused(
                f"The price book cannot be published: {error}.",
                why="Books are kept in the home, and the disk did not take this one.",
                fix=f"Make {self._folder} writable, then publish it again.",
            ) from error

    def _publish(self, book: PriceBook, data: bytes) -> tuple[Published, bool]:
        if book.version == self._embedded.version:
            raise _taken(f"version {book.version!r} is the one of config.yaml")
        new = Published(book, hashlib.sha256(data).hexdigest())
        for known in self.published():
            if known.book.version == book.version and known.sha256 == new.sha256:
                return known, False
            if known.book.version == book.version:
                raise _taken(f"version {book.version!r} is published and says something else")
            if _effective(known.book) == _effective(book):
                raise _taken(f"{known.book.version!r} comes into force at the same moment")
        self._store(book.version, data, new.sha256)
        self.refresh()
        return new, True

    def _store(self, version: str, data: bytes, sha256: str) -> None:
        """The digest first: a book without one would be refused."""
        for name, content in (
            (f"{version}.sha256", f"{sha256}\n".encode()),
            (f"{version}.yaml", data),
        ):
            draft = self._folder / f".{name}.{os.getpid()}"
            with draft.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o444)
            os.replace(draft, self._folder / name)
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _listed(self) -> Sequence[str]:
        try:
            names = sorted(
                n for n in os.listdir(self._folder) if n.endswith(".yaml") and n[0] != "."
            )
        except FileNotFoundError:
            return ()
        if len(names) > BOOKS_MAX:
            raise ConfigRefused(
                f"{self._folder} holds {len(names):,} price books.",
                why=f"At most {BOOKS_MAX:,} are read.",
                fix="Move those away whose last request was charged long ago.",
            )
        return tuple(names)

    def _read(self, names: Sequence[str]) -> list[Published]:
        return [self._read_one(self._folder / name) for name in names]

    def _read_one(self, path: Path) -> Published:
        try:
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            expected = path.with_suffix(".sha256").read_text("ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigRefused(
                f"The price book {path} cannot be read: {error}.",
                why="A book and its digest belong together, and one of them is missing.",
                fix="Restore both from a copy of the home.",
            ) from error
        if sha256 != expected:
            raise ConfigRefused(
                f"The price book {path} was changed after it was published.",
                why=f"Its SHA-256 is {sha256[:16]}…, and was {expected[:16]}….",
                fix="Restore it; publish a change under a version of its own.",
            )
        try:
            return Published(price_book.read(path), sha256)
        except InvalidRequest as error:
            # It was sound when it was published, by rules that have become stricter since.
            raise ConfigRefused(error.what, why=error.why, fix=error.fix) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One publisher at a time."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _effective(book: PriceBook) -> int:
    return book.effective_unix_ms


def _taken(what: str) -> InvalidRequest:
    return InvalidRequest(
        f"The price book is not published: {what}.",
        why="A published book never changes: requests were accepted by it.",
        fix="Give the book a version and a moment of its own.",
        field="version",
    )
