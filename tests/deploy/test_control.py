"""What the control process tells an operator of a model."""

from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
)

from headrace.deploy.control import _explanation, _told

TRACEBACK = """The deployment failed to start 3 times in a row. Error:
ray::ServeReplica:chat:engine.initialize_and_get_metadata() (pid=7, ip=127.0.0.1)
  File "/x/replica.py", line 80, in start
headrace.serving.errors.ArtifactTampered: The artifact /a is not what was built. Build it again.
"""


def overview(
    status: ApplicationStatus, *, replicas: dict[str, int], message: str = ""
) -> ApplicationStatusOverview:
    deployment = DeploymentStatusOverview(
        status=DeploymentStatus.UPDATING,
        status_trigger=DeploymentStatusTrigger.CONFIG_UPDATE_STARTED,
        replica_states=replicas,
        message=message,
    )
    return ApplicationStatusOverview(
        status=status, message="", last_deployed_time_s=0, deployments={"engine": deployment}
    )


def test_a_model_that_runs_is_one_line() -> None:
    state = overview(ApplicationStatus.RUNNING, replicas={"RUNNING": 2})

    assert _told(state) == "running (2 running)"


def test_a_rollout_shows_both_generations() -> None:
    state = overview(ApplicationStatus.DEPLOYING, replicas={"STARTING": 1, "RUNNING": 2})

    assert _told(state) == "deploying (1 starting, 2 running)"


def test_a_failure_is_told_in_the_words_of_our_own_error() -> None:
    """Ray's message is a traceback through five processes; one line of it helps."""
    state = overview(ApplicationStatus.DEPLOY_FAILED, replicas={}, message=TRACEBACK)

    assert _explanation(state) == (
        "ArtifactTampered: The artifact /a is not what was built. Build it again."
    )
    assert _told(state).startswith("deploy failed (no replicas): ArtifactTampered")


def test_a_failure_that_is_not_ours_is_told_by_its_last_line() -> None:
    state = overview(ApplicationStatus.UNHEALTHY, replicas={}, message="a\nOutOfMemory: killed\n")

    assert _explanation(state) == "OutOfMemory: killed"
