"""`headrace bench admission`: what it costs to find out who calls, and whether they may.

No I/O is on that path, so this measures arithmetic: one thread, thousands of checks a turn, and the
median turn. The store behind it is a real one with a thousand keys.
"""

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from headrace.deploy.bench import machine
from headrace.deploy.bench.report import OURS, Report, Row
from headrace.serving.admission.account_view import AccountView
from headrace.serving.admission.accounts import open_accounts
from headrace.serving.admission.authenticate import Authenticator
from headrace.serving.clock import SystemClock
from headrace.serving.config import Config
from headrace.serving.domain.account import ApiKey
from headrace.serving.domain.record import DEFAULT_PROJECT
from headrace.serving.domain.scope import UNLIMITED
from headrace.serving.errors import Unauthenticated

TURNS = 100
CHECKS = 500
"""Of one turn: 2 ms, so that a turn is rarely interrupted and the clock's grain does not count."""
NUM_KEYS = 1_000
METHOD = "Inference/Generate"

Tell = Callable[[str], None]


def run(home: Path, tell: Tell) -> Report:
    """Every figure of admission; `home` is where the report is kept, and nothing else."""
    tell("looking at the machine")
    report = Report(kind="admission", machine=machine.measure(), roofline={})
    tell("checking keys")
    report.rows = bench_key_check()
    report.notes = [f"p50 of {TURNS} turns of {CHECKS} checks each, on one thread."]
    return report


def bench_key_check() -> list[Row]:
    """Microseconds to check a key that is good, wrong or unknown, with its method's scope."""
    with TemporaryDirectory(prefix="headrace-bench-") as folder:
        config = Config(home=Path(folder))
        clock = SystemClock()
        with closing(open_accounts(config, clock=clock)) as store:
            good = store.demo().key
            pepper_id = store.peppers.current.pepper_id
            store.bring_in([_another(i, pepper_id) for i in range(NUM_KEYS - 1)])
            view = AccountView(store, clock=clock, stale_s=config.accounts.stale_s)
        door = Authenticator(view, clock=clock)

        def passes() -> None:
            assert door.authenticate(good).scope.allows_method(METHOD)

        def is_refused(key: str) -> Callable[[], None]:
            def check() -> None:
                try:
                    door.authenticate(key)
                except Unauthenticated:
                    return
                raise AssertionError("a wrong key passed")

            return check

        secret = good.rsplit("_", 1)[1]
        presented = {
            "good": passes,
            "wrong": is_refused(f"hr_k{0:07}_{secret}"),
            "unknown": is_refused(f"hr_nobody01_{secret}"),
        }
        return [
            Row(
                name=f"admission/key check, {which}",
                peer=OURS,
                metric="check_p50_us",
                value=_p50_us(check),
                unit="us",
            )
            for which, check in presented.items()
        ]


def _p50_us(check: Callable[[], None]) -> float:
    turns: list[float] = []
    for _ in range(TURNS):
        began_ns = time.perf_counter_ns()
        for _ in range(CHECKS):
            check()
        turns.append((time.perf_counter_ns() - began_ns) / CHECKS / 1_000)
    return median(turns)


def _another(i: int, pepper_id: str) -> ApiKey:
    """A key that nobody has: any digest does."""
    return ApiKey(
        key_id=f"k{i:07}",
        tenant_id="demo",
        project_id=DEFAULT_PROJECT,
        label="",
        scope=UNLIMITED,
        created_unix_ms=0,
        expires_unix_ms=None,
        digest=f"{i:064x}",
        pepper_id=pepper_id,
    )
