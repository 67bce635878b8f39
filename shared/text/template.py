"""Chat templates: a model's jinja2 program turns messages into the prompt it was trained on.

The program comes with the model, so it runs in jinja's immutable sandbox: no attribute that starts with an underscore,
no import, no change to what it is given, `range` at most 100,000 long, no huge product or power, no huge text. Loops
within loops can still take long: the process that renders must have a time limit. Messages are data and never
compiled. This module must not know about tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared import catalog
from shared.errors import InvalidRequest, Unavailable

_MAX_CHARACTERS = 1 << 24


class ChatTemplate:
    """The chat template of one model, compiled once. `source` None stands for a model that has none."""

    def __init__(
        self,
        source: str | None,
        special_tokens: Mapping[str, str] | None = None,
        *,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`special_tokens` are visible to the program as `bos_token` and so on; `clock` serves `strftime_now`.

        Raises Unavailable if the program does not compile.
        """
        self._special_tokens = dict(special_tokens or {})
        self._template: jinja2.Template | None = None
        if source is None:
            return
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: clock().strftime(form),
        }
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise Unavailable(f"the model's chat template does not compile: {error}") from error

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """The template of a model in Hugging Face form. Raises Unavailable if it does not compile or its files cannot
        be read."""
        try:
            source = catalog.read_template(folder)
            return cls(source, catalog.read_special_tokens(folder))
        except (OSError, ValueError) as error:
            raise Unavailable(f"cannot read the chat template: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt. Content given as parts of type "text" is joined by newlines, since many templates know only
        strings. Raises InvalidRequest (param "messages") if the template refuses the messages or fails on them."""
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template; send a completion instead", param="messages"
            )
        variables = {
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **kwargs,
            "messages": [_flatten(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        pieces: list[str] = []
        num_characters = 0
        try:
            for piece in self._template.generate(variables):
                num_characters += len(piece)
                if num_characters > _MAX_CHARACTERS:
                    raise jinja2.TemplateError("the prompt grows too long")
                pieces.append(piece)
        except Exception as error:  # the template is a program: it can fail in any way
            raise InvalidRequest(
                f"the chat template does not accept these messages: {error}", param="messages"
            ) from error
        return "".join(pieces)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Also bounds the operators that make much out of little."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = [value for value in (left, right) if isinstance(value, (int, float))]
        if operator == "**" and any(abs(number) > 1000 for number in numbers):
            raise jinja2.TemplateError("a power of so large numbers is not allowed")
        if operator == "*" and len(numbers) == 1:
            sequence = left if numbers[0] is right else right
            if len(sequence) * numbers[0] > _MAX_CHARACTERS:
                raise jinja2.TemplateError("a repetition this long is not allowed")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """`{% generation %}` marks the answer for training; for a prompt it is only its content."""

    tags = {"generation"}  # noqa: RUF012  jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _flatten(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        texts = []
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise InvalidRequest(
                    f"content of type {kind!r} is not supported, only text", param="messages"
                )
            text = part.get("text")
            if not isinstance(text, str):
                raise InvalidRequest("a part of type 'text' needs a text", param="messages")
            texts.append(text)
        content = "\n".join(texts)
    return {**message, "content": content}


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja's own filter escapes for HTML, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
