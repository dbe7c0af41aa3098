"""The Batch service as the command line uses it; refusals arrive as in `client.py`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import grpc

from headrace.deploy.client import CALL_S_MAX, CONNECT_S_MAX, Client, refusals
from headrace.serving.errors import InvalidRequest
from headrace.v1 import batch_pb2 as pb
from headrace.v1 import batch_pb2_grpc

PART_BYTES = 256 << 10


class BatchClient(Client):
    """One channel to one frontend. Close it, or use it as a context."""

    def __init__(self, address: str, key: str, *, root_certificates: Path | None = None) -> None:
        super().__init__(address, key, root_certificates=root_certificates)
        self._batches = batch_pb2_grpc.BatchStub(self._channel)

    def submit(self, file: BinaryIO, *, model: str) -> pb.BatchInfo:
        """Upload a file of lines.

        Raises:
            RemoteRefusal: a line cannot be run, or the server cannot take it now.
        """
        with refusals(self.address):
            return self._batches.Create(
                _parts(file, model), metadata=self._metadata, timeout=CALL_S_MAX
            )

    def get(self, batch_id: str) -> pb.BatchInfo:
        """How far a batch is.

        Raises:
            RemoteRefusal: there is no such batch of this key's project.
        """
        with refusals(self.address):
            request = pb.GetBatchRequest(batch_id=batch_id)
            return self._batches.Get(request, metadata=self._metadata, timeout=CONNECT_S_MAX)

    def list(self, *, limit: int) -> Sequence[pb.BatchInfo]:
        with refusals(self.address):
            request = pb.ListBatchesRequest(limit=limit)
            answer = self._batches.List(request, metadata=self._metadata, timeout=CONNECT_S_MAX)
        return answer.batches

    def cancel(self, batch_id: str) -> pb.BatchInfo:
        with refusals(self.address):
            request = pb.CancelBatchRequest(batch_id=batch_id)
            return self._batches.Cancel(request, metadata=self._metadata, timeout=CONNECT_S_MAX)

    def delete(self, batch_id: str) -> None:
        with refusals(self.address):
            request = pb.DeleteBatchRequest(batch_id=batch_id)
            self._batches.Delete(request, metadata=self._metadata, timeout=CONNECT_S_MAX)

    def results(self, batch_id: str, *, offset: int = 0) -> Iterator[bytes]:
        """What there is of the results, from a byte on; goes on by itself if the line breaks.

        Raises:
            RemoteRefusal: there is no such batch, or the server cannot be reached again.
        """
        is_broken = False
        while True:
            try:
                request = pb.BatchResultsRequest(batch_id=batch_id, offset=offset)
                call = self._batches.Results(request, metadata=self._metadata, timeout=CALL_S_MAX)
                for part in call:
                    is_broken, offset = False, part.next_offset
                    yield part.jsonl
            except grpc.RpcError as error:
                if is_broken or error.code() is not grpc.StatusCode.UNAVAILABLE:  # type: ignore[attr-defined]  # grpc's call objects are untyped.
                    with refusals(self.address):
                        raise
                is_broken = True
            else:
                return


def opened(path: str) -> BinaryIO:
    """The file to upload; the caller closes it.

    Raises:
        InvalidRequest: it cannot be read.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise InvalidRequest(
            f"The file {path} cannot be read: {error.strerror}.",
            why="A batch is a file of JSON lines, one request each.",
            fix="Check the path.",
            field="file",
        ) from error


def _parts(file: BinaryIO, model: str) -> Iterator[pb.CreateBatchRequest]:
    yield pb.CreateBatchRequest(options=pb.BatchOptions(model=model))
    while part := file.read(PART_BYTES):
        yield pb.CreateBatchRequest(jsonl=part)
