"""All replicas a frontend can reach: the directory's word, joined with what the channels hear.

A replica that vanishes from the directory is not lost while its channel lives: the directory may
have restarted and not heard of it again yet. It is forgotten when both are gone, or after a grace.
"""

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from headrace.serving.channel.client import ReplicaClient
from headrace.serving.clock import Clock
from headrace.serving.domain.generate import Generate
from headrace.serving.errors import DeadlineExceeded, ModelNotFound, Overloaded, ServingError
from headrace.serving.observe import Metrics
from headrace.serving.ports import Placement
from headrace.serving.router.endpoint import Endpoint, ReplicaFacts, prefix_chain
from headrace.serving.router.picker import Ask, Picked, pick, refusal
from headrace.serving.router.prediction import refuse_hopeless

REPLICAS_MAX = 1024
"""Channels one frontend keeps; the directory's own bound is the same."""

ABSENT_GRACE_MS = 10_000.0
"""Twice the directory's silence: a restarted directory has heard of everyone by then."""

RETRY_AFTER_MS = 500
"""About ten steps: a row or a queue place is likely to be free again."""


@dataclass(slots=True, eq=False)
class _Member:
    client: ReplicaClient
    absent_since_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model name, as its replicas serve it."""

    name: str
    newest: ReplicaFacts
    """Of the replica that joined last among those that can take a request, else of any."""
    replicas_ready: int


@dataclass(slots=True, eq=False)
class _Turnout:
    """Wakes everyone who waits for the fleet to change."""

    waiters: set["asyncio.Future[None]"] = field(default_factory=set)

    def wake(self) -> None:
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, timeout_s: float) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self.waiters.add(waiter)
        try:
            await asyncio.wait({waiter}, timeout=timeout_s)
        finally:
            self.waiters.discard(waiter)


class ReplicaFleet:
    """Implements ports.Fleet. Owned by the frontend's event loop."""

    def __init__(
        self,
        *,
        cluster_token: str,
        clock: Clock,
        metrics: Metrics,
        expected: Collection[str] = (),
        replica_wait_s: float = 2.0,
        failover_wait_s: float = 15.0,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """Start with no replica; `update` brings them.

        Args:
            cluster_token: what replicas demand.
            clock: of the requests' deadlines.
            metrics: of this frontend.
            expected: models that the configuration names. Without a replica they are unavailable
                for the moment; any other name is unknown.
            replica_wait_s: how long a request may wait for a replica when none can take it. Two
                seconds bridge a gap between two replicas, and no more: a caller who retries is
                better served than one who waits.
            failover_wait_s: the same for a request whose replica was lost. A replica that Serve
                starts again is back after 3 to 8 s, and then the answer goes on.
            on_change: called after anything that may change which models can be served.
        """
        self._on_change = on_change
        self.expected = frozenset(expected)
        """Models that the configuration names."""
        self._token = cluster_token
        self._clock = clock
        self._metrics = metrics
        self._wait_s = replica_wait_s
        self._failover_wait_s = failover_wait_s
        self._members: dict[str, _Member] = {}
        self._counted: set[str] = set(expected)
        """Models whose number of ready replicas is on show."""
        self._turnout = _Turnout()
        self._closing: set[asyncio.Task[None]] = set()

    def update(self, replicas: Sequence[ReplicaFacts]) -> None:
        """Take the directory's whole set."""
        now_ms = self._clock.monotonic_ms()
        named = {facts.replica_id: facts for facts in replicas[:REPLICAS_MAX]}
        for replica_id, facts in named.items():
            member = self._members.get(replica_id)
            if member is not None and member.client.endpoint.facts.address != facts.address:
                self._forget(replica_id)
                member = None
            if member is None:
                self._join(facts)
            else:
                member.client.endpoint.facts = facts
                member.absent_since_ms = None
        for replica_id, member in list(self._members.items()):
            if replica_id not in named and member.absent_since_ms is None:
                member.absent_since_ms = now_ms
        self.sweep()
        self._changed()

    def sweep(self) -> None:
        """Look for what changes without a word: call it about once a second.

        Replicas that the directory does not name are forgotten: one whose channel is down at
        once, one that is only unnamed after the grace and when it has nothing open. One that
        fell silent no longer counts as ready.
        """
        now_ms = self._clock.monotonic_ms()
        for replica_id, member in list(self._members.items()):
            since_ms = member.absent_since_ms
            if since_ms is None:
                continue
            is_gone = not member.client.endpoint.is_connected
            is_over = now_ms - since_ms > ABSENT_GRACE_MS and not member.client.num_open
            if is_gone or is_over:
                self._forget(replica_id)
        self._count_ready()

    async def place(self, request: Generate, *, without: Collection[str] = ()) -> Placement:
        """See ports.Fleet.place."""
        chain = prefix_chain(request.prompt_ids, request.cache_salt)
        ask = Ask(
            model=request.model,
            prompt_tokens=len(request.prompt_ids),
            chain=chain,
            version=request.version,
            without=without,
            tier=request.terms.tier_served,
        )
        # An answer that was under way is worth waiting for the lost replica's successor.
        wait_s = self._failover_wait_s if without else self._wait_s
        until_ms = self._clock.monotonic_ms() + wait_s * 1000
        if request.deadline_ms is not None:
            until_ms = min(until_ms, request.deadline_ms)
        while True:
            now_ms = self._clock.monotonic_ms()
            picked = pick(self.endpoints, ask, now_ms=now_ms)
            if isinstance(picked, Picked):
                endpoint = picked.endpoint
                if not without:
                    refuse_hopeless(endpoint, ask, request.terms)
                endpoint.sent(chain, sequences=request.n, prompt_tokens=len(request.prompt_ids))
                client = self._members[endpoint.facts.replica_id].client
                return Placement(client, picked.why)
            if now_ms >= until_ms:
                raise self._refusal(request.model, picked, request.deadline_ms, wait_s)
            await self._turnout.wait((until_ms - now_ms) / 1000)

    @property
    def endpoints(self) -> Sequence[Endpoint]:
        return [member.client.endpoint for member in self._members.values()]

    def models(self) -> Sequence[ServedModel]:
        """What is served here, by name."""
        names = sorted({endpoint.facts.model for endpoint in self.endpoints})
        return [served for name in names if (served := self.model(name)) is not None]

    def model(self, name: str) -> ServedModel | None:
        """One model, or None when no replica of it is known."""
        mine = [endpoint for endpoint in self.endpoints if endpoint.facts.model == name]
        if not mine:
            return None
        now_ms = self._clock.monotonic_ms()
        ask = Ask(model=name, prompt_tokens=0, chain=())
        ready = [endpoint for endpoint in mine if refusal(endpoint, ask, now_ms=now_ms) is None]
        newest = (ready or mine)[-1].facts
        return ServedModel(name=name, newest=newest, replicas_ready=len(ready))

    async def find(self, name: str, *, deadline_ms: float | None) -> ServedModel:
        """One model; waits a bounded while for the first replica of an expected one.

        Raises:
            ModelNotFound: neither the directory nor the configuration knows the name.
            Overloaded: it is expected, but no replica came.
            DeadlineExceeded: the deadline came first.
        """
        until_ms = self._clock.monotonic_ms() + self._wait_s * 1000
        if deadline_ms is not None:
            until_ms = min(until_ms, deadline_ms)
        while (served := self.model(name)) is None:
            if name not in self.expected:
                known = {endpoint.facts.model for endpoint in self.endpoints} | self.expected
                raise model_not_found(name, sorted(known))
            now_ms = self._clock.monotonic_ms()
            if now_ms >= until_ms:
                raise self._refusal(name, "no replica of it is known", deadline_ms, self._wait_s)
            await self._turnout.wait((until_ms - now_ms) / 1000)
        return served

    async def close(self) -> None:
        for replica_id in list(self._members):
            self._forget(replica_id)
        while self._closing:
            await asyncio.wait(self._closing)

    def _join(self, facts: ReplicaFacts) -> None:
        client = ReplicaClient(
            Endpoint(facts),
            cluster_token=self._token,
            clock=self._clock,
            metrics=self._metrics,
            on_change=self._channel_changed,
        )
        self._members[facts.replica_id] = _Member(client)
        client.start()

    def _forget(self, replica_id: str) -> None:
        client = self._members.pop(replica_id).client
        task = asyncio.get_running_loop().create_task(client.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _channel_changed(self) -> None:
        # Called from within the client that changed, which must not be closed under its own feet.
        asyncio.get_running_loop().call_soon(self.sweep)
        self._changed()

    def _changed(self) -> None:
        self._count_ready()
        self._turnout.wake()
        self._on_change()

    def _count_ready(self) -> None:
        self._counted.update(endpoint.facts.model for endpoint in self.endpoints)
        for name in self._counted:
            served = self.model(name)
            self._metrics.replicas_ready(name, served.replicas_ready if served else 0)

    def _refusal(
        self, model: str, why: str, deadline_ms: float | None, waited_s: float
    ) -> ServingError:
        if deadline_ms is not None and self._clock.monotonic_ms() >= deadline_ms:
            return DeadlineExceeded(
                "The deadline passed before a replica could take the request.",
                why=f"No replica of {model} was available: {why}.",
                fix="Allow more time, or retry later.",
            )
        return Overloaded(
            f"No replica of {model} can take the request.",
            why=f"After {waited_s:g} s: {why}.",
            fix="Retry after the time given, with jitter.",
            retry_after_ms=RETRY_AFTER_MS,
        )


def model_not_found(model: str, served: Sequence[str]) -> ModelNotFound:
    return ModelNotFound(
        f"No model {model[:64]!r} is served here.",
        why=f"Served are: {', '.join(served[:20]) or 'none yet'}.",
        fix="Use a name that ListModels returns; names are case-sensitive.",
        field="model",
    )
