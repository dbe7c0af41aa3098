"""The lines of a new batch, from the wire to its file: checked one by one, as they come."""

import threading
from collections.abc import Iterator
from pathlib import Path

from headrace.serving.domain.batch import INPUT_BYTES_MAX, LINE_BYTES_MAX, LINES_MAX
from headrace.serving.errors import InvalidRequest, ServingError
from headrace.serving.frontend.batch_lines import at_line, check_line, parse_line
from headrace.serving.jobs.batch_files import RequestsWriter
from headrace.v1 import batch_pb2

MODELS_MAX = 16
"""Distinct models of one batch: each is looked up once."""


class Upload:
    """Takes the parts of one upload, in order. Blocks for parsing and writing; any thread may call.

    Holds the line that is not complete yet, and the custom_ids: 50,000 of 64 characters are 6 MB.
    """

    def __init__(self, folder: Path) -> None:
        """Nothing is opened before the first part. `folder` is the batch's own."""
        self.models: dict[str, int] = {}
        """Each model and the first line that names it."""
        self.lines = 0
        self._folder = folder
        self._writer: RequestsWriter | None = None
        self._lock = threading.Lock()
        """A caller that hangs up leaves its last part to a thread that still writes it."""
        self._model = ""
        self._rest = b""
        self._received = 0
        self._seen: set[str] = set()

    def take(self, part: batch_pb2.CreateBatchRequest) -> None:
        """Check and write what this part completes.

        Raises:
            InvalidRequest: a line cannot be run, or a bound is passed.
            StorageFull: there is no room.
        """
        with self._lock:
            match part.WhichOneof("part"):
                case "options":
                    if self._received:
                        raise _refused("The options come after lines.", "They hold for all.")
                    self._model = part.options.model
                case "jsonl":
                    self._count(len(part.jsonl))
                    for raw in self._completed(part.jsonl):
                        self._take_raw(raw)
                case "line":
                    self._count(part.line.ByteSize())
                    self._take_line(part.line)
                case _:
                    raise _refused("A part of the upload is empty.", "It has options or lines.")

    def finish(self) -> int:
        """Make all of it durable; its size in bytes.

        Raises:
            InvalidRequest: the last line cannot be run, or there is none.
            StorageFull: there is no room.
        """
        with self._lock:
            if self._rest.strip():
                self._take_raw(self._rest)
            if self._writer is None:
                raise _refused("The batch has no lines.", "There is nothing to run.")
            self._writer.finish()
            return self._writer.size

    def close(self) -> None:
        """Let go of the file, whatever became of it. Idempotent."""
        with self._lock:
            if self._writer is not None:
                self._writer.close()

    def _count(self, size: int) -> None:
        self._received += size
        if self._received > INPUT_BYTES_MAX:
            raise _refused(
                f"The upload has more than {INPUT_BYTES_MAX:,} bytes.",
                "That is the bound of one batch.",
            )

    def _completed(self, jsonl: bytes) -> Iterator[bytes]:
        *complete, self._rest = (self._rest + jsonl).split(b"\n")
        yield from complete
        if len(self._rest) > LINE_BYTES_MAX:
            raise _refused(
                f"Line {self.lines + 1}: It has more than {LINE_BYTES_MAX:,} bytes.",
                "That is the bound of one line.",
            )

    def _take_raw(self, raw: bytes) -> None:
        if raw.strip():
            self._add(parse_line(raw, number=self.lines + 1, model=self._model))
        else:
            raise _refused(f"Line {self.lines + 1}: It is empty.", "Each line is a JSON object.")

    def _take_line(self, line: batch_pb2.BatchLine) -> None:
        line.request.model = line.request.model or self._model
        try:
            check_line(line)
        except ServingError as refusal:
            raise at_line(refusal, number=self.lines + 1) from refusal
        self._add(line)

    def _add(self, line: batch_pb2.BatchLine) -> None:
        self.lines += 1
        if self.lines > LINES_MAX:
            raise _refused(
                f"The batch has more than {LINES_MAX:,} lines.", "That is the bound of one batch."
            )
        if line.custom_id in self._seen:
            raise _refused(
                f"Line {self.lines}: The custom_id {line.custom_id!r} stands twice.",
                "Results are told apart by it.",
            )
        self._seen.add(line.custom_id)
        self.models.setdefault(line.request.model, self.lines)
        if len(self.models) > MODELS_MAX:
            raise _refused(
                f"Line {self.lines}: It names the {len(self.models)}th model.",
                f"One batch has at most {MODELS_MAX}.",
            )
        self._writer = self._writer or RequestsWriter(self._folder)
        self._writer.add(line.SerializeToString())


def _refused(what: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        what, why=why, fix="Correct the file, or split it into several batches.", field="jsonl"
    )
