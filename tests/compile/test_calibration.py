"""Calibration: what FP8 inputs are scaled by, from recorded texts, the same each time."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from headrace.compile.calibration import (
    OWN_TEXTS,
    TEXTS_MAX,
    ActivationScales,
    CalibrationSet,
    InputFacts,
    activation_scales,
    read_calibration_set,
)
from headrace.compile.families.decoder import DecoderModule
from headrace.compile.input_facts import measure_inputs
from headrace.compile.quantize import source_shapes
from headrace.compile.tensorrt.smoothing import Smoothed
from headrace.compile.tensorrt.weight_forms import int4_blocks
from headrace.compile.verify_texts import TEXTS
from headrace.serving.domain.artifact import Decoder
from headrace.serving.errors import ArtifactTampered, InvalidRequest

Floats = npt.NDArray[np.float32]

# Every input of a matrix is a multiple of 64, so that INT4 smooths all groups.
DECODER = Decoder(
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=32,
    ffn=192,
    vocab=50,
    rms_eps=1e-5,
    qkv_bias=True,
    qk_norm=True,
    tied=False,
    context_tokens=128,
)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6, 5], [40, 30, 20, 10]]


def tensors() -> dict[str, Floats]:
    """Random weights whose inputs differ in size, as a trained model's do."""
    draw = np.random.default_rng(5)
    found = {
        name: draw.normal(0, 0.2, shape).astype(np.float32)
        for name, shape in source_shapes(DECODER).items()
    }
    for name in found:
        if name.endswith("norm"):
            found[name] = draw.lognormal(0, 1.5, found[name].shape).astype(np.float32)
        if name.endswith(".v"):
            found[name] *= draw.lognormal(0, 1.5, (len(found[name]), 1)).astype(np.float32)
    return found


def logits(module: DecoderModule, prompt: list[int]) -> Floats:
    """Of every position, (tokens, vocab)."""
    tokens = len(prompt)
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    with torch.inference_mode():
        return module(
            torch.tensor([prompt]),
            torch.arange(tokens)[None],
            mask,
            torch.arange(tokens),
            lambda _, keys, values: (keys.transpose(1, 2), values.transpose(1, 2)),
        ).numpy()


@contextmanager
def seen_by(module: DecoderModule) -> Iterator[dict[str, list[torch.Tensor]]]:
    """The inputs of every matrix of the layers while the whole decoder runs."""
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, each in module.named_modules():
        if isinstance(each, nn.Linear) and name != "lm_head":
            kept = inputs[name] = []
            each.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0][0]))
    yield inputs


def test_layer_by_layer_sees_what_the_whole_decoder_sees() -> None:
    """A model larger than memory is calibrated as one that fits."""
    module = DecoderModule.from_tensors(DECODER, tensors())
    with seen_by(module) as inputs:
        for prompt in PROMPTS:
            logits(module, prompt)

    facts = measure_inputs(DECODER, tensors(), PROMPTS)

    assert facts.keys() == inputs.keys()
    for name, seen in inputs.items():
        rows = torch.cat(seen)
        assert facts[name].largest == pytest.approx(float(rows.abs().max()), rel=1e-5)
        squares = rows.square().mean(dim=0).numpy()
        np.testing.assert_allclose(facts[name].mean_square, squares, rtol=1e-4)


def test_the_same_texts_give_the_same_file() -> None:
    """The artifact's id says which texts; its content must follow from it."""
    texts = CalibrationSet(texts=("a", "b", "c"), digest="d" * 64)

    first, second = (
        activation_scales(measure_inputs(DECODER, tensors(), PROMPTS), texts, PROMPTS)
        for _ in range(2)
    )

    assert first.to_json() == second.to_json()
    assert ActivationScales.from_json(first.to_json(), where="here") == first
    assert (first.set_digest, first.texts, first.tokens) == ("d" * 64, 3, 16)


def test_scales_leave_room_above_the_largest_input_seen() -> None:
    """Another text exceeds it, and what is cut off ruins the answer."""
    texts = CalibrationSet(texts=("a",), digest="d" * 64)
    facts = {"q": InputFacts(22.4, np.ones(4, np.float32)), "k": InputFacts(0, np.ones(4))}

    scales = activation_scales(facts, texts, [[1]])

    assert scales.scale("q") == pytest.approx(2 * 22.4 / 448)
    assert scales.scale("k") > 0


def test_a_damaged_calibration_is_refused() -> None:
    for text in ("", "[]", '{"set_digest": "d"}', ActivationScales.__name__):
        with pytest.raises(ArtifactTampered, match="cannot be read"):
            ActivationScales.from_json(text, where="here")


def test_our_own_texts_are_many_and_are_not_those_of_verification() -> None:
    """Verification on the calibrated texts would praise itself."""
    own = read_calibration_set()

    assert len(own.texts) >= 64
    assert own.digest == hashlib.sha256(OWN_TEXTS.read_bytes()).hexdigest()
    assert not set(own.texts) & set(TEXTS)
    assert len(set(own.texts)) == len(own.texts)


LINE = json.dumps({"text": "Some words."})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        pytest.param(f"{LINE}\n" * 3, "It has 3 lines", id="too few say nothing of outliers"),
        pytest.param(f"{LINE}\n" * (TEXTS_MAX + 1), "It has 257 lines", id="too many"),
        pytest.param(f"{LINE}\n" * 20 + "nonsense\n", "Line 21 is not JSON", id="not JSON"),
        pytest.param(f"{LINE}\n" * 20 + '["a"]\n', "Line 21 is not an object", id="not an object"),
        pytest.param(f"{LINE}\n" * 20 + "\n", "Line 21 is not JSON", id="an empty line"),
        pytest.param(
            f'{LINE}\n{{"text": "a", "label": 1}}\n' * 10,
            "Line 2 is not an object",
            id="a field that would be ignored",
        ),
        pytest.param(f'{LINE}\n{{"text": " "}}\n' * 10, "Line 2 has no text", id="blank"),
        pytest.param(f'{LINE}\n{{"text": 5}}\n' * 10, "Line 2 has no text", id="a number"),
        pytest.param("[" * 100_000 + f"\n{LINE}" * 20, "Line 1 is not JSON", id="a deep line"),
        pytest.param(" " * (2**20 + 1), "It is larger than", id="too large"),
    ],
)
def test_a_set_that_is_not_one_is_refused_with_the_line(
    tmp_path: Path, content: str, why: str
) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(content, "utf-8")

    with pytest.raises(InvalidRequest) as caught:
        read_calibration_set(path)

    assert str(path) in caught.value.what
    assert why in caught.value.why
    assert "--calibration" in caught.value.fix


def test_a_set_that_is_missing_or_not_utf8_is_refused(tmp_path: Path) -> None:
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"text": "é"}\n'.encode("latin-1") * 20)

    for path in (latin, tmp_path / "absent.jsonl"):
        with pytest.raises(InvalidRequest, match="cannot be read"):
            read_calibration_set(path)


def test_a_smoothed_decoder_computes_the_same() -> None:
    """Smoothing moves factors between tensors; only the rounding that follows may see them."""
    given = tensors()
    smoothed = Smoothed(DECODER, given, measure_inputs(DECODER, given, PROMPTS))
    before = DecoderModule.from_tensors(DECODER, given)

    after = DecoderModule.from_tensors(DECODER, smoothed)

    for prompt in PROMPTS:
        expected = logits(before, prompt)
        error = np.abs(logits(after, prompt) - expected).max()
        assert error < 1e-4 * expected.std()
    for part in ("q", "o", "up", "down"):
        assert not np.allclose(smoothed[f"layers.1.{part}"], given[f"layers.1.{part}"]), part


def test_smoothing_makes_int4_products_closer() -> None:
    given = tensors()
    facts = measure_inputs(DECODER, given, PROMPTS)
    smoothed = Smoothed(DECODER, given, facts)

    def loss(matrix: Floats, importance: Floats) -> float:
        form = int4_blocks(matrix, block=64, importance=importance)
        return float((np.square(form.dequantised() - matrix) * importance).sum())

    for part in ("q", "k", "o", "gate"):
        name = f"layers.1.{part}"
        plain = loss(given[name], facts[name].mean_square)
        assert loss(smoothed[name], smoothed.importance(name)) < 0.9 * plain, name
