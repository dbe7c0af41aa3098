"""TensorRT engines on this card: built, compared with `transformers` on the CPU, timed.

The build is `headrace compile <checkpoint> --target <target> --precision bf16`, called in process.
What is loaded is the artifact that serving would load, through the same loader.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from headrace.compile.checkpoint import open_checkpoint
from headrace.compile.pipeline import Order, compile_model
from headrace.compile.tensorrt.options import PlanOptions
from headrace.compile.verify import verify
from headrace.deploy.bench import random_checkpoint
from headrace.serving.domain.artifact import Decoder, Manifest, Precision
from headrace.serving.engine.base import Engine, Row
from headrace.serving.engine.loader import load_engine, read_manifest
from headrace.serving.errors import DoesNotFit, ServingError

ROWS = (1, 8, 32, 64)
CONTEXTS = (512, 2048)
CHUNKS = (128, 512)
CONTEXT_TOKENS = 3584
"""With the longest chunk 4,096 places a row: 30 GB of caches for 64 rows of Qwen3-0.6B."""
REPEATS = 20
PROMPTS, PROMPT_TOKENS = 8, 64
CACHE_VALUE_BYTES = 2

TARGETS = {"9.0": ("h200", "tensorrt"), "10.0": ("b200", "tensorrt")}
"""By compute capability; the plan for h200 is the one for h100."""
RTX = ("rtx", "tensorrt_rtx")
RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is built."""

    name: str
    source: str
    """A checkpoint's folder."""
    weights: str
    """"trained" or "random"."""


Build = Callable[[Model, str, Path], Path]
"""(model, target, home) to the artifact's folder."""


def why_not(capability: str) -> str | None:
    """The reason why no engine can be built here, or None."""
    if capability not in TARGETS and capability not in RTX_CAPABILITIES:
        return f"no target is for compute capability {capability}"
    _, library = target_of(capability)
    if importlib.util.find_spec(library) is None:
        package = library.replace("_", "-")
        return f"{library} is not installed (pip install {package}-cu13)"
    if importlib.util.find_spec("cuda") is None:
        return "cuda-bindings is not installed (pip install 'headrace[gpu]')"
    return None


def target_of(capability: str) -> tuple[str, str]:
    """(target, library); the data centre's cards have TensorRT, the others TensorRT-RTX."""
    return TARGETS.get(capability, RTX)


def models(work: Path, shapes: dict[str, Decoder], smollm2: Path | None) -> Iterator[Model]:
    """Qwen3-0.6B's shape, and SmolLM2: trained where its checkpoint is here, else its shape."""
    random = {"qwen3-0.6b": 1e6} | ({} if smollm2 else {"smollm2-135m": 1e5})
    for name, theta in random.items():
        folder = random_checkpoint.write_random(work / name, shapes[name], rope_theta=theta)
        yield Model(name=name, source=str(folder), weights="random")
    if smollm2:
        yield Model(name="smollm2-135m", source=str(smollm2), weights="trained")


def build(model: Model, target: str, home: Path) -> Path:
    order = Order(
        source=model.source,
        precision=Precision.BF16,
        target=target,
        name=model.name,
        context_tokens=CONTEXT_TOKENS,
        plans=PlanOptions(rows_max=max(ROWS), chunk=max(CHUNKS)),
    )
    return compile_model(order, home=home).folder


def check(
    model: Model,
    target: str,
    *,
    home: Path,
    copy_gb_s: float,
    until_s: float,
    build: Build = build,
) -> dict[str, object]:
    """Build, load, verify and time one model; what was refused is in `refused`.

    Args:
        model: which.
        target: for this card.
        home: a fresh state folder.
        copy_gb_s: of the card, for rooflines.
        until_s: of the monotonic clock; nothing is timed after it.
        build: makes the artifact.
    """
    found: dict[str, object] = {**asdict(model), "target": target, "is_right": False}
    try:
        began_s = time.monotonic()
        folder = build(model, target, home)
        found["build_s"] = time.monotonic() - began_s
        manifest = read_manifest(folder)
        began_s = time.monotonic()
        engine = load(folder, manifest)
        found |= loaded(engine, manifest, folder, seconds=time.monotonic() - began_s)
        try:
            found["verification"] = verified(engine, manifest, Path(model.source))
            found["is_right"] = True
            found["steps"] = list(steps(engine, manifest, copy_gb_s, until_s=until_s))
        finally:
            engine.close()
    except ServingError as error:
        found["refused"] = {"what": error.what, "why": error.why, "fix": error.fix}
    return found


def load(folder: Path, manifest: Manifest) -> Engine:
    """Load it for as many rows as the card has memory for."""
    assert manifest.tensorrt is not None
    place_tokens = manifest.tensorrt.cache_tokens
    for rows in reversed(ROWS):
        try:
            # Whether compile could run the engine is not asked: this is where it is run.
            return load_engine(
                folder,
                rows_max=rows,
                batch_tokens_max=max(*ROWS, *CHUNKS),
                kv_tokens=rows * place_tokens,
                allow_unverified=True,
            )[0]
        except DoesNotFit:
            if rows == ROWS[0]:
                raise
    raise AssertionError("one row is always tried")


def loaded(
    engine: Engine, manifest: Manifest, folder: Path, *, seconds: float
) -> dict[str, object]:
    assert manifest.tensorrt is not None
    plan_bytes = sum(each.plan_bytes for each in manifest.tensorrt.ranks)
    return {
        "library": f"{manifest.tensorrt.library} {manifest.tensorrt.version}",
        # Signature, hashes, reading, contexts and graphs; the files are in the page cache.
        "load_s": seconds,
        "plan_bytes": plan_bytes,
        "load_gb_s": plan_bytes / seconds / 1e9,
        "rows_max": engine.limits.rows_max,
    }


def verified(engine: Engine, manifest: Manifest, checkpoint: Path) -> dict[str, object]:
    """Against transformers in fp32 on the CPU; OutsideTolerance is a refusal."""
    from headrace.compile.reference import NAME, reference_logits

    rows = min(PROMPTS, engine.limits.rows_max)
    prompts = random_checkpoint.prompts(engine.limits.vocab, rows=rows, tokens=PROMPT_TOKENS)
    references = reference_logits(open_checkpoint(checkpoint), prompts)
    found = verify(engine, prompts, references, precision=manifest.precision, reference=NAME)
    return asdict(found) | {"perplexity_delta": found.perplexity_delta}


def steps(
    engine: Engine, manifest: Manifest, copy_gb_s: float, *, until_s: float
) -> Iterator[dict[str, object]]:
    """Decode steps of every size beside their roofline, and prefill chunks."""
    limits, facts = engine.limits, manifest.decoder
    per_token = facts.kv_values_per_token * CACHE_VALUE_BYTES
    for context in CONTEXTS:
        for rows in ROWS:
            if rows > limits.rows_max or context > limits.sequence_tokens_max:
                continue
            if time.monotonic() > until_s:
                return
            batch = [Row([1], context - 1, [1 + row], samples=True) for row in range(rows)]
            step_s = seconds_of(engine, batch)
            read_bytes = manifest.weight_bytes + rows * context * per_token
            least_s = read_bytes / copy_gb_s / 1e9
            yield {
                "kind": "decode", "rows": rows, "context": context, "ms": step_s * 1e3,
                "tokens_per_s": rows / step_s, "roofline_ms": least_s * 1e3,
                "of_roofline": least_s / step_s,
            }  # fmt: skip
    for chunk in CHUNKS:
        if chunk > limits.sequence_tokens_max or time.monotonic() > until_s:
            return
        step_s = seconds_of(engine, [Row([1] * chunk, 0, [1], samples=True)])
        yield {
            "kind": "prefill", "rows": 1, "context": chunk, "ms": step_s * 1e3,
            "tokens_per_s": chunk / step_s,
        }  # fmt: skip


def seconds_of(engine: Engine, rows: list[Row]) -> float:
    """Median wall time of a step: inputs, kernels, and the logits' way to the host."""
    times = []
    for _ in range(REPEATS + 2):
        began_s = time.perf_counter()
        engine.step(rows)
        times.append(time.perf_counter() - began_s)
    return statistics.median(times[2:])
