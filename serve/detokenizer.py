"""Token ids to text, piece by piece: whole characters only, and never a part of a stop string.

Byte-level tokens may end inside of a character, so `decode(a) + decode(b) != decode(a + b)`. A detokenizer
decodes a short window of the newest tokens again with each token, and gives out what later tokens can no
longer change. All pieces together equal the text of all tokens, cut at the stop string.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoding puts for bytes that are not a character (yet)
_MOST_UNFINISHED = 3  # bytes of a character that lacks its last one
_WINDOW = 24  # tokens; longer windows are shortened to half


class Decodes(Protocol):
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str: ...


class Speller:
    """Spells tokens for all streams, and remembers which tokens have no text: special ones, unused ids."""

    def __init__(self, tokenizer: Decodes, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._silent: dict[int, bool] = {}

    def text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def is_silent(self, token: int) -> bool:
        """Whether a token adds no text. Twice, since some tokenizers strip a space at the beginning."""
        if token not in self._silent:
            self._silent[token] = not self.text([token, token])
        return self._silent[token]


class Detokenizer:
    """The text of one sequence as its tokens come. O(1) amortised for each token.

    stops    strings any of which may end the sequence; text that may be the beginning of one is held back
    context  ids before the first token: tokenizers that mark words by a leading space need them
    """

    def __init__(self, speller: Speller, *, stops: Iterable[str] = (), context: Sequence[int] = ()) -> None:
        self._speller = speller
        self._stops = tuple(stops)
        self._window = [token for token in context[-_WINDOW // 2 :] if not speller.is_silent(token)]
        before = speller.text(self._window)
        if before.endswith(_UNFINISHED):  # a character cut in two belongs to neither side
            self._window, before = [], ""
        self._given = len(before)  # characters of the window's text that are settled
        self._held = ""  # settled text that may turn out to belong to a stop string

    def push(self, token: int) -> str:
        """The text that this token settles; may be empty."""
        if self._speller.is_silent(token):
            return ""
        self._window.append(token)
        text = self._speller.text(self._window)
        settled = len(text)
        while settled > len(text) - _MOST_UNFINISHED and text[:settled].endswith(_UNFINISHED):
            settled -= 1
        piece = text[self._given : settled]
        self._given = max(self._given, settled)
        if len(self._window) > _WINDOW:
            self._shorten(text)
        return self._hold(piece)

    def finish(self, stop: str | None = None, *, include_stop: bool = False) -> str:
        """The rest of the text, cut where `stop` begins if the sequence ended with that string."""
        rest = self._held + self._speller.text(self._window)[self._given :]
        self._window, self._given, self._held = [], 0, ""
        cut = rest.find(stop) if stop else -1
        if stop is None or cut < 0:
            return rest
        return rest[: cut + len(stop)] if include_stop else rest[:cut]

    def _hold(self, piece: str) -> str:
        """A whole stop string is held until the next token: whether the sequence ends is not decided here."""
        if not self._stops:
            return piece
        old, text = len(self._held), self._held + piece
        keep = len(text)
        for stop in self._stops:
            found = text.find(stop, max(0, old - len(stop) + 1))  # new with this token
            if found >= 0:
                keep = min(keep, found)
            for size in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:size]):
                    keep = min(keep, len(text) - size)
                    break
        self._held = text[keep:]
        return text[:keep]

    def _shorten(self, text: str) -> None:
        """Forget the older half, unless that would cut a character.

        The newer half has a byte at least for each token, so a character that is not finished begins in it:
        what reads the same now will go on reading the same.
        """
        window = self._window[-_WINDOW // 2 :]
        tail = self._speller.text(window)
        dropped = len(text) - len(tail)
        if text.endswith(tail) and dropped <= self._given:
            self._window, self._given = window, self._given - dropped
