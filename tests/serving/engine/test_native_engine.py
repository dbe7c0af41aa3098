"""The native engine: right, and bitwise the same however the work is cut."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.serving.domain.artifact import Manifest, Precision
from headrace.serving.engine.base import Logits, Row
from headrace.serving.engine.native_engine import KV_BLOCK_TOKENS, NativeEngine
from headrace.serving.engine.native_library import KERNELS, native_library
from headrace.serving.engine.native_weights import WEIGHTS_FILE
from headrace.serving.errors import ArtifactTampered, EngineFault, UnsupportedModel

Opener = Callable[..., NativeEngine]
BuildModel = Callable[[str, Path, Precision], tuple[Any, Manifest]]

VARIANTS = [
    "llama",
    "llama with yarn",
    "odd sizes, o bias, untied",
    "qwen2 with large key biases",
    "qwen3 with qk norms",
]
"""Those of small_models.py."""

PROMPT = [int(t) for t in np.random.default_rng(3).integers(0, 211, 330)]

HAS_AVX512 = native_library().hr_kernels_name(KERNELS["avx512"]) is not None
KERNEL_SETS = [
    "portable",
    pytest.param(
        "avx512", marks=pytest.mark.skipif(not HAS_AVX512, reason="this CPU has no AVX512-BF16")
    ),
]


@pytest.fixture
def opened() -> Iterator[Opener]:
    """Opens engines and closes them when the test is over."""
    engines: list[NativeEngine] = []

    def open_engine(folder: Path, manifest: Manifest, *, threads: int = 2) -> NativeEngine:
        engine = NativeEngine(
            folder,
            manifest,
            rows_max=12,
            batch_tokens_max=400,
            kv_tokens=2048,
            threads=threads,
        )
        engines.append(engine)
        return engine

    yield open_engine
    for engine in engines:
        engine.close()


class Sequences:
    """Feeds prompts to an engine; each sequence has its own blocks."""

    def __init__(self, engine: NativeEngine) -> None:
        self.engine = engine
        self.blocks: dict[int, list[int]] = {}

    def row(self, sequence: int, ids: Sequence[int], position: int, *, samples: bool) -> Row:
        # 12 sequences share 128 blocks; the first may be long.
        first = 0 if sequence == 0 else 24 + 8 * sequence
        count = -(-(position + len(ids)) // KV_BLOCK_TOKENS)
        return Row(ids, position, list(range(first, first + count)), samples)

    def feed(self, ids: Sequence[int], chunks: Sequence[int], sequence: int = 0) -> Logits:
        """Feed a prompt in chunks; the logits of its last token."""
        assert sum(chunks) == len(ids)
        at = 0
        logits = np.empty(0, np.float32)
        for count in chunks:
            is_last = at + count == len(ids)
            row = self.row(sequence, ids[at : at + count], at, samples=is_last)
            logits = self.engine.step([row]).copy()
            at += count
        return logits[0]


def reference_logits(model: Any, ids: Sequence[int]) -> Logits:
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("kernels", KERNEL_SETS)
@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_answers_as_transformers_does(
    variant: str,
    precision: Precision,
    kernels: str,
    build_model: BuildModel,
    tmp_path: Path,
    opened: Opener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rotation, norm or bias in the wrong place changes logits by their own size; rounding
    activations to 8 bits by a few per cent of it. 330 tokens cross a span of the softmax."""
    monkeypatch.setenv("HEADRACE_KERNELS", kernels)
    reference, manifest = build_model(variant, tmp_path, precision)
    engine = opened(tmp_path, manifest)

    Sequences(engine).feed(PROMPT, [330])
    positions = (0, 1, 15, 16, 100, 255, 256, 329)
    blocks = list(range(21))
    rows = [Row([PROMPT[i]], i, blocks, True) for i in positions]
    found = engine.step(rows)

    wanted = reference_logits(reference, PROMPT)[list(positions)]
    error = np.sqrt(np.mean((found - wanted) ** 2)) / wanted.std()
    assert error < 0.05


@pytest.fixture(scope="module")
def small(
    build_model: BuildModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("small")
    return folder, build_model("llama", folder, Precision.INT4)[1]


@pytest.fixture(scope="module")
def small8(
    build_model: BuildModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("small8")
    return folder, build_model("odd sizes, o bias, untied", folder, Precision.INT8)[1]


@pytest.mark.parametrize("kernels", KERNEL_SETS)
@pytest.mark.parametrize("model", ["small", "small8"])
def test_an_answer_does_not_depend_on_its_company(
    model: str,
    kernels: str,
    opened: Opener,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same request gives the same answer at any load: support can replay it."""
    monkeypatch.setenv("HEADRACE_KERNELS", kernels)
    engine = opened(*request.getfixturevalue(model))
    sequences = Sequences(engine)
    alone = sequences.feed(PROMPT[:51], [50, 1])

    sequences.feed(PROMPT[:50], [50])
    watched = sequences.row(0, PROMPT[50:51], 50, samples=True)
    rows = [watched]
    for other in range(1, 11):
        sequences.feed(PROMPT[other:60], [60 - other], other)
        ids = PROMPT[100 : 100 + other * 3]
        rows.insert(other % 3, sequences.row(other, ids, 60 - other, samples=True))
    crowded = engine.step(rows)

    assert crowded.shape[0] == len(rows)
    np.testing.assert_array_equal(crowded[rows.index(watched)], alone)


@pytest.mark.parametrize("kernels", KERNEL_SETS)
@pytest.mark.parametrize("model", ["small", "small8"])
def test_an_answer_does_not_depend_on_how_its_prompt_is_cut(
    model: str,
    kernels: str,
    opened: Opener,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunked prefill, a resident prefix and a resumed request are all the same computation."""
    monkeypatch.setenv("HEADRACE_KERNELS", kernels)
    sequences = Sequences(opened(*request.getfixturevalue(model)))

    whole = sequences.feed(PROMPT[:300], [300])
    one_by_one = sequences.feed(PROMPT[:300], [1] * 300)
    uneven = sequences.feed(PROMPT[:300], [7, 2, 31, 60, 1, 155, 44])

    np.testing.assert_array_equal(one_by_one, whole)
    np.testing.assert_array_equal(uneven, whole)


@pytest.mark.parametrize("model", ["small", "small8"])
def test_an_answer_does_not_depend_on_the_number_of_threads(
    model: str, opened: Opener, request: pytest.FixtureRequest
) -> None:
    feed = partial(Sequences.feed, ids=PROMPT[:200], chunks=[90, 109, 1])
    folder, manifest = request.getfixturevalue(model)

    answers = [feed(Sequences(opened(folder, manifest, threads=n))) for n in (1, 2, 3)]

    np.testing.assert_array_equal(answers[1], answers[0])
    np.testing.assert_array_equal(answers[2], answers[0])


def test_an_answer_does_not_depend_on_preempted_threads(
    small8: tuple[Path, Manifest], opened: Opener
) -> None:
    """Eight threads on fewer cores are stopped anywhere. A thread that was stopped between giving
    back its last unit of a phase and asking whether it was the phase's last once opened a phase
    twice: one answer in thirty was wrong on a busy machine."""
    sequences = Sequences(opened(*small8, threads=8))
    expected = sequences.feed(PROMPT[:300], [300])

    for _ in range(20):
        np.testing.assert_array_equal(sequences.feed(PROMPT[:300], [1] * 300), expected)


@pytest.mark.skipif(not HAS_AVX512, reason="this CPU has no AVX512-BF16 to compare with")
@pytest.mark.parametrize("model", ["small", "small8"])
def test_both_kernel_sets_agree(
    model: str, opened: Opener, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They differ in the order of sums only. A difference in the last bit of an activation may
    move one of its 8-bit codes, so the bound is a fraction of what 8 bits cost."""
    folder, manifest = request.getfixturevalue(model)
    answers: list[Logits] = []
    for kernels in ("portable", "avx512"):
        monkeypatch.setenv("HEADRACE_KERNELS", kernels)
        answers.append(Sequences(opened(folder, manifest)).feed(PROMPT, [329, 1]))

    error = np.sqrt(np.mean((answers[0] - answers[1]) ** 2)) / answers[0].std()

    assert error < 0.02


def test_blocks_can_be_shared_by_sequences_with_one_prefix(
    small: tuple[Path, Manifest], opened: Opener
) -> None:
    engine = opened(*small)
    own = Sequences(engine).feed(PROMPT[:70], [70])

    engine.step([Row(PROMPT[:64], 0, [40, 41, 42, 43], False)])
    shared = engine.step([Row(PROMPT[64:70], 64, [40, 41, 42, 43, 90], True)])

    np.testing.assert_array_equal(shared[0], own)


def test_only_rows_that_sample_have_logits(small: tuple[Path, Manifest], opened: Opener) -> None:
    engine = opened(*small)
    sequences = Sequences(engine)
    rows = [sequences.row(i, PROMPT[:20], 0, samples=i == 2) for i in range(4)]

    assert engine.step(rows).shape == (1, 211)
    assert engine.step([rows[0]]).shape == (0, 211)
    assert engine.step([]).shape == (0, 211)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        pytest.param(Row([1], 0, [128], True), "block id", id="a block beyond the pool"),
        pytest.param(Row([1], 0, [-1], True), "block id", id="a negative block"),
        pytest.param(Row([211], 0, [0], True), "token id", id="a token beyond the vocabulary"),
        pytest.param(Row([1] * 17, 0, [0], True), "do not cover", id="too few blocks"),
        pytest.param(Row([1], 1024, list(range(65)), True), "longest", id="beyond the context"),
        pytest.param(Row([1], -1, [0], True), "longest", id="before the beginning"),
        pytest.param(Row([], 0, [0], True), "follow", id="no tokens"),
        pytest.param(Row([1] * 401, 0, list(range(26)), True), "too many", id="too many tokens"),
    ],
)
def test_a_row_outside_the_limits_is_refused(
    row: Row, why: str, small: tuple[Path, Manifest], opened: Opener
) -> None:
    """A wrong block id would write over another tenant's keys."""
    engine = opened(*small)

    with pytest.raises(EngineFault, match=why):
        engine.step([row])


def test_more_rows_than_the_engine_was_made_for_are_refused(
    small: tuple[Path, Manifest], opened: Opener
) -> None:
    engine = opened(*small)

    with pytest.raises(EngineFault, match="rows_max"):
        engine.step([Row([1], 0, [0], False)] * 13)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, 20_000, -1])
def test_a_truncated_weights_file_is_refused(
    kept: int, small: tuple[Path, Manifest], tmp_path: Path, opened: Opener
) -> None:
    folder, manifest = small
    content = (folder / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(content[:kept])

    with pytest.raises(ArtifactTampered, match="not what was built"):
        opened(tmp_path, manifest)


def test_a_missing_weights_file_is_refused(
    small: tuple[Path, Manifest], tmp_path: Path, opened: Opener
) -> None:
    with pytest.raises(ArtifactTampered, match="cannot be read"):
        opened(tmp_path, small[1])


def test_weights_of_another_model_are_refused(
    small: tuple[Path, Manifest], small8: tuple[Path, Manifest], opened: Opener
) -> None:
    with pytest.raises(ArtifactTampered, match="no tensor"):
        opened(small[0], small8[1])


def test_a_precision_it_does_not_compute_is_refused(
    small: tuple[Path, Manifest], opened: Opener
) -> None:
    folder, manifest = small
    text = manifest.to_json().replace('"precision": "int4"', '"precision": "fp32"')

    with pytest.raises(UnsupportedModel, match="fp32"):
        opened(folder, Manifest.from_json(text, where="test"))


def test_closing_twice_is_harmless(small: tuple[Path, Manifest], opened: Opener) -> None:
    engine = opened(*small)
    engine.close()
    engine.close()


def test_an_unknown_kernel_set_is_refused(
    small: tuple[Path, Manifest], opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_KERNELS", "fastest")

    with pytest.raises(EngineFault, match="fastest"):
        opened(*small)
