"""Says what is wrong with a configuration in the words of its author: the key, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError


class ConfigError(ValueError):
    """The configuration cannot be used; the message is for the person who wrote it."""


_REMEDIES = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text (quote it in YAML)",
    "bool_type": "must be true or false",
    "finite_number": "must be finite",
}


def explain(error: ValidationError, root: type[BaseModel], where: str) -> str:
    """One line for each mistake."""
    lines = [f"{where}: {_line(item, root)}" for item in error.errors(include_url=False)]
    return "\n".join(lines)


def _line(item: Any, root: type[BaseModel]) -> str:
    path = [str(part) for part in item["loc"]]
    key, value, kind = ".".join(path), item["input"], item["type"]
    context = item.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(path, value, root)
    if kind == "value_error":
        text = str(context["error"])
        return f"{key} = {value!r}: {text}" if key else text
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key} = {value!r}: must be a section of keys, such as `{_example(path, root)}`"
    if kind == "literal_error":
        return (
            f"{key} = {value!r}: must be {context['expected']}{did_you_mean(str(value), _choices(context))}"
        )
    if kind in ("greater_than_equal", "greater_than"):
        least = context.get("ge", context.get("gt"))
        bound = "at least" if kind == "greater_than_equal" else "more than"
        return f"{key} = {value!r}: must be {bound} {least}"
    return f"{key} = {value!r}: {_REMEDIES.get(kind, item['msg'])}"


def _unknown(path: list[str], value: Any, root: type[BaseModel]) -> str:
    """An unknown key: the nearest known one beside it, or the section in which it belongs."""
    model = _model_at(path[:-1], root)
    known = list(model.model_fields)
    line = f"{'.'.join(path)} = {value!r}: unknown key"
    close = did_you_mean(path[-1], known)
    if close:
        return line + close
    elsewhere = [".".join(other) for other in _keys(root) if other[-1] == path[-1]]
    if elsewhere:
        return f"{line}; did you mean {' or '.join(elsewhere)}?"
    return f"{line}; known here: {', '.join(known)}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` when something known is near, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _choices(context: Any) -> list[str]:
    return [part.strip(" '") for part in context["expected"].replace(" or ", ",").split(",")]


def _model_at(path: list[str], root: type[BaseModel]) -> type[BaseModel]:
    model = root
    for part in path:
        annotation = model.model_fields[part].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return model


def _keys(root: type[BaseModel]) -> Iterator[list[str]]:
    for section in root.model_fields:
        for key in _model_at([section], root).model_fields:
            yield [section, key]


def _example(path: list[str], root: type[BaseModel]) -> str:
    model = _model_at(path, root)
    key = next(iter(model.model_fields))
    return f"{path[-1] if path else 'model'}: {{{key}: ...}}"
