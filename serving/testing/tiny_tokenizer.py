"""A small byte-level BPE tokenizer built in code: the same kind as a real one, in no file.

It has all 256 bytes as tokens, a few merges, and cuts "é", "€" and every emoji over several
tokens, so that text and tokens fall apart as they do in production.
"""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from headrace.serving.clock import Clock
from headrace.serving.domain.artifact import Decoder, Manifest, Precision, Verification
from headrace.serving.tokenizer import Tokenizer

END = "<|im_end|>"
START = "<|im_start|>"
BEGIN = "<|begin|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_WORDS = ("the", "he", "in", "er", "an", "user", "assistant", "system", "hello", "world", "true")


def tiny_tokenizer_json() -> str:
    """The text of its tokenizer.json: control tokens 0 to 2, bytes from 3, then words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((END, START, BEGIN, *alphabet))}
    merges: list[tuple[str, str]] = []
    space = "\u0120"  # How a byte-level vocabulary writes a space.
    for word in (*_WORDS, *(space + word for word in _WORDS)):
        joined = word[0]
        for character in word[1:]:
            pair, joined = (joined, character), joined + character
            if joined not in vocab:
                vocab[joined] = len(vocab)
                merges.append(pair)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, START, BEGIN])
    return tokenizer.to_str()


def tiny_tokenizer(*, clock: Clock | None = None, chat_template: str = CHAT_TEMPLATE) -> Tokenizer:
    """The tokenizer with a ChatML template, a context of 4,096 tokens and END as its end."""
    json_text = tiny_tokenizer_json()
    return Tokenizer(
        json_text,
        vocab_size=tokenizers.Tokenizer.from_str(json_text).get_vocab_size(),
        context_tokens=4096,
        chat_template=chat_template,
        template_names={"eos_token": END},
        clock=clock,
    )


def tiny_manifest(vocab: int) -> Manifest:
    """The manifest of a model that such a tokenizer would belong to; END ends its answers."""
    return Manifest(
        artifact_id="0" * 64,
        model="tiny",
        family="qwen",
        target="cpu",
        precision=Precision.FP32,
        engine="scripted",
        decoder=Decoder(
            layers=1,
            hidden=8,
            heads=1,
            kv_heads=1,
            head_dim=8,
            ffn=8,
            vocab=vocab,
            rms_eps=1e-5,
            qkv_bias=False,
            qk_norm=False,
            tied=True,
            context_tokens=4096,
        ),
        eos_token_ids=(0,),
        bos_token_id=None,
        weight_bytes=0,
        verification=Verification(
            reference="none",
            tokens=0,
            max_abs_error=0.0,
            top1_agreement=1.0,
            perplexity=1.0,
            perplexity_reference=1.0,
            tolerance="none",
        ),
        source="code",
    )
