"""An artifact for the TensorRT engine whose plans are those of `fake_tensorrt.py`."""

import hashlib
from dataclasses import replace
from pathlib import Path

from headrace.serving.domain.artifact import (
    MANIFEST_FILE,
    Manifest,
    Precision,
    Profile,
    RankPlan,
    Sharding,
    TensorRt,
)
from headrace.serving.engine.plan_io import plan_file
from headrace.serving.testing.fake_decoder import FakeDecoder
from headrace.serving.testing.fake_tensorrt import VERSION, FakePlan
from headrace.serving.testing.signing import sign_artifact
from headrace.serving.testing.tiny_artifact import tiny_manifest

LAYERS = 3
CACHE_TOKENS = 64
CHUNK = 16
"""Of the longest chunk; sequences are as long as the rest of a cache."""

_BUCKETS = ((1, 1), (2, 4), (5, 8))


def fake_manifest(
    *,
    sharding: Sharding | None = None,
    vocab: int | None = None,
    flags: tuple[str, ...] = (),
) -> Manifest:
    """A manifest of `LAYERS` layers for up to 8 rows; chunks have a short and a long profile."""
    sharding = sharding or Sharding()
    cp = sharding.cp

    def up(number: int) -> int:
        return -(-number // cp) * cp

    chunks = [
        Profile(name=f"prefill_{most}", rows=(1, 1, 1), tokens=(up(least), most, most))
        for least, most in ((2, 4), (5, CHUNK))
    ]
    decode = [
        Profile(name=f"decode_{most}", rows=(up(least), up(most), up(most)), tokens=(1, 1, 1))
        for least, most in _BUCKETS
    ]
    bounds = [round(stage * LAYERS / sharding.pp) for stage in range(sharding.pp + 1)]
    stages = [sharding.place(rank)[0] for rank in range(sharding.ranks)]
    manifest = tiny_manifest()
    decoder = replace(
        manifest.decoder,
        layers=LAYERS,
        kv_heads=2,
        head_dim=16,
        vocab=vocab or manifest.decoder.vocab,
    )
    return replace(
        manifest,
        target="h200",
        precision=Precision.BF16,
        engine="tensorrt",
        decoder=decoder,
        tensorrt=TensorRt(
            library="tensorrt",
            version=VERSION,
            compute_capabilities=("9.0",),
            cache_tokens=CACHE_TOKENS,
            profiles=(*chunks, *decode),
            sharding=sharding,
            ranks=tuple(
                RankPlan(
                    rank=rank,
                    file=plan_file(rank),
                    plan_bytes=1000,
                    weight_bytes=1000,
                    layers=(bounds[stage], bounds[stage + 1]),
                )
                for rank, stage in enumerate(stages)
            ),
            flags=flags,
        ),
    )


def fake_decoder(manifest: Manifest) -> FakeDecoder:
    facts = manifest.decoder
    return FakeDecoder(
        vocab=facts.vocab, hidden=facts.hidden, kv_heads=facts.kv_heads, head_dim=facts.head_dim
    )


def fake_plan(manifest: Manifest, rank: int) -> FakePlan:
    """The plan that fits the manifest."""
    facts = manifest.tensorrt
    assert facts is not None
    stage, _, _ = facts.sharding.place(rank)
    first, last = facts.ranks[rank].layers
    tp = facts.sharding.tp
    return FakePlan(
        decoder=fake_decoder(manifest),
        first_layer=first,
        last_layer=last,
        cache_tokens=facts.cache_tokens,
        profiles=facts.profiles,
        is_first=stage == 0,
        is_last=stage == facts.sharding.pp - 1,
        has_collectives=tp * facts.sharding.cp > 1,
        cp=facts.sharding.cp,
        logits_width=-(-manifest.decoder.vocab // tp) * tp,
    )


def write_fake_artifact(folder: Path, manifest: Manifest) -> Manifest:
    """Write and sign plans and manifest; the manifest as written, with the files' hashes."""
    facts = manifest.tensorrt
    assert facts is not None
    hashes: dict[str, str] = {}
    for ranked in facts.ranks:
        content = fake_plan(manifest, ranked.rank).to_bytes()
        (folder / ranked.file).write_bytes(content)
        hashes[ranked.file] = hashlib.sha256(content).hexdigest()
    written = replace(manifest, files=hashes)
    (folder / MANIFEST_FILE).write_text(written.to_json(), "utf-8")
    sign_artifact(folder)
    return written
