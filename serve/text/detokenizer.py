"""Token ids to text, piece by piece: whole characters only, and never a part of a stop string.

Byte-level tokens may end inside of a character, so `decode(a) + decode(b) != decode(a + b)`. Most do not:
after whole characters, a token of whole characters adds what it always adds, which is remembered. Otherwise
a short window of the newest tokens is decoded again, and what later tokens can no longer change is given
out. All pieces together equal the text of all tokens, cut at the stop string.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoding puts for bytes that are not a character (yet)
_MOST_UNFINISHED = 3  # bytes of a character that lacks its last one
_WINDOW = 24  # tokens; longer windows are shortened to half


class Decodes(Protocol):
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str: ...


class Spelling(NamedTuple):
    """piece: what a token adds after whole characters, None if that is not whole; alone: its length alone.

    The two differ where tokenizers mark words by a leading space, and strip it at the beginning.
    """

    piece: str | None
    alone: int


class Speller:
    """Spells tokens for all streams, and remembers what each token adds: nothing, if special or unused."""

    def __init__(self, tokenizer: Decodes, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._spellings: dict[int, Spelling] = {}

    def text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def spelling(self, token: int) -> Spelling:
        if token not in self._spellings:
            alone, twice = self.text([token]), self.text([token, token])
            whole = _UNFINISHED not in twice
            self._spellings[token] = Spelling(twice[len(alone) :] if whole else None, len(alone))
        return self._spellings[token]


class Detokenizer:
    """The text of one sequence as its tokens come. O(1) amortised for each token.

    stops    strings any of which may end the sequence; text that may be the beginning of one is held back
    context  ids before the first token: tokenizers that mark words by a leading space need them
    """

    def __init__(self, speller: Speller, *, stops: Iterable[str] = (), context: Sequence[int] = ()) -> None:
        self._speller = speller
        self._stops = tuple(stops)
        self._firsts = tuple({stop[0] for stop in self._stops})
        self._window = [token for token in context[-_WINDOW // 2 :] if speller.spelling(token).piece != ""]
        before = speller.text(self._window)
        if before.endswith(_UNFINISHED):  # a character cut in two belongs to neither side
            self._window, before = [], ""
        self._given = len(before)  # characters of the window's text that are settled
        self._whole = True  # all of them are
        self._held = ""  # settled text that may turn out to belong to a stop string

    def push(self, token: int) -> str:
        """The text that this token settles; may be empty."""
        piece, alone = self._speller.spelling(token)
        if piece == "":
            return ""
        if piece is not None and self._whole and self._window:
            self._window, self._given = [token], alone
            return self._hold(piece)
        self._window.append(token)
        text = self._speller.text(self._window)
        settled = len(text)
        while settled > len(text) - _MOST_UNFINISHED and text[:settled].endswith(_UNFINISHED):
            settled -= 1
        piece = text[self._given : settled]
        self._given, self._whole = max(self._given, settled), settled == len(text)
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
        if not self._held and not any(first in piece for first in self._firsts):
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
