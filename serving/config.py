"""One typed configuration from one YAML file; a refusal names file, key, value and fix.

`$HEADRACE_HOME/config.yaml` is read once, when a process starts. A missing file means the defaults
below, which suit one machine. Every limit has its reason beside it. Flags override by path:

    Config.load().with_overrides({"frontend.grpc_port": 50052, "models.smollm2-135m.replicas": 2})
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import yaml

from headrace.serving.config_jobs import BatchConfig, IdempotencyConfig
from headrace.serving.config_reader import Reader, bounded, override, port, read_yaml
from headrace.serving.domain.artifact import Precision
from headrace.serving.domain.tier import Tier
from headrace.serving.domain.usage import Price
from headrace.serving.errors import ConfigRefused

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One served model."""

    name: str
    """As `headrace models` lists it."""
    precision: Precision = Precision.INT8
    """int8 is the fastest whose answers agree with fp32 in all but rare ties."""
    replicas: int = bounded(1, 0, 256)
    """Engines that serve it, each with its own copy of weights and KV cache."""
    rows_max: int = bounded(32, 1, 1024)
    """Sequences one step advances. A CPU's throughput saturates near 32; more only adds latency."""
    batch_tokens_max: int = bounded(512, 1, 65_536)
    """Tokens of one step: bounds its time, and so the gap between two tokens of every stream."""
    prefill_tokens_max: int = bounded(128, 1, 65_536)
    """Prompt tokens of a step in which something decodes: what a newcomer may cost those who are
    already streaming. Measured on two Zen 5 cores with the demo model in int4, 32 streams: at 32,
    64, 128 and 256 the ITL p99 is 30, 40, 46 and 73 ms, the TTFT p99 2.9, 2.2, 1.3 and 1.2 s, the
    rate 1,096, 1,178, 1,335 and 1,395 tokens/s. Nothing decoding, a step takes batch_tokens_max."""
    kv_tokens: int = bounded(16_384, 256, 1 << 30)
    """Tokens the KV cache holds over all sequences: 32 rows of 512, and what is left over keeps
    prefixes. At 135 M parameters 0.38 GB in bf16 (int8 and int4 engines), 0.75 GB in fp32."""
    waiting_max: int = bounded(256, 0, 65_536)
    """Sequences that may wait for a row: eight full batches. Beyond it waiting is hopeless and the
    caller is told at once."""
    threads: int | None = bounded(None, 1, 1024)
    """Threads of one engine. Unset: this machine's cores divided among all replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendConfig:
    """The process that clients talk to."""

    host: str = "127.0.0.1"
    """Loopback until told otherwise: a key that crosses a network unencrypted is a lost key."""
    grpc_port: int = port(50_051)
    http_port: int = port(8_080)
    message_bytes_max: int = bounded(4 << 20, 1024, 64 << 20)
    """A prompt of 128 k tokens is about 0.7 MB of text; a schema adds at most 64 KiB."""
    metadata_bytes_max: int = bounded(16 << 10, 1024, 1 << 20)
    """A key and a traceparent are 200 bytes; the rest is what proxies add."""
    streams_max: int = bounded(1024, 1, 1 << 20)
    """Answers open at once. Each holds about 100 KB here; the replicas' own bound comes first."""
    connection_streams_max: int = bounded(256, 1, 1 << 16)
    """Answers open at once on one connection, so that one client cannot take them all."""
    drain_s: float = bounded(30.0, 0, 3600)
    """How long a stopping frontend lets open answers finish."""
    tls_cert: Path | None = None
    """PEM chain; with tls_key it turns TLS on for gRPC and HTTP."""
    tls_key: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryConfig:
    """Where replicas announce themselves and frontends look for them."""

    address: str = "127.0.0.1:50052"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeterConfig:
    """How usage is recorded. A killed frontend under-bills at most one checkpoint interval."""

    checkpoint_tokens: int = bounded(64, 1, 1 << 20)
    """Tokens after which a stream's usage is written again: 1.4 s at reading speed."""
    checkpoint_s: float = bounded(1.0, 0.01, 60)
    """Longest that delivered tokens stay unwritten: one write a second for all streams together."""
    queue_max: int = bounded(4096, 16, 1 << 20)
    """Events that may wait for the disk: a third of a second at the 12,000 a second it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPrice:
    """Billionths of a unit of currency for one million tokens. Whole numbers only."""

    prompt_nano_per_mtok: int = bounded(50_000_000, 0, 10**12)
    """0.05 by default."""
    cached_nano_per_mtok: int = bounded(5_000_000, 0, 10**12)
    """A tenth: the work is not done again, the memory is still held."""
    completion_nano_per_mtok: int = bounded(200_000_000, 0, 10**12)
    """0.20 by default."""
    cache_write_nano_per_mtok: int | None = bounded(None, 0, 10**12)
    """Prompt tokens that stay resident for later requests. Unset: as any prompt token."""
    reasoning_nano_per_mtok: int | None = bounded(None, 0, 10**12)
    """Tokens of thinking sections. Unset: as any completion token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPercents:
    """What a tier costs, in per cent of the rates."""

    reserved: int = bounded(100, 0, 10_000)
    priority: int = bounded(200, 0, 10_000)
    standard: int = bounded(100, 0, 10_000)
    flex: int = bounded(50, 0, 10_000)
    batch: int = bounded(50, 0, 10_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class PricesConfig:
    """The price book. A request is charged by the book that was in force when it was accepted."""

    version: str = "demo-1"
    """Written into every record; change it with every change of a price."""
    currency: str = "USD"
    default: ModelPrice = field(default_factory=ModelPrice)
    models: Mapping[str, ModelPrice] = field(default_factory=dict[str, ModelPrice])
    """By model name, where the default does not hold."""
    tiers: TierPercents = field(default_factory=TierPercents)
    """Every rate times every per cent must be a whole number of nano: a rate of at least 100, or
    a multiple of it, always is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryConfig:
    """OpenTelemetry traces. Off unless an endpoint is set."""

    otlp_endpoint: str | None = None
    """For example http://127.0.0.1:4317. Unset: OTEL_EXPORTER_OTLP_ENDPOINT, if that is set."""
    service_name: str = "headrace"


_DEFAULT_MODELS = (ModelConfig(name="smollm2-135m"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything a process of Headrace may be told. Validated; nobody else reads YAML."""

    home: Path
    """Where all state is; not itself a key of the file."""
    models: tuple[ModelConfig, ...] = _DEFAULT_MODELS
    frontend: FrontendConfig = field(default_factory=FrontendConfig)
    directory: DirectoryConfig = field(default_factory=DirectoryConfig)
    cluster_token_path: Path | None = None
    """File with the secret that replicas and frontends share. Unset: `cluster_token` in the home,
    made on first use; on a cluster, a mounted secret."""
    meter: MeterConfig = field(default_factory=MeterConfig)
    prices: PricesConfig = field(default_factory=PricesConfig)
    idempotency: IdempotencyConfig = field(default_factory=IdempotencyConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    @classmethod
    def load(cls, home: Path | None = None) -> "Config":
        """Read `config.yaml` in `home`, or in HEADRACE_HOME, or in ~/.headrace.

        Raises:
            ConfigRefused: the file cannot be read, or a key or value in it is not one of ours.
        """
        folder = (home or default_home()).expanduser().absolute()
        path = folder / CONFIG_FILE
        config = Reader(str(path)).read(cls, read_yaml(path), "", given={"home": folder})
        endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        if config.telemetry.otlp_endpoint is None and endpoint:
            telemetry = replace(config.telemetry, otlp_endpoint=endpoint)
            config = replace(config, telemetry=telemetry)
        return _consistent(config, str(path))

    def with_overrides(self, overrides: Mapping[str, object], *, where: str = "a flag") -> "Config":
        """A copy in which each dotted path has the given value.

        An element of `models` is named by the model: `models.smollm2-135m.replicas`. A value of
        None leaves what is configured, so that flags that were not given can be passed through.

        Raises:
            ConfigRefused: no such path, or a value that the file could not have either.
        """
        config = self
        for path, value in overrides.items():
            if value is not None:
                config = override(config, path, value, Reader(where))
        return _consistent(config, where)

    def price_for(self, model: str, tier: Tier = Tier.STANDARD) -> Price:
        """The rates of a model in a tier, by the book that is in force."""
        book = self.prices
        rates = book.models.get(model, book.default)
        percent = getattr(book.tiers, tier.value)

        def at(rate: int | None) -> int | None:
            return None if rate is None else rate * percent // 100

        return Price.text(
            currency=book.currency,
            version=book.version,
            prompt_nano_per_mtok=rates.prompt_nano_per_mtok * percent // 100,
            cached_nano_per_mtok=rates.cached_nano_per_mtok * percent // 100,
            completion_nano_per_mtok=rates.completion_nano_per_mtok * percent // 100,
            cache_write_nano_per_mtok=at(rates.cache_write_nano_per_mtok),
            reasoning_nano_per_mtok=at(rates.reasoning_nano_per_mtok),
        )

    def threads_for(self, model: ModelConfig) -> int:
        """Threads of one of its engines: as configured, else an equal share of the cores."""
        replicas = sum(each.replicas for each in self.models)
        return model.threads or max(1, cores() // max(1, replicas))

    @property
    def artifacts_dir(self) -> Path:
        return self.home / "artifacts"

    @property
    def ledger_path(self) -> Path:
        return self.home / "ledger.db"

    @property
    def idempotency_path(self) -> Path:
        return self.home / "idempotency.db"

    @property
    def batches_dir(self) -> Path:
        return self.home / "batches"

    @property
    def epochs_dir(self) -> Path:
        """Locks of the frontends that live; see `metering/epochs.py`."""
        return self.home / "epochs"

    @property
    def keys_path(self) -> Path:
        return self.home / "keys.json"

    @property
    def pepper_path(self) -> Path:
        return self.home / "pepper"

    @property
    def cluster_token_file(self) -> Path:
        return self.cluster_token_path or self.home / "cluster_token"

    def prepare_home(self) -> None:
        """Make the home and its folders, readable by their owner only. Idempotent.

        Raises:
            ConfigRefused: the folder cannot be made or written.
        """
        try:
            for folder in (self.home, self.artifacts_dir):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigRefused(
                f"The folder {error.filename} cannot be made: {error.strerror}.",
                why="Keys, artifacts and usage records are kept there.",
                fix="Set HEADRACE_HOME to a folder that this user may write.",
            ) from error
        if not os.access(self.home, os.W_OK | os.X_OK):
            raise ConfigRefused(
                f"The folder {self.home} cannot be written.",
                why="Keys, artifacts and usage records are kept there.",
                fix="Set HEADRACE_HOME to a folder that this user may write.",
            )


def default_home() -> Path:
    return Path(os.environ.get("HEADRACE_HOME") or "~/.headrace").expanduser()


def cores() -> int:
    """Cores this process may use: its affinity, and its container's CPU quota where one is set."""
    available = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("ascii").split()
    except (OSError, ValueError):
        return available  # No cgroup v2, or not its root: no quota that we can know of.
    if quota == "max":
        return available
    return max(1, min(available, int(quota) // int(period)))


def parse_assignment(text: str) -> tuple[str, object]:
    """`frontend.grpc_port=50052`, as `--set` takes it, to a path and a value for an override.

    Raises:
        ConfigRefused: there is no `=`, or the value is not YAML.
    """
    path, equals, value = text.partition("=")
    try:
        parsed: object = yaml.safe_load(value)
    except yaml.YAMLError:
        equals = ""
        parsed = None
    if not equals or not path:
        raise ConfigRefused(
            f"{text!r} sets nothing.",
            why="An assignment is a key's path, an equals sign and a value.",
            fix="Write it like --set frontend.grpc_port=50052.",
        )
    return path, parsed


def _consistent(config: Config, where: str) -> Config:
    """Rules that concern more than one key."""
    frontend = config.frontend
    if (frontend.tls_cert is None) != (frontend.tls_key is None):
        raise ConfigRefused(
            f"{where}: only one of frontend.tls_cert and frontend.tls_key is set.",
            why="TLS needs the certificate and its private key.",
            fix="Set both, or neither.",
            field="frontend.tls_cert",
        )
    names = [model.name for model in config.models]
    for name in names:
        if names.count(name) > 1:
            raise ConfigRefused(
                f"{where}: the model {name!r} is listed twice.",
                why="A model's settings must have one home.",
                fix="Merge the entries; `replicas` says how many engines serve it.",
                field="models",
            )
    _check_whole_rates(config.prices, where)
    host, colon, port = config.directory.address.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) <= 65_535):
        raise ConfigRefused(
            f"{where}: directory.address is {config.directory.address!r}.",
            why="Replicas and frontends meet at a host and a port.",
            fix="Write it like 127.0.0.1:50052.",
            field="directory.address",
        )
    return config


def _check_whole_rates(book: PricesConfig, where: str) -> None:
    """Every rate in every tier is a whole number of nano: nothing is rounded before an invoice."""
    for name, rates in (("default", book.default), *book.models.items()):
        for each in fields(rates):
            for tier in Tier:
                rate, percent = getattr(rates, each.name) or 0, getattr(book.tiers, tier.value)
                if rate * percent % 100:
                    raise ConfigRefused(
                        f"{where}: prices.{name}.{each.name} is {rate}, and {tier} is {percent} %.",
                        why="A rate in a tier is a whole number of nano; this is not.",
                        fix="Make the rate a multiple of 100.",
                        field=f"prices.{name}.{each.name}",
                    )
