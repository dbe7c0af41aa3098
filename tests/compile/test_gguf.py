"""GGUF files state the same model in other words; ours read them as `transformers` states it."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedModel

from headrace.compile.checkpoint import open_checkpoint
from headrace.compile.families.registry import describe
from headrace.compile.gguf_tokenizer import write_tokenizer
from headrace.compile.pipeline import Order, compile_model
from headrace.compile.verify_texts import TEXTS
from headrace.serving.domain.artifact import Precision
from headrace.serving.errors import CheckpointUnreadable, UnsupportedModel

SPECIALS = ["<|end|>", "<|start|>"]


@pytest.fixture
def llama_file(
    make_model: Callable[[str], PreTrainedModel], save_gguf: Callable[..., None], tmp_path: Path
) -> Path:
    save_gguf(make_model("llama"), tmp_path / "small.gguf", "llama")
    return tmp_path / "small.gguf"


@pytest.mark.parametrize(
    ("variant", "arch"), [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
def test_tensors_read_as_the_model_had_them(
    variant: str,
    arch: str,
    make_model: Callable[[str], PreTrainedModel],
    save_gguf: Callable[..., None],
    tmp_path: Path,
) -> None:
    """Names, orientation, and the row order that llama.cpp changes for llama only."""
    model = make_model(variant)
    save_gguf(model, tmp_path / "m.gguf", arch)

    checkpoint = open_checkpoint(tmp_path / "m.gguf")

    for name, values in model.state_dict().items():
        read, expected = checkpoint.read(name), values.float().numpy()
        assert np.abs(read - expected).max() <= np.abs(expected).max() / 127, name
    decoder = describe(checkpoint).decoder
    assert (decoder.layers, decoder.heads, decoder.kv_heads, decoder.vocab) == (2, 4, 2, 260)
    assert decoder.qkv_bias == (arch == "qwen2")


def test_a_gguf_file_compiles_like_a_folder(llama_file: Path, tmp_path: Path) -> None:
    built = compile_model(
        Order(source=str(llama_file), precision=Precision.FP32), home=tmp_path / "home"
    )

    assert built.manifest.model == "small"
    assert built.manifest.eos_token_ids == (256,)
    assert built.manifest.reasoning_token_ids == (258, 259)
    assert built.manifest.verification.top1_agreement == 1.0


def test_rope_divisors_of_llama3_are_applied(
    make_model: Callable[[str], PreTrainedModel], save_gguf: Callable[..., None], tmp_path: Path
) -> None:
    divisors = np.array([1, 1, 1, 2, 4, 8, 8, 8], np.float32)
    save_gguf(make_model("llama"), tmp_path / "m.gguf", "llama", rope_freqs=divisors)
    save_gguf(make_model("llama"), tmp_path / "plain.gguf", "llama")

    scaled = describe(open_checkpoint(tmp_path / "m.gguf")).inv_freq
    plain = describe(open_checkpoint(tmp_path / "plain.gguf")).inv_freq

    np.testing.assert_allclose(scaled, plain / divisors, rtol=1e-6)


def read_all(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.shapes:
        checkpoint.read(name)


def test_a_file_cut_anywhere_is_refused(llama_file: Path, tmp_path: Path) -> None:
    """A download that stopped: at every length the refusal is ours, never a crash."""
    whole, cut = llama_file.read_bytes(), tmp_path / "cut.gguf"

    for length in [*range(0, 64, 5), *range(64, len(whole), len(whole) // 40)]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointUnreadable):
            read_all(cut)


@pytest.mark.parametrize("seed", range(40))
def test_a_changed_header_is_refused_or_read_but_never_crashes(
    seed: int, llama_file: Path, tmp_path: Path
) -> None:
    """Eight random bytes of the header differ: names, counts, types, offsets."""
    content = bytearray(llama_file.read_bytes())
    rng = np.random.default_rng(seed)
    for at in rng.integers(0, 3000, 8):
        content[at] = rng.integers(0, 256)
    (tmp_path / "changed.gguf").write_bytes(content)

    with contextlib.suppress(CheckpointUnreadable, UnsupportedModel):
        read_all(tmp_path / "changed.gguf")


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" + b"\0" * 200)

    with pytest.raises(CheckpointUnreadable, match="not a whole GGUF file"):
        open_checkpoint(tmp_path / "m.gguf")


def test_an_architecture_we_do_not_compile_is_refused(
    make_model: Callable[[str], PreTrainedModel], save_gguf: Callable[..., None], tmp_path: Path
) -> None:
    save_gguf(make_model("llama"), tmp_path / "m.gguf", "mamba")

    with pytest.raises(UnsupportedModel, match="'mamba'"):
        open_checkpoint(tmp_path / "m.gguf")


def fields(pre: str) -> dict[str, object]:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*alphabet, "12", "345", "Ġ1", *SPECIALS],
        "tokenizer.ggml.merges": ["1 2", "Ġ 1"],
        "tokenizer.ggml.token_type": [1] * 259 + [3, 3],
    }


def test_smollm_splits_numbers_into_digits(tmp_path: Path) -> None:
    """With the plain splitting "12" would be one token, which the model never saw."""
    write_tokenizer(fields("smollm"), tmp_path, where=tmp_path, context_tokens=64)
    digits = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    write_tokenizer(fields("gpt-2"), tmp_path, where=tmp_path, context_tokens=64)
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    assert digits.encode("a 12").tokens == ["a", "Ġ", "1", "2"]
    assert plain.encode("12").tokens == ["12"]
    assert digits.encode("x<|end|>").ids[-1] == 259


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_every_text_survives_the_round_trip(pre: str, tmp_path: Path) -> None:
    write_tokenizer(fields(pre), tmp_path, where=tmp_path, context_tokens=64)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        pytest.param({"tokenizer.ggml.pre": "unheard-of"}, UnsupportedModel, id="splitting"),
        pytest.param({"tokenizer.ggml.model": "llama"}, UnsupportedModel, id="sentencepiece"),
        pytest.param({"tokenizer.ggml.tokens": None}, CheckpointUnreadable, id="no vocabulary"),
        pytest.param({"tokenizer.ggml.merges": ["zz"]}, CheckpointUnreadable, id="half a merge"),
        pytest.param({"tokenizer.ggml.merges": ["1 zz"]}, CheckpointUnreadable, id="no token"),
        pytest.param({"tokenizer.ggml.token_type": [1]}, CheckpointUnreadable, id="no types"),
    ],
)
def test_a_tokenizer_we_cannot_restate_is_refused(
    change: dict[str, object], refusal: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(refusal):
        write_tokenizer({**fields("smollm"), **change}, tmp_path, where=tmp_path, context_tokens=64)
