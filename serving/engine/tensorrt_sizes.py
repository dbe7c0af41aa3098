"""Which runs a step is made of: profiles, buckets and chunks. Pure arithmetic.

A row has one place in the caches for as long as its sequence lives. Rows of one token run together:
the caches are bound from place 0 on, so such a run covers all places up to the highest that takes
part, in the smallest bucket that is wide enough. A chunk of a prompt runs alone, at its own place,
cut where it is longer than any profile takes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headrace.serving.domain.artifact import Profile, TensorRt
from headrace.serving.errors import ArtifactTampered, ConfigRefused


@dataclass(frozen=True, slots=True)
class Bucket:
    """So many rows of one token each."""

    profile: int
    """Index of the optimisation profile."""
    rows: int


@dataclass(frozen=True, slots=True)
class ChunkSize:
    """One row of `least` to `most` tokens."""

    profile: int
    least: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What an engine can be given in one run, and how many rows it serves."""

    rows_max: int
    """Sequences it keeps at once: each has a place."""
    places: int
    """Of each cache: as many as the widest bucket runs, which may be more than are used."""
    sequence_tokens_max: int
    buckets: tuple[Bucket, ...]
    """By rows."""
    chunks: tuple[ChunkSize, ...]
    """By most tokens."""
    cp: int

    @property
    def chunk_tokens_max(self) -> int:
        return self.chunks[-1].most

    @property
    def run_tokens_max(self) -> int:
        """Most tokens of a run, over all its rows."""
        return max(self.chunk_tokens_max, self.places)

    def runs_max(self, batch_tokens_max: int) -> int:
        """Most runs of a step: one of single tokens, each row's last piece, every full chunk."""
        return 1 + self.rows_max + batch_tokens_max // self.chunk_tokens_max

    def bucket(self, rows: int) -> Bucket:
        return next(each for each in self.buckets if each.rows >= rows)

    def chunk(self, tokens: int) -> ChunkSize:
        return next(each for each in self.chunks if each.most >= tokens)

    def padded(self, tokens: int) -> int:
        """Tokens that a run of one row computes for so many real ones."""
        return _multiple(max(tokens, self.chunk(tokens).least), self.cp)

    def pieces(self, tokens: int) -> Iterator[tuple[int, int]]:
        """(first, end) of each run of a chunk."""
        for first in range(0, tokens, self.chunk_tokens_max):
            yield first, min(tokens, first + self.chunk_tokens_max)


def sizes_of(
    facts: TensorRt,
    *,
    rows_max: int,
    kv_tokens: int,
    sequence_tokens_max: int,
) -> Sizes:
    """Fit what is asked for to what the plan was built for.

    Args:
        facts: of the plan.
        rows_max: most sequences.
        kv_tokens: of all caches together; a row takes `facts.cache_tokens` of them.
        sequence_tokens_max: the longest sequence that is wanted.

    Raises:
        ArtifactTampered: the plan has no profile for decoding or for prompts.
        ConfigRefused: `kv_tokens` has no room for one row.
    """
    cp, place_tokens = facts.sharding.cp, facts.cache_tokens
    decoding, chunks = _decoding(facts.profiles), _chunks(facts.profiles, cp)
    if not decoding or not chunks or place_tokens <= chunks[-1].most:
        raise ArtifactTampered(
            "The manifest's profiles do not make an engine.",
            why="One must take rows of one token, and one a single row of more, which the cache "
            "holds beside the longest sequence.",
            fix="Build the artifact again with `headrace compile`.",
        )
    rows = min(rows_max, kv_tokens // place_tokens, decoding[-1][1].rows[2] // cp * cp)
    if rows < 1:
        raise ConfigRefused(
            f"kv_tokens is {kv_tokens:,}; one sequence of this engine takes {place_tokens:,}.",
            why="Its caches are linear: each row has a place for the longest sequence.",
            fix=f"Set kv_tokens to {rows_max * place_tokens:,} for {rows_max} rows, or compile for "
            "a shorter context.",
            field="kv_tokens",
        )
    buckets = _buckets(decoding, rows, cp)
    return Sizes(
        rows_max=rows,
        places=buckets[-1].rows,
        sequence_tokens_max=min(sequence_tokens_max, place_tokens - chunks[-1].most),
        buckets=buckets,
        chunks=chunks,
        cp=cp,
    )


def _decoding(profiles: Sequence[Profile]) -> list[tuple[int, Profile]]:
    """Profiles of rows of one token, with their index, by most rows."""
    found = [(i, each) for i, each in enumerate(profiles) if each.tokens[2] == 1]
    return sorted(found, key=lambda each: each[1].rows[2])


def _chunks(profiles: Sequence[Profile], cp: int) -> tuple[ChunkSize, ...]:
    found = [
        ChunkSize(index, each.tokens[0], each.tokens[2] // cp * cp)
        for index, each in enumerate(profiles)
        if each.tokens[2] > 1 and each.rows[0] == 1
    ]
    return tuple(sorted((each for each in found if each.most), key=lambda each: each.most))


def _buckets(decoding: Sequence[tuple[int, Profile]], rows: int, cp: int) -> tuple[Bucket, ...]:
    """Powers of two up to `rows`, and `rows`, each in the narrowest profile that takes it."""
    wanted = {1 << power for power in range(rows.bit_length()) if 1 << power < rows} | {rows}
    buckets: dict[int, Bucket] = {}
    for count in sorted(wanted):
        count = _multiple(count, cp)
        for index, profile in decoding:
            if profile.rows[2] >= count:
                count = max(count, profile.rows[0])
                buckets.setdefault(count, Bucket(index, count))
                break
    return tuple(buckets[count] for count in sorted(buckets))


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of
