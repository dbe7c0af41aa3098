"""What a frontend does first: find the end of its log, and close what a dead one left open.

Everything here may be cut off at any moment and done again: reading changes nothing, a torn tail is
written over with zeros, and a hold that was closed is not open when it is looked for again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from headrace.serving import log
from headrace.serving.clock import Clock
from headrace.serving.config_metering import MeterConfig
from headrace.serving.domain.record import Settlement
from headrace.serving.domain.usage import Outcome
from headrace.serving.errors import AmountOutOfRange, UnknownUnit
from headrace.serving.metering.meterlog import events
from headrace.serving.metering.meterlog import format as fmt
from headrace.serving.metering.meterlog.folder import LogFolder
from headrace.serving.metering.meterlog.holds import Hold, Holds
from headrace.serving.metering.meterlog.journal import Effect, Journal, Record, Segment
from headrace.serving.metering.meterlog.merkle import MerkleTree
from headrace.v1 import meterlog_pb2

CLOSE_MAX = 64
"""Holds closed by one write: their records fit the smallest segment."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Read:
    """What a segment's records say."""

    holds: Holds
    tree: MerkleTree
    end: int
    next_seq: int
    began_unix_ms: int = 0
    is_carried: bool = False
    """Whether all holds that were open when it began are known."""
    is_empty: bool = True
    seal: meterlog_pb2.Seal | None = None


def recover(folder: LogFolder, *, clock: Clock, config: MeterConfig) -> Journal:
    """A journal that goes on after the last record of the log; of a new log, from the first.

    Reads the last segment, and of the one before how it was sealed. What was read is written again
    and synced: after a failed fdatasync the kernel may still show what the disk never got.

    Raises:
        MeterLogDamaged: a segment is missing, or a record that was durable is damaged.
        OSError: the disk does not answer, or has no room.
    """
    numbers = folder.segments()
    if not numbers:
        return Journal(
            folder,
            clock=clock,
            config=config,
            segment=None,
            holds=Holds(),
            next_seq=fmt.FIRST_SEQ,
            chain=fmt.GENESIS,
        )
    path = folder.segment(numbers[-1])
    header = folder.header(numbers[-1])
    _check_link(folder, header)
    data = folder.files.read(path)
    read = _read(data, header, path)
    torn = fmt.check_tail(data, path, offset=read.end, seq=read.next_seq)
    if not read.is_carried:
        why = "it does not begin with all holds that were open"
        raise fmt.damaged(path, offset=read.end, seq=read.next_seq, why=why)
    if torn and read.seal is not None:
        raise fmt.damaged(
            path, offset=read.end, seq=read.next_seq, why="something follows its Seal"
        )
    if torn:
        log.meter_log_torn(path=str(path), offset=read.end, num_bytes=torn, seq=read.next_seq)
    file = folder.files.open(path)
    again = data[: read.end] + bytes(torn)
    if file.write(again, 0) != len(again):
        file.close()
        raise OSError(f"{path} was written in part")
    file.fdatasync()
    age_ms = max(0, clock.unix_ms() - read.began_unix_ms)
    segment = Segment(
        header=header,
        file=file,
        path=path,
        offset=read.end,
        num_bytes=len(data),
        tree=read.tree,
        began_ms=clock.monotonic_ms() - age_ms,
        is_empty=read.is_empty,
        is_sealed=read.seal is not None,
    )
    return Journal(
        folder,
        clock=clock,
        config=config,
        segment=segment,
        holds=read.holds,
        next_seq=read.next_seq,
        chain=header.previous_chain if read.seal is None else read.seal.chain,
    )


def begin_epoch(journal: Journal, *, epoch: str, version: str, clock: Clock) -> int:
    """Say who writes from here on, and close what was open; answers how many holds.

    Raises:
        OSError: as `Journal.append`.
    """
    now = clock.unix_ms()
    ends = list(closings(journal.holds, unix_ms=now))
    records = [Record(events.epoch(epoch, version=version, unix_ms=now)), *ends]
    for first in range(0, len(records), CLOSE_MAX):
        journal.append(records[first : first + CLOSE_MAX])
    if ends:
        log.usage_recovered(requests=len(ends), epochs=1)
    return len(ends)


def closings(holds: Holds, *, unix_ms: int) -> Iterator[Record]:
    """The end of every hold that a dead frontend left: what its last checkpoint says, or nothing.

    So a crash never over-bills, and under-bills by less than one checkpoint interval a stream.
    """
    for hold in holds:
        reserved = hold.reserved
        if hold.usage is None:
            payload = events.expire(reserved, hold=hold.seq, unix_ms=unix_ms)
        else:
            settlement = Settlement(
                tenant_id=reserved.tenant_id,
                request_id=reserved.request_id,
                usage=hold.usage,
                outcome=Outcome.RECOVERED,
                charge_femto=_charge_femto(hold, reserved),
                version=reserved.version,
                first_token_unix_ms=None,
                settled_unix_ms=unix_ms,
                replicas_tried=0,
            )
            payload = events.settle(settlement, hold=hold.seq, unix_ms=unix_ms)
        yield Record(payload, Effect.ENDS, hold.seq)


def _charge_femto(hold: Hold, reserved: meterlog_pb2.Reserve) -> int:
    """By the price that was frozen; 0 where that price has no rate for what was delivered."""
    assert hold.usage is not None
    try:
        return events.price_of(reserved.price).charge_femto(hold.usage)
    except (UnknownUnit, AmountOutOfRange) as error:
        log.refused(error, during="recovery")
        return 0


def _check_link(folder: LogFolder, header: fmt.Header) -> None:
    """Whether the last segment follows the one before: its number, its records, its chain."""
    path = folder.segment(header.number)
    if header.number == 1:
        expected_seq, chain = fmt.FIRST_SEQ, fmt.GENESIS
    else:
        before = folder.segment(header.number - 1)
        read = _read(folder.files.read(before), folder.header(header.number - 1), before)
        if read.seal is None:
            why = "it ends without a Seal, and another segment follows"
            raise fmt.damaged(before, offset=read.end, seq=read.next_seq, why=why)
        expected_seq, chain = read.next_seq, read.seal.chain
    if header.first_seq != expected_seq:
        why = f"it begins with record {header.first_seq}, and {expected_seq} is next"
        raise fmt.damaged(path, offset=0, seq=expected_seq, why=why)
    if header.previous_chain != chain:
        why = "its chain does not continue that of the segment before"
        raise fmt.damaged(path, offset=0, seq=header.first_seq, why=why)


def _read(data: bytes, header: fmt.Header, path: Path) -> _Read:
    read = _Read(holds=Holds(), tree=MerkleTree(), end=fmt.HEADER_BYTES, next_seq=header.first_seq)
    for frame in fmt.frames(data, offset=read.end, seq=read.next_seq):
        event = meterlog_pb2.MeterEvent.FromString(frame.payload)
        kind = event.WhichOneof("kind")
        read.end, read.next_seq = frame.end, frame.seq + 1
        if kind == "seal":
            read.seal = event.seal
            break
        read.tree.append(frame.payload)
        if kind == "carry" and not read.is_carried:
            read.holds.carry_in(event.carry, event.unix_ms)
            read.began_unix_ms = event.unix_ms
            read.is_carried = event.carry.left == 0
            continue
        if not read.is_carried:
            break
        read.is_empty = False
        try:
            read.holds.apply(frame.seq, frame.payload, event)
        except KeyError as error:
            why = f"its record {frame.seq} is about hold {error}, which is not open"
            raise fmt.damaged(path, offset=frame.offset, seq=frame.seq, why=why) from error
    return read
