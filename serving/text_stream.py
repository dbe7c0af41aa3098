"""Token ids to text, a token at a time: whole characters only, ended by stop strings.

The text after k tokens is a function of those k ids and the stop strings alone, so a sequence
that moves to another replica continues its text exactly: replay the ids, drop what they return.
"""

import codecs
from collections.abc import Sequence

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class TextStream:
    """One answer's text. Belongs to one thread at a time.

    Bytes that do not yet make a character are held back (at most three), and so is the longest
    end of the text that may still become a stop string (shorter than the longest of them). A
    stop string ends the text before its first character. When one token completes several, the
    one that ends first counts, so the result does not depend on how the text falls into tokens.
    """

    __slots__ = (
        "_decode",
        "_first_chars",
        "_held",
        "_longest",
        "_stop",
        "_strips_space",
        "_table",
        "_unsearched",
        "stopped",
    )

    def __init__(
        self,
        table: Sequence[bytes],
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        strips_first_space: bool = False,
    ) -> None:
        """Start an answer.

        Args:
            table: bytes that each token id adds; empty for special tokens.
            stop: strings that end the answer; none is empty.
            min_tokens: the text of this many leading tokens is never searched for them.
            strips_first_space: drop one space at the start, as SentencePiece detokenisers do.
        """
        assert all(stop), "an empty stop string would end every answer at once"
        self._table = table
        self._strips_space = strips_first_space
        self._decode = _utf8_decoder("replace").decode
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._first_chars = frozenset(text[0] for text in stop)
        self._unsearched = min_tokens if stop else 0
        self._held = ""
        self.stopped = False
        """True once a stop string was found; nothing may be pushed after it."""

    def push(self, token_id: int) -> str:
        """Add a token and return the text that it completes, often empty."""
        data = self._table[token_id]
        if self._strips_space and data:
            self._strips_space = False
            data = data.removeprefix(b" ")
        text = self._decode(data)
        if not self._stop:
            return text
        return self._search(text)

    def flush(self) -> str:
        """End the answer and return what was held back; a partial character becomes U+FFFD."""
        if self.stopped:
            return ""
        text = self._decode(b"", True)
        if self._stop:
            text = self._search(text)
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _search(self, text: str) -> str:
        assert not self.stopped, "the answer has ended"
        if self._unsearched:
            self._unsearched -= 1
            return text
        if not text:
            return ""
        text = self._held + text
        cut = _first_stop(text, self._stop)
        if cut is not None:
            self.stopped = True
            self._held = ""
            return text[:cut]
        kept = len(text) - self._held_back(text)
        self._held = text[kept:]
        return text[:kept]

    def _held_back(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first_chars:
                tail = text[start:]
                if any(stop.startswith(tail) for stop in self._stop):
                    return len(tail)
        return 0


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string that is complete first begins; the longest of those that end there."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None
