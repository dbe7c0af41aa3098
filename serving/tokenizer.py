"""Text to token ids and back, from the files an artifact carries; no model hub is asked.

Two rules that every caller relies on:

* What a user writes cannot become a control token. In a chat, the text `<|im_start|>` inside a
  message is spelled out in ordinary tokens; only the template's own marks become control tokens.
  A raw prompt is the caller's whole context, so there they do. Only tokens that the tokenizer
  file declares *special* are guarded: others, such as `<think>` in some families, mean the same
  wherever they stand.
* A prompt begins as `transformers` would begin it: a chat as its template says, a raw prompt as
  the tokenizer's post-processor says, and never with two BOS tokens.
"""

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from headrace.serving.clock import Clock, SystemClock
from headrace.serving.domain.artifact import Manifest
from headrace.serving.domain.file_digest import fits
from headrace.serving.errors import ArtifactTampered, InvalidRequest, PromptTooLong
from headrace.serving.text_stream import TextStream
from headrace.serving.token_bytes import TokenTable, token_table

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
FILE_BYTES_MAX = 128 * 2**20
"""Of each of them: the largest tokenizer known has 35 MB, and compile takes none above 64 MiB."""

ROLES = ("system", "user", "assistant")
TEXT_BYTES_MAX = 1 << 20
"""No context we serve holds more text; encoding this much takes about a second."""
MESSAGES_MAX = 1024


class Tokenizer:
    """One model's tokenizer and chat template. Any thread may call it."""

    def __init__(
        self,
        tokenizer_json: str,
        *,
        vocab_size: int,
        bos_token_id: int | None = None,
        context_tokens: int | None = None,
        chat_template: str | None = None,
        template_names: Mapping[str, str] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Load from the text of a tokenizer.json.

        Args:
            tokenizer_json: the file's text, in the format of Hugging Face `tokenizers`.
            vocab_size: width of the model's logits; ids that the tokenizer lacks have no text.
            bos_token_id: the token a sequence begins with, where the model has one.
            context_tokens: bounds the text that is worth encoding.
            chat_template: Jinja source; None refuses chats.
            template_names: what the template may call by name, such as `bos_token`.
            clock: for templates that print today's date.

        Raises:
            ArtifactTampered: the text is not a tokenizer that fits this model.
        """
        self.json = tokenizer_json
        """The tokenizer.json it was made from, for whoever needs the vocabulary in another form."""
        self.vocab_size = vocab_size
        self._bos_token_id = bos_token_id
        self._clock = clock or SystemClock()
        # Parsing specials or not is a property of the object, so there are two.
        self._marked = _load(tokenizer_json)
        self._plain = _load(tokenizer_json)
        self._plain.encode_special_tokens = True
        self._table: TokenTable = token_table(self._marked, tokenizer_json, vocab_size)
        specials = [
            token.content
            for token in self._marked.get_added_tokens_decoder().values()
            if token.special
        ]
        self._special_pattern = re.compile(
            "|".join(re.escape(text) for text in sorted(specials, key=len, reverse=True)) or r"(?!)"
        )
        self._template = None
        if chat_template is not None:
            self._template = _compile_template(chat_template, self._today)
        self._template_names = dict(template_names or {})
        longest = max(map(len, self._table.text), default=1)
        self.text_bytes_max = min(TEXT_BYTES_MAX, (context_tokens or TEXT_BYTES_MAX) * longest)

    @classmethod
    def from_folder(
        cls, folder: Path, manifest: Manifest, *, clock: Clock | None = None
    ) -> "Tokenizer":
        """Load what an artifact folder carries. Only files that its manifest states are read.

        Raises:
            ArtifactTampered: a file is missing or does not fit the manifest.
        """
        try:
            tokenizer_json = _read(folder, manifest, TOKENIZER_FILE)
            stated = _read(folder, manifest, CONFIG_FILE) if CONFIG_FILE in manifest.files else "{}"
            config = _parse_config(stated)
            if TEMPLATE_FILE in manifest.files:
                template: str | None = _read(folder, manifest, TEMPLATE_FILE)
            else:
                template = _template_of(config)
        except (OSError, ValueError) as error:
            raise _tampered(str(error)) from error
        return cls(
            tokenizer_json,
            vocab_size=manifest.decoder.vocab,
            bos_token_id=manifest.bos_token_id,
            context_tokens=manifest.decoder.context_tokens,
            chat_template=template,
            template_names=_names_of(config),
            clock=clock,
        )

    def encode(self, text: str) -> list[int]:
        """Tokenise a raw prompt; marks such as `<|im_start|>` in it become control tokens.

        Raises:
            PromptTooLong: the text is longer than any prompt this model could take.
        """
        self._check_length(text)
        ids = self._marked.encode(text).ids
        # The text may begin with the BOS mark that the post-processor adds as well.
        if self._bos_token_id is not None and ids[:2] == [self._bos_token_id] * 2:
            return ids[1:]
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Tokenise text as text: no control tokens come of it and none are added."""
        self._check_length(text)
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Render (role, content) messages with the model's template and tokenise the result.

        Raises:
            InvalidRequest: a role is unknown, there is no message, or the template refuses them.
            PromptTooLong: the messages are longer than any prompt this model could take.
        """
        self._check_messages(messages)
        guarded, spelled = self._guard(messages)
        text = self._render(guarded)
        self._check_length(text)
        if not spelled:
            return self._marked.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        # Odd pieces of the split are the placeholders' keys.
        pieces = re.split(f"({'|'.join(map(re.escape, spelled))})", text)
        for piece in pieces:
            if piece in spelled:
                ids += self._plain.encode(spelled[piece], add_special_tokens=False).ids
            elif piece:
                ids += self._marked.encode(piece, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a whole answer, control tokens left out."""
        stream = self.decoder()
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    def decoder(self, stop: Sequence[str] = (), *, min_tokens: int = 0) -> TextStream:
        """The text of one answer, token by token; see TextStream."""
        return TextStream(
            self._table.text,
            stop=stop,
            min_tokens=min_tokens,
            strips_first_space=self._table.strips_first_space,
        )

    def token_bytes(self, token_id: int) -> bytes:
        """What one token spells, control tokens included; empty for ids without a token."""
        return self._table.special.get(token_id) or self._table.text[token_id]

    def is_special(self, token_id: int) -> bool:
        return token_id in self._table.special

    def _check_length(self, text: str) -> None:
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"The text has half of a surrogate pair at character {error.start}.",
                why="It is not Unicode text, so it has no UTF-8 form and no tokens.",
                fix="Send well-formed text.",
            ) from error
        if size > self.text_bytes_max:
            raise PromptTooLong(
                f"The text has {size:,} bytes.",
                why=f"No prompt of this model is longer than {self.text_bytes_max:,} bytes.",
                fix="Shorten the prompt.",
            )

    def _check_messages(self, messages: Sequence[tuple[str, str]]) -> None:
        if not 1 <= len(messages) <= MESSAGES_MAX:
            raise InvalidRequest(
                f"The chat has {len(messages)} messages.",
                why=f"A chat has 1 to {MESSAGES_MAX}.",
                fix="Send at least one message and drop the oldest ones.",
                field="chat.messages",
            )
        for role, content in messages:
            if role not in ROLES:
                raise InvalidRequest(
                    f"A message has the role {role[:32]!r}.",
                    why=f"Roles are {', '.join(ROLES)}.",
                    fix="Use one of them.",
                    field="chat.messages.role",
                )
            self._check_length(content)

    def _guard(
        self, messages: Sequence[tuple[str, str]]
    ) -> tuple[list[dict[str, str]], dict[str, str]]:
        """Put a placeholder, which no user can guess, where a message spells a control token.

        Returns the messages for the template and what each placeholder stands for.
        """
        spelled: dict[str, str] = {}
        nonce = ""

        def placeholder(match: re.Match[str]) -> str:
            nonlocal nonce
            nonce = nonce or secrets.token_hex(16)
            key = f"\ue000{nonce}:{len(spelled)}\ue001"
            spelled[key] = match.group()
            return key

        guarded: list[dict[str, str]] = []
        for role, content in messages:
            clean = self._special_pattern.sub(placeholder, content)
            guarded.append({"role": role, "content": clean})
        return guarded, spelled

    def _render(self, messages: list[dict[str, str]]) -> str:
        if self._template is None:
            raise InvalidRequest(
                "The model has no chat template.",
                why="Its artifact carries none, so there is no way to write a chat for it.",
                fix="Send `prompt` instead of `chat`.",
                field="chat",
            )
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._template_names,
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                "The model's chat template refuses these messages.",
                why=f"It says: {str(error)[:200]}.",
                fix="Change the order or the roles of the messages.",
                field="chat.messages",
            ) from error

    def _today(self) -> datetime:
        return datetime.fromtimestamp(self._clock.unix_ms() / 1000, tz=UTC)


def _load(tokenizer_json: str) -> tokenizers.Tokenizer:
    try:
        loaded = tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # The library raises bare Exception for every unreadable file.
        raise _tampered(str(error)[:200]) from error
    loaded.no_padding()
    loaded.no_truncation()
    return loaded


def _tampered(detail: str) -> ArtifactTampered:
    return ArtifactTampered(
        "The artifact's tokenizer cannot be read.",
        why=f"{detail}.",
        fix="Build the artifact again with `headrace compile`.",
    )


def _read(folder: Path, manifest: Manifest, name: str) -> str:
    """The text of a file; the bytes that were compared are the bytes that are used.

    Raises:
        OSError, ValueError: it cannot be read, or is not what the manifest states.
    """
    if name not in manifest.files:
        raise ValueError(f"the manifest states no {name}")
    with (folder / name).open("rb") as file:
        content = file.read(FILE_BYTES_MAX + 1)
    if len(content) > FILE_BYTES_MAX:
        raise ValueError(f"{name} is larger than {FILE_BYTES_MAX:,} bytes")
    if not fits(content, manifest.files[name]):
        raise ValueError(f"{name} is another one than the manifest states")
    return content.decode("utf-8")


def _parse_config(text: str) -> dict[str, Any]:
    config = json.loads(text)
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG_FILE} is not a JSON object")
    return config


def _template_of(config: Mapping[str, Any]) -> str | None:
    """`chat_template` is text, or a list of named templates of which "default" is for chats."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError("chat_template is not text")
    return template


def _names_of(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and so on: text, or an object with the text in `content`."""
    names: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            names[name] = value
    return names


def _compile_template(source: str, today: Callable[[], datetime]) -> jinja2.Template:
    """Prepare the template as `transformers` does; the sandbox keeps it from touching Python."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(pattern: str) -> str:
        return today().strftime(pattern)

    def tojson(value: object, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise _tampered(f"The chat template is not Jinja: {error}") from error
