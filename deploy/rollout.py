"""What should run, and the difference to what does: values in, values out.

The control process reads the configuration and the artifact store, asks here what that means, and
gives the answer to Ray Serve. An artifact that was compiled again under the same name is a new
plan for its model, so it is rolled out: new replicas beside the old ones, which then drain.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from headrace.serving.config import Config, ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """One engine: which artifact, in what bounds. What differs here needs a new replica."""

    model: str
    artifact: str
    """Folder of the artifact; its name holds the content hash."""
    rows_max: int
    batch_tokens_max: int
    prefill_tokens_max: int
    kv_tokens: int | None
    """None: what suits the artifact, which the replica reads from its manifest."""
    waiting_max: int
    threads: int
    allow_unverified: bool = False
    """Load it even if the engine itself was never run against the reference."""

    @property
    def version(self) -> str:
        """The same for equal plans, in every process.

        Ray Serve replaces a replica when, and only when, this changes.
        """
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """One model: its engine, and how many of them."""

    engine: EnginePlan
    replicas: int
    drain_s: float
    """How long a replica that leaves may go on with the streams it has."""

    @property
    def surge_percent(self) -> int:
        """One replica more than asked for while a new version comes.

        The new one is ready before an old one leaves, and memory holds at most one extra copy.
        """
        return -(-100 // max(1, self.replicas))


@dataclass(frozen=True, slots=True)
class Changes:
    """What to tell Ray Serve. Empty when all is as it should be."""

    deploy: Mapping[str, ModelPlan] = field(default_factory=dict[str, ModelPlan])
    delete: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.deploy or self.delete)

    def describe(self) -> list[str]:
        """One line a model, for the log."""
        lines = [
            f"{model}: {plan.replicas} replicas of {Path(plan.engine.artifact).name[:12]}"
            for model, plan in sorted(self.deploy.items())
        ]
        return lines + [f"{model}: no longer served" for model in sorted(self.delete)]


Resolve = Callable[[ModelConfig], Path]
"""A served model to the folder of the artifact that it means."""


def plan_models(config: Config, resolve: Resolve) -> dict[str, ModelPlan]:
    """What the configuration asks for, by model.

    Raises:
        ServingError: an artifact that it names is not in the store, or not trusted.
    """
    return {
        model.name: _plan(config, model, resolve(model))
        for model in config.models
        if model.replicas > 0
    }


def changes(running: Mapping[str, ModelPlan], wanted: Mapping[str, ModelPlan]) -> Changes:
    """What has to happen for `wanted` to run instead of `running`."""
    return Changes(
        {model: plan for model, plan in wanted.items() if running.get(model) != plan},
        frozenset(running.keys() - wanted.keys()),
    )


def _plan(config: Config, model: ModelConfig, artifact: Path) -> ModelPlan:
    engine = EnginePlan(
        model=model.name,
        artifact=str(artifact),
        rows_max=model.rows_max,
        batch_tokens_max=model.batch_tokens_max,
        prefill_tokens_max=model.prefill_tokens_max,
        kv_tokens=model.kv_tokens,
        waiting_max=model.waiting_max,
        threads=config.threads_for(model),
        allow_unverified=config.allow_unverified,
    )
    return ModelPlan(engine=engine, replicas=model.replicas, drain_s=config.frontend.drain_s)
