"""One log, one folder: its identity, its lock, and its segments by number."""

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from headrace.serving.errors import ConfigRefused, MeterUnavailable
from headrace.serving.metering.meterlog import format as fmt
from headrace.serving.metering.meterlog.files import Files

ID_FILE = "log_id"
SPARE_FILE = "spare"
_ID_BYTES = 16


class LogFolder:
    """Where the files of one log are. Holds nothing open."""

    def __init__(self, path: Path, files: Files) -> None:
        self.path = path
        self.files = files
        self._log_id = ""

    def lock(self) -> Callable[[], None]:
        """Make the folder if it is missing and take it for this process.

        Returns:
            What lets go of it; so does the end of the process.

        Raises:
            ConfigRefused: another process writes this log.
        """
        self.files.make_folder(self.path)
        self.files.sync_folder(self.path.parent)
        try:
            return self.files.lock(self.path)
        except BlockingIOError as error:
            raise ConfigRefused(
                f"The meter log in {self.path} is in use by a running frontend.",
                why="Two writers would write over each other's records.",
                fix="Stop the other frontend, or give this one a HEADRACE_HOME of its own.",
            ) from error

    def log_id(self) -> str:
        """The log's name: 32 hex digits.

        Raises:
            MeterUnavailable: the folder holds no log.
            MeterLogDamaged: the file that keeps the name holds something else.
        """
        if self._log_id:
            return self._log_id
        path = self.path / ID_FILE
        try:
            text = self.files.read(path).decode("ascii", "replace").strip()
        except FileNotFoundError as error:
            raise MeterUnavailable(
                f"There is no meter log in {self.path}.",
                why="A frontend makes it when it first starts.",
                fix="Start one with `headrace serve`, or name its home with --home.",
            ) from error
        if len(text) != 2 * _ID_BYTES or not set(text) <= set("0123456789abcdef"):
            raise fmt.damaged(path, offset=0, seq=None, why="it does not hold 32 hex digits")
        self._log_id = text
        return text

    def make_log_id(self) -> str:
        """As `log_id`; a folder without anything in it gets a new one, durable when this returns.

        Raises:
            MeterLogDamaged: there are segments, but no name for them.
        """
        path = self.path / ID_FILE
        if ID_FILE in self.files.names(self.path):
            return self.log_id()
        if self.segments():
            raise fmt.damaged(path, offset=0, seq=None, why="it is missing")
        log_id = secrets.token_hex(_ID_BYTES)
        text = f"{log_id}\n".encode()
        draft = self.path / f"{ID_FILE}.new"
        file = self.files.create(draft, len(text))
        try:
            if file.write(text, 0) != len(text):
                raise OSError(f"{draft} was written in part")
            file.fdatasync()
        finally:
            file.close()
        self.files.rename(draft, path)
        self.files.sync_folder(self.path)
        return log_id

    def segments(self) -> Sequence[int]:
        """The numbers of the segments, from 1 on. No folder, no segments.

        Raises:
            MeterLogDamaged: one is missing.
        """
        try:
            names = self.files.names(self.path)
        except FileNotFoundError:
            return []
        numbers = sorted(n for n in map(fmt.segment_number, names) if n is not None)
        for expected, number in enumerate(numbers, 1):
            if number != expected:
                raise fmt.damaged(self.segment(expected), offset=0, seq=None, why="it is missing")
        return numbers

    def segment(self, number: int) -> Path:
        return self.path / fmt.segment_name(number)

    def header(self, number: int) -> fmt.Header:
        """The header of a segment, which must say that it is this one.

        Raises:
            MeterLogDamaged: it cannot be read as one, or is another's.
        """
        path = self.segment(number)
        header = fmt.read_header(self.files.read(path, size=fmt.HEADER_BYTES), path)
        self.check_header(header)
        if header.number != number:
            why = f"its header is that of segment {header.number}"
            raise fmt.damaged(path, offset=0, seq=None, why=why)
        return header

    def check_header(self, header: fmt.Header) -> None:
        """Whether the segment is of this log.

        Raises:
            MeterLogDamaged: it is another's.
        """
        if header.log_id != (log_id := self.log_id()):
            why = f"it is of log {header.log_id}, and this is {log_id}"
            raise fmt.damaged(self.segment(header.number), offset=0, seq=None, why=why)
