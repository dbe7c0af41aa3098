"""What a rank's TensorRT plan occupies: the constants of its network, and what a step keeps.

The network is that of `tensorrt/decoder_network.py`. Its constants, with a rank's own shapes:

    bf16   every matrix, bias and norm 2 bytes a value
    fp8    q, k, v, o, gate, up, down 1 byte a value and 4 (float32) an output
    int4   the same half a byte a value and 2 (bf16) a block of 128 inputs, or of 64 where 128 does
           not divide them; bf16 where neither does
    RoPE   cos and sin of every place of the cache, 2 x S x H / 2 values of 4 bytes

Embedding, head, norms, routers and experts are bf16 in all three: experts are products of one stack
of matrices, which the quantised forms do not cover.

Worked for Qwen3-8B in bf16 on one rank: 8,190,735,360 parameters, 16,381,470,720 bytes; the tables
for 40,960 + 512 places of 64 pairs are 21,233,664 more. A token keeps 2 x 36 x 8 x 128 values of 2
bytes, 147,456 bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from headrace.compile.families.rope import ROPE_TENSOR
from headrace.compile.sharding import Part, held_shapes
from headrace.compile.tensorrt.options import PlanOptions
from headrace.compile.tensorrt.profiles import (
    CHUNK,
    ROWS_MAX,
    default_profiles,
    rounded_chunk,
)
from headrace.compile.tensorrt.weight_forms import form_bytes, is_quantised
from headrace.serving.domain.artifact import Decoder, Precision, Profile, Sharding

PLAN_BYTES_FIXED = 1_500_000
PROFILE_BYTES_FIXED = 620_000
LAYER_BYTES: Mapping[Precision, tuple[int, int]] = {
    Precision.BF16: (345_000, 297_000),
    Precision.FP8: (656_000, 107_000),
    Precision.INT4: (653_000, 107_000),
}
"""For each layer of each profile, and more where heads are normed."""
CALIBRATED_LAYER_BYTES = 246_000
TP_LAYER_BYTES = 300_000
MIXTURE_LAYER_BYTES = 360_000
"""More for inputs in FP8, for the sums of tensor ranks, and for routing.

What a plan has beside its constants: kernels. Fitted to some forty plans of TensorRT-RTX 1.7.1, of
2 to 30 layers with 1 to 4 profiles (`headrace bench plans` measures two). TensorRT 11 has not been
measured.
"""

WORKSPACE_BYTES = 8_192_000
QUANTISED_WORKSPACE_BYTES = 24_600_000
"""Of the kernels' own, in decode steps; also found in TensorRT-RTX's build log."""

_BF16_BYTES = 2
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class TensorRtFootprint:
    """A TensorRT engine of either library."""

    precision: Precision
    rows_max: int = ROWS_MAX
    chunk: int = CHUNK
    activations: bool = False
    """FP8 only: what meets the matrices is FP8 too."""
    weight_streaming: bool = False
    """Weights may stay in the machine's memory."""

    @classmethod
    def of(
        cls, precision: Precision, options: PlanOptions, sharding: Sharding
    ) -> "TensorRtFootprint":
        """Of a build with these options; context ranks share a chunk evenly."""
        return cls(
            precision,
            options.rows_max,
            rounded_chunk(options.chunk, sharding.cp),
            options.activations,
            options.weight_streaming,
        )

    @property
    def narrower(self) -> Sequence["TensorRtFootprint"]:
        order = (Precision.BF16, Precision.FP8, Precision.INT4)
        plain = replace(self, activations=False)
        return [replace(plain, precision=p) for p in order[order.index(self.precision) + 1 :]]

    @property
    def value_bytes(self) -> int:
        return _BF16_BYTES

    def cache_tokens(self, decoder: Decoder) -> int:
        """Places of a row's cache: the longest sequence and one chunk of padding."""
        return decoder.context_tokens + self.chunk

    def kv_tokens_min(self, decoder: Decoder) -> int:
        """One row's cache: it is linear, and allocated whole."""
        return self.cache_tokens(decoder)

    def matrix_bytes(self, shape: tuple[int, ...]) -> int:
        """Of a matrix of the layers, (outputs, inputs)."""
        outputs, inputs = shape
        sizes = (outputs, inputs)
        return form_bytes("q", sizes, self.precision, is_calibrated=self.activations)

    def weight_bytes(self, part: Part) -> int:
        """Of every constant of the rank's network."""
        tables = self.cache_tokens(part.decoder) * part.decoder.head_dim * _FLOAT_BYTES
        return tables + sum(
            self._tensor_bytes(name, shape)
            for name, shape in held_shapes(part).items()
            if name != ROPE_TENSOR
        )

    def resident_bytes(self, part: Part) -> int:
        """None where they may be streamed: the budget is given at load."""
        return 0 if self.weight_streaming else self.weight_bytes(part)

    def _tensor_bytes(self, name: str, shape: tuple[int, ...]) -> int:
        if ".experts." not in name and is_quantised(name):
            return self.matrix_bytes(shape)
        return _BF16_BYTES * math.prod(shape)

    def plan_bytes(self, part: Part, sharding: Sharding) -> int:
        """Of the plan's file.

        SmolLM2-135M in bf16 with four profiles: 269.7 MB of constants and
        1.5 + 4 x (0.62 + 30 x 0.345) = 45.4 MB; built, it has 315.1.
        """
        facts = part.decoder
        layer, normed = LAYER_BYTES[self.precision]
        layer += normed * facts.qk_norm + CALIBRATED_LAYER_BYTES * self.activations
        layer += TP_LAYER_BYTES * (sharding.tp > 1) + MIXTURE_LAYER_BYTES * (facts.experts > 0)
        profile = PROFILE_BYTES_FIXED + layer * facts.layers
        count = len(default_profiles(self.rows_max, self.chunk, cp=sharding.cp))
        return self.weight_bytes(part) + PLAN_BYTES_FIXED + count * profile

    def kv_bytes_per_token(self, part: Part) -> int:
        """In bf16 whatever the weights: the library's cache layer takes no FP8."""
        return 2 * part.decoder.layers * part.kv_heads * part.decoder.head_dim * _BF16_BYTES

    def activation_bytes(self, part: Part, sharding: Sharding) -> int:
        """The most that lives at once inside a step of any profile; contexts share the memory.

        With M tokens of a rank (rows x tokens / cp), D hidden, and of the rank N heads, K KV heads,
        H head_dim, F ffn, S places of its cache: a step keeps the larger of

            its products    workspace + 2 M (D + 3 F), or 2 M (2 D + (N + 2 K) H) + 4 M (N + K) H
            its attention   4 N H S a row + 2 M (D + (2 N + K) H), in chunks of a prompt only

        since TensorRT-RTX 1.7.1 copies a row's keys and values for every query head before it
        attends to more than one token. A mixture computes its E experts of width F densely:
        2 M E (2 D + F) beside the workspace.

        Against its build log, contexts of 1,024 to 16,896 places and the shapes of Qwen3-0.6B,
        Qwen3-8B and Qwen2.5-7B: -6 % to +4 %; SmolLM2-135M -18 % to +1 %; mixtures -15 % to +10 %.
        Weights and this together: within 1.1 % of dense plans.

        Qwen3-8B with 8,704 places: 16,384 x 8,704 + 512 x 26,624 = 156.2 MB; the log says 156.2.
        """
        profiles = default_profiles(self.rows_max, self.chunk, cp=sharding.cp)
        return max(self._step_bytes(part, sharding, profile) for profile in profiles)

    def _step_bytes(self, part: Part, sharding: Sharding, profile: Profile) -> int:
        facts, rows, tokens = part.decoder, profile.rows[2], profile.tokens[2]
        m, d, h = rows * tokens // sharding.cp, facts.hidden, facts.head_dim
        n, k = facts.heads, facts.kv_heads
        projected = m * (_BF16_BYTES * (2 * d + (n + 2 * k) * h) + _FLOAT_BYTES * (n + k) * h)
        if facts.experts:
            mixed = _BF16_BYTES * m * facts.experts * (2 * d + facts.expert_ffn)
        else:
            mixed = _BF16_BYTES * m * (d + 3 * facts.ffn)
        is_prompt = tokens > 1
        quantised = self.precision is not Precision.BF16 and not is_prompt
        workspace = QUANTISED_WORKSPACE_BYTES if quantised else WORKSPACE_BYTES
        attended = 0
        if is_prompt:
            own, whole = n // sharding.cp, rows * tokens
            expanded = rows * self.cache_tokens(facts) * own * h
            attended = 2 * _BF16_BYTES * expanded
            attended += _BF16_BYTES * whole * (d + (2 * own + k) * h)
        return max(workspace + max(projected, mixed), attended)
