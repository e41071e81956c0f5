"""Which of some strings a text may be ending in, as the text comes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable


class _State:
    """All that matters of a text: its longest end that is the beginning of a string.

    whole    the longest string that is at the end of the text: its length, or 0
    goes_on  whether a string is longer than `prefix`
    shorter  the state after the longest end of `prefix` that is shorter
    next     states by the character that follows, as far as they are known
    """

    __slots__ = ("goes_on", "next", "prefix", "shorter", "whole")

    def __init__(self, prefix: str, goes_on: bool, whole: int, shorter: _State | None) -> None:
        self.prefix, self.goes_on, self.whole = prefix, goes_on, whole
        self.shorter = shorter or self
        self.next: dict[str, _State] = {}


class Beginnings:
    """The strings, for any number of texts (Aho and Corasick's automaton, made as texts lead through it).

    O(1) amortised for each character of a text, however many strings there are and however alike.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        """Of strings that are not empty."""
        self._strings = sorted({*strings})
        self._firsts = {string[0] for string in self._strings}
        self.nothing = _State("", goes_on=True, whole=0, shorter=None)

    def __bool__(self) -> bool:
        return bool(self._strings)

    def read(self, state: _State, text: str) -> tuple[_State, int]:
        """The state after more text, and how much of its end must be held: from where the first string begins
        that ends in `text`, or else the longest beginning of one with which it ends."""
        if state is self.nothing and self._firsts.isdisjoint(text):
            return state, 0
        begins = end = len(text)
        for at, character in enumerate(text, 1):
            state = state.next.get(character) or self._step(state, character)
            if state.whole:
                begins = min(begins, at - state.whole)
        while not state.goes_on:
            state = state.shorter
        return state, end - min(begins, end - len(state.prefix))

    def _step(self, state: _State, character: str) -> _State:
        """The state after `state` and a character, made known to it and to the shorter ones that it takes."""
        unknown = [state]
        while state is not self.nothing and character not in state.shorter.next:
            state = state.shorter
            unknown.append(state)
        after = self.nothing if state is self.nothing else state.shorter.next[character]
        for state in reversed(unknown):
            after = state.next[character] = self._longer(state, character, after)
        return after

    def _longer(self, state: _State, character: str, shorter: _State) -> _State:
        """The state after `state` and a character, if there is a longer one than `shorter`."""
        if not state.goes_on:
            return shorter
        strings, prefix = self._strings, state.prefix + character
        at = bisect_left(strings, prefix)
        is_whole = strings[at : at + 1] == [prefix]
        goes_on = any(string.startswith(prefix) for string in strings[at + is_whole : at + is_whole + 1])
        if not (is_whole or goes_on):
            return shorter
        return _State(prefix, goes_on, len(prefix) if is_whole else shorter.whole, shorter)
