"""Qwen-like dense decoders: Llama, Mistral without its window, Qwen2, Qwen2.5 and Qwen3.

They are one computation with four switches: biases on q, k, v (Qwen2), a bias on o (Llama's
attention_bias), a norm on each query and key head (Qwen3), and tied embeddings.
"""

from headrace.compile.families.base import Model, integer, number, unsupported
from headrace.compile.families.rope import ROPE_TENSOR, Rope, rope
from headrace.compile.quantize import source_shapes
from headrace.compile.tensors import Checkpoint, unreadable
from headrace.serving.domain.artifact import Decoder

ARCHITECTURES = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)

_TOP = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "o": "self_attn.o_proj.weight",
    "o_bias": "self_attn.o_proj.bias",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}


class QwenFamily:
    """Recognises the architectures above."""

    def describe(self, checkpoint: Checkpoint) -> Model | None:
        architectures = checkpoint.config.get("architectures")
        if not isinstance(architectures, list) or len(architectures) != 1:
            raise unreadable(checkpoint.path, f"config: architectures is {architectures!r}.")
        architecture = str(architectures[0])
        if architecture not in ARCHITECTURES:
            return None
        _refuse_features(checkpoint, architecture)
        turning = _rope(checkpoint)
        decoder = _decoder(checkpoint, architecture, turning)
        if decoder.layers > len(checkpoint.shapes):
            raise unreadable(
                checkpoint.path,
                f"config: {decoder.layers} layers, with {len(checkpoint.shapes)} tensors in all.",
            )
        names = {
            name: _checkpoint_name(name) for name in source_shapes(decoder) if name != ROPE_TENSOR
        }
        _check_tensors(checkpoint, decoder, names)
        return Model(family="qwen", decoder=decoder, inv_freq=turning.inv_freq, names=names)


def _refuse_features(checkpoint: Checkpoint, architecture: str) -> None:
    """Refuse whatever would change the computation and is not computed."""
    config = checkpoint.config
    window = config.get("sliding_window") is not None
    if window and (architecture == "MistralForCausalLM" or config.get("use_sliding_window")):
        raise unsupported(checkpoint, "sliding-window attention")
    layer_types = config.get("layer_types")
    kinds = set(layer_types) if isinstance(layer_types, list) else set()
    if others := kinds - {"full_attention"}:
        raise unsupported(checkpoint, f"layers of type {min(map(str, others))!r}")
    if config.get("quantization_config") is not None:
        raise unsupported(checkpoint, "weights that are quantised already")
    if config.get("mlp_bias"):
        raise unsupported(checkpoint, "a bias in the MLP")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise unsupported(checkpoint, f"the activation {activation!r}")


def _head_dim(checkpoint: Checkpoint) -> int:
    config = checkpoint.config
    heads = integer(config, "num_attention_heads", of=checkpoint)
    hidden = integer(config, "hidden_size", of=checkpoint)
    # Qwen3's own default; the others divide the hidden size.
    default = 128 if config.get("model_type") == "qwen3" else hidden // heads
    head_dim = integer(config, "head_dim", of=checkpoint, default=default)
    if head_dim % 2:
        raise unsupported(checkpoint, f"an odd head_dim, {head_dim}")
    return head_dim


def _rope(checkpoint: Checkpoint) -> Rope:
    tokens = integer(checkpoint.config, "max_position_embeddings", of=checkpoint)
    try:
        return rope(checkpoint.config, head_dim=_head_dim(checkpoint), context_tokens=tokens)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise unreadable(checkpoint.path, f"config: its RoPE is incomplete: {error}.") from error


def _decoder(checkpoint: Checkpoint, architecture: str, turning: Rope) -> Decoder:
    config = checkpoint.config
    heads = integer(config, "num_attention_heads", of=checkpoint)
    kv_heads = integer(config, "num_key_value_heads", of=checkpoint, default=heads)
    if heads % kv_heads:
        raise unreadable(checkpoint.path, f"config: {heads} heads share {kv_heads} KV heads.")
    biased = architecture in {"LlamaForCausalLM", "Qwen3ForCausalLM"} and bool(
        config.get("attention_bias")
    )
    return Decoder(
        layers=integer(config, "num_hidden_layers", of=checkpoint),
        hidden=integer(config, "hidden_size", of=checkpoint),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(checkpoint),
        ffn=integer(config, "intermediate_size", of=checkpoint),
        vocab=integer(config, "vocab_size", of=checkpoint),
        rms_eps=number(config, "rms_norm_eps", of=checkpoint, default=1e-6),
        qkv_bias=biased or architecture == "Qwen2ForCausalLM",
        o_bias=biased,
        qk_norm=architecture == "Qwen3ForCausalLM",
        tied=bool(config.get("tie_word_embeddings", False)),
        context_tokens=turning.context_tokens,
        rope_scale=turning.scale,
    )


def _checkpoint_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, index, part = name.split(".")
    return f"model.layers.{index}.{_IN_LAYER[part]}"


def _check_tensors(checkpoint: Checkpoint, decoder: Decoder, names: dict[str, str]) -> None:
    """Every tensor is there with the shape the config implies, and none is left over."""
    expected = source_shapes(decoder)
    for name, stored in names.items():
        if stored not in checkpoint.shapes:
            raise unreadable(checkpoint.path, f"Tensor {stored!r} is missing.")
        if (shape := checkpoint.shapes[stored]) != expected[name]:
            raise unreadable(
                checkpoint.path,
                f"Tensor {stored!r} has shape {shape}; the config implies {expected[name]}.",
            )
    known = {*names.values(), "lm_head.weight"}
    for stored in checkpoint.shapes:
        # Old checkpoints store the frequencies too, as a buffer that loaders ignore.
        if stored not in known and not stored.endswith("rotary_emb.inv_freq"):
            raise unsupported(checkpoint, f"the tensor {stored!r}")
