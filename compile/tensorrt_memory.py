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
from collections.abc import Sequence
from dataclasses import dataclass, replace

from headrace.compile.families.rope import ROPE_TENSOR
from headrace.compile.sharding import Part, held_shapes
from headrace.compile.tensorrt.profiles import CHUNK, ROWS_MAX, default_profiles
from headrace.compile.tensorrt.weight_forms import form_bytes, is_quantised
from headrace.serving.domain.artifact import Decoder, Precision, Sharding

PLAN_BYTES_FIXED = 1_500_000
PROFILE_BYTES_FIXED = 620_000
PROFILE_BYTES_PER_LAYER = 345_000
PROFILE_BYTES_PER_QK_NORM = 297_000
"""What a plan has beside its constants: kernels, for each layer of each profile. Fitted to plans of
TensorRT-RTX 1.7.1 of 4 to 30 layers with 1 to 4 profiles. TensorRT 11 has not been measured."""

_BF16_BYTES = 2
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class TensorRtFootprint:
    """A TensorRT engine of either library."""

    precision: Precision
    rows_max: int = ROWS_MAX
    chunk: int = CHUNK

    @property
    def narrower(self) -> Sequence["TensorRtFootprint"]:
        order = (Precision.BF16, Precision.FP8, Precision.INT4)
        return [replace(self, precision=p) for p in order[order.index(self.precision) + 1 :]]

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
        return form_bytes("q", (outputs, inputs), self.precision)

    def weight_bytes(self, part: Part) -> int:
        """Of every constant of the rank's network."""
        tables = self.cache_tokens(part.decoder) * part.decoder.head_dim * _FLOAT_BYTES
        return tables + sum(
            self._tensor_bytes(name, shape)
            for name, shape in held_shapes(part).items()
            if name != ROPE_TENSOR
        )

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
        layer = PROFILE_BYTES_PER_LAYER + PROFILE_BYTES_PER_QK_NORM * facts.qk_norm
        profile = PROFILE_BYTES_FIXED + layer * facts.layers
        count = len(default_profiles(self.rows_max, self.chunk, cp=sharding.cp))
        return self.weight_bytes(part) + PLAN_BYTES_FIXED + count * profile

    def kv_bytes_per_token(self, part: Part) -> int:
        """In bf16 whatever the weights: the library's cache layer takes no FP8."""
        return 2 * part.decoder.layers * part.kv_heads * part.decoder.head_dim * _BF16_BYTES

    def activation_bytes(self, part: Part, sharding: Sharding) -> int:
        """The most that lives at once inside a step of any profile; contexts share the memory.

        With M tokens of a rank (rows x tokens / cp), R rows, D hidden, and of the rank N heads, K
        KV heads, H head_dim, F ffn and V vocabulary: stream, norm and a layer's answer 3 M D,
        queries, keys, values and what was attended to M (2 N + 2 K) H, gate, up and their product
        3 M F, all bf16; queries and keys while they are turned M (N + K) H in float32; the logits
        R V in bf16 and, of all tp ranks together, in float32. Under cp the exchanged queries, keys
        and values are a second copy. Attention is fused and keeps no scores.

        A mixture computes its E experts of width F densely: 3 M E F bf16, and their answers M E D
        in bf16 and in float32.

        Qwen3-8B, M = 512, one rank: 512 x (12,288 + 10,240 + 36,864) x 2 + 512 x 5,120 x 4 is 71
        MB; decoding 32 rows, the logits are 29 MB.
        """
        profiles = default_profiles(self.rows_max, self.chunk, cp=sharding.cp)
        return max(
            _step_bytes(part, sharding, rows=each.rows[2], tokens=each.tokens[2])
            for each in profiles
        )


def _step_bytes(part: Part, sharding: Sharding, *, rows: int, tokens: int) -> int:
    facts, m = part.decoder, rows * tokens // sharding.cp
    n, k, h = facts.heads, facts.kv_heads, facts.head_dim
    narrow = m * (3 * facts.hidden + (2 * n + 2 * k) * h)
    wide = m * (n + k) * h
    if sharding.cp > 1:
        narrow += m * (n + 2 * k) * h
    if facts.experts:
        narrow += m * facts.experts * (3 * facts.expert_ffn + facts.hidden)
        wide += m * facts.experts * facts.hidden
    else:
        narrow += 3 * m * facts.ffn
    if part.is_last:
        narrow += rows * facts.vocab
        wide += rows * facts.vocab * sharding.tp
    return _BF16_BYTES * narrow + _FLOAT_BYTES * wide
