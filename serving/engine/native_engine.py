"""The native CPU engine: one call into our own library for each step.

Weights are int8 (a scale for each output) or int4 (a scale and a minimum for each block of 32
inputs), activations int8 with a scale for each block of 32, so that outliers stay where they are;
keys and values are bfloat16. See native/kernels.h for the formats and native/step.cpp for a step.

A row's logits are bitwise the same whatever else is in the batch, however its prompt is cut into
chunks and whatever the number of threads: tests/serving/engine/test_native_engine.py.
"""

import ctypes
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np

from headrace.serving.domain.artifact import Manifest, Precision
from headrace.serving.engine.base import Limits, Logits, Row
from headrace.serving.engine.native_library import (
    NativeConfig,
    NativeRow,
    kernels_wanted,
    last_error,
    native_library,
)
from headrace.serving.engine.native_weights import WEIGHTS_FILE, Weight, read_weights
from headrace.serving.errors import ArtifactTampered, EngineFault, UnsupportedModel

KV_BLOCK_TOKENS: Final = 16
"""kPositions in native/kernels.h: the scores of a block fill one 512-bit register."""

HEAD_DIM_MAX: Final = 512
"""kHeadDimMax in native/model.h."""


class NativeEngine:
    """Implements `Engine` for artifacts of precision int8 and int4.

    Args:
        folder: the artifact.
        manifest: its manifest, whose files have been verified.
        rows_max: most sequences in a step.
        batch_tokens_max: most tokens in a step.
        kv_tokens: tokens that the KV pool holds; memory is used as blocks are touched.
        threads: that compute a step, the caller's among them. The others sleep between steps.
        sequence_tokens_max: a bound below the model's context; None keeps the model's.

    Raises:
        ArtifactTampered: the weights are not what the manifest says.
        UnsupportedModel: a size that the kernels do not cover.
        EngineFault: the native library is missing, or there is too little memory.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        rows_max: int,
        batch_tokens_max: int,
        kv_tokens: int,
        threads: int,
        sequence_tokens_max: int | None = None,
    ) -> None:
        assert rows_max > 0
        assert batch_tokens_max > 0
        assert kv_tokens > 0
        assert threads > 0
        _refuse_unsupported(manifest)
        decoder = manifest.decoder
        blocks = -(-kv_tokens // KV_BLOCK_TOKENS)
        longest = min(sequence_tokens_max or decoder.context_tokens, decoder.context_tokens)
        self._limits = Limits(
            rows_max=rows_max,
            batch_tokens_max=batch_tokens_max,
            sequence_tokens_max=min(longest, blocks * KV_BLOCK_TOKENS),
            kv_blocks=blocks,
            kv_block_tokens=KV_BLOCK_TOKENS,
            vocab=decoder.vocab,
        )
        self._library = native_library()
        config = NativeConfig(
            **{
                name: getattr(decoder, name)
                for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab")
            },
            qk_norm=decoder.qk_norm,
            tied=decoder.tied,
            bits=4 if manifest.precision is Precision.INT4 else 8,
            rows_max=rows_max,
            batch_tokens_max=batch_tokens_max,
            sequence_tokens_max=self._limits.sequence_tokens_max,
            kv_blocks=blocks,
            threads=threads,
            kernels=kernels_wanted(),
            rms_eps=decoder.rms_eps,
            rope_scale=decoder.rope_scale,
        )
        self._model: int | None = self._library.hr_model_new(ctypes.byref(config))
        if self._model is None:
            raise _fault("The native engine cannot be made")
        for weight in read_weights(folder / WEIGHTS_FILE, decoder, manifest.precision):
            self._set(folder, weight)
        if self._library.hr_model_ready(self._model) != 0:
            raise _fault("The native engine is not complete")
        self._rows = (NativeRow * rows_max)()
        self._logits = np.empty((rows_max, decoder.vocab), np.float32)

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def weight_bytes(self) -> int:
        """What a step reads of packed weights, once for all its rows."""
        return self._library.hr_model_bytes(self._model, 0)

    def step(self, rows: Sequence[Row]) -> Logits:
        """See `Engine.step`. Token ids, positions and block ids are checked by the library.

        Raises:
            EngineFault: the rows do not fit the limits, which is the caller's bug; nothing ran.
        """
        assert self._model is not None
        if len(rows) > self._limits.rows_max:
            raise _refused(f"{len(rows)} rows exceed rows_max")
        tokens_first = blocks_first = sampled = 0
        for native, row in zip(self._rows, rows, strict=False):
            native.tokens_first = tokens_first
            native.tokens = len(row.token_ids)
            native.position = row.position
            native.blocks_first = blocks_first
            native.blocks = len(row.block_ids)
            native.samples = row.samples
            tokens_first += native.tokens
            blocks_first += native.blocks
            sampled += row.samples
        tokens = _flat([row.token_ids for row in rows], tokens_first)
        blocks = _flat([row.block_ids for row in rows], blocks_first)
        code = self._library.hr_step(
            self._model,
            len(rows),
            self._rows,
            tokens.ctypes.data,
            blocks.ctypes.data,
            self._logits.ctypes.data,
        )
        if code != 0:
            raise _refused(last_error())
        return self._logits[:sampled]

    def close(self) -> None:
        """Free the memory and end the threads. Idempotent."""
        if self._model is not None:
            self._library.hr_model_free(self._model)
            self._model = None

    def __del__(self) -> None:
        if getattr(self, "_model", None) is not None:
            self.close()

    def _set(self, folder: Path, weight: Weight) -> None:
        """Hand one tensor to the library, which copies it to its packed place."""
        layer, name = -1, weight.name
        if name.startswith("layers."):
            _, index, name = name.split(".")
            layer = int(index)
        pointers: list[int | None] = []
        for part in (weight.values, weight.scale, weight.low):
            assert part is None or part.flags.c_contiguous
            pointers += [None, 0] if part is None else [part.ctypes.data, part.nbytes]
        if self._library.hr_model_set(self._model, name.encode(), layer, *pointers) != 0:
            raise ArtifactTampered(
                f"The tensor {weight.name!r} in {folder} does not fit the model: {last_error()}.",
                why="The weights and the manifest of an artifact are written together.",
                fix="Delete the folder and build it again with `headrace compile`.",
            )


def _flat(parts: Sequence[Sequence[int]], count: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.fromiter(chain.from_iterable(parts), np.int32, count)


def _refuse_unsupported(manifest: Manifest) -> None:
    decoder = manifest.decoder
    if manifest.precision not in (Precision.INT8, Precision.INT4):
        why = f"It computes in int8 and int4; the artifact is {manifest.precision}."
    elif decoder.head_dim % 16 or not 16 <= decoder.head_dim <= HEAD_DIM_MAX:
        why = f"head_dim is {decoder.head_dim}: not a multiple of 16 up to {HEAD_DIM_MAX}."
    elif decoder.kv_heads < 1 or decoder.heads % decoder.kv_heads:
        why = f"{decoder.heads} heads do not divide over {decoder.kv_heads} key-value heads."
    elif min(decoder.layers, decoder.hidden, decoder.ffn, decoder.vocab) < 1:
        why = "The model's facts hold a size below one."
    else:
        return
    raise UnsupportedModel(
        f"The native engine cannot run {manifest.model!r}.",
        why=why,
        fix="Compile it with `--precision fp32`, which uses ONNX Runtime.",
    )


def _fault(what: str) -> EngineFault:
    return EngineFault(
        f"{what}: {last_error()}.",
        why="The library refused it, or the machine has too little memory for weights and KV pool.",
        fix="Lower kv_tokens, check HEADRACE_KERNELS, or free memory.",
    )


def _refused(why: str) -> EngineFault:
    return EngineFault(
        "The native engine refused a step.",
        why=f"The rows contradict the engine's limits: {why}.",
        fix="This is a bug in the loop that steps the engine; please report it.",
    )
