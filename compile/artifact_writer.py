"""Fills an artifact's folder: engine, tokenizer, licence, manifest with a hash of every file."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from headrace.compile.artifact_key import ArtifactKey
from headrace.compile.builder import Engine
from headrace.compile.families.base import Model
from headrace.compile.tensors import Checkpoint, Config, read_json, unreadable
from headrace.serving.domain.artifact import (
    MANIFEST_FILE,
    Manifest,
    Precision,
    Verification,
    VerifyMethod,
)
from headrace.serving.engine.file_hash import stated_digests

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_REASONING = ("<think>", "</think>")

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


def write_artifact(
    checkpoint: Checkpoint, model: Model, identity: Identity, engine: Engine, folder: Path
) -> Manifest:
    """Write what serving needs beside the engine that is in `folder`, and the manifest.

    Raises:
        CheckpointUnreadable: the tokenizer is damaged.
        StorageFull, OSError: the folder could not be written.
    """
    checkpoint.write_tokenizer(folder)
    licence = next((file for file in checkpoint.files if file.name == "LICENSE"), None)
    if licence is not None:
        shutil.copyfile(licence, folder / "LICENSE")
    stated = folder / MANIFEST_FILE
    manifest = Manifest(
        artifact_id=identity.artifact_id,
        model=identity.model,
        family=model.family,
        target=identity.target,
        precision=identity.precision,
        engine=engine.kind,
        decoder=model.decoder,
        eos_token_ids=_token_ids(checkpoint, "eos_token_id", vocab=model.decoder.vocab),
        bos_token_id=next(
            iter(_token_ids(checkpoint, "bos_token_id", vocab=model.decoder.vocab)), None
        ),
        reasoning_token_ids=_reasoning(folder / "tokenizer.json"),
        default_sampling=_sampling(checkpoint.generation),
        weight_bytes=engine.weight_bytes,
        verification=UNVERIFIED,
        source=identity.source,
        built_with=identity.key.libraries,
        weights_digest=identity.key.weights_digest,
        graph_digest=identity.key.graph_digest,
        tensorrt=engine.tensorrt,
        files=stated_digests([each for each in sorted(folder.iterdir()) if each != stated]),
    )
    return write_manifest(folder, manifest, UNVERIFIED)


def write_manifest(folder: Path, manifest: Manifest, verification: Verification) -> Manifest:
    """Write the manifest with what verifying found, and return it."""
    stated = replace(manifest, verification=verification)
    (folder / MANIFEST_FILE).write_text(stated.to_json(), "utf-8")
    return stated


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
