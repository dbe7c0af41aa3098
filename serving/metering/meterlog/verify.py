"""Proves a whole log: every checksum and number, every root, the chain, each hold's one end.

Trusts nothing that it has not computed itself, but the order of the files' names.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from headrace.serving.metering.meterlog import format as fmt
from headrace.serving.metering.meterlog.files import Files, LocalFiles
from headrace.serving.metering.meterlog.folder import LogFolder
from headrace.serving.metering.meterlog.holds import Holds
from headrace.serving.metering.meterlog.merkle import MerkleTree, chained
from headrace.v1 import meterlog_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenHold:
    """A request that has not ended: it runs, or its frontend is dead and was not followed."""

    reserve: int
    tenant_id: str
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What a log holds that has no damage."""

    log_id: str
    segments: int
    sealed: int
    records: int
    last_seq: int
    chain: str
    """Hash of the last sealed segment, hex: it stands for everything up to there."""
    open: Sequence[OpenHold]
    torn_bytes: int
    """Left by a power cut, or by a write that is under way; the next start takes them back."""


@dataclass(slots=True, eq=False)
class _Walk:
    """What is known on the way through the log."""

    chain: bytes = fmt.GENESIS
    next_seq: int = fmt.FIRST_SEQ
    holds: Holds = field(default_factory=Holds)
    torn_bytes: int = 0
    sealed: int = 0


def verify(path: Path, *, files: Files | None = None) -> Verified:
    """Check everything in the log in `path`; reads it all, a segment at a time.

    Raises:
        MeterLogDamaged: the first damage, by file, offset and sequence number.
        MeterUnavailable: there is no log.
        OSError: it cannot be read.
    """
    folder = LogFolder(path, files or LocalFiles())
    log_id, numbers = folder.log_id(), folder.segments()
    walk = _Walk()
    for number in numbers:
        _check_segment(folder, number, walk, is_last=number == numbers[-1])
    return Verified(
        log_id=log_id,
        segments=len(numbers),
        sealed=walk.sealed,
        records=walk.next_seq - fmt.FIRST_SEQ,
        last_seq=walk.next_seq - 1,
        chain=walk.chain.hex(),
        open=[
            OpenHold(
                reserve=hold.seq,
                tenant_id=(reserved := hold.reserved).tenant_id,
                request_id=reserved.request_id,
            )
            for hold in walk.holds
        ],
        torn_bytes=walk.torn_bytes,
    )


def _check_segment(folder: LogFolder, number: int, walk: _Walk, *, is_last: bool) -> None:
    path, header = folder.segment(number), folder.header(number)
    data = folder.files.read(path)
    if header.first_seq != walk.next_seq:
        why = f"it begins with record {header.first_seq}, and {walk.next_seq} is next"
        raise fmt.damaged(path, offset=0, seq=walk.next_seq, why=why)
    if header.previous_chain != walk.chain:
        why = "its chain does not continue that of the segment before"
        raise fmt.damaged(path, offset=0, seq=header.first_seq, why=why)
    tree, carried = MerkleTree(), Holds()
    end, is_carried, is_sealed = fmt.HEADER_BYTES, False, False
    for frame, event in _events(data, header):
        end, walk.next_seq = frame.end, frame.seq + 1
        kind = event.WhichOneof("kind")
        if kind == "seal":
            _check_seal(event.seal, tree, header, frame, path)
            walk.chain, is_sealed = event.seal.chain, True
            walk.sealed += 1
            break
        tree.append(frame.payload)
        if not is_carried:
            if kind != "carry":
                raise _wrong(path, frame, f"it is a {kind} before all open holds were carried on")
            carried.carry_in(event.carry, event.unix_ms)
            is_carried = event.carry.left == 0
            if is_carried and not carried.agrees_with(walk.holds):
                raise _wrong(path, frame, "the holds that it carries on are not those open")
            continue
        _check_event(event, kind, frame, walk.holds, path)
    torn = fmt.check_tail(data, path, offset=end, seq=walk.next_seq)
    why = ""
    if not is_carried:
        why = "it does not begin with all holds that were open"
    elif is_sealed and torn:
        why = "something follows its Seal"
    elif not is_sealed and not is_last:
        why = "it ends without a Seal, and another segment follows"
    if why:
        raise fmt.damaged(path, offset=end, seq=walk.next_seq, why=why)
    walk.torn_bytes = torn


def _events(data: bytes, header: fmt.Header) -> Iterator[tuple[fmt.Frame, meterlog_pb2.MeterEvent]]:
    for frame in fmt.frames(data, offset=fmt.HEADER_BYTES, seq=header.first_seq):
        yield frame, meterlog_pb2.MeterEvent.FromString(frame.payload)


def _check_event(
    event: meterlog_pb2.MeterEvent, kind: str | None, frame: fmt.Frame, holds: Holds, path: Path
) -> None:
    """A hold's records follow its Reserve, name its request, and nothing follows its end."""
    if kind in ("settle", "void", "expire"):
        message = getattr(event, kind)
        hold = holds.get(message.reserve)
        if hold is None:
            raise _wrong(path, frame, f"it ends hold {message.reserve}, which is not open")
        reserved = hold.reserved
        if (message.tenant_id, message.request_id) != (reserved.tenant_id, reserved.request_id):
            raise _wrong(path, frame, f"it ends hold {message.reserve} of another request")
    if kind == "checkpoint" and event.checkpoint.reserve not in holds:
        raise _wrong(path, frame, f"it notes hold {event.checkpoint.reserve}, which is not open")
    if kind is None or kind == "carry":
        raise _wrong(path, frame, "it is none of the kinds that may stand here")
    holds.apply(frame.seq, frame.payload, event)


def _check_seal(
    seal: meterlog_pb2.Seal, tree: MerkleTree, header: fmt.Header, frame: fmt.Frame, path: Path
) -> None:
    if (seal.records, seal.first_seq) != (tree.length, header.first_seq):
        raise _wrong(path, frame, "its Seal counts other records")
    if seal.merkle_root != tree.root():
        raise _wrong(path, frame, "its Seal has another Merkle root")
    if seal.chain != chained(header.previous_chain, seal.merkle_root):
        raise _wrong(path, frame, "its Seal has another chain hash")


def _wrong(path: Path, frame: fmt.Frame, why: str) -> Exception:
    return fmt.damaged(path, offset=frame.offset, seq=frame.seq, why=why)
