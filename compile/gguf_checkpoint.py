"""Reads a GGUF file, llama.cpp's format: metadata, tokenizer and (quantised) tensors in one file.

Everything is restated in `transformers`' words, so that families know one vocabulary. Quantised
tensors are dequantised to the float32 values that llama.cpp itself computes with.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np

from headrace.compile.gguf_tokenizer import write_tokenizer
from headrace.compile.tensors import Array, Config, finite, unreadable
from headrace.serving.errors import UnsupportedModel

ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"

# What the reader's slicing and reshaping raise on a file that is cut short or changed.
_READER_ERRORS = (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError)


class GgufCheckpoint:
    """One GGUF file. Opening reads the metadata; tensors stay on disk until read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
            self._fields = {
                key: field.contents()
                for key, field in self._reader.fields.items()
                if not key.startswith("GGUF.")
            }
        except _READER_ERRORS as error:
            raise unreadable(path, f"It is not a whole GGUF file: {error}.") from error
        self._tensors = {self._name(tensor.name): tensor for tensor in self._reader.tensors}
        self._shapes = {
            # GGUF states the fastest dimension first.
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
            if name != _ROPE_FACTORS
        }
        self.config: Config = self._read_config()
        self.generation: Config = self._read_generation()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    @property
    def files(self) -> Sequence[Path]:
        licence = self.path.parent / "LICENSE"
        return [self.path, licence] if licence.is_file() else [self.path]

    def read(self, name: str) -> Array:
        tensor = self._tensors[name]
        try:
            wide = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            wide = wide.reshape(self._shapes[name])
        except NotImplementedError as error:
            raise UnsupportedModel(
                f"Tensor {name!r} in {self.path} has type {tensor.tensor_type.name}.",
                why="The gguf package cannot dequantise this type.",
                fix="Use a file of another quantisation, such as Q4_1, Q8_0 or F16.",
            ) from error
        except _READER_ERRORS as error:
            raise unreadable(self.path, f"The data of {name!r} is damaged: {error}.") from error
        if self._architecture == "llama":
            wide = self._unpermute(name, wide)
        return finite(wide, name=name, where=self.path)

    def write_tokenizer(self, folder: Path) -> None:
        write_tokenizer(
            self._fields, folder, where=self.path, context_tokens=self._int("context_length")
        )

    @property
    def _architecture(self) -> str:
        return str(self._fields.get("general.architecture"))

    def _name(self, name: str) -> str:
        """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`."""
        if name in _TOP:
            return _TOP[name]
        if (match := _LAYER.fullmatch(name)) and match[2] in _IN_LAYER:
            return f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"
        return name

    def _unpermute(self, name: str, wide: Array) -> Array:
        """Undo the converter's reordering of query and key rows, which is for `llama` only.

        llama.cpp rotates neighbouring rows (0, 1) where `transformers` rotates (0, H/2), so its
        converter interleaves the two halves of each head. Source: `LlamaModel.permute` in
        llama.cpp's convert_hf_to_gguf.py; `LlamaTensorProcessor` in transformers undoes it alike.
        """
        if ".q_proj." in name:
            heads = self._int("attention.head_count")
        elif ".k_proj." in name:
            heads = self._int("attention.head_count_kv")
        else:
            return wide
        pairs = wide.shape[0] // heads // 2
        split = wide.reshape(heads, pairs, 2, *wide.shape[1:])
        return np.ascontiguousarray(split.swapaxes(1, 2).reshape(wide.shape))

    def _read_config(self) -> Config:
        if "general.architecture" not in self._fields:
            raise unreadable(self.path, "It does not say which architecture it holds.")
        if self._architecture not in ARCHITECTURES:
            raise UnsupportedModel(
                f"The GGUF file {self.path} holds architecture {self._architecture!r}.",
                why=f"We compile {', '.join(ARCHITECTURES)}.",
                fix="Use a dense model of one of these architectures.",
            )
        if self._has("expert_count"):
            raise UnsupportedModel(
                f"The GGUF file {self.path} holds a mixture of experts.",
                why="Dense decoders only are compiled.",
                fix="Use a dense model of the family.",
            )
        heads, hidden = self._int("attention.head_count"), self._int("embedding_length")
        has_bias = "model.layers.0.self_attn.q_proj.bias" in self._tensors
        config: dict[str, object] = {
            "architectures": [ARCHITECTURES[self._architecture]],
            "model_type": self._architecture,
            "num_hidden_layers": self._int("block_count"),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": self._int("attention.head_count_kv"),
            "head_dim": self._int("attention.key_length", hidden // heads),
            "intermediate_size": self._int("feed_forward_length"),
            "vocab_size": self._vocab(),
            # GGUF stores a float32, so 1e-5 reads as 9.9999997e-06.
            "rms_norm_eps": float(f"{self._float('attention.layer_norm_rms_epsilon'):.6g}"),
            "max_position_embeddings": self._int("context_length"),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "hidden_act": "silu",
            "rope_parameters": self._rope(),
        }
        if self._architecture == "llama":
            config["attention_bias"] = has_bias
        return config

    def _rope(self) -> Config:
        rope: dict[str, object] = {
            "rope_type": "default",
            "rope_theta": self._float("rope.freq_base", 10_000.0),
        }
        kind = self._fields.get(f"{self._architecture}.rope.scaling.type", "none")
        if kind != "none":
            rope["rope_type"] = kind
            rope["factor"] = self._float("rope.scaling.factor")
            if self._has("rope.scaling.original_context_length"):
                original = self._int("rope.scaling.original_context_length")
                rope["original_max_position_embeddings"] = original
        if _ROPE_FACTORS in self._tensors:
            # Llama 3's scaling, computed by the converter: one divisor for each frequency.
            factors = np.asarray(self._tensors[_ROPE_FACTORS].data, dtype=np.float32)
            rope |= {"rope_type": "divisors", "divisors": [float(x) for x in factors]}
        return rope

    def _read_generation(self) -> Config:
        ids = {
            "bos_token_id": self._fields.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._fields.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._fields.get("tokenizer.ggml.padding_token_id"),
        }
        return {key: int(value) for key, value in ids.items() if value is not None}

    def _vocab(self) -> int:
        embed = self._tensors.get("model.embed_tokens.weight")
        if embed is None:
            raise unreadable(self.path, "It has no token_embd.weight.")
        return int(embed.shape[-1])

    def _has(self, key: str) -> bool:
        return bool(self._fields.get(f"{self._architecture}.{key}"))

    def _int(self, key: str, default: int | None = None) -> int:
        value = self._float(key, default)
        if value != int(value) or value <= 0:
            raise unreadable(self.path, f"{self._architecture}.{key} is {value!r}.")
        return int(value)

    def _float(self, key: str, default: float | None = None) -> float:
        value = self._fields.get(f"{self._architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise unreadable(
                self.path, f"{self._architecture}.{key} is {value!r}; one number is needed."
            )
        return float(value)
