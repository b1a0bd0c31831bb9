"""Stop strings in text that comes piece by piece."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from fastpage.errors import InvalidArgument


class StopStringMatcher:
    """Finds the stop string that is complete first, wherever the pieces are cut.

    Text that may be the beginning of a stop string is held back until that is decided. Of several
    that are complete at the same character, the longest counts. One state of the
    Knuth-Morris-Pratt automaton per stop string: time is linear in the text.
    """

    __slots__ = ("_borders", "_held", "_include", "_matched_lengths", "_stop")

    def __init__(self, stop: Sequence[str], include_stop_str_in_output: bool = False) -> None:
        if "" in stop:
            raise InvalidArgument("a stop string must not be empty")
        self._stop = list(stop)
        self._borders = [_borders(text) for text in self._stop]
        self._matched_lengths = [0] * len(self._stop)
        self._include = include_stop_str_in_output
        self._held = ""

    def fresh(self) -> StopStringMatcher:
        """Another one for the same strings, without the work of preparing them again."""
        other = copy.copy(self)
        other._matched_lengths = [0] * len(self._stop)
        other._held = ""
        return other

    def push(self, delta: str) -> tuple[str, str | None]:
        """The text that may be shown now, and the stop string, once one is complete.

        Nothing should be pushed after that.
        """
        if not self._stop:
            return delta, None
        text = self._held + delta
        for end, char in enumerate(delta, len(self._held) + 1):
            found = self._advance(char)
            if found is not None:
                self._held = ""
                return text[: end if self._include else end - len(found)], found
        num_held = max(self._matched_lengths)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        longest: str | None = None
        for index, stop in enumerate(self._stop):
            length = self._matched_lengths[index]
            while length and stop[length] != char:
                length = self._borders[index][length - 1]
            if stop[length] == char:
                length += 1
            if length == len(stop):
                if longest is None or length > len(longest):
                    longest = stop
                length = 0
            self._matched_lengths[index] = length
        return longest


def _borders(text: str) -> list[int]:
    """For each prefix of `text`, the length of its longest proper prefix that also ends it."""
    borders = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[length] != text[index]:
            length = borders[length - 1]
        if text[length] == text[index]:
            length += 1
        borders[index] = length
    return borders
