"""Chat templates without torch: the same jinja2 sandbox, filters and globals that transformers gives them.

Source: transformers.utils.chat_template_utils:_compile_jinja_template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from memfit.errors import UserError

Message = Mapping[str, Any]
Style = Literal["parts", "text"]

_PROBE = "memfit probe words"


class _Generation(Extension):
    """Accepts {% generation %} ... {% endgeneration %}, which some templates put around answers, and adds nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads the class attribute)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _GuardedNamespace(Namespace):
    """Templates come from strangers: no underscore names, which would reach into CPython.

    `self` is not named in the signature, because a template may use that name itself.
    """

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _refuse_underscore(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        Namespace.__setitem__(self, name, value)


def _refuse_underscore(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Plain JSON; jinja2's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.globals["namespace"] = _GuardedNamespace
    # A plain function: the type itself would hand the template its attributes.
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)  # noqa: PLW0108
    return environment


class ChatTemplate:
    """One compiled template. `tokens` are the tokenizer's special tokens by name (bos_token, eos_token ...)."""

    def __init__(self, text: str, tokens: Mapping[str, str]) -> None:
        self.text = text
        self.tokens = dict(tokens)
        try:
            self._template = _environment().from_string(text)
        except jinja2.exceptions.TemplateError as error:
            raise UserError(
                f"the chat template cannot be read: {error}", "check chat_template in the model's folder"
            ) from error

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[str, dict[str, str]]]:
        return ChatTemplate, (self.text, self.tokens)

    def render(self, messages: Sequence[Message], generation: bool = False, **extra: Any) -> str:
        """The conversation as text; `generation` adds what stands before an answer.

        Raises ValueError with the template's own words when it refuses the conversation.
        """
        values = {**self.tokens, "tools": None, "documents": None, **extra}
        try:
            return self._template.render(messages=messages, add_generation_prompt=generation, **values)
        except (jinja2.exceptions.TemplateError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"the model's chat template refuses the conversation: {error}") from error


def content_style(template: ChatTemplate, image_token: str | None) -> Style:
    """Whether the template takes a list of parts ("parts") or plain words ("text") as a message's content.

    UserError when it takes neither, or does not write the image token once for one picture.
    """
    picture = [{"type": "image"}] if image_token else []
    parts = [{"role": "user", "content": [*picture, {"type": "text", "text": _PROBE}]}]
    words = [{"role": "user", "content": _PROBE}]
    order: tuple[tuple[Style, list[dict[str, Any]]], ...] = (("parts", parts), ("text", words))
    for style, messages in order if image_token else order[::-1]:
        try:
            text = template.render(messages)
        except ValueError:
            continue
        if text.count(_PROBE) != 1 or "'type'" in text:
            continue
        if style == "parts" and image_token and text.count(image_token) != 1:
            raise UserError(
                f"the chat template writes {image_token} {text.count(image_token)} times for one picture",
                "check chat_template and the image token in the model's folder",
            )
        return style
    raise UserError(
        "the chat template renders neither plain words nor a list of parts",
        "check chat_template in the model's folder",
    )


def around_answer(template: ChatTemplate, style: Style, answer: str) -> tuple[str, str]:
    """(what stands between the opening that generation starts from and an answer, what stands behind the answer).

    The first is " " in LLaVA's template, which opens with "ASSISTANT:" and writes "ASSISTANT: words". ValueError when
    the template refuses one question and one answer.
    """

    def content(words: str) -> Any:
        return [{"type": "text", "text": words}] if style == "parts" else words

    asked = [{"role": "user", "content": content(_PROBE)}]
    text = template.render([*asked, {"role": "assistant", "content": content(answer)}])
    opening = template.render(asked, True, enable_thinking=False)
    before, _, behind = text.partition(answer)
    return before[len(opening) :] if before.startswith(opening) else "", behind


def always_opens(template: ChatTemplate, style: Style) -> bool:
    """Whether the template opens an answer behind a finished conversation too, whatever it is told (MiniCPM-V 2.5).

    Then the same stands behind the last answer as between a question and its answer.
    """
    content = [{"type": "text", "text": _PROBE}] if style == "parts" else _PROBE
    text = template.render([{"role": "user", "content": content}, {"role": "assistant", "content": content}])
    _, between, behind = text.split(_PROBE)
    return between == behind and bool(behind.strip())


def joined_by_newlines(pieces: Sequence[str | int], marker: str) -> str:
    """Words and pictures of a turn with one newline at each joint; newlines that stand there already count."""
    parts: list[str] = []
    for index, piece in enumerate(pieces):
        if isinstance(piece, int):
            parts.append(marker)
            continue
        if index:
            piece = piece.removeprefix("\n")
        if index + 1 < len(pieces):
            piece = piece.removesuffix("\n")
        if piece:
            parts.append(piece)
    return "\n".join(parts)


def moves_pictures(template: ChatTemplate, image_token: str | None) -> bool:
    """Whether the template writes a turn's pictures before its words, wherever they stood."""
    if image_token is None:
        return False
    text = template.render([{"role": "user", "content": [{"type": "text", "text": _PROBE}, {"type": "image"}]}])
    return text.find(image_token) < text.find(_PROBE)
