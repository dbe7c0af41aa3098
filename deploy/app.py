"""Models to Ray Serve applications: one application for each model, one deployment in it.

`build` is what a RayService names as its `import_path`; the embedded control process uses
`application` directly.
"""

from collections.abc import Mapping
from typing import Any

from ray import serve

from headrace.deploy.replica import EngineReplica, Wiring
from headrace.deploy.rollout import EnginePlan, ModelPlan
from headrace.serving.errors import ConfigRefused

DEPLOYMENT = "engine"
STOP_SLACK_S = 5.0
"""Between the end of a replica's drain and Serve's patience: the engine closes in it."""
STARTS_MAX = 3
"""Tries of a replica that cannot start; an artifact that fails three times fails always."""


def application(
    plan: ModelPlan, wiring: Wiring, engine_replica: type[EngineReplica] = EngineReplica
) -> serve.Application:
    """The Serve application of one model. `engine_replica` is another kind of it, for tests."""
    deployment = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=plan.replicas,
        # Of a core: Ray's scheduler counts, the kernel schedules. Threads are in the engine plan.
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=16,
        health_check_period_s=1.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=plan.drain_s + STOP_SLACK_S,
        graceful_shutdown_wait_loop_s=0.1,
        max_surge_percent=plan.surge_percent,
        max_constructor_retry_count=STARTS_MAX,
    )(engine_replica)
    # Serve would make up a version at every deployment and restart replicas that need none.
    deployment = deployment.options(
        version=f"{plan.engine.version}-{wiring.fingerprint}", _internal=True
    )
    return deployment.bind(plan.engine, wiring, plan.drain_s)


def build(args: Mapping[str, Any]) -> serve.Application:
    """One application from the `args` of a Serve config file.

    Keys: `engine` (the fields of EnginePlan), `wiring` (the fields of Wiring), `replicas`,
    `drain_s`.

    Raises:
        ConfigRefused: a key is missing or unknown.
    """
    try:
        plan = ModelPlan(
            engine=EnginePlan(**args["engine"]),
            replicas=args.get("replicas", 1),
            drain_s=args.get("drain_s", 30.0),
        )
        wiring = Wiring(**args["wiring"])
    except (KeyError, TypeError) as error:
        raise ConfigRefused(
            f"The arguments of headrace.deploy.app:build do not fit: {error}.",
            why="They are `engine`, `wiring`, `replicas` and `drain_s`.",
            fix="Compare them with EnginePlan and Wiring in headrace/deploy.",
        ) from error
    return application(plan, wiring)
