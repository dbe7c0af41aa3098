"""Plain YAML values into frozen dataclasses, strictly: unknown keys and wrong values are refused.

Knows nothing of what is configured: field types, defaults and `bounded` metadata say it all.
"""

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from headrace.serving.errors import ConfigRefused

FILE_BYTES_MAX = 1 << 20
"""No configuration that a person wrote is longer."""

T = TypeVar("T")


def bounded(default: float | None, low: float, high: float) -> Any:
    """A dataclass field whose number must lie within [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})


def port(default: int) -> Any:
    """A TCP port; 0 lets the system choose one."""
    return bounded(default, 0, 65_535)


@dataclass(frozen=True, slots=True)
class Reader:
    """Turns plain YAML values into the dataclasses above, strictly. `where` is for messages."""

    where: str

    def read(self, kind: type[T], raw: object, path: str, *, given: Mapping[str, Any]) -> T:
        """`raw` as a `kind`. `given` are fields that come from elsewhere and are no keys here."""
        known = {
            entry.name: entry for entry in fields(cast("Any", kind)) if entry.name not in given
        }
        raw = {} if raw is None else raw
        if not isinstance(raw, dict):
            raise self.refusal(path, raw, "It holds keys and values.", "Write `key: value` lines.")
        for key in raw:
            if key not in known:
                raise self.unknown(path, str(key), known)
        hints = typing.get_type_hints(kind)
        values = {
            name: self.value(hints[name], raw[name], _join(path, name), entry.metadata)
            for name, entry in known.items()
            if name in raw
        }
        missing = [n for n in _required(kind) if n not in values and n not in given]
        if missing:
            raise ConfigRefused(
                f"{self.where}: {path or 'the file'} has no {missing[0]!r}.",
                why="This key has no default.",
                fix=f"Add `{missing[0]}:` there.",
                field=_join(path, missing[0]),
            )
        return kind(**given, **values)

    def value(self, hint: Any, raw: object, path: str, rule: Mapping[str, Any]) -> Any:
        """One value of the type `hint`, within the bounds of `rule`."""
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            if raw is None:
                return None
            (hint,) = (each for each in arguments if each is not type(None))
            return self.value(hint, raw, path, rule)
        if origin is tuple:
            return self._list(arguments[0], raw, path)
        if origin is Mapping:
            if not isinstance(raw, dict):
                raise self.refusal(path, raw, "It maps names to values.", "Write `name:` lines.")
            return {
                str(name): self.read(arguments[1], each, _join(path, str(name)), given={})
                for name, each in raw.items()
            }
        if is_dataclass(hint):
            return self.read(cast("type", hint), raw, path, given={})
        return self._scalar(hint, raw, path, rule)

    def _list(self, kind: type[T], raw: object, path: str) -> tuple[T, ...]:
        if not isinstance(raw, list):
            raise self.refusal(path, raw, "It is a list.", "Start each entry with a hyphen.")
        if not is_dataclass(kind):
            return tuple(self.value(kind, each, f"{path}[{i}]", {}) for i, each in enumerate(raw))
        entries = (each if isinstance(each, dict) else {"name": each} for each in raw)
        return tuple(
            self.read(kind, each, f"{path}[{i}]", given={}) for i, each in enumerate(entries)
        )

    def _scalar(self, kind: type, raw: object, path: str, rule: Mapping[str, Any]) -> object:
        if kind is Path and isinstance(raw, str) and raw:
            return Path(raw).expanduser()
        if kind is bool and isinstance(raw, bool):
            return raw
        if kind is str and isinstance(raw, str) and raw:
            return raw
        if issubclass(kind, StrEnum):
            names = [each.value for each in kind]
            if raw not in names:
                why = f"It is one of {', '.join(names)}."
                raise self.refusal(path, raw, why, "Choose one of these.")
            return kind(raw)
        if kind is bool and isinstance(raw, bool):
            return raw
        # A bool is an int to Python, and never to the person who wrote the file.
        if kind is int and isinstance(raw, int) and not isinstance(raw, bool):
            return self._within(raw, path, rule)
        if kind is float and isinstance(raw, int | float) and not isinstance(raw, bool):
            return float(self._within(raw, path, rule))
        raise self.refusal(path, raw, f"It is {_KINDS[kind]}.", f"Write {_KINDS[kind]}.")

    def _within(self, number: float, path: str, rule: Mapping[str, Any]) -> float:
        low, high = rule["low"], rule["high"]
        if not low <= number <= high:
            raise self.refusal(
                path,
                number,
                f"It lies between {low:,} and {high:,}.",
                "Choose a value in this range.",
            )
        return number

    def refusal(self, path: str, raw: object, why: str, fix: str) -> ConfigRefused:
        shown = repr(raw)
        shown = shown if len(shown) <= 60 else shown[:57] + "…"
        return ConfigRefused(
            f"{self.where}: {path or 'the file'} is {shown}.", why=why, fix=fix, field=path
        )

    def unknown(self, path: str, key: str, known: Mapping[str, object]) -> ConfigRefused:
        near = get_close_matches(key, known, n=1)
        hint = f"Write {near[0]!r}." if near else f"Known keys there: {', '.join(sorted(known))}."
        return ConfigRefused(
            f"{self.where}: {_join(path, key)!r} is not a key we know.",
            why="A misspelt key would silently leave its default in force.",
            fix=hint,
            field=_join(path, key),
        )


_KINDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text that is not empty",
    Path: "a path",
}


def _required(kind: type) -> list[str]:
    from_default = ((e.name, e.default, e.default_factory) for e in fields(cast("Any", kind)))
    return [name for name, default, factory in from_default if default is factory]


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def override(root: Any, path: str, value: object, reader: Reader) -> Any:
    """`root`, a dataclass, with the value at the dotted `path` replaced, checked like the file's.

    An element of a list is named by its `name`, which may hold dots.
    """
    return _set(reader, type(root), root, path.split("."), value, path, {})


def _set(
    reader: Reader,
    hint: Any,
    node: Any,
    keys: Sequence[str],
    value: object,
    path: str,
    rule: Mapping[str, Any],
) -> Any:
    """`node` with the value at `keys` replaced; `path` is the whole path, for messages."""
    if not keys:
        return reader.value(hint, _as_yaml(value), path, rule)
    if typing.get_origin(hint) is tuple:
        (kind, _) = typing.get_args(hint)
        name, rest = _longest_name(keys, {each.name: each for each in node}, path, reader)
        return tuple(
            _set(reader, kind, each, rest, value, path, {}) if each.name == name else each
            for each in node
        )
    if typing.get_origin(hint) is Mapping:
        (_, kind) = typing.get_args(hint)
        # A name that is not there yet begins with the defaults; the last key is its field.
        names = {".".join(keys[:-1]): None} | node
        name, rest = _longest_name(keys, names, path, reader)
        child = node[name] if name in node else kind()
        return {**node, name: _set(reader, kind, child, rest, value, path, {})}
    above = path.removesuffix(".".join(keys)).rstrip(".")
    if not is_dataclass(node):
        raise reader.refusal(above, node, "It is a value and has no parts.", "Shorten the path.")
    known = {entry.name: entry for entry in fields(node)}
    if keys[0] not in known:
        raise reader.unknown(above, keys[0], known)
    entry, child_hint = known[keys[0]], typing.get_type_hints(type(node))[keys[0]]
    child = _set(
        reader, child_hint, getattr(node, entry.name), keys[1:], value, path, entry.metadata
    )
    return replace(cast("Any", node), **{entry.name: child})


def _longest_name(
    keys: Sequence[str], names: Mapping[str, object], path: str, reader: Reader
) -> tuple[str, Sequence[str]]:
    for length in range(len(keys) - 1, 0, -1):
        name = ".".join(keys[:length])
        if name in names:
            return name, keys[length:]
    raise reader.unknown(path.removesuffix(".".join(keys)).rstrip("."), keys[0], names)


def _as_yaml(value: object) -> object:
    """What the file would have held: paths and enums as text, tuples as lists."""
    if isinstance(value, Path | StrEnum):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key may stand only once; the standard takes the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", node.value[i][0].start_mark
                )
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> object:
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
        if len(raw) > FILE_BYTES_MAX:
            raise ConfigRefused(
                f"{path} is longer than {FILE_BYTES_MAX:,} bytes.",
                why="No configuration is.",
                fix="Check that it is the right file.",
            )
        return yaml.load(raw, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ConfigRefused(
            f"{path} cannot be read: {error.strerror}.",
            why="Guessing the defaults would ignore what it says.",
            fix="Make it readable, or move it away.",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigRefused(
            f"{path} is not YAML: {' '.join(str(error).split())}.",
            why="Guessing the defaults would ignore what it says.",
            fix="Correct that line.",
        ) from error
