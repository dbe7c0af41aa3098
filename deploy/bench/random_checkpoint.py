"""What the engines of the check are built of: no network, and no weights but what is here."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from headrace.serving.domain.artifact import Decoder
from headrace.serving.testing.tiny_tokenizer import CHAT_TEMPLATE, END, tiny_tokenizer_json

SPREAD = 0.05
"""Of random weights: enough that attention looks at something and logits differ."""


def write_random(folder: Path, decoder: Decoder, *, rope_theta: float) -> Path:
    """Write a checkpoint of the decoder's shape with seeded random bf16 weights.

    Its config is Qwen3's where heads are normed, and Llama's otherwise. The tokenizer is a tiny
    one, whose ids are all in the vocabulary.
    """
    folder.mkdir(parents=True)
    torch.manual_seed(7)
    tensors = {
        name: _values(name, shape).to(torch.bfloat16) for name, shape in _shapes(decoder).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    kind = "qwen3" if decoder.qk_norm else "llama"
    config = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "dtype": "bfloat16",
        "attention_bias": decoder.qkv_bias,
        "head_dim": decoder.head_dim,
        "hidden_act": "silu",
        "hidden_size": decoder.hidden,
        "intermediate_size": decoder.ffn,
        "max_position_embeddings": decoder.context_tokens,
        "num_attention_heads": decoder.heads,
        "num_hidden_layers": decoder.layers,
        "num_key_value_heads": decoder.kv_heads,
        "rms_norm_eps": decoder.rms_eps,
        "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        "tie_word_embeddings": decoder.tied,
        "vocab_size": decoder.vocab,
    }
    written = {
        "config.json": json.dumps(config),
        "generation_config.json": json.dumps({"eos_token_id": 0}),
        "tokenizer.json": tiny_tokenizer_json(),
        "tokenizer_config.json": json.dumps({"eos_token": END, "chat_template": CHAT_TEMPLATE}),
    }
    for name, text in written.items():
        (folder / name).write_text(text + "\n", "utf-8")
    return folder


def prompts(vocab: int, *, rows: int, tokens: int) -> list[list[int]]:
    """Seeded token ids: `rows` prompts of up to `tokens`, each of another length."""
    chance = np.random.default_rng(11)
    return [chance.integers(0, vocab, tokens - 3 * row).tolist() for row in range(rows)]


def _shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    hidden, heads = decoder.hidden, decoder.heads * decoder.head_dim
    kv = decoder.kv_heads * decoder.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (decoder.vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not decoder.tied:
        shapes["lm_head.weight"] = (decoder.vocab, hidden)
    for layer in range(decoder.layers):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_proj.weight": (heads, hidden),
            f"{at}.self_attn.k_proj.weight": (kv, hidden),
            f"{at}.self_attn.v_proj.weight": (kv, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, heads),
            f"{at}.mlp.gate_proj.weight": (decoder.ffn, hidden),
            f"{at}.mlp.up_proj.weight": (decoder.ffn, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, decoder.ffn),
        }
        if decoder.qk_norm:
            shapes |= {
                f"{at}.self_attn.{letter}_norm.weight": (decoder.head_dim,) for letter in "qk"
            }
    return shapes


def _values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.ones(shape) if "norm" in name else torch.randn(shape) * SPREAD
