"""The same prompts for every engine."""

import pytest

from headrace.deploy.bench.workload import make_load, num_requests


def encode(text: str) -> list[int]:
    """A token for each character: enough to count and to compare."""
    return list(text.encode())


def load(**changes):
    arguments = {"streams": 8, "per_stream": 2, "seed": 7}
    return make_load(encode, **(arguments | changes))


def test_the_same_seed_asks_the_same_prompts() -> None:
    """Otherwise two engines of one round would not have done the same work."""
    assert load().prompts == load().prompts
    assert load().prompts != load(seed=8).prompts


def test_prompts_have_64_to_256_tokens_spread_evenly() -> None:
    """Every round has the same number of prompt tokens, whatever the seed."""
    lengths = sorted(len(prompt) for prompt in load().prompts)

    assert lengths[0] == 64
    assert lengths[-1] == 256
    assert sum(lengths) == sum(len(prompt) for prompt in load(seed=99).prompts)


def test_no_two_prompts_share_their_first_tokens() -> None:
    """A prefix cache has nothing to find, also not from an earlier round."""
    openings = [
        tuple(prompt[:16]) for seed in (1000, 1001, 1002) for prompt in load(seed=seed).prompts
    ]

    assert len(set(openings)) == len(openings)


def test_a_shared_prefix_is_shared_by_all() -> None:
    prompts = load(prefix_tokens=100).prompts

    assert len({tuple(prompt[:100]) for prompt in prompts}) == 1
    assert len({tuple(prompt[100:116]) for prompt in prompts}) == len(prompts)
    assert min(len(prompt) for prompt in prompts) == 164


@pytest.mark.parametrize(
    ("streams", "per_stream", "expected"),
    [
        pytest.param(1, 2, 6, id="a lone caller asks a few more"),
        pytest.param(8, 2, 16, id="two for each caller"),
        pytest.param(32, 3, 96, id="or as many as were asked for"),
    ],
)
def test_each_caller_asks_several_prompts(streams, per_stream, expected) -> None:
    assert num_requests(streams, per_stream) == expected
    assert len(load(streams=streams, per_stream=per_stream).prompts) == expected
