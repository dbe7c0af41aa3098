"""How Ray runs here: on loopback, with a token, saying nothing to anybody, under our home.

Everything is an environment variable because Ray reads them in five kinds of processes; the
supervisor sets them once and all of them inherit. A cluster (KubeRay) brings its own.
"""

import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from headrace.serving.errors import ConfigRefused

TEMP_DIR_CHARS_MAX = 40
"""A Unix socket's path has 107 characters, of which Ray takes up to 64 for
`/session_2026-01-31_12-00-00_123456_1234567/sockets/plasma_store`."""

GCS_SILENCE_S = 600
"""How long raylets and replicas go on without Ray's control store before they give up. It restarts
in about a second; the rest is for a machine that swaps."""


def ray_environment(home: Path, base: Mapping[str, str]) -> dict[str, str]:
    """`base` for a process of ours that talks to Ray. Makes the token and the folders it names.

    Raises:
        ConfigRefused: Ray's folder cannot be made safely.
    """
    temp_dir = ray_temp_dir(home)
    environment = {key: value for key, value in base.items() if key not in _NOT_INHERITED}
    environment |= {
        # Ray's own security: every call between its processes carries this token.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(_token(home)),
        # Its name speaks of other systems; what it does is keep every port on loopback.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Nothing is reported to anybody, and nothing scrapes Ray: our frontend has the metrics.
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_task_events_report_interval_ms": "0",
        # The control store survives its own death: its state is on disk and it is started again.
        "RAY_gcs_storage": "rocksdb",
        "RAY_gcs_storage_path": str(temp_dir / "gcs"),
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(GCS_SILENCE_S),
        # A hung replica has no streams to drain; a failing rollout stops instead of going round.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        "RAY_SERVE_STOP_FAILED_ROLLING_UPDATES": "1",
        # At Ray's own 0.1 s an idle controller takes 3 % of a core that engines could use.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.2",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # Our step channel and Serve's own server share one event loop: gRPC's poller wakes every
        # loop of a process for the events of each.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_TMPDIR": str(temp_dir),
        # Of each of Ray's logs; its own bound is 512 MB, five times.
        "RAY_ROTATION_MAX_BYTES": str(8 << 20),
        "RAY_ROTATION_BACKUP_COUNT": "1",
    }
    return environment


_NOT_INHERITED = frozenset({"RAY_ADDRESS", "RAY_NAMESPACE", "RAY_JOB_CONFIG_JSON_ENV_VAR"})
"""Another cluster's address in the operator's shell must not become ours."""


def ray_temp_dir(home: Path) -> Path:
    """Where Ray keeps sockets and logs: in the home, or in /tmp where that path is too long."""
    inside = home / "run" / "ray"
    if len(str(inside)) <= TEMP_DIR_CHARS_MAX:
        return inside
    name = hashlib.sha256(str(home).encode()).hexdigest()[:12]
    return Path(f"/tmp/headrace-{os.getuid()}-{name}/r")  # noqa: S108  Its owner is checked below.


def make_ray_temp_dir(home: Path) -> Path:
    """An empty folder for one run of Ray, readable by its owner only.

    What an earlier run left is removed; its log files are kept for one more start. The caller
    holds the home's lock, so nobody else uses it.

    Raises:
        ConfigRefused: another user owns a folder of that name.
    """
    folder = ray_temp_dir(home)
    private = folder.parent  # Ray opens its own folder to everybody; the one around it is closed.
    private.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = private.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or private.is_symlink():
        raise ConfigRefused(
            f"The folder {private} belongs to somebody else or is open to others.",
            why="Ray keeps its sockets there.",
            fix=f"Remove it, or set HEADRACE_HOME to a path of at most "
            f"{TEMP_DIR_CHARS_MAX - len('/run/ray')} characters.",
        )
    folder.mkdir(mode=0o700, exist_ok=True)
    sessions = sorted(folder.glob("session_[0-9]*"))
    for session in sessions[:-1]:
        shutil.rmtree(session, ignore_errors=True)
    for left in (folder / "gcs", *(session / "sockets" for session in sessions[-1:])):
        shutil.rmtree(left, ignore_errors=True)
    return folder


def _token(home: Path) -> Path:
    path = home / "run" / "ray_token"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return path
