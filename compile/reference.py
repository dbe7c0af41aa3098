"""The reference: `transformers`, in fp32, reading the same checkpoint with its own code."""

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import cast

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from headrace.compile.tensors import Array, Checkpoint, Config, unreadable

NAME = f"transformers {version('transformers')}, fp32"


def reference_logits(checkpoint: Checkpoint, prompts: Sequence[Sequence[int]]) -> Iterator[Array]:
    """Yield, for each prompt, the logits (tokens, vocab) float32 of all its positions.

    Raises:
        CheckpointUnreadable: transformers does not accept the checkpoint.
    """
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        model = _of_file(checkpoint) if checkpoint.path.is_file() else _of_folder(checkpoint)
    except (OSError, ValueError, RuntimeError) as error:
        raise unreadable(
            checkpoint.path, f"transformers, the reference, refuses it: {error}."
        ) from error
    finally:
        if shown:
            transformers.logging.enable_progress_bar()
    model.eval()
    for prompt in prompts:
        with torch.inference_mode():
            yield model(input_ids=torch.tensor([list(prompt)])).logits[0].float().numpy()


def _of_folder(checkpoint: Checkpoint) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        checkpoint.path,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )


def _of_file(checkpoint: Checkpoint) -> PreTrainedModel:
    """A GGUF file: transformers' computation over the tensors as our reader states them.

    Its own GGUF reader wants another package and knows fewer files; ours is compared with it, and
    with the converter's source, in the tests.
    """
    stated = dict(checkpoint.config)
    kind, _ = str(stated.pop("model_type")), stated.pop("architectures")
    rope = dict(cast("Config", stated["rope_parameters"]))
    divisors = rope.pop("divisors", None)
    if divisors is not None:
        stated["rope_parameters"] = rope | {"rope_type": "default"}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **stated), dtype=torch.float32
    )
    tensors = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.shapes}
    missing, unknown = model.load_state_dict(tensors, strict=False)
    if unknown or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"its tensors and transformers' differ: {[*missing, *unknown][0]}")
    model.tie_weights()
    if divisors is not None:
        model.model.rotary_emb.inv_freq /= torch.tensor(divisors)
    return model
