"""Which `ClaimStore` the configuration asks for."""

from collections.abc import Callable
from pathlib import Path

from headrace.serving.config import Config
from headrace.serving.errors import ConfigRefused
from headrace.serving.idempotency.claims import ClaimStore
from headrace.serving.idempotency.sqlite_claims import SqliteClaims


def open_claims(
    config: Config, *, owner: str, log_id: str, is_alive: Callable[[str], bool]
) -> ClaimStore:
    """The store that this frontend shares with its neighbours. Blocks; the caller closes it.

    Args:
        config: of this frontend.
        owner: names this life of this process.
        log_id: of the meter log that its attempts are recorded in.
        is_alive: whether another owner on this machine lives.

    Raises:
        ConfigRefused: the connection string cannot be read, or psycopg is not installed.
        IdempotencyUnavailable: the file or database does not answer.
    """
    dsn_path = config.idempotency.postgres_path
    if dsn_path is None:
        return SqliteClaims(config.idempotency_path, owner=owner, log_id=log_id, is_alive=is_alive)
    try:
        # Its home imports psycopg, which the embedded install does not have.
        from headrace.serving.idempotency.postgres_claims import PostgresClaims
    except ImportError as error:
        raise ConfigRefused(
            "idempotency.postgres_path is set, and psycopg is not installed.",
            why="It is the client that PostgreSQL is reached with.",
            fix="pip install 'headrace[postgres]', or unset it.",
            field="idempotency.postgres_path",
        ) from error
    return PostgresClaims(_dsn(dsn_path), owner=owner, log_id=log_id)


def _dsn(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigRefused(
            f"The connection string in {path} cannot be read: {error}.",
            why="idempotency.postgres_path names the file that holds it.",
            fix="Write it there, for example postgresql://headrace@db/headrace, mode 0600.",
            field="idempotency.postgres_path",
        ) from error
