"""Objects by key in a bucket or a folder, through fsspec: whole or not there.

The keys below a URL:

    blobs/sha256/<hash>          parts of files, by their content
    models/<model>/<number>.json what a version is, signed; written last, and never again
"""

import hashlib
import os
import uuid
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import fsspec
from botocore.exceptions import BotoCoreError, NoCredentialsError
from s3fs.core import S3_RETRYABLE_ERRORS

from headrace.serving.errors import InvalidRequest

T = TypeVar("T")

CONNECT_S_MAX, READ_S_MAX = 10.0, 60.0
"""A part of 64 MiB over 10 Mbit/s takes 54 s."""


class Objects(Protocol):
    """A place for objects. Any thread may call; each method raises OSError where it fails."""

    def holds(self, key: str, content: bytes) -> bool:
        """Whether exactly this content is there, proved by the store's own digest of it."""
        ...

    def put(self, key: str, content: bytes) -> None:
        """Write an object, replacing one that is there."""
        ...

    def create(self, key: str, content: bytes) -> bool:
        """Write an object unless one is there; whether it was written."""
        ...

    def get(self, key: str, *, bytes_max: int) -> bytes:
        """Read an object, or its first `bytes_max + 1` bytes.

        Raises:
            FileNotFoundError: it is not there.
        """
        ...

    def names(self, prefix: str) -> Sequence[str]:
        """The last parts of the keys right below `prefix/`."""
        ...


class Folder:
    """Objects as files below a folder; another machine may have it mounted too."""

    def __init__(self, path: str) -> None:
        self._files = fsspec.filesystem("file", auto_mkdir=True)
        self._root = path.rstrip("/")

    def holds(self, key: str, content: bytes) -> bool:
        path = self._path(key)
        if not self._files.exists(path) or self._files.size(path) != len(content):
            return False
        return hashlib.sha256(self._files.cat_file(path)).digest() == _sha256(content)

    def put(self, key: str, content: bytes) -> None:
        beside = self._written_beside(key, content)
        os.replace(beside, self._path(key))

    def create(self, key: str, content: bytes) -> bool:
        beside = self._written_beside(key, content)
        try:
            self._files.link(beside, self._path(key))
        except FileExistsError:
            return False
        finally:
            self._files.rm_file(beside)
        return True

    def get(self, key: str, *, bytes_max: int) -> bytes:
        return self._files.cat_file(self._path(key), start=0, end=bytes_max + 1)

    def names(self, prefix: str) -> Sequence[str]:
        try:
            found = self._files.ls(self._path(prefix), detail=False)
        except FileNotFoundError:
            return []
        return [name for path in found if not (name := path.rpartition("/")[2]).startswith(".")]

    def _written_beside(self, key: str, content: bytes) -> str:
        """A killed writer leaves a hidden file, never half an object."""
        folder, _, name = self._path(key).rpartition("/")
        beside = f"{folder}/.{name}.{uuid.uuid4().hex}"
        self._files.pipe_file(beside, content)
        return beside

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"


class Bucket:
    """Objects of an S3-compatible store; the usual AWS variables say who we are."""

    def __init__(self, path: str, *, endpoint_url: str | None) -> None:
        self._bucket = fsspec.filesystem(
            "s3",
            endpoint_url=endpoint_url,
            use_listings_cache=False,
            skip_instance_cache=True,
            # How often and how long is tried is said once, in `patience.py`.
            config_kwargs={
                "connect_timeout": CONNECT_S_MAX,
                "read_timeout": READ_S_MAX,
                "retries": {"max_attempts": 0},
            },
        )
        self._bucket.retries = 1
        self._root = path.strip("/")

    def holds(self, key: str, content: bytes) -> bool:
        """By the ETag, which of an object that was put at once is its MD5.

        Where the bucket encrypts with a key of KMS it is something else, and a part is put again.
        """
        try:
            found = self._tried(lambda: self._bucket.info(self._path(key)))
        except FileNotFoundError:
            return False
        return found["ETag"].strip('"') == hashlib.md5(content, usedforsecurity=False).hexdigest()

    def put(self, key: str, content: bytes) -> None:
        self._put(key, content, mode="overwrite")

    def create(self, key: str, content: bytes) -> bool:
        """By a conditional request (If-None-Match), which S3, MinIO and Ceph know."""
        try:
            self._put(key, content, mode="create")
        except FileExistsError:
            return False
        return True

    def get(self, key: str, *, bytes_max: int) -> bytes:
        path = self._path(key)
        return self._tried(lambda: self._bucket.cat_file(path, start=0, end=bytes_max + 1))

    def names(self, prefix: str) -> Sequence[str]:
        try:
            found = self._tried(lambda: self._bucket.ls(self._path(prefix), detail=False))
        except FileNotFoundError:
            return []
        return [path.rpartition("/")[2] for path in found]

    def _put(self, key: str, content: bytes, *, mode: str) -> None:
        # One request whatever the size, so that the ETag is that of the content.
        self._tried(
            lambda: self._bucket.pipe_file(
                self._path(key), content, chunksize=len(content) + 1, mode=mode
            )
        )

    def _tried(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except NoCredentialsError as error:
            raise PermissionError("no credentials were found") from error
        except (BotoCoreError, *S3_RETRYABLE_ERRORS) as error:
            raise ConnectionError(str(error)) from error

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"


def open_objects(url: str, *, endpoint_url: str | None = None) -> Objects:
    """The objects below `s3://bucket/prefix` or `file:///folder`.

    Raises:
        InvalidRequest: the URL is another.
    """
    scheme, _, path = url.partition("://")
    if scheme == "s3" and path.strip("/") and "@" not in path:
        return Bucket(path, endpoint_url=endpoint_url)
    if scheme == "file" and path.startswith("/"):
        return Folder(path)
    raise InvalidRequest(
        "The URL of the store is not understood.",
        why="Artifacts are kept at s3://bucket/prefix or file:///folder; credentials are no part "
        "of it.",
        fix="Write it so, and put credentials into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
        field="url",
    )


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
