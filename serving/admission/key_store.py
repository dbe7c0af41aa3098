"""Keys as digests, and the secrets they are derived from.

A key is `hr_<key id>_<secret>`. The store keeps HMAC-SHA256(pepper, key), never the key: whoever
reads it can neither use a key nor test guesses without the pepper, which is another file. Keys
have 190 random bits, so a slow password hash would add nothing but latency.

The demo key is derived from the pepper, so that it can be shown again; every other key is shown
once, when it is made.

Two peppers may be active: new keys stand on the current one, and those made before a rotation go
on standing on the previous one, for as long as its file is there.
"""

import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from headrace.serving.errors import ConfigRefused

DEMO_PREFIX = "demo"
"""Of demo keys' ids, and of no others: random ones have no `o` in them."""
_SECRET_CHARS = 32
_KEY_ID_CHARS = 8
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"

_FileStamp = tuple[int, int, int] | None


@dataclass(frozen=True, slots=True, repr=False)
class Pepper:
    """The secret that digests are made with."""

    secret: bytes

    @property
    def pepper_id(self) -> str:
        """Names it in a stored key, and gives nothing away."""
        return self.derive("pepper-id")[:4].hex()

    def digest(self, key: str) -> bytes:
        """1.5 us. HMAC-SHA256(pepper, key)."""
        return hmac.digest(self.secret, key.encode(), "sha256")

    def derive(self, label: str) -> bytes:
        """32 bytes that only a holder of the pepper can compute; `label` separates purposes."""
        return hmac.digest(self.secret, b"headrace/" + label.encode(), "sha256")


class Peppers:
    """The current pepper and, beside it in `<file>.previous`, the one before, if it is kept.

    `refresh` belongs to one thread; the others see the old pair or the new one.
    """

    def __init__(self, path: Path) -> None:
        """Makes the current pepper on first use.

        Raises:
            ConfigRefused: a pepper can be neither read nor made.
        """
        self._path = path
        self._previous_path = path.with_name(path.name + ".previous")
        secret_file(path)
        self._stamps = self._file_stamps()
        self._active = self._read()

    @property
    def current(self) -> Pepper:
        return next(iter(self._active.values()))

    @property
    def active(self) -> Mapping[str, Pepper]:
        """By pepper id, the current one first."""
        return self._active

    def refresh(self) -> bool:
        """Read them again if a file has changed; whether one had.

        Raises:
            ConfigRefused: one cannot be read; what was read before stays in force.
        """
        stamps = self._file_stamps()
        if stamps == self._stamps:
            return False
        self._active = self._read()
        self._stamps = stamps
        return True

    def rotate(self) -> None:
        """Put a fresh pepper in the current one's place, which becomes the previous one.

        A crash in between leaves one pepper under both names, and the next call goes on.

        Raises:
            ConfigRefused: a file cannot be written.
        """
        try:
            replace_file(self._previous_path, self.current.secret + b"\n")
            replace_file(self._path, secrets.token_hex(32).encode() + b"\n")
        except OSError as error:
            raise ConfigRefused(
                f"The pepper {self._path} cannot be replaced: {error.strerror}.",
                why="Both files are written beside it and put in its place.",
                fix="Check the folder's owner and its free space.",
            ) from error
        self.refresh()

    def _read(self) -> Mapping[str, Pepper]:
        peppers = [Pepper(_read_secret(self._path))]
        if self._previous_path.exists():
            peppers.append(Pepper(_read_secret(self._previous_path)))
        return {pepper.pepper_id: pepper for pepper in peppers}

    def _file_stamps(self) -> tuple[_FileStamp, _FileStamp]:
        return _stamp(self._path), _stamp(self._previous_path)


def new_key(key_id: str) -> str:
    """A key with this id and a random secret."""
    return f"hr_{key_id}_{_random(_DIGITS, _SECRET_CHARS)}"


def new_key_id() -> str:
    """40 random bits: two of 100,000 keys meet once in 200 stores."""
    return _random(_ID_DIGITS, _KEY_ID_CHARS)


def demo_key(pepper: Pepper, generation: int) -> str:
    """The same key at every call; a revoked one is followed by the next generation's."""
    return f"hr_{demo_key_id(generation)}_{_encode(pepper.derive(f'demo-key/{generation}'))}"


def demo_key_id(generation: int) -> str:
    return f"{DEMO_PREFIX}{generation:04}"


def secret_file(path: Path) -> bytes:
    """The secret that the file holds, made of 32 random bytes on first use, mode 0600.

    Two processes that start at once agree on one secret.

    Raises:
        ConfigRefused: it can be neither read nor made, or is too short to be a secret.
    """
    try:
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _create_once(path, secrets.token_hex(32).encode() + b"\n")
    except OSError as error:
        raise _no_secret(path, error) from error
    return _read_secret(path)


def _read_secret(path: Path) -> bytes:
    """The secret, of a file that must be there: one that vanished is never made again unasked."""
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise _no_secret(path, error) from error
    if len(secret) < 16:
        raise ConfigRefused(
            f"The secret {path} has {len(secret)} bytes.",
            why="Fewer than 16 can be guessed.",
            fix="Delete it to have one made, or write 32 random bytes in hex.",
        )
    return secret


def _no_secret(path: Path, error: OSError) -> ConfigRefused:
    return ConfigRefused(
        f"The secret {path} can be neither read nor made: {error.strerror}.",
        why="Keys and replicas are checked against it.",
        fix="Make the file readable by this user only, or its folder writable.",
    )


def cluster_token(path: Path) -> str:
    """What replicas and frontends show each other, as `authorization: Bearer <token>`."""
    secret = secret_file(path)
    try:
        return secret.decode("ascii")
    except UnicodeDecodeError as error:
        raise ConfigRefused(
            f"The token {path} is not ASCII text.",
            why="It travels in a header.",
            fix="Delete it to have one made.",
        ) from error


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` in place of the file, wholly or not at all, mode 0600, durable on return."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _create_once(path: Path, content: bytes) -> None:
    """Like `replace_file`, but an existing file wins."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        pass  # Another process was first; its secret is the one.
    finally:
        Path(temporary).unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _stamp(path: Path) -> _FileStamp:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _random(digits: str, length: int) -> str:
    return "".join(secrets.choice(digits) for _ in range(length))


def _encode(seed: bytes) -> str:
    """32 base-62 digits from a seed, as a random secret has."""
    number = int.from_bytes(hashlib.sha256(seed).digest())
    digits: list[str] = []
    for _ in range(_SECRET_CHARS):
        number, digit = divmod(number, len(_DIGITS))
        digits.append(_DIGITS[digit])
    return "".join(digits)
