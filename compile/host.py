"""Which machine this is, said so that nobody learns its name."""

import platform
from hashlib import sha256
from pathlib import Path

_ID_FILES = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
_CPU_FILE = Path("/proc/cpuinfo")
_HEX_DIGITS = 16


def fingerprint() -> str:
    """16 hex digits of a hash over the machine's id and its CPU's model; the same every time.

    A machine without an id, as some containers are, is told by its name, of which only the hash
    leaves.
    """
    ids = (file.read_text().strip() for file in _ID_FILES if file.is_file())
    identity = next((each for each in ids if each), platform.node())
    told = sha256(f"headrace host\n{identity}\n{_cpu_model()}".encode())
    return told.hexdigest()[:_HEX_DIGITS]


def _cpu_model() -> str:
    lines = _CPU_FILE.read_text().splitlines() if _CPU_FILE.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())
