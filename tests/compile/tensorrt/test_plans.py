"""
Real plans of TensorRT-RTX, built here without a GPU: whole or not at all, and what they hold.

What cannot be done here is run them; `test_network_check.py` computes their networks instead.
"""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from headrace.compile import pipeline
from headrace.compile.checkpoint import open_checkpoint
from headrace.compile.families.registry import describe
from headrace.compile.pipeline import Built, Order, compile_model, locate, plan
from headrace.compile.progress import Silent
from headrace.compile.sharding import parts
from headrace.compile.tensorrt import build
from headrace.compile.tensorrt.build import BuildOrder, BuiltPlans, build_plans
from headrace.compile.tensorrt.builder import open_network
from headrace.compile.tensorrt.options import PlanOptions
from headrace.compile.tensorrt.profiles import default_profiles
from headrace.compile.tensorrt_memory import TensorRtFootprint
from headrace.serving.domain.artifact import Precision, Profile, Sharding, VerifyMethod
from headrace.serving.engine.loader import load_engine
from headrace.serving.errors import (
    ArtifactUnverified,
    DeviceUnsuitable,
    DoesNotFit,
    InvalidRequest,
    UnsupportedModel,
)

CONTEXT = 192


def qwen3() -> PreTrainedModel:
    """Eight heads, so that four are left to each of two ranks."""
    torch.manual_seed(7)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=128,
            head_dim=32,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=260,
            max_position_embeddings=256,
        )
    )
    for name, values in model.named_parameters():
        torch.nn.init.normal_(values, 1.0 if "norm" in name else 0.0, 0.2)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, save_model: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "qwen3-tiny"
    save_model(qwen3(), folder)
    return folder


def order(checkpoint: Path, *, sharding: Sharding | None = None) -> BuildOrder:
    return BuildOrder(
        checkpoint=checkpoint,
        decoder=describe(open_checkpoint(checkpoint)).decoder,
        sharding=sharding or Sharding(),
        precision=Precision.BF16,
        library="tensorrt_rtx",
        compute_capabilities=("8.9",),
        profiles=default_profiles(4, 64),
        cache_tokens=CONTEXT + 64,
    )


def built(wanted: BuildOrder, folder: Path, progress: Silent | None = None) -> BuiltPlans:
    footprint = TensorRtFootprint(wanted.precision, rows_max=4, chunk=64)
    held = [footprint.weight_bytes(part) for part in parts(wanted.decoder, wanted.sharding)]
    return build_plans(wanted, folder, weight_bytes=held, progress=progress or Silent())


def compiled(checkpoint: Path, home: Path, **changes: object) -> Built:
    wanted = Order(
        source=str(checkpoint),
        precision=Precision.BF16,
        target="rtx",
        context_tokens=CONTEXT,
        plans=PlanOptions(rows_max=8, chunk=64),
    )
    return compile_model(replace(wanted, **changes), home=home)


def network(folder: Path, rank: int) -> dict:
    return json.loads((folder / f"rank-{rank}.network.json").read_text())


def test_four_ranks_are_built_verified_and_not_served(checkpoint: Path, tmp_path: Path) -> None:
    """tp=2 x pp=2: four plans, whose networks together are the model; their engine was not run, so
    serving refuses them. The same order again does nothing.
    """
    made = compiled(checkpoint, tmp_path, sharding=Sharding(tp=2, pp=2))

    facts = made.manifest.tensorrt
    assert facts is not None
    assert [rank.layers for rank in facts.ranks] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    for rank in facts.ranks:
        assert (made.folder / rank.file).stat().st_size == rank.plan_bytes
    assert made.manifest.verification.method is VerifyMethod.NETWORK
    assert made.manifest.verification.logit_error < 0.05
    # Two sums a layer; the first stage adds embeddings up, the last gathers logits.
    summaries = [network(made.folder, rank)["summary"] for rank in range(4)]
    assert [each["collectives"] for each in summaries] == [3, 3, 3, 3]
    assert all(each["attentions"] == each["fused_attentions"] == 1 for each in summaries)
    with pytest.raises(ArtifactUnverified, match="network"):
        load_engine(made.folder)
    assert not compiled(checkpoint, tmp_path, sharding=Sharding(tp=2, pp=2)).is_new
    assert not (tmp_path / "builds" / made.manifest.artifact_id).exists()


@pytest.mark.parametrize(
    ("precision", "options", "type_name", "error_max"),
    [
        (Precision.FP8, {}, "DEQUANTIZE", 0.2),
        (Precision.FP8, {"activations": True}, "QUANTIZE", 0.3),
        (Precision.INT4, {}, "DEQUANTIZE", 0.85),
        (Precision.BF16, {"weight_streaming": True}, "ATTENTION_OUTPUT", 0.05),
    ],
    ids=["fp8", "fp8 inputs", "int4", "streamed"],
)
def test_every_precision_is_built_and_holds_what_it_says(
    precision: Precision,
    options: dict[str, bool],
    type_name: str,
    error_max: float,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    made = compiled(
        checkpoint,
        tmp_path,
        precision=precision,
        plans=PlanOptions(rows_max=8, chunk=64, **options),
    )

    facts, summary = made.manifest.tensorrt, network(made.folder, 0)["summary"]
    assert facts is not None
    assert made.manifest.verification.logit_error < error_max
    # Seven matrices in each of two layers; q, k, v share an input, and so do gate and up.
    expected = {"DEQUANTIZE": 14, "QUANTIZE": 8, "ATTENTION_OUTPUT": 2}[type_name]
    assert summary["types"][type_name] == expected
    assert summary["constant_bytes"] == facts.ranks[0].weight_bytes
    is_calibrated = precision is Precision.INT4 or "activations" in options
    assert bool(facts.calibration) is is_calibrated
    assert (made.folder / "calibration.json").is_file() is is_calibrated
    assert set(facts.flags) == set(options) - {"activations"}
    # Told to serve what was never run, the loader asks for the device that is not here.
    with pytest.raises(DeviceUnsuitable):
        load_engine(made.folder, allow_unverified=True)


class InterruptedAt(Silent):
    """Somebody presses Ctrl-C when a stage begins."""

    def __init__(self, title: str) -> None:
        self._title = title

    def stage(self, title: str) -> None:
        if title == self._title:
            raise KeyboardInterrupt


def test_an_interrupted_build_goes_on_with_the_rank_it_had_reached(
    checkpoint: Path, tmp_path: Path
) -> None:
    wanted = order(checkpoint, sharding=Sharding(tp=2))
    with pytest.raises(KeyboardInterrupt):
        built(wanted, tmp_path, InterruptedAt("build rank 2 of 2"))
    first = (tmp_path / "rank-0.plan").stat()
    assert not (tmp_path / "rank-1.plan").exists()

    found = built(wanted, tmp_path)

    assert (tmp_path / "rank-0.plan").stat().st_mtime_ns == first.st_mtime_ns
    assert [rank.rank for rank in found.ranks] == [0, 1]
    assert all((tmp_path / name).is_file() for name in found.files)


@pytest.mark.parametrize("name", ["rank-0.plan", "rank-0.network.json", "rank-0.done.json"])
def test_a_rank_that_was_damaged_since_is_built_again(
    name: str, checkpoint: Path, tmp_path: Path
) -> None:
    wanted = order(checkpoint)
    built(wanted, tmp_path)
    whole_bytes = (tmp_path / "rank-0.plan").stat().st_size
    damaged = tmp_path / name
    damaged.write_bytes(damaged.read_bytes()[:-10])

    built(wanted, tmp_path)

    assert (tmp_path / "rank-0.plan").stat().st_size == whole_bytes
    assert network(tmp_path, 0)["summary"]["attentions"] == 2


@pytest.mark.parametrize("name", ["calibration.json", "calibration-inputs.npz"])
def test_a_calibration_that_was_cut_off_is_measured_again(
    name: str, checkpoint: Path, tmp_path: Path
) -> None:
    plans = PlanOptions(rows_max=8, chunk=64, activations=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_verify", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compiled(checkpoint, tmp_path, precision=Precision.FP8, plans=plans)
    (work,) = (tmp_path / "builds").glob("*")
    (work / name).write_bytes((work / name).read_bytes()[:50])

    made = compiled(checkpoint, tmp_path, precision=Precision.FP8, plans=plans)

    assert made.manifest.verification.logit_error < 0.3


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


class KillsTheBuild(Silent):
    """The system takes the building process away, as it does when memory runs out."""

    def advance(self, *, done: float, total: float) -> None:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for child in children:
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            if b"build_worker" in command:
                os.kill(int(child), signal.SIGKILL)


def test_a_build_that_runs_out_of_memory_is_refused_and_leaves_no_plan(
    checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(DoesNotFit, match="was killed") as refusal:
        built(order(checkpoint), tmp_path, KillsTheBuild())

    assert "memory" in refusal.value.why
    assert not (tmp_path / "rank-0.plan").exists()


def test_a_build_too_large_for_this_machine_is_refused_before_it_starts(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "available_bytes", lambda: 100_000_000)

    with pytest.raises(DoesNotFit, match="100,000,000 are available"):
        built(order(checkpoint), tmp_path)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sizes", [{"rows_max": 0}, {"chunk": 1}, {"chunk": 2**20}], ids=str)
def test_sizes_that_make_no_engine_are_refused_before_anything_is_read(
    sizes: dict[str, int],
) -> None:
    with pytest.raises(InvalidRequest, match=r"--(rows-max|chunk) is"):
        PlanOptions(**sizes)


def test_a_profile_that_tensorrt_leaves_out_ends_the_build(
    checkpoint: Path, tmp_path: Path
) -> None:
    """TensorRT says so and goes on without it; serving would find one profile too few."""
    impossible = Profile(name="decode_0", rows=(1, 0, 0), tokens=(1, 1, 1))
    wanted = order(checkpoint)

    with pytest.raises(UnsupportedModel, match="does not take the profile 'decode_0'"):
        built(replace(wanted, profiles=(*wanted.profiles, impossible)), tmp_path)

    assert not (tmp_path / "rank-0.plan").exists()


def test_refitting_is_refused_where_the_library_cannot(checkpoint: Path, tmp_path: Path) -> None:
    """TensorRT 11 can, on a GPU: there every weight is marked, and no size."""
    with pytest.raises(UnsupportedModel, match="cannot be refitted"):
        compiled(checkpoint, tmp_path, plans=PlanOptions(rows_max=8, chunk=64, refit=True))

    net = open_network("tensorrt_rtx")
    bits = np.zeros((2, 64), np.uint16)
    net.constant("weights", bits, "bf16")
    net.constant("sizes", np.array([2, 64], np.int64))
    net.mark_refittable()
    assert net.definition.are_weights_marked_refittable("weights")
    assert not net.definition.are_weights_marked_refittable("sizes")


def test_attention_that_no_kernel_serves_is_refused_in_tensorrts_words(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Over four ranks each has two heads. It is never computed piece by piece instead."""
    with pytest.raises(UnsupportedModel, match="no fused attention for rank 0: 2 heads") as refusal:
        compiled(checkpoint, tmp_path, sharding=Sharding(tp=4))

    assert "not supported by a dedicated kernel" in refusal.value.why
    assert not any((tmp_path / "artifacts").glob("*"))
    assert not any((tmp_path / "names").glob("*"))


def test_a_context_that_no_kernel_serves_is_bounded_or_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    """TensorRT-RTX attends with one token to 22,528 places at most, a chunk of padding included."""
    config = json.loads((checkpoint / "config.json").read_text())
    long = tmp_path / "long"
    long.mkdir()
    for file in checkpoint.iterdir():
        (long / file.name).write_bytes(file.read_bytes())
    (long / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 131_072}))
    wanted = Order(source=str(long), precision=Precision.BF16, target="rtx")

    assert plan(wanted, home=tmp_path).cache_tokens == 22_528
    assert plan(replace(wanted, target="h200"), home=tmp_path).cache_tokens == 131_584
    with pytest.raises(InvalidRequest, match="context of 22,017"):
        plan(replace(wanted, context_tokens=22_017), home=tmp_path)


def test_a_cache_too_long_for_fused_decoding_is_refused_with_what_would_do(
    checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match="40,960 places") as refusal:
        built(replace(order(checkpoint), cache_tokens=40_960), tmp_path)

    assert "--context-tokens" in refusal.value.fix


@pytest.mark.model
def test_the_demo_model_is_built_within_its_bounds(compiled_home: Path, tmp_path: Path) -> None:
    """SmolLM2-135M: a minute and 2 GB at most, all attention fused, 3 % off the plan at most."""
    source = locate("smollm2-135m", home=compiled_home)
    decoder = replace(describe(open_checkpoint(source)).decoder, context_tokens=2_048)
    footprint = TensorRtFootprint(Precision.BF16)
    (part,) = parts(decoder, Sharding())
    wanted = replace(
        order(source),
        profiles=default_profiles(),
        cache_tokens=footprint.cache_tokens(decoder),
    )

    found = build_plans(
        wanted, tmp_path, weight_bytes=[footprint.weight_bytes(part)], progress=Silent()
    )

    assert found.seconds <= 60
    assert found.peak_rss_bytes <= 2 * 10**9
    (rank,) = found.ranks
    planned = footprint.plan_bytes(part, Sharding())
    assert rank.plan_bytes == pytest.approx(planned, rel=0.03)
    assert rank.plan_bytes + rank.activation_bytes == pytest.approx(
        planned + footprint.activation_bytes(part, Sharding()), rel=0.03
    )
    assert rank.weight_bytes == pytest.approx(footprint.weight_bytes(part), rel=1e-4)
    summary = network(tmp_path, 0)["summary"]
    assert summary["attentions"] == summary["fused_attentions"] == 30
