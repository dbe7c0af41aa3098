"""Tokenizers are loaded once, kept in bounds, and never from the wrong artifact."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.serving.errors import ArtifactTampered, EngineFault
from headrace.serving.frontend.convert import LoadedModel
from headrace.serving.frontend.model_shelf import VERSIONS_MAX, ModelShelf, load_from_artifact
from headrace.serving.router.endpoint import ReplicaFacts
from headrace.serving.testing.tiny_artifact import tiny_manifest, write_tiny_artifact


def facts(folder: Path, version: str = "v1") -> ReplicaFacts:
    return ReplicaFacts(
        replica_id="r0",
        address="a",
        model="tiny",
        version=version,
        ready=True,
        context_tokens=10,
        artifact_path=str(folder),
    )


class Loader:
    """Counts what it loads."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def __call__(self, replica: ReplicaFacts) -> LoadedModel:
        self.loaded.append(replica.version)
        return load_from_artifact(replace(replica, version="v1"))


def test_a_burst_of_requests_loads_a_tokenizer_once(tmp_path: Path) -> None:
    write_tiny_artifact(tmp_path, tiny_manifest())
    load = Loader()

    async def story() -> None:
        with ThreadPoolExecutor(2) as pool:
            shelf = ModelShelf(pool, load=load)
            models = await asyncio.gather(*(shelf.get(facts(tmp_path)) for _ in range(20)))
        assert all(model is models[0] for model in models)

    asyncio.run(story())
    assert load.loaded == ["v1"]


def test_an_announced_version_is_loaded_before_the_first_request(tmp_path: Path) -> None:
    """Replicas announce themselves every second; one look at the artifact is enough."""
    write_tiny_artifact(tmp_path, tiny_manifest())
    load = Loader()

    async def story() -> None:
        with ThreadPoolExecutor(2) as pool:
            shelf = ModelShelf(pool, load=load)
            shelf.expect(facts(tmp_path))
            shelf.expect(facts(tmp_path))
            await asyncio.sleep(0)

    asyncio.run(story())
    assert load.loaded == ["v1"]


def test_old_versions_leave_the_shelf(tmp_path: Path) -> None:
    write_tiny_artifact(tmp_path, tiny_manifest())
    load = Loader()
    versions = [f"v{number}" for number in range(VERSIONS_MAX + 1)]

    async def story() -> None:
        with ThreadPoolExecutor(2) as pool:
            shelf = ModelShelf(pool, load=load)
            for version in [*versions, versions[-1], versions[0]]:
                await shelf.get(facts(tmp_path, version))

    asyncio.run(story())
    assert load.loaded == [*versions, versions[0]]


def test_another_artifact_in_the_folder_is_not_taken(tmp_path: Path) -> None:
    """Its tokenizer would make other tokens of the same text."""
    write_tiny_artifact(tmp_path, tiny_manifest(version="v2"))

    with pytest.raises(ArtifactTampered, match="holds the artifact v2"):
        load_from_artifact(facts(tmp_path))


def test_a_missing_artifact_is_our_fault_and_shows_no_path(tmp_path: Path) -> None:
    async def story() -> None:
        with ThreadPoolExecutor(2) as pool:
            shelf = ModelShelf(pool)
            with pytest.raises(EngineFault, match="tokenizer of tiny") as fault:
                await shelf.get(facts(tmp_path / "nowhere"))
        assert "nowhere" not in str(fault.value)

    asyncio.run(story())
