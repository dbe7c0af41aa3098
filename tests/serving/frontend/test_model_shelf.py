"""Tokenizers are loaded once, kept in bounds, and never from the wrong artifact."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from headrace.serving.errors import ArtifactTampered, ArtifactUntrusted, EngineFault, InvalidRequest
from headrace.serving.frontend.convert import LoadedModel
from headrace.serving.frontend.model_shelf import VERSIONS_MAX, ModelShelf, load_from_artifact
from headrace.serving.router.endpoint import ReplicaFacts
from headrace.serving.testing.signing import sign_artifact, trust_key
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

    def __init__(self, trust: Path) -> None:
        self.loaded: list[str] = []
        self._trust = trust

    def __call__(self, replica: ReplicaFacts) -> LoadedModel:
        self.loaded.append(replica.version)
        return load_from_artifact(replace(replica, version="v1"), trust=self._trust)


@pytest.fixture
def trust(tmp_path: Path) -> Path:
    """The frontend's own keys; artifacts lie in another home."""
    return trust_key(tmp_path / "frontend" / "trust")


def test_a_burst_of_requests_loads_a_tokenizer_once(tmp_path: Path, trust: Path) -> None:
    write_tiny_artifact(tmp_path, tiny_manifest())
    load = Loader(trust)

    async def story() -> None:
        with ThreadPoolExecutor(2) as pool:
            shelf = ModelShelf(pool, load=load)
            models = await asyncio.gather(*(shelf.get(facts(tmp_path)) for _ in range(20)))
        assert all(model is models[0] for model in models)

    asyncio.run(story())
    assert load.loaded == ["v1"]


def test_an_announced_version_is_loaded_before_the_first_request(
    tmp_path: Path, trust: Path
) -> None:
    """Replicas announce themselves every second; one look at the artifact is enough."""
    write_tiny_artifact(tmp_path, tiny_manifest())
    load = Loader(trust)

    async def story() -> None:
        with ThreadPoolExecutor(2) as pool:
            shelf = ModelShelf(pool, load=load)
            shelf.expect(facts(tmp_path))
            shelf.expect(facts(tmp_path))
            await asyncio.sleep(0)

    asyncio.run(story())
    assert load.loaded == ["v1"]


def test_old_versions_leave_the_shelf(tmp_path: Path, trust: Path) -> None:
    write_tiny_artifact(tmp_path, tiny_manifest())
    load = Loader(trust)
    versions = [f"v{number}" for number in range(VERSIONS_MAX + 1)]

    async def story() -> None:
        with ThreadPoolExecutor(2) as pool:
            shelf = ModelShelf(pool, load=load)
            for version in [*versions, versions[-1], versions[0]]:
                await shelf.get(facts(tmp_path, version))

    asyncio.run(story())
    assert load.loaded == [*versions, versions[0]]


def test_another_artifact_in_the_folder_is_not_taken(tmp_path: Path, trust: Path) -> None:
    """Its tokenizer would make other tokens of the same text."""
    write_tiny_artifact(tmp_path, tiny_manifest(version="v2"))

    with pytest.raises(ArtifactTampered, match="holds the artifact v2"):
        load_from_artifact(facts(tmp_path), trust=trust)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("tokenizer.json", b" ", id="another tokenizer"),
        pytest.param("chat_template.jinja", b"{{ 1 }}", id="another template"),
        pytest.param("tokenizer_config.json", None, id="a file that is gone"),
        pytest.param("manifest.json", b" ", id="another manifest"),
        pytest.param("manifest.sig", None, id="no signature"),
    ],
)
def test_a_file_that_is_not_what_was_signed_is_not_used(
    name: str, change: bytes | None, tmp_path: Path, trust: Path
) -> None:
    """A chat template is a program: whoever could change it would read along in every prompt."""
    write_tiny_artifact(tmp_path, tiny_manifest())
    path = tmp_path / name
    path.unlink() if change is None else path.write_bytes(path.read_bytes() + change)

    with pytest.raises(ArtifactTampered):
        load_from_artifact(facts(tmp_path), trust=trust)


def test_a_file_that_the_manifest_does_not_state_is_not_read(tmp_path: Path, trust: Path) -> None:
    manifest = tiny_manifest()
    stated = {name: each for name, each in manifest.files.items() if "jinja" not in name}
    write_tiny_artifact(tmp_path, replace(manifest, files=stated))

    loaded = load_from_artifact(facts(tmp_path), trust=trust)

    with pytest.raises(InvalidRequest, match="no chat template"):
        loaded.tokenizer.encode_chat([("user", "x")])


def test_a_folder_that_was_announced_does_not_bring_its_own_trust(tmp_path: Path) -> None:
    folder = tmp_path / "theirs" / "artifacts" / "a"
    write_tiny_artifact(folder, tiny_manifest())
    trust_key(tmp_path / "theirs" / "trust")

    with pytest.raises(ArtifactUntrusted, match="models trust add"):
        load_from_artifact(facts(folder), trust=tmp_path / "ours" / "trust")


def test_one_untrusted_model_is_refused_and_the_others_are_served(tmp_path: Path) -> None:
    """The frontend lives on; once the key is trusted, the next request finds the model."""
    stranger, ours = Ed25519PrivateKey.generate(), trust_key(tmp_path / "trust")
    write_tiny_artifact(tmp_path / "theirs", tiny_manifest(version="v2"))
    sign_artifact(tmp_path / "theirs", stranger)
    write_tiny_artifact(tmp_path / "ours", tiny_manifest())

    async def story() -> None:
        with ThreadPoolExecutor(2) as pool:
            shelf = ModelShelf(pool, load=partial(load_from_artifact, trust=ours))
            theirs = facts(tmp_path / "theirs", "v2")
            with pytest.raises(EngineFault, match="not trusted on this frontend"):
                await shelf.get(theirs)
            assert (await shelf.get(facts(tmp_path / "ours"))).manifest.artifact_id == "v1"
            trust_key(ours, stranger)
            assert (await shelf.get(theirs)).manifest.artifact_id == "v2"

    asyncio.run(story())


def test_a_missing_artifact_is_our_fault_and_shows_no_path(tmp_path: Path, trust: Path) -> None:
    async def story() -> None:
        with ThreadPoolExecutor(2) as pool:
            shelf = ModelShelf(pool, load=partial(load_from_artifact, trust=trust))
            with pytest.raises(EngineFault, match="tokenizer of tiny") as fault:
                await shelf.get(facts(tmp_path / "nowhere"))
        assert "nowhere" not in str(fault.value)

    asyncio.run(story())
