"""Tokenizer and manifest of each served artifact, loaded once, ahead of requests if possible."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from headrace.serving import log
from headrace.serving.engine.loader import signed_manifest
from headrace.serving.errors import ArtifactError, ArtifactTampered, EngineFault
from headrace.serving.frontend.convert import LoadedModel
from headrace.serving.router.endpoint import ReplicaFacts
from headrace.serving.tokenizer import Tokenizer

VERSIONS_MAX = 8
"""Artifacts kept: a rolling upgrade has two of each model. One of 49 k tokens takes about 70 MB."""

Load = Callable[[ReplicaFacts], LoadedModel]


def load_from_artifact(facts: ReplicaFacts, *, trust: Path) -> LoadedModel:
    """Read what the replica's artifact folder carries. Blocks for about 0.3 s.

    Args:
        facts: what the replica announced.
        trust: the public keys that count. A folder that was announced does not bring its own.

    Raises:
        ArtifactTampered: it cannot be read here, is not what was signed, or not what the replica
            announced.
        ArtifactUntrusted: it was signed with a key that is not trusted here.
    """
    folder = Path(facts.artifact_path)
    if not folder.is_dir():
        raise ArtifactTampered(
            f"There is no folder {folder}.",
            why="A frontend takes the tokenizer from the folder that a replica announces.",
            fix="Mount the artifact store at the same path here as on the replicas.",
        )
    manifest = signed_manifest(folder, trust=trust)
    if manifest.artifact_id != facts.version:
        raise ArtifactTampered(
            f"{folder} holds the artifact {manifest.artifact_id[:12]}.",
            why=f"The replica announced {facts.version[:12]} there.",
            fix="Restart the replica, so that it loads what is there.",
        )
    return LoadedModel(manifest, Tokenizer.from_folder(folder, manifest))


class ModelShelf:
    """Loads each version once, however many requests ask at the same time."""

    def __init__(self, executor: Executor, *, load: Load) -> None:
        self._executor = executor
        self._load = load
        self._loaded: OrderedDict[str, LoadedModel] = OrderedDict()
        self._loading: dict[str, asyncio.Task[LoadedModel]] = {}
        self._expected: OrderedDict[str, None] = OrderedDict()

    async def get(self, facts: ReplicaFacts) -> LoadedModel:
        """The model that this replica serves.

        Raises:
            EngineFault: its artifact cannot be read here; the log says why.
        """
        version = facts.version
        known = self._loaded.get(version)
        if known is not None:
            self._loaded.move_to_end(version)
            return known
        task = self._loading.get(version) or self._begin(facts)
        # Shielded: the caller that came first may hang up, the others still wait for it.
        try:
            return await asyncio.shield(task)
        except ArtifactError as error:
            raise EngineFault(
                f"The tokenizer of {facts.model} cannot be loaded.",
                why="Its artifact is missing, damaged or not trusted on this frontend; the log has "
                "the details.",
                fix="Tell the operator; `headrace doctor` checks the artifacts.",
            ) from error

    def expect(self, facts: ReplicaFacts) -> None:
        """Load a version before anybody asks for it; tried once, failures are only logged."""
        version = facts.version
        if version in self._expected:
            return
        self._expected[version] = None
        while len(self._expected) > VERSIONS_MAX:
            self._expected.popitem(last=False)
        if version not in self._loaded and version not in self._loading:
            self._begin(facts).add_done_callback(_note_defect)

    def _begin(self, facts: ReplicaFacts) -> "asyncio.Task[LoadedModel]":
        task = asyncio.get_running_loop().create_task(self._fill(facts))
        self._loading[facts.version] = task
        task.add_done_callback(lambda _: self._loading.pop(facts.version, None))
        return task

    async def _fill(self, facts: ReplicaFacts) -> LoadedModel:
        loop = asyncio.get_running_loop()
        try:
            model = await loop.run_in_executor(self._executor, self._load, facts)
        except ArtifactError as error:
            log.refused(error, during="loading a tokenizer")
            raise
        self._loaded[facts.version] = model
        while len(self._loaded) > VERSIONS_MAX:
            self._loaded.popitem(last=False)
        return model


def _note_defect(task: "asyncio.Task[LoadedModel]") -> None:
    """Nobody awaits what is loaded ahead. Refusals are logged by then; a defect is logged here."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, ArtifactError):
        log.crashed(during="loading a tokenizer", error=error)
