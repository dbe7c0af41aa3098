"""What is asked of every engine: the same prompts, token for token, from a seed.

Prompts are English sentences in a random order, cut to an exact number of tokens. Every prompt
opens with its own number, so that no two share their first block and no prefix cache helps; where
a shared prefix is wanted, all of them open with the same `prefix_tokens` tokens instead.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Encode = Callable[[str], Sequence[int]]
"""Text to token ids, without special tokens: the model's own tokenizer."""

PROMPT_TOKENS_MIN, PROMPT_TOKENS_MAX = 64, 256
TOKENS_OUT = 128
"""Tokens generated for each prompt; end-of-sequence is ignored so that all answers are as long."""
REQUESTS_MIN = 6
"""A single stream answers this many in a round: 768 tokens, so its p99 rests on more than seven."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One closed loop: `streams` callers, each asking its next prompt when its answer is whole."""

    prompts: Sequence[Sequence[int]]
    streams: int
    tokens_out: int = TOKENS_OUT
    time_s_max: float = 20.0
    """The loop is cut off here; what was delivered until then counts."""

    @property
    def tokens_asked(self) -> int:
        return len(self.prompts) * self.tokens_out


def num_requests(streams: int, per_stream: int) -> int:
    """Prompts of one round: each caller asks `per_stream` of them, a lone caller a few more.

    With two for each caller, prefill and decode overlap as in a steady service, while one round
    of eight engines at four levels still takes minutes.
    """
    return max(REQUESTS_MIN, streams * per_stream)


def make_load(
    encode: Encode,
    *,
    streams: int,
    per_stream: int,
    seed: int,
    prefix_tokens: int = 0,
    time_s_max: float = 20.0,
) -> Load:
    """The same load for the same arguments, in every process."""
    chance = random.Random(f"headrace bench {seed} {streams}")  # noqa: S311  Reproducible, not secret.
    count = num_requests(streams, per_stream)
    prefix = _tokens(encode, random.Random("headrace bench prefix"), prefix_tokens, "")  # noqa: S311
    prompts = [
        (*prefix, *_tokens(encode, chance, length, f"{chance.randrange(10**6):06}. "))
        for length in _lengths(count, chance)
    ]
    return Load(prompts=prompts, streams=streams, time_s_max=time_s_max)


def _lengths(count: int, chance: random.Random) -> list[int]:
    """Evenly spread over the range and shuffled: every round has the same number of tokens."""
    span = PROMPT_TOKENS_MAX - PROMPT_TOKENS_MIN
    lengths = [PROMPT_TOKENS_MIN + round(span * i / max(1, count - 1)) for i in range(count)]
    chance.shuffle(lengths)
    return lengths


def _tokens(encode: Encode, chance: random.Random, length: int, opening: str) -> tuple[int, ...]:
    sentences: list[str] = []
    ids: Sequence[int] = ()
    while len(ids) < length:
        round_of_all = list(_SENTENCES)
        chance.shuffle(round_of_all)
        sentences += round_of_all
        ids = encode(opening + " ".join(sentences))
    return tuple(ids[:length])


_SENTENCES = (
    "A headrace is the channel that brings water from the river to the wheel of a mill.",
    "The miller opens the gate in the morning and closes it before he goes home.",
    "When the river is high, most of the water runs over the weir and is not used at all.",
    "In dry summers the villages upstream agree on the hours in which each may draw water.",
    "An overshot wheel turns more of the water's fall into work than an undershot one.",
    "Nobody remembers who dug the first ditch, but everybody knows who has to clean it.",
    "The grain is poured into the hopper and trembles down between two heavy stones.",
    "Flour that has become too warm loses its taste, so the stones must not turn too fast.",
    "A bell rings when the hopper is nearly empty, because stones that run dry throw sparks.",
    "The accounts of the mill are kept in a thick book with a red spine.",
    "Each farmer is charged for the sacks that he takes away, not for those that he brings.",
    "The tailrace leads the water back to the river some way below the village.",
    "Trout wait where the water leaves the wheel, for it is cool there and full of air.",
    "Last winter the gate froze, and it took four men with axes to free it.",
    "How much power does a stream give if it falls three metres and carries half a cubic metre?",
    "The apprentice learned to judge the stones by the sound that they make.",
    "On market days carts stand in a line along the whole of the lower street.",
    "Some say that the old bridge is older than the church, and some say the opposite.",
    "A measured quantity is written down at once, because memory is kind to the person who owes.",
    "The surveyor set up his instrument on the hill and looked down on the valley for an hour.",
    "Please explain in a few sentences why the level of a millpond must be kept constant.",
    "Water that is held back in spring can be used in August, if the dam is tight.",
    "There were once eleven mills on this river; today two of them make electricity.",
    "The turbine in the cellar is no larger than a barrel and lights forty houses.",
    "When the load falls suddenly, the governor closes the vanes before the shaft can race.",
    "Children throw sticks from the bridge and run to the other side to see which comes first.",
    "A good rope lasts three years, and a bad one lasts until it is needed.",
    "The carpenter makes the teeth of the great wheel from apple wood, one by one.",
    "If a tooth of wood breaks it is replaced in minutes; an iron one would break its neighbour.",
    "In the evening the sluice is lowered and the whole valley becomes quiet.",
    "Write a short letter to the council in which you ask for the repair of the towpath.",
    "The heron stands at the end of the weir and seems to wait for the same thing as the miller.",
)
