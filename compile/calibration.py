"""Texts to calibrate with, and what was measured with them: the scales of FP8 inputs.

An FP8 number is as exact near its largest value as far below it, and a value that is cut off ruins
the answer. Measured on SmolLM2-135M: cutting at the 99th percentile of tokens raises the logit
error from 0.27 to 1.45, and a scale twice as large as needed leaves it as it is, while the verify
texts exceed another text's largest input by up to 1.37. So scales have `MARGIN` above the largest
value seen, and there is no percentile.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from headrace.compile.tensorrt.weight_forms import FP8_MAX, Floats
from headrace.serving.errors import ArtifactTampered, InvalidRequest
from headrace.serving.tokenizer import Tokenizer

CALIBRATION_FILE = "calibration.json"
"""In an artifact: what `ActivationScales.to_json` makes."""

OWN_TEXTS = Path(__file__).with_name("calibration_texts.jsonl")
"""72 passages written for this purpose: chats, code, tables, numbers, fifteen languages."""

TEXTS_MIN, TEXTS_MAX = 16, 256
"""Of a few texts the largest value is chance; of more than these it no longer grows."""
TEXT_TOKENS_MAX = 128
"""Of each text; the largest inputs belong to the first tokens, on which attention rests."""
FILE_BYTES_MAX = 2**20
"""256 texts of 128 tokens fill a tenth of it."""

MARGIN = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSet:
    """Texts, and what identifies them."""

    texts: tuple[str, ...]
    digest: str
    """SHA-256 (hex) of the file they were read from."""

    def prompts(self, tokenizer: Tokenizer, *, context_tokens: int) -> list[list[int]]:
        """The beginning of each text as token ids, at least one."""
        longest = min(TEXT_TOKENS_MAX, context_tokens)
        return [ids for text in self.texts if (ids := tokenizer.encode(text)[:longest])]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationScales:
    """The recorded result; part of the artifact."""

    set_digest: str
    texts: int
    tokens: int
    margin: float
    largest: Mapping[str, float]
    """Canonical matrix name to the largest magnitude of its input, to four digits, so that machines
    which differ in the last bit of a sum write the same file."""

    def scale(self, name: str) -> float:
        """What the input of matrix `name` is divided by, to lie within ±448."""
        return float(np.float32(self.largest[name] * self.margin / FP8_MAX))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str) -> "ActivationScales":
        """Read what `to_json` wrote.

        Raises:
            ArtifactTampered: it is something else.
        """
        try:
            raw = json.loads(text)
            found = cls(
                set_digest=str(raw["set_digest"]),
                texts=int(raw["texts"]),
                tokens=int(raw["tokens"]),
                margin=float(raw["margin"]),
                largest={str(name): float(size) for name, size in raw["largest"].items()},
            )
            sizes = (found.margin, *found.largest.values())
            if not all(0 < size < np.inf for size in sizes):
                raise ValueError("a size is not positive")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactTampered(
                f"The calibration in {where} cannot be read: {error}.",
                why="It says what FP8 inputs were scaled by, and is written by compile alone.",
                fix="Build the artifact again with `headrace compile`.",
            ) from error
        return found


@dataclass(slots=True, eq=False)
class InputFacts:
    """What was seen of one matrix's input."""

    largest: float
    mean_square: Floats
    """(inputs,): how much an error in each column of the matrix counts."""


def read_calibration_set(path: Path = OWN_TEXTS) -> CalibrationSet:
    """Read texts from JSON lines, `{"text": "…"}` each.

    Raises:
        InvalidRequest: the file is missing, too large, has too few or too many lines, or one that
            is not such an object.
    """
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise _refused(path, f"It cannot be opened: {error.strerror}.") from error
    if len(content) > FILE_BYTES_MAX:
        raise _refused(path, f"It is larger than {FILE_BYTES_MAX:,} bytes.")
    lines = content.splitlines()
    if not TEXTS_MIN <= len(lines) <= TEXTS_MAX:
        raise _refused(path, f"It has {len(lines)} lines; {TEXTS_MIN} to {TEXTS_MAX} are needed.")
    texts = tuple(_text(line, number, path) for number, line in enumerate(lines, start=1))
    return CalibrationSet(texts=texts, digest=hashlib.sha256(content).hexdigest())


def _text(line: bytes, number: int, path: Path) -> str:
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"Line {number} is not JSON in UTF-8: {error}.") from error
    if not isinstance(value, dict) or value.keys() != {"text"}:
        raise _refused(path, f'Line {number} is not an object with "text" and nothing else.')
    if not isinstance(value["text"], str) or not value["text"].strip():
        raise _refused(path, f"Line {number} has no text.")
    return value["text"]


def _refused(path: Path, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"The calibration set {path} cannot be read.",
        why=why,
        fix='Give JSON lines, {"text": "…"} each, or leave --calibration out for our own texts.',
        field="calibration",
    )


def activation_scales(
    facts: Mapping[str, InputFacts], texts: CalibrationSet, prompts: Sequence[Sequence[int]]
) -> ActivationScales:
    """State what `measure_inputs` found with `prompts` of `texts`."""
    return ActivationScales(
        set_digest=texts.digest,
        texts=len(prompts),
        tokens=sum(map(len, prompts)),
        margin=MARGIN,
        # An input that was never anything but zero has no scale to find; any does.
        largest={name: float(f"{each.largest or 1.0:.4g}") for name, each in facts.items()},
    )
