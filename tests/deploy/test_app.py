"""A model as a Ray Serve application; needs no running Ray."""

from typing import Any

import pytest

from headrace.deploy.app import build
from headrace.serving.errors import ConfigRefused

ENGINE = {
    "model": "chat",
    "artifact": "/artifacts/a",
    "rows_max": 32,
    "batch_tokens_max": 512,
    "prefill_tokens_max": 256,
    "kv_tokens": 4096,
    "waiting_max": 64,
    "threads": 1,
}
WIRING = {"directory": "10.0.0.1:50052", "cluster_token_path": "/secrets/token", "host": "10.0.0.2"}


def deployed(**args: Any) -> Any:
    """What a RayService would deploy from these `args`."""
    application = build({"engine": ENGINE, "wiring": WIRING, **args})
    return application._bound_deployment


def test_a_config_file_can_name_an_application() -> None:
    deployment = deployed(replicas=3, drain_s=20)

    assert deployment.name == "engine"
    assert deployment.num_replicas == 3
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 25


def test_old_engines_stay_until_new_ones_are_ready() -> None:
    assert deployed(replicas=1)._deployment_config.max_surge_percent == 100
    assert deployed(replicas=4)._deployment_config.max_surge_percent == 25


def test_equal_plans_are_the_same_version_and_others_are_not() -> None:
    """Serve makes up a version of its own otherwise, and restarts engines that need none."""
    again = deployed(replicas=2).version
    moved = deployed(wiring={**WIRING, "directory": "10.0.0.9:50052"}).version
    rebuilt = deployed(engine={**ENGINE, "artifact": "/artifacts/b"}).version

    assert deployed().version == again
    assert len({again, moved, rebuilt}) == 3


@pytest.mark.parametrize(
    "args",
    [
        pytest.param({"wiring": WIRING}, id="no engine"),
        pytest.param({"engine": {**ENGINE, "rows": 1}, "wiring": WIRING}, id="an unknown field"),
        pytest.param({"engine": ENGINE, "wiring": {}}, id="no directory"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(args: dict[str, Any]) -> None:
    with pytest.raises(ConfigRefused, match=r"headrace\.deploy\.app:build"):
        build(args)
