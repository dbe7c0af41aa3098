"""A PostgreSQL server of a test's own: Debian's package, a folder that goes, a unix socket."""

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path
from typing import LiteralString, Self, cast

import psycopg

BIN = Path("/usr/lib/postgresql/15/bin")
START_S_MAX = 60
_USER = "postgres"


class PostgresServer:
    """`with PostgresServer() as server`; then `server.database()` for each test.

    PostgreSQL refuses to run as root, so root starts it as the user `postgres`. No port is opened.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="headrace-pg-"))
        self._as: list[str] = []
        if os.getuid() == 0:
            user = pwd.getpwnam(_USER)
            os.chown(self._folder, user.pw_uid, user.pw_gid)
            ids = (f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
            self._as = ["setpriv", *ids]

    def __enter__(self) -> Self:
        try:
            self._run("initdb", "-D", str(self._data), "-U", _USER, "-A", "trust", "--no-sync")
            self.start()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._remove()

    def start(self) -> None:
        """Start it again after `stop`."""
        options = f"-c listen_addresses='' -c unix_socket_directories={self._folder} -c fsync=off"
        words = ("-D", str(self._data), "-w", "-t", str(START_S_MAX), "-o", options)
        self._run("pg_ctl", *words, "-l", str(self._folder / "log"), "start")

    def stop(self) -> None:
        """At once, as in a crash; harmless when it does not run."""
        if (self._data / "postmaster.pid").exists():
            self._run("pg_ctl", "-D", str(self._data), "-w", "-m", "immediate", "stop")

    def database(self) -> str:
        """The connection string of a fresh, empty database."""
        name = f"t{uuid.uuid4().hex}"
        with psycopg.connect(self._conninfo(_USER), autocommit=True) as connection:
            connection.execute(cast("LiteralString", f"CREATE DATABASE {name}"))
        return self._conninfo(name)

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _conninfo(self, database: str) -> str:
        return f"host={self._folder} user={_USER} dbname={database}"

    def _run(self, program: str, *words: str) -> None:
        done = subprocess.run(
            [*self._as, str(BIN / program), *words],
            cwd=self._folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=START_S_MAX + 10,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{program} ended with {done.returncode}: {done.stdout}")

    def _remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
