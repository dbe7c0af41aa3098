"""Which sizes of step a plan is optimised for: chunks of one prompt, and rows of one token each."""

from headrace.serving.domain.artifact import Profile

ROWS_MAX = 32
CHUNK = 512
"""Tokens of a prompt that one step takes. Both are the engines' own defaults."""

_BUCKETS = (2, 8, 32)
"""Rows of a decode step. A kernel is chosen for each bucket's largest: a few buckets serve a lone
conversation and a full engine well, and each one more makes the build longer. None is for exactly
one row: such a step is made of products with a vector, for which TensorRT-RTX 1.7.1 keeps a second
copy of most weights (SmolLM2-135M: 449 MB instead of 315)."""


def default_profiles(
    rows_max: int = ROWS_MAX, chunk: int = CHUNK, *, cp: int = 1
) -> tuple[Profile, ...]:
    """The prefill profile, then one for each bucket of decode rows.

    Under context parallelism the tokens of a step are dealt out evenly: the least and the most of
    each profile are rounded up to multiples of `cp`, and none is for one token a rank.
    """
    chunk = rounded_chunk(chunk, cp)
    profiles = [Profile(name="prefill", rows=(1, 1, 1), tokens=(_up(1, cp), chunk, chunk))]
    least, most = 2 * cp, _up(max(rows_max, 2 * cp), cp)
    edges = {_up(max(least, min(bucket, most)), cp) for bucket in _BUCKETS} | {most}
    before = 0
    for rows in sorted(edges):
        fewest = _up(before + 1, cp)
        profiles.append(Profile(name=f"decode_{rows}", rows=(fewest, rows, rows), tokens=(1, 1, 1)))
        before = rows
    return tuple(profiles)


def rounded_chunk(chunk: int, cp: int) -> int:
    """A chunk that `cp` ranks share evenly."""
    return _up(chunk, cp)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
