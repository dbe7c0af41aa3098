"""Where commands write corrections and credits: this home's meter log, or a frontend that runs.

At home the files' permissions are the authority, as long as no frontend writes the log. While one
does, it is asked like any other: with an operator's token.
"""

import argparse
import asyncio
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Protocol

from headrace.deploy.accounts import read_token
from headrace.deploy.client import open_channel, refusals
from headrace.deploy.connection import certificates, local_address
from headrace.serving.admission.account_store import AccountStore
from headrace.serving.admission.accounts import open_accounts
from headrace.serving.clock import SystemClock
from headrace.serving.config import Config
from headrace.serving.domain.record import Adjustment, Grant
from headrace.serving.domain.usage import FEMTO_PER_NANO
from headrace.serving.errors import AmountOutOfRange, ConfigRefused, InvalidRequest
from headrace.serving.metering import price_book
from headrace.serving.metering.corrections import Corrections
from headrace.serving.metering.ledger.booked import Booked, booked
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.projector import Follower
from headrace.serving.metering.ledger.sqlite_database import SqliteDatabase
from headrace.serving.metering.meterlog.meter_log import MeterLog
from headrace.serving.metering.meterlog.reader import LogReader
from headrace.serving.metering.price_shelf import PriceShelf
from headrace.v1 import billing_pb2 as pb
from headrace.v1 import billing_pb2_grpc

TOKEN_VARIABLE = "HEADRACE_ADMIN_KEY"  # noqa: S105  A name, not a token.
_WIRE_MAX = (1 << 63) - 1
CALL_S_MAX = 30.0
"""A correction takes milliseconds; beyond this the frontend or the way to it is stuck."""

_AMOUNT = re.compile(r"([+-]?)([0-9]{1,10})(?:\.([0-9]{1,9}))?")


class Writer(Protocol):
    def write(self, correction: Adjustment | Grant) -> tuple[str, int]:
        """Make it durable, once for each id; answers its log and its record there.

        Raises: what `Corrections.write` does, AccountNotFound, or RemoteRefusal.
        """
        ...


class RemoteWriter:
    """One channel to one frontend, which writes whoever has the token as the actor. Close it."""

    def __init__(self, address: str, token: str, root_certificates: Path | None) -> None:
        self._address = address
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._channel = open_channel(address, root_certificates)
        self._stub = billing_pb2_grpc.BillingStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def write(self, correction: Adjustment | Grant) -> tuple[str, int]:
        request = _request(correction)
        is_adjustment = isinstance(request, pb.AdjustRequest)
        method = self._stub.Adjust if is_adjustment else self._stub.Grant
        with refusals(self._address):
            found = method(request, metadata=self._metadata, timeout=CALL_S_MAX)
        return found.log_id, found.seq


class HomeWriter:
    """Writes this home's log itself, which no frontend may do meanwhile."""

    def __init__(
        self, corrections: Corrections, accounts: AccountStore, runner: asyncio.Runner
    ) -> None:
        self._corrections, self._accounts, self._runner = corrections, accounts, runner

    def write(self, correction: Adjustment | Grant) -> tuple[str, int]:
        self._accounts.check_exists(
            tenant_id=correction.tenant_id, project_id=correction.project_id
        )
        found = self._runner.run(self._corrections.write(correction))
        return found.log_id, found.seq


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[Writer]:
    """What the options of `accounts.add_options` name.

    Raises:
        ConfigRefused: there is no token where one is asked for, or the home cannot be used.
        MeterUnavailable, MeterLogDamaged, LedgerUnavailable: this home's books cannot be used.
    """
    with ExitStack() as stack:
        if args.address is not None:
            writer = RemoteWriter(args.address, _token(args), args.ca)
            yield stack.enter_context(closing(writer))
            return
        config = Config.load(args.home)
        config.prepare_home()
        if (log := _log(config)) is None:
            writer = RemoteWriter(local_address(config), _token(args), certificates(args))
            yield stack.enter_context(closing(writer))
            return
        stack.callback(log.close)
        yield _at_home(config, log, stack)


def nano(text: str, flag: str = "--amount") -> int:
    """`12.50` or `-3.2` units of currency, exactly.

    Raises:
        InvalidRequest: it is no such number.
    """
    found = _AMOUNT.fullmatch(text)
    if found is None:
        raise InvalidRequest(
            f"{flag} is {text[:40]!r}.",
            why="It is money, in units of currency with at most nine decimals.",
            fix=f"Write it like {flag}=12.50 or {flag}=-3.20.",
            field="amount",
        )
    amount = int(found[2]) * 10**9 + int((found[3] or "").ljust(9, "0"))
    return -amount if found[1] == "-" else amount


def _request(correction: Adjustment | Grant) -> pb.AdjustRequest | pb.GrantRequest:
    amount_nano, rest = divmod(correction.amount_femto, FEMTO_PER_NANO)
    assert not rest, "amounts on the wire are whole nano"
    if abs(amount_nano) > _WIRE_MAX:
        raise AmountOutOfRange(
            f"The amount is {amount_nano:,} nano.",
            why=f"A request holds 64 bits: {_WIRE_MAX:,} nano.",
            fix="Give a smaller one.",
            field="amount",
        )
    if isinstance(correction, Adjustment):
        return pb.AdjustRequest(
            tenant_id=correction.tenant_id,
            project_id=correction.project_id,
            adjustment_id=correction.adjustment_id,
            amount_nano=amount_nano,
            currency=correction.currency,
            reason=correction.reason,
            request_id=correction.request_id,
        )
    return pb.GrantRequest(
        tenant_id=correction.tenant_id,
        project_id=correction.project_id,
        grant_id=correction.grant_id,
        amount_nano=amount_nano,
        currency=correction.currency,
        reason=correction.reason,
        expires_unix_ms=correction.expires_unix_ms,
    )


def _log(config: Config) -> MeterLog | None:
    """The log of this home, taken for this process; None while a frontend has it."""
    try:
        return MeterLog(
            config.meterlog_dir,
            clock=SystemClock(),
            epoch=uuid.uuid4().hex,
            # It accepts no requests here.
            was_used=lambda *_: False,
            config=config.meter,
        )
    except ConfigRefused:
        return None  # That it is taken is its one reason for this.


def _at_home(config: Config, log: MeterLog, stack: ExitStack) -> HomeWriter:
    clock = SystemClock()
    accounts = stack.enter_context(closing(open_accounts(config)))
    ledger = stack.enter_context(closing(Ledger(SqliteDatabase(config.ledger_path))))
    source = LogReader(config.meterlog_dir, durable_seq=lambda: log.durable_seq)
    follower = Follower(source, ledger, clock=clock)
    prices = PriceShelf(config.prices_dir, price_book.embedded(config.prices))

    def find(correction: Adjustment | Grant) -> Booked | None:
        follower.catch_up()
        return booked(ledger, correction)

    corrections = Corrections(
        log, find=find, currency=lambda: prices.at(clock.unix_ms()).currency, clock=clock
    )
    return HomeWriter(corrections, accounts, stack.enter_context(asyncio.Runner()))


def _token(args: argparse.Namespace) -> str:
    """As it was given.

    Raises:
        ConfigRefused: it was not, or its file cannot be read.
    """
    given = os.environ.get(TOKEN_VARIABLE, "").strip()
    if args.token_file is None and given:
        return given
    if args.token_file is None and args.address is None:
        raise ConfigRefused(
            "A frontend of this home is running, and no token is given.",
            why="It writes the meter log, and asks for an operator's token with billing.correct.",
            fix=f"Give one with --token-file or {TOKEN_VARIABLE}, or stop the frontend first.",
            field="token_file",
        )
    return read_token(args.token_file)
