"""Stop strings in text that comes piece by piece."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence

from fastpage.errors import InvalidArgument


class StopStringMatcher:
    """Finds the stop string that is complete first, wherever the pieces are cut.

    Text that may be the beginning of a stop string is held back until that is decided. Of several
    that are complete at the same character, the longest counts. Time is linear in the text, however
    many stop strings there are.
    """

    __slots__ = ("_automaton", "_held", "_include", "_state")

    def __init__(self, stop: Sequence[str], include_stop_str_in_output: bool = False) -> None:
        if "" in stop:
            raise InvalidArgument("a stop string must not be empty")
        self._automaton = _Automaton(stop) if stop else None
        self._include = include_stop_str_in_output
        self._state = 0
        self._held = ""

    def fresh(self) -> StopStringMatcher:
        """Another one for the same strings, without the work of preparing them again."""
        other = copy.copy(self)
        other._state = 0
        other._held = ""
        return other

    def push(self, delta: str) -> tuple[str, str | None]:
        """The text that may be shown now, and the stop string, once one is complete.

        Nothing should be pushed after that.
        """
        automaton = self._automaton
        if automaton is None or (not self._state and automaton.first_chars.isdisjoint(delta)):
            return delta, None
        text = self._held + delta
        state = self._state
        for end, char in enumerate(delta, len(self._held) + 1):
            state = automaton.next(state, char)
            found = automaton.complete[state]
            if found is not None:
                self._held = ""
                return text[: end if self._include else end - len(found)], found
        self._state = state
        num_shown = len(text) - automaton.lengths[state]
        self._held = text[num_shown:]
        return text[:num_shown], None

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """Aho and Corasick's. A state stands for the longest end of the text that some string begins
    with; 0 is the empty one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.first_chars = {text[0] for text in strings}
        self.lengths = [0]
        # The longest string that the text ends with in this state.
        self.complete: list[str | None] = [None]
        self._next: dict[tuple[int, str], int] = {}
        self._shorter = [0]  # the state of the next shorter such end
        for text in strings:
            self._add(text)
        self._link()

    def next(self, state: int, char: str) -> int:
        while (found := self._next.get((state, char))) is None:
            if not state:
                return 0
            state = self._shorter[state]
        return found

    def _add(self, text: str) -> None:
        state = 0
        for char in text:
            new = len(self.lengths)
            after = self._next.setdefault((state, char), new)
            if after == new:
                self.lengths.append(self.lengths[state] + 1)
                self.complete.append(None)
                self._shorter.append(0)
            state = after
        self.complete[state] = text

    def _link(self) -> None:
        children: list[list[tuple[str, int]]] = [[] for _ in self.lengths]
        for (state, char), after in self._next.items():
            children[state].append((char, after))
        waiting = deque([0])
        while waiting:
            state = waiting.popleft()
            for char, after in children[state]:
                shorter = self.next(self._shorter[state], char) if state else 0
                self._shorter[after] = shorter
                if self.complete[after] is None:
                    self.complete[after] = self.complete[shorter]
                waiting.append(after)
