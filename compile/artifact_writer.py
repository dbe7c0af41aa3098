"""Fills an artifact's folder: engine, tokenizer, licence, manifest with a hash of every file."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from headrace.compile.artifact_key import ArtifactKey, graph_digest, weights_digest
from headrace.compile.families.base import Model, Weights
from headrace.compile.quantize import WEIGHTS_FILE, quantize_decoder
from headrace.compile.tensors import Checkpoint, Config, read_json, sha256_of, unreadable
from headrace.serving.domain.artifact import (
    MANIFEST_FILE,
    Manifest,
    Precision,
    Verification,
    VerifyMethod,
)
from headrace.serving.engine.onnx_engine import GRAPH_FILE, GRAPH_VERSION
from headrace.serving.errors import UnsupportedModel

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_REASONING = ("<think>", "</think>")

_FAMILY_CODE = tuple(f"headrace.compile.families.{name}" for name in ("base", "qwen", "rope"))
_ONNX_CODE = ("headrace.compile.export", "headrace.compile.families.decoder", *_FAMILY_CODE)
_NATIVE_CODE = (
    "headrace.compile.quantize",
    "headrace.serving.engine.native_weights",
    *_FAMILY_CODE,
)

UNVERIFIED = Verification(
    reference="none yet",
    tokens=0,
    max_abs_error=0.0,
    top1_agreement=0.0,
    perplexity=1.0,
    perplexity_reference=1.0,
    tolerance="none yet",
    method=VerifyMethod.NONE,
)
"""What a manifest says while its engine is being verified, in a folder that nobody else sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What an artifact is, apart from its content."""

    key: ArtifactKey
    model: str
    source: str

    @property
    def artifact_id(self) -> str:
        return self.key.artifact_id

    @property
    def target(self) -> str:
        return self.key.target

    @property
    def precision(self) -> Precision:
        return self.key.precision


def cpu_key(checkpoint: Checkpoint, model: Model, precision: Precision) -> ArtifactKey:
    """What decides an artifact of the target cpu. Reads every file of the checkpoint."""
    code = _ONNX_CODE if precision is Precision.FP32 else _NATIVE_CODE
    facts = {"family": model.family, "decoder": model.decoder, "contract": GRAPH_VERSION}
    return ArtifactKey(
        weights_digest=weights_digest(checkpoint),
        graph_digest=graph_digest(code, facts),
        target="cpu",
        libraries=built_with(precision),
        precision=precision,
    )


def write_engine(
    checkpoint: Checkpoint, model: Model, identity: Identity, folder: Path
) -> Manifest:
    """Build the engine into `folder`, with everything that serving needs beside it.

    Raises:
        CheckpointUnreadable: a tensor or the tokenizer is damaged.
        StorageFull, OSError: the folder could not be written.
    """
    weights = Weights(checkpoint, model)
    if identity.precision is Precision.FP32:
        # torch is imported here alone: quantising needs none of it.
        from headrace.compile.export import export_decoder

        export_decoder(model.decoder, weights, folder / GRAPH_FILE)
        engine, weight_bytes = "onnx", (folder / f"{GRAPH_FILE}.data").stat().st_size
    else:
        quantized = quantize_decoder(
            model.decoder, weights, identity.precision, folder / WEIGHTS_FILE
        )
        engine, weight_bytes = "native", quantized.weight_bytes
    checkpoint.write_tokenizer(folder)
    licence = next((file for file in checkpoint.files if file.name == "LICENSE"), None)
    if licence is not None:
        shutil.copyfile(licence, folder / "LICENSE")
    manifest = Manifest(
        artifact_id=identity.artifact_id,
        model=identity.model,
        family=model.family,
        target=identity.target,
        precision=identity.precision,
        engine=engine,
        decoder=model.decoder,
        eos_token_ids=_token_ids(checkpoint, "eos_token_id", vocab=model.decoder.vocab),
        bos_token_id=next(
            iter(_token_ids(checkpoint, "bos_token_id", vocab=model.decoder.vocab)), None
        ),
        reasoning_token_ids=_reasoning(folder / "tokenizer.json"),
        default_sampling=_sampling(checkpoint.generation),
        weight_bytes=weight_bytes,
        verification=UNVERIFIED,
        source=identity.source,
        built_with=identity.key.libraries,
        weights_digest=identity.key.weights_digest,
        graph_digest=identity.key.graph_digest,
        files={
            file.name: sha256_of(file)
            for file in sorted(folder.iterdir())
            if file.name != MANIFEST_FILE
        },
    )
    return write_manifest(folder, manifest, UNVERIFIED)


def write_manifest(folder: Path, manifest: Manifest, verification: Verification) -> Manifest:
    """Write the manifest with what verifying found, and return it."""
    stated = replace(manifest, verification=verification)
    (folder / MANIFEST_FILE).write_text(stated.to_json(), "utf-8")
    return stated


def built_with(precision: Precision) -> Mapping[str, str]:
    """Versions of what decides an artifact's content."""
    packages = ["headrace", "numpy"]
    if precision is Precision.FP32:
        packages += ["torch", "onnx", "onnxscript"]
    return {package: version(package) for package in packages}


def _token_ids(checkpoint: Checkpoint, key: str, *, vocab: int) -> tuple[int, ...]:
    """The generation config speaks first, as it does in `transformers`; one id or several."""
    for config in (checkpoint.generation, checkpoint.config):
        value = config.get(key)
        if value is None:
            continue
        stated = value if isinstance(value, list) else [value]
        ids = tuple(one for one in stated if type(one) is int and 0 <= one < vocab)
        if len(ids) != len(stated):
            raise unreadable(
                checkpoint.path, f"{key} is {value!r}; ids of its {vocab} tokens are needed."
            )
        return ids
    return ()


def _sampling(generation: Config) -> Mapping[str, float]:
    """The authors' advice, where they advise sampling at all."""
    if generation.get("do_sample") is False:
        return {}
    found = {key: generation.get(key) for key in _SAMPLING}
    return {
        key: float(value)
        for key, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _reasoning(tokenizer: Path) -> tuple[int, int] | None:
    """The ids of the two marks, where the tokenizer has both as tokens of their own."""
    added = read_json(tokenizer).get("added_tokens")
    if not isinstance(added, list):
        return None
    ids = {str(token["content"]): int(token["id"]) for token in added if isinstance(token, dict)}
    opening, closing = (ids.get(mark) for mark in _REASONING)
    return None if opening is None or closing is None else (opening, closing)


def require_target(target: str) -> None:
    """Refuse targets whose builder is not part of this installation.

    Raises:
        UnsupportedModel: the target is not `cpu`.
    """
    if target != "cpu":
        raise UnsupportedModel(
            f"The target {target!r} cannot be built here.",
            why="This installation has the builder of `cpu`; TensorRT's (rtx, h200) is not in it.",
            fix="Use --target cpu.",
        )
