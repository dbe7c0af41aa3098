"""What each token id spells, in bytes, read once from a tokenizer.json.

Two spellings exist among the families we compile. Byte-level vocabularies (GPT-2, Qwen, SmolLM)
write each byte as one printable character. SentencePiece-style ones (Llama 2) write a space as
U+2581 and a byte that belongs to no token as `<0xNN>`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from headrace.serving.errors import ArtifactTampered, UnsupportedModel

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class TokenTable:
    text: Sequence[bytes]
    """By id: what the token adds to an answer's text; empty for control tokens."""
    special: Mapping[int, bytes]
    """Control tokens and how they are written."""
    strips_first_space: bool


def token_table(
    tokenizer: tokenizers.Tokenizer, tokenizer_json: str, vocab_size: int
) -> TokenTable:
    """Spell out every token.

    Raises:
        ArtifactTampered: the tokenizer has an id that the model's logits lack.
        UnsupportedModel: its decoder joins tokens by a rule we do not know.
    """
    decoders = _decoders(json.loads(tokenizer_json).get("decoder"))
    kinds = [decoder["type"] for decoder in decoders]
    if kinds == ["ByteLevel"]:
        spell = _spell_byte_level
        strips_first_space = False
    elif kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        spell = _spell_sentencepiece
        strips_first_space = any(map(_strips_first_space, decoders))
    else:
        raise UnsupportedModel(
            f"The tokenizer's decoder is {' + '.join(kinds) or 'absent'}.",
            why="Byte-level and SentencePiece-style vocabularies are known here.",
            fix="Choose a model of the Qwen or Llama family.",
        )
    text = [b""] * vocab_size
    special: dict[int, bytes] = {}
    added = tokenizer.get_added_tokens_decoder()
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        if token_id >= vocab_size:
            raise ArtifactTampered(
                f"The tokenizer has id {token_id}; the model has {vocab_size} tokens.",
                why="Tokenizer and weights of an artifact belong together.",
                fix="Build the artifact again with `headrace compile`.",
            )
        if token_id in added and added[token_id].special:
            special[token_id] = token.encode()
        else:
            text[token_id] = spell(token)
    return TokenTable(text, special, strips_first_space)


def _decoders(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [inner for part in decoder["decoders"] for inner in _decoders(part)]
    return [decoder]


def _strips_first_space(decoder: dict[str, Any]) -> bool:
    if decoder["type"] == "Strip":
        return decoder.get("content") == " " and decoder.get("start", 0) > 0
    return decoder["type"] == "Metaspace" and decoder.get("prepend_scheme") != "never"


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the rest for U+0100 and up, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(moved)
    }


_BYTE_OF_CHARACTER = _byte_of_character()


def _spell_byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        # An added token outside the byte alphabet stands for its own text.
        return token.encode()


def _spell_sentencepiece(token: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match.group(1), 16)])
    return token.replace("\u2581", " ").encode()
