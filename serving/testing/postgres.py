"""A PostgreSQL of a test's own: Debian's package, a fresh cluster, a Unix socket, no port."""

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

from headrace.serving.errors import ConfigRefused

BINARIES = Path("/usr/lib/postgresql")
USER = "postgres"
"""Who runs it where we are root: the server refuses to be root."""
_START_S = 30
_SETTINGS = (
    "-c listen_addresses='' -c fsync=off -c full_page_writes=off "
    "-c max_connections=50 -c shared_buffers=16MB"
)
"""Small, and quick rather than durable: commits survive the server's crash, not the machine's."""


class PostgresServer:
    """`with PostgresServer() as server: connect(server.dsn)`. Starts in about 2 s."""

    def __init__(self) -> None:
        """Make the cluster; it does not run yet.

        Raises:
            ConfigRefused: PostgreSQL is not installed here.
        """
        versions = sorted(BINARIES.glob("*/bin"), key=lambda path: int(path.parent.name))
        if not versions:
            raise ConfigRefused(
                f"There is no PostgreSQL in {BINARIES}.",
                why="These tests run against a real one.",
                fix="apt-get install postgresql",
            )
        self._bin = versions[-1]
        self._names = itertools.count()
        self._is_root = os.geteuid() == 0
        # Not a test's own folder, which the other user may not enter.
        self._folder = Path(tempfile.mkdtemp(prefix="headrace-pg-"))
        if self._is_root:
            user = pwd.getpwnam(USER)
            os.chown(self._folder, user.pw_uid, user.pw_gid)
        self._data = self._folder / "data"
        self._run("initdb", "-D", str(self._data), "-A", "trust", "-U", USER, "--no-sync")

    @property
    def dsn(self) -> str:
        return self._dsn_of("postgres")

    def new_database(self) -> str:
        """The DSN of an empty database of its own."""
        name = f"database_{next(self._names)}"
        self._run("createdb", "-h", str(self._folder), "-U", USER, name)
        return self._dsn_of(name)

    def __enter__(self) -> "PostgresServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        settings = f"{_SETTINGS} -k {self._folder}"
        log = self._folder / "log"
        self._ctl("start", "-w", "-t", str(_START_S), "-l", str(log), "-o", settings)

    def stop(self) -> None:
        """As a crash: connections break, nothing is said. It may be started again."""
        self._ctl("stop", "-m", "immediate", "-w")

    def close(self) -> None:
        """Stop it, if it runs, and remove it."""
        if (self._data / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self._folder)

    def _dsn_of(self, name: str) -> str:
        return f"host={self._folder} user={USER} dbname={name}"

    def _ctl(self, *words: str) -> None:
        self._run("pg_ctl", "-D", str(self._data), *words)

    def _run(self, program: str, *words: str) -> None:
        command = [str(self._bin / program), *words]
        if self._is_root:
            command = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", *command]
        subprocess.run(
            command,
            check=True,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
