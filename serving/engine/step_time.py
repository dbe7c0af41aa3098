"""How long a step takes, learnt from the steps that ran.

    ms = base + row_ms * rows that decode + token_ms * prompt tokens

fitted by least squares over the recent past: sums of products that fade with every step, solved
now and then. A weak pull towards a prior keeps the fit usable when the load never varies, and
before the first steps have run. Attention makes long contexts slower than the line says; the fit
follows within a second or two.

How far steps lie from the line is learnt as well, because a promise is kept by the slow ones: what
is sized for a longest time keeps a distance of `SIGMAS` such spreads. A fixed margin would fit one
machine: simulated, a fifth of the promised gap does for steps that vary by 5 % and breaks the
promise of a quarter of the priority requests at 10 %.
"""

from math import sqrt

_MEMORY = 0.995
"""What a step's sums keep in the next one: a memory of about 200 steps, 2 to 8 s."""
_SOLVE_EVERY = 8
"""Steps between two fits. A fit takes about 5 us, noting a step 1 us."""
_OUTLIER = 4.0
"""A step longer than this many times its prediction counts as this many: a stolen core or a page
fault says nothing about the next step."""
_TRUSTED_STEPS = 16
"""Steps before the model judges what is an outlier."""
_PULL = (2.0, 4.0, 400.0)
"""Weight of the prior for base, rows and tokens: a couple of steps of ordinary size."""
SIGMAS = 4.0
"""Of a hundred gaps of an answer none may be longer than promised, or its p99 is: at four spreads
one step in 30,000 is, if times are normal."""
_SPREAD_FIRST = 0.1
"""Before steps have been seen: what a busy machine shows."""
_SPREAD_MIN = 0.02
_SCALE_MIN = 1e-4
"""Milliseconds: no coefficient is smaller, so that the model can be divided by."""


class StepTimeModel:
    """The line above. Owned by the engine's thread."""

    __slots__ = ("_prior", "_square", "_steps", "_xx", "_xy", "base_ms", "row_ms", "token_ms")

    def __init__(
        self, *, base_ms: float = 4.0, row_ms: float = 0.6, token_ms: float = 0.25
    ) -> None:
        """Begin with a prior: by default the demo model's int8 engine on two cores."""
        self.base_ms = base_ms
        self.row_ms = row_ms
        self.token_ms = token_ms
        self._prior = (base_ms, row_ms, token_ms)
        self._steps = 0
        self._square = _SPREAD_FIRST**2
        """Mean square of the relative distance from the line, fading like the sums."""
        # Of (1, rows, tokens): the upper triangle of sums of products, and those with the time.
        self._xx = [0.0] * 6
        self._xy = [0.0] * 3

    def ms(self, rows: int, tokens: int) -> float:
        """Predicted time of a step with `rows` decoding rows and `tokens` prompt tokens."""
        return self.base_ms + self.row_ms * rows + self.token_ms * tokens

    @property
    def spread(self) -> float:
        """Standard deviation of steps from the line, as a share of it."""
        return max(_SPREAD_MIN, sqrt(self._square))

    def sure_ms(self, ms_max: float) -> float:
        """The predicted time of a step that hardly ever takes longer than `ms_max`."""
        return ms_max / (1 + SIGMAS * self.spread)

    def tokens_within(self, ms_max: float, rows: int) -> int:
        """Prompt tokens beside `rows` in a step that takes at most `ms_max`; may be negative."""
        left_ms = self.sure_ms(ms_max) - self.base_ms - self.row_ms * rows
        return int(left_ms / self.token_ms)

    def observe(self, rows: int, tokens: int, ms: float) -> None:
        """Learn from a step that ran."""
        self._steps += 1
        if self._steps > _TRUSTED_STEPS:
            predicted = self.ms(rows, tokens)
            ms = min(ms, _OUTLIER * predicted)
            distance = min(1.0, abs(ms / predicted - 1))
            self._square = self._square * _MEMORY + distance * distance * (1 - _MEMORY)
        xx, xy = self._xx, self._xy
        xx[0] = xx[0] * _MEMORY + 1.0
        xx[1] = xx[1] * _MEMORY + rows
        xx[2] = xx[2] * _MEMORY + tokens
        xx[3] = xx[3] * _MEMORY + rows * rows
        xx[4] = xx[4] * _MEMORY + rows * tokens
        xx[5] = xx[5] * _MEMORY + tokens * tokens
        xy[0] = xy[0] * _MEMORY + ms
        xy[1] = xy[1] * _MEMORY + ms * rows
        xy[2] = xy[2] * _MEMORY + ms * tokens
        if self._steps % _SOLVE_EVERY == 0:
            self._fit()

    def _fit(self) -> None:
        a, b, c, d, e, f = self._xx
        (p, q, r), (base, row, token) = _PULL, self._prior
        a, d, f = a + p, d + q, f + r
        x = self._xy[0] + p * base
        y = self._xy[1] + q * row
        z = self._xy[2] + r * token
        # The pull makes the matrix positive definite, so the determinant is positive.
        m0, m1, m2 = d * f - e * e, c * e - b * f, b * e - c * d
        det = a * m0 + b * m1 + c * m2
        self.base_ms = max(_SCALE_MIN, (m0 * x + m1 * y + m2 * z) / det)
        m3, m4 = a * f - c * c, b * c - a * e
        self.row_ms = max(_SCALE_MIN, (m1 * x + m3 * y + m4 * z) / det)
        self.token_ms = max(_SCALE_MIN, (m2 * x + m4 * y + (a * d - b * b) * z) / det)
