"""What this machine can do, measured in the same run as everything else, and the bounds it sets.

A decode step reads all weights once, whatever the number of rows, and multiplies them once for
each row. So a step of `rows` rows takes at least

    max(weight_bytes / read_bytes_per_s, 2 * weights * rows / operations_per_s)

and tokens/s are at most rows over that. Attention, sampling and prefill come on top: a bound that
no engine reaches, stated beside each row so that a figure can be judged without another machine.
"""

import ctypes
import mmap
import os
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.deploy.bench.procfs import Interference
from headrace.serving.config import cores
from headrace.serving.engine.native_library import native_library
from headrace.serving.errors import EngineFault

PROBE_BYTES = 512 << 20
"""Sixteen times the largest cache at hand, so that it is memory that is read."""
PROBE_S = 1.0
QUIET_CORES_MAX = 0.1
"""More than a tenth of a core for others, and figures are not to be quoted."""
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where a run took place."""

    cpu: str
    cores: int
    flags: Sequence[str]
    memory_gb: float
    kernel: str
    python: str
    read_gb_s: Mapping[str, float]
    """By number of threads: bytes that `memchr` looks at in a second, in GB."""
    int8_gop_s: float | None
    """int8 dot products on two threads, in 10^9 operations a second; None where not measured."""
    load_average: float
    others_cores: float
    """Work of other processes just before the run, in cores."""

    @property
    def quiet(self) -> bool:
        return self.others_cores <= QUIET_CORES_MAX

    def to_json(self) -> dict[str, object]:
        return {
            "cpu": self.cpu,
            "cores": self.cores,
            "flags": list(self.flags),
            "memory_gb": round(self.memory_gb, 1),
            "kernel": self.kernel,
            "python": self.python,
            "read_gb_s": {threads: round(rate, 1) for threads, rate in self.read_gb_s.items()},
            "int8_gop_s": None if self.int8_gop_s is None else round(self.int8_gop_s),
            "load_average": round(self.load_average, 2),
            "others_cores": round(self.others_cores, 3),
            "quiet": self.quiet,
        }


def measure(threads: Sequence[int] = (1, 2)) -> Machine:
    """Look around; takes about four seconds."""
    interference = Interference([])
    time.sleep(1.0)  # The window in which others are observed.
    others = interference.cores()
    info = _cpuinfo()
    return Machine(
        cpu=info.get("model name", platform.processor() or "unknown"),
        cores=cores(),
        flags=[flag for flag in _FLAGS if flag in info.get("flags", "").split()],
        memory_gb=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9,
        kernel=platform.release(),
        python=platform.python_version(),
        read_gb_s={str(n): read_gb_s(n) for n in threads},
        int8_gop_s=int8_gop_s(max(threads)),
        load_average=os.getloadavg()[0],
        others_cores=others,
    )


def read_gb_s(threads: int, *, num_bytes: int = PROBE_BYTES, seconds: float = PROBE_S) -> float:
    """Bytes a second that so many threads read from memory together, in GB.

    Each looks for a byte that is not there in its own part of a buffer: libc's `memchr` reads with
    the widest vectors of the CPU and does next to nothing else, and ctypes lets the threads run
    side by side. The buffer is written first, for untouched pages are all one page of zeros.
    """
    libc = ctypes.CDLL(None)
    libc.memchr.restype = ctypes.c_void_p
    libc.memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    with mmap.mmap(-1, num_bytes) as buffer:
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        ctypes.memset(address, 1, num_bytes)
        share = num_bytes // threads
        totals = [0] * threads
        began_s = time.monotonic()

        def read(part: int) -> None:
            while time.monotonic() - began_s < seconds:
                found = libc.memchr(address + part * share, 0, share)
                assert found is None
                totals[part] += share

        readers = [threading.Thread(target=read, args=(part,)) for part in range(threads)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        return sum(totals) / (time.monotonic() - began_s) / 1e9


def int8_gop_s(threads: int) -> float | None:
    """The best of three short loops of int8 dot products; None where this CPU has none.

    None as well where the native library was not built: bounds then rest on memory alone.
    """
    try:
        probe = native_library().hr_int8_gop_s
    except (EngineFault, AttributeError):
        return None
    probe.restype, probe.argtypes = ctypes.c_double, (ctypes.c_int32,)
    return max(probe(threads) for _ in range(3)) or None


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """What the machine's memory and arithmetic allow for one set of weights."""

    weight_bytes: int
    """Read once by every step."""
    weights: int
    """Multiplied once for every row."""
    read_gb_s: float
    int8_gop_s: float | None
    """Operations of int8 dot products, in 10^9 a second; None where they were not measured."""

    def step_ms_min(self, rows: int) -> float:
        memory_ms = self.weight_bytes / (self.read_gb_s * 1e9) * 1000
        if self.int8_gop_s is None:
            return memory_ms
        return max(memory_ms, 2 * self.weights * rows / (self.int8_gop_s * 1e9) * 1000)

    def tok_s_max(self, rows: int) -> float:
        """Of decoding alone; one row of 135 MB at 30 GB/s: 222 tokens/s."""
        return rows / self.step_ms_min(rows) * 1000

    def to_json(self, streams: Sequence[int]) -> dict[str, object]:
        return {
            "weight_bytes": self.weight_bytes,
            "weights": self.weights,
            "read_gb_s": round(self.read_gb_s, 1),
            "int8_gop_s": None if self.int8_gop_s is None else round(self.int8_gop_s),
            "tok_s_max": {str(n): round(self.tok_s_max(n), 1) for n in streams},
        }


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return {}  # Not Linux on x86 or ARM: the rest is said all the same.
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
