"""What may be configured of idempotency keys and batches."""

from dataclasses import dataclass
from pathlib import Path

from headrace.serving.config_reader import bounded


@dataclass(frozen=True, slots=True, kw_only=True)
class IdempotencyConfig:
    """How keys of callers are remembered."""

    keep_answers: bool = True
    """Whether a key that was answered is answered again, from an encrypted copy. False keeps only
    the fact and the usage: nothing of an answer is stored."""
    keep_h: int = bounded(24, 1, 720)
    """How long after its end a key is remembered. No client retries for longer than a day."""
    postgres_path: Path | None = None
    """File with the connection string of a PostgreSQL that frontends of several machines share.
    Unset: `idempotency.db` in the home. A file, as the string may hold a password."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """Batches of requests, run on idle capacity."""

    window_h: int = bounded(24, 1, 168)
    """What is not done by then expires, unpaid."""
    keep_days: int = bounded(30, 1, 3650)
    """How long requests and results of a batch that has ended are kept."""
    lines_running_max: int = bounded(64, 1, 4096)
    """Lines of all batches that one frontend runs at once; the replicas' idle rows come first."""
    open_max: int = bounded(100, 1, 10_000)
    """Batches of one project that have not ended."""
    stored_mb_max: int = bounded(20_000, 1, 10_000_000)
    """What the requests of all batches may occupy: a hundred of the longest ones."""
