"""Where artifacts are: content-addressed folders, and an index from names to them.

`artifacts/<id>/` is immutable once it is there, but for what its manifest says of its verification
(`verify_stored.py`). `names/<model>.json` numbers a model's builds and says which one each variant
means; it is replaced whole, so that a reader sees the old state or the new one. See
`names_index.py`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from headrace.compile.names_index import Cause, Index, Version, parse_index
from headrace.compile.storage import locked, write_atomically
from headrace.serving.config import ModelConfig
from headrace.serving.domain.artifact import Manifest, Precision
from headrace.serving.engine.artifact_home import stamp_file
from headrace.serving.engine.loader import read_manifest, signed_manifest
from headrace.serving.errors import (
    ArtifactError,
    ArtifactTampered,
    InvalidRequest,
    ModelNotFound,
)

INDEX_BYTES_MAX = 2**20
"""All that `names_index.py` remembers of a model is a fifth of this."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ID = re.compile(r"[0-9a-f]{64}")

PREFERRED = tuple(f"cpu/{each}" for each in (Precision.INT8, Precision.INT4, Precision.FP32))
"""Which build of a model is taken when none is asked for: the most accurate of the fast ones. A
build for another target is only taken where it is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A model's build, as the index has it."""

    model: str
    version: Version
    is_current: bool
    folder: Path
    manifest: Manifest | None
    """None where it cannot be read."""
    total_bytes: int
    """Of all its files."""
    problem: str = ""
    """Why it cannot be served as it is; empty where it can."""


class Store:
    """The artifacts of one home. Any process may use it at any time."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.artifacts = home / "artifacts"
        self._names = home / "names"
        self._names_lock = home / "locks" / "names"

    def folder(self, artifact_id: str) -> Path:
        """Where the artifact is, or will be."""
        assert _ID.fullmatch(artifact_id)
        return self.artifacts / artifact_id

    def lock_file(self, artifact_id: str) -> Path:
        """The lock that whoever builds, fetches or removes this artifact holds."""
        return self.home / "locks" / f"artifact-{artifact_id}"

    def register(
        self, manifest: Manifest, *, model: str | None = None, cause: Cause = Cause.BUILD
    ) -> Version:
        """Make the artifact a version of a model, and current of its variant. Idempotent.

        Args:
            manifest: of the artifact, which is in its folder.
            model: the name that leads to it; its own when None.
            cause: whether it was built here or fetched.

        Raises:
            StorageFull: the disk has no room for the index.
        """
        artifact_id, variant = manifest.artifact_id, manifest.variant
        folder = stamp_file(self.folder(artifact_id)).parent
        folder.mkdir(parents=True, exist_ok=True)
        index = self._change(
            model or manifest.model,
            lambda index: index.registered(artifact_id, variant, cause=cause, at=_now()),
        )
        found = index.current(variant)
        assert found is not None
        return found

    def promote(self, model: str, version: int) -> Version:
        """Make a version current of its variant. Idempotent.

        Raises:
            ModelNotFound: there is no such version.
            ArtifactTampered, ArtifactUntrusted: its artifact cannot be served.
        """
        found = self.version(model, version)
        self._checked(model, found)
        self._change(model, lambda index: index.promoted(found, cause=Cause.PROMOTE, at=_now()))
        return found

    def rollback(self, model: str, variant: str | None = None) -> Version:
        """Make current what was current before. Each call goes one step further back.

        Args:
            model: its name.
            variant: which of its variants; None where it has one only.

        Raises:
            InvalidRequest: it has several variants and none was named.
            ModelNotFound: there is no such variant, or nothing was current before.
            ArtifactTampered, ArtifactUntrusted: that artifact cannot be served.
        """
        index = self.index(model)
        chosen = variant or self._only_variant(model, index)
        found = index.before(chosen)
        if found is None:
            raise ModelNotFound(
                f"Nothing of {model!r} was current as {chosen} before.",
                why="A rollback goes back to the version that the current one replaced.",
                fix=f"`headrace models versions {model}` shows what there is; `headrace models "
                f"promote {model} VERSION` takes any of it.",
            )
        self._checked(model, found)
        # Undone only if it is still the current one: two rollbacks at once go back one step.
        self._change(
            model,
            lambda now: (
                now.promoted(found, cause=Cause.ROLLBACK, at=_now())
                if now.current(chosen) == index.current(chosen)
                else now
            ),
        )
        return found

    def forget(self, artifact_id: str, *, unless: Callable[[], bool]) -> bool:
        """Take an artifact out of every model's index, so that it can be removed.

        Args:
            artifact_id: its id.
            unless: asked while nobody else can change an index; True keeps it.

        Returns:
            Whether it was taken out.
        """
        with locked(self._names_lock):
            if unless():
                return False
            for model in self.models():
                self._replace(model, lambda index: index.without({artifact_id}))
        return True

    def resolve(
        self,
        model: str,
        precision: Precision | None = None,
        *,
        variant: str | None = None,
        version: int | None = None,
    ) -> Path:
        """Answer the folder of a model's build, whose manifest is signed by a trusted key.

        Args:
            model: its name.
            precision: of the target cpu; None takes the first there is of `PREFERRED`.
            variant: target, precision and split instead; its current version is taken.
            version: this one, whether it is current or not.

        Raises:
            ModelNotFound: there is no such build here.
            ArtifactTampered: the index is damaged, or its artifact is gone or not ours.
            ArtifactUntrusted: it was signed with a key that is not trusted.
        """
        if version is not None:
            return self._checked(model, self.version(model, version))
        index = self.index(model)
        wanted = PREFERRED if precision is None else (f"cpu/{precision}",)
        for candidate in (variant,) if variant else wanted:
            if found := index.current(candidate):
                return self._checked(model, found)
        asked = variant or precision or "built"
        raise ModelNotFound(
            f"There is no {asked} artifact of model {model!r}.",
            why=f"{self._names} has {', '.join(index.variants) or 'nothing'} under this name.",
            fix=f"Build it: `headrace compile {model} {_options(variant, precision)}`.",
        )

    def variant_of(self, model: str) -> str | None:
        """Which build a command means that names none; None where the model has none at all.

        Raises:
            InvalidRequest: it has several, and none of `PREFERRED`.
        """
        index = self.index(model)
        if not index.variants:
            return None
        preferred = next((each for each in PREFERRED if each in index.variants), None)
        return preferred or self._only_variant(model, index)

    def configured(self, model: ModelConfig) -> Path:
        """What a served model means: the version that is pinned, else the current one.

        Raises:
            ModelNotFound, ArtifactTampered, ArtifactUntrusted: as `resolve` does.
        """
        return self.resolve(
            model.name, model.precision, variant=model.variant, version=model.version
        )

    def version(self, model: str, number: int) -> Version:
        """Answer a version of a model.

        Raises:
            ModelNotFound: there is no such version.
        """
        index = self.index(model)
        found = index.of(number)
        if found is None:
            numbers = [str(each.version) for each in index.versions]
            raise ModelNotFound(
                f"The model {model!r} has no version {number}.",
                why=f"There is {', '.join(numbers[-10:]) or 'none'}.",
                fix=f"`headrace models versions {model}` shows them.",
            )
        return found

    def models(self) -> Sequence[str]:
        """The names there are."""
        return sorted(path.stem for path in self._names.glob("[!.]*.json"))

    def list(self) -> Sequence[Stored]:
        """The current build of every variant of every model.

        Raises:
            ArtifactTampered: an index is damaged.
        """
        return [each for model in self.models() for each in self.builds(model) if each.is_current]

    def builds(self, model: str) -> Sequence[Stored]:
        """Every version of a model, by variant and then in their order.

        Raises:
            ArtifactTampered: the index is damaged.
        """
        index = self.index(model)
        current = [index.current(variant) for variant in index.variants]
        ordered = sorted(index.versions, key=lambda each: (each.variant, each.version))
        return [self._stored(model, each, is_current=each in current) for each in ordered]

    def index(self, model: str) -> Index:
        """All versions of a model; empty where it is unknown.

        Raises:
            ArtifactTampered: the index is damaged.
        """
        path = self._path(model)
        try:
            with path.open("rb") as file:
                text = file.read(INDEX_BYTES_MAX + 1)
            if len(text) > INDEX_BYTES_MAX:
                raise ValueError("it is too long")
            written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            return parse_index(text.decode("utf-8"), at=_iso(written))
        except FileNotFoundError:
            return Index()
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise _damaged(path, str(error)) from error

    def _change(self, model: str, change: Callable[[Index], Index]) -> Index:
        with locked(self._names_lock):
            self._names.mkdir(parents=True, exist_ok=True)
            return self._replace(model, change)

    def _replace(self, model: str, change: Callable[[Index], Index]) -> Index:
        """The caller holds the lock of the names."""
        before = self.index(model)
        after = change(before)
        if after != before:
            write_atomically(self._path(model), after.to_json())
        return after

    def _path(self, model: str) -> Path:
        return self._names / f"{check_name(model)}.json"

    def _checked(self, model: str, version: Version) -> Path:
        folder = self._present(model, version)
        signed_manifest(folder)
        return folder

    def _stored(self, model: str, version: Version, *, is_current: bool) -> Stored:
        folder, manifest, problem, total_bytes = self.folder(version.artifact_id), None, "", 0
        try:
            self._present(model, version)
            total_bytes = sum(file.stat().st_size for file in folder.iterdir())
            manifest = read_manifest(folder)
            signed_manifest(folder)
        except ArtifactError as error:
            problem = f"{error.what} {error.why} {error.fix}"
        return Stored(
            model=model,
            version=version,
            is_current=is_current,
            folder=folder,
            manifest=manifest,
            total_bytes=total_bytes,
            problem=problem,
        )

    def _present(self, model: str, version: Version) -> Path:
        folder = self.folder(version.artifact_id)
        if not folder.is_dir():
            raise ArtifactTampered(
                f"The artifact {version.artifact_id[:12]} of model {model!r} is gone.",
                why=f"{folder} is named by the index and is not there.",
                fix=f"Build it again: `headrace compile {model}`.",
            )
        return folder

    def chosen(self, model: str, number: int | None, variant: str | None) -> Version:
        """A model's version: this one, or the current one of a variant, or of the only variant.

        Raises:
            InvalidRequest: it has several variants and nothing was named.
            ModelNotFound: there is no such version.
        """
        if number is not None:
            return self.version(model, number)
        index = self.index(model)
        wanted = variant or (self._only_variant(model, index) if index.versions else "built")
        found = index.current(wanted)
        if found is None:
            raise ModelNotFound(
                f"There is no {wanted} artifact of model {model!r}.",
                why=f"There is {', '.join(index.variants) or 'nothing'} under this name.",
                fix="`headrace models` shows what there is.",
            )
        return found

    def _only_variant(self, model: str, index: Index) -> str:
        if len(index.variants) == 1:
            return index.variants[0]
        raise InvalidRequest(
            f"The model {model!r} has {len(index.variants)} variants.",
            why=f"They are {', '.join(index.variants) or 'none yet'}; each has a history of its "
            "own.",
            fix="Name one with --variant.",
            field="variant",
        )


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


def _options(variant: str | None, precision: Precision | None) -> str:
    """What `headrace compile` is to be told."""
    if variant is None:
        return f"--precision {precision or Precision.INT8}"
    target, kind, *split = variant.split("/")
    sizes = re.findall(r"([tpc]p)(\d+)", split[0]) if split else []
    return " ".join(
        [f"--target {target} --precision {kind}", *(f"--{name} {size}" for name, size in sizes)]
    )


def _now() -> str:
    return _iso(datetime.now(UTC))


def _iso(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
