"""The native engine's weights file: which tensors it has, and reading them one at a time.

`weights.safetensors` holds, for a decoder with H = hidden, V = vocab, D = head_dim, L layers:

| name                                   | dtype    | shape                    |
|----------------------------------------|----------|--------------------------|
| `embed.weight`, `embed.scale`          | I8, F16  | [V, H], [V, H / 32]      |
| `lm_head.weight`, `lm_head.scale`      | I8, F16  | the same; if untied      |
| `final_norm`                           | F32      | [H]                      |
| `rope.inv_freq`                        | F32      | [D / 2]                  |
| `layers.{i}.attn_norm`, `.mlp_norm`    | F32      | [H]                      |
| `layers.{i}.q_norm`, `.k_norm`         | F32      | [D]; if qk_norm          |
| `layers.{i}.{q,k,v}_bias`, `.o_bias`   | F32      | [N]; if qkv_bias, o_bias |
| `layers.{i}.{m}.weight` (int8)         | I8       | [N, K]                   |
| `layers.{i}.{m}.scale` (int8)          | F32      | [N]                      |
| `layers.{i}.{m}.weight` (int4)         | U8       | [N, K / 2]               |
| `layers.{i}.{m}.scale`, `.min` (int4)  | F16, F16 | [N, K / 32]              |

where m is one of q, k, v, o, gate, up, down, and [N, K] its [outputs, inputs].

int8: w = scale[n] * q, q in [-127, 127]. int4: w = scale[n, k / 32] * q + min[n, k / 32], q in
[0, 15]; the low nibble of byte j is input 2 j, the high one 2 j + 1; K is rounded up to a multiple
of 32. The embedding (and the head, which is the same matrix when tied) is w = scale[v, h / 32] * q
in both, H / 32 rounded up.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from headrace.serving.domain.artifact import Decoder, Precision
from headrace.serving.errors import ArtifactTampered

WEIGHTS_FILE: Final = "weights.safetensors"
BLOCK: Final = 32
"""Inputs that share a scale (and a minimum): the block of GGUF's Q4_1 and Q8_0."""

_VOCABULARY_MATRICES = ("embed", "lm_head")


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of the model, as it is stored."""

    name: str
    """Canonical, for example `layers.3.q` or `final_norm`."""
    values: npt.NDArray[np.generic]
    scale: npt.NDArray[np.generic] | None = None
    low: npt.NDArray[np.generic] | None = None


def source_shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Canonical name to shape of every tensor of the model: [outputs, inputs], or a vector.

    A mixture of E experts has `layers.{i}.router` [E, H] and `layers.{i}.experts.{j}.gate|up|down`
    in place of the MLP; the native engine itself computes dense models only.
    """
    hidden, head = decoder.hidden, decoder.head_dim
    q, kv = decoder.heads * head, decoder.kv_heads * head
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (decoder.vocab, hidden),
        "final_norm": (hidden,),
        "rope.inv_freq": (head // 2,),
    }
    if not decoder.tied:
        shapes["lm_head"] = (decoder.vocab, hidden)
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "mlp_norm": (hidden,),
        "q": (q, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "o": (hidden, q),
    }
    if decoder.experts:
        layer["router"] = (decoder.experts, hidden)
        for j in range(decoder.experts):
            layer |= _mlp_shapes(f"experts.{j}.", hidden, decoder.expert_ffn)
    else:
        layer |= _mlp_shapes("", hidden, decoder.ffn)
    if decoder.qk_norm:
        layer |= {"q_norm": (head,), "k_norm": (head,)}
    if decoder.qkv_bias:
        layer |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    if decoder.o_bias:
        layer["o_bias"] = (hidden,)
    for i in range(decoder.layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _mlp_shapes(prefix: str, hidden: int, ffn: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate": (ffn, hidden),
        f"{prefix}up": (ffn, hidden),
        f"{prefix}down": (hidden, ffn),
    }


def tensor_layout(
    name: str, shape: tuple[int, ...], precision: Precision
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The file's tensors for one of the model: name to (safetensors dtype, shape)."""
    if len(shape) == 1:
        return {name: ("F32", shape)}
    outputs, inputs = shape
    blocks = -(-inputs // BLOCK)
    if name in _VOCABULARY_MATRICES:
        scales = ("F16", (outputs, blocks))
        return {f"{name}.weight": ("I8", shape), f"{name}.scale": scales}
    if precision is Precision.INT8:
        return {f"{name}.weight": ("I8", shape), f"{name}.scale": ("F32", (outputs,))}
    return {
        f"{name}.weight": ("U8", (outputs, blocks * BLOCK // 2)),
        f"{name}.scale": ("F16", (outputs, blocks)),
        f"{name}.min": ("F16", (outputs, blocks)),
    }


def file_layout(decoder: Decoder, precision: Precision) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name to (safetensors dtype, shape) of every tensor in the file, in the file's order."""
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in sorted(source_shapes(decoder).items()):
        layout |= tensor_layout(name, shape, precision)
    return layout


def read_weights(path: Path, decoder: Decoder, precision: Precision) -> Iterator[Weight]:
    """Yield the model's tensors, each copied out of the mapped file when its turn comes.

    Raises:
        ArtifactTampered: the file is missing, truncated, not safetensors, or holds other tensors
            than the model's facts say. Nothing is yielded from a file with a wrong header.
    """
    expected = file_layout(decoder, precision)
    try:
        with safe_open(path, framework="np") as file:
            found: dict[str, tuple[str, tuple[int, ...]]] = {}
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
            _compare(path, expected, found)
            for name, shape in sorted(source_shapes(decoder).items()):
                parts = [file.get_tensor(part) for part in tensor_layout(name, shape, precision)]
                yield Weight(name, *parts)
    except (SafetensorError, OSError) as error:
        raise _tampered(path, f"It cannot be read: {error}.") from error


def _compare(
    path: Path,
    expected: dict[str, tuple[str, tuple[int, ...]]],
    found: dict[str, tuple[str, tuple[int, ...]]],
) -> None:
    if missing := expected.keys() - found.keys():
        raise _tampered(path, f"It has no tensor {min(missing)!r} ({len(missing)} are missing).")
    if unknown := found.keys() - expected.keys():
        raise _tampered(path, f"It has a tensor {min(unknown)!r} that the model does not.")
    for name, wanted in expected.items():
        if found[name] != wanted:
            raise _tampered(
                path, f"{name!r} is {_spell(found[name])}; the model's facts say {_spell(wanted)}."
            )


def _spell(kind: tuple[str, tuple[int, ...]]) -> str:
    return f"{kind[0]} {list(kind[1])}"


def _tampered(path: Path, why: str) -> ArtifactTampered:
    return ArtifactTampered(
        f"The weights {path} are not what was built.",
        why=why,
        fix="Delete the artifact's folder and build it again with `headrace compile`.",
    )
