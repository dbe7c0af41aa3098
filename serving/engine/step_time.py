"""How long a step takes, learnt from the steps that ran.

    ms = base + row_ms * rows that decode + token_ms * prompt tokens

fitted by least squares over the recent past: sums of products that fade with every step, solved
now and then. A weak pull towards a prior keeps the fit usable when the load never varies, and
before the first steps have run. Attention makes long contexts slower than the line says; the fit
follows within a second or two, and the policy keeps a margin.
"""

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
_SCALE_MIN = 1e-4
"""Milliseconds: no coefficient is smaller, so that the model can be divided by."""


class StepTimeModel:
    """The line above. Owned by the engine's thread."""

    __slots__ = ("_prior", "_steps", "_xx", "_xy", "base_ms", "row_ms", "token_ms")

    def __init__(
        self, *, base_ms: float = 4.0, row_ms: float = 0.6, token_ms: float = 0.25
    ) -> None:
        """Begin with a prior: by default the demo model's int8 engine on two cores."""
        self.base_ms = base_ms
        self.row_ms = row_ms
        self.token_ms = token_ms
        self._prior = (base_ms, row_ms, token_ms)
        self._steps = 0
        # Of (1, rows, tokens): the upper triangle of sums of products, and those with the time.
        self._xx = [0.0] * 6
        self._xy = [0.0] * 3

    def ms(self, rows: int, tokens: int) -> float:
        """Predicted time of a step with `rows` decoding rows and `tokens` prompt tokens."""
        return self.base_ms + self.row_ms * rows + self.token_ms * tokens

    def tokens_within(self, ms: float, rows: int) -> int:
        """Prompt tokens that fit beside `rows` into a step of `ms`; may be negative."""
        return int((ms - self.base_ms - self.row_ms * rows) / self.token_ms)

    def observe(self, rows: int, tokens: int, ms: float) -> None:
        """Learn from a step that ran."""
        self._steps += 1
        if self._steps > _TRUSTED_STEPS:
            ms = min(ms, _OUTLIER * self.ms(rows, tokens))
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
