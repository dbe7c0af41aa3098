"""
The fp32 engine on a small random model: whatever shares a step with a row, its logits are its own.

Every test asks the same question in another way, since padding, buckets, block tables and batching
are all ways of computing the same numbers.
"""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from headrace.compile.checkpoint import open_checkpoint
from headrace.compile.export import export_decoder
from headrace.compile.families.base import Weights
from headrace.compile.families.registry import describe
from headrace.serving.domain.artifact import Manifest, Precision, Verification
from headrace.serving.engine.base import Row
from headrace.serving.engine.onnx_engine import GRAPH_FILE, OnnxEngine
from headrace.serving.errors import ArtifactTampered, EngineFault

VOCAB = 300
TEXT = [(7 * n * n + 3) % VOCAB for n in range(150)]


class Built:
    """A model as a graph, and what `transformers` says it should answer."""

    def __init__(self, folder: Path) -> None:
        transformers.logging.disable_progress_bar()
        torch.manual_seed(3)
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCAB,
            max_position_embeddings=1024,
        )
        model = LlamaForCausalLM(config).eval()
        for values in model.parameters():
            torch.nn.init.normal_(values, 0.0, 0.3)
        model.save_pretrained(folder)
        checkpoint = open_checkpoint(folder)
        facts = describe(checkpoint)
        export_decoder(facts.decoder, Weights(checkpoint, facts), folder / GRAPH_FILE)
        with torch.inference_mode():
            self.expected = model(torch.tensor([TEXT])).logits[0].numpy()
        self.folder = folder
        self.manifest = Manifest(
            artifact_id="0" * 64,
            model="small",
            family="qwen",
            target="cpu",
            precision=Precision.FP32,
            engine="onnx",
            decoder=facts.decoder,
            eos_token_ids=(),
            bos_token_id=None,
            weight_bytes=0,
            verification=Verification(
                reference="none",
                tokens=0,
                max_abs_error=0.0,
                top1_agreement=1.0,
                perplexity=1.0,
                perplexity_reference=1.0,
                tolerance="none",
            ),
            source="none",
        )

    def load(self, **sizes: int) -> OnnxEngine:
        defaults = {"rows_max": 5, "batch_tokens_max": 200, "kv_tokens": 1024, "threads": 1}
        return OnnxEngine(self.folder, self.manifest, **{**defaults, **sizes})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("onnx"))


@pytest.fixture
def engine(built: Built) -> OnnxEngine:
    return built.load()


def near(logits: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(logits, expected, atol=2e-4)


@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 17, 64, 150])
def test_a_prompt_cut_anywhere_gives_the_same_answer(
    chunk: int, built: Built, engine: OnnxEngine
) -> None:
    blocks = [9, 3, 30, 4, 12, 0, 40, 41, 2, 63]

    for start in range(0, len(TEXT), chunk):
        fed = TEXT[start : start + chunk]
        logits = engine.step([Row(fed, start, blocks, samples=True)])
        near(logits[0], built.expected[start + len(fed) - 1])


def test_rows_of_all_kinds_share_a_step(built: Built, engine: OnnxEngine) -> None:
    """A long chunk, a continued chunk and two single tokens; one of them is not sampled."""
    first, second, third, fourth = ([n * 10 + i for i in range(10)] for n in range(4))
    engine.step([Row(TEXT[:70], 0, second, samples=False), Row(TEXT[:33], 0, third, samples=True)])

    logits = engine.step(
        [
            Row(TEXT[:90], 0, first, samples=True),
            Row(TEXT[70:71], 70, second, samples=True),
            Row(TEXT[33:60], 33, third, samples=False),
            Row(TEXT[:1], 0, fourth, samples=True),
        ]
    )

    near(logits, built.expected[[89, 70, 0]])


def test_rows_may_share_the_blocks_of_a_prefix(built: Built, engine: OnnxEngine) -> None:
    shared, other = [5, 6], [TEXT[-1], *TEXT[33:40]]
    engine.step([Row(TEXT[:32], 0, shared, samples=False)])

    logits = engine.step(
        [
            Row(TEXT[32:40], 32, [*shared, 7], samples=True),
            Row(other, 32, [*shared, 8], samples=True),
        ]
    )
    near(logits[0], built.expected[39])
    again = engine.step([Row(TEXT[40:41], 40, [*shared, 7], samples=True)])

    near(again[0], built.expected[40])


def test_a_block_keeps_nothing_of_its_former_owner(built: Built, engine: OnnxEngine) -> None:
    engine.step([Row(TEXT[::-1], 0, list(range(10)), samples=False)])

    logits = engine.step([Row(TEXT[:20], 0, [4, 2], samples=True)])

    near(logits[0], built.expected[19])


def test_a_step_in_which_nobody_samples_answers_nothing(engine: OnnxEngine) -> None:
    assert engine.step([Row(TEXT[:5], 0, [0], samples=False)]).shape == (0, VOCAB)


def test_a_full_engine_reaches_its_limits(built: Built) -> None:
    """All rows, all tokens and all blocks at once."""
    engine = built.load(rows_max=4, batch_tokens_max=64, kv_tokens=64)
    rows = [Row(TEXT[:16], 0, [n], samples=True) for n in range(4)]

    near(engine.step(rows), built.expected[[15, 15, 15, 15]])


def test_limits_are_what_was_asked_for(built: Built) -> None:
    limits = built.load(kv_tokens=100).limits

    assert (limits.kv_blocks, limits.kv_block_tokens, limits.vocab) == (6, 16, VOCAB)
    assert limits.sequence_tokens_max == 96
    assert built.load(kv_tokens=4096).limits.sequence_tokens_max == 1024
    assert built.load(sequence_tokens_max=40).limits.sequence_tokens_max == 40


def test_a_step_allocates_nothing_the_size_of_its_pools(built: Built) -> None:
    """Four pools of 8 MB; a copy of one would show. Small index arrays come and go."""
    engine = built.load(kv_tokens=65_536)
    row = Row(TEXT[:100], 0, list(range(10)), samples=True)
    engine.step([row])

    tracemalloc.start()
    engine.step([row])
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak_bytes < 512 * 1024


def test_a_fault_of_the_runtime_ends_the_engine(engine: OnnxEngine) -> None:
    """A token that the model lacks; afterwards the replica must be replaced."""
    with pytest.raises(EngineFault, match="ONNX Runtime"):
        engine.step([Row([VOCAB + 5], 0, [0], samples=True)])
    with pytest.raises(EngineFault, match="closed"):
        engine.step([Row([1], 0, [0], samples=True)])


def test_closing_twice_is_closing_once(engine: OnnxEngine) -> None:
    engine.close()
    engine.close()

    with pytest.raises(EngineFault):
        engine.step([Row([1], 0, [0], samples=True)])


def test_a_graph_that_is_none_is_refused(built: Built, tmp_path: Path) -> None:
    (tmp_path / GRAPH_FILE).write_bytes(b"not a graph")

    with pytest.raises(ArtifactTampered, match="does not accept"):
        OnnxEngine(
            tmp_path, built.manifest, rows_max=1, batch_tokens_max=16, kv_tokens=64, threads=1
        )


def test_short_and_long_sequences_decode_in_one_step(built: Built) -> None:
    """They run apart, so that the short ones do not read the long one's context."""
    engine = built.load(kv_tokens=4096)
    blocks = list(range(100, 140))
    for start in range(0, 300, 100):
        engine.step([Row(TEXT[:100], start, blocks, samples=False)])
    alone = engine.step([Row([7], 300, blocks, samples=True)])[0].copy()

    logits = engine.step([Row(TEXT[:1], 0, [0], samples=True), Row([7], 300, blocks, samples=True)])

    near(logits[0], built.expected[0])
    near(logits[1], alone)
