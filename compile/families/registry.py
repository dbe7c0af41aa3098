"""The families there are, and which one a checkpoint or a config belongs to."""

from collections.abc import Sequence

from headrace.compile.families.base import Family, Model
from headrace.compile.families.qwen import ARCHITECTURES, QwenFamily
from headrace.compile.tensors import Checkpoint, Described
from headrace.serving.errors import UnsupportedModel

FAMILIES: Sequence[Family] = (QwenFamily(),)


def describe(checkpoint: Checkpoint) -> Model:
    """State what the checkpoint is, from its config and headers; no weight is read.

    Raises:
        UnsupportedModel: no family compiles it.
        CheckpointUnreadable: config and tensors contradict each other.
    """
    family, model = _stated(checkpoint)
    family.check(checkpoint, model)
    return model


def describe_config(source: Described) -> Model:
    """State what a model is that only its config is known of.

    Raises:
        UnsupportedModel: no family compiles it.
        CheckpointUnreadable: the config is incomplete or contradicts itself.
    """
    return _stated(source)[1]


def _stated(source: Described) -> tuple[Family, Model]:
    for family in FAMILIES:
        if model := family.state(source):
            return family, model
    raise UnsupportedModel(
        f"The model {source.path} is {source.config.get('architectures')!r}.",
        why="No family here compiles this architecture.",
        fix=f"Compile one of {', '.join(sorted(ARCHITECTURES))}.",
    )
