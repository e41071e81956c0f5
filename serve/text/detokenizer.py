"""The text of a branch as clients see it: stage after stage, whole characters, no part of a stop string."""

from __future__ import annotations

from collections.abc import Iterable

from serve.text.beginnings import Beginnings
from serve.text.reader import TextReader


class Detokenizer:
    """Reads the tokens of one branch. O(1) amortised for each token.

    stops  strings any of which may end a stage; text that may be the beginning of one is held back
    """

    def __init__(self, reader: TextReader, stops: Iterable[str] = ()) -> None:
        self._reader = reader
        self._stops = Beginnings(stops)
        self._state = self._stops.nothing
        self._held = ""  # read, but it may turn out to belong to a stop string

    def force(self, tokens: Iterable[int]) -> str:
        """The text of tokens that were not sampled: it ends no stage, and nothing of it is held back."""
        return "".join([self._reader.push(token) for token in tokens]) + self._reader.settle()

    def push(self, token: int) -> str:
        """The text that this sampled token settles; may be empty."""
        piece = self._reader.push(token)
        return self._hold(piece) if self._stops else piece

    def pause(self) -> str:
        """The rest of a stage after which the branch goes on. An unfinished character goes on with it."""
        return self._take_held() + self._reader.settle()

    def finish(self) -> str:
        """The rest of a stage after which nothing of the branch follows directly."""
        return self._take_held() + self._reader.finish()

    def stop(self, cut: int, kept: int = 0) -> str:
        """The rest of a stage that ended with a stop string, which began `cut` characters before the end of
        what was readable: all before it, and the first `kept` characters of it."""
        rest = self.pause()
        return rest[: max(0, len(rest) - cut + kept)]

    def fork(self) -> Detokenizer:
        """For a branch of this one, which goes on from here."""
        branch = Detokenizer(self._reader.fork())
        branch._stops, branch._state = self._stops, self._stops.nothing
        return branch

    def _take_held(self) -> str:
        held, self._held, self._state = self._held, "", self._stops.nothing
        return held

    def _hold(self, piece: str) -> str:
        """A whole stop string is held until the next text: whether the stage ends is not decided here."""
        self._state, hold = self._stops.read(self._state, piece)
        text = self._held + piece
        keep = len(text) - hold
        self._held = text[keep:]
        return text[:keep]
