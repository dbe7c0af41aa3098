"""What the meter log tells a caller whom it refuses."""

from headrace.serving.errors import AlreadyServed, MeterUnavailable


def unavailable(why: str) -> MeterUnavailable:
    return MeterUnavailable(
        f"Usage cannot be recorded: {why}.",
        why="Work that is not recorded is not accepted.",
        fix="Retry with jitter. Operator: check the disk under HEADRACE_HOME.",
        retry_after_ms=1000,
    )


def already_served(request_id: str) -> AlreadyServed:
    return AlreadyServed(
        f"The request_id {request_id!r} was used before.",
        why="A request_id is run and charged at most once.",
        fix="See what it used with `headrace usage --request-id`, or send a fresh request_id.",
        field="request_id",
    )


def too_many(what: str, *, why: str, fix: str) -> MeterUnavailable:
    """A bound of ours is reached; it passes in a moment."""
    return MeterUnavailable(what, why=why, fix=fix, retry_after_ms=250)
