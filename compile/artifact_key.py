"""What decides an artifact's content, and so its name: one key for every target.

The graph digest covers the source text of the modules that construct the graph, so that a change of
the construction is another artifact, without a number that somebody must remember to raise. Names,
paths and times are no part of the key: the same weights are built once, whatever they are called.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from headrace.compile.tensors import Checkpoint, sha256_of
from headrace.compile.verify_texts import TEXTS_VERSION
from headrace.serving.domain.artifact import MANIFEST_VERSION, Precision, Profile, Sharding

FORMAT_VERSION = 2
"""Raised when the same key is to give other files, so that old builds are not taken for new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactKey:
    """Filled by every builder; equal keys are the same artifact."""

    weights_digest: str
    """Of `weights_digest`."""
    graph_digest: str
    """Of `graph_digest`."""
    target: str
    libraries: Mapping[str, str]
    """Package to version, of whatever writes the engine's files."""
    precision: Precision
    profiles: Sequence[Profile] = ()
    sharding: Sharding = field(default_factory=Sharding)

    @property
    def artifact_id(self) -> str:
        """SHA-256 (hex) of the key and of the versions of what it is written in."""
        formats = {"format": FORMAT_VERSION, "manifest": MANIFEST_VERSION, "texts": TEXTS_VERSION}
        return _digest({"formats": formats, **asdict(self)})


def weights_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 (hex) over every file of the checkpoint: weights, configuration, tokenizer.

    Reads all of them, at the disk's speed.
    """
    return _digest({file.name: sha256_of(file) for file in checkpoint.files})


def graph_digest(modules: Sequence[str], facts: Mapping[str, object]) -> str:
    """SHA-256 (hex) over what constructs a graph.

    Args:
        modules: names of the modules whose code does; they are read, not imported.
        facts: what they are given: dataclasses, and whatever JSON can say.
    """
    sources = {module: sha256(_source(module).read_bytes()).hexdigest() for module in modules}
    stated = {
        name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for name, value in facts.items()
    }
    return _digest({"sources": sources, "facts": stated})


def _source(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None, f"{module} is a module of ours"
    assert spec.origin is not None, f"{module} has a file"
    return Path(spec.origin)


def _digest(value: Mapping[str, object]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()
