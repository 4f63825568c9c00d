"""Chat messages to prompt text, by the model's own Jinja template: what transformers' `apply_chat_template` does.

Used by `router.text`. Templates come with a model's files, so they run in Jinja's immutable sandbox. The environment
(filters, globals, white space) follows transformers' `chat_template_utils.py`, without importing it: it pulls torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplateError(ValueError):
    """The template refused these messages (`raise_exception`) or could not render them."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; for a prompt it is just its content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class ChatTemplate:
    """One compiled template with the model's special tokens. `now` is the clock behind `strftime_now`."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, now: Callable[[], datetime] = datetime.now
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        self._special_tokens = dict(special_tokens)
        self._template = environment.from_string(source)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt text, up to where the assistant's answer begins. Raises ChatTemplateError."""
        # Absent and null are the same to OpenAI's clients; templates would write "None".
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            return self._template.render(
                {
                    **self._special_tokens,
                    "messages": plain,
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": True,
                }
            )
        # Templates do arithmetic and look things up; a message they were not written for may raise anything.
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            raise ChatTemplateError(f"the chat template refused the messages: {error}") from error


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter it does not escape for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
