"""The serving loop over the TensorRT engine: one block a row, as long as any sequence.

The loop runs on its own thread, as in a replica; the fake device refuses a thread that did not make
it current.
"""

import queue
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from headrace.serving.clock import SystemClock
from headrace.serving.domain.request import FinishReason, Sampling, SequenceSpec
from headrace.serving.domain.tier import Promise, Tier
from headrace.serving.engine.loop import EngineLoop, StepReport
from headrace.serving.engine.tensorrt import TensorRtEngine
from headrace.serving.testing.fake_artifact import (
    CACHE_TOKENS,
    CHUNK,
    LAYERS,
    fake_decoder,
    fake_manifest,
    write_fake_artifact,
)
from headrace.serving.testing.fake_device import FakeDevice
from headrace.serving.testing.fake_tensorrt import FakeTensorRt
from headrace.serving.testing.greedy_sampler import GreedySampler
from headrace.serving.testing.tiny_tokenizer import tiny_tokenizer

TINY = tiny_tokenizer()
ROWS = 6
LONGEST = CACHE_TOKENS - CHUNK
WAIT_S = 20
"""Only a broken loop is waited for this long."""


class Replica:
    """A loop on its thread, over a fake GPU."""

    def __init__(self, folder: Path) -> None:
        manifest = fake_manifest(vocab=TINY.vocab_size)
        self.manifest = write_fake_artifact(folder, replace(manifest, eos_token_ids=()))
        self.device = FakeDevice()
        self.library = FakeTensorRt(self.device)
        engine = TensorRtEngine(
            folder,
            self.manifest,
            rows_max=ROWS,
            batch_tokens_max=32,
            kv_tokens=ROWS * CACHE_TOKENS,
            threads=1,
            device=self.device,
            library=self.library,
        )
        self.reports: queue.Queue[StepReport] = queue.Queue()
        self.rows: list[int] = []
        self.answers: dict[object, list[int]] = {}
        self.finishes: dict[object, FinishReason] = {}
        self.loop = EngineLoop(
            engine,
            GreedySampler(),
            TINY,
            self.manifest,
            clock=SystemClock(),
            sink=self.reports.put,
        )

    def asks(self, key: object, prompt: list[int], tokens: int, tier: Tier = Tier.STANDARD) -> None:
        sampling = Sampling(max_tokens=tokens, ignore_eos=True)
        spec = SequenceSpec(prompt_ids=prompt, sampling=sampling, promise=Promise(tier=tier))
        self.loop.submit(key, spec)

    def runs_until(self, *keys: object) -> None:
        while not self.finishes.keys() >= set(keys):
            report = self.reports.get(timeout=WAIT_S)
            self.rows.append(report.load.step_rows)
            for key, delta, _ in report.deltas:
                self.answers.setdefault(key, []).extend(delta.token_ids)
                if delta.finish is not None:
                    self.finishes[key] = delta.finish

    def likeliest(self, prompt: list[int], tokens: int) -> list[int]:
        """What the model says of the prompt by itself."""
        sequence = list(prompt)
        for _ in range(tokens):
            logits = fake_decoder(self.manifest).reference(sequence, layers=LAYERS)[-1]
            sequence.append(int(np.argmax(logits)))
        return sequence[len(prompt) :]


@pytest.fixture
def replica(tmp_path: Path) -> Replica:
    return Replica(tmp_path)


def prompt_of(number: int) -> list[int]:
    chance = random.Random(number)
    return chance.choices(range(3, TINY.vocab_size), k=chance.randint(1, 30))


def test_more_requests_than_rows_are_each_answered_as_if_alone(replica: Replica) -> None:
    """Places are used again, prompts are cut and run beside rows that decode, some are aborted."""
    prompts = {number: prompt_of(number) for number in range(16)}
    replica.loop.start()
    for number, prompt in prompts.items():
        replica.asks(number, prompt, tokens=8)
    for number in (3, 9):
        replica.loop.abort(number)
    replica.runs_until(*prompts)
    replica.loop.stop()

    for number, prompt in prompts.items():
        whole = replica.likeliest(prompt, 8)
        answer = replica.answers[number]
        assert answer == whole[: len(answer)]
        assert len(answer) == 8 or number in (3, 9)
    assert replica.device.left_over == []


def test_every_row_is_used(replica: Replica) -> None:
    """No block is kept back for sequences that can never need a second one."""
    for number in range(ROWS):
        replica.asks(number, prompt_of(number)[:4], tokens=20)
    replica.loop.start()
    replica.runs_until(*range(ROWS))
    replica.loop.stop()

    assert max(replica.rows) == ROWS


def test_a_sequence_fills_its_place_to_the_end(replica: Replica) -> None:
    prompt = prompt_of(1)[:20]
    replica.asks("long", prompt, tokens=1000)
    replica.loop.start()
    replica.runs_until("long")
    replica.loop.stop()

    assert replica.finishes["long"] is FinishReason.LENGTH
    assert len(replica.answers["long"]) == LONGEST - len(prompt)
    assert replica.answers["long"] == replica.likeliest(prompt, LONGEST - len(prompt))


def test_batch_work_gives_its_place_away_and_is_computed_again(replica: Replica) -> None:
    for number in range(ROWS):
        replica.asks(number, prompt_of(number), tokens=12, tier=Tier.BATCH)
    for _ in range(4):
        replica.loop.turn()
    replica.asks("urgent", prompt_of(99), tokens=3)
    replica.loop.start()
    replica.runs_until("urgent", *range(ROWS))
    replica.loop.stop()

    assert replica.answers["urgent"] == replica.likeliest(prompt_of(99), 3)
    for number in range(ROWS):
        assert replica.answers[number] == replica.likeliest(prompt_of(number), 12)
    assert replica.loop.load().recomputed_tokens_total > 0
