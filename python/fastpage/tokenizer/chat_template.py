"""Chat templates: Jinja, with what transformers puts at their disposal."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from fastpage.errors import InvalidArgument

if TYPE_CHECKING:
    import jinja2

    from fastpage.tokenizer.bounded_jinja import BoundedEnvironment

_MAX_DEPTH = 64


class ChatTemplate:
    """One template, compiled when it is first used. Rendering is thread-safe."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._compiled: tuple[BoundedEnvironment, jinja2.Template] | None = None
        self._lock = threading.Lock()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt. Raises InvalidArgument, with the template's own words if it objects."""
        environment, template = self._compile()
        context = _plain(variables)
        context |= {
            "messages": [_check_message(i, message) for i, message in enumerate(messages)],
            "tools": _plain(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with environment.bounded():
                return template.render(context)
        except Exception as error:  # anything the template's code can do
            raise InvalidArgument(
                f"the chat template rejects the messages: {_reason(error)}"
            ) from None

    def _compile(self) -> tuple[BoundedEnvironment, jinja2.Template]:
        with self._lock:
            if self._compiled is None:
                environment = _environment()
                try:
                    with environment.bounded():
                        self._compiled = (environment, environment.from_string(self.source))
                except Exception as error:  # constants are computed here
                    raise InvalidArgument(
                        f"the model's chat template is broken: {_reason(error)}"
                    ) from None
            return self._compiled


def _reason(error: Exception) -> str:
    return f"{' '.join(str(error).split()) or type(error).__name__:.400}"


def _environment() -> BoundedEnvironment:
    """As transformers sets it up, but bounded."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols

    from fastpage.tokenizer.bounded_jinja import BoundedEnvironment, check_format

    class GenerationTag(Extension):
        """{% generation %}...{% endgeneration %} marks text for training; here it is only text."""

        tags = {"generation"}  # noqa: RUF012 (the type that jinja2 declares)

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        check_format(form)
        return datetime.now().strftime(form)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.add_filter("tojson", tojson)  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _check_message(index: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidArgument(f"message {index}: a dict with a 'role' is expected")
    checked: dict[str, Any] = _plain(message)
    content = checked.get("content")
    if isinstance(content, list):
        # Templates of text models expect a string.
        checked["content"] = "\n".join(_text_of(index, part) for part in content)
    elif content is not None and not isinstance(content, str):
        raise InvalidArgument(f"message {index}: 'content' must be a string or a list of parts")
    return checked


def _text_of(index: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise InvalidArgument(
            f"message {index}: a part of type {kind!r:.40}; only text can be taken"
        )
    text: str = part["text"]
    return text


def _plain(value: Any, depth: int = 0) -> Any:
    """A copy made of JSON's types alone: other objects would hand the template their methods."""
    if depth > _MAX_DEPTH:
        raise InvalidArgument("the messages are nested too deeply")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key, depth + 1): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    raise InvalidArgument(f"a {type(value).__name__} cannot be part of a message")
