"""What a model has announced: the labels in its text since it last opened a plan."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.grammars import TagGrammar


class Announcement:
    """Reads the text of one stage as a `Search` does, piece by piece. O(1) amortised for each character.

    `most` is as many labels as matter: of more, no list is kept.
    """

    def __init__(self, grammar: TagGrammar, most: int) -> None:
        self._settled = _Scan(grammar, most)
        self._readable: _Scan | None = None  # ahead of what is settled: a later token may change that

    def read(self, settled: str, fresh: str) -> None:
        """The next piece: settled text, or a fresh character (`scheduler.search.Reader`), or neither."""
        if settled:
            self._settled.add(settled)
            self._readable = None
        elif fresh:
            if self._readable is None:
                self._readable = self._settled.copy()
            self._readable.add(fresh)

    def labels(self) -> Sequence[str]:
        """Those of the plan that was opened last; none if none was opened, or there are more than `most`."""
        return (self._readable or self._settled).labels()


class _Scan:
    """How far a text has been looked through.

    opened   whether a plan has been
    sure     the labels that stay, whatever follows
    rest     the end of the text: what is looked at again with more
    tail     the newest characters, one less than what opens a plan has
    pieces   that have been added, and not looked at
    """

    def __init__(self, grammar: TagGrammar, most: int) -> None:
        self._grammar, self._most = grammar, most
        self._opened = False
        self._sure: list[str] = []
        self._rest = self._tail = ""
        self._pieces: list[str] = []

    def copy(self) -> _Scan:
        """One that goes on from here by itself."""
        self.labels()
        other = _Scan(self._grammar, self._most)
        other._opened, other._sure = self._opened, [*self._sure]
        other._rest, other._tail = self._rest, self._tail
        return other

    def add(self, piece: str) -> None:
        self._pieces.append(piece)

    def labels(self) -> Sequence[str]:
        self._open("".join(self._pieces))
        self._pieces.clear()
        if not self._opened or len(self._sure) > self._most:
            self._rest = ""
            return ()
        found = self._grammar.outline.find(self._rest)
        self._rest = self._rest[found.scanned :]
        self._sure += found.sure[: self._most + 1]
        labels = [*self._sure, *found.unsure] if found.unsure else self._sure
        return labels if len(labels) <= self._most else ()

    def _open(self, text: str) -> None:
        """Take new text in: what follows the last opening in it, or all of it."""
        opening, with_tail = self._grammar.plan_open, self._tail + text
        self._tail = with_tail[max(0, len(with_tail) - len(opening) + 1) :]
        at = with_tail.rfind(opening)
        if at >= 0:
            self._opened, self._sure = True, []
            self._rest = with_tail[at + len(opening) :]
        elif self._opened:
            self._rest += text
