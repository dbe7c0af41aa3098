"""One typed configuration from one YAML file; a refusal names file, key, value and fix.

`$HEADRACE_HOME/config.yaml` is read once, when a process starts. A missing file means the defaults
below, which suit one machine. Every limit has its reason beside it. Flags override by path:

    Config.load().with_overrides({"frontend.grpc_port": 50052, "models.smollm2-135m.replicas": 2})
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from headrace.serving.config_accounts import AccountsConfig, OperatorIssuer
from headrace.serving.config_jobs import BatchConfig, IdempotencyConfig
from headrace.serving.config_metering import LedgerConfig, MeterConfig
from headrace.serving.config_prices import PricesConfig, check_whole_rates
from headrace.serving.config_reader import Reader, bounded, override, port, read_yaml
from headrace.serving.config_tiers import TiersConfig
from headrace.serving.domain.artifact import Precision
from headrace.serving.domain.limit import Limit, check_limit
from headrace.serving.domain.scope import network
from headrace.serving.domain.tier import Tier
from headrace.serving.domain.usage import Price
from headrace.serving.errors import ConfigRefused, InvalidRequest

CONFIG_FILE = "config.yaml"
SECRET_BYTES_MAX = 4096
"""A connection string with every option, or the longest token, is shorter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One served model."""

    name: str
    """As `headrace models` lists it."""
    precision: Precision = Precision.INT8
    """int8 is the fastest whose answers agree with fp32 in all but rare ties."""
    variant: str | None = None
    """Which build, as `headrace models versions` lists them: `h200/fp8/tp4`. Unset: the target cpu
    in `precision`."""
    version: int | None = bounded(None, 1, 1 << 31)
    """Pins this version, whichever is current. Unset: the current one, and its successors."""
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
    kv_tokens: int | None = bounded(None, 256, 1 << 30)
    """Tokens the KV cache holds over all sequences. Unset: 16,384 for the target cpu, and for a
    TensorRT build, whose cache is linear, the longest sequence for each of `rows_max` rows."""
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
    trusted_proxies: tuple[str, ...] = ()
    """Networks in CIDR form whose members say, in `proxy_header`, whom they speak for. None by
    default: anybody could write that header. Only keys that are bound to networks need it."""
    proxy_header: str = "x-forwarded-for"
    """Metadata with addresses, the nearest last, separated by commas."""
    tls_cert: Path | None = None
    """PEM chain; with tls_key it turns TLS on for gRPC and HTTP."""
    tls_key: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryConfig:
    """Where replicas announce themselves and frontends look for them."""

    address: str = "127.0.0.1:50052"
    hosted: bool = True
    """Whether this frontend runs the directory. Of several frontends one does; the others name its
    address here. While it is away they keep the last set they heard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaConfig:
    """How limits are shared between frontends."""

    authority: str | None = None
    """host:port of the directory whose process keeps all limits and leases slices of them. Unset:
    this frontend is the only one; its limits are `limits:` here and those that
    `headrace limits set` made in this home."""
    holder: str = "frontend"
    """Names this frontend, the same over all its lives, different from every other's: the pod's
    name of a StatefulSet."""


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
    allow_unverified: bool = False
    """Whether engines are served that were built where their device was not, so that only their
    network was compared with the reference."""
    frontend: FrontendConfig = field(default_factory=FrontendConfig)
    directory: DirectoryConfig = field(default_factory=DirectoryConfig)
    cluster_token_path: Path | None = None
    """File with the secret that replicas and frontends share. Unset: `cluster_token` in the home,
    made on first use; on a cluster, a mounted secret."""
    meter: MeterConfig = field(default_factory=MeterConfig)
    prices: PricesConfig = field(default_factory=PricesConfig)
    accounts: AccountsConfig = field(default_factory=AccountsConfig)
    operators: tuple[OperatorIssuer, ...] = ()
    ledger: LedgerConfig = field(default_factory=LedgerConfig)
    tiers: TiersConfig = field(default_factory=TiersConfig)
    limits: tuple[Limit, ...] = ()
    """Rates, numbers in use and budgets of organisations, projects and keys; read again when the
    file changes. One that an operator set with `headrace limits set` stands in place of the one
    here for the same subject, model and metric."""
    quota: QuotaConfig = field(default_factory=QuotaConfig)
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
        """The rates of a model in a tier, by this file's own book."""
        return self.prices.price(model, tier)

    def threads_for(self, model: ModelConfig) -> int:
        """Threads of one of its engines: as configured, else an equal share of the cores."""
        replicas = sum(each.replicas for each in self.models)
        return model.threads or max(1, cores() // max(1, replicas))

    @property
    def artifacts_dir(self) -> Path:
        return self.home / "artifacts"

    @property
    def trust_dir(self) -> Path:
        """The public keys whose signatures count here."""
        return self.home / "trust"

    @property
    def meterlog_dir(self) -> Path:
        return self.home / "meterlog"

    @property
    def ledger_path(self) -> Path:
        return self.home / "ledger.db"

    @property
    def accounts_path(self) -> Path:
        return self.home / "accounts.db"

    @property
    def prices_dir(self) -> Path:
        return self.home / "prices"

    @property
    def limits_path(self) -> Path:
        return self.home / "limits.db"

    @property
    def quota_path(self) -> Path:
        return self.home / "quota.db"

    @property
    def idempotency_path(self) -> Path:
        return self.home / "idempotency.db"

    @property
    def batches_dir(self) -> Path:
        return self.home / "batches"

    @property
    def epochs_dir(self) -> Path:
        """Locks of the frontends that live; see `epochs.py`."""
        return self.home / "epochs"

    @property
    def keys_path(self) -> Path:
        """Where keys were kept before there were organisations."""
        return self.home / "keys.json"

    @property
    def pepper_path(self) -> Path:
        return self.home / "pepper"

    @property
    def sla_key_path(self) -> Path:
        return self.home / "sla_key"

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


def read_secret(path: Path, *, key: str) -> str:
    """The one line of a file that holds a secret.

    Raises:
        ConfigRefused: it cannot be read, or is empty.
    """
    try:
        with path.open("rb") as file:
            text = file.read(SECRET_BYTES_MAX).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigRefused(
            f"The file {path} cannot be read: {type(error).__name__}.",
            why=f"{key} names it.",
            fix="Make it readable for this user, or correct its path.",
            field=key,
        ) from error
    if not text:
        raise ConfigRefused(
            f"The file {path} is empty.",
            why=f"{key} names it, and what it should hold is not there.",
            fix="Write the secret into it, on one line.",
            field=key,
        )
    return text


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
    check_whole_rates(config.prices, where)
    _check_networks(frontend.trusted_proxies, where)
    sink_url = config.ledger.sink_url
    if sink_url is not None and not sink_url.startswith(("https://", "http://")):
        raise ConfigRefused(
            f"{where}: ledger.sink_url is {sink_url!r}.",
            why="Usage events are sent over HTTP.",
            fix="Write it like https://openmeter.example/api/v1/events.",
            field="ledger.sink_url",
        )
    _check_limits(config, where)
    host, colon, port = config.directory.address.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) <= 65_535):
        raise ConfigRefused(
            f"{where}: directory.address is {config.directory.address!r}.",
            why="Replicas and frontends meet at a host and a port.",
            fix="Write it like 127.0.0.1:50052.",
            field="directory.address",
        )
    return config


def _check_networks(proxies: Sequence[str], where: str) -> None:
    for text in proxies:
        try:
            network(text)
        except ValueError as error:
            raise ConfigRefused(
                f"{where}: frontend.trusted_proxies has {text!r}.",
                why=f"Each entry is a network in CIDR form: {error}.",
                fix="Write it like 10.0.0.0/8 or fd00::/8.",
                field="frontend.trusted_proxies",
            ) from error


def _check_limits(config: Config, where: str) -> None:
    """Each limit means something, has one home, and its money is the price book's."""
    names: set[str] = set()
    for number, limit in enumerate(config.limits):
        path = f"limits[{number}]"
        try:
            check_limit(limit)
        except InvalidRequest as error:
            raise ConfigRefused(
                f"{where}: {path}: {error.what}",
                why=error.why,
                fix=error.fix,
                field=f"{path}.{error.field}",
            ) from error
        if limit.name in names:
            raise ConfigRefused(
                f"{where}: {path} limits {limit.metric} of {limit.subject} a second time.",
                why="A limit must have one home.",
                fix="Merge the two entries.",
                field=path,
            )
        names.add(limit.name)
        if limit.metric.is_budget and limit.currency != config.prices.currency:
            raise ConfigRefused(
                f"{where}: {path} is in {limit.currency}, the prices are in "
                f"{config.prices.currency}.",
                why="Nothing is converted.",
                fix=f"Write `currency: {config.prices.currency}` there.",
                field=f"{path}.currency",
            )
