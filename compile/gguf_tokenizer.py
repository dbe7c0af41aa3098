"""Restates a GGUF file's tokenizer as tokenizer.json, token for token.

GGUF holds vocabulary and merges but names its pre-tokenizer only ("smollm", "qwen2"), so those we
know are spelled out here. One that is unknown is refused: text split elsewhere gives other tokens,
and nothing would say so.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from headrace.compile.tensors import unreadable
from headrace.serving.errors import UnsupportedModel

# Token types of GGUF (llama.h, llama_token_type).
_CONTROL, _USER_DEFINED = 3, 4

# The regular expressions of the models' own tokenizer.json files.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}| ", r"|\p{N}{1,3}| ")


def _byte_level(*before: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """Split by GPT-2's own expression, after `before`."""
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([*before, last]) if before else last


def _split(expression: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_PRE_TOKENIZERS: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    # Without the digits, numbers become tokens the model has rarely seen.
    "smollm": lambda: _byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "gpt-2": _byte_level,
    "qwen2": lambda: _split(_QWEN2),
    "llama-bpe": lambda: _split(_LLAMA3),
}


def write_tokenizer(
    fields: Mapping[str, object], folder: Path, *, where: Path, context_tokens: int
) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`.

    Args:
        fields: the metadata of the GGUF file.
        folder: exists; files of these names are replaced.
        where: the GGUF file, for messages.
        context_tokens: written as the longest input.

    Raises:
        UnsupportedModel: the tokenizer is of a kind we do not know.
        CheckpointUnreadable: the vocabulary and its merges do not belong together.
    """
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"The GGUF file {where} has a tokenizer of kind {kind!r} with splitting {pre!r}.",
            why=f"We know byte-level BPE with {', '.join(_PRE_TOKENIZERS)}.",
            fix="Compile the model's safetensors folder: it carries its tokenizer.json.",
        )
    try:
        tokens = [str(token) for token in _list(fields, "tokens")]
        merges = [_pair(str(merge)) for merge in _list(fields, "merges")]
        types = _list(fields, "token_type")
        vocab = {token: index for index, token in enumerate(tokens)}
        if len(vocab) != len(tokens) or len(types) != len(tokens):
            raise ValueError("the vocabulary repeats a token or lacks a type")
    except ValueError as error:
        raise unreadable(where, f"Its tokenizer is damaged: {error}.") from error
    try:
        built = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # What tokenizers raises is an Exception and nothing narrower.
        raise unreadable(where, f"Its tokenizer is damaged: {error}.") from error
    if pre == "qwen2":
        built.normalizer = normalizers.NFC()
    built.pre_tokenizer = _PRE_TOKENIZERS[str(pre)]()
    built.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, types, strict=True))
    built.add_special_tokens([_added(token) for token, kind in kinds if kind == _CONTROL])
    built.add_tokens(
        [_added(token, special=False) for token, kind in kinds if kind == _USER_DEFINED]
    )
    built.save(str(folder / "tokenizer.json"))
    config = _config(fields, tokens, context_tokens)
    text = json.dumps(config, ensure_ascii=False, indent=1, sort_keys=True)
    (folder / "tokenizer_config.json").write_text(text + "\n", "utf-8")


def _list(fields: Mapping[str, object], key: str) -> list[object]:
    value = fields.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list):
        raise ValueError(f"it has no {key}")
    return value


def _pair(merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not space:
        raise ValueError(f"the merge {merge!r} has one part")
    return left, right


def _added(token: str, *, special: bool = True) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _config(
    fields: Mapping[str, object], tokens: list[str], context_tokens: int
) -> dict[str, object]:
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "model_max_length": context_tokens,
        "chat_template": fields.get("tokenizer.chat_template"),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            config[f"{name}_token"] = tokens[index]
    return config
