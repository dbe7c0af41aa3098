"""Opens a checkpoint: a `transformers` folder with safetensors, or a GGUF file. Never pickle."""

from pathlib import Path

from headrace.compile.safetensors_checkpoint import (
    INDEX_FILE,
    WEIGHTS_FILE,
    SafetensorsCheckpoint,
)
from headrace.compile.tensors import Checkpoint, unreadable
from headrace.serving.errors import UnsupportedModel

PIPELINE_FILE = "model_index.json"
"""What diffusers writes beside the components of a pipeline."""

# Formats whose loader runs code that the file brings along.
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model's folder or GGUF file; reads headers only.

    Raises:
        CheckpointUnreadable: nothing is there, it is damaged, or its weights are pickles.
        UnsupportedModel: a GGUF architecture, or a kind of model, that is not compiled.
    """
    if path.suffix == ".gguf" and path.is_file():
        return _open_gguf(path)
    if path.suffix in _PICKLES and path.is_file():
        raise _refuse_pickle(path)
    if not path.is_dir():
        raise unreadable(
            path,
            "There is no model folder and no .gguf file at this path.",
            fix="Name a folder with config.json and model.safetensors, or a .gguf file.",
        )
    if (path / PIPELINE_FILE).is_file():
        raise UnsupportedModel(
            f"The folder {path} holds a diffusion pipeline.",
            why="Video models, Wan among them, cannot be built yet.",
            fix="Plan their memory: `headrace compile wan2.1-t2v-14b --config-only --dry-run`.",
        )
    if (path / INDEX_FILE).is_file() or (path / WEIGHTS_FILE).is_file():
        return SafetensorsCheckpoint(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _open_gguf(ggufs[0])
    if ggufs:
        raise unreadable(path, f"It holds {len(ggufs)} .gguf files.", fix="Name one of them.")
    for found in sorted(path.iterdir()):
        if found.suffix in _PICKLES:
            raise _refuse_pickle(found)
    raise unreadable(path, f"It holds neither {WEIGHTS_FILE} nor {INDEX_FILE} nor a .gguf file.")


def _refuse_pickle(path: Path) -> Exception:
    return unreadable(
        path,
        "It is a pickle, and loading a pickle runs whatever code is in it.",
        fix="Convert it to safetensors where you trust it: `model.save_pretrained(folder)`.",
    )


def _open_gguf(path: Path) -> Checkpoint:
    # The gguf package is needed for this format alone.
    from headrace.compile.gguf_checkpoint import GgufCheckpoint

    return GgufCheckpoint(path)
