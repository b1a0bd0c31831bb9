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

_MAX_CHARS = 1 << 26
_MAX_DEPTH = 64


class ChatTemplate:
    """One template, compiled when it is first used. Rendering is thread-safe."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._compiled: jinja2.Template | None = None
        self._lock = threading.Lock()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt. Raises InvalidArgument, with the template's own words if it objects."""
        template = self._compile()
        conversation = [_check_message(index, message) for index, message in enumerate(messages)]
        pieces: list[str] = []
        length = 0
        try:
            for piece in template.generate(
                **_plain(variables),
                messages=conversation,
                tools=_plain(tools),
                add_generation_prompt=add_generation_prompt,
            ):
                pieces.append(piece)
                length += len(piece)
                if length > _MAX_CHARS:
                    raise InvalidArgument(f"the chat template writes over {_MAX_CHARS} characters")
        except InvalidArgument:
            raise
        except Exception as error:  # anything the template's code can do
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InvalidArgument(
                f"the chat template rejects the messages: {reason:.400}"
            ) from None
        return "".join(pieces)

    def _compile(self) -> jinja2.Template:
        with self._lock:
            if self._compiled is None:
                import jinja2

                try:
                    self._compiled = _environment().from_string(self.source)
                except (jinja2.TemplateError, RecursionError) as error:
                    raise InvalidArgument(
                        f"the model's chat template is broken: {error!s:.400}"
                    ) from None
            return self._compiled


def _environment() -> jinja2.Environment:
    """Sandboxed, since templates come with models; otherwise as transformers sets it up."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """{% generation %}...{% endgeneration %} marks text for training; here it is only text."""

        tags = {"generation"}  # noqa: RUF012 (the type that jinja2 declares)

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

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

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
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
