"""Text from tokens while they are generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastpage.tokenizer.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"  # what decoders write for bytes that are not (yet) a character
_PROMPT_CONTEXT = 6  # tokens of the prompt before the first one generated; at most 16 times that
_MAX_WINDOW = 4  # tokens, before the settled ones are dropped: to decode takes time for each
_MAX_STALLED = 8  # tokens; a character is at most 4 bytes, each of which can be a token


class IncrementalDetokenizer:
    """The text of a growing sequence, piece by piece, never a part of a character.

    What it returns, joined, is `decode(prompt + generated)` without `decode(prompt)`. (For a
    SentencePiece vocabulary with byte tokens, bytes that are not UTF-8 may come out differently:
    there one of them spoils the whole run of bytes, of which parts were already returned.)

    How many tokens a decoder must see at once is not known: leading spaces depend on what stands
    before, and characters may spread over tokens. So each push decodes a short window of the last
    tokens, of whose text `_num_emitted` characters were returned before.
    """

    __slots__ = (
        "_boundary",
        "_num_emitted",
        "_num_stalled",
        "_skip_special_tokens",
        "_tokenizer",
        "_window",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._num_emitted = self._take_context(prompt_token_ids)
        self._boundary = 0  # tokens of the window whose text was complete when they were pushed
        self._num_stalled = 0

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` add; "" as long as they end within a character."""
        # One by one: some decoders spoil a run of bytes that is cut within a character, and the
        # steps from one whole character to the next are seen only so.
        return "".join([self._push_one(token_id) for token_id in self._select(ids)])

    def _push_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode()
        settled = len(text.rstrip(_UNFINISHED))
        if settled == len(text):
            delta = text[self._num_emitted :]
            self._slide(settled)
        elif settled > self._num_emitted:
            delta = text[self._num_emitted : settled]
            self._num_emitted = settled
            self._num_stalled = 0
            if len(self._window) > 2 * _MAX_WINDOW:  # no token ends with a whole character
                self._shorten()
        elif self._num_stalled < _MAX_STALLED:
            delta = ""
            self._num_stalled += 1
        else:
            delta = text[self._num_emitted : -1]
            self._give_up_waiting()
        return delta

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        text = self._decode()
        delta = text[self._num_emitted :]
        self._num_emitted = len(text)
        return delta

    def _take_context(self, prompt: Sequence[int]) -> int:
        """Fills the window with the end of the prompt; returns the characters settled in it."""
        size = _PROMPT_CONTEXT
        while True:
            self._window = self._select(prompt[-size:])
            text = self._decode()
            # The cut may be within a character, which can spoil the bytes up to the end.
            if _UNFINISHED not in text or size >= min(len(prompt), 16 * _PROMPT_CONTEXT):
                return len(text.rstrip(_UNFINISHED))
            size *= 2

    def _select(self, ids: Sequence[int]) -> list[int]:
        # The decoder would drop them too, but a window of nothing else has no text to build on.
        tokenizer = self._tokenizer
        dropped = tokenizer.special_token_ids if self._skip_special_tokens else ()
        return [
            token_id
            for token_id in ids
            if token_id not in dropped and tokenizer.id_to_token(token_id) is not None
        ]

    def _decode(self) -> str:
        # Those to be skipped are not in it: that the decoder does not look for them saves time.
        return self._tokenizer.decode(self._window, skip_special_tokens=False)

    def _give_up_waiting(self) -> None:
        """The bytes at the end will never be a character, but for those of the last token or so."""
        del self._window[:-_MAX_STALLED]
        text = self._decode()
        self._num_emitted = len(text) - text.endswith(_UNFINISHED)
        self._num_stalled = 0
        self._boundary = 0

    def _shorten(self) -> None:
        """All of the window's text is out, but for the bytes of a character at its end."""
        del self._window[:-_MAX_WINDOW]
        self._num_emitted = len(self._decode().rstrip(_UNFINISHED))
        self._boundary = 0

    def _slide(self, settled: int) -> None:
        """All of the window's text is out: keep the tokens after the last such moment."""
        self._num_emitted = settled
        self._num_stalled = 0
        if len(self._window) > _MAX_WINDOW and self._boundary:
            dropped = self._window[: self._boundary]
            del self._window[: self._boundary]
            self._num_emitted = len(self._decode())
            if not self._num_emitted:  # nothing to build on after all
                self._window[:0] = dropped
                self._num_emitted = settled
                return
        self._boundary = len(self._window)
