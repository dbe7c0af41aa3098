"""The bytes of the meter log: segment headers, record frames, and what a bad tail means.

A segment is a file of fixed size, filled with zeros when it is made:

    header   magic, format version, log id, segment number, first sequence number,
             chain hash of the previous segment, CRC32C of all that
    record   u32 payload length, u32 CRC32C of what follows, u64 sequence number,
             u32 place in its batch, payload (a MeterEvent)
    …        until a length of zero, or the end of the file

Integers are little-endian. Sequence numbers count on without a gap, over segments as well.

The place in the batch tells a write that a power cut tore from a record that was damaged later. A
batch is one write, and the next one is written only after it was synced. So whatever is wrong with
a record that a later batch follows is damage, for that record was durable. Within the last batch
the disk may have kept some sectors and lost others, which then still hold zeros.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import google_crc32c

from headrace.serving.errors import MeterLogDamaged

MAGIC = b"HRMETER\0"
FORMAT_VERSION = 1
RECORD_BYTES_MAX = (64 << 10) - 1
"""Of one payload: a Reserve is about 300 bytes; its longest fields come from our own bounds."""
HEADER_BYTES = 80
FRAME_BYTES = 20
SECTOR_BYTES = 512
"""What a disk writes whole or not at all; larger sectors are multiples of it."""
GENESIS = bytes(32)
"""The chain hash before the first segment."""
FIRST_SEQ = 1

_HEADER = struct.Struct("<8sI16sQQ32s")
_CRC = struct.Struct("<I")
_LENGTH_CRC = struct.Struct("<II")
_SEQ_PLACE = struct.Struct("<QI")
_FRAME = struct.Struct("<IIQI")
_SEGMENT_NAME = re.compile(r"([0-9]{8,})\.seg")

assert _HEADER.size + _CRC.size == HEADER_BYTES
assert _FRAME.size == FRAME_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """How a segment begins."""

    log_id: str
    """32 hex digits."""
    number: int
    first_seq: int
    previous_chain: bytes

    def to_bytes(self) -> bytes:
        log_id = bytes.fromhex(self.log_id)
        body = _HEADER.pack(
            MAGIC, FORMAT_VERSION, log_id, self.number, self.first_seq, self.previous_chain
        )
        return body + _CRC.pack(google_crc32c.value(body))


class Frame(NamedTuple):
    """A record as it stands in a segment, its checksum found right."""

    seq: int
    place: int
    """In its batch; 0 begins one."""
    payload: bytes
    offset: int
    """Where the frame begins in its segment."""
    end: int


def segment_name(number: int) -> str:
    return f"{number:08d}.seg"


def segment_number(name: str) -> int | None:
    """The number in a segment's file name; None for any other file."""
    found = _SEGMENT_NAME.fullmatch(name)
    return int(found[1]) if found else None


def read_header(data: bytes, path: Path) -> Header:
    """The header that `data` begins with.

    Raises:
        MeterLogDamaged: there is none, its checksum is wrong, or another format wrote it.
    """
    body = data[: _HEADER.size]
    if len(data) < HEADER_BYTES or body[: len(MAGIC)] != MAGIC:
        raise damaged(path, offset=0, seq=None, why="it does not begin as a segment does")
    if _CRC.unpack_from(data, _HEADER.size) != (google_crc32c.value(body),):
        raise damaged(path, offset=0, seq=None, why="the checksum of its header is wrong")
    _, version, log_id, number, first_seq, chain = _HEADER.unpack(body)
    if version != FORMAT_VERSION:
        why = f"it has format {version}, and this Headrace reads {FORMAT_VERSION}"
        raise damaged(path, offset=0, seq=None, why=why)
    return Header(log_id=log_id.hex(), number=number, first_seq=first_seq, previous_chain=chain)


def pack(payloads: Sequence[bytes], first_seq: int) -> list[bytes]:
    """The frames of one batch, as pieces to be joined."""
    pieces: list[bytes] = []
    checksum, head, tail = google_crc32c.value, _LENGTH_CRC.pack, _SEQ_PLACE.pack
    for place, payload in enumerate(payloads):
        body = tail(first_seq + place, place) + payload
        pieces.append(head(len(payload), checksum(body)))
        pieces.append(body)
    return pieces


def frame_at(data: bytes, offset: int) -> Frame | None:
    """The record that begins at `offset`, if a whole and sound one does."""
    begins = offset + FRAME_BYTES
    if begins > len(data):
        return None
    length, crc, seq, place = _FRAME.unpack_from(data, offset)
    end = begins + length
    if not 0 < length <= RECORD_BYTES_MAX or end > len(data):
        return None
    if google_crc32c.value(data[offset + _LENGTH_CRC.size : end]) != crc:
        return None
    return Frame(seq, place, data[begins:end], offset, end)


def frames(data: bytes, *, offset: int, seq: int) -> Iterator[Frame]:
    """The records from `offset` on, of which the first must have the number `seq`.

    Ends before the first that is not there, not sound, or has another number: `check_tail` says
    which of these it was.
    """
    while (frame := frame_at(data, offset)) is not None and frame.seq == seq:
        yield frame
        offset, seq = frame.end, seq + 1


def check_tail(data: bytes, path: Path, *, offset: int, seq: int, base: int = 0) -> int:
    """What follows the last good record: nothing, or what a power cut left of one batch.

    Args:
        data: a segment, or its part from byte `base` on.
        path: of the segment; for the message.
        offset: in `data`, where the record `seq` should begin.
        seq: the number that the next record would have.
        base: where in the segment `data` begins.

    Returns:
        Bytes from `offset` to the last one that is not zero: 0 for a clean end.

    Raises:
        MeterLogDamaged: something that was durable is damaged or missing.
    """
    rest = data[offset:].rstrip(b"\0")
    end = offset + len(rest)
    place, expected = offset, seq
    while place < end:
        frame = frame_at(data, place)
        if frame is None or frame.seq != expected:
            bad, frame = place, _next_frame(data, place, end)
            if frame is None:
                break
            if frame.seq <= expected or not _has_lost_sector(data, bad, frame.offset, base):
                why = f"its record {expected} is missing or damaged, and record {frame.seq} follows"
                raise damaged(path, offset=base + bad, seq=expected, why=why)
        if frame.seq - frame.place > seq:
            why = f"its record {seq} is damaged, and a later write follows with record {frame.seq}"
            raise damaged(path, offset=base + offset, seq=seq, why=why)
        place, expected = frame.end, frame.seq + 1
    return len(rest)


def damaged(path: Path, *, offset: int, seq: int | None, why: str) -> MeterLogDamaged:
    place = f"byte {offset:,}" + (f", record {seq}" if seq is not None else "")
    return MeterLogDamaged(
        f"The meter log is damaged in {path} at {place}: {why}.",
        why="A record that was durable is charged for or paid for; none is passed over.",
        fix="Restore the file from a copy. `headrace meterlog verify` checks the whole log.",
        path=str(path),
        offset=offset,
        seq=seq,
    )


def _next_frame(data: bytes, offset: int, end: int) -> Frame | None:
    """The first sound record at or after `offset`. Looks at every byte: only for bad tails."""
    for place in range(offset, end - FRAME_BYTES):
        # A length that is not zero has one of its two low bytes set.
        if (data[place] or data[place + 1]) and (frame := frame_at(data, place)) is not None:
            return frame
    return None


def _has_lost_sector(data: bytes, begin: int, end: int, base: int) -> bool:
    """Whether a sector between the two offsets still holds the zeros it was made with.

    The first one may begin with a record that had been durable before.
    """
    sector = begin - (base + begin) % SECTOR_BYTES
    for start in range(sector, end - SECTOR_BYTES + 1, SECTOR_BYTES):
        if not any(data[max(start, begin) : start + SECTOR_BYTES]):
            return True
    return False
