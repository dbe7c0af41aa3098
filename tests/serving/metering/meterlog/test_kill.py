"""What the meter log promises when its process is killed, for real, at any moment."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.serving.clock import SystemClock
from headrace.serving.config_metering import MeterConfig
from headrace.serving.metering.meterlog.meter_log import MeterLog
from headrace.serving.metering.meterlog.reader import LogReader
from headrace.serving.metering.meterlog.verify import verify

BUSY_LOG = Path(__file__).parent / "busy_log.py"
FEMTO_A_TOKEN = 10**9


def killed_after(lines: int, folder: Path, epoch: str) -> list[list[str]]:
    """Serve in another process, SIGKILL it after so many acknowledgements; what it had said."""
    command = [sys.executable, str(BUSY_LOG), str(folder), epoch]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        said = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        said += process.stdout.readlines()
    # A line that the kill cut short was not said.
    return [line.split() for line in said if line.endswith("\n")]


def ends(folder: Path) -> dict[str, list[tuple[str, int, int]]]:
    """Of each request, how it ended: kind or outcome, tokens, charge in femto."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    for record in LogReader(folder).after(0, limit=1 << 20):
        event = record.event
        if event.HasField("settle"):
            end = event.settle
            entry = (end.outcome, end.usage.completion_tokens, end.charge_femto)
            found.setdefault(end.request_id, []).append(entry)
        elif event.HasField("expire"):
            found.setdefault(event.expire.request_id, []).append(("expire", 0, 0))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_frontend_loses_nothing_that_it_had_acknowledged(seed, tmp_path):
    """Three lives, each killed at a random moment, then one that puts things in order."""
    rng = random.Random(seed)
    said: list[list[str]] = []
    for life in range(3):
        said += killed_after(rng.randrange(1, 600), tmp_path, f"life-{life}")

    MeterLog(
        tmp_path,
        clock=SystemClock(),
        epoch="last",
        was_used=lambda *_: False,
        config=MeterConfig(segment_bytes=64 << 10),
    ).close()

    assert verify(tmp_path).open == []
    ended = ends(tmp_path)
    assert all(len(entries) == 1 for entries in ended.values())
    for word, name, *rest in said:
        kind, tokens, femto = ended[name][0]
        assert kind in ("ok", "recovered", "expire")
        assert femto == (0 if kind == "expire" else (10 + tokens) * FEMTO_A_TOKEN)
        if word == "S":
            assert (kind, tokens) == ("ok", int(rest[0]))
