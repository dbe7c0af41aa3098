"""Reads durable records in order, from any process, while a frontend writes them."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from headrace.serving.errors import MeterLogDamaged, MeterUnavailable
from headrace.serving.metering.meterlog import format as fmt
from headrace.serving.metering.meterlog.files import Files, LocalFiles
from headrace.serving.metering.meterlog.folder import LogFolder
from headrace.v1 import meterlog_pb2

CHUNK_BYTES = 256 << 10
"""Read at once: about a thousand records, and four of the largest."""


@dataclass(frozen=True, slots=True)
class Logged:
    """One record of a meter log, durable."""

    log_id: str
    seq: int
    event: meterlog_pb2.MeterEvent


@dataclass(slots=True, eq=False)
class _Position:
    """Where the record `seq` begins, or will begin."""

    number: int
    """Of the segment."""
    offset: int
    seq: int
    is_sealed: bool = False
    """True: the record before was the segment's last; `seq` begins the next one."""


class LogReader:
    """Reads the log in one folder. Keeps its place, so reading on costs what is new.

    One thread at a time.
    """

    def __init__(
        self,
        folder: Path,
        *,
        durable_seq: Callable[[], int] | None = None,
        files: Files | None = None,
    ) -> None:
        """Nothing is opened before it is asked for.

        Args:
            folder: of the log.
            durable_seq: answers the last record known to be durable, as `MeterLog.durable_seq`
                does in the writer's process. None: what was read is synced before it is answered,
                so that nothing is projected which a power cut then takes back.
            files: None is the local file system.
        """
        self._files = files or LocalFiles()
        self._folder = LogFolder(folder, self._files)
        self._durable_seq = durable_seq
        self._first_seqs: list[int] = []
        """Of each segment, in order; segment 1 is the first."""
        self._position: _Position | None = None

    @property
    def log_id(self) -> str:
        """32 hex digits; made once for each folder.

        Raises:
            MeterUnavailable: no frontend has written here yet, or the folder cannot be read.
            MeterLogDamaged: the file that keeps it holds something else.
        """
        return self._folder.log_id()

    def after(self, seq: int, limit: int = 10_000) -> list[Logged]:
        """The records that follow `seq`, in order, without a gap, at most `limit`.

        All of them, Epoch, Carry and Seal included. Empty when there is nothing new, or no log.

        Raises:
            MeterLogDamaged: a record that was durable is damaged or missing, `seq` included.
            MeterUnavailable: the folder cannot be read.
        """
        assert seq >= 0
        assert limit > 0
        try:
            return self._after(seq, limit)
        except OSError as error:
            raise MeterUnavailable(
                f"The meter log in {self._folder.path} cannot be read: {error}.",
                why="The disk does not answer, or this user may not read it.",
                fix="Check the disk under HEADRACE_HOME.",
            ) from error

    def _after(self, seq: int, limit: int) -> list[Logged]:
        bound = None if self._durable_seq is None else self._durable_seq()
        if bound == seq:
            return []
        position = self._seek(seq + 1)
        found: list[Logged] = []
        while position is not None and len(found) < limit:
            new = self._read(position, limit - len(found), bound)
            if new and bound is None:
                self._files.sync(self._folder.segment(position.number))
            found += new
            if not self._enter_next(position):
                break
        # Kept only now: after an error the next call looks for its place anew.
        self._position = position
        return found

    def _seek(self, seq: int) -> _Position | None:
        """Where the record `seq` begins; None when there is no log yet."""
        position, self._position = self._position, None
        if position is not None and position.seq == seq:
            return position
        self._index()
        if not self._first_seqs:
            if seq == fmt.FIRST_SEQ:
                return None
            raise self._ends_before(seq, offset=0)
        number = max(1, bisect_right(self._first_seqs, seq))
        position = self._start(number)
        while position.seq < seq:
            if not self._read(position, seq - position.seq, None) and not self._enter_next(
                position
            ):
                raise self._ends_before(seq, offset=position.offset)
        return position

    def _start(self, number: int) -> _Position:
        return _Position(number, fmt.HEADER_BYTES, self._first_seqs[number - 1])

    def _index(self) -> None:
        """Learn of segments that are new."""
        for number in self._folder.segments()[len(self._first_seqs) :]:
            self._first_seqs.append(self._folder.header(number).first_seq)

    def _enter_next(self, position: _Position) -> bool:
        """Go on to the next segment if this one is at its end and that one is there."""
        if not position.is_sealed:
            return False
        if position.number == len(self._first_seqs):
            self._index()
        if position.number == len(self._first_seqs):
            return False
        following = self._start(position.number + 1)
        if following.seq != position.seq:
            why = f"it begins with record {following.seq}, and {position.seq} is next"
            path = self._folder.segment(following.number)
            raise fmt.damaged(path, offset=0, seq=position.seq, why=why)
        position.number, position.offset = following.number, following.offset
        position.is_sealed = False
        return True

    def _read(self, position: _Position, limit: int, bound: int | None) -> list[Logged]:
        """Records from `position` on, to the end of what its segment holds; moves it."""
        path = self._folder.segment(position.number)
        log_id = self.log_id
        parse = meterlog_pb2.MeterEvent.FromString
        found: list[Logged] = []
        was_suspicious = False
        while not position.is_sealed and (bound is None or position.seq <= bound):
            data = self._files.read(path, offset=position.offset, size=CHUNK_BYTES)
            begins = position.offset
            for frame in fmt.frames(data, offset=0, seq=position.seq):
                if len(found) == limit or (bound is not None and frame.seq > bound):
                    return found
                event = parse(frame.payload)
                found.append(Logged(log_id, frame.seq, event))
                position.offset, position.seq = begins + frame.end, frame.seq + 1
                position.is_sealed = event.HasField("seal")
            if position.offset > begins:
                was_suspicious = False
                continue
            try:
                self._check_end(position, data, bound)
            except MeterLogDamaged:
                # A read beside a write may see its later pages and not its earlier ones.
                if was_suspicious:
                    raise
                was_suspicious = True
                continue
            break
        return found

    def _check_end(self, position: _Position, data: bytes, bound: int | None) -> None:
        """Whether it is right that nothing sound stands at `position`."""
        path, offset, seq = self._folder.segment(position.number), position.offset, position.seq
        fmt.check_tail(data, path, offset=0, seq=seq, base=offset)
        self._index()
        if bound is not None and seq <= bound:
            why = f"record {seq} was durable and is not there"
            raise fmt.damaged(path, offset=offset, seq=seq, why=why)
        if position.number < len(self._first_seqs):
            why = "it ends without a Seal, and another segment follows"
            raise fmt.damaged(path, offset=offset, seq=seq, why=why)

    def _ends_before(self, seq: int, *, offset: int) -> MeterLogDamaged:
        path = self._folder.segment(max(1, len(self._first_seqs)))
        why = f"the log ends before record {seq - 1}, which was read from it before"
        return fmt.damaged(path, offset=offset, seq=seq - 1, why=why)
