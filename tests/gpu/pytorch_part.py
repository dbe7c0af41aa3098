"""The card's ceilings, and the decoder module under PyTorch: what an engine is held against.

* copy bandwidth and bf16 matrix rate of the card;
* `compile/families/decoder.py` on the GPU against itself on the CPU in fp32, random weights;
* the time of decode steps (CUDA graphs, contiguous KV, bf16) and prefill chunks for published
  shapes, each beside its memory roofline. These are PyTorch's times, not a TensorRT engine's.
"""

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator

import torch

from headrace.compile.families.decoder import DecoderModule
from headrace.serving.domain.artifact import Decoder

SHAPES = {
    "smollm2-135m": Decoder(
        layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49_152,
        rms_eps=1e-5, qkv_bias=False, qk_norm=False, tied=True, context_tokens=8192,
    ),
    "qwen3-0.6b": Decoder(
        layers=28, hidden=1024, heads=16, kv_heads=8, head_dim=128, ffn=3072, vocab=151_936,
        rms_eps=1e-6, qkv_bias=False, qk_norm=True, tied=True, context_tokens=40_960,
    ),
    "qwen3-8b": Decoder(
        layers=36, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=12_288, vocab=151_936,
        rms_eps=1e-6, qkv_bias=False, qk_norm=True, tied=False, context_tokens=40_960,
    ),
}  # fmt: skip
"""From the models' published config.json files."""
BATCHES = (1, 8, 32, 64, 128)
CONTEXTS = (512, 2048, 8192)
CHUNKS = (128, 512, 2048, 4096)
KV_BYTES_MAX = 40 << 30
"""Of one measurement: leaves an 80 GB card room for 16 GB of weights."""
BF16 = torch.bfloat16


class Caches:
    """A `kv_update` over contiguous caches: the last T of S tokens are written, S are read."""

    def __init__(self, decoder: Decoder, *, rows: int, context: int, device: str) -> None:
        shape = (rows, decoder.kv_heads, context, decoder.head_dim)
        self.context = context
        self.keys = [torch.zeros(shape, dtype=BF16, device=device) for _ in range(decoder.layers)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]

    def __call__(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.context - keys.shape[1]
        self.keys[layer][:, :, first:].copy_(keys.transpose(1, 2))
        self.values[layer][:, :, first:].copy_(values.transpose(1, 2))
        return self.keys[layer], self.values[layer]


class Half(torch.nn.Module):
    """The module in bf16: cosines and sines are made in fp32 and cast, as an engine would."""

    def __init__(self, module: DecoderModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: object) -> torch.Tensor:
        with torch.autocast("cuda", dtype=BF16):
            return self.module(*arguments)


def random_module(decoder: Decoder, *, dtype: torch.dtype, device: str) -> DecoderModule:
    """Weights of the usual spread; seeded, so that two devices get the same ones."""
    torch.manual_seed(7)
    with torch.device("meta"):
        module = DecoderModule(decoder)
    module = module.to_empty(device=device).eval().requires_grad_(requires_grad=False)
    for name, parameter in module.named_parameters():
        source = torch.randn(parameter.shape, device="cpu" if device == "cpu" else device) * 0.02
        parameter.data = (torch.ones_like(source) if "norm" in name else source).to(dtype)
    half = decoder.head_dim // 2
    module.inv_freq = 1e6 ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    return module


def seconds_of(work: Callable[[], object], *, repeats: int) -> float:
    """Median of `repeats` runs, each timed by events on the device."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_s = seconds_of(lambda: target.copy_(source), repeats=10)
    a, b = (torch.randn(8192, 8192, dtype=BF16, device="cuda") for _ in range(2))
    product_s = seconds_of(lambda: a @ b, repeats=10)
    return {
        "copy_gb_s": 2 * source.numel() / copy_s / 1e9,
        "bf16_tflop_s": 2 * 8192**3 / product_s / 1e12,
    }


def agreement(decoder: Decoder) -> dict[str, float]:
    """The module on the GPU against the CPU in fp32: 4 rows of 48 tokens, random weights."""
    tokens = torch.randint(0, decoder.vocab, (4, 48))
    positions = torch.arange(48).expand(4, 48)
    mask = torch.ones(48, 48, dtype=torch.bool).tril().expand(4, 1, 48, 48)
    chosen = torch.arange(4 * 48)

    def hook(_: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return keys.transpose(1, 2), values.transpose(1, 2)

    module = random_module(decoder, dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        want = module(tokens, positions, mask, chosen, hook)
        module = module.cuda()
        given = [each.cuda() for each in (tokens, positions, mask, chosen)]
        exact = module(*given, hook).cpu()
        half = Half(module)(*given, hook).float().cpu()
    spread = want.std().item()
    return {
        "fp32_max_error_of_spread": (exact - want).abs().max().item() / spread,
        "bf16_rms_error_of_spread": (half - want).pow(2).mean().sqrt().item() / spread,
        "fp32_top1": (exact.argmax(-1) == want.argmax(-1)).float().mean().item(),
        "bf16_top1": (half.argmax(-1) == want.argmax(-1)).float().mean().item(),
    }


def bytes_of(module: DecoderModule, decoder: Decoder, *, rows: int, context: int) -> int:
    """What a step must read: every weight but the rows of the embedding it skips, and the KV."""
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    if not decoder.tied:
        weights -= module.embed.weight.numel() * module.embed.weight.element_size()
    return weights + rows * context * decoder.kv_values_per_token * 2


def agreements() -> dict[str, dict[str, float]]:
    """By shape; the larger ones take too long on the CPU."""
    return {name: agreement(SHAPES[name]) for name in ("smollm2-135m", "qwen3-0.6b")}


def is_right(found: dict[str, dict[str, float]]) -> bool:
    return all(
        each["fp32_max_error_of_spread"] < 1e-3 and each["bf16_rms_error_of_spread"] < 0.05
        for each in found.values()
    )


def steps(copy_gb_s: float, *, until_s: float) -> Iterator[dict[str, object]]:
    """Time every shape and size, until `until_s` of the monotonic clock."""
    for name, decoder in SHAPES.items():
        for row in steps_of(name, decoder, copy_gb_s):
            yield row
            if time.monotonic() > until_s:
                return
        torch.cuda.empty_cache()


def steps_of(name: str, decoder: Decoder, copy_gb_s: float) -> Iterator[dict[str, object]]:
    module = random_module(decoder, dtype=BF16, device="cuda")
    for rows in BATCHES:
        for context in CONTEXTS:
            if rows * context * decoder.kv_values_per_token * 2 > KV_BYTES_MAX:
                continue
            step_s = decode_s(module, decoder, rows=rows, context=context)
            least_s = bytes_of(module, decoder, rows=rows, context=context) / copy_gb_s / 1e9
            yield {
                "shape": name, "kind": "decode", "rows": rows, "context": context,
                "ms": step_s * 1e3, "tokens_per_s": rows / step_s,
                "roofline_ms": least_s * 1e3, "of_roofline": least_s / step_s,
            }  # fmt: skip
    for chunk in CHUNKS:
        chunk_s = prefill_s(module, decoder, chunk)
        yield {
            "shape": name, "kind": "prefill", "rows": 1, "context": chunk,
            "ms": chunk_s * 1e3, "tokens_per_s": chunk / chunk_s,
        }  # fmt: skip


def decode_s(module: DecoderModule, decoder: Decoder, *, rows: int, context: int) -> float:
    """One step of `rows` rows, each with `context` tokens behind it, as a replayed CUDA graph."""
    caches = Caches(decoder, rows=rows, context=context, device="cuda")
    tokens = torch.zeros(rows, 1, dtype=torch.int64, device="cuda")
    positions = torch.full((rows, 1), context - 1, device="cuda")
    chosen = torch.arange(rows, device="cuda")
    run = in_half(module, tokens, positions, chosen, caches)
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        took_s = seconds_of(graph.replay, repeats=15)
    del graph, caches
    torch.cuda.empty_cache()
    return took_s


def prefill_s(module: DecoderModule, decoder: Decoder, chunk: int) -> float:
    """One row's first chunk. Attention is not masked: it does twice a causal one's work."""
    caches = Caches(decoder, rows=1, context=chunk, device="cuda")
    tokens = torch.zeros(1, chunk, dtype=torch.int64, device="cuda")
    positions = torch.arange(chunk, device="cuda")[None]
    chosen = torch.tensor([chunk - 1], device="cuda")
    with torch.inference_mode():
        return seconds_of(in_half(module, tokens, positions, chosen, caches), repeats=8)


def in_half(
    module: DecoderModule,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    chosen: torch.Tensor,
    caches: Caches,
) -> Callable[[], torch.Tensor]:
    half = Half(module)
    return lambda: half(tokens, positions, None, chosen, caches)


def has_gpu() -> bool:
    return torch.cuda.is_available()


def card() -> dict[str, str]:
    """What the driver says of the first GPU."""
    query = "name,driver_version,memory.total,compute_cap"
    line = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()[0]  # fmt: skip
    name, driver, memory, capability = (part.strip() for part in line.split(","))
    return {
        "name": name, "driver": driver, "memory": memory, "compute_capability": capability,
        "torch": torch.__version__,
    }  # fmt: skip
