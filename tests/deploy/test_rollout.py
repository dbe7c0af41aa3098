"""What the configuration asks for, and what has to change for it to run."""

import argparse
from dataclasses import replace
from pathlib import Path

from headrace.deploy.commands.serve import add_parser
from headrace.deploy.rollout import Changes, ModelPlan, changes, plan_models
from headrace.serving.config import Config, ModelConfig, parse_assignment

HOME = Path("/nowhere")


def config(*models: ModelConfig) -> Config:
    return Config(home=HOME, models=models)


def plans(*models: ModelConfig, build: str = "a") -> dict[str, ModelPlan]:
    def resolve(model: ModelConfig) -> Path:
        return HOME / f"{model.name}-{model.precision}-{build}"

    return plan_models(config(*models), resolve)


CHAT = ModelConfig(name="chat", threads=1)
CODE = ModelConfig(name="code", threads=1)


def test_nothing_changes_when_nothing_changed() -> None:
    todo = changes(plans(CHAT, CODE), plans(CHAT, CODE))

    assert not todo
    assert todo.describe() == []


def test_a_model_that_is_added_is_deployed_beside_the_others() -> None:
    todo = changes(plans(CHAT), plans(CHAT, CODE))

    assert todo == Changes({"code": plans(CODE)["code"]})
    assert todo.describe() == ["code: 1 replicas of code-int8-a"]


def test_a_model_that_left_the_configuration_is_deleted() -> None:
    todo = changes(plans(CHAT, CODE), plans(CHAT))

    assert todo == Changes({}, frozenset({"code"}))


def test_zero_replicas_mean_that_a_model_is_not_served() -> None:
    assert plans(replace(CHAT, replicas=0)) == {}


def test_an_artifact_that_was_built_again_is_a_new_version() -> None:
    before, after = plans(CHAT), plans(CHAT, build="b")

    assert changes(before, after).deploy.keys() == {"chat"}
    assert before["chat"].engine.version != after["chat"].engine.version


def test_more_replicas_leave_the_running_ones_alone() -> None:
    """The version decides whether Ray Serve replaces a replica; a count is not part of it."""
    before, after = plans(CHAT), plans(replace(CHAT, replicas=3))

    assert changes(before, after).deploy.keys() == {"chat"}
    assert before["chat"].engine.version == after["chat"].engine.version


def test_a_rollout_adds_one_replica_at_a_time() -> None:
    surges = [plans(replace(CHAT, replicas=n))["chat"].surge_percent for n in (1, 2, 3, 8)]

    assert surges == [100, 50, 34, 13]


def test_engines_that_were_never_run_are_only_loaded_where_that_is_configured() -> None:
    """`headrace serve --allow-unverified` is an assignment, which every child process gets."""
    commands = argparse.ArgumentParser()
    add_parser(commands.add_subparsers())
    words = ["serve", "--set", "models.chat.threads=2", "--allow-unverified"]
    assignments = commands.parse_args(words).assignments
    overrides = dict(parse_assignment(text) for text in assignments)
    allowing = config(CHAT).with_overrides(overrides, where="--set")

    plan = plan_models(allowing, lambda model: HOME)["chat"].engine

    assert (plan.allow_unverified, plan.threads) == (True, 2)
    assert not plans(CHAT)["chat"].engine.allow_unverified


def test_how_many_tokens_are_cached_is_the_artifacts_to_say_unless_it_is_configured() -> None:
    """A linear cache has a length for each row that only its manifest knows."""
    given = config(CHAT).with_overrides({"models.chat.kv_tokens": 4096})

    assert plans(CHAT)["chat"].engine.kv_tokens is None
    assert plans(*given.models)["chat"].engine.kv_tokens == 4096


def test_versions_are_the_same_in_every_process() -> None:
    """A control process that starts again must not replace healthy replicas.

    Every setting is named here, so that a new default is no new version of this plan.
    """
    model = ModelConfig(
        name="chat",
        rows_max=32,
        batch_tokens_max=512,
        prefill_tokens_max=256,
        kv_tokens=32_768,
        waiting_max=256,
        threads=1,
    )
    assert plans(model)["chat"].engine.version == "88ffa571060040a7"
