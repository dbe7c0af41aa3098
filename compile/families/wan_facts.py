"""Wan 2.1 and 2.2 as facts: what each component's tensors are, from diffusers' configs alone.

A Wan is a text encoder (the encoder half of umT5-XXL), one DiT or two (Wan2.2-A14B has one expert
for noisy latents and one for the rest), and a VAE. Names and shapes are those of diffusers'
`WanTransformer3DModel` and `AutoencoderKLWan` (0.35) and of `transformers`' `UMT5EncoderModel`.
They say what a Wan occupies; nothing here computes one.

Under tensor parallelism heads and ffn of DiT and text encoder are split; the VAE is whole on each
rank. Context parallel ranks hold everything.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

from headrace.compile.tensors import Config, Described, unreadable
from headrace.serving.domain.artifact import Sharding
from headrace.serving.errors import InvalidRequest, UnsupportedModel

Shapes = dict[str, tuple[int, ...]]

_LAYERS_MAX = 1_024
"""A config that asks for more is damaged: the largest Wan has 40."""

_EMBEDDINGS = ("shared.weight", "relative_attention_bias.weight")
_KEPT_WIDE = ("time_embedder", "scale_shift_table", ".norm2.", "vae.")
"""Held in float32 whatever the precision: what diffusers' `_keep_in_fp32_modules` names, and the
VAE, which its documentation loads so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dit:
    """One `WanTransformer3DModel`."""

    layers: int
    heads: int
    head_dim: int
    ffn: int
    freq_dim: int
    text_dim: int
    in_channels: int
    out_channels: int
    patch: tuple[int, int, int]
    """Frames, rows and columns of latent that become one token."""

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoder:
    """One `UMT5EncoderModel`."""

    layers: int
    dim: int
    heads: int
    head_dim: int
    ffn: int
    vocab: int
    buckets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Vae:
    """One `AutoencoderKLWan`."""

    base: int
    decoder_base: int
    z: int
    multipliers: tuple[int, ...]
    res_blocks: int
    halves_time: tuple[bool, ...]
    is_residual: bool
    """The Wan 2.2 VAE, whose shortcuts hold no weights."""
    in_channels: int
    out_channels: int
    spatial_stride: int
    temporal_stride: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """The video that the authors' own examples make."""

    width: int
    height: int
    frames: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wan:
    """A whole pipeline."""

    experts: tuple[Dit, ...]
    text: TextEncoder
    vae: Vae
    clip: Clip

    @property
    def tokens(self) -> int:
        """Of the clip, as the DiT sees it. 81 frames of 1280 x 720: 21 x 45 x 80 = 75,600."""
        patch_t, patch_h, patch_w = self.experts[0].patch
        frames = (self.clip.frames - 1) // self.vae.temporal_stride + 1
        rows = self.clip.height // self.vae.spatial_stride // patch_h
        return frames // patch_t * rows * (self.clip.width // self.vae.spatial_stride // patch_w)


def is_wan(config: Config) -> bool:
    return config.get("_class_name") == "WanPipeline"


def read_wan(source: Described) -> Wan:
    """State the facts of a Wan pipeline: its components' configs under diffusers' names.

    Raises:
        CheckpointUnreadable: a component or one of its facts is missing.
        UnsupportedModel: it has a second cross-attention, for images (Wan2.1-I2V).
    """
    read = _Reader(source)
    experts = [read.dit(name) for name in ("transformer", "transformer_2") if name in source.config]
    if not experts:
        raise unreadable(source.path, "config: there is no transformer.")
    text = read.section("text_encoder")
    return Wan(
        experts=tuple(experts),
        text=TextEncoder(
            layers=read.count(text, "num_layers", most=_LAYERS_MAX),
            dim=read.count(text, "d_model"),
            heads=read.count(text, "num_heads"),
            head_dim=read.count(text, "d_kv"),
            ffn=read.count(text, "d_ff"),
            vocab=read.count(text, "vocab_size"),
            buckets=read.count(text, "relative_attention_num_buckets"),
        ),
        vae=read.vae(),
        clip=read.clip(),
    )


def require_split(wan: Wan, sharding: Sharding) -> None:
    """Refuse a split that a Wan does not have.

    Raises:
        InvalidRequest: pipeline stages, or heads or ffn that do not divide.
    """
    tp, cp, heads = sharding.tp, sharding.cp, wan.experts[0].heads
    widths = (heads, wan.experts[0].ffn, wan.text.heads, wan.text.ffn)
    if min(tp, cp) < 1 or sharding.pp != 1 or any(w % tp for w in widths) or heads // tp % cp:
        raise InvalidRequest(
            f"This Wan cannot be split by tp {tp}, pp {sharding.pp}, cp {cp}.",
            why=f"Its DiT has {heads} heads and an ffn of {widths[1]}, the text encoder "
            f"{widths[2]} and {widths[3]}; tp divides all four, cp what tp leaves of the DiT's "
            "heads, and a DiT is not cut into stages.",
            fix="Leave --pp out; choose a --tp and a --cp that divide these.",
            field="cp" if sharding.pp == 1 else "pp",
        )


def component_shapes(wan: Wan, tp: int = 1) -> Mapping[str, Shapes]:
    """Each component's tensors, name to shape, as one of `tp` ranks holds them."""
    named = zip(("transformer", "transformer_2"), wan.experts, strict=False)
    return {
        "text_encoder": text_shapes(wan.text, tp),
        **{name: dit_shapes(dit, tp) for name, dit in named},
        "vae": vae_shapes(wan.vae),
    }


def is_kept_wide(component: str, name: str) -> bool:
    """Whether a tensor is float32 in every precision."""
    return any(mark in f"{component}.{name}" for mark in _KEPT_WIDE)


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix of a repeated block, which fp8, int8 and int4 change."""
    return len(shape) == 2 and "block" in name and not name.endswith(_EMBEDDINGS)


def dit_shapes(dit: Dit, tp: int = 1) -> Shapes:
    d, own, ffn = dit.dim, dit.dim // tp, dit.ffn // tp
    shapes: Shapes = {
        "patch_embedding.weight": (d, dit.in_channels, *dit.patch),
        "patch_embedding.bias": (d,),
        "scale_shift_table": (1, 2, d),
        **_linear("condition_embedder.time_embedder.linear_1", d, dit.freq_dim),
        **_linear("condition_embedder.time_embedder.linear_2", d, d),
        **_linear("condition_embedder.time_proj", 6 * d, d),
        **_linear("condition_embedder.text_embedder.linear_1", d, dit.text_dim),
        **_linear("condition_embedder.text_embedder.linear_2", d, d),
        **_linear("proj_out", dit.out_channels * math.prod(dit.patch), d),
    }
    for i in range(dit.layers):
        block = f"blocks.{i}"
        shapes |= {
            f"{block}.scale_shift_table": (1, 6, d),
            f"{block}.norm2.weight": (d,),
            f"{block}.norm2.bias": (d,),
            **_linear(f"{block}.ffn.net.0.proj", ffn, d),
            **_linear(f"{block}.ffn.net.2", d, ffn),
        }
        for attention in ("attn1", "attn2"):
            for matrix in ("to_q", "to_k", "to_v"):
                shapes |= _linear(f"{block}.{attention}.{matrix}", own, d)
            shapes |= _linear(f"{block}.{attention}.to_out.0", d, own)
            for norm in ("norm_q", "norm_k"):
                shapes[f"{block}.{attention}.{norm}.weight"] = (own,)
    return shapes


def text_shapes(text: TextEncoder, tp: int = 1) -> Shapes:
    d, own, ffn = text.dim, text.heads * text.head_dim // tp, text.ffn // tp
    shapes: Shapes = {
        "shared.weight": (text.vocab, d),
        "encoder.final_layer_norm.weight": (d,),
    }
    for i in range(text.layers):
        attention, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        bias = f"{attention}.SelfAttention.relative_attention_bias.weight"
        shapes |= {
            **{f"{attention}.SelfAttention.{m}.weight": (own, d) for m in ("q", "k", "v")},
            f"{attention}.SelfAttention.o.weight": (d, own),
            bias: (text.buckets, text.heads // tp),
            f"{attention}.layer_norm.weight": (d,),
            f"{mlp}.DenseReluDense.wi_0.weight": (ffn, d),
            f"{mlp}.DenseReluDense.wi_1.weight": (ffn, d),
            f"{mlp}.DenseReluDense.wo.weight": (d, ffn),
            f"{mlp}.layer_norm.weight": (d,),
        }
    return shapes


def vae_shapes(vae: Vae) -> Shapes:
    """Encoder and decoder. Wan 2.1's resampling up halves the channels, Wan 2.2's keeps them."""
    stages = len(vae.multipliers)
    widths = [vae.base * m for m in (1, *vae.multipliers)]
    shapes = _conv("encoder.conv_in", widths[0], vae.in_channels, 3, 3, 3)
    for i, (wide_in, wide) in enumerate(pairwise(widths)):
        for j in range(vae.res_blocks):
            shapes |= _residual(f"encoder.down_blocks.{i}.{j}", wide_in if j == 0 else wide, wide)
        if i != stages - 1:
            shapes |= _conv(f"encoder.down_blocks.{i}.resample", wide, wide, 3, 3)
            if vae.halves_time[i]:
                shapes |= _conv(f"encoder.down_blocks.{i}.time_conv", wide, wide, 3, 1, 1)
    shapes |= _middle("encoder", widths[-1]) | _head("encoder", widths[-1], 2 * vae.z)
    shapes |= _conv("quant_conv", 2 * vae.z, 2 * vae.z, 1, 1, 1)
    shapes |= _conv("post_quant_conv", vae.z, vae.z, 1, 1, 1)
    reversed_ = vae.multipliers[::-1]
    widths = [vae.decoder_base * m for m in (reversed_[0], *reversed_)]
    shapes |= _conv("decoder.conv_in", widths[0], vae.z, 3, 3, 3) | _middle("decoder", widths[0])
    for i, (before, wide) in enumerate(pairwise(widths)):
        wide_in = before // 2 if i and not vae.is_residual else before
        for j in range(vae.res_blocks + 1):
            shapes |= _residual(f"decoder.up_blocks.{i}.{j}", wide_in if j == 0 else wide, wide)
        if i != stages - 1:
            out = wide if vae.is_residual else wide // 2
            shapes |= _conv(f"decoder.up_blocks.{i}.resample", out, wide, 3, 3)
            if vae.halves_time[::-1][i]:
                shapes |= _conv(f"decoder.up_blocks.{i}.time_conv", 2 * wide, wide, 3, 1, 1)
    return shapes | _head("decoder", widths[-1], vae.out_channels)


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _conv(name: str, outputs: int, inputs: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, *kernel), f"{name}.bias": (outputs,)}


def _residual(name: str, before: int, wide: int) -> Shapes:
    shapes: Shapes = {f"{name}.norm1.gamma": (before,), f"{name}.norm2.gamma": (wide,)}
    shapes |= _conv(f"{name}.conv1", wide, before, 3, 3, 3)
    shapes |= _conv(f"{name}.conv2", wide, wide, 3, 3, 3)
    return shapes if before == wide else shapes | _conv(f"{name}.shortcut", wide, before, 1, 1, 1)


def _middle(half: str, wide: int) -> Shapes:
    name = f"{half}.mid_block"
    return {
        **_residual(f"{name}.resnets.0", wide, wide),
        **_residual(f"{name}.resnets.1", wide, wide),
        f"{name}.attentions.0.norm.gamma": (wide,),
        **_conv(f"{name}.attentions.0.to_qkv", 3 * wide, wide, 1, 1),
        **_conv(f"{name}.attentions.0.proj", wide, wide, 1, 1),
    }


def _head(half: str, wide: int, outputs: int) -> Shapes:
    return {f"{half}.norm_out.gamma": (wide,), **_conv(f"{half}.conv_out", outputs, wide, 3, 3, 3)}


class _Reader:
    """Reads facts out of the components' configs; what is missing is refused by its name."""

    def __init__(self, source: Described) -> None:
        self._source = source

    def section(self, name: str) -> Config:
        found = self._source.config.get(name)
        if not isinstance(found, dict):
            raise unreadable(self._source.path, f"config: {name} is {found!r}.")
        return cast("Config", found)

    def count(
        self, config: Config, key: str, default: int | None = None, *, most: int = 2**24
    ) -> int:
        value = config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise unreadable(self._source.path, f"config: {key} is {value!r}.")
        return value

    def counts(self, config: Config, key: str, *, length: int | None = None) -> tuple[int, ...]:
        values = config.get(key)
        if not isinstance(values, list) or not 0 < len(values) <= 8:
            raise unreadable(self._source.path, f"config: {key} is {values!r}.")
        if length is not None and len(values) != length:
            raise unreadable(self._source.path, f"config: {key} has {len(values)} entries.")
        return tuple(self.count({key: value}, key) for value in values)

    def dit(self, name: str) -> Dit:
        config = self.section(name)
        if config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
            raise UnsupportedModel(
                f"The model {self._source.path} attends to images (image_dim, added_kv_proj_dim).",
                why="Only Wan's text-to-video models and TI2V-5B are described here.",
                fix="Use one of these.",
            )
        patch_t, patch_h, patch_w = self.counts(config, "patch_size", length=3)
        return Dit(
            layers=self.count(config, "num_layers", most=_LAYERS_MAX),
            heads=self.count(config, "num_attention_heads"),
            head_dim=self.count(config, "attention_head_dim"),
            ffn=self.count(config, "ffn_dim"),
            freq_dim=self.count(config, "freq_dim"),
            text_dim=self.count(config, "text_dim"),
            in_channels=self.count(config, "in_channels"),
            out_channels=self.count(config, "out_channels"),
            patch=(patch_t, patch_h, patch_w),
        )

    def vae(self) -> Vae:
        config = self.section("vae")
        if config.get("attn_scales"):
            raise unreadable(self._source.path, "config: a Wan VAE has no attn_scales.")
        multipliers = self.counts(config, "dim_mult")
        halves = config.get("temperal_downsample")
        if not isinstance(halves, list) or len(halves) != len(multipliers) - 1:
            raise unreadable(self._source.path, f"config: temperal_downsample is {halves!r}.")
        base = self.count(config, "base_dim")
        return Vae(
            base=base,
            decoder_base=self.count(config, "decoder_base_dim", base),
            z=self.count(config, "z_dim"),
            multipliers=multipliers,
            res_blocks=self.count(config, "num_res_blocks", most=_LAYERS_MAX),
            halves_time=tuple(bool(each) for each in halves),
            is_residual=bool(config.get("is_residual", False)),
            in_channels=self.count(config, "in_channels", 3),
            out_channels=self.count(config, "out_channels", 3),
            spatial_stride=self.count(config, "scale_factor_spatial", 8),
            temporal_stride=self.count(config, "scale_factor_temporal", 4),
        )

    def clip(self) -> Clip:
        config = self.section("_clip")
        return Clip(
            width=self.count(config, "width"),
            height=self.count(config, "height"),
            frames=self.count(config, "frames"),
        )
