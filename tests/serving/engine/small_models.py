"""Small random models of each variant: `transformers` in fp32 beside our artifact of them."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from headrace.compile.quantize import WEIGHTS_FILE, dequantize_int4, quantize_decoder
from headrace.serving.domain.artifact import Decoder, Manifest, Precision, Verification

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 211,
    "max_position_embeddings": 1024,
    # Large enough that attention looks at something and logits differ.
    "initializer_range": 0.15,
    "rms_norm_eps": 1e-5,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=32, tie_word_embeddings=True))


def yarn() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(**SIZES, head_dim=32, tie_word_embeddings=True, rope_parameters=YARN)
    )


def odd_sizes() -> PreTrainedModel:
    """No width is a whole number of 32s; heads of 16 straddle blocks; one head for each KV head."""
    sizes = SIZES | {
        "hidden_size": 72,
        "intermediate_size": 100,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
    }
    config = LlamaConfig(**sizes, head_dim=16, tie_word_embeddings=False, attention_bias=True)
    return _with_biases(LlamaForCausalLM(config), scale=0.5)


def qwen2() -> PreTrainedModel:
    """Biases on q, k and v; those on k are large, as in Qwen2."""
    sizes = SIZES | {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1}
    model = _with_biases(Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=False)), 0.3)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if name.endswith("k_proj.bias"):
                values.mul_(10)
    return model


def qwen3() -> PreTrainedModel:
    """RMSNorm on each head of q and k; heads wider than hidden / heads."""
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=64, tie_word_embeddings=True))
    with torch.no_grad():
        for name, values in model.named_parameters():
            if name.endswith("norm.weight"):
                values.add_(torch.randn_like(values) * 0.3)
    return model


VARIANTS = {
    "llama": llama,
    "llama with yarn": yarn,
    "odd sizes, o bias, untied": odd_sizes,
    "qwen2 with large key biases": qwen2,
    "qwen3 with qk norms": qwen3,
}


def build(variant: str, folder: Path, precision: Precision) -> tuple[PreTrainedModel, Manifest]:
    """Quantise a random model into `folder`; the reference gets the same quantised weights, so
    that only activations and the KV cache differ."""
    torch.manual_seed(7)
    reference = VARIANTS[variant]().eval()
    decoder = facts(reference)
    quantize_decoder(decoder, tensors(reference), precision, folder / WEIGHTS_FILE)
    _take_weights(reference, folder / WEIGHTS_FILE)
    manifest = Manifest(
        artifact_id="0" * 64,
        model=variant,
        family="test",
        target="cpu",
        precision=precision,
        engine="native",
        decoder=decoder,
        eos_token_ids=(2,),
        bos_token_id=1,
        weight_bytes=1,
        verification=Verification(
            reference="",
            tokens=0,
            max_abs_error=0.0,
            top1_agreement=1.0,
            perplexity=1.0,
            perplexity_reference=1.0,
            tolerance="",
        ),
        source="random",
    )
    return reference, manifest


def facts(model: PreTrainedModel) -> Decoder:
    config = model.config
    names = {name for name, _ in model.named_parameters()}
    heads = config.num_attention_heads
    return Decoder(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        rms_eps=config.rms_norm_eps,
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in names,
        o_bias="model.layers.0.self_attn.o_proj.bias" in names,
        qk_norm="model.layers.0.self_attn.q_norm.weight" in names,
        tied=config.tie_word_embeddings,
        context_tokens=config.max_position_embeddings,
        rope_scale=float(model.model.rotary_emb.attention_scaling),
    )


def tensors(model: PreTrainedModel) -> dict[str, npt.NDArray[np.float32]]:
    """Canonical name to values."""
    found = {canonical(name): values.detach().numpy() for name, values in model.named_parameters()}
    if model.config.tie_word_embeddings:
        found.pop("lm_head", None)
    found["rope.inv_freq"] = model.model.rotary_emb.inv_freq.numpy()
    return found


def canonical(name: str) -> str:
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "mlp_norm",
        "embed_tokens": "embed",
        "norm": "final_norm",
    }
    kept = [part for part in name.split(".") if part not in ("model", "self_attn", "mlp", "weight")]
    is_bias = kept[-1] == "bias"
    kept = [parts.get(part, part.removesuffix("_proj")) for part in kept if part != "bias"]
    return ".".join(kept) + ("_bias" if is_bias else "")


def _take_weights(model: PreTrainedModel, path: Path) -> None:
    stored = load_file(path)
    with torch.no_grad():
        for full_name, values in model.named_parameters():
            name = canonical(full_name)
            if (codes := stored.get(f"{name}.weight")) is None:
                continue
            inputs = values.shape[1]
            scale = stored[f"{name}.scale"]
            if (low := stored.get(f"{name}.min")) is not None:
                dense = dequantize_int4(codes, scale, low, inputs)
            elif scale.ndim == 2:
                dense = codes * np.repeat(scale.astype(np.float32), 32, axis=1)[:, :inputs]
            else:
                dense = codes * scale[:, None]
            values.copy_(torch.from_numpy(dense.astype(np.float32)))


def _with_biases(model: PreTrainedModel, scale: float) -> PreTrainedModel:
    with torch.no_grad():
        for name, values in model.named_parameters():
            if name.endswith("bias"):
                values.copy_(torch.randn_like(values) * scale)
    return model
