"""The manifest: written by compile, read strictly by serving."""

import json

import pytest

from headrace.serving.domain.artifact import Decoder, Manifest, Precision, Verification
from headrace.serving.errors import ArtifactTampered

MANIFEST = Manifest(
    artifact_id="ab" * 32,
    model="m",
    family="qwen",
    target="cpu",
    precision=Precision.INT8,
    engine="native",
    decoder=Decoder(
        layers=2,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        ffn=128,
        vocab=256,
        rms_eps=1e-5,
        qkv_bias=False,
        qk_norm=False,
        tied=True,
        context_tokens=512,
    ),
    eos_token_ids=(2,),
    bos_token_id=None,
    reasoning_token_ids=(7, 8),
    weight_bytes=1,
    verification=Verification(
        reference="r",
        tokens=10,
        max_abs_error=0.1,
        top1_agreement=1.0,
        perplexity=10.1,
        perplexity_reference=10.0,
        tolerance="t",
    ),
    source="s",
    files={"weights": "00"},
)


def test_what_was_written_is_what_is_read():
    assert Manifest.from_json(MANIFEST.to_json(), where="here") == MANIFEST


def test_facts_that_follow_from_others_are_computed():
    """2 (key, value) * 2 layers * 2 kv heads * 16 numbers; 10.1 / 10 is one per cent more."""
    assert MANIFEST.decoder.kv_values_per_token == 128
    assert MANIFEST.verification.perplexity_delta == pytest.approx(0.01)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"manifest_version": 1}, id="another version"),
        pytest.param({"surprise": 1}, id="an unknown field"),
        pytest.param({"precision": "int7"}, id="an unknown precision"),
        pytest.param({"decoder": {"layers": 1}}, id="a decoder without its facts"),
        pytest.param({"decoder": 3}, id="a number for a decoder"),
        pytest.param({"weight_bytes": "1"}, id="text for a number"),
        pytest.param({"weight_bytes": True}, id="a yes for a number"),
        pytest.param({"model": 7}, id="a number for text"),
        pytest.param({"eos_token_ids": ["x"]}, id="a token id that is text"),
    ],
)
def test_a_manifest_that_is_not_exactly_ours_is_refused(change):
    text = json.dumps(json.loads(MANIFEST.to_json()) | change)

    with pytest.raises(ArtifactTampered) as refusal:
        Manifest.from_json(text, where="the folder")

    assert "the folder" in refusal.value.what


@pytest.mark.parametrize("text", ["", "[]", "null", '"x"', "{", "{}"])
def test_text_that_is_no_manifest_is_refused(text):
    with pytest.raises(ArtifactTampered):
        Manifest.from_json(text, where="here")
