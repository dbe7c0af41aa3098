"""What may be configured about the books: the meter log, and the ledgers it is projected to."""

from dataclasses import dataclass
from pathlib import Path

from headrace.serving.config_reader import bounded


@dataclass(frozen=True, slots=True, kw_only=True)
class MeterConfig:
    """How usage is recorded. A dead frontend under-bills at most one checkpoint interval."""

    checkpoint_tokens: int = bounded(64, 1, 1 << 20)
    """Tokens after which a stream's usage is written again: 1.4 s at reading speed."""
    checkpoint_s: float = bounded(1.0, 0.01, 60)
    """Longest that delivered tokens stay unwritten: one write a second for all streams together."""
    queue_max: int = bounded(4096, 16, 1 << 20)
    """Events that may wait for the disk: a fifth of a second at the 20,000 a second it takes."""
    segment_bytes: int = bounded(16 << 20, 1 << 20, 1 << 30)
    """Of each file of the meter log: about 60,000 events. Twice that is set aside beforehand. A
    quarter of it bounds the requests that may be open at once: 12,000."""
    seal_s: float = bounded(3600.0, 1, 604_800)
    """Longest that events stay without a Seal, which is what usage reports are made of."""
    unprojected_max: int = bounded(1 << 20, 1024, 1 << 26)
    """Requests that the ledger may lag behind before new ones are refused: an hour of 290 a second.
    Their ids are remembered meanwhile, in about 300 MB, so that none is served twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerConfig:
    """Where the meter log is projected to, beside `ledger.db` in the home."""

    postgres_dsn_file: Path | None = None
    """File with a PostgreSQL connection string, which is a secret: the ledger that all frontends
    share. It may be gone for as long as the log has room; serving does not wait for it."""
    sink_url: str | None = None
    """Receives a CloudEvent for every request that ended, for example
    https://openmeter.example/api/v1/events."""
    sink_token_file: Path | None = None
    """File with the bearer token for sink_url."""
