"""A small blocking client of the Inference service, for the command line.

What the server refuses arrives as a `RemoteRefusal` with the server's own three sentences.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from headrace.serving.errors import ConfigRefused, ModelNotFound, ServingError
from headrace.v1 import inference_pb2, inference_pb2_grpc

CONNECT_S_MAX = 5.0
"""A server on this machine answers in milliseconds; one that is not there does not."""
CALL_S_MAX = 3600.0
"""No answer takes an hour; a call without a deadline would wait for a lost machine for ever."""

_STATUS_KEY = "grpc-status-details-bin"


class RemoteRefusal(ServingError):
    """The server said no, or could not be reached; `remote_reason` is its machine name."""

    reason = "REMOTE"

    def __init__(
        self, what: str, *, why: str, fix: str, remote_reason: str, retry_after_ms: int | None
    ) -> None:
        super().__init__(what, why=why, fix=fix, retry_after_ms=retry_after_ms)
        self.remote_reason = remote_reason


class Client:
    """One channel to one frontend, with one key. Close it, or use it as a context."""

    def __init__(self, address: str, key: str, *, root_certificates: Path | None = None) -> None:
        self.address = address
        self._metadata = (("authorization", f"Bearer {key}"),)
        self._channel = open_channel(address, root_certificates)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.address!r})"

    def close(self) -> None:
        self._channel.close()

    def models(self) -> Sequence[inference_pb2.Model]:
        """What is served.

        Raises:
            RemoteRefusal: the server cannot be reached, or refuses the key.
        """
        with refusals(self.address):
            answer = self._stub.ListModels(
                inference_pb2.ListModelsRequest(), metadata=self._metadata, timeout=CONNECT_S_MAX
            )
        return answer.models

    def only_model(self) -> str:
        """The one served model, for callers that name none.

        Raises:
            ModelNotFound: none is served, or several are.
        """
        names = [model.name for model in self.models()]
        if len(names) == 1:
            return names[0]
        raise ModelNotFound(
            f"{self.address} serves {len(names)} models{': ' if names else ''}{', '.join(names)}.",
            why="Without --model the only one is used.",
            fix="Name one with --model." if names else "Look at `headrace models` there.",
        )

    @contextmanager
    def generate(
        self, request: inference_pb2.GenerateRequest
    ) -> Iterator[Iterator[inference_pb2.GenerateChunk]]:
        """The chunks of one answer. Leaving the block early cancels the call.

        Raises:
            RemoteRefusal: before or between chunks.
        """
        with refusals(self.address):
            call = self._stub.Generate(request, metadata=self._metadata, timeout=CALL_S_MAX)
            try:
                yield cast("Iterator[inference_pb2.GenerateChunk]", call)
            finally:
                call.cancel()  # type: ignore[attr-defined]  # grpc's call objects are untyped.


@contextmanager
def refusals(address: str) -> Iterator[None]:
    """Turns what grpc raises inside the block into a RemoteRefusal."""
    try:
        yield
    except grpc.RpcError as error:
        raise _refusal(error, address) from error


def open_channel(address: str, root_certificates: Path | None) -> grpc.Channel:
    """A channel to a frontend, with TLS where certificates are given. The caller closes it.

    Raises:
        ConfigRefused: the certificates cannot be read.
    """
    options = [("grpc.max_receive_message_length", 64 << 20), ("grpc.enable_retries", 0)]
    if root_certificates is None:
        return grpc.insecure_channel(address, options)
    try:
        roots = root_certificates.read_bytes()
    except OSError as error:
        raise ConfigRefused(
            f"{root_certificates} cannot be read: {error.strerror}.",
            why="It holds the certificates that the server is checked against.",
            fix="Give a PEM file with --ca.",
        ) from error
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(roots), options)


def _refusal(error: grpc.RpcError, address: str) -> RemoteRefusal:
    assert isinstance(error, grpc.Call)
    detail = error.details() or ""
    info, retry_after_ms = _details(error)
    if info is not None:
        return RemoteRefusal(
            detail,
            why=info.metadata.get("why", f"The server gave the reason {info.reason}."),
            fix=info.metadata.get("fix", "Change the request as it says, or try again later."),
            remote_reason=info.reason,
            retry_after_ms=retry_after_ms,
        )
    return RemoteRefusal(
        f"The call to {address} ended with {error.code().name}.",
        why=detail or "The server said no more.",
        fix="Is `headrace serve` running there? Name another server with --address.",
        remote_reason=error.code().name,
        retry_after_ms=None,
    )


def _details(error: grpc.Call) -> tuple[error_details_pb2.ErrorInfo | None, int | None]:
    """ErrorInfo and RetryInfo, where the status carries them."""
    info: error_details_pb2.ErrorInfo | None = None
    retry_after_ms: int | None = None
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key != _STATUS_KEY or not isinstance(value, bytes):
            continue
        try:
            status.ParseFromString(value)
        except DecodeError:
            return None, None  # Not one of ours: the code and its text have to do.
    for packed in status.details:
        found, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if packed.Unpack(found):
            info = found
        elif packed.Unpack(retry):
            retry_after_ms = retry.retry_delay.ToMilliseconds()
    return info, retry_after_ms
