"""The sampler keeps each request's rules, and a seed gives the same answer in any company."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.serving.domain.request import Sampling
from headrace.serving.engine.native_library import KERNELS, native_library
from headrace.serving.engine.sampler import (
    NO_TOKEN,
    Sampled,
    Sampler,
    SampleRequest,
    SamplingState,
)
from headrace.serving.errors import EngineFault

VOCAB = 300
HAS_AVX512 = native_library().hr_kernels_name(KERNELS["avx512"]) is not None
Floats = npt.NDArray[np.float32]
Sample = Callable[..., Sampled]


@pytest.fixture(
    params=[
        "portable",
        pytest.param(
            "avx512",
            marks=pytest.mark.skipif(not HAS_AVX512, reason="this CPU has no AVX512-BF16"),
        ),
    ]
)
def sampler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sampler]:
    monkeypatch.setenv("HEADRACE_KERNELS", request.param)
    made = Sampler(VOCAB, 64, threads=2)
    yield made
    made.close()


def rules(**given_rules: object) -> Sampling:
    return Sampling(max_tokens=16, **given_rules)  # type: ignore[arg-type]


def one(
    sampler: Sampler,
    logits: Floats,
    sampling: Sampling,
    *,
    prompt: Sequence[int] = (),
    answer: Sequence[int] = (),
    mask: npt.NDArray[np.int32] | None = None,
    forbid: Sequence[int] = (),
) -> Sampled:
    state = SamplingState(sampling, prompt)
    for token_id in answer:
        state.append(token_id)
    return sampler.sample(logits[None, :], [SampleRequest(state, mask, forbid)])[0]


def flat(**raised: float) -> Floats:
    """Zero logits, with `t3=2.0` raising token 3."""
    logits = np.zeros(VOCAB, np.float32)
    for name, value in raised.items():
        logits[int(name[1:])] = value
    return logits


def mask_of(*allowed: int) -> npt.NDArray[np.int32]:
    words = np.zeros(-(-VOCAB // 32), np.uint32)
    for token_id in allowed:
        words[token_id // 32] |= np.uint32(1 << token_id % 32)
    return words.view(np.int32)


def drawn(sampler: Sampler, logits: Floats, sampling: Sampling, draws: int = 400) -> set[int]:
    """The tokens that come up in so many steps."""
    state = SamplingState(sampling, ())
    found: set[int] = set()
    for _ in range(draws):
        token_id = sampler.sample(logits[None, :], [SampleRequest(state)])[0].token_id
        state.append(token_id)
        found.add(token_id)
    return found


def test_temperature_zero_takes_the_likeliest(sampler: Sampler) -> None:
    assert one(sampler, flat(t7=1.0, t299=3.0), rules()).token_id == 299


def test_a_tie_goes_to_the_lowest_id(sampler: Sampler) -> None:
    assert one(sampler, flat(t40=2.0, t41=2.0, t280=2.0), rules()).token_id == 40


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_a_fault(
    broken: float, temperature: float, sampler: Sampler
) -> None:
    """An engine that returns NaN must not go on answering and charging."""
    logits = flat(t5=1.0)
    logits[211] = broken

    with pytest.raises(EngineFault, match="NaN"):
        one(sampler, logits, rules(temperature=temperature))


def test_a_broken_row_is_found_behind_a_mask(sampler: Sampler) -> None:
    logits = np.full(VOCAB, np.nan, np.float32)

    with pytest.raises(EngineFault, match="NaN"):
        one(sampler, logits, rules(), mask=mask_of(4))


def test_a_bias_is_added(sampler: Sampler) -> None:
    biased = rules(logit_bias={9: 5.0, 3: -100.0})

    assert one(sampler, flat(t3=4.0), biased).token_id == 9


def test_repetition_penalty_counts_prompt_and_answer(sampler: Sampler) -> None:
    """It divides positive and multiplies negative logits: both become less likely."""
    penalised = rules(repetition_penalty=2.0, logprobs=0)
    logits = np.full(VOCAB, -3.0, np.float32)
    logits[[10, 20, 30]] = 3.0, 2.9, 1.6

    found = one(sampler, logits, penalised, prompt=[10, 10], answer=[20])

    assert found.token_id == 30
    # 3 / 2 and 2.9 / 2 are below 1.6; -2 becomes -4, below the -3 of the others.
    logits[[10, 20, 30]] = -2.0
    assert one(sampler, logits, penalised, prompt=[10], answer=[20, 30]).token_id == 0


def test_frequency_penalty_counts_each_occurrence_in_the_answer(sampler: Sampler) -> None:
    penalised = rules(frequency_penalty=0.5)
    logits = flat(t10=3.0, t20=2.4, t30=1.9)

    assert one(sampler, logits, penalised, prompt=[10, 10, 10]).token_id == 10
    assert one(sampler, logits, penalised, answer=[10, 10]).token_id == 20
    assert one(sampler, logits, penalised, answer=[10, 10, 10, 20, 20]).token_id == 30


def test_presence_penalty_counts_once(sampler: Sampler) -> None:
    penalised = rules(presence_penalty=1.0)
    logits = flat(t10=3.0, t20=2.4)

    assert one(sampler, logits, penalised, answer=[10]).token_id == 20
    assert one(sampler, logits, penalised, answer=[10] * 9 + [20]).token_id == 10


def test_a_history_may_grow_without_bound(sampler: Sampler) -> None:
    """Its arrays grow while the native side holds their addresses."""
    answer = [i % 290 for i in range(1000)]

    found = one(sampler, flat(), rules(presence_penalty=1.0), answer=answer)

    assert found.token_id == 290


def test_only_tokens_of_the_mask_are_chosen(sampler: Sampler) -> None:
    logits = flat(t5=9.0, t64=1.0)

    assert one(sampler, logits, rules(), mask=mask_of(31, 32, 64)).token_id == 64
    hot = rules(temperature=2.0, seed=5)
    assert one(sampler, logits, hot, mask=mask_of(31, 32, 64)).token_id in {31, 32, 64}


def test_a_short_mask_allows_nothing_beyond_its_end(sampler: Sampler) -> None:
    """A model's vocabulary may be padded beyond its tokenizer's."""
    only_first = np.array([-1], np.int32)

    assert one(sampler, flat(t32=9.0, t31=1.0), rules(), mask=only_first).token_id == 31


def test_an_empty_mask_chooses_no_token(sampler: Sampler) -> None:
    assert one(sampler, flat(), rules(), mask=mask_of()).token_id == NO_TOKEN


def test_a_forbidden_token_is_not_chosen_yet(sampler: Sampler) -> None:
    assert one(sampler, flat(t2=9.0, t8=1.0), rules(), forbid=(2,)).token_id == 8


def test_a_complete_grammar_may_end_below_min_tokens(sampler: Sampler) -> None:
    """Where the mask leaves only what is forbidden, the mask wins."""
    assert one(sampler, flat(), rules(), mask=mask_of(2), forbid=(2,)).token_id == 2


def test_top_k_keeps_k_and_their_ties(sampler: Sampler) -> None:
    logits = flat(t10=2.0, t11=1.5, t12=1.0, t13=1.0)

    assert drawn(sampler, logits, rules(temperature=1.5, top_k=2)) == {10, 11}
    assert drawn(sampler, logits, rules(temperature=1.5, top_k=3)) == {10, 11, 12, 13}


def test_top_p_keeps_the_fewest_that_reach_p(sampler: Sampler) -> None:
    """Probabilities 0.5, 0.3, 0.15, 0.05."""
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[[7, 8, 9, 10]] = np.log([0.5, 0.3, 0.15, 0.05])

    assert drawn(sampler, logits, rules(temperature=1.0, top_p=0.45)) == {7}
    assert drawn(sampler, logits, rules(temperature=1.0, top_p=0.75)) == {7, 8}
    assert drawn(sampler, logits, rules(temperature=1.0, top_p=0.94)) == {7, 8, 9}


def test_min_p_is_relative_to_the_likeliest(sampler: Sampler) -> None:
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[[7, 8, 9, 10]] = np.log([0.5, 0.3, 0.15, 0.05])

    assert drawn(sampler, logits, rules(temperature=1.0, min_p=0.5)) == {7, 8}
    assert drawn(sampler, logits, rules(temperature=1.0, min_p=0.2)) == {7, 8, 9}


def test_draws_follow_the_distribution(sampler: Sampler) -> None:
    """4,096 steps at probabilities 0.5, 0.3, 0.2: within four standard deviations."""
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[[3, 150, 299]] = np.log([0.5, 0.3, 0.2])
    state = SamplingState(rules(temperature=1.0, seed=11), ())
    counts = {3: 0, 150: 0, 299: 0}
    for _ in range(4096):
        token_id = sampler.sample(logits[None, :], [SampleRequest(state)])[0].token_id
        state.append(token_id)
        counts[token_id] += 1

    assert abs(counts[3] - 2048) < 128
    assert abs(counts[150] - 1229) < 118
    assert abs(counts[299] - 819) < 103


def test_temperature_sharpens(sampler: Sampler) -> None:
    """At a temperature of 0.02 a lead of one is a factor of e to the 50."""
    assert drawn(sampler, flat(t9=1.0), rules(temperature=0.02), 50) == {9}


def test_a_seed_repeats_whatever_else_is_in_the_batch(sampler: Sampler) -> None:
    """A request can be replayed, and resumed on another replica, to the same answer."""
    logits = np.random.default_rng(0).normal(0, 2, (40, VOCAB)).astype(np.float32)
    sampling = rules(temperature=0.9, top_p=0.9, seed=1234)
    alone = [one(sampler, logits[0], sampling, answer=[1] * n).token_id for n in range(20)]

    crowded: list[int] = []
    for n in range(20):
        states = [SamplingState(rules(temperature=1.0, seed=i), ()) for i in range(39)]
        mine = SamplingState(sampling, ())
        for _ in range(n):
            mine.append(1)
        order = [*states[:n], mine, *states[n:]]
        rows = np.concatenate([logits[1 : n + 1], logits[:1], logits[n + 1 :]])
        crowded.append(sampler.sample(rows, [SampleRequest(s) for s in order])[n].token_id)

    assert crowded == alone
    assert len(set(alone)) > 1


def test_seeds_differ(sampler: Sampler) -> None:
    logits = flat()
    found = [one(sampler, logits, rules(temperature=1.0, seed=s)).token_id for s in range(50)]

    assert len(set(found)) > 25


def test_logprobs_are_the_models_own(sampler: Sampler) -> None:
    """Before bias, temperature and mask: what the model thinks, not what was imposed."""
    logits = np.random.default_rng(1).normal(0, 3, VOCAB).astype(np.float32)
    own = logits - np.log(np.sum(np.exp(logits.astype(np.float64))))
    sampling = rules(temperature=0.5, logit_bias={17: 100.0}, logprobs=3)

    found = one(sampler, logits, sampling, mask=mask_of(17))

    assert found.token_id == 17
    assert found.logprob == pytest.approx(own[17], abs=1e-4)
    likeliest = np.argsort(-own)[:3]
    assert [token_id for token_id, _ in found.top] == likeliest.tolist()
    assert [p for _, p in found.top] == pytest.approx(own[likeliest].tolist(), abs=1e-4)


def test_logprobs_are_reported_only_where_asked(sampler: Sampler) -> None:
    states = [SamplingState(rules(logprobs=n), ()) for n in (None, 0, 2)]
    logits = np.stack([flat(t4=1.0)] * 3)

    silent, chosen, two = sampler.sample(logits, [SampleRequest(s) for s in states])

    assert silent.logprob is None
    assert chosen.logprob is not None
    assert chosen.top == ()
    assert [token_id for token_id, _ in two.top] == [4, 0]


def test_logits_are_left_as_they_were(sampler: Sampler) -> None:
    logits = flat(t3=2.0)
    before = logits.copy()

    one(sampler, logits, rules(logit_bias={3: -9.0}), forbid=(0,), mask=mask_of(0, 1, 3))

    np.testing.assert_array_equal(logits, before)


def kept_by(logits: Floats, sampling: Sampling) -> set[int]:
    """What the rules keep, by sorting everything: top_k, then top_p, then min_p."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = sorted(range(len(logits)), key=lambda i: (-scaled[i], i))
    if sampling.top_k:
        least = logits[order[min(sampling.top_k, len(order)) - 1]]
        order = [i for i in order if logits[i] >= least]
    weights = np.exp(scaled[order] - scaled[order[0]])
    kept: list[int] = []
    mass = 0.0
    for i, weight in zip(order, weights, strict=True):
        if mass >= sampling.top_p * weights.sum() * (1 + 1e-6):
            break
        kept.append(i)
        mass += weight
    lead = scaled[order[0]]
    return {i for i in kept if scaled[i] >= lead + np.log(max(sampling.min_p, 1e-300)) - 1e-4}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.05, 1.0, 4.0, 30.0]),
    temperature=st.sampled_from([0.2, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 40, 299, 1000]),
    top_p=st.sampled_from([1e-9, 0.01, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.9]),
)
def test_nothing_outside_the_rules_is_ever_drawn(
    seed: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Thresholds and partial selection against a full sort."""
    logits = np.random.default_rng(seed).normal(0, spread, VOCAB).astype(np.float32)
    sampling = rules(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    sampler = Sampler(VOCAB, 1)

    found = drawn(sampler, logits, sampling, 40)
    sampler.close()

    assert found <= kept_by(logits, sampling)


def test_no_rows_are_no_work(sampler: Sampler) -> None:
    assert sampler.sample(np.empty((0, VOCAB), np.float32), []) == []


def test_closing_twice_is_harmless() -> None:
    sampler = Sampler(VOCAB, 1, threads=2)
    sampler.close()
    sampler.close()
