"""Reads a `transformers` folder: config.json, safetensors (one file or shards), tokenizer.json.

safetensors is a header of names, types and byte ranges before plain numbers, so that reading can
run nothing. The header is checked by hand because its refusals should name the file and the cause.
"""

import json
import math
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headrace.compile.tensors import Array, Config, finite, read_json, unreadable

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEADER_BYTES_MAX = 100 * 10**6
"""The format's own bound (safetensors, MAX_HEADER_SIZE)."""

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where one tensor lies."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    begin: int
    """Absolute offset in the file."""


class SafetensorsCheckpoint:
    """A folder as `save_pretrained` writes it. Opening reads headers only."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.config: Config = read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        self.generation: Config = read_json(generation) if generation.is_file() else {}
        self._entries = _read_entries(folder)
        self._shapes = {name: entry.shape for name, entry in self._entries.items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    @property
    def files(self) -> Sequence[Path]:
        names = {
            "config.json",
            "generation_config.json",
            INDEX_FILE,
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "LICENSE",
        }
        weights = {entry.file for entry in self._entries.values()}
        beside = {self.path / name for name in names if (self.path / name).is_file()}
        return sorted(weights | beside)

    def read(self, name: str) -> Array:
        entry = self._entries[name]
        values = math.prod(entry.shape)
        kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry.kind]
        with entry.file.open("rb") as file:
            file.seek(entry.begin)
            raw = np.fromfile(file, dtype=kind, count=values)
        if raw.size != values:
            raise unreadable(entry.file, f"The data of {name!r} ends early.")
        if entry.kind == "BF16":
            # bfloat16 is the upper half of a float32.
            wide = (raw.astype(np.uint32) << 16).view(np.float32)
        else:
            wide = raw.astype(np.float32, copy=False)
        return finite(wide.reshape(entry.shape), name=name, where=entry.file)

    def write_tokenizer(self, folder: Path) -> None:
        tokenizer = self.path / "tokenizer.json"
        if not tokenizer.is_file():
            raise unreadable(
                self.path,
                "It has no tokenizer.json, and the artifact carries its own tokenizer.",
                fix="Save a fast tokenizer into the folder with `tokenizer.save_pretrained(…)`.",
            )
        read_json(tokenizer)
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        settings = self.path / "tokenizer_config.json"
        config = read_json(settings) if settings.is_file() else {}
        template = self.path / "chat_template.jinja"
        if template.is_file():
            config["chat_template"] = template.read_text("utf-8")
        config["chat_template"] = _default_template(config.get("chat_template"))
        text = json.dumps(config, ensure_ascii=False, indent=1, sort_keys=True)
        (folder / "tokenizer_config.json").write_text(text + "\n", "utf-8")


def _default_template(value: object) -> str | None:
    """Older folders hold a list of named templates; ours is the one named `default`."""
    if isinstance(value, list):
        named = {str(entry["name"]): str(entry["template"]) for entry in value}
        return named.get("default")
    return None if value is None else str(value)


def _read_entries(folder: Path) -> dict[str, _Entry]:
    index = folder / INDEX_FILE
    if not index.is_file():
        return _read_header(folder / WEIGHTS_FILE)
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise unreadable(index, "It has no weight_map.")
    entries: dict[str, _Entry] = {}
    for shard in sorted({str(name) for name in shard_of.values()}):
        if Path(shard).name != shard:
            raise unreadable(index, f"The shard {shard!r} lies outside the folder.")
        entries |= _read_header(folder / shard)
    if missing := shard_of.keys() - entries.keys():
        raise unreadable(index, f"Tensor {min(missing)!r} is in none of its shards.")
    return entries


def _read_header(path: Path) -> dict[str, _Entry]:
    """Read names and byte ranges; every range is proved to lie in the file, without gaps."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8:
                raise unreadable(path, f"It has {file_bytes} bytes; its header needs more.")
            (header_bytes,) = struct.unpack("<Q", head)
            if header_bytes > min(HEADER_BYTES_MAX, file_bytes - 8):
                raise unreadable(
                    path, f"Its header claims {header_bytes:,} of {file_bytes:,} bytes."
                )
            header = json.loads(file.read(header_bytes).decode("utf-8"))
    except OSError as error:
        raise unreadable(path, f"{error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise unreadable(path, f"Its header is not JSON: {error}.") from error
    if not isinstance(header, dict):
        raise unreadable(path, "Its header is JSON, but not an object.")
    header.pop("__metadata__", None)
    data_at = 8 + header_bytes
    described = [_describe(path, name, fields) for name, fields in header.items()]
    end = 0
    entries: dict[str, _Entry] = {}
    for (begin, stop), name, kind, shape in sorted(described):
        if begin != end:
            raise unreadable(path, f"Tensor {name!r} starts at byte {begin}, not at {end}.")
        end = stop
        entries[name] = _Entry(path, kind, shape, data_at + begin)
    if data_at + end != file_bytes:
        raise unreadable(
            path, f"It has {file_bytes:,} bytes; its header describes {data_at + end:,}."
        )
    return entries


def _describe(
    path: Path, name: str, fields: object
) -> tuple[tuple[int, int], str, str, tuple[int, ...]]:
    """One tensor's byte range, name, type and shape; the range holds exactly its numbers."""
    try:
        if not isinstance(fields, dict):
            raise TypeError(f"it is {type(fields).__name__}")
        kind, stated, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        begin, end = (int(offset) for offset in offsets)
        shape = tuple(int(size) for size in stated)
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(path, f"Tensor {name!r} is not described as the format says.") from error
    if not isinstance(kind, str) or kind not in _ITEM_BYTES:
        raise unreadable(
            path,
            f"Tensor {name!r} has type {kind!r}; we read {', '.join(_ITEM_BYTES)}.",
            fix="Use the unquantised checkpoint of the model.",
        )
    if min(shape, default=0) < 0 or end - begin != math.prod(shape) * _ITEM_BYTES[kind]:
        raise unreadable(path, f"Tensor {name!r} has {end - begin} bytes for shape {shape}.")
    return (begin, end), name, kind, shape
