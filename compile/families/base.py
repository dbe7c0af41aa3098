"""Family: recognises a checkpoint and states its facts in one vocabulary.

The canonical tensor names, which exporters and quantisers share whatever the checkpoint calls them:
`embed`, `layers.{i}.attn_norm`, `.q` `.k` `.v` (`.q_bias` `.k_bias` `.v_bias`), `.q_norm`
`.k_norm`, `.o` (`.o_bias`), `.mlp_norm`, `.gate` `.up` `.down` or, of a mixture, `.router` and
`.experts.{j}.gate` `.up` `.down`, `final_norm`, `lm_head` where it is not tied to `embed`, and
`rope.inv_freq`. Matrices are (out, in), as checkpoints store them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from headrace.compile.families.rope import ROPE_TENSOR
from headrace.compile.tensors import Array, Checkpoint, Config, Described, unreadable
from headrace.serving.domain.artifact import Decoder
from headrace.serving.errors import UnsupportedModel


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """A recognised model: what to build, before any weight was read."""

    family: str
    decoder: Decoder
    inv_freq: Array
    """RoPE's inverse frequencies, (head_dim / 2,) float32."""
    names: Mapping[str, str]
    """Canonical tensor name to the checkpoint's; all but `rope.inv_freq`."""


class Family(Protocol):
    """A group of architectures that one module computes."""

    def state(self, source: Described) -> Model | None:
        """State the facts from the config alone, or None where another family's is named.

        Raises:
            UnsupportedModel: ours, but with a feature that is not computed.
            CheckpointUnreadable: facts are missing or contradict each other.
        """
        ...

    def check(self, checkpoint: Checkpoint, model: Model) -> None:
        """Compare the checkpoint's tensors with what its config was stated to be.

        Raises:
            UnsupportedModel: there is a tensor that is not computed with.
            CheckpointUnreadable: one is missing, or has another shape than the facts imply.
        """
        ...


class Weights(Mapping[str, Array]):
    """The canonical tensors, each read when asked for and owned by the caller."""

    def __init__(self, checkpoint: Checkpoint, model: Model) -> None:
        self._checkpoint = checkpoint
        self._model = model

    def __getitem__(self, name: str) -> Array:
        if name == ROPE_TENSOR:
            return self._model.inv_freq
        return self._checkpoint.read(self._model.names[name])

    def __iter__(self) -> Iterator[str]:
        yield from self._model.names
        yield ROPE_TENSOR

    def __len__(self) -> int:
        return len(self._model.names) + 1


def integer(config: Config, key: str, *, of: Described, default: int | None = None) -> int:
    """A positive whole number from the config.

    Raises:
        CheckpointUnreadable: it is missing, not whole, or not positive.
    """
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise unreadable(of.path, f"config: {key} is {value!r}; a positive number is needed.")
    return value


def number(config: Config, key: str, *, of: Described, default: float | None = None) -> float:
    """A positive finite number from the config.

    Raises:
        CheckpointUnreadable: it is missing or not such a number.
    """
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < np.inf:
        raise unreadable(of.path, f"config: {key} is {value!r}; a positive number is needed.")
    return float(value)


def unsupported(source: Described, feature: str) -> UnsupportedModel:
    """The refusal of a model that has `feature`."""
    return UnsupportedModel(
        f"The model {source.path} uses {feature}.",
        why="It would be computed wrongly: no family here knows it.",
        fix="Compile a Llama, Qwen2, Qwen2.5 or Qwen3 model without it.",
    )
