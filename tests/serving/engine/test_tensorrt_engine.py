"""The TensorRT engine's buffers, profiles and order, over a device and a library that are strict.

The fake network answers from what it reads of the caches, so a wrong place, position, address,
padding or copy is a wrong number; the fake library refuses what TensorRT forbids.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.serving.domain.artifact import Manifest, Sharding
from headrace.serving.engine.base import Row
from headrace.serving.engine.loader import load_engine
from headrace.serving.engine.tensorrt import TensorRtEngine
from headrace.serving.errors import (
    ArtifactTampered,
    ConfigRefused,
    DeviceUnsuitable,
    DoesNotFit,
    EngineFault,
    ServingError,
)
from headrace.serving.testing.fake_artifact import (
    CACHE_TOKENS,
    CHUNK,
    LAYERS,
    fake_decoder,
    fake_manifest,
    fake_plan,
    write_fake_artifact,
)
from headrace.serving.testing.fake_device import FakeDevice
from headrace.serving.testing.fake_ranks import FakeChannel, FakeCommunicator
from headrace.serving.testing.fake_tensorrt import FakeTensorRt
from headrace.serving.testing.signing import trust_key

LONGEST = CACHE_TOKENS - CHUNK
VOCAB = 40
SIZES = {"rows_max": 8, "batch_tokens_max": 64, "kv_tokens": 8 * CACHE_TOKENS, "threads": 1}
SEEDS = 30
"""Of random schedules, each of 25 steps: a third of a second."""


class Machine:
    """An artifact, a device and a library; loads engines and knows the right answers."""

    def __init__(self, folder: Path, manifest: Manifest | None = None, **device: Any) -> None:
        self.folder = folder
        self.manifest = write_fake_artifact(folder, manifest or fake_manifest(vocab=VOCAB))
        self.device = FakeDevice(**device)
        self.library = FakeTensorRt(self.device)

    def load(self, **changes: Any) -> TensorRtEngine:
        given: Any = {**SIZES, "device": self.device, "library": self.library, **changes}
        return TensorRtEngine(self.folder, self.manifest, **given)

    def expected(self, token_ids: list[int]) -> np.ndarray:
        return fake_decoder(self.manifest).reference(token_ids, layers=LAYERS)[-1]

    def given_back(self) -> list[str]:
        return list(dict.fromkeys(self.device.journal))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def text(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=tokens)


# Answers.


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 15, 16, 17, 33, 48])
def test_a_prompt_cut_anywhere_gives_the_same_answer(chunk: int, machine: Machine) -> None:
    """Below a profile's least tokens, between two profiles, at one's most, and beyond all."""
    engine, prompt = machine.load(), text(1, LONGEST)

    for first in range(0, LONGEST, chunk):
        fed = prompt[first : first + chunk]
        logits = engine.step([Row(fed, first, [3], samples=True)])
        assert (logits[0] == machine.expected(prompt[: first + chunk])).all()
    engine.close()


def test_rows_of_all_kinds_share_a_step(machine: Machine) -> None:
    """A long chunk, a short one, single tokens in places with gaps; some are not sampled."""
    engine = machine.load()
    texts = {place: text(place, 40) for place in (1, 2, 4, 7)}
    engine.step([Row(texts[4][:9], 0, [4], samples=False), Row(texts[7][:3], 0, [7], True)])

    logits = engine.step(
        [
            Row(texts[7][3:4], 3, [7], samples=True),
            Row(texts[1][:20], 0, [1], samples=True),
            Row(texts[4][9:10], 9, [4], samples=False),
            Row(texts[2][:1], 0, [2], samples=True),
        ]
    )

    wanted = [machine.expected(texts[7][:4]), machine.expected(texts[1][:20])]
    assert (logits == np.stack([*wanted, machine.expected(texts[2][:1])])).all()
    engine.close()


@pytest.mark.parametrize("sharding", [Sharding(), Sharding(tp=3), Sharding(cp=2)], ids=str)
@pytest.mark.parametrize("seed", range(SEEDS // 3))
def test_any_schedule_gives_the_answers_of_each_sequence_alone(
    seed: int, sharding: Sharding, tmp_path: Path
) -> None:
    """Prompts in chunks of any size, any subset decoding, places used again in any order."""
    machine = Machine(tmp_path, fake_manifest(vocab=VOCAB, sharding=sharding))
    shares = sharding.ranks > 1
    engine = machine.load(communicator=FakeCommunicator(machine.device) if shares else None)
    chance = random.Random(seed)
    live: dict[int, tuple[list[int], int]] = {}

    for _ in range(25):
        for place in range(1, 9):
            if place not in live and chance.random() < 0.3:
                live[place] = text(chance.randrange(10**9), chance.randint(1, LONGEST)), 0
            elif place in live and chance.random() < 0.05:
                del live[place]
        rows, wanted = schedule(live, chance, machine)
        if rows:
            assert (engine.step(rows) == np.array(wanted).reshape(-1, VOCAB)).all(), f"seed {seed}"

    engine.close()
    assert machine.device.left_over == []


def schedule(
    live: dict[int, tuple[list[int], int]], chance: random.Random, machine: Machine
) -> tuple[list[Row], list[np.ndarray]]:
    """Some of the live sequences' next tokens, and the logits they should have."""
    rows: list[Row] = []
    wanted: list[np.ndarray] = []
    left = SIZES["batch_tokens_max"]
    for place in chance.sample(sorted(live), len(live)):
        token_ids, done = live[place]
        if chance.random() < 0.3 or not left:
            continue
        most = min(left, len(token_ids) - done)
        count = 1 if chance.random() < 0.6 else chance.randint(1, most)
        samples = chance.random() < 0.7
        rows.append(Row(token_ids[done : done + count], done, [place], samples))
        if samples:
            wanted.append(machine.expected(token_ids[: done + count]))
        left -= count
        if done + count == len(token_ids):
            del live[place]
        else:
            live[place] = token_ids, done + count
    return rows, wanted


# Runs, profiles, graphs.


def test_single_tokens_run_in_the_smallest_bucket_that_reaches_the_highest_place(
    machine: Machine,
) -> None:
    engine = machine.load()
    machine.library.profiles_run.clear()

    engine.step([Row([1], 0, [1], samples=True)])
    engine.step([Row([1], 0, [3], samples=True)])
    engine.step([Row([1], 1, [1], samples=True), Row([1], 0, [6], samples=False)])

    assert machine.library.profiles_run == [(2, 1, 1), (3, 4, 1), (4, 8, 1)]
    engine.close()


def test_a_decode_step_is_one_launch_from_the_first_request_on(machine: Machine) -> None:
    """Each bucket is run and recorded while the engine loads, so no request waits for it."""
    engine = machine.load()
    calls = machine.library.runs

    for position in range(5):
        engine.step([Row([1], position, [1], samples=True)])

    assert (machine.library.runs, machine.device.launches) == (calls, 5)
    engine.close()


def test_a_library_that_cannot_be_recorded_only_runs_slower(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.library.can_record = False
    engine = machine.load()

    logits = engine.step([Row([5], 0, [2], samples=True)])

    assert (logits[0] == machine.expected([5])).all()
    assert machine.device.launches == 0
    assert "graph_refused" in caplog.text
    engine.close()


def test_an_idle_place_keeps_what_its_sequence_computed(machine: Machine) -> None:
    """It is run with its neighbours; what it writes lies where its own next token goes."""
    engine, prompt = machine.load(), text(2, 12)
    engine.step([Row(prompt[:11], 0, [1], samples=False)])

    for position in range(20):
        engine.step([Row([7], position, [8], samples=False)])
    logits = engine.step([Row(prompt[11:], 11, [1], samples=True)])

    assert (logits[0] == machine.expected(prompt)).all()
    engine.close()


def test_logits_narrower_than_the_plans_are_copied_row_by_row(tmp_path: Path) -> None:
    """Under tp the vocabulary is padded; the caller gets its own columns, contiguous."""
    machine = Machine(tmp_path, fake_manifest(vocab=VOCAB, sharding=Sharding(tp=3)))
    engine = machine.load(communicator=FakeCommunicator(machine.device))

    logits = engine.step([Row([9], 0, [1], samples=True), Row([3], 0, [2], samples=True)])

    assert fake_plan(machine.manifest, 0).logits_width == 42
    assert logits.shape == (2, VOCAB)
    assert logits.flags.c_contiguous
    assert (logits == np.stack([machine.expected([9]), machine.expected([3])])).all()
    engine.close()


# Limits.


def test_a_row_takes_the_tokens_of_its_whole_cache(machine: Machine) -> None:
    limits = machine.load(kv_tokens=3 * CACHE_TOKENS + 5).limits

    assert (limits.rows_max, limits.kv_blocks, limits.kv_block_tokens) == (3, 4, CACHE_TOKENS)
    assert limits.sequence_tokens_max == LONGEST


def test_context_parallel_ranks_are_dealt_as_many_rows_each(tmp_path: Path) -> None:
    """Three rows of one token are run as four; the fourth place is never a sequence's."""
    machine = Machine(tmp_path, fake_manifest(vocab=VOCAB, sharding=Sharding(cp=2)))
    engine = machine.load(rows_max=3, communicator=FakeCommunicator(machine.device))

    logits = engine.step([Row([5], 0, [3], samples=True)])

    assert engine.limits.rows_max == 3
    assert (logits[0] == machine.expected([5])).all()
    engine.close()


def test_too_little_kv_for_one_row_is_refused_with_the_number_that_would_do(
    machine: Machine,
) -> None:
    with pytest.raises(ConfigRefused, match="Set kv_tokens to 512 for 8 rows"):
        machine.load(kv_tokens=CACHE_TOKENS - 1)


def test_where_nobody_says_how_much_is_cached_every_row_has_its_place(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What suits engines that share blocks would hold no row at all of a long context."""

    def on_the_fakes(folder: Path, manifest: Manifest, **given: Any) -> TensorRtEngine:
        return TensorRtEngine(
            folder, manifest, device=machine.device, library=machine.library, **given
        )

    monkeypatch.setattr("headrace.serving.engine.tensorrt.TensorRtEngine", on_the_fakes)
    trust = trust_key(tmp_path / "trust")

    few, _ = load_engine(machine.folder, rows_max=3, trust=trust)
    all_there_are, _ = load_engine(machine.folder, rows_max=1024, trust=trust)

    assert (few.limits.rows_max, all_there_are.limits.rows_max) == (3, 8)


# Stages.


def test_three_stages_answer_as_one_device_does(tmp_path: Path) -> None:
    """Each has its layers, its caches and its device; only the last has logits."""
    manifest = fake_manifest(vocab=VOCAB, sharding=Sharding(pp=3))
    links: list[deque[bytes]] = [deque(), deque()]
    machines = [Machine(tmp_path, manifest) for _ in range(3)]
    engines = [
        each.load(
            rank=rank,
            channel=FakeChannel(
                each.device,
                before=links[rank - 1] if rank else None,
                after=links[rank] if rank < 2 else None,
            ),
        )
        for rank, each in enumerate(machines)
    ]
    prompt = text(3, 30)

    for first, end in ((0, 17), (17, 29), (29, 30)):
        rows = [Row(prompt[first:end], first, [2], True), Row([4], first // 17, [1], False)]
        *earlier, logits = [engine.step(rows) for engine in engines]

        assert [each.shape for each in earlier] == [(0, VOCAB), (0, VOCAB)]
        assert (logits[0] == machines[2].expected(prompt[:end])).all()
    for engine in engines:
        engine.close()


# What is given back, and when.


def test_everything_is_given_back_users_before_what_they_use(tmp_path: Path) -> None:
    machine = Machine(tmp_path, fake_manifest(vocab=VOCAB, sharding=Sharding(tp=2)))
    engine = machine.load(communicator=FakeCommunicator(machine.device))

    engine.close()
    engine.close()

    order = ["context", "plan", "runtime", "communicator", "memory", "host memory", "stream"]
    assert [each for each in machine.given_back() if each != "graph"] == [*order, "device"]
    assert machine.device.left_over == []


def test_a_load_that_stops_anywhere_gives_everything_back(tmp_path: Path) -> None:
    """For every call that can fail: the plan goes before its memory, though an error holds frames
    that know it."""
    counted = Machine(tmp_path)
    counted.load()
    calls = counted.device.calls

    for number in range(calls):
        machine = Machine(tmp_path, fault_at=number)
        with pytest.raises(EngineFault):
            machine.load()
        assert machine.device.left_over == [], number
        order = machine.given_back()
        if "plan" in order and "memory" in order:
            assert order.index("plan") < order.index("memory"), number
        assert machine.library.contexts == 0, number


def test_a_device_that_fails_in_a_step_ends_the_engine(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    engine = machine.load()
    machine.device.fault_at = machine.device.calls + 2

    with pytest.raises(EngineFault, match="fell off the bus"):
        engine.step([Row([1], 0, [1], samples=True)])

    with pytest.raises(EngineFault, match="is closed"):
        engine.step([Row([1], 0, [1], samples=True)])
    assert machine.device.left_over == []
    assert "not_freed" in caplog.text


def test_a_step_the_library_refuses_says_why_in_its_words(machine: Machine) -> None:
    engine = machine.load()
    machine.library.refuse_run = machine.library.runs

    with pytest.raises(EngineFault, match=r"run a step.*illegal address.*Restart"):
        engine.step([Row(text(1, 9), 0, [1], samples=True)])

    assert machine.device.left_over == []


# What is refused.


def changed(**facts: Any) -> Callable[[Machine], None]:
    """A change of the manifest's TensorRT facts."""

    def change(machine: Machine) -> None:
        assert machine.manifest.tensorrt is not None
        machine.manifest = replace(
            machine.manifest, tensorrt=replace(machine.manifest.tensorrt, **facts)
        )

    return change


def written(**plan: Any) -> Callable[[Machine], None]:
    """Another plan in the place of the manifest's."""

    def change(machine: Machine) -> None:
        other = replace(fake_plan(machine.manifest, 0), **plan)
        (machine.folder / "rank-0.plan").write_bytes(other.to_bytes())

    return change


def damaged(content: bytes) -> Callable[[Machine], None]:
    return lambda machine: (machine.folder / "rank-0.plan").write_bytes(content) and None


def gone(machine: Machine) -> None:
    (machine.folder / "rank-0.plan").unlink()


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        pytest.param(gone, ArtifactTampered, "cannot be read", id="a missing plan"),
        pytest.param(damaged(b""), ArtifactTampered, "empty file", id="an empty plan"),
        pytest.param(damaged(b"\0" * 99), ArtifactTampered, "Magic tag", id="a damaged plan"),
        pytest.param(
            written(compute_capability="8.9"), ArtifactTampered, "another device", id="foreign"
        ),
        pytest.param(written(cache_tokens=65), ArtifactTampered, "past_k_0 is", id="longer caches"),
        pytest.param(written(last_layer=2), ArtifactTampered, "past_k_2 is None", id="few layers"),
        pytest.param(written(is_last=False), ArtifactTampered, "too narrow", id="a stage's plan"),
        pytest.param(
            written(is_in_place=False), ArtifactTampered, "not written over", id="copied caches"
        ),
        pytest.param(written(profiles=()), ArtifactTampered, "has 0 profiles", id="no profiles"),
        pytest.param(changed(profiles=()), ArtifactTampered, "profiles", id="none in the manifest"),
        pytest.param(changed(ranks=()), ArtifactTampered, "one plan for each", id="no ranks"),
        pytest.param(
            changed(compute_capabilities=("8.9", "12.0")),
            DeviceUnsuitable,
            "runs on compute capability 8.9, 12.0; Fake GPU has 9.0",
            id="another GPU",
        ),
        pytest.param(
            changed(sharding=Sharding(tp=2)), ArtifactTampered, "one plan", id="a missing rank"
        ),
    ],
)
def test_a_plan_that_does_not_belong_here_is_refused(
    change: Callable[[Machine], None], kind: type[ServingError], said: str, machine: Machine
) -> None:
    change(machine)

    with pytest.raises(kind, match=said):
        machine.load()

    assert machine.device.left_over == []


def test_a_rank_by_itself_is_refused(tmp_path: Path) -> None:
    machine = Machine(tmp_path, fake_manifest(vocab=VOCAB, sharding=Sharding(tp=2)))

    with pytest.raises(ConfigRefused, match="Start all ranks together"):
        machine.load()

    with pytest.raises(ConfigRefused, match="has no rank 2"):
        Machine(tmp_path, machine.manifest).load(rank=2)


def test_too_little_memory_is_refused_with_every_number_before_it_is_taken(tmp_path: Path) -> None:
    machine = Machine(tmp_path, total_bytes=1 << 20)

    with pytest.raises(
        DoesNotFit, match=r"needs [\d,]+ bytes more of Fake GPU; 1,047,576 are free"
    ):
        machine.load()

    assert "memory" not in machine.given_back()


def test_weights_stream_where_they_do_not_fit(tmp_path: Path) -> None:
    """The budget is what the device has left beside caches, activations and spare room."""
    manifest = fake_manifest(vocab=VOCAB, flags=("weight_streaming",))
    machine = Machine(tmp_path, manifest)
    weights = 4 << 20
    plan = replace(fake_plan(machine.manifest, 0), weight_bytes=weights)
    (machine.folder / "rank-0.plan").write_bytes(plan.to_bytes())
    whole = machine.load()
    beside = machine.device.used_bytes - weights
    whole.close()

    tight = Machine(tmp_path, manifest, total_bytes=beside + (512 << 20) + (3 << 20))
    (tight.folder / "rank-0.plan").write_bytes(plan.to_bytes())
    engine = tight.load()

    assert tight.device.plan_bytes == 2 << 20
    assert (engine.step([Row([5], 0, [1], True)])[0] == tight.expected([5])).all()
    engine.close()
