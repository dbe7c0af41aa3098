"""API keys on disk, as digests; and the secrets they are derived from.

A key is `hr_<key id>_<secret>`. The file keeps HMAC-SHA256(pepper, key), never the key: whoever
reads it can neither use a key nor test guesses without the pepper, which is another file. Keys
have 190 random bits, so a slow password hash would add nothing but latency.

The demo key is derived from the pepper, so that it can be shown again; every other key is shown
once, when it is made.
"""

import fcntl
import hashlib
import hmac
import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from headrace.serving.clock import Clock
from headrace.serving.errors import ConfigRefused, InvalidRequest, KeyNotFound

DEMO_TENANT = "demo"
KEYS_MAX = 100_000
"""Keys in the file: 20 MB. Beyond it a database is the right home."""
TENANT_CHARS_MAX = 64
_FILE_VERSION = 1
_SECRET_CHARS = 32
_KEY_ID_CHARS = 8
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredKey:
    """What is kept of a key. Nothing here can be presented as one."""

    key_id: str
    tenant_id: str
    digest: str
    """HMAC-SHA256(pepper, key), hex."""
    created_unix_ms: int
    revoked_unix_ms: int | None = None


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key at the one moment it is known in full."""

    key: str
    stored: StoredKey

    def __repr__(self) -> str:
        return f"NewKey(key_id={self.stored.key_id!r})"


class KeyStore:
    """The key file and its pepper.

    Every change is one atomic replacement under a file lock, so readers need none and several
    commands may run at once.
    """

    def __init__(self, path: Path, pepper_path: Path, *, clock: Clock) -> None:
        """Makes the pepper on first use.

        Raises:
            ConfigRefused: the pepper can be neither read nor made.
        """
        self.path = path
        self._pepper = secret_file(pepper_path)
        self._clock = clock

    def digest(self, key: str) -> str:
        """1.5 us. HMAC-SHA256(pepper, key), hex."""
        return hmac.digest(self._pepper, key.encode(), "sha256").hex()

    def derive(self, label: str) -> bytes:
        """32 bytes that only a holder of the pepper can compute; `label` separates purposes."""
        return hmac.digest(self._pepper, b"headrace/" + label.encode(), "sha256")

    def read(self) -> Mapping[str, StoredKey]:
        """All keys by id; empty when there is no file.

        Raises:
            ConfigRefused: the file is not one of ours.
        """
        try:
            text = self.path.read_text("utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            raise self._unreadable(str(error)) from error
        try:
            raw = json.loads(text)
            if raw["version"] != _FILE_VERSION:
                raise ValueError(f"version {raw['version']!r}, expected {_FILE_VERSION}")
            keys = [_stored_key(entry) for entry in raw["keys"]]
        except (ValueError, TypeError, KeyError) as error:
            raise self._unreadable(str(error)) from error
        return {key.key_id: key for key in keys}

    def create(self, *, tenant_id: str) -> NewKey:
        """A key for `tenant_id`. The answer is the only place where it stands in full.

        Raises:
            InvalidRequest: the tenant's name is empty, too long or holds other characters.
            ConfigRefused: the file cannot be read or written, or is full.
        """
        _check_tenant(tenant_id)
        with self._changing() as keys:
            key_id = _fresh_id(keys)
            new = self._new(key_id, tenant_id, _random(_DIGITS, _SECRET_CHARS))
            keys[key_id] = new.stored
        return new

    def demo(self) -> NewKey:
        """The demo tenant's key: the same one at every call, until it is revoked.

        After a revocation the next one in a fixed sequence is made, so a leaked demo key is
        replaced with `headrace keys revoke` and `headrace keys demo`.
        """
        with self._changing() as keys:
            for generation in range(1, KEYS_MAX):
                key_id = f"demo{generation:04}"
                new = self._new(key_id, DEMO_TENANT, _encode(self.derive(f"demo-key/{generation}")))
                stored = keys.get(key_id)
                if stored is None or stored.digest != new.stored.digest:
                    # Another digest: the pepper was replaced, so the old key works no more.
                    keys[key_id] = new.stored
                    return new
                if stored.revoked_unix_ms is None:
                    return NewKey(new.key, stored)
        raise AssertionError("more demo keys were revoked than the file can hold")

    def revoke(self, key_id: str) -> StoredKey:
        """Refuse the key from now on. Revoking it again changes nothing.

        Raises:
            KeyNotFound: no key has this id.
        """
        with self._changing() as keys:
            stored = keys.get(key_id)
            if stored is None:
                raise KeyNotFound(
                    f"There is no key {key_id!r}.",
                    why="Keys are named by the part between the two underscores.",
                    fix="See `headrace keys list`.",
                    field="key_id",
                )
            if stored.revoked_unix_ms is None:
                stored = replace(stored, revoked_unix_ms=self._clock.unix_ms())
                keys[key_id] = stored
        return stored

    def _new(self, key_id: str, tenant_id: str, secret: str) -> NewKey:
        key = f"hr_{key_id}_{secret}"
        stored = StoredKey(
            key_id=key_id,
            tenant_id=tenant_id,
            digest=self.digest(key),
            created_unix_ms=self._clock.unix_ms(),
        )
        return NewKey(key, stored)

    @contextmanager
    def _changing(self) -> Iterator[dict[str, StoredKey]]:
        """The keys, to be changed in place; written when the block ends without an exception."""
        lock_path = self.path.with_name(self.path.name + ".lock")
        try:
            with open(lock_path, "w", opener=_private) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                before = self.read()
                keys = dict(before)
                yield keys
                if keys != before:
                    self._write(keys)
        except OSError as error:
            raise ConfigRefused(
                f"The keys in {self.path} cannot be changed: {error.strerror}.",
                why="The file is replaced as a whole, which needs room and write permission.",
                fix="Check the folder's owner and its free space.",
            ) from error

    def _write(self, keys: Mapping[str, StoredKey]) -> None:
        if len(keys) > KEYS_MAX:
            raise ConfigRefused(
                f"{self.path} would hold {len(keys):,} keys.",
                why=f"One file holds at most {KEYS_MAX:,}.",
                fix="Share a key among the users of a tenant.",
            )
        entries = [asdict(key) for key in keys.values()]
        text = json.dumps({"version": _FILE_VERSION, "keys": entries}, indent=1) + "\n"
        replace_file(self.path, text.encode())

    def _unreadable(self, why: str) -> ConfigRefused:
        return ConfigRefused(
            f"{self.path} cannot be read as keys: {why}.",
            why="Headrace writes this file as a whole and reads it strictly.",
            fix="Restore it from a backup, or move it away and make new keys.",
        )


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
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigRefused(
            f"The secret {path} can be neither read nor made: {error.strerror}.",
            why="Keys and replicas are checked against it.",
            fix="Make the file readable by this user only, or its folder writable.",
        ) from error
    if len(secret) < 16:
        raise ConfigRefused(
            f"The secret {path} has {len(secret)} bytes.",
            why="Fewer than 16 can be guessed.",
            fix="Delete it to have one made, or write 32 random bytes in hex.",
        )
    return secret


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


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _stored_key(entry: Mapping[str, object]) -> StoredKey:
    values = {each.name: entry[each.name] for each in fields(StoredKey)}
    times = [values["created_unix_ms"], values["revoked_unix_ms"] or 0]
    texts = [values["key_id"], values["tenant_id"], values["digest"]]
    if not all(isinstance(each, int) for each in times):
        raise ValueError("a time is not a whole number")
    if not all(isinstance(each, str) and each for each in texts):
        raise ValueError("a key's id, tenant or digest is not a text")
    return StoredKey(**values)  # pyright: ignore[reportArgumentType]


def _check_tenant(tenant_id: str) -> None:
    allowed = set(_DIGITS + "_.:-")
    if not tenant_id or len(tenant_id) > TENANT_CHARS_MAX or set(tenant_id) - allowed:
        raise InvalidRequest(
            f"The tenant's name is {tenant_id!r}.",
            why=f"It has 1 to {TENANT_CHARS_MAX} letters, digits or _ . : - in it.",
            fix="Choose such a name, for example acme-prod.",
            field="tenant_id",
        )


def _fresh_id(taken: Mapping[str, StoredKey]) -> str:
    while (key_id := _random(_ID_DIGITS, _KEY_ID_CHARS)) in taken:
        pass
    return key_id


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
