"""Starts one process for each rank, and ends them all when one fails.

The function that they run is found by its name in the new process, so it is a module's own, or a
`functools.partial` of one with plain arguments. What it answers comes back as JSON in a file, and
so does an error: nothing is unpickled here.
"""

import json
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from headrace.compile.tensorrt.process_group import (
    COLLECTIVE_TIMEOUT_S,
    Meeting,
    PeerLost,
    Peers,
    prepare,
)
from headrace.serving import errors
from headrace.serving.errors import EngineFault, ServingError

RUN_TIMEOUT_S = 1_800.0
"""A verification of 72 B over eight ranks takes minutes; this is for one that never ends."""

_GRACE_S = 1.0
"""A rank that lost another waits so long for that one's own error, which tells more."""

RankFunction = Callable[[Peers], Any]


def run_ranks(
    function: RankFunction,
    ranks: int,
    *,
    timeout_s: float = RUN_TIMEOUT_S,
    collective_timeout_s: float = COLLECTIVE_TIMEOUT_S,
) -> list[Any]:
    """Run `function` once in each of `ranks` new processes and answer what each returned.

    Args:
        function: see the module; what it returns is plain JSON.
        ranks: how many.
        timeout_s: of the whole.
        collective_timeout_s: how long a rank waits for the others at one meeting.

    Raises:
        ServingError: the first that a rank raised.
        EngineFault: a rank ended, crashed or hung; it says which. None is left running.
    """
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory(prefix="headrace-ranks-") as name:
        folder = Path(name)
        prepare(folder, ranks)
        processes: list[BaseProcess] = []
        try:
            for rank in range(ranks):
                meeting = Meeting(
                    rank=rank, ranks=ranks, folder=folder, timeout_s=collective_timeout_s
                )
                process = context.Process(
                    target=_run, args=(function, meeting), name=f"rank {rank}", daemon=True
                )
                process.start()
                processes.append(process)
            _watch(processes, folder, deadline=time.monotonic() + timeout_s)
            return [json.loads((folder / f"{rank}.result").read_text()) for rank in range(ranks)]
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _watch(processes: Sequence[BaseProcess], folder: Path, *, deadline: float) -> None:
    """Return when every process ended well.

    Raises:
        ServingError: one did not.
    """
    alive = dict(enumerate(processes))
    failed: dict[int, ServingError] = {}
    while alive:
        left = deadline - time.monotonic()
        ended = wait([process.sentinel for process in alive.values()], max(0.0, left))
        for rank, process in list(alive.items()):
            if process.sentinel in ended:
                del alive[rank]
                process.join()
                if process.exitcode:
                    failed[rank] = _error(rank, process.exitcode, folder)
        causes = [error for error in failed.values() if not isinstance(error, PeerLost)]
        if causes:
            raise causes[0]
        if failed and not ended:
            raise next(iter(failed.values()))
        if failed:
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        elif not ended:
            raise EngineFault(
                f"Ranks {sorted(alive)} of {len(processes)} did not end in time.",
                why="They were still at work when the limit of the run was reached.",
                fix="Look for what slows them, or allow more time.",
            )
    if failed:
        raise next(iter(failed.values()))


def _error(rank: int, exit_code: int, folder: Path) -> ServingError:
    """What ended a rank, as it said itself if it could."""
    file = folder / f"{rank}.error"
    if not file.is_file():
        how = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
        return EngineFault(
            f"Rank {rank} ended with {how}.",
            why="It was killed, or its memory ran out; it said nothing itself.",
            fix="Look into the system's log, free memory, then run it again.",
        )
    told = json.loads(file.read_text())
    if told["kind"] == PeerLost.__name__:
        return PeerLost(told["what"], why=told["why"], fix=told["fix"])
    kind = getattr(errors, told["kind"], EngineFault)
    return kind(f"On rank {rank}: {told['what']}", why=told["why"], fix=told["fix"])


def _run(function: RankFunction, meeting: Meeting) -> None:
    """The whole life of a rank's process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Ranks share the machine's cores already.
    torch.set_num_threads(1)
    try:
        peers = Peers(meeting)
        answer = json.dumps(function(peers))
        peers.close()
        (meeting.folder / f"{meeting.rank}.result").write_text(answer)
    except Exception as error:
        told = _told(error)
        (meeting.folder / f"{meeting.rank}.error").write_text(json.dumps(told))
        # Without the leave-taking of Gloo's threads, which wait for ranks that are gone.
        os._exit(1)


def _told(error: Exception) -> dict[str, str]:
    if isinstance(error, ServingError):
        kind = type(error).__name__
        return {"kind": kind, "what": error.what, "why": error.why, "fix": error.fix}
    return {
        "kind": EngineFault.__name__,
        "what": f"{type(error).__name__}: {error}.",
        "why": "".join(traceback.format_exception(error)),
        "fix": "Report it with this traceback.",
    }


def _end_with_parent() -> None:
    """No rank outlives the process that started it, however that one ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
