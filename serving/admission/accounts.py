"""Opens the accounts that the configuration names, and takes over those of an older Headrace."""

import importlib
import json
import os
import pwd
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from headrace.serving.admission.account_store import AccountStore
from headrace.serving.admission.database import Database, SqliteDatabase
from headrace.serving.admission.key_store import Peppers
from headrace.serving.clock import Clock, SystemClock
from headrace.serving.config import Config
from headrace.serving.domain.account import ApiKey
from headrace.serving.domain.record import DEFAULT_PROJECT
from headrace.serving.domain.scope import UNLIMITED
from headrace.serving.errors import ConfigRefused

_KEY_FILE_VERSION = 1
_TAKEN_OVER = ".taken-over"


def open_accounts(
    config: Config, *, clock: Clock | None = None, actor: str | None = None
) -> AccountStore:
    """The accounts of this home, made on first use. Blocks. The caller closes it.

    Keys of a `keys.json`, as Headrace kept them before it had organisations, are taken over once:
    each tenant becomes an organisation with a project `default`, and the file is set aside.

    Args:
        config: says where they are.
        clock: of records; the system's unless a test owns time.
        actor: whom the audit log names; the user of this process unless given.

    Raises:
        ConfigRefused: the pepper, the tables or the old file cannot be used.
        AccountsUnavailable: the database does not answer.
    """
    store = AccountStore(
        _database(config),
        Peppers(config.pepper_path),
        clock=clock or SystemClock(),
        actor=actor or local_actor(),
    )
    try:
        take_over(config.keys_path, store)
    except BaseException:
        store.close()
        raise
    return store


def demo_key(config: Config) -> str:
    """The demo organisation's key, made on first use; see `AccountStore.demo`. Blocks."""
    with closing(open_accounts(config)) as store:
        return store.demo().key


def local_actor() -> str:
    """`local:<unix user>`: whoever may write the files may do everything, and is named."""
    uid = os.getuid()
    try:
        return f"local:{pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"local:{uid}"  # A container's user need not have a name.


def take_over(path: Path, store: AccountStore) -> int:
    """Bring in the keys of the file and set it aside; how many were new. No file, none.

    A crash in between is made good by the next call: keys that are known stay as they are.

    Raises:
        ConfigRefused: the file is not one of ours, or cannot be set aside.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return 0
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, str(error)) from error
    pepper_id = store.peppers.current.pepper_id
    try:
        raw = json.loads(text)
        if raw["version"] != _KEY_FILE_VERSION:
            raise ValueError(f"version {raw['version']!r}, expected {_KEY_FILE_VERSION}")
        keys = [_old_key(entry, pepper_id) for entry in raw["keys"]]
    except (ValueError, TypeError, KeyError) as error:
        raise _unreadable(path, str(error)) from error
    taken = store.bring_in(keys)
    try:
        path.rename(path.with_name(path.name + _TAKEN_OVER))
    except FileNotFoundError:
        pass  # Another process took over the same keys at the same time.
    except OSError as error:
        raise _unreadable(path, str(error)) from error
    return taken


def _old_key(entry: Mapping[str, object], pepper_id: str) -> ApiKey:
    names = ("key_id", "tenant_id", "digest")
    key_id, tenant_id, digest = (entry[name] for name in names)
    created, revoked = entry["created_unix_ms"], entry["revoked_unix_ms"]
    if not (isinstance(created, int) and isinstance(revoked, int | None)):
        raise ValueError("a time is not a whole number")
    if not (isinstance(key_id, str) and isinstance(tenant_id, str) and isinstance(digest, str)):
        raise ValueError("a key's id, tenant or digest is not a text")
    if not (key_id and tenant_id and digest):
        raise ValueError("a key's id, tenant or digest is empty")
    return ApiKey(
        key_id=key_id,
        tenant_id=tenant_id,
        project_id=DEFAULT_PROJECT,
        label="",
        scope=UNLIMITED,
        created_unix_ms=created,
        expires_unix_ms=None,
        revoked_unix_ms=revoked,
        digest=digest,
        pepper_id=pepper_id,
    )


def _database(config: Config) -> Database:
    if config.accounts.postgres is None:
        return SqliteDatabase(config.accounts_path)
    try:
        home = importlib.import_module("headrace.serving.admission.database_postgres")
    except ModuleNotFoundError as error:
        raise ConfigRefused(
            "accounts.postgres is set, and psycopg is not installed.",
            why="Accounts in PostgreSQL are reached through it.",
            fix="Run `pip install 'headrace[postgres]'`.",
            field="accounts.postgres",
        ) from error
    return home.PostgresDatabase(config.accounts.postgres)


def _unreadable(path: Path, why: str) -> ConfigRefused:
    return ConfigRefused(
        f"{path} cannot be taken over: {why}.",
        why="It is where keys were kept before there were organisations, and is read strictly.",
        fix="Restore it from a backup, or move it away and make new keys.",
    )
