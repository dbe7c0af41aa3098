"""What each precision costs trained weights: SmolLM2-135M computed in torch with rounded numbers.

The tolerances of `verify.py` rest on such runs of all layers over all texts, minutes of one core.
Here eight of its thirty layers read a few words, in seconds, and the bounds are those that a wrong
rounding, scale or smoothing breaks at once.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from headrace.compile.calibration import (
    ActivationScales,
    InputFacts,
    activation_scales,
    read_calibration_set,
)
from headrace.compile.checkpoint import open_checkpoint
from headrace.compile.families.base import Weights
from headrace.compile.families.decoder import DecoderModule
from headrace.compile.families.registry import describe
from headrace.compile.input_facts import measure_inputs
from headrace.compile.pipeline import locate
from headrace.compile.tensorrt.smoothing import Smoothed
from headrace.compile.tensorrt.weight_forms import (
    bf16,
    bf16_to_float,
    e4m3,
    fp8_scale,
    fp8_to_float,
    weight_form,
)
from headrace.compile.verify_texts import TEXTS
from headrace.serving.domain.artifact import Decoder, Precision
from headrace.serving.tokenizer import TOKENIZER_FILE, Tokenizer

pytestmark = pytest.mark.model

Floats = npt.NDArray[np.float32]
LAYERS = 8
SHARING = {"k": "q", "v": "q", "up": "gate"}
"""Matrices that have the input, and so in FP8 the scale, of another."""


class Model:
    """The demo model, its calibration and the float32 logits of a few texts."""

    def __init__(self, folder: Path) -> None:
        checkpoint = open_checkpoint(folder)
        model = describe(checkpoint)
        self.decoder: Decoder = replace(model.decoder, layers=LAYERS)
        every = Weights(checkpoint, model)
        self.tensors = {n: every[n] for n in every if not n.startswith("layers.") or _is_early(n)}
        tokenizer = Tokenizer(
            (folder / TOKENIZER_FILE).read_text("utf-8"), vocab_size=self.decoder.vocab
        )
        texts = read_calibration_set()
        prompts = [ids[:32] for ids in texts.prompts(tokenizer, context_tokens=512)[::6]]
        self.facts: Mapping[str, InputFacts] = measure_inputs(self.decoder, self.tensors, prompts)
        self.scales: ActivationScales = activation_scales(self.facts, texts, prompts)
        self.prompts = [tokenizer.encode(text)[:32] for text in TEXTS[::2]]
        self.exact = self.logits(DecoderModule.from_tensors(self.decoder, self.tensors))

    def logits(self, module: DecoderModule) -> Floats:
        """Of every position of every text, (positions, vocab)."""
        return np.concatenate([_logits(module, prompt) for prompt in self.prompts])

    def rounded(
        self, tensors: Mapping[str, Floats], form: Callable[[str, Floats], Floats]
    ) -> DecoderModule:
        """The decoder with each matrix as `form` gives it back."""
        module = DecoderModule.from_tensors(self.decoder, tensors)
        for name, each in _linears(module):
            each.weight.copy_(torch.from_numpy(form(name, each.weight.numpy())))
        return module

    def error(self, module: DecoderModule) -> tuple[float, float]:
        """The logit error, as `verify.py` has it, and the share of equal likeliest tokens."""
        found = self.logits(module)
        squares = np.square(found - self.exact).mean()
        agreeing = (found.argmax(axis=1) == self.exact.argmax(axis=1)).mean()
        return math.sqrt(squares / self.exact.var(axis=1).mean()), float(agreeing)


def _is_early(name: str) -> bool:
    return int(name.split(".")[1]) < LAYERS


def _logits(module: DecoderModule, prompt: list[int]) -> Floats:
    tokens = len(prompt)
    with torch.inference_mode():
        return module(
            torch.tensor([prompt]),
            torch.arange(tokens)[None],
            torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril(),
            torch.arange(tokens),
            lambda _, keys, values: (keys.transpose(1, 2), values.transpose(1, 2)),
        ).numpy()


def _linears(module: DecoderModule) -> Iterator[tuple[str, nn.Linear]]:
    for name, each in module.named_modules():
        if isinstance(each, nn.Linear):
            yield name, each


@contextmanager
def fp8_inputs(module: DecoderModule, scales: ActivationScales) -> Iterator[DecoderModule]:
    """Each matrix's input rounded to FP8 and back, as the Q/DQ pair of a network does."""

    def rounding(scale: float) -> Callable[[nn.Module, tuple[torch.Tensor]], tuple[torch.Tensor]]:
        def to_fp8(_: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            values = fp8_to_float(e4m3(np.ascontiguousarray(inputs[0].numpy() / scale)))
            return (torch.from_numpy(values * np.float32(scale)),)

        return to_fp8

    for name, each in _linears(module):
        each.register_forward_pre_hook(rounding(scales.scale(name)))
    yield module


@pytest.fixture(scope="module")
def model(artifact_of: Callable[[Precision], Path]) -> Iterator[Model]:
    home = artifact_of(Precision.INT8).parent.parent
    threads = torch.get_num_threads()
    # Workers share the cores; threads that wait for each other's turn cost more than they bring.
    torch.set_num_threads(1)
    yield Model(locate("smollm2-135m", home=home))
    torch.set_num_threads(threads)


def test_bf16_weights_hardly_differ(model: Model) -> None:
    error, agreeing = model.error(
        model.rounded(model.tensors, lambda _, matrix: bf16_to_float(bf16(matrix)))
    )

    assert error < 0.004
    assert agreeing > 0.97


def test_fp8_weights_and_inputs_stay_usable(model: Model) -> None:
    """Calibrated: weights share a scale where they share an input, inputs are rounded too."""

    def form(name: str, matrix: Floats) -> Floats:
        layer, _, part = name.rpartition(".")
        first = SHARING.get(part, part)
        group = [part for part in ("q", "k", "v", "gate", "up") if SHARING.get(part, part) == first]
        scale = fp8_scale(*(model.tensors[f"{layer}.{part}"] for part in group or [part]))
        return weight_form(name, matrix, Precision.FP8, scale=scale).dequantised()

    module = model.rounded(model.tensors, form)
    error, agreeing = model.error(module)
    with fp8_inputs(module, model.scales):
        error_with_inputs, agreeing_with_inputs = model.error(module)

    assert error < 0.07
    assert agreeing > 0.9
    assert error < error_with_inputs < 0.13
    assert agreeing_with_inputs > 0.85


def test_smoothing_and_importance_lower_what_int4_costs(model: Model) -> None:
    smoothed = Smoothed(model.decoder, model.tensors, model.facts)

    def form(name: str, matrix: Floats) -> Floats:
        importance = smoothed.importance(name)
        return weight_form(name, matrix, Precision.INT4, importance=importance).dequantised()

    def plain_form(name: str, matrix: Floats) -> Floats:
        return weight_form(name, matrix, Precision.INT4).dequantised()

    error, agreeing = model.error(model.rounded(smoothed, form))
    plain_error, _ = model.error(model.rounded(model.tensors, plain_form))

    assert error < 0.85 * plain_error
    assert agreeing > 0.75
