"""Qwen-like decoders: Llama, Mistral without its window, Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE.

They are one computation with five switches: biases on q, k, v (Qwen2), a bias on o (Llama's
attention_bias), a norm on each query and key head (Qwen3), tied embeddings, and a mixture of
experts in place of every layer's MLP (Qwen3-MoE).
"""

from collections.abc import Mapping
from dataclasses import replace

from headrace.compile.families.base import Model, integer, number, unsupported
from headrace.compile.families.rope import ROPE_TENSOR, Rope, rope
from headrace.compile.quantize import source_shapes
from headrace.compile.tensors import Checkpoint, Described, unreadable
from headrace.serving.domain.artifact import Decoder

_MIXTURE = "Qwen3MoeForCausalLM"
_QWEN3 = frozenset({"Qwen3ForCausalLM", _MIXTURE})

ARCHITECTURES = _QWEN3 | {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"}

_BLOCKS_MAX = 2**17
"""Layers times experts. A config that asks for more is damaged: Qwen3-235B-A22B has 12,032."""

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
    "router": "mlp.gate.weight",
}


class QwenFamily:
    """Recognises the architectures above."""

    def state(self, source: Described) -> Model | None:
        architectures = source.config.get("architectures")
        if not isinstance(architectures, list) or len(architectures) != 1:
            raise unreadable(source.path, f"config: architectures is {architectures!r}.")
        architecture = str(architectures[0])
        if architecture not in ARCHITECTURES:
            return None
        _refuse_features(source, architecture)
        turning = _rope(source)
        decoder = _decoder(source, architecture, turning)
        if decoder.layers * max(1, decoder.experts) > _BLOCKS_MAX:
            raise unreadable(
                source.path,
                f"config: {decoder.layers} layers with {decoder.experts} experts each.",
            )
        names = {
            name: _checkpoint_name(name) for name in source_shapes(decoder) if name != ROPE_TENSOR
        }
        return Model(family="qwen", decoder=decoder, inv_freq=turning.inv_freq, names=names)

    def check(self, checkpoint: Checkpoint, model: Model) -> None:
        _check_tensors(checkpoint, model.decoder, model.names)


def _refuse_features(source: Described, architecture: str) -> None:
    """Refuse whatever would change the computation and is not computed."""
    config = source.config
    window = config.get("sliding_window") is not None
    if window and (architecture == "MistralForCausalLM" or config.get("use_sliding_window")):
        raise unsupported(source, "sliding-window attention")
    layer_types = config.get("layer_types")
    kinds = set(layer_types) if isinstance(layer_types, list) else set()
    if others := kinds - {"full_attention"}:
        raise unsupported(source, f"layers of type {min(map(str, others))!r}")
    if config.get("quantization_config") is not None:
        raise unsupported(source, "weights that are quantised already")
    if config.get("mlp_bias"):
        raise unsupported(source, "a bias in the MLP")
    # In a Qwen3-MoE these name layers with a dense MLP.
    if config.get("mlp_only_layers"):
        raise unsupported(source, "layers without experts (mlp_only_layers)")
    if (step := config.get("decoder_sparse_step", 1)) != 1:
        raise unsupported(source, f"experts in some layers only (decoder_sparse_step {step!r})")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise unsupported(source, f"the activation {activation!r}")


def _head_dim(source: Described) -> int:
    config = source.config
    heads = integer(config, "num_attention_heads", of=source)
    hidden = integer(config, "hidden_size", of=source)
    # Qwen3's own default; the others divide the hidden size.
    is_qwen3 = config.get("model_type") in {"qwen3", "qwen3_moe"}
    default = 128 if is_qwen3 else hidden // heads
    head_dim = integer(config, "head_dim", of=source, default=default)
    if head_dim % 2:
        raise unsupported(source, f"an odd head_dim, {head_dim}")
    return head_dim


def _rope(source: Described) -> Rope:
    tokens = integer(source.config, "max_position_embeddings", of=source)
    try:
        return rope(source.config, head_dim=_head_dim(source), context_tokens=tokens)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise unreadable(source.path, f"config: its RoPE is incomplete: {error}.") from error


def _decoder(source: Described, architecture: str, turning: Rope) -> Decoder:
    config = source.config
    heads = integer(config, "num_attention_heads", of=source)
    kv_heads = integer(config, "num_key_value_heads", of=source, default=heads)
    if heads % kv_heads:
        raise unreadable(source.path, f"config: {heads} heads share {kv_heads} KV heads.")
    biased = architecture in _QWEN3 | {"LlamaForCausalLM"} and bool(config.get("attention_bias"))
    decoder = Decoder(
        layers=integer(config, "num_hidden_layers", of=source),
        hidden=integer(config, "hidden_size", of=source),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(source),
        ffn=integer(config, "intermediate_size", of=source),
        vocab=integer(config, "vocab_size", of=source),
        rms_eps=number(config, "rms_norm_eps", of=source, default=1e-6),
        qkv_bias=biased or architecture == "Qwen2ForCausalLM",
        o_bias=biased,
        qk_norm=architecture in _QWEN3,
        tied=bool(config.get("tie_word_embeddings", False)),
        context_tokens=turning.context_tokens,
        rope_scale=turning.scale,
    )
    return _with_experts(source, decoder) if architecture == _MIXTURE else decoder


def _with_experts(source: Described, decoder: Decoder) -> Decoder:
    config = source.config
    # transformers 5 writes the second of these, checkpoints so far have the first.
    key = "num_experts" if "num_experts" in config else "num_local_experts"
    experts = integer(config, key, of=source)
    chosen = integer(config, "num_experts_per_tok", of=source)
    if chosen > experts:
        raise unreadable(source.path, f"config: {chosen} of {experts} experts serve each token.")
    return replace(
        decoder,
        experts=experts,
        experts_per_token=chosen,
        expert_ffn=integer(config, "moe_intermediate_size", of=source),
        norm_topk=bool(config.get("norm_topk_prob", False)),
    )


def _checkpoint_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, index, *expert, part = name.split(".")
    if expert:
        return f"model.layers.{index}.mlp.{'.'.join(expert)}.{part}_proj.weight"
    return f"model.layers.{index}.{_IN_LAYER[part]}"


def _check_tensors(checkpoint: Checkpoint, decoder: Decoder, names: Mapping[str, str]) -> None:
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
