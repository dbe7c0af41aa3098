"""The runtime's buffers and the builder's network together: the answer of `transformers`.

The engine class that serves is loaded over the fake device and library; what a run computes is the
real network, layer by layer on the CPU, on the memory that the engine bound for it. So inputs,
outputs, caches and padding mean the same to both sides of `plan_io.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from transformers import PreTrainedModel

from headrace.compile.checkpoint import open_checkpoint
from headrace.compile.families.registry import describe
from headrace.compile.reference import reference_logits
from headrace.compile.tensorrt.interpreter import Interpreter
from headrace.compile.tensorrt.profiles import default_profiles
from headrace.compile.verify import verify
from headrace.serving.domain.artifact import Precision, Sharding, VerifyMethod
from headrace.serving.engine import plan_io
from headrace.serving.engine.tensorrt import TensorRtEngine
from headrace.serving.testing.fake_artifact import fake_manifest, write_fake_artifact
from headrace.serving.testing.fake_device import FakeDevice
from headrace.serving.testing.fake_tensorrt import FakePlan, FakeTensorRt, View

PROMPTS = [list(b"The wheel turned all night, and"), list(b"in August it hung still"), [7, 8]]
ROWS, CHUNK = 8, 16


class OnMemory:
    """Runs a network on the arrays that a context is bound to."""

    def __init__(self, interpreter: Interpreter) -> None:
        self._interpreter = interpreter

    def __call__(self, plan: FakePlan, view: View) -> None:
        given = {name: self._tensor(view(name)) for name in self._interpreter.inputs}
        made = self._interpreter.run(given)
        view(plan_io.LOGITS)[:] = made[plan_io.LOGITS].numpy()

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def test_the_engine_that_serves_computes_what_was_built(
    tmp_path: Path,
    make_model: Callable[[str], PreTrainedModel],
    save_model: Callable[..., None],
    functions: ModuleType,
) -> None:
    """Decoding side by side in buckets with idle places, and prompts in chunks of both kinds."""
    model = make_model("qwen3")
    with torch.no_grad():
        for values in model.parameters():
            values.copy_(values.bfloat16())
    save_model(model, tmp_path)
    network, constants = functions.decoder_network(tmp_path, Sharding(), 0)
    interpreter = Interpreter(network, exact=False, constants=constants)
    decoder = describe(open_checkpoint(tmp_path)).decoder
    places = interpreter.inputs[plan_io.past("k", 0)].shape[2]
    manifest = fake_manifest(vocab=decoder.vocab)
    assert manifest.tensorrt is not None
    facts = replace(
        manifest.tensorrt,
        cache_tokens=places,
        profiles=default_profiles(ROWS, CHUNK),
        ranks=(replace(manifest.tensorrt.ranks[0], layers=(0, decoder.layers)),),
    )
    manifest = write_fake_artifact(tmp_path, replace(manifest, decoder=decoder, tensorrt=facts))
    device = FakeDevice()
    engine = TensorRtEngine(
        tmp_path,
        manifest,
        rows_max=ROWS,
        batch_tokens_max=64,
        kv_tokens=ROWS * places,
        threads=1,
        device=device,
        library=FakeTensorRt(device, OnMemory(interpreter)),
    )

    found = verify(
        engine,
        PROMPTS,
        reference_logits(open_checkpoint(tmp_path), PROMPTS),
        precision=Precision.BF16,
        reference="transformers",
    )
    engine.close()

    assert found.method is VerifyMethod.ENGINE
    assert found.logit_error < 0.03
    assert device.left_over == []
