"""The accounts that a command works on: this home's own, or those of a frontend elsewhere.

At home the files' permissions are the authority, and the audit log names the unix user. Elsewhere a
token or a key is, and the frontend decides what it may do.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from headrace.serving.admission.account_schema import public_state
from headrace.serving.admission.accounts import local_actor, open_accounts
from headrace.serving.config import Config
from headrace.serving.domain.account import (
    AccountState,
    ApiKey,
    AuditRecord,
    AuditVerdict,
    NewKey,
    Organisation,
    Page,
    Project,
)
from headrace.serving.domain.permission import Role
from headrace.serving.domain.scope import Scope
from headrace.serving.errors import ConfigRefused, InvalidRequest

LIST_MAX = 10_000
"""Entries that one command shows; more are a matter for the API, page by page."""

_UNITS_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION = re.compile(r"([0-9]{1,6})([smhd])")


class Accounts(Protocol):
    """What both kinds offer; see `AccountStore` for what each method promises."""

    def create_organisation(self, *, tenant_id: str, display_name: str = "") -> Organisation: ...
    def set_organisation_state(self, *, tenant_id: str, state: AccountState) -> Organisation: ...
    def organisations(self, *, after: str = "") -> Page[Organisation]: ...
    def create_project(self, *, tenant_id: str, project_id: str) -> Project: ...
    def set_project_state(
        self, *, tenant_id: str, project_id: str, state: AccountState
    ) -> Project: ...
    def projects(self, *, tenant_id: str, after: str = "") -> Page[Project]: ...
    def create_key(
        self,
        *,
        tenant_id: str,
        project_id: str,
        label: str,
        scope: Scope,
        expires_unix_ms: int | None,
        key_id: str,
    ) -> NewKey: ...
    def update_key(
        self,
        *,
        key_id: str,
        tenant_id: str | None,
        label: str | None,
        scope: Scope | None,
        expires_unix_ms: int | None,
        never_expires: bool,
    ) -> ApiKey: ...
    def rotate_key(
        self, *, key_id: str, tenant_id: str | None, overlap_ms: int, new_key_id: str
    ) -> NewKey: ...
    def revoke_key(self, *, key_id: str, tenant_id: str | None) -> ApiKey: ...
    def key(self, *, key_id: str, tenant_id: str | None) -> ApiKey: ...
    def keys(
        self, *, tenant_id: str | None, project_id: str | None, after: str = ""
    ) -> Page[ApiKey]: ...
    def audit(
        self, *, tenant_id: str | None, before_seq: int | None = None, limit: int
    ) -> Page[AuditRecord]: ...
    def verify_audit(self, *, head: str) -> AuditVerdict: ...


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which accounts, and how the answer is printed."""
    parser.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")
    parser.add_argument("--address", metavar="HOST:PORT", help="a frontend elsewhere")
    parser.add_argument("--token-file", type=Path, help="with an operator's token or a key for it")
    parser.add_argument("--ca", type=Path, help="PEM file with its certificate authority: use TLS")
    parser.add_argument("--json", action="store_true", help="print JSON")


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[Accounts]:
    """The accounts that the options name.

    Raises:
        ConfigRefused: the home, or the file with the token, cannot be used.
    """
    if args.address is None:
        if args.token_file is not None:
            raise ConfigRefused(
                "--token-file is given, and no --address.",
                why="At home the files' permissions say what you may do; no token is asked for.",
                fix="Name the frontend with --address, or leave the token out.",
                field="address",
            )
        config = Config.load(args.home)
        config.prepare_home()
        with closing(open_accounts(config)) as store:
            yield store
        return
    from headrace.deploy.remote_accounts import RemoteAccounts

    with closing(RemoteAccounts(args.address, read_token(args.token_file), args.ca)) as remote:
        yield remote


def who_am_i(args: argparse.Namespace) -> tuple[str, Sequence[tuple[str, str]]]:
    """Who makes changes with these options, and in which roles: pairs of role and organisation.

    An empty organisation is all of them.

    Raises:
        RemoteRefusal: the frontend does not know the token.
    """
    if args.address is None:
        return local_actor(), [(Role.OPERATOR, "")]
    from headrace.deploy.remote_accounts import RemoteAccounts

    with closing(RemoteAccounts(args.address, read_token(args.token_file), args.ca)) as remote:
        found = remote.who_am_i()
    return found.actor, [(grant.role, grant.tenant_id) for grant in found.grants]


def duration_ms(text: str, flag: str) -> int:
    """`90s`, `15m`, `24h` or `90d`.

    Raises:
        InvalidRequest: it is none of these.
    """
    found = _DURATION.fullmatch(text)
    if found is None:
        raise InvalidRequest(
            f"{flag} is {text!r}.",
            why="It is a number of seconds, minutes, hours or days.",
            fix="Write it like 90s, 15m, 24h or 90d.",
            field=flag,
        )
    return int(found[1]) * _UNITS_MS[found[2]]


def moment(unix_ms: int | None, none: str = "never") -> str:
    if unix_ms is None:
        return none
    return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def as_json(entity: Organisation | Project | ApiKey) -> dict[str, object]:
    """What scripts rely on: names stay, more may be added."""
    if isinstance(entity, ApiKey):
        return {**public_state(entity), "last_used_unix_ms": entity.last_used_unix_ms}
    return dict(public_state(entity))


def read_token(path: Path | None) -> str:
    """The token or key in the file.

    Raises:
        ConfigRefused: no file is named, or it cannot be read.
    """
    if path is None:
        raise ConfigRefused(
            "--address is given, and no --token-file.",
            why="A frontend asks for an operator's token, or for a key that may administer.",
            fix="Put it into a file that only you may read, and give that with --token-file.",
            field="token_file",
        )
    try:
        return path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigRefused(
            f"{path} cannot be read as a token: {error}.",
            why="It holds the token or the key, and nothing else.",
            fix="Check the path.",
            field="token_file",
        ) from error
