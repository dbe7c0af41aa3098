"""The manifest: what compile promises about an artifact and serving relies on."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from headrace.serving.errors import ArtifactTampered

MANIFEST_VERSION = 2
MANIFEST_FILE = "manifest.json"


class Precision(StrEnum):
    FP32 = "fp32"
    INT8 = "int8"
    INT4 = "int4"
    """`cpu`: the native engine's blocks of 32. TensorRT: weights only, blocks of 128, over bf16."""
    BF16 = "bf16"
    FP8 = "fp8"
    """E4M3 weights and, where calibrated, activations; the rest bf16. TensorRT only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How one replica lies over devices.

    A rank's number is `(stage * cp + cp_index) * tp + tp_index`. The ranks of one stage, tp * cp of
    them, share a communicator; between stages only hidden states pass.
    """

    tp: int = 1
    """Tensor parallel: heads, ffn and vocabulary are split."""
    pp: int = 1
    """Pipeline stages: layers are split."""
    cp: int = 1
    """Context parallel (Ulysses): tokens are split outside attention, heads inside it; weights are
    whole on each rank."""

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.cp

    def place(self, rank: int) -> tuple[int, int, int]:
        """The (stage, cp_index, tp_index) of a rank."""
        return rank // (self.cp * self.tp), rank // self.tp % self.cp, rank % self.tp

    @property
    def label(self) -> str:
        """For example "tp2-pp2"; empty where one device holds all."""
        sizes = (("tp", self.tp), ("pp", self.pp), ("cp", self.cp))
        return "-".join(f"{name}{size}" for name, size in sizes if size > 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The facts of a decoder-only transformer that an engine needs beside its weights."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    rms_eps: float
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    context_tokens: int
    rope_scale: float = 1.0
    """Multiplies cos and sin (YaRN's attention factor); 1 for the others. The inverse frequencies,
    head_dim / 2 of them, are the tensor `rope.inv_freq`: every RoPE variant we support reduces to
    these two."""
    o_bias: bool = False
    experts: int = 0
    """Of each layer's mixture; 0 for a dense model, whose MLP is `ffn` wide."""
    experts_per_token: int = 0
    expert_ffn: int = 0
    norm_topk: bool = True
    """Whether the chosen experts' weights are made to sum to one."""

    @property
    def kv_values_per_token(self) -> int:
        """Numbers one token keeps in the KV cache: a key and a value in each layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim


class VerifyMethod(StrEnum):
    ENGINE = "engine"
    """The engine itself was run as serving runs it."""
    NETWORK = "network"
    """The network that was given to TensorRT was computed on CPU, layer by layer; the plan made of
    it has not been run. Serving refuses such an engine unless it is told otherwise."""
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was built against `transformers` in fp32 on fixed prompts."""

    reference: str
    """For example "transformers 5.23.0, fp32"."""
    tokens: int
    max_abs_error: float
    """Largest difference of a logit."""
    top1_agreement: float
    """Share of positions whose likeliest token is the same."""
    perplexity: float
    perplexity_reference: float
    tolerance: str
    method: VerifyMethod = VerifyMethod.ENGINE
    host: str = ""
    """Who ran it: `<host fingerprint> <cpu or gpu>`."""
    verified_at: str = ""
    """UTC, ISO 8601."""
    logit_error: float = 0.0
    """Root mean square of the logits' difference, relative to the spread of the reference's."""

    @property
    def perplexity_delta(self) -> float:
        """Relative: 0.01 is one per cent worse than the reference."""
        return self.perplexity / self.perplexity_reference - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One optimisation profile: the sizes of a step that it serves."""

    name: str
    rows: tuple[int, int, int]
    """Least, likeliest and most rows."""
    tokens: tuple[int, int, int]
    """Least, likeliest and most tokens a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """The plan of one rank."""

    rank: int
    file: str
    plan_bytes: int
    weight_bytes: int
    """Of the constants in its network."""
    activation_bytes: int = 0
    """Of a step, as the library said when it built; 0 where it did not."""
    layers: tuple[int, int]
    """The first layer it computes, and one past the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRt:
    """What a TensorRT engine must know beside the decoder; see `serving/engine/plan_io.py`."""

    library: str
    """"tensorrt_rtx" or "tensorrt"."""
    version: str
    """Of the library; a plan is read by this version alone."""
    compute_capabilities: tuple[str, ...]
    """For example ("9.0",); of the devices that the plan was made for."""
    device: str = ""
    """The card that built it, which must be the card that runs it; empty where any of the compute
    capabilities does. TensorRT's plans are for one model of GPU."""
    cache_tokens: int
    """Places of each row's linear KV cache; the longest sequence and one chunk of padding."""
    profiles: tuple[Profile, ...]
    sharding: Sharding
    ranks: tuple[RankPlan, ...]
    flags: tuple[str, ...] = ()
    """"weight_streaming", "refit"."""
    calibration: str = ""
    """SHA-256 (hex) of the texts that it was calibrated with; empty where it was not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One artifact. Written by compile, read strictly by serving, which guesses nothing."""

    manifest_version: int = MANIFEST_VERSION
    artifact_id: str
    """SHA-256 (hex) over everything that decided the content; see `compile/artifact_key.py`. The
    same input has the same id."""
    model: str
    """What it was called when it was built; the store's names may lead here from others too."""
    family: str
    target: str
    precision: Precision
    engine: str
    """Which engine loads it: "onnx", "native" or "tensorrt"."""
    decoder: Decoder
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    reasoning_token_ids: tuple[int, int] | None = None
    """Ids that open and close a thinking section, where the model has them."""
    default_sampling: Mapping[str, float] = field(default_factory=dict[str, float])
    """temperature, top_p, top_k, min_p, repetition_penalty, as the model's authors advise."""
    weight_bytes: int
    verification: Verification
    source: str
    built_with: Mapping[str, str] = field(default_factory=dict[str, str])
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    """File name to the digest of its content, as `file_digest.py` says; every file but the manifest
    and its signature."""
    tensorrt: TensorRt | None = None
    weights_digest: str = ""
    """SHA-256 (hex) over every file of the checkpoint: weights, configuration, tokenizer."""
    graph_digest: str = ""
    """SHA-256 (hex) over the code that constructs the graph and the facts it is given."""

    @property
    def variant(self) -> str:
        """Which of a model's builds this is, for example "rtx/bf16/tp2-pp2"."""
        return variant(
            self.target, self.precision, self.tensorrt.sharding if self.tensorrt else Sharding()
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str) -> "Manifest":
        """Read strictly: a missing, unknown or mistyped field is a refusal.

        Raises:
            ArtifactTampered: the text is not a manifest of this version.
        """
        try:
            raw = _object(json.loads(text))
            if raw.get("manifest_version") != MANIFEST_VERSION:
                raise ValueError(f"manifest_version is {raw.get('manifest_version')!r}")
            raw["decoder"] = Decoder(**_exact(Decoder, raw["decoder"]))
            raw["verification"] = _verification(raw["verification"])
            raw["tensorrt"] = _tensorrt(raw["tensorrt"])
            raw["precision"] = Precision(raw["precision"])
            raw["eos_token_ids"] = tuple(int(i) for i in raw["eos_token_ids"])
            pair = raw["reasoning_token_ids"]
            raw["reasoning_token_ids"] = (int(pair[0]), int(pair[1])) if pair else None
            return cls(**_exact(cls, raw))
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactTampered(
                f"The manifest in {where} cannot be read: {error}.",
                why=f"Serving reads version {MANIFEST_VERSION} strictly and guesses nothing.",
                fix="Build the artifact again with `headrace compile`.",
            ) from error


def variant(target: str, precision: Precision, sharding: Sharding) -> str:
    """Target, precision and split in one word."""
    return "/".join(part for part in (target, precision.value, sharding.label) if part)


def _verification(value: object) -> Verification:
    raw = _exact(Verification, value)
    raw["method"] = VerifyMethod(raw["method"])
    return Verification(**raw)


def _tensorrt(value: object) -> TensorRt | None:
    if value is None:
        return None
    raw = _exact(TensorRt, value)
    raw["sharding"] = Sharding(**_exact(Sharding, raw["sharding"]))
    raw["profiles"] = tuple(_profile(each) for each in raw["profiles"])
    raw["ranks"] = tuple(_rank_plan(each) for each in raw["ranks"])
    for name in ("compute_capabilities", "flags"):
        raw[name] = tuple(str(each) for each in raw[name])
    return TensorRt(**raw)


def _profile(value: object) -> Profile:
    raw = _exact(Profile, value)
    raw["rows"], raw["tokens"] = _three(raw["rows"]), _three(raw["tokens"])
    return Profile(**raw)


def _rank_plan(value: object) -> RankPlan:
    raw = _exact(RankPlan, value)
    first, last = (int(each) for each in raw["layers"])
    raw["layers"] = (first, last)
    return RankPlan(**raw)


def _three(value: Any) -> tuple[int, int, int]:
    least, likeliest, most = (int(each) for each in value)
    return least, likeliest, most


def _exact(kind: type, value: object) -> dict[str, Any]:
    """The value as arguments of the dataclass `kind`: no unknown field, plain ones of its type."""
    raw = _object(value)
    known = {entry.name: entry.type for entry in fields(kind)}
    if unknown := raw.keys() - known:
        raise ValueError(f"unknown field {min(unknown)!r}")
    for name, each in raw.items():
        wanted = known[name]
        # A bool is an int to Python; a whole number is a float to JSON.
        kinds = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}.get(wanted)
        if kinds and (
            not isinstance(each, kinds) or isinstance(each, bool) is not (wanted is bool)
        ):
            raise ValueError(f"{name!r} is {each!r}")
    return raw


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} stands where an object should")
    return value
