"""Configs that their authors published, as data files: what a model is, without its weights.

`published/<name>.json` holds the fields that matter here, in the words of the model's own
`config.json` (of diffusers' component configs for Wan), and names its source. A path to a
`config.json` is read the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.compile.tensors import Config, read_json
from headrace.serving.errors import ModelNotFound

_FOLDER = Path(__file__).with_name("published")


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A config on its own."""

    path: Path
    config: Config


def published_names() -> Sequence[str]:
    """The names that `open_config` knows, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def open_config(source: str) -> ConfigFile:
    """Read a published config by its name, or the config at a path.

    Args:
        source: a name as `qwen3-32b`, a `config.json`, or a folder that has one.

    Raises:
        ModelNotFound: neither a name nor a path.
        CheckpointUnreadable: the file is not a JSON object.
    """
    path = Path(source)
    if source.lower() in published_names():
        path = _FOLDER / f"{source.lower()}.json"
    elif path.is_dir():
        path /= "config.json"
    elif not path.is_file():
        raise ModelNotFound(
            f"There is no published config {source!r}, and no file of this name.",
            why=f"There are {', '.join(published_names())}.",
            fix="Use one of these names, or the path of a config.json.",
        )
    return ConfigFile(path, read_json(path))
