"""Answers that must match a JSON schema, a regular expression or one of several strings.

`llguidance` turns the grammar into an automaton over the model's tokens; before each token it
says which ones may follow. JSON is written on one line with ", " and ": " as separators and no
other whitespace: it is how these models have seen most JSON, and free whitespace lets a small
model go on with blanks until max_tokens.

When the grammar allows nothing more the answer ends, without an end-of-sequence token. Where it
allows an end but also more, the model decides. A grammar wins over `min_tokens` and `ignore_eos`.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Final

import llguidance
import numpy as np
import numpy.typing as npt

from headrace.serving.domain.request import Grammar, GrammarKind
from headrace.serving.errors import InvalidSchema
from headrace.serving.tokenizer import Tokenizer

SCHEMA_BYTES_MAX: Final = 64 * 1024
REGEX_BYTES_MAX: Final = 8 * 1024
CHOICES_MAX: Final = 256
CHOICE_BYTES_MAX: Final = 64 * 1024
COMPILED_MAX: Final = 64
"""Compiled grammars kept for the next request with the same one; about 1 MB each at worst."""

# The library's own defaults, stated so that an upgrade cannot loosen them. The worst grammars
# found within the byte limits above compile in 0.12 s and take 5 ms for their first mask. Measured
# on Zen 5, 2026-11, 49,152 tokens: a mask takes 7 us on average, but 180 us inside a string with a
# pattern or a maxLength under ten.
_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=250_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
_REGEX_MARKS = frozenset("\\.+*?()|[]{}^$#&-~/\"'")


def validate(grammar: Grammar) -> None:
    """Refuse what cannot be compiled, before a request is accepted.

    Takes up to 0.1 s for the largest schemas, so call it off an event loop.

    Raises:
        InvalidSchema: with the compiler's message.
    """
    message = llguidance.LLMatcher.validate_grammar(_translate(grammar), None, limits=_LIMITS)
    if message and not message.startswith("WARNING"):
        raise _refused(grammar, message)


class Constraint:
    """The grammar of one answer, and how far the answer is in it. One thread at a time."""

    __slots__ = ("_grammar", "_mask_address", "_matcher", "mask")

    def __init__(self, grammar: Grammar, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._grammar = grammar
        self._matcher = matcher
        self.mask: npt.NDArray[np.int32] = np.zeros((vocab_size + 31) // 32, np.int32)
        """Tokens that may follow: bit t % 32 of word t // 32 is token t. Filled by `fill_mask`;
        the same memory throughout."""
        self._mask_address = self.mask.ctypes.data

    def fill_mask(self) -> None:
        """Bring `mask` up to date.

        Raises:
            InvalidSchema: the grammar became too complex at this point of the answer.
        """
        matcher = self._matcher
        matcher.unsafe_compute_mask_ptr(self._mask_address, self.mask.nbytes)
        if matcher.is_error():
            raise _refused(self._grammar, matcher.get_error())

    def advance(self, token_id: int) -> bool:
        """Add a token to the answer; True when the grammar allows nothing after it.

        Raises:
            InvalidSchema: the token is not one that the grammar allows here.
        """
        matcher = self._matcher
        if not matcher.consume_token(token_id):
            raise _refused(self._grammar, matcher.get_error())
        return matcher.is_stopped()


class GrammarCompiler:
    """Compiles grammars for one model. Any thread may call it."""

    def __init__(self, tokenizer: Tokenizer, *, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = list(eos_token_ids)
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()
        self._lock = Lock()

    def warm_up(self) -> None:
        """Read the vocabulary, which the first grammar would do otherwise.

        It takes 0.3 s for 49,152 tokens and holds up every thread of the process meanwhile, so
        it belongs before the first request.
        """
        self._vocabulary_once()

    def compile(self, grammar: Grammar) -> Constraint:
        """Prepare one answer's constraint; a grammar used before costs microseconds.

        Raises:
            InvalidSchema: with the compiler's message.
        """
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is not None:
                self._compiled.move_to_end(grammar)
        if matcher is None:
            matcher = llguidance.LLMatcher(
                self._vocabulary_once(), _translate(grammar), log_level=0, limits=_LIMITS
            )
            if matcher.is_error():
                raise _refused(grammar, matcher.get_error())
            with self._lock:
                self._compiled[grammar] = matcher
                if len(self._compiled) > COMPILED_MAX:
                    self._compiled.popitem(last=False)
        return Constraint(grammar, matcher.deep_copy(), self._tokenizer.vocab_size)

    def _vocabulary_once(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = llguidance.LLTokenizer(
                    self._tokenizer.json,
                    n_vocab=self._tokenizer.vocab_size,
                    eos_token=self._eos_token_ids or None,
                )
            return self._vocabulary


def _translate(grammar: Grammar) -> str:
    """The grammar in llguidance's language; checks size and shape, not yet the meaning."""
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            _check_bytes(grammar, SCHEMA_BYTES_MAX)
            return _translate_schema(grammar)
        case GrammarKind.REGEX:
            _check_bytes(grammar, REGEX_BYTES_MAX)
            return llguidance.LLMatcher.grammar_from_regex(grammar.text)
        case GrammarKind.CHOICE:
            _check_bytes(grammar, CHOICE_BYTES_MAX)
            options = "|".join(map(_quote, _options(grammar)))
            return llguidance.LLMatcher.grammar_from_regex(f"({options})")


def _translate_schema(grammar: Grammar) -> str:
    schema = _parse_json(grammar)
    if not isinstance(schema, dict):
        raise _refused(grammar, "a schema is a JSON object")
    # The compiler would take options from here; the separators and limits are ours to choose.
    schema.pop("x-guidance", None)
    try:
        return llguidance.LLMatcher.grammar_from_json_schema(
            schema,
            overrides={
                "whitespace_flexible": False,
                "item_separator": ", ",
                "key_separator": ": ",
                "lenient": False,
            },
        )
    except ValueError as error:
        raise _refused(grammar, str(error)) from error


def _options(grammar: Grammar) -> list[str]:
    options = _parse_json(grammar)
    if not isinstance(options, list) or not all(isinstance(text, str) for text in options):
        raise _refused(grammar, "the options are a JSON array of strings")
    if not 1 <= len(options) <= CHOICES_MAX:
        raise _refused(grammar, f"there are 1 to {CHOICES_MAX} options, not {len(options)}")
    if not all(options):
        raise _refused(grammar, "an option is empty")
    return options


def _parse_json(grammar: Grammar) -> object:
    try:
        return json.loads(grammar.text)
    except RecursionError as error:
        raise _refused(grammar, "it is nested too deeply") from error
    except ValueError as error:
        raise _refused(grammar, f"it is not JSON: {error}") from error


def _quote(text: str) -> str:
    """A regular expression that matches exactly `text`."""
    return "".join(
        f"\\{character}"
        if character in _REGEX_MARKS
        else character
        if character.isprintable()
        else f"\\x{{{ord(character):x}}}"
        for character in text
    )


def _check_bytes(grammar: Grammar, bytes_max: int) -> None:
    size = len(grammar.text.encode("utf-8", "surrogatepass"))
    if size > bytes_max:
        raise _refused(grammar, f"it has {size:,} bytes, the most is {bytes_max:,}")


def _refused(grammar: Grammar, message: str) -> InvalidSchema:
    first = next(iter(message.strip().splitlines()), "") or "it was refused without a message"
    return InvalidSchema(
        f"The {_NAMES[grammar.kind]} cannot constrain an answer.",
        why=f"The compiler says: {first[:300]}.",
        fix="Correct it, or leave the constraint out.",
        field=grammar.kind.value,
    )


_NAMES = {
    GrammarKind.JSON_SCHEMA: "JSON schema",
    GrammarKind.REGEX: "regular expression",
    GrammarKind.CHOICE: "choice",
}
