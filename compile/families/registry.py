"""The families there are, and which one a checkpoint belongs to."""

from collections.abc import Sequence

from headrace.compile.families.base import Family, Model
from headrace.compile.families.qwen import ARCHITECTURES, QwenFamily
from headrace.compile.tensors import Checkpoint
from headrace.serving.errors import UnsupportedModel

FAMILIES: Sequence[Family] = (QwenFamily(),)


def describe(checkpoint: Checkpoint) -> Model:
    """State what the checkpoint is, from its config and headers; no weight is read.

    Raises:
        UnsupportedModel: no family compiles it.
        CheckpointUnreadable: config and tensors contradict each other.
    """
    for family in FAMILIES:
        if model := family.describe(checkpoint):
            return model
    raise UnsupportedModel(
        f"The checkpoint {checkpoint.path} holds {checkpoint.config.get('architectures')!r}.",
        why="No family here compiles this architecture.",
        fix=f"Compile one of {', '.join(sorted(ARCHITECTURES))}.",
    )
