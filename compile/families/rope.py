"""RoPE variants, each reduced to inverse frequencies and one scale.

A pair (i, i + H/2) of a head turns by `position * inv_freq[i]`; variants differ in `inv_freq` and
in what cos and sin are multiplied by. Formulas and defaults are those of `transformers` 5.23,
`modeling_rope_utils.py`, in float32 as there. With H = 64 and theta = 100,000 (SmolLM2):
inv_freq[0] = 1 and inv_freq[31] = 100000 ** (-62 / 64) = 1.4e-5, a full turn in 440,000 tokens.
"""

import math
from dataclasses import dataclass
from typing import cast

import numpy as np

from headrace.compile.tensors import Array, Config
from headrace.serving.errors import UnsupportedModel

ROPE_TENSOR = "rope.inv_freq"
DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """What an engine needs of a variant."""

    inv_freq: Array
    """(head_dim / 2,) float32."""
    scale: float
    context_tokens: int
    """The longest sequence it is meant for."""


def rope(config: Config, *, head_dim: int, context_tokens: int) -> Rope:
    """Compute the variant that a config asks for.

    Args:
        config: `config.json`, in the spelling of transformers 5 (`rope_parameters`) or before
            (`rope_scaling` and `rope_theta`).
        head_dim: values in a head; even.
        context_tokens: the config's max_position_embeddings.

    Raises:
        UnsupportedModel: the variant depends on the length of the sequence (dynamic NTK, LongRoPE),
            turns a part of the head only, or differs between layers.
        KeyError, TypeError, ValueError: a parameter of the variant is missing or not a number.
    """
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    parameters = dict(cast("Config", stated))
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    # The extra settings some configs keep at the top.
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if config.get(key) is not None:
            parameters.setdefault(key, config[key])
    if any(isinstance(value, dict) for value in parameters.values()):
        raise _unsupported("RoPE parameters that differ between layers")
    if float(_get(parameters, "partial_rotary_factor", 1.0)) != 1.0:
        raise _unsupported("partial rotary embedding")
    theta = float(_get(parameters, "rope_theta", DEFAULT_THETA))
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    turns = np.float32(theta) ** exponent
    inv_freq = np.float32(1) / turns
    match kind:
        case "default":
            return Rope(inv_freq, 1.0, context_tokens)
        case "linear":
            return Rope(inv_freq / np.float32(_get(parameters, "factor")), 1.0, context_tokens)
        case "divisors":
            divisors = np.asarray(parameters["divisors"], dtype=np.float32)
            return Rope(inv_freq / divisors.reshape(inv_freq.shape), 1.0, context_tokens)
        case "llama3":
            return Rope(_llama3(inv_freq, parameters, context_tokens), 1.0, context_tokens)
        case "yarn":
            return _yarn(turns, theta, parameters, context_tokens)
        case _:
            raise _unsupported(f"RoPE of type {kind!r}")


def _llama3(inv_freq: Array, parameters: Config, context_tokens: int) -> Array:
    """Divide slow turns by `factor`, keep fast ones, blend between (Llama 3.1, `apply_scaling`)."""
    factor = float(_get(parameters, "factor"))
    low = float(_get(parameters, "low_freq_factor"))
    high = float(_get(parameters, "high_freq_factor"))
    original = float(_get(parameters, "original_max_position_embeddings", context_tokens))
    wavelength = (2 * math.pi / inv_freq).astype(np.float32)
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    slow = np.where(wavelength > original / low, inv_freq / factor, blended)
    return np.where(wavelength < original / high, inv_freq, slow).astype(np.float32)


def _yarn(turns: Array, theta: float, parameters: Config, context_tokens: int) -> Rope:
    """YaRN (Peng et al. 2023, section 3.2): interpolate the slow turns, keep the fast ones.

    Between the dimensions that turn `beta_fast` and `beta_slow` times over the original context the
    two are blended linearly; cos and sin grow by 0.1 ln(factor) + 1. With factor 4: 1.139.
    """
    original = int(_get(parameters, "original_max_position_embeddings", context_tokens))
    stated = parameters.get("factor")
    factor = context_tokens / original if stated is None else float(cast("float", stated))
    dim = 2 * len(turns)

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(float(_get(parameters, "beta_fast", 32)))
    high = dimension(float(_get(parameters, "beta_slow", 1)))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - low) / (high - low or 0.001)
    keep = 1 - np.clip(ramp, 0, 1)
    inv_freq = (1 / (factor * turns) * (1 - keep) + 1 / turns * keep).astype(np.float32)
    longest = max(context_tokens, int(factor * original))
    return Rope(inv_freq, _yarn_scale(parameters, factor), longest)


def _yarn_scale(parameters: Config, factor: float) -> float:
    if (stated := parameters.get("attention_factor")) is not None:
        return float(cast("float", stated))

    def grown(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and all_dim:
        return grown(float(cast("float", mscale))) / grown(float(cast("float", all_dim)))
    return grown(1.0)


def _get(parameters: Config, key: str, default: float | None = None) -> float:
    value = parameters.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"RoPE parameter {key} is {value!r}")
    return value


def _unsupported(feature: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"The checkpoint uses {feature}.",
        why="We compute RoPE of type default, linear, llama3 and yarn, the same in every layer.",
        fix="Compile the model without it, or with YaRN where its authors offer that.",
    )
