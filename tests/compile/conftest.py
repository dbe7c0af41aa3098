"""Small random checkpoints, made by `transformers` on the spot, one for each architecture variant.

Weights are drawn far wider than a fresh model's, so that attention is sharp and a wrong rotation,
bias or norm moves the logits by much more than rounding does.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Q8_0 = gguf.GGMLQuantizationType.Q8_0

SPECIALS = ("<|end|>", "<|start|>", "<think>", "</think>")
VOCAB = 256 + len(SPECIALS)

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "eos_token_id": 256,
    "bos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def _llama(**changes: object) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**_SIZES, **changes}))


def _with_rope(**rope: object) -> PreTrainedModel:
    return _llama(rope_parameters={"rope_theta": 10_000.0, **rope})


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "llama tied": lambda: _llama(tie_word_embeddings=True),
    "llama without GQA, wide heads": lambda: _llama(num_key_value_heads=4, head_dim=32),
    "llama with biases": lambda: _llama(attention_bias=True),
    "llama linear rope": lambda: _with_rope(rope_type="linear", factor=4.0),
    "llama llama3 rope": lambda: _with_rope(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "llama yarn": lambda: _with_rope(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=64
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**{**_SIZES, "sliding_window": None})),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**{**_SIZES, "head_dim": 32})),
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Answer the folder of a variant's checkpoint; made when first asked for."""

    @cache
    def make(variant: str) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint") / variant.replace(" ", "-").replace(",", "")
        save(random_model(variant), folder)
        return folder

    return make


@pytest.fixture(scope="session")
def save_model() -> Callable[..., None]:
    return save


@pytest.fixture(scope="session")
def make_model() -> Callable[[str], PreTrainedModel]:
    return random_model


def random_model(variant: str) -> PreTrainedModel:
    torch.manual_seed(7)
    model = MODELS[variant]().eval()
    for name, values in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(values, 1.0, 0.2)
        else:
            torch.nn.init.normal_(values, 0.0, 0.3)
    return model


def save(model: PreTrainedModel, folder: Path, **options: object) -> None:
    """Write the model with a byte-level tokenizer and a chat template."""
    transformers.logging.disable_progress_bar()
    model.generation_config.eos_token_id = 256
    model.save_pretrained(folder, **options)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: index for index, text in enumerate(alphabet)}
    vocab |= {text: 256 + index for index, text in enumerate(SPECIALS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS[:2]])
    tokenizer.add_tokens([AddedToken(text, special=False) for text in SPECIALS[2:]])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ '<|start|>' + m['content'] + '<|end|>' }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", "chat_template": template})
    )


@pytest.fixture(scope="session")
def save_gguf() -> Callable[..., None]:
    return write_gguf


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `LlamaModel.permute`, as its converter has it."""
    return (
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


def gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, index, rest = name.split(".", 3)
        part, kind = rest.rsplit(".", 1)
        return f"blk.{index}.{NAMES[part]}.{kind}"
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    part, kind = name.rsplit(".", 1)
    return f"{top[part]}.{kind}"


def write_gguf(model: PreTrainedModel, path: Path, arch: str, **tensors: np.ndarray) -> None:
    """Write the model as llama.cpp's converter would, matrices in Q8_0."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if arch != "qwen2" else config.hidden_size // 4)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*alphabet, "<|end|>", "th", "<think>", "</think>"])
    writer.add_token_merges(["t h"])
    writer.add_token_types([1] * 256 + [3, 1, 4, 4])
    writer.add_eos_token_id(256)
    for name, values in model.state_dict().items():
        array = values.float().numpy()
        if arch == "llama" and ".q_proj." in name:
            array = permute(array, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            array = permute(array, config.num_key_value_heads)
        if array.ndim == 2:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, Q8_0), raw_dtype=Q8_0)
        else:
            writer.add_tensor(gguf_name(name), array)
    for name, array in tensors.items():
        writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
