"""The tokenizer of a checkpoint, over the `tokenizers` library."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from fastpage.errors import InvalidArgument
from fastpage.tokenizer.chat_template import ChatTemplate

# The library takes some 150 bytes of memory for each character: of texts longer than this, in
# characters, only one is read at a time.
_LONG_TEXT = 1 << 16


class Tokenizer:
    """Immutable once built, so that any number of threads may use one at the same time.

    `special_tokens` maps bos_token, eos_token, ... to their text, as chat templates see them.
    `chat_templates` maps "default", and perhaps "tool_use" and others, to the Jinja source.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Iterable[int] = (),
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._long_text = threading.Lock()
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = bos_token_id
        self.eos_token_ids = sorted(set(eos_token_ids))
        self.special_tokens = dict(special_tokens or {})
        self.special_token_ids = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )
        self._templates = {
            name: ChatTemplate(source) for name, source in (chat_templates or {}).items()
        }

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """From tokenizer.json and the JSON files beside it. Raises CheckpointError."""
        from fastpage.tokenizer.from_directory import build_tokenizer

        return build_tokenizer(path)

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any], source: str) -> Tokenizer:
        """From the metadata of a GGUF file; `source` names it in errors. Raises CheckpointError."""
        from fastpage.tokenizer.from_gguf import build_tokenizer

        return build_tokenizer(metadata, source)

    def to_json(self) -> str:
        """As tokenizer.json, for other programs. Chat templates are not part of it."""
        text: str = self._backend.to_str()
        return text

    # ------------------------------------------------------------ text and tokens

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`. Special tokens spelt out in it are recognised.

        `add_special_tokens` puts those around it that the model expects, such as a BOS token.
        """
        if len(text) < _LONG_TEXT:
            return self.encode_batch([text], add_special_tokens)[0]
        with self._long_text:
            ids = self.encode_batch([text], add_special_tokens)[0]
            _trim_heap()
            return ids

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` of several texts, on all cores; releases the GIL."""
        try:
            encodings = self._backend.encode_batch_fast(
                list(texts), add_special_tokens=add_special_tokens
            )
        except TypeError:  # not str, or str with half of a surrogate pair
            raise InvalidArgument("the text is not a string of valid Unicode") from None
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids that no token has are left out."""
        try:
            text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except OverflowError:
            raise InvalidArgument("token ids are whole numbers from 0 to 2^32 - 1") from None
        return text

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def token_to_id(self, token: str) -> int | None:
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    # ------------------------------------------------------------ chat

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the default template."""
        template = self._templates.get("default")
        return template.source if template else None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt for a conversation; encode it with `add_special_tokens=False`.

        `messages` are dicts with "role" and "content"; content may be a list of text parts
        (`{"type": "text", "text": ...}`). `add_generation_prompt` ends it where the assistant's
        answer begins. `kwargs` go to the template (`enable_thinking=False`, say).
        Raises InvalidArgument if there is no template, or it rejects the messages.
        """
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates.get("default")
        if template is None:
            raise InvalidArgument("the model has no chat template: send a plain prompt instead")
        variables = {**self.special_tokens, **kwargs}
        return template.render(messages, tools, add_generation_prompt, variables)


def _trim_heap() -> None:
    """glibc keeps what was freed, in every thread that ever read a long text."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def tokenizers_errors(make_error: Callable[[str], Exception]) -> Iterator[None]:
    """Within it, what the `tokenizers` library raises becomes `make_error(reason)`.

    That is plain Exception, or for some broken files a Rust panic, which is not even one.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())
        raise make_error(f"{reason:.200}") from None


def surround_texts(
    backend: tokenizers.Tokenizer, bos: tuple[str, int] | None, eos: tuple[str, int] | None
) -> None:
    """Makes `backend` put these tokens, given as (text, id), before and after what it encodes."""
    before = [bos[0]] if bos else []
    after = [eos[0]] if eos else []
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, "$B:1", *after],
        special_tokens=[token for token in (bos, eos) if token],
    )
