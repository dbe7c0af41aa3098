"""A store with artifacts put into it that are small, signed, and never loaded."""

import hashlib
from dataclasses import replace
from pathlib import Path

from headrace.compile.artifact_writer import UNVERIFIED, write_manifest
from headrace.compile.names_index import Version
from headrace.compile.signing import signing_key
from headrace.compile.store import Store
from headrace.serving.domain.artifact import (
    Decoder,
    Manifest,
    Precision,
    RankPlan,
    Sharding,
    TensorRt,
)

DECODER = Decoder(
    layers=1,
    hidden=32,
    heads=2,
    kv_heads=1,
    head_dim=16,
    ffn=32,
    vocab=64,
    rms_eps=1e-5,
    qkv_bias=False,
    qk_norm=False,
    tied=True,
    context_tokens=64,
)


def manifest(model: str, precision: Precision, digit: str) -> Manifest:
    return Manifest(
        artifact_id=digit * 64,
        model=model,
        family="qwen",
        target="cpu",
        precision=precision,
        engine="native",
        decoder=DECODER,
        eos_token_ids=(1,),
        bos_token_id=None,
        weight_bytes=1,
        verification=UNVERIFIED,
        source="file://x",
    )


def split(stated: Manifest, *, tp: int) -> Manifest:
    """The same as a TensorRT build over so many ranks."""
    ranks = tuple(
        RankPlan(rank=rank, file=f"rank-{rank}.plan", plan_bytes=1, weight_bytes=1, layers=(0, 1))
        for rank in range(tp)
    )
    facts = TensorRt(
        library="tensorrt_rtx",
        version="1.7.1.116",
        compute_capabilities=("8.9",),
        cache_tokens=64,
        profiles=(),
        sharding=Sharding(tp=tp),
        ranks=ranks,
    )
    return replace(stated, target="rtx", engine="tensorrt", tensorrt=facts)


class Shelf:
    """A home, and verbs to fill it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.store = Store(home)

    def put(
        self, model: str, precision: Precision = Precision.INT8, digit: str = "a", **files: bytes
    ) -> Path:
        """Build and register `model`; `files` are its content by name, dots as underscores."""
        return self.put_manifest(manifest(model, precision, digit), **files)

    def put_manifest(self, stated: Manifest, **files: bytes) -> Path:
        folder = self.store.folder(stated.artifact_id)
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        stated = write_manifest(folder, replace(stated, files=hashes), UNVERIFIED)
        signing_key(self.home).sign(folder)
        self.store.register(stated)
        return folder

    def versions(self, model: str) -> list[Version]:
        return list(self.store.index(model).versions)

    def current(self, model: str, variant: str = "cpu/int8") -> int | None:
        found = self.store.index(model).current(variant)
        return None if found is None else found.version
