"""Where artifacts are: content-addressed folders, and an index from names to them.

`artifacts/<id>/` is immutable once it is there. `names/<model>.json` says which id each precision
of a model has; it is replaced whole, so that a reader sees the old build or the new one.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.compile.storage import locked, write_atomically
from headrace.serving.domain.artifact import Manifest, Precision
from headrace.serving.engine.loader import read_manifest
from headrace.serving.errors import ArtifactTampered, InvalidRequest, ModelNotFound

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ID = re.compile(r"[0-9a-f]{64}")

PREFERRED = (Precision.INT8, Precision.INT4, Precision.FP32)
"""Which build of a model is taken when none is asked for: the most accurate of the fast ones."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A model's build, as the index has it."""

    folder: Path
    manifest: Manifest
    total_bytes: int
    """Of all its files."""


class Store:
    """The artifacts of one home. Any process may use it at any time."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._artifacts = home / "artifacts"
        self._names = home / "names"

    def folder(self, artifact_id: str) -> Path:
        """Where the artifact is, or will be."""
        assert _ID.fullmatch(artifact_id)
        return self._artifacts / artifact_id

    def lock_file(self, artifact_id: str) -> Path:
        """The lock that whoever builds this artifact holds."""
        return self.home / "locks" / f"artifact-{artifact_id}"

    def register(self, manifest: Manifest) -> None:
        """Let the model's name and precision mean this artifact from now on. Idempotent.

        Raises:
            StorageFull: the disk has no room for the index.
        """
        path = self._names / f"{check_name(manifest.model)}.json"
        with locked(self.home / "locks" / "names"):
            self._names.mkdir(parents=True, exist_ok=True)
            ids = self._ids(path) | {manifest.precision.value: manifest.artifact_id}
            write_atomically(path, json.dumps(ids, indent=1, sort_keys=True) + "\n")

    def resolve(self, model: str, precision: Precision | None = None) -> Path:
        """Answer the folder of a model's build.

        Args:
            model: its name.
            precision: None takes the first there is of `PREFERRED`.

        Raises:
            ModelNotFound: there is no such build here.
            ArtifactTampered: the index is damaged, or its artifact is gone.
        """
        ids = self._ids(self._names / f"{check_name(model)}.json")
        wanted = PREFERRED if precision is None else (precision,)
        for candidate in wanted:
            if artifact_id := ids.get(candidate):
                return self._present(model, artifact_id)
        built = ", ".join(sorted(ids)) or "nothing"
        raise ModelNotFound(
            f"There is no {precision or 'built'} artifact of model {model!r}.",
            why=f"{self._names} has {built} under this name.",
            fix=f"Build it: `headrace compile {model} --precision {precision or 'int8'}`.",
        )

    def list(self) -> Sequence[Stored]:
        """Every named build, by model and precision.

        Raises:
            ArtifactTampered: the index or a manifest is damaged.
        """
        found: list[Stored] = []
        for path in sorted(self._names.glob("*.json")):
            for _, artifact_id in sorted(self._ids(path).items()):
                folder = self._present(path.stem, artifact_id)
                total_bytes = sum(file.stat().st_size for file in folder.iterdir())
                found.append(Stored(folder, read_manifest(folder), total_bytes))
        return found

    def _present(self, model: str, artifact_id: str) -> Path:
        folder = self.folder(artifact_id)
        if not folder.is_dir():
            raise ArtifactTampered(
                f"The artifact {artifact_id[:12]} of model {model!r} is gone.",
                why=f"{folder} is named by the index and is not there.",
                fix=f"Build it again: `headrace compile {model}`.",
            )
        return folder

    def _ids(self, path: Path) -> dict[str, str]:
        """Precision to artifact id; empty where the model is unknown."""
        try:
            ids = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise _damaged(path, str(error)) from error
        if not isinstance(ids, dict) or not all(
            key in set(Precision) and isinstance(value, str) and _ID.fullmatch(value)
            for key, value in ids.items()
        ):
            raise _damaged(path, "it does not map precisions to ids")
        return ids


def check_name(model: str) -> str:
    """Return a model's name, which becomes a file's name.

    Raises:
        InvalidRequest: it is not lower-case letters, digits, dots, dashes and underscores.
    """
    if not _NAME.fullmatch(model):
        raise InvalidRequest(
            f"The model name {model!r} cannot be used.",
            why="A name has 1 to 64 of a-z, 0-9, '.', '_' and '-', and begins with a-z or 0-9.",
            fix="Choose another with --name.",
            field="name",
        )
    return model


def _damaged(path: Path, why: str) -> ArtifactTampered:
    return ArtifactTampered(
        f"The index {path} is damaged.",
        why=f"Reading it: {why}.",
        fix="Delete the file and run `headrace compile` again; builds that exist are kept.",
    )
