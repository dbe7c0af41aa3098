"""Ranks in processes of their own: what they exchange, and what becomes of all when one fails."""

import os
import select
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from headrace.compile.tensorrt.rank_processes import run_ranks
from headrace.serving.errors import EngineFault, UnsupportedModel

HERE = Path(__file__).parent
PATIENCE_S = 60.0
"""Processes that start beside a whole test suite."""


def test_ranks_exchange_within_their_stage(functions: ModuleType) -> None:
    """Rank r has 10 r and 10 r + 1; ranks 0 and 1 are a stage, 2 and 3 another."""
    found = run_ranks(functions.exchange_all, 4)

    assert [each["ALL_REDUCE"] for each in found] == [[10, 12], [10, 12], [50, 52], [50, 52]]
    assert found[1]["ALL_GATHER"] == [0, 1, 10, 11]
    assert found[2]["ALL_GATHER"] == [20, 21, 30, 31]
    assert [each["REDUCE_SCATTER"] for each in found] == [[10], [12], [50], [52]]
    assert [each["ALL_TO_ALL"] for each in found] == [[0, 10], [1, 11], [20, 30], [21, 31]]
    assert found[2]["received"] == [0.5] * 6
    assert found[3]["received"] == [1.5] * 6


def test_a_rank_that_refuses_ends_all_with_its_words(functions: ModuleType) -> None:
    with pytest.raises(UnsupportedModel, match=r"On rank 1: A layer\. It is\. Do\."):
        run_ranks(functions.refuse, 2)


def test_a_rank_that_crashes_ends_all_with_its_traceback(functions: ModuleType) -> None:
    with pytest.raises(EngineFault, match=r"(?s)On rank 1: IndexError.*rank_functions\.py"):
        run_ranks(functions.crash, 2)


def test_a_rank_that_is_killed_is_named(functions: ModuleType) -> None:
    """The other rank notices too, and what it says is not the reason."""
    with pytest.raises(EngineFault, match="Rank 1 ended with signal 9"):
        run_ranks(functions.die, 2)


def test_a_rank_that_hangs_is_named(functions: ModuleType) -> None:
    """Rank 0 waits for it in vain, and the shared note of who waits tells whom it missed."""
    with pytest.raises(EngineFault, match=r"Ranks that were not there: \[1\]"):
        run_ranks(functions.hang, 2, collective_timeout_s=PATIENCE_S / 6)


def test_a_run_ends_at_its_limit(functions: ModuleType) -> None:
    with pytest.raises(EngineFault, match=r"Ranks \[0, 1\] of 2 did not end in time"):
        run_ranks(functions.hang, 2, timeout_s=0)


def test_no_rank_outlives_the_one_who_started_it() -> None:
    """Even if that one is killed and can tidy up nothing."""
    program = (
        "import rank_functions\n"
        "from headrace.compile.tensorrt.rank_processes import run_ranks\n"
        "if __name__ == '__main__':\n"
        "    run_ranks(rank_functions.say_pid_and_hang, 2)\n"
    )
    command = [sys.executable, "-c", program]
    path = os.pathsep.join((str(HERE), os.environ.get("PYTHONPATH", "")))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline().split()[1]) for _ in range(2)]
        handles = [os.pidfd_open(pid) for pid in pids]
        process.kill()

        for handle in handles:
            ended, _, _ = select.select([handle], [], [], PATIENCE_S)
            os.close(handle)
            assert ended, f"one of {pids} still runs"
