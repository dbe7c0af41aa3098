"""Configs as data: what they say is the published model, and a plan can be made of each alone.

Counts of parameters are those that Hugging Face's API states for the repositories that the files
name as their sources (`safetensors.total`), or, where the file stores a tied head twice, that
`transformers` counts.
"""

import json
import math
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from headrace.compile.checkpoint import open_checkpoint
from headrace.compile.families.registry import describe, describe_config
from headrace.compile.families.wan_facts import component_shapes, read_wan
from headrace.compile.memory import parameters
from headrace.compile.pipeline import Order, compile_model, plan
from headrace.compile.published import ConfigFile, open_config, published_names
from headrace.compile.targets import TARGETS, default_precision, precisions
from headrace.deploy.cli import main
from headrace.serving.domain.artifact import Precision, Sharding
from headrace.serving.errors import (
    CheckpointUnreadable,
    InvalidRequest,
    ModelNotFound,
    UnsupportedModel,
)

LANGUAGE = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    # Its file has 751,632,384: the tied head is stored as well.
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-235b-a22b": 235_093_634_560,
}
UMT5_XXL, VAE_21, VAE_22 = 5_680_910_336, 126_892_531, 704_688_668
VIDEO = {
    "wan2.1-t2v-1.3b": [UMT5_XXL, 1_418_996_800, VAE_21],
    "wan2.1-t2v-14b": [UMT5_XXL, 14_288_491_584, VAE_21],
    "wan2.2-t2v-a14b": [UMT5_XXL, 14_288_491_584, 14_288_491_584, VAE_21],
    "wan2.2-ti2v-5b": [UMT5_XXL, 4_999_787_712, VAE_22],
}
QWEN3_8B = open_config("qwen3-8b").config
MIXTURE = open_config("qwen3-235b-a22b").config
WAN = open_config("wan2.2-ti2v-5b").config
FOUR = Sharding(tp=4)


def test_every_published_config_is_tested_here_and_names_its_source() -> None:
    assert set(published_names()) == LANGUAGE.keys() | VIDEO.keys()
    for name in published_names():
        assert str(open_config(name).config["_source"]).startswith("https://huggingface.co/")


@pytest.mark.parametrize(("name", "expected"), LANGUAGE.items())
def test_a_language_model_has_as_many_parameters_as_was_published(name: str, expected: int) -> None:
    """A wrong width, head count or layer count shows here, to the last parameter."""
    assert parameters(describe_config(open_config(name)).decoder) == expected


@pytest.mark.parametrize(("name", "expected"), VIDEO.items())
def test_a_wan_has_as_many_parameters_as_was_published(name: str, expected: list[int]) -> None:
    found = component_shapes(read_wan(open_config(name))).values()

    assert [sum(map(math.prod, shapes.values())) for shapes in found] == expected


@pytest.mark.parametrize(
    ("name", "tokens"), [("wan2.1-t2v-1.3b", 32_760), ("wan2.1-t2v-14b", 75_600)]
)
def test_a_clip_has_as_many_tokens_as_its_latent_has_patches(name: str, tokens: int) -> None:
    """81 frames are 21 latent ones; 832 x 480 is 30 x 52 patches, 1280 x 720 is 45 x 80."""
    assert read_wan(open_config(name)).tokens == tokens


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", published_names())
def test_every_config_is_planned_for_every_target(name: str, target: str, tmp_path: Path) -> None:
    """Four ranks, where the heads allow it, of devices that are large enough for fp32 of 235B."""
    sharding = Sharding(tp=2) if name == "qwen2.5-0.5b" else FOUR

    for precision in precisions(target):
        order = Order(
            source=name,
            precision=precision,
            target=target,
            sharding=sharding,
            is_config_only=True,
            device_bytes=300 * 10**9,
        )
        found = plan(order, home=tmp_path)
        assert len(found.fit.ranks) == sharding.ranks
        assert found.fits
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_plans_from_a_config_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Qwen3-32B over four H200: a quarter of 65.5 GB of bf16 each, 65,536 bytes of KV a token."""
    order = ["compile", "--config-only", "qwen3-32b", "--target", "h200", "--tp", "4", "--dry-run"]

    assert main([*order, "--json", "--home", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"][0].keys() == {
        "weight_bytes",
        "kv_bytes_per_token",
        "activation_bytes",
        "kv_tokens_max",
    }
    assert found["ranks"][0]["kv_bytes_per_token"] == 65_536
    assert found["fits"] is True
    assert (found["target"], found["precision"]) == ("h200", "bf16")
    assert [profile["name"] for profile in found["profiles"]] == [
        "prefill",
        "decode_2",
        "decode_8",
        "decode_32",
    ]
    assert found["plan_bytes"][0] > found["ranks"][0]["weight_bytes"]

    assert main([*order, "--home", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "ranks 0-3" in shown
    assert "rows 9 to 32, tokens 1" in shown
    assert "It fits." in shown


def test_stages_that_differ_are_shown_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = ["compile", "--config-only", "qwen3-235b-a22b", "--target", "h200", "--dry-run"]

    assert main([*order, "--tp", "4", "--pp", "2", "--home", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "ranks 0-3" in shown
    assert "ranks 4-7" in shown
    assert "SM90 has no MoE layer" in shown


def test_a_path_to_a_config_is_planned_as_a_name_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dict(QWEN3_8B)))

    for source in ("Qwen3-8B", str(tmp_path), str(tmp_path / "config.json")):
        order = Order(source=source, precision=Precision.BF16, target="h100", is_config_only=True)
        assert plan(order, home=tmp_path).fit.ranks[0].kv_bytes_per_token == 147_456


def test_a_config_alone_is_not_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("qwen3-32b", "wan2.1-t2v-14b"):
        assert main(["compile", "--config-only", name, "--home", str(tmp_path)]) == 3
        said = capsys.readouterr().err
        assert "known by its config alone" in said
        assert "--dry-run" in said
    assert main(["compile", "qwen3-32b", "--home", str(tmp_path)]) == 3
    assert "--config-only --dry-run" in capsys.readouterr().err


def test_a_name_that_was_not_published_lists_those_that_were() -> None:
    with pytest.raises(ModelNotFound, match=r"qwen3-32b.*wan2\.2-ti2v-5b"):
        open_config("qwen9-1t")


def test_a_pipeline_folder_is_refused_as_video(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')

    with pytest.raises(UnsupportedModel, match="cannot be built yet"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("target", "precision"),
    [("cpu", "bf16"), ("cpu", "fp8"), ("rtx", "int8"), ("h200", "fp32"), ("b200", "int8")],
)
def test_a_precision_that_a_target_does_not_serve_is_refused_with_the_list(
    target: str, precision: str, tmp_path: Path
) -> None:
    order = Order(
        source="qwen3-8b", precision=Precision(precision), target=target, is_config_only=True
    )

    with pytest.raises(InvalidRequest) as refusal:
        plan(order, home=tmp_path)
    assert ", ".join(precisions(target)) in refusal.value.why
    assert f"--precision {default_precision(target)}" in refusal.value.fix


@pytest.mark.parametrize(
    ("name", "sharding"),
    [
        pytest.param("qwen3-8b", Sharding(tp=3), id="heads by three"),
        pytest.param("qwen2.5-0.5b", FOUR, id="14 heads by four"),
        pytest.param("qwen3-8b", Sharding(pp=37), id="more stages than layers"),
        pytest.param("qwen3-235b-a22b", Sharding(tp=4, cp=2), id="one KV head a rank by two"),
        pytest.param("wan2.1-t2v-1.3b", Sharding(cp=8), id="12 heads by eight"),
        pytest.param("wan2.1-t2v-14b", Sharding(pp=2), id="a DiT in stages"),
    ],
)
def test_a_split_that_does_not_divide_is_refused(
    name: str, sharding: Sharding, tmp_path: Path
) -> None:
    order = Order(
        source=name,
        precision=Precision.BF16,
        target="h200",
        sharding=sharding,
        is_config_only=True,
    )

    with pytest.raises(InvalidRequest, match="cannot be split"):
        plan(order, home=tmp_path)


def test_a_mixture_is_mapped_to_the_tensors_that_transformers_saves(mixture: Path) -> None:
    decoder = describe(open_checkpoint(mixture)).decoder

    assert (decoder.experts, decoder.experts_per_token, decoder.expert_ffn) == (4, 2, 32)
    assert decoder.norm_topk
    assert decoder.qk_norm


def test_a_mixture_is_not_built_for_cpu(mixture: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"mixture of 4 experts.*dense models only"):
        compile_model(Order(source=str(mixture), precision=Precision.INT8), home=tmp_path)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("mixture")
    model: PreTrainedModel = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=64,
            head_dim=16,
            intermediate_size=96,
            moe_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=300,
        )
    )
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "refusal", "why"),
    [
        pytest.param(
            {"decoder_sparse_step": 2}, UnsupportedModel, "decoder_sparse_step", id="step"
        ),
        pytest.param({"mlp_only_layers": [0]}, UnsupportedModel, "mlp_only_layers", id="dense one"),
        pytest.param({"num_experts": None}, CheckpointUnreadable, "num_experts", id="no experts"),
        pytest.param(
            {"num_experts_per_tok": 129}, CheckpointUnreadable, "129 of 128", id="too few"
        ),
        pytest.param({"num_experts": 10**6}, CheckpointUnreadable, "experts each", id="absurd"),
    ],
)
def test_a_mixture_that_is_not_computed_is_refused_by_its_feature(
    changes: dict[str, object], refusal: type[Exception], why: str
) -> None:
    with pytest.raises(refusal, match=why):
        describe_config(ConfigFile(Path("config.json"), {**MIXTURE, **changes}))


@pytest.mark.parametrize(
    ("component", "changes", "refusal", "why"),
    [
        ("transformer", {"image_dim": 1280}, UnsupportedModel, "attends to images"),
        ("transformer", {"num_layers": 10**9}, CheckpointUnreadable, "num_layers"),
        ("transformer", {"patch_size": [1, 2]}, CheckpointUnreadable, "patch_size"),
        ("text_encoder", {"d_model": "wide"}, CheckpointUnreadable, "d_model"),
        ("vae", {"temperal_downsample": [True]}, CheckpointUnreadable, "temperal_downsample"),
    ],
)
def test_a_wan_config_that_cannot_be_read_is_refused(
    component: str, changes: dict[str, object], refusal: type[Exception], why: str
) -> None:
    config = {**WAN, component: {**WAN[component], **changes}}

    with pytest.raises(refusal, match=why):
        read_wan(ConfigFile(Path("model_index.json"), config))
