"""Logits to token ids: seeded, reproducible, and one native call for all rows of a step.

The rules apply in this order, as in `transformers` and vLLM:

1. `logit_bias` is added;
2. `repetition_penalty` divides positive and multiplies negative logits of tokens in prompt or
   answer, `frequency_penalty` is subtracted for each occurrence in the answer and
   `presence_penalty` once;
3. tokens outside `mask`, and those in `forbid`, are dropped;
4. `temperature` divides (0: the likeliest is taken here, the lowest id on a tie);
5. `top_k` keeps the k likeliest (and their ties);
6. `top_p` keeps the fewest whose probabilities reach p, likeliest first;
7. `min_p` drops those less likely than min_p times the likeliest;
8. one is drawn with a counter-based generator on (seed, step), so that the draw depends on nothing
   else in the batch and not on the replica.

Log-probabilities are of the model's own distribution, before all of these.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from headrace.serving.domain.request import Sampling
from headrace.serving.engine.base import Logits
from headrace.serving.engine.native_library import (
    NativeSampling,
    kernels_wanted,
    last_error,
    native_library,
)
from headrace.serving.errors import EngineFault

LOGPROBS_MAX: Final = 20
"""Most likeliest tokens reported beside the chosen one; HR_LOGPROBS_MAX in native/api.h."""

NO_TOKEN: Final = -1
"""`Sampled.token_id` when the mask allows no token at all: the sequence cannot go on."""


class SamplingState:
    """What sampling remembers of one sequence: its rules, its tokens and how far it is.

    The loop makes one when it admits a sequence, calls `append` for each token of the answer
    (resumed ones too), and drops it with the sequence. One thread uses it at a time.
    """

    __slots__ = ("_arrays", "_counts", "_forbid", "_index", "_params", "_used", "address")

    address: Final[int]
    """Where the native parameters lie; valid as long as this object."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int]) -> None:
        self._params = params = NativeSampling(
            seed=sampling.seed & 0xFFFF_FFFF_FFFF_FFFF,
            step=0,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            top_k=sampling.top_k,
            logprobs=-1 if sampling.logprobs is None else min(sampling.logprobs, LOGPROBS_MAX),
        )
        self._arrays: list[npt.NDArray[np.generic]] = []
        if bias := sampling.logit_bias:
            ids = np.fromiter(bias.keys(), np.int32, len(bias))
            values = np.fromiter(bias.values(), np.float32, len(bias))
            self._arrays += [ids, values]
            params.bias_count = len(bias)
            params.bias_ids, params.bias_values = ids.ctypes.data, values.ctypes.data
        self._forbid: tuple[Sequence[int], npt.NDArray[np.int32]] | None = None
        self._index: dict[int, int] | None = None
        """Token to its place in the history; None when no rule looks at the history."""
        self._used = self._counts = np.empty(0, np.int32)
        if (
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
        ):
            self._begin_history(prompt_ids if sampling.repetition_penalty != 1.0 else ())
        self.address = ctypes.addressof(params)

    @property
    def step(self) -> int:
        """Index in the answer of the token that is sampled next."""
        return self._params.step

    def append(self, token_id: int) -> None:
        """Count one more token of the answer, whether sampled or resumed."""
        self._params.step += 1
        if self._index is None:
            return
        place = self._index.setdefault(token_id, len(self._index))
        if place == len(self._used):
            self._grow(2 * place)
        if place == self._params.history_count:
            self._used[place] = token_id
            self._params.history_count = place + 1
        self._counts[place] += 1

    def limit(self, mask: npt.NDArray[np.int32] | None, forbid: Sequence[int]) -> None:
        """Set which tokens the next call may choose; see `SampleRequest`."""
        params = self._params
        if mask is None:
            params.mask, params.mask_words = None, 0
        else:
            assert mask.dtype == np.int32
            assert mask.flags.c_contiguous
            params.mask, params.mask_words = mask.ctypes.data, mask.size
        if not forbid:
            params.forbid_count = 0
            return
        if self._forbid is None or self._forbid[0] is not forbid:
            ids = np.fromiter(forbid, np.int32, len(forbid))
            self._forbid = (forbid, ids)
            params.forbid_ids = ids.ctypes.data
        params.forbid_count = len(forbid)

    @property
    def logprobs(self) -> int:
        """How many likeliest tokens are reported; -1 when not even the chosen one's is."""
        return self._params.logprobs

    def _begin_history(self, prompt_ids: Sequence[int]) -> None:
        self._index = {token_id: i for i, token_id in enumerate(dict.fromkeys(prompt_ids))}
        known = len(self._index)
        self._grow(max(64, 2 * known))
        self._used[:known] = np.fromiter(self._index, np.int32, known)
        self._params.history_count = known

    def _grow(self, places: int) -> None:
        used, counts = np.zeros(places, np.int32), np.zeros(places, np.int32)
        used[: len(self._used)] = self._used
        counts[: len(self._counts)] = self._counts
        self._used, self._counts = used, counts
        self._params.history_ids = used.ctypes.data
        self._params.history_counts = counts.ctypes.data


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One logits row to sample."""

    state: SamplingState
    mask: npt.NDArray[np.int32] | None = None
    """Allowed tokens as llguidance lays them out: bit t % 32 of word t // 32 is token t. Tokens
    past its end are not allowed. None allows all. It must live until `sample` returns."""
    forbid: Sequence[int] = ()
    """Tokens not allowed for the moment (end-of-sequence and stop tokens below min_tokens); pass
    the same object every time. Ignored where it would leave nothing of the mask, so that a grammar
    that is complete can end its answer."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was chosen for one row."""

    token_id: int
    """`NO_TOKEN` when the mask has no bit set."""
    logprob: float | None = None
    """Of the chosen token; None unless `Sampling.logprobs` is set."""
    top: tuple[tuple[int, float], ...] = ()
    """The `Sampling.logprobs` likeliest tokens, likeliest first, ties by id."""


class Sampler:
    """Samples all rows of a step in one native call.

    One thread calls `sample` at a time.

    Args:
        vocab: width of the logits.
        rows_max: most rows in one call.
        threads: threads over which the rows are spread, the caller's among them. The others sleep
            between calls.

    Raises:
        EngineFault: the native library is missing or was built from other sources.
    """

    def __init__(self, vocab: int, rows_max: int, *, threads: int = 1) -> None:
        assert vocab > 0
        assert rows_max > 0
        assert threads > 0
        self._library = native_library()
        self._crew: int | None = self._library.hr_crew_new(threads, kernels_wanted())
        if self._crew is None:
            raise EngineFault(
                f"The sampler cannot start: {last_error()}.",
                why="The native library makes its threads and chooses its kernels at this point.",
                fix="Check HEADRACE_KERNELS and the number of threads this process may have.",
            )
        self._vocab = vocab
        self._rows_max = rows_max
        self._addresses = (ctypes.c_void_p * rows_max)()
        self._ids = np.empty(rows_max, np.int32)
        self._logprobs = np.empty(rows_max, np.float32)
        self._top_ids = np.empty((rows_max, LOGPROBS_MAX), np.int32)
        self._top_logprobs = np.empty((rows_max, LOGPROBS_MAX), np.float32)
        self._outputs = (
            self._ids.ctypes.data,
            self._logprobs.ctypes.data,
            self._top_ids.ctypes.data,
            self._top_logprobs.ctypes.data,
        )

    def sample(self, logits: Logits, requests: Sequence[SampleRequest]) -> list[Sampled]:
        """Choose a token for each row; the states are not advanced (call `append`).

        Args:
            logits: (len(requests), vocab) float32, C-contiguous; left as it was.
            requests: one for each row.

        Raises:
            EngineFault: a row holds no finite logit, or a NaN: the engine cannot be trusted.
        """
        rows = len(requests)
        assert rows <= self._rows_max
        assert logits.shape == (rows, self._vocab)
        assert logits.dtype == np.float32
        assert logits.flags.c_contiguous
        assert self._crew is not None
        if rows == 0:
            return []
        addresses = self._addresses
        reports = False
        for i, request in enumerate(requests):
            state = request.state
            state.limit(request.mask, request.forbid)
            addresses[i] = state.address
            reports = reports or state.logprobs >= 0
        code = self._library.hr_sample(
            self._crew, rows, self._vocab, LOGPROBS_MAX,
            logits.ctypes.data, addresses, *self._outputs,
        )  # fmt: skip
        if code != 0:
            raise EngineFault(
                f"The engine's logits cannot be sampled: {last_error()}.",
                why="A NaN, or a row without a finite value: the engine's state is broken.",
                fix="The replica restarts. If that repeats, check the artifact: `headrace doctor`.",
            )
        ids = self._ids[:rows].tolist()
        if not reports:
            return [Sampled(token_id) for token_id in ids]
        return [self._reported(i, ids[i], request) for i, request in enumerate(requests)]

    def close(self) -> None:
        """End the worker threads. Idempotent."""
        if self._crew is not None:
            self._library.hr_crew_free(self._crew)
            self._crew = None

    def __del__(self) -> None:
        if getattr(self, "_crew", None) is not None:
            self.close()

    def _reported(self, row: int, token_id: int, request: SampleRequest) -> Sampled:
        wanted = request.state.logprobs
        if wanted < 0 or token_id == NO_TOKEN:
            return Sampled(token_id)
        wanted = min(wanted, self._vocab)
        top_ids = self._top_ids[row, :wanted].tolist()
        top_logprobs = self._top_logprobs[row, :wanted].tolist()
        return Sampled(
            token_id, float(self._logprobs[row]), tuple(zip(top_ids, top_logprobs, strict=True))
        )
