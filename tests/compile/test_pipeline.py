"""
A checkpoint goes in, an artifact comes out, and it computes what `transformers` computes.

Every architecture variant is compiled from a small random checkpoint, loaded as serving loads it,
and asked for the same tokens. The bad inputs after that leave nothing behind.
"""

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from headrace.compile import builder, pipeline, verify
from headrace.compile.memory import weight_bytes
from headrace.compile.pipeline import Built, Order, compile_model, plan
from headrace.compile.store import Store
from headrace.serving.domain.artifact import Precision
from headrace.serving.engine.base import Engine, Row
from headrace.serving.engine.loader import load_engine
from headrace.serving.engine.native_weights import source_shapes
from headrace.serving.errors import (
    ArtifactTampered,
    CheckpointUnreadable,
    DoesNotFit,
    OutsideTolerance,
    StorageFull,
    UnsupportedModel,
)

VARIANTS = (
    "llama",
    "llama tied",
    "llama without GQA, wide heads",
    "llama with biases",
    "llama linear rope",
    "llama llama3 rope",
    "llama yarn",
    "mistral",
    "qwen2",
    "qwen3",
)
PROMPT = list(b"The wheel turns as long as the water comes down the race, and no longer.")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def build(checkpoint: Callable[[str], Path], home: Path) -> Callable[..., Built]:
    @cache
    def once(variant: str, precision: Precision = Precision.FP32) -> Built:
        return compile_model(Order(source=str(checkpoint(variant)), precision=precision), home=home)

    return once


@pytest.fixture
def empty_home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def reference(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Sequences:
    """Prompts that an engine continues greedily, side by side."""

    def __init__(self, engine: Engine, prompts: list[list[int]]) -> None:
        self.engine = engine
        self.tokens = [list(prompt) for prompt in prompts]
        self.computed = [0] * len(prompts)
        each = -(-256 // engine.limits.kv_block_tokens)
        self.blocks = [list(range(n * each, (n + 1) * each)) for n in range(len(prompts))]

    def step(self, chunk_tokens: int) -> None:
        """Feed each at most `chunk_tokens` of what it has not computed yet."""
        rows: list[Row] = []
        for tokens, done, blocks in zip(self.tokens, self.computed, self.blocks, strict=True):
            fed = tokens[done : done + chunk_tokens]
            rows.append(Row(fed, done, blocks, samples=done + len(fed) == len(tokens)))
        logits = iter(self.engine.step(rows))
        for n, row in enumerate(rows):
            self.computed[n] += len(row.token_ids)
            if row.samples:
                self.tokens[n].append(int(np.argmax(next(logits))))

    def generate(self, count: int, *, chunk_tokens: int = 256) -> list[list[int]]:
        starts = [len(tokens) for tokens in self.tokens]
        while any(len(t) < s + count for t, s in zip(self.tokens, starts, strict=True)):
            self.step(chunk_tokens)
        return [t[s : s + count] for t, s in zip(self.tokens, starts, strict=True)]


def generated(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_answers_token_for_token_as_transformers(
    variant: str, build: Callable[..., Built], checkpoint: Callable[[str], Path]
) -> None:
    """Alone, in a batch with others of other lengths, and with its prompt cut into chunks."""
    model = reference(checkpoint(variant))
    prompts = [PROMPT, PROMPT[:9], PROMPT[20:21], PROMPT[::-1]]
    expected = [generated(model, prompt, 24) for prompt in prompts]
    engine, manifest = load_engine(
        build(variant).folder, rows_max=4, batch_tokens_max=256, kv_tokens=1024
    )

    assert Sequences(engine, [PROMPT]).generate(24) == expected[:1]
    assert Sequences(engine, prompts).generate(24) == expected
    assert Sequences(engine, prompts).generate(24, chunk_tokens=7) == expected
    assert manifest.verification.max_abs_error < 2e-3
    assert manifest.verification.top1_agreement == 1.0


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4])
@pytest.mark.parametrize("variant", ["llama tied", "llama yarn", "qwen2", "qwen3"])
def test_quantised_builds_stay_inside_their_tolerance(
    variant: str, precision: Precision, build: Callable[..., Built]
) -> None:
    built = build(variant, precision)

    assert built.manifest.engine == "native"
    assert built.manifest.verification.logit_error <= verify.TOLERANCES[precision].logit_error_max
    assert built.manifest.weight_bytes == weight_bytes(
        source_shapes(built.manifest.decoder), precision
    )


def test_shards_and_half_precision_read_as_one_checkpoint(
    make_model: Callable[[str], PreTrainedModel],
    save_model: Callable[..., None],
    empty_home: Path,
    tmp_path: Path,
) -> None:
    """Large models come as several files in bfloat16; ours read them one tensor at a time."""
    folder = tmp_path / "sharded"
    save_model(make_model("llama").to(torch.bfloat16), folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1

    built = compile_model(Order(source=str(folder), precision=Precision.FP32), home=empty_home)

    assert built.manifest.verification.top1_agreement == 1.0


def test_the_artifact_carries_what_serving_needs(build: Callable[..., Built]) -> None:
    built = build("llama")

    manifest = built.manifest
    config = json.loads((built.folder / "tokenizer_config.json").read_text())
    assert manifest.eos_token_ids == (256,)
    assert manifest.reasoning_token_ids == (258, 259)
    assert manifest.model == "llama"
    assert "messages" in config["chat_template"]
    assert {"decoder.onnx", "decoder.onnx.data", "tokenizer.json"} <= manifest.files.keys()


def test_the_same_input_is_built_once(build: Callable[..., Built], home: Path) -> None:
    first = build("llama")
    source = first.manifest.source.removeprefix("file://")

    second = compile_model(Order(source=source, precision=Precision.FP32), home=home)

    assert not second.is_new
    assert second.folder == first.folder
    assert Store(home).resolve("llama", Precision.FP32) == first.folder


def test_a_damaged_build_is_built_again(
    checkpoint: Callable[[str], Path], empty_home: Path
) -> None:
    order = Order(source=str(checkpoint("llama")), precision=Precision.FP32)
    built = compile_model(order, home=empty_home)
    graph = built.folder / "decoder.onnx.data"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\x7f")

    with pytest.raises(ArtifactTampered, match=r"decoder\.onnx\.data"):
        load_engine(built.folder)
    assert compile_model(order, home=empty_home).is_new
    load_engine(built.folder)[0].close()


def test_a_build_that_was_killed_is_built_again(
    checkpoint: Callable[[str], Path], empty_home: Path
) -> None:
    """Power was lost after half of the files: what is in the way is removed, not served."""
    order = Order(source=str(checkpoint("qwen2")), precision=Precision.INT8)
    built = compile_model(order, home=empty_home)
    leaving = built.folder.parent / f".{built.folder.name}.killed"
    built.folder.rename(leaving)

    with pytest.raises(ArtifactTampered, match="is gone"):
        Store(empty_home).resolve("qwen2")
    assert compile_model(order, home=empty_home).is_new
    assert not leaving.exists()


def test_two_compiles_at_once_build_once(
    checkpoint: Callable[[str], Path], empty_home: Path
) -> None:
    command = [sys.executable, "-m", "headrace.deploy.cli", "compile", str(checkpoint("qwen3"))]
    command += ["--precision", "int4", "--home", str(empty_home), "--json"]

    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [json.loads(one.communicate(timeout=120)[0]) for one in both]

    assert sorted(answer["is_new"] for answer in said) == [False, True]
    assert said[0]["folder"] == said[1]["folder"]
    load_engine(Path(said[0]["folder"]))[0].close()


def left_behind(home: Path) -> list[str]:
    """What a failed build leaves, but for its lock and the home's key."""
    kept = {"locks", "keys", "trust"}
    return [str(path) for path in home.rglob("*") if path.is_file() and not kept & {*path.parts}]


def test_outside_the_tolerance_nothing_is_written(
    checkpoint: Callable[[str], Path], empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that computes something else must not become an artifact, whatever its speed."""
    right = builder.Weights.__getitem__

    def wrong(self: builder.Weights, name: str) -> np.ndarray:
        return right(self, name) * (1.1 if name.endswith(".q") else 1.0)

    monkeypatch.setattr(builder.Weights, "__getitem__", wrong)
    order = Order(source=str(checkpoint("llama")), precision=Precision.FP32)

    with pytest.raises(OutsideTolerance, match="top-1"):
        compile_model(order, home=empty_home)
    assert left_behind(empty_home) == []


def test_a_full_disk_is_refused_and_leaves_nothing(
    checkpoint: Callable[[str], Path], empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pipeline, "write_artifact", full)

    with pytest.raises(StorageFull, match="HEADRACE_HOME"):
        compile_model(
            Order(source=str(checkpoint("llama")), precision=Precision.FP32), home=empty_home
        )
    assert left_behind(empty_home) == []


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_a_file_that_may_not_grow_is_a_full_disk(
    precision: Precision, checkpoint: Callable[[str], Path], empty_home: Path
) -> None:
    """The real writers, in a process whose files are limited to 64 KB."""
    command = [sys.executable, "-m", "headrace.deploy.cli", "compile", str(checkpoint("llama"))]
    command += ["--precision", precision.value, "--home", str(empty_home), "--json"]
    limit = 64 * 1024

    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )

    assert ended.returncode == 3, ended.stderr
    assert "Free space on that disk" in ended.stderr
    assert left_behind(empty_home) == []


def test_what_does_not_fit_is_refused_before_anything_is_built(
    checkpoint: Callable[[str], Path], empty_home: Path
) -> None:
    order = Order(source=str(checkpoint("llama")), precision=Precision.FP32, device_bytes=1_000_000)

    assert not plan(order, home=empty_home).fits
    with pytest.raises(DoesNotFit, match="a device of"):
        compile_model(order, home=empty_home)
    assert left_behind(empty_home) == []


@pytest.mark.parametrize(
    ("source", "refusal"),
    [
        pytest.param("hf://owner/name", UnsupportedModel, id="a hub is not reached"),
        pytest.param("file:///nowhere", CheckpointUnreadable, id="nothing there"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(
    source: str, refusal: type[Exception], empty_home: Path
) -> None:
    with pytest.raises(refusal):
        compile_model(Order(source=source, precision=Precision.INT8), home=empty_home)


def test_a_target_without_its_builder_is_refused(empty_home: Path) -> None:
    order = Order(source="x", precision=Precision.BF16, target="h200")

    with pytest.raises(UnsupportedModel, match="cannot be imported"):
        compile_model(order, home=empty_home)
