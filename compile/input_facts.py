"""What goes into each matrix of a decoder, measured on texts.

The decoder is computed in float32 one layer at a time over all texts, so that a model of any size
needs the memory of one layer, of the embedding and of the texts' hidden states, at most
`TEXTS_MAX` x `TEXT_TOKENS_MAX` x hidden x 4 bytes: 0.67 GB for a hidden size of 5,120.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import nn

from headrace.compile.calibration import InputFacts
from headrace.compile.families.decoder import DecoderModule, Tensors
from headrace.compile.families.rope import ROPE_TENSOR
from headrace.serving.domain.artifact import Decoder


def measure_inputs(
    decoder: Decoder, tensors: Tensors, prompts: Sequence[Sequence[int]]
) -> dict[str, InputFacts]:
    """Compute the decoder's layers in float32 and look at what each matrix is multiplied with.

    Args:
        decoder: the model's facts.
        tensors: its canonical tensors, each read when its layer's turn has come.
        prompts: token ids of each text.

    Returns:
        Canonical name of each matrix in a layer to what was seen, in the order of computation.
    """
    table = tensors["embed"]
    hidden = [torch.from_numpy(table[list(prompt)])[None] for prompt in prompts]
    del table
    found: dict[str, InputFacts] = {}
    for index in range(decoder.layers):
        module = _one_layer(decoder, tensors, index)
        with torch.inference_mode(), _watched(module, f"layers.{index}.", found):
            for place, states in enumerate(hidden):
                hidden[place] = _through(module, states)
    for facts in found.values():
        facts.mean_square /= np.float32(sum(map(len, prompts)))
    return found


def _one_layer(decoder: Decoder, tensors: Tensors, index: int) -> DecoderModule:
    """A decoder that has nothing but layer `index`, as its layer 0."""
    prefix = f"layers.{index}."
    own = {
        f"layers.0.{n.removeprefix(prefix)}": tensors[n] for n in tensors if n.startswith(prefix)
    }
    facts = replace(decoder, layers=1, vocab=1, tied=True)
    nothing = np.zeros((1, decoder.hidden), np.float32)
    others = {"embed": nothing, "final_norm": nothing[0], ROPE_TENSOR: tensors[ROPE_TENSOR]}
    return DecoderModule.from_tensors(facts, own | others)


def _through(module: DecoderModule, hidden: torch.Tensor) -> torch.Tensor:
    """One text's hidden states (1, tokens, hidden) through the module's layer."""
    tokens = hidden.shape[1]
    cos, sin = module.turns(torch.arange(tokens)[None])
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    return module.layers[0](hidden, cos, sin, mask, _all_of_it)


def _all_of_it(
    _layer: int, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A text is its own context."""
    return keys.transpose(1, 2), values.transpose(1, 2)


@contextmanager
def _watched(module: DecoderModule, prefix: str, found: dict[str, InputFacts]) -> Iterator[None]:
    """Record the input of every linear of the module's layer; squares are summed, not averaged."""

    def watch(name: str, linear: nn.Linear) -> torch.utils.hooks.RemovableHandle:
        facts = found[name] = InputFacts(0.0, np.zeros(linear.in_features, np.float32))

        def look(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, linear.in_features)
            facts.largest = max(facts.largest, float(rows.abs().max()))
            facts.mean_square += rows.square().sum(dim=0).numpy()

        return linear.register_forward_pre_hook(look)

    layer = cast("nn.Module", module.layers[0])
    handles = [
        watch(f"{prefix}{name}", each)
        for name, each in layer.named_modules()
        if isinstance(each, nn.Linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
