"""Appends batches to the segments of one log: one write and one fdatasync for each.

A segment appears in the folder whole: its header and the Carry of open holds are written and
synced under the spare's name, which is then changed. So a segment without them is a damaged one,
and whoever starts after a crash needs the last segment only.

The spare is made beforehand and is the room that is held in reserve: a segment that is begun while
the disk is full is that spare. `has_spare` says whether there is one; without it nothing new should
be accepted, and what was accepted still has a segment to end in.

Nothing is tried twice. After an OSError the state of the file is unknown (the kernel may have
dropped what it could not write and call the next fdatasync a success), so the journal is of no
further use; whoever starts next reads what the disk has.
"""

import errno
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from headrace.serving.clock import Clock
from headrace.serving.config_metering import MeterConfig
from headrace.serving.domain.usage import Usage
from headrace.serving.metering.meterlog import format as fmt
from headrace.serving.metering.meterlog.files import File
from headrace.serving.metering.meterlog.folder import SPARE_FILE, LogFolder
from headrace.serving.metering.meterlog.holds import Holds
from headrace.serving.metering.meterlog.merkle import MerkleTree, chained
from headrace.v1 import meterlog_pb2

SEAL_BYTES = fmt.FRAME_BYTES + 128
"""A Seal is two hashes and three numbers: 100 bytes."""


class Effect(IntEnum):
    """What a record does to the open holds."""

    NONE = 0
    BEGINS = 1
    NOTES = 2
    ENDS = 3


@dataclass(slots=True, eq=False)
class Record:
    """A payload on its way to the disk."""

    payload: bytes
    effect: Effect = Effect.NONE
    hold: int = 0
    """The hold that it notes or ends."""
    usage: Usage | None = None
    """What it notes."""
    seq: int = 0
    """Its number; set once it is durable."""


@dataclass(slots=True, eq=False, kw_only=True)
class Segment:
    """The segment that is written to, and what its Seal will say."""

    header: fmt.Header
    file: File
    path: Path
    offset: int
    """Where the next record goes."""
    num_bytes: int
    """Of the file."""
    tree: MerkleTree
    began_ms: float
    """On the monotonic clock."""
    is_empty: bool = True
    """True: it holds nothing but its Carry."""
    is_sealed: bool = False


class Journal:
    """The write end of a log. One thread at a time; its owner holds the folder's lock."""

    def __init__(
        self,
        folder: LogFolder,
        *,
        clock: Clock,
        config: MeterConfig,
        segment: Segment | None,
        holds: Holds,
        next_seq: int,
        chain: bytes,
    ) -> None:
        """Go on where `recovery.recover` found the end.

        Args:
            folder: of the log, which has its id.
            clock: of segments' ages and of Carry and Seal records.
            config: how large a new segment is, and at which age `seal_if_old` seals one.
            segment: the last one; None begins the first.
            holds: that are open; the journal keeps them from here on.
            next_seq: of the next record.
            chain: hash of the last sealed segment.

        Raises:
            OSError: there is no room for a segment, or the disk does not answer.
        """
        self._folder = folder
        self._files = folder.files
        self._clock = clock
        self._segment_bytes = config.segment_bytes
        self._seal_s = config.seal_s
        self._spare: File | None = None
        self._spare_bytes = 0
        self.holds = holds
        self.next_seq = next_seq
        self._chain = chain
        self.sync_s = 0.0
        """What the last fdatasync took."""
        if segment is None or segment.is_sealed:
            if segment is not None:
                segment.file.close()
            self._segment = self._begin(1 if segment is None else segment.header.number + 1)
        else:
            self._segment = segment

    @property
    def has_spare(self) -> bool:
        """Whether the next segment has its room already."""
        return self._spare is not None

    @property
    def batch_bytes_max(self) -> int:
        """Payload bytes of one batch: with what it may grow by and a Carry it fits a segment."""
        return self._segment_bytes // 4

    @property
    def room_bytes(self) -> int:
        """What the segment takes before it has to be sealed."""
        return self._segment.num_bytes - self._segment.offset - SEAL_BYTES

    @property
    def age_s(self) -> float:
        """Of the segment; 0 while it holds nothing that a Seal would vouch for."""
        if self._segment.is_empty:
            return 0.0
        return max(0.0, self._clock.monotonic_ms() - self._segment.began_ms) / 1000

    def append(self, records: Sequence[Record]) -> None:
        """Make records durable, in order, and give them their numbers.

        Raises:
            OSError: nothing can be said about what the disk has of them.
        """
        payloads = [record.payload for record in records]
        num_bytes = sum(map(len, payloads)) + fmt.FRAME_BYTES * len(payloads)
        if num_bytes > self.room_bytes:
            self.roll()
        assert num_bytes <= self.room_bytes, "a batch fits an empty segment"
        self._write(self._segment, b"".join(fmt.pack(payloads, self.next_seq)))
        holds = self.holds
        for seq, record in enumerate(records, self.next_seq):
            record.seq = seq
            if record.effect is Effect.BEGINS:
                holds.began(seq, record.payload)
            elif record.effect is Effect.ENDS:
                holds.ended(record.hold)
            elif record.usage is not None:
                holds.noted(record.hold, record.usage)
        self._count(self._segment, payloads)
        self._segment.is_empty = False

    def seal_if_old(self) -> None:
        """Begin a new segment if this one is older than `seal_s` and the next has its room."""
        if self.has_spare and self.age_s >= self._seal_s:
            self.roll()

    def roll(self) -> None:
        """Seal the segment and begin the next.

        Raises:
            OSError: there is no room for the next, or the disk does not answer.
        """
        if self._spare is None:
            self.make_spare()
        old = self._segment
        root = old.tree.root()
        self._chain = chained(old.header.previous_chain, root)
        seal = meterlog_pb2.Seal(
            merkle_root=root,
            records=old.tree.length,
            first_seq=old.header.first_seq,
            chain=self._chain,
        )
        event = meterlog_pb2.MeterEvent(unix_ms=self._clock.unix_ms(), seal=seal)
        self._write(old, b"".join(fmt.pack([event.SerializeToString()], self.next_seq)))
        self.next_seq += 1
        self._segment = self._begin(old.header.number + 1)
        # What was set aside and not used goes back. If a power cut undoes that, zeros are left.
        old.file.truncate(old.offset)
        old.file.close()

    def make_spare(self) -> None:
        """Set the room of the next segment aside, if that is not done.

        More than is configured where less has been configured than what is open needs.

        Raises:
            OSError: there is none.
        """
        if self._spare is None:
            num_bytes = max(self._segment_bytes, 4 * self.holds.num_bytes)
            self._spare = self._files.create(self._folder.path / SPARE_FILE, num_bytes)
            self._spare_bytes = num_bytes

    def close(self) -> None:
        """Let go of the files; what was appended is durable. Idempotent."""
        self._segment.file.close()
        if self._spare is not None:
            self._spare.close()
            self._spare = None

    def _begin(self, number: int) -> Segment:
        """Turn the spare into the next segment."""
        self.make_spare()
        assert self._spare is not None
        file, self._spare = self._spare, None
        header = fmt.Header(
            log_id=self._folder.log_id(),
            number=number,
            first_seq=self.next_seq,
            previous_chain=self._chain,
        )
        segment = Segment(
            header=header,
            file=file,
            path=self._folder.segment(number),
            offset=0,
            num_bytes=self._spare_bytes,
            tree=MerkleTree(),
            began_ms=self._clock.monotonic_ms(),
        )
        carry = self.holds.carry_out(self._clock.unix_ms())
        pieces = fmt.pack(carry, self.next_seq)
        self._write(segment, b"".join((header.to_bytes(), *pieces)))
        self._files.rename(self._folder.path / SPARE_FILE, segment.path)
        self._files.sync_folder(self._folder.path)
        self._count(segment, carry)
        return segment

    def _write(self, segment: Segment, data: bytes) -> None:
        written = segment.file.write(data, segment.offset)
        if written != len(data):
            raise OSError(
                errno.EIO, f"{written} of {len(data)} bytes were written", str(segment.path)
            )
        began_s = time.perf_counter()
        segment.file.fdatasync()
        self.sync_s = time.perf_counter() - began_s
        segment.offset += len(data)

    def _count(self, segment: Segment, payloads: Sequence[bytes]) -> None:
        append = segment.tree.append
        for payload in payloads:
            append(payload)
        self.next_seq += len(payloads)
