"""The configuration: what it says by default, what it refuses, and how flags override it."""

import importlib
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from headrace.serving import config as config_module
from headrace.serving.config import Config, ModelConfig, parse_assignment
from headrace.serving.domain.artifact import Precision
from headrace.serving.domain.limit import Metric
from headrace.serving.errors import ConfigRefused


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("HEADRACE_HOME", raising=False)


def load(home: Path, text: str) -> Config:
    (home / "config.yaml").write_text(text)
    return Config.load(home)


def test_without_a_file_the_defaults_serve_the_demo_model_on_loopback(tmp_path):
    config = Config.load(tmp_path)

    assert [model.name for model in config.models] == ["smollm2-135m"]
    assert config.models[0].precision is Precision.INT8
    assert (config.frontend.host, config.frontend.grpc_port) == ("127.0.0.1", 50051)
    assert config.frontend.http_port == 8080


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path):
    config = load(
        tmp_path,
        """
        models:
          - smollm2-135m
          - {name: other, precision: fp32, replicas: 2, threads: 3}
        frontend: {grpc_port: 6000, drain_s: 5}
        """,
    )

    assert config.models[1] == ModelConfig(
        name="other", precision=Precision.FP32, replicas=2, threads=3
    )
    assert config.frontend.drain_s == 5.0
    assert config.frontend.http_port == 8080


@pytest.mark.parametrize(
    ("text", "blamed", "says"),
    [
        pytest.param("frontent: {}", "frontent", "'frontend'", id="a misspelt section"),
        pytest.param("meter: {queue: 1}", "meter.queue", "'queue_max'", id="a misspelt key"),
        pytest.param("home: /x", "home", "Known keys", id="the home, which is not ours to say"),
        pytest.param("frontend: 3", "frontend", "keys and values", id="a number for a section"),
        pytest.param("models: 3", "models", "list", id="a number for a list"),
        pytest.param("models: [{}]", "models[0].name", "no 'name'", id="a model without a name"),
        pytest.param("models: [a, a]", "models", "twice", id="a model listed twice"),
        pytest.param(
            "models: [{name: a, precision: int7}]", "models[0].precision", "fp32, int8, int4",
            id="a precision we do not have",
        ),
        pytest.param("frontend: {grpc_port: 70000}", "frontend.grpc_port", "65,535", id="too high"),
        pytest.param("frontend: {grpc_port: yes}", "frontend.grpc_port", "True", id="yes"),
        pytest.param("frontend: {drain_s: .nan}", "frontend.drain_s", "between", id="not a number"),
        pytest.param("frontend: {host: ''}", "frontend.host", "not empty", id="an empty text"),
        pytest.param(
            "prices: {default: {prompt_nano_per_mtok: 0.5}}",
            "prices.default.prompt_nano_per_mtok", "whole number",
            id="money as a float",
        ),
        pytest.param("frontend: {tls_cert: /x}", "frontend.tls_cert", "private key", id="no key"),
        pytest.param("directory: {address: here}", "directory.address", "port", id="no port"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_refused_with_file_key_and_fix(tmp_path, text, blamed, says):
    with pytest.raises(ConfigRefused) as refusal:
        load(tmp_path, text)

    error = refusal.value
    assert str(tmp_path / "config.yaml") in error.what
    assert error.field == blamed
    assert says in f"{error.what} {error.why} {error.fix}"
    assert error.fix


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"a: [", id="broken syntax"),
        pytest.param(b"meter: {}\nmeter: {}", id="a key that stands twice"),
        pytest.param(b"\xff\xfe\xfa", id="no text"),
        pytest.param(b"# " + b"x" * (1 << 20) + b"\n", id="longer than any configuration"),
        pytest.param(b"a: !!python/object/apply:os.system ['true']", id="a tag that runs code"),
    ],
)
def test_a_file_that_is_no_yaml_of_ours_is_refused(tmp_path, raw):
    (tmp_path / "config.yaml").write_bytes(raw)

    with pytest.raises(ConfigRefused) as refusal:
        Config.load(tmp_path)

    assert "config.yaml" in refusal.value.what


def test_flags_override_by_path_and_those_not_given_change_nothing(tmp_path):
    config = load(tmp_path, "models: [{name: qwen2.5-0.5b}, {name: b}]\nfrontend: {host: 0.0.0.0}")

    changed = config.with_overrides(
        {
            "frontend.grpc_port": 1234,
            "frontend.host": None,
            "models.qwen2.5-0.5b.replicas": 4,
            "models.b.precision": Precision.INT4,
            "prices.models.qwen2.5-0.5b.cached_nano_per_mtok": 700,
            "cluster_token_path": Path("/run/token"),
        }
    )

    assert (changed.frontend.host, changed.frontend.grpc_port) == ("0.0.0.0", 1234)
    assert [model.replicas for model in changed.models] == [4, 1]
    assert changed.models[1].precision is Precision.INT4
    assert changed.price_for("qwen2.5-0.5b").cached_nano_per_mtok == 700
    assert changed.cluster_token_file == Path("/run/token")
    assert config.frontend.grpc_port == 50051


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("frontend.grpc_prt", 1),
        ("frontend.grpc_port", 70_000),
        ("frontend.grpc_port", "1234"),
        ("frontend.grpc_port.x", 1),
        ("models.nobody.replicas", 1),
        ("nothing", 1),
        ("frontend", 1),
    ],
)
def test_a_flag_may_say_nothing_that_the_file_may_not(tmp_path, path, value):
    with pytest.raises(ConfigRefused):
        Config.load(tmp_path).with_overrides({path: value})


def test_an_assignment_on_the_command_line_is_a_path_and_a_yaml_value():
    assert parse_assignment("frontend.grpc_port=1234") == ("frontend.grpc_port", 1234)
    assert parse_assignment("frontend.host=a=b") == ("frontend.host", "a=b")
    for text in ("frontend.host", "=1", "a=[", ""):
        with pytest.raises(ConfigRefused):
            parse_assignment(text)


def test_prices_come_from_the_models_entry_or_the_default(tmp_path):
    config = load(
        tmp_path,
        """
        prices:
          version: 2026-12
          currency: EUR
          default: {prompt_nano_per_mtok: 100}
          models: {big: {prompt_nano_per_mtok: 900, completion_nano_per_mtok: 9100}}
        """.replace("2026-12", "'2026-12'"),
    )

    assert config.price_for("small").prompt_nano_per_mtok == 100
    big = config.price_for("big")
    assert (big.prompt_nano_per_mtok, big.completion_nano_per_mtok) == (900, 9100)
    assert (big.currency, big.version) == ("EUR", "2026-12")


def test_cores_are_shared_among_all_replicas_unless_a_model_says_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(config_module, "cores", lambda: 8)
    config = load(tmp_path, "models: [{name: a, replicas: 3}, {name: b, threads: 6}]")

    assert [config.threads_for(model) for model in config.models] == [2, 6]


def test_a_machine_with_fewer_cores_than_replicas_still_gives_each_a_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(config_module, "cores", lambda: 2)
    config = load(tmp_path, "models: [{name: a, replicas: 3}]")

    assert config.threads_for(config.models[0]) == 1


def test_the_environment_names_the_home_and_the_collector_only(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317")

    config = Config.load()

    assert config.home == tmp_path
    assert config.telemetry.otlp_endpoint == "http://collector:4317"


def test_the_home_is_made_for_its_owner_only(tmp_path):
    config = Config.load(tmp_path / "new" / "home")

    config.prepare_home()
    config.prepare_home()

    assert config.home.stat().st_mode & 0o777 == 0o700
    assert config.artifacts_dir.stat().st_mode & 0o777 == 0o700


def test_a_home_that_cannot_be_made_says_which_folder_and_what_to_set(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigRefused) as refusal:
        Config.load(tmp_path / "file" / "home").prepare_home()

    assert "HEADRACE_HOME" in refusal.value.fix


def test_every_number_in_the_configuration_has_bounds():
    """A bound that is missing would be a KeyError for the first person who sets the key."""
    folder = Path(config_module.__file__).parent
    names = {f"headrace.serving.{path.stem}" for path in folder.glob("config*.py")}
    kinds = [
        each
        for name in sorted(names)
        for each in vars(importlib.import_module(name)).values()
        if is_dataclass(each) and each.__module__ == name
    ]

    unbounded = [
        f"{kind.__name__}.{entry.name}"
        for kind in kinds
        for entry in fields(kind)
        if str(entry.type).startswith(("<class 'int'", "<class 'float'", "int", "float"))
        and set(entry.metadata) != {"low", "high"}
    ]

    assert len(kinds) >= 20
    assert unbounded == []


def test_limits_are_read_with_their_defaults(tmp_path):
    config = load(
        tmp_path,
        "limits:\n"
        "  - {subject: 'project:acme/search', metric: output_tokens_per_min, limit: 50000}\n"
        "  - {subject: 'organisation:acme', metric: budget_nano_per_month, limit: 9, hard: true}\n",
    )

    tokens, budget = config.limits
    assert (tokens.model, tokens.burst_or_limit, tokens.hard) == (None, 50_000, False)
    assert (budget.metric, budget.hard, budget.currency) == (Metric.BUDGET_MONTH, True, "USD")


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        pytest.param("subject: acme, metric: kv_tokens, limit: 1", "limits[0].subject", id="whose"),
        pytest.param("subject: 'key:k', metric: kv_tokens", "limits[0].limit", id="no number"),
        pytest.param(
            "subject: 'key:k', metric: kv_tokens, limit: -1", "limits[0].limit", id="negative"
        ),
        pytest.param(
            "subject: 'key:k', metric: kv_tokens, limit: 9223372036854775808",
            "limits[0].limit",
            id="overflowing",
        ),
        pytest.param(
            "subject: 'key:k', metric: kv_tokens, limit: 1.5", "limits[0].limit", id="a fraction"
        ),
        pytest.param(
            "subject: 'key:k', metric: tokens, limit: 1", "limits[0].metric", id="of nothing"
        ),
        pytest.param(
            "subject: 'key:k', metric: kv_tokens, limit: 1, burst: 2", "limits[0].burst", id="burst"
        ),
        pytest.param(
            "subject: 'key:k', metric: budget_nano_total, limit: 1, hard: 1",
            "limits[0].hard",
            id="a number for a yes",
        ),
        pytest.param(
            "subject: 'key:k', metric: budget_nano_total, limit: 1, currency: EUR",
            "limits[0].currency",
            id="another currency than the prices",
        ),
    ],
)
def test_a_limit_that_means_nothing_is_refused_by_its_path(tmp_path, entry, field):
    with pytest.raises(ConfigRefused) as refusal:
        load(tmp_path, f"limits: [{{{entry}}}]")

    assert refusal.value.field == field


def test_a_limit_stands_once(tmp_path):
    entry = "{subject: 'key:k', metric: kv_tokens, limit: 1}"
    with pytest.raises(ConfigRefused, match="a second time"):
        load(tmp_path, f"limits: [{entry}, {entry}]")


def test_a_truth_is_true_or_false_and_nothing_like_it(tmp_path):
    assert not load(tmp_path, "idempotency: {keep_answers: false}").idempotency.keep_answers
    for near in ("0", "'no'", "1"):
        with pytest.raises(ConfigRefused, match="true or false"):
            load(tmp_path, f"idempotency: {{keep_answers: {near}}}")
