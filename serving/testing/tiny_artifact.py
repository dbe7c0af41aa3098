"""An artifact without weights: a signed manifest and the tiny tokenizer, in a folder."""

from hashlib import sha256
from pathlib import Path

import tokenizers

from headrace.serving.domain.artifact import (
    MANIFEST_FILE,
    Decoder,
    Manifest,
    Precision,
    Verification,
)
from headrace.serving.testing.signing import sign_artifact
from headrace.serving.testing.tiny_tokenizer import CHAT_TEMPLATE, END, tiny_tokenizer_json
from headrace.serving.tokenizer import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE

CONTEXT_TOKENS = 4096


def tiny_manifest(
    *,
    model: str = "tiny",
    version: str = "v1",
    reasoning_token_ids: tuple[int, int] | None = None,
    context_tokens: int = CONTEXT_TOKENS,
) -> Manifest:
    """A manifest that fits the tiny tokenizer; token 0 ends an answer."""
    vocab = tokenizers.Tokenizer.from_str(tiny_tokenizer_json()).get_vocab_size()
    return Manifest(
        artifact_id=version,
        model=model,
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
            context_tokens=context_tokens,
        ),
        eos_token_ids=(0,),
        bos_token_id=None,
        reasoning_token_ids=reasoning_token_ids,
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
        files={name: sha256(text.encode()).hexdigest() for name, text in _content().items()},
    )


def _content() -> dict[str, str]:
    """What the folder holds beside its manifest."""
    return {
        TOKENIZER_FILE: tiny_tokenizer_json(),
        CONFIG_FILE: f'{{"eos_token": "{END}"}}',
        TEMPLATE_FILE: CHAT_TEMPLATE,
    }


def write_tiny_artifact(folder: Path, manifest: Manifest) -> None:
    """Write what a frontend reads of an artifact, signed with the key of `signing.py`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in _content().items():
        (folder / name).write_text(text, "utf-8")
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), "utf-8")
    sign_artifact(folder)
