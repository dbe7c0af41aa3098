"""Grammars: what is refused before a request is accepted, and what an answer may become."""

import json
import re

import numpy as np
import pytest

from headrace.serving.domain.request import Grammar, GrammarKind
from headrace.serving.engine.structured import (
    COMPILED_MAX,
    Constraint,
    GrammarCompiler,
    validate,
)
from headrace.serving.errors import InvalidSchema
from headrace.serving.testing.tiny_tokenizer import tiny_manifest, tiny_tokenizer

TINY = tiny_tokenizer()
EOS = 0
COMPILER = GrammarCompiler(TINY, eos_token_ids=tiny_manifest(TINY.vocab_size).eos_token_ids)

PERSON = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


def schema(text: str) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, text)


def regex(text: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, text)


def choice(*options: str) -> Grammar:
    return Grammar(GrammarKind.CHOICE, json.dumps(options))


def allowed(constraint: Constraint) -> set[int]:
    constraint.fill_mask()
    bits = np.unpackbits(constraint.mask.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits[: TINY.vocab_size]).tolist())


def accepts(grammar: Grammar, text: str) -> bool:
    """True when the model could write `text`, and end there."""
    constraint = COMPILER.compile(grammar)
    is_complete = False
    for token_id in TINY.encode_text(text):
        if token_id not in allowed(constraint):
            return False
        is_complete = constraint.advance(token_id)
    return is_complete or EOS in allowed(constraint)


@pytest.mark.parametrize(
    ("grammar", "text", "expected"),
    [
        pytest.param(schema(PERSON), '{"name": "B", "age": 3}', True, id="the schema's object"),
        pytest.param(schema(PERSON), '{"name": "\u20ac", "age": -3}', True, id="any character"),
        pytest.param(schema(PERSON), '{"name": "B"}', False, id="a required field is missing"),
        pytest.param(schema(PERSON), '{"name": "B", "age": "3"}', False, id="text for a number"),
        pytest.param(schema(PERSON), '{"name":"B","age":3}', False, id="no space: one spelling"),
        pytest.param(schema(PERSON), '{\n "name": "B", "age": 3}', False, id="no free whitespace"),
        pytest.param(regex("[0-9]{3}-[a-z]+"), "123-abc", True, id="a regex matches"),
        pytest.param(regex("[0-9]{3}-[a-z]+"), "12-abc", False, id="a regex does not match"),
        pytest.param(regex("a/b"), "a/b", True, id="a slash in a regex"),
        pytest.param(choice("yes", "no"), "yes", True, id="an option"),
        pytest.param(choice("yes", "no"), "ye", False, id="part of an option"),
        pytest.param(choice("yes", "yes!"), "yes", True, id="an option that another continues"),
        pytest.param(choice("yes", "yes!"), "yes!", True, id="the longer one"),
        pytest.param(choice("yes", "no"), "no.", False, id="more than an option"),
    ],
)
def test_an_answer_can_be_what_the_grammar_says_and_nothing_else(
    grammar: Grammar, text: str, expected: bool
) -> None:
    assert accepts(grammar, text) is expected


@pytest.mark.parametrize("option", ['"', "a\\b", "a\nb", "(a|b)*", "[x]", "/", "é€", "$^.-#&~"])
def test_options_are_taken_literally(option: str) -> None:
    grammar = choice(option, "other")
    validate(grammar)

    assert accepts(grammar, option)
    assert not accepts(grammar, "a")


def test_an_answer_ends_when_nothing_may_follow() -> None:
    """The closing brace completes the object: no end-of-sequence token is needed."""
    constraint = COMPILER.compile(schema(PERSON))
    *tokens, last = TINY.encode_text('{"name": "B", "age": 3}')

    assert not any(constraint.advance(token_id) for token_id in tokens)
    assert constraint.advance(last)


def test_control_tokens_never_stand_in_a_string() -> None:
    constraint = COMPILER.compile(schema('{"type": "string"}'))
    constraint.advance(TINY.encode_text('"')[0])

    assert not any(TINY.is_special(token_id) for token_id in allowed(constraint))


def test_two_answers_with_one_grammar_do_not_disturb_each_other() -> None:
    first, second = (COMPILER.compile(choice("ab", "cd")) for _ in range(2))
    first.advance(TINY.encode_text("a")[0])

    assert allowed(second) >= {TINY.encode_text("a")[0], TINY.encode_text("c")[0]}
    assert allowed(first) == {TINY.encode_text("b")[0]}


def test_a_token_that_does_not_fit_is_refused() -> None:
    constraint = COMPILER.compile(choice("ab"))

    with pytest.raises(InvalidSchema):
        constraint.advance(TINY.encode_text("x")[0])


def test_compiled_grammars_are_bounded() -> None:
    compiler = GrammarCompiler(TINY, eos_token_ids=(EOS,))
    for index in range(COMPILED_MAX + 3):
        compiler.compile(choice(str(index)))

    assert len(compiler._compiled) == COMPILED_MAX


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        pytest.param(schema('{"type": "objec"}'), "Invalid type: objec", id="an unknown type"),
        pytest.param(schema('{"type": '), "not JSON", id="a schema cut short"),
        pytest.param(schema("5"), "JSON object", id="a schema that is a number"),
        pytest.param(schema('{"anyOf": []}'), "Unsatisfiable", id="a schema nothing satisfies"),
        pytest.param(schema('{"$ref": "http://x/y"}'), "not present", id="a schema elsewhere"),
        pytest.param(schema('{"type": "string", "pattern": "("}'), "regex", id="a bad pattern"),
        pytest.param(schema('{"a":' * 5000 + "1" + "}" * 5000), "deep", id="bottomless nesting"),
        pytest.param(schema(" " * 65_536 + "{}"), "65,536", id="a schema over 64 KiB"),
        pytest.param(regex("("), "regex", id="a bad regex"),
        pytest.param(regex("(?=x)a"), "regex", id="look-ahead"),
        pytest.param(regex("a" * 8193), "8,192", id="a regex over 8 KiB"),
        pytest.param(Grammar(GrammarKind.CHOICE, "{}"), "array of strings", id="no array"),
        pytest.param(Grammar(GrammarKind.CHOICE, "[1]"), "array of strings", id="no strings"),
        pytest.param(choice(), "1 to 256", id="no option"),
        pytest.param(choice(*map(str, range(257))), "1 to 256", id="too many options"),
        pytest.param(choice("a", ""), "empty", id="an empty option"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(grammar: Grammar, says: str) -> None:
    """By the frontend, before anything is charged, and by the engine that might get it anyway."""
    with pytest.raises(InvalidSchema, match=re.escape(says)) as refusal:
        validate(grammar)
    with pytest.raises(InvalidSchema):
        COMPILER.compile(grammar)

    assert refusal.value.field == grammar.kind.value


def test_a_schema_cannot_loosen_our_rules() -> None:
    """`x-guidance` is the compiler's own way to set options from inside a schema."""
    grammar = schema('{"type": "array", "items": {}, "x-guidance": {"whitespace_flexible": true}}')

    assert accepts(grammar, "[1, 2]")
    assert not accepts(grammar, "[1,   2]")
