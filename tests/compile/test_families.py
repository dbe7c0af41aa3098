"""What a config means: RoPE variants as `transformers` computes them, and refusals by feature."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from headrace.compile.checkpoint import open_checkpoint
from headrace.compile.families.registry import describe
from headrace.compile.families.rope import rope
from headrace.serving.errors import CheckpointUnreadable, UnsupportedModel

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32_768,
}


@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param({"rope_type": "default", "rope_theta": 100_000.0}, id="default"),
        pytest.param({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}, id="linear"),
        pytest.param(LLAMA3, id="llama3"),
        pytest.param(YARN, id="yarn"),
        pytest.param({**YARN, "beta_fast": 16, "beta_slow": 2}, id="yarn with its betas"),
        pytest.param({**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}, id="yarn with mscales"),
        pytest.param({**YARN, "attention_factor": 1.25}, id="yarn with its own factor"),
        pytest.param({**YARN, "truncate": False}, id="yarn that does not round"),
    ],
)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_rope_is_what_transformers_computes(parameters: dict[str, object], head_dim: int) -> None:
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=131_072,
        rope_parameters=dict(parameters),
    )
    theirs = LlamaRotaryEmbedding(config)

    ours = rope({"rope_parameters": parameters}, head_dim=head_dim, context_tokens=131_072)

    np.testing.assert_allclose(ours.inv_freq, theirs.inv_freq.numpy(), rtol=1e-6)
    assert ours.scale == pytest.approx(theirs.attention_scaling, rel=1e-12)
    assert ours.inv_freq.dtype == np.float32


def test_both_spellings_of_rope_mean_the_same() -> None:
    """transformers before 5 wrote rope_scaling and rope_theta; most checkpoints still do."""
    old = {
        "rope_theta": 1_000_000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32_768,
        },
    }

    before = rope(old, head_dim=128, context_tokens=32_768)
    after = rope({"rope_parameters": YARN}, head_dim=128, context_tokens=32_768)

    np.testing.assert_array_equal(before.inv_freq, after.inv_freq)
    assert before.scale == after.scale
    assert before.context_tokens == 131_072


@pytest.mark.parametrize(
    ("parameters", "feature"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic'"),
        ({"rope_type": "longrope", "long_factor": [1.0]}, "'longrope'"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial rotary"),
        ({"full_attention": {"rope_type": "default"}}, "differ between layers"),
    ],
)
def test_rope_that_we_do_not_compute_is_named(parameters: dict[str, object], feature: str) -> None:
    with pytest.raises(UnsupportedModel, match=feature):
        rope({"rope_parameters": parameters}, head_dim=64, context_tokens=4096)


@pytest.fixture
def changed(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Answer a copy of a variant whose config says something else."""

    def change(variant: str, **changes: object) -> Path:
        source = checkpoint(variant)
        config = json.loads((source / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
        return tmp_path

    return change


@pytest.mark.parametrize(
    ("variant", "changes", "feature"),
    [
        ("mistral", {"sliding_window": 4096}, "sliding-window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "sliding-window"),
        ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ("llama", {"mlp_bias": True}, "bias in the MLP"),
        ("llama", {"hidden_act": "gelu"}, "'gelu'"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantised already"),
        ("llama", {"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ("llama with biases", {"attention_bias": False}, r"self_attn\.\w_proj\.bias"),
    ],
)
def test_features_that_change_the_computation_are_refused(
    variant: str, changes: dict[str, object], feature: str, changed: Callable[..., Path]
) -> None:
    with pytest.raises(UnsupportedModel, match=feature):
        describe(open_checkpoint(changed(variant, **changes)))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        pytest.param({"hidden_size": 128}, "shape", id="another width"),
        pytest.param({"num_hidden_layers": 3}, "missing", id="more layers than there are"),
        pytest.param({"num_hidden_layers": 10**9}, "layers", id="absurdly many layers"),
        pytest.param({"num_hidden_layers": None}, "num_hidden_layers", id="no layers"),
        pytest.param({"num_attention_heads": "4"}, "num_attention_heads", id="text for a number"),
        pytest.param({"num_key_value_heads": 3}, "share", id="heads that do not divide"),
        pytest.param({"rms_norm_eps": -1.0}, "rms_norm_eps", id="a negative epsilon"),
        pytest.param({"architectures": []}, "architectures", id="no architecture"),
        pytest.param(
            {"rope_parameters": {"rope_type": "linear"}}, "factor", id="rope without its factor"
        ),
    ],
)
def test_a_config_that_contradicts_its_weights_is_refused(
    changes: dict[str, object], why: str, changed: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointUnreadable, match=why):
        describe(open_checkpoint(changed("llama", **changes)))
