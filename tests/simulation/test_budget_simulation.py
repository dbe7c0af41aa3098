"""Ten thousand budgets that run out, each under requests that compete for it: overshoot 0 tokens.

Every trial is a budget of a random size and a handful of concurrent answers of random lengths, in
random steps, some with several choices, some abandoned. What was delivered is what is charged, and
it is never more than the budget, nor less than what could have been spent of it.
"""

import asyncio
import random
from dataclasses import replace
from pathlib import Path

from headrace.serving.admission.lease_keeper import LeaseKeeper
from headrace.serving.admission.quota import Quota
from headrace.serving.domain.generate import Generate
from headrace.serving.domain.limit import Limit, Metric
from headrace.serving.domain.record import Caller
from headrace.serving.domain.request import Sampling
from headrace.serving.domain.usage import FEMTO_PER_NANO, Outcome, Price, Usage
from headrace.serving.errors import BudgetExhausted
from headrace.serving.testing.direct_authority import DirectAuthority
from headrace.serving.testing.virtual_time import VirtualClock, run_virtually

TRIALS = 10_000
REQUESTS = 4
AT_ONCE = 500
"""Trials that share one moment, and one message to the authority."""
SEED = 20261127

PRICE = Price.text(
    version="p1",
    prompt_nano_per_mtok=1_000_000_100,
    cached_nano_per_mtok=100_000_300,
    completion_nano_per_mtok=2_000_000_700,
    reasoning_nano_per_mtok=3_000_001_100,
)
"""Rates that are no round numbers: a femto too many would show."""


class Trial:
    """One budget and what was charged to it."""

    def __init__(self, number: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.tenant = f"t{number}"
        nano = self.random.randint(1, 200_000)
        self.limit = Limit(
            subject=f"organisation:{self.tenant}",
            metric=Metric.BUDGET_TOTAL,
            limit=nano,
            hard=True,
        )
        self.charged = 0
        self.ended_over_budget = 0
        self.refused = 0
        self.cheapest_refused = 1 << 62

    async def run(self, quota: Quota) -> None:
        await asyncio.gather(*(self.request(quota) for _ in range(REQUESTS)))
        assert self.charged <= self.limit.limit * FEMTO_PER_NANO, f"{self.tenant} overshot"

    async def request(self, quota: Quota) -> None:
        rng = self.random
        prompt = rng.randint(1, 40)
        request = Generate(
            caller=Caller(self.tenant, "k"),
            request_id="r",
            model="m",
            version="v",
            prompt_ids=range(prompt),
            sampling=Sampling(max_tokens=rng.randint(1, 40)),
            n=rng.choice([1, 1, 2]),
            price=PRICE,
            accepted_unix_ms=0,
            accepted_ms=0,
        )
        try:
            hold = await quota.admit(request)
        except BudgetExhausted:
            self.refused += 1
            return
        delivered, outcome = Usage(), Outcome.OK
        cached = rng.randint(0, prompt)
        total = request.n * request.sampling.max_tokens
        usage = Usage(prompt_tokens=prompt, cached_tokens=cached)
        while usage.completion_tokens < total:
            tokens = min(usage.completion_tokens + rng.choice([1, 2, 5, 20]), total)
            thought = usage.reasoning_tokens + rng.choice([0, tokens - usage.completion_tokens])
            usage = replace(usage, completion_tokens=tokens, reasoning_tokens=thought)
            if not (hold.covers(usage) or await hold.extend(usage)):
                self.ended_over_budget += 1
                outcome = Outcome.BUDGET
                break
            delivered = usage
            if rng.random() < 0.02:
                outcome = Outcome.CANCELLED
                break
            await asyncio.sleep(rng.choice([0, 0, 0.01]))
        charge = PRICE.charge_femto(delivered)
        self.charged += charge
        hold.settle(usage=delivered, outcome=outcome, charge_femto=charge)


def test_ten_thousand_budgets_run_out_and_none_is_overshot(tmp_path: Path) -> None:
    trials = [Trial(number, SEED + number) for number in range(TRIALS)]

    async def run() -> None:
        clock = VirtualClock()
        limits = [trial.limit for trial in trials]
        authority = DirectAuthority(tmp_path, limits, clock=clock)
        leases = LeaseKeeper(authority, holder="f", epoch="1", clock=clock)
        leases.start()
        quota = Quota(clock=clock, leases=leases, limits=limits)
        for first in range(0, TRIALS, AT_ONCE):
            await asyncio.gather(*(t.run(quota) for t in trials[first : first + AT_ONCE]))
        await leases.close()
        spent = {each.limit.subject: each.spent for each in authority.core.standings()}
        for trial in trials:
            assert spent[trial.limit.subject] == trial.charged, trial.tenant
        authority.close()

    run_virtually(run())

    assert sum(trial.ended_over_budget for trial in trials) > TRIALS
    assert sum(trial.refused for trial in trials) > TRIALS / 10
    assert sum(trial.charged for trial in trials) > 0
