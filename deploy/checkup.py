"""What `headrace doctor` looks at: one function for each matter, which answers what it found.

A check changes nothing: it opens no port that stays open, makes no file, and loads no model.
"""

import importlib
import importlib.metadata
import os
import platform
import shutil
import socket
import sqlite3
import stat
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2

from headrace.serving.config import Config, cores
from headrace.serving.domain.artifact import MANIFEST_FILE, VerifyMethod
from headrace.serving.engine.loader import signed_manifest, verify_files
from headrace.serving.errors import ServingError
from headrace.serving.metering.ledger.sqlite_database import SQLITE_MIN
from headrace.serving.metering.meterlog.verify import verify

MEMORY_WANTED_BYTES = 2 << 30
"""Ray's own processes take 0.6 GB, a replica with its int8 model and KV cache 0.9 GB."""
DISK_WANTED_BYTES = 2 << 30
"""The demo checkpoint, its artifacts in three precisions, and room for a build."""
DISK_NEEDED_BYTES = 100 << 20
"""Below it the usage records are at risk, and without them no work is accepted."""
ANSWER_S = 2.0
"""How long a local service may take to answer a question of ours."""
_VNNI = ("avx512_vnni", "avx_vnni")
_SECRETS = ("pepper", "cluster_token", "keys.json", "accounts.db", "keys/artifact-signing.pem")
_PACKAGES = (
    "grpcio",
    "llguidance",
    "numpy",
    "onnxruntime",
    "prometheus-client",
    "protobuf",
    "ray",
    "tokenizers",
)


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    what: str
    fix: str = ""
    """What to do about it; empty when all is well."""


def check_python() -> Iterable[Finding]:
    what = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("python", Status.OK, what)
    if sqlite3.sqlite_version_info < SQLITE_MIN:
        wanted = ".".join(map(str, SQLITE_MIN))
        fix = f"Use a Python built with SQLite {wanted} or newer."
        yield Finding("sqlite", Status.FAIL, sqlite3.sqlite_version, fix)


def check_packages(names: Sequence[str] = _PACKAGES) -> Iterable[Finding]:
    found: list[str] = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            fix = "Run `pip install --require-hashes -r requirements/runtime.txt`."
            yield Finding("packages", Status.FAIL, f"{name} is not installed", fix)
    yield Finding("packages", Status.OK, ", ".join(found))


def check_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Iterable[Finding]:
    flags = _cpu_flags(cpuinfo)
    useful = [f for f in (*_VNNI, "avx512f", "avx2", "avx512_bf16", "amx_int8") if f in flags]
    what = f"{cores()} cores, {' '.join(useful) or 'no vector features that we use'}"
    if any(flag in flags for flag in _VNNI):
        yield Finding("cpu", Status.OK, what)
    else:
        fix = "It works with portable kernels, several times slower; prefer a CPU with VNNI."
        yield Finding("cpu", Status.WARN, what, fix)


def check_memory(meminfo: Path = Path("/proc/meminfo")) -> Iterable[Finding]:
    available = _memory_available_bytes(meminfo)
    if available is None:
        fix = f"See that {_gb(MEMORY_WANTED_BYTES)} are free."
        yield Finding("memory", Status.WARN, "cannot be read on this system", fix)
    elif available < MEMORY_WANTED_BYTES:
        fix = f"Free some: {_gb(MEMORY_WANTED_BYTES)} let one replica start beside Ray."
        yield Finding("memory", Status.WARN, f"{_gb(available)} available", fix)
    else:
        yield Finding("memory", Status.OK, f"{_gb(available)} available")


def check_disk(config: Config) -> Iterable[Finding]:
    folder = next(each for each in (config.home, *config.home.parents) if each.exists())
    free = shutil.disk_usage(folder).free
    what = f"{_gb(free)} free under {folder}"
    if free < DISK_NEEDED_BYTES:
        fix = "Free some: without room for usage records no work is accepted."
        yield Finding("disk", Status.FAIL, what, fix)
    elif free < DISK_WANTED_BYTES:
        fix = f"{_gb(DISK_WANTED_BYTES)} let models be pulled and compiled."
        yield Finding("disk", Status.WARN, what, fix)
    else:
        yield Finding("disk", Status.OK, what)


def check_home(config: Config) -> Iterable[Finding]:
    home = config.home
    if not home.exists():
        yield Finding("home", Status.OK, f"{home} will be made on first use")
        return
    if not os.access(home, os.R_OK | os.W_OK | os.X_OK):
        fix = "Run as its owner, or set HEADRACE_HOME to another folder."
        yield Finding("home", Status.FAIL, f"{home} cannot be written", fix)
        return
    loose = [
        path
        for path in (home, *(home / name for name in _SECRETS))
        if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077
    ]
    for path in loose:
        mode = "700" if path.is_dir() else "600"
        fix = f"Run `chmod {mode} {path}`."
        yield Finding("home", Status.WARN, f"{path} is open to other users", fix)
    if not loose:
        yield Finding("home", Status.OK, f"{home}, for its owner only")


def check_native() -> Iterable[Finding]:
    try:
        native = importlib.import_module("headrace.serving.engine.native_library")
        library = native.native_library()
        kernels = library.hr_kernels_name(native.kernels_wanted()).decode()
    except ServingError as refusal:
        yield Finding("native", Status.FAIL, refusal.what, refusal.fix)
        return
    yield Finding("native", Status.OK, f"the library loads; {kernels} kernels")


def check_artifacts(config: Config) -> Iterable[Finding]:
    manifests = sorted(config.artifacts_dir.glob(f"*/{MANIFEST_FILE}"))
    for path in manifests:
        try:
            manifest = signed_manifest(path.parent)
            verify_files(path.parent, manifest)
        except ServingError as refusal:
            yield Finding("artifact", Status.FAIL, refusal.what, refusal.fix)
            continue
        what = f"{manifest.model} {manifest.precision.value} {manifest.artifact_id[:12]} is intact"
        if manifest.verification.method is VerifyMethod.ENGINE:
            yield Finding("artifact", Status.OK, what)
            continue
        fix = (
            "Serving refuses it. Where its device is, run `headrace models verify "
            f"{manifest.model} --variant {manifest.variant}`."
        )
        yield Finding("artifact", Status.WARN, f"{what}; its engine was never run", fix)
    if not manifests:
        fix = "`headrace serve` builds the demo model, or run `headrace compile`."
        yield Finding("artifact", Status.WARN, "no model is compiled yet", fix)


def check_records(config: Config) -> Iterable[Finding]:
    """The meter log as an auditor would, and SQLite's look at the ledger: seconds a gigabyte."""
    if not config.meterlog_dir.exists():
        yield Finding("meter log", Status.OK, "no requests yet")
    else:
        try:
            found = verify(config.meterlog_dir)
        except ServingError as error:
            yield Finding("meter log", Status.FAIL, error.what, error.fix)
        else:
            yield Finding("meter log", Status.OK, f"{found.records:,} records, whole and chained")
    path = config.ledger_path
    if not path.exists():
        yield Finding("ledger", Status.OK, "not there yet: it is made from the meter log")
        return
    try:
        with closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        ) as connection:
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            (count,) = connection.execute("SELECT count(*) FROM request").fetchone()
    except sqlite3.Error as error:
        verdict, count = str(error), 0
    if verdict == "ok":
        yield Finding("ledger", Status.OK, f"{count:,} requests in {path}")
    else:
        fix = "Stop the frontend and remove the file: the next start makes it from the meter log."
        yield Finding("ledger", Status.FAIL, f"{path} is damaged: {verdict}", fix)


def check_frontend(config: Config) -> Iterable[Finding]:
    """Whether it serves, and if it does not, whether it could."""
    frontend = config.frontend
    host = _reachable(frontend.host)
    if not _answers(host, frontend.grpc_port):
        yield from _free("grpc port", frontend.host, frontend.grpc_port, "frontend.grpc_port")
        yield from _free("http port", frontend.host, frontend.http_port, "frontend.http_port")
        return
    address = f"{host}:{frontend.grpc_port}"
    if frontend.tls_cert is not None:
        # Its certificate is for the name that clients use, which is not known here.
        yield Finding("frontend", Status.OK, f"{address} listens, with TLS")
        return
    try:
        with grpc.insecure_channel(address) as channel:
            ask = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            answer = ask(health_pb2.HealthCheckRequest(), timeout=ANSWER_S)
    except grpc.RpcError as error:
        name = error.code().name if isinstance(error, grpc.Call) else type(error).__name__
        fix = "Another program may hold the port: stop it, or set frontend.grpc_port."
        yield Finding("frontend", Status.FAIL, f"{address} gives no health ({name})", fix)
        return
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        yield Finding("frontend", Status.OK, f"{address} is serving")
    else:
        fix = "See `headrace models` and the logs of the control process."
        yield Finding("frontend", Status.WARN, f"{address} is up and not ready", fix)


def check_directory(config: Config) -> Iterable[Finding]:
    host, _, port = config.directory.address.rpartition(":")
    if _answers(_reachable(host), int(port)):
        yield Finding("directory", Status.OK, f"{config.directory.address} listens")
    else:
        yield from _free("directory", host, int(port), "directory.address")


def _free(name: str, host: str, port: int, key: str) -> Iterable[Finding]:
    """Whether nobody holds the port. Bound for a moment, never listened on."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            # As servers do: a port whose last connections linger is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host.strip("[]"), port))
    except OSError as error:
        what = f"{host}:{port} cannot be used: {error.strerror or error}"
        yield Finding(name, Status.FAIL, what, f"Stop what holds it, or set {key}.")
        return
    yield Finding(name, Status.OK, f"{host}:{port} is free; not running")


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=ANSWER_S):
            return True
    except OSError:
        return False


def _reachable(host: str) -> str:
    """Where a server that listens on every interface can be reached from here."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1", "[::]": "::1"}.get(  # noqa: S104
        host, host
    )


def _cpu_flags(cpuinfo: Path) -> set[str]:
    try:
        lines = cpuinfo.read_text("ascii", "replace").splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def _memory_available_bytes(meminfo: Path) -> int | None:
    """The least of what the machine and what our container has left."""
    try:
        lines = meminfo.read_text("ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        available = int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text("ascii"))
        used = int((group / "memory.current").read_text("ascii"))
    except (OSError, ValueError):
        return available  # No limit, or no cgroup v2.
    return min(available, max(0, limit - used))


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
