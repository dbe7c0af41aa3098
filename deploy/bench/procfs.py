"""What processes use, from /proc: memory and CPU time of a process and all its descendants."""

import os
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process at one moment."""

    pid: int
    parent: int
    cpu_s: float
    """User and system time since it started."""
    rss_bytes: int
    title: str
    """Its command line, or what it calls itself."""


def read_all() -> dict[int, Process]:
    """Every process there is; one that ends while it is read is left out."""
    found: dict[int, Process] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdecimal() and (process := _read(int(entry.name))) is not None:
            found[process.pid] = process
    return found


def tree(roots: Iterable[int], processes: dict[int, Process]) -> list[Process]:
    """The roots and all their descendants."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for process in processes.values():
        children[process.parent].append(process.pid)
    found: dict[int, Process] = {}
    todo = list(roots)
    while todo:
        pid = todo.pop()
        if pid in processes and pid not in found:
            found[pid] = processes[pid]
            todo += children[pid]
    return list(found.values())


def _read(pid: int) -> Process | None:
    try:
        stat = (_PROC / str(pid) / "stat").read_text("utf-8", "replace")
        title = (
            (_PROC / str(pid) / "cmdline")
            .read_bytes()
            .replace(b"\0", b" ")
            .decode("utf-8", "replace")
        )
    except OSError:
        return None
    # The name stands in brackets and may hold spaces and brackets itself.
    fields = stat.rpartition(")")[2].split()
    return Process(
        pid=pid,
        parent=int(fields[1]),
        cpu_s=(int(fields[11]) + int(fields[12])) / _TICKS_PER_S,
        rss_bytes=int(fields[21]) * _PAGE_BYTES,
        title=title.strip(),
    )


def busy_s() -> float:
    """CPU time that all cores together have spent on anything, since boot."""
    fields = [
        int(field) for field in (_PROC / "stat").read_text("ascii").split("\n")[0].split()[1:]
    ]
    user, nice, system, _idle, _iowait, irq, softirq = fields[:7]
    return (user + nice + system + irq + softirq) / _TICKS_PER_S


class Interference:
    """How much CPU others used while we measured: all that was busy, less what was ours."""

    def __init__(self, roots: Iterable[int]) -> None:
        self._roots = [*roots, os.getpid()]
        self._began_s = time.monotonic()
        self._busy_s = busy_s()
        self._ours_s = self._ours()

    def cores(self) -> float:
        """Cores' worth of work by others since this began; 0.1 is a tenth of one core."""
        elapsed_s = max(time.monotonic() - self._began_s, 1e-3)
        others_s = (busy_s() - self._busy_s) - (self._ours() - self._ours_s)
        return max(0.0, others_s / elapsed_s)

    def _ours(self) -> float:
        return sum(process.cpu_s for process in tree(self._roots, read_all()))
