"""Greedy answers of the fp32 engine are those of `transformers.generate`, token for token."""

import queue
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from headrace.compile.store import Store
from headrace.compile.verify_texts import TEXTS
from headrace.serving.clock import SystemClock
from headrace.serving.domain.artifact import Precision
from headrace.serving.domain.request import Sampling, SequenceSpec
from headrace.serving.engine.loader import load_engine
from headrace.serving.engine.loop import EngineLoop, StepReport
from headrace.serving.engine.sampler import Sampler
from headrace.serving.tokenizer import Tokenizer

# The first of these tests on a machine pulls the model, exports it and runs the reference.
pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

PROMPTS = 50
ANSWER_TOKENS = 24
ROWS = 32


class Engine:
    """The fp32 artifact behind a real loop: scheduler, prefix cache, sampler, tokenizer."""

    def __init__(self, folder: Path) -> None:
        engine, manifest = load_engine(folder, rows_max=ROWS, kv_tokens=16_384)
        self.tokenizer = Tokenizer.from_folder(folder, manifest)
        self._reports: queue.SimpleQueue[StepReport] = queue.SimpleQueue()
        sampler = Sampler(manifest.decoder.vocab, ROWS, threads=1)
        self.loop = EngineLoop(
            engine,
            sampler,
            self.tokenizer,
            manifest,
            clock=SystemClock(),
            sink=self._reports.put,
        )
        self.loop.start()

    def answers(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """All prompts at once; each test's salt is its own, so that nothing is cached for it."""
        sampling = Sampling(max_tokens=ANSWER_TOKENS, ignore_eos=True)
        salt = str(id(prompts)).encode()
        tokens: list[list[int]] = [[] for _ in prompts]
        for key, prompt in enumerate(prompts):
            spec = SequenceSpec(prompt_ids=prompt, sampling=sampling, cache_salt=salt)
            self.loop.submit(key, spec)
        running = len(prompts)
        while running:
            for key, delta, _ in self._reports.get(timeout=60).deltas:
                assert isinstance(key, int)
                tokens[key] += delta.token_ids
                running -= delta.finish is not None
        return tokens


@pytest.fixture(scope="module")
def engine(artifact_of: Callable[[Precision], Path]) -> Iterator[Engine]:
    engine = Engine(artifact_of(Precision.FP32))
    yield engine
    engine.loop.stop()


@pytest.fixture(scope="module")
def prompts(engine: Engine) -> list[list[int]]:
    """Half chats, half plain text, 4 to about 100 tokens."""
    made: list[list[int]] = []
    for k in range(PROMPTS):
        text = TEXTS[k % len(TEXTS)]
        if k % 2:
            question = f"Question {k}: {text[3 * k % 30 :][: 40 + 4 * k]}"
            made.append(engine.tokenizer.encode_chat([("user", question)]))
        else:
            made.append(engine.tokenizer.encode(text)[3 * k % 30 :][: 4 + k])
    return made


@pytest.fixture(scope="module")
def expected(artifact_of: Callable[[Precision], Path], prompts: list[list[int]]) -> list[list[int]]:
    """What `transformers` says, one prompt at a time, in fp32."""
    home = artifact_of(Precision.FP32).parent.parent
    assert Store(home).list()
    checkpoint = home / "checkpoints" / "smollm2-135m"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    answers: list[list[int]] = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER_TOKENS,
            min_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            eos_token_id=-1,
            pad_token_id=0,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def test_fifty_answers_one_at_a_time_are_the_reference_s(
    engine: Engine, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    alone = [engine.answers([prompt])[0] for prompt in prompts]

    assert alone == expected


def test_fifty_answers_in_a_full_batch_are_the_reference_s(
    engine: Engine, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """32 rows run at a time, with prompts chunked in beside answers that are under way."""
    assert engine.answers(prompts) == expected
