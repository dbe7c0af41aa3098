"""A meter in memory that holds its callers to the protocol."""

from headrace.serving.domain.record import Opening, Refused, Settlement
from headrace.serving.domain.usage import Usage
from headrace.serving.errors import AlreadyServed, MeterUnavailable


class FakeMeter:
    """Implements Meter. Asserts that every record is opened once and settled once, or refused."""

    def __init__(self) -> None:
        self.opened: dict[tuple[str, str], Opening] = {}
        self.settled: dict[tuple[str, str], Settlement] = {}
        self.refused: dict[tuple[str, str], Refused] = {}
        self.checkpoints: dict[tuple[str, str], Usage] = {}
        self.is_broken = False
        """While True, nothing can be written."""

    @property
    def num_open(self) -> int:
        return len(self.opened) - len(self.settled)

    async def open(self, opening: Opening) -> None:
        self._check()
        key = (opening.tenant_id, opening.request_id)
        if key in self.opened:
            raise AlreadyServed(
                "This request_id was used before.",
                why="It is run and charged at most once.",
                fix="Send a new one.",
            )
        self.opened[key] = opening

    def checkpoint(self, *, tenant_id: str, request_id: str, usage: Usage) -> None:
        key = (tenant_id, request_id)
        assert key in self.opened, "a checkpoint of a request that was not opened"
        assert key not in self.settled, "a checkpoint after the settlement"
        before = self.checkpoints.get(key, Usage())
        assert usage.completion_tokens >= before.completion_tokens, "usage never shrinks"
        self.checkpoints[key] = usage

    async def settle(self, settlement: Settlement) -> None:
        self._check()
        key = (settlement.tenant_id, settlement.request_id)
        assert key in self.opened, "a settlement of a request that was not opened"
        assert key not in self.settled, "a request is settled once"
        self.settled[key] = settlement

    async def refuse(self, refused: Refused) -> None:
        self._check()
        key = (refused.tenant_id, refused.request_id)
        assert key not in self.opened, "a refused request was not opened"
        assert key not in self.refused, "a request is refused once"
        self.refused[key] = refused

    def of(self, request_id: str) -> Settlement:
        """The settlement of one request, whoever's; what it amounts to if that was refused."""
        ends = [*self.settled.values(), *map(_nothing_used, self.refused.values())]
        found = [end for end in ends if end.request_id.partition("#")[0] == request_id]
        assert len(found) == 1, f"{len(found)} ends of {request_id}"
        return found[0]

    def _check(self) -> None:
        if self.is_broken:
            raise MeterUnavailable(
                "Usage cannot be recorded.", why="The disk is full.", fix="Free some space."
            )


def _nothing_used(refused: Refused) -> Settlement:
    return Settlement(
        tenant_id=refused.tenant_id,
        request_id=refused.request_id,
        usage=Usage(),
        outcome=refused.outcome,
        charge_femto=0,
        version="",
        first_token_unix_ms=None,
        settled_unix_ms=refused.refused_unix_ms,
        replicas_tried=0,
        receipt=refused.receipt,
    )
