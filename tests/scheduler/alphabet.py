"""Tokens of the symbolic models: letters, some of several characters, stops, and the pieces of tags."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from scheduler.grammars import MULTIVERSE, TagGrammar
from scheduler.outline import Numbered

PIECES = (
    "$", "#",  # end of sequence, a stop token
    "a", "b", "c", "ab", "ba", "cc", "abc", "d",
    "<Goal>", "</Goal>", "<Outline>", "</Outline>", "<Path>", "</Path>", "<Conclusion>",
    "</", "Goal>", "Path>", "\n", ":", "1", "2", "3", ".",
)  # fmt: skip
ID = {piece: index for index, piece in enumerate(PIECES)}
EOS, STOP = ID["$"], ID["#"]
LETTERS = tuple(ID[piece] for piece in ("a", "b", "c", "ab", "ba", "cc", "abc", "d"))


class Pieces:
    """Reads tokens that stand for whole characters, wherever they stand."""

    fresh = ""

    def __init__(self, spell: Callable[[int], str]) -> None:
        self.push = spell


class Alphabet:
    """A codec over PIECES; it encodes greedily, the longest piece first."""

    _by_length = sorted(PIECES, key=len, reverse=True)

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = []
        while text:
            piece = next(piece for piece in self._by_length if text.startswith(piece))
            tokens.append(ID[piece])
            text = text.removeprefix(piece)
        return tokens

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(PIECES[token] for token in ids)

    def reader(self, before: Iterable[int], *, special_tokens: bool) -> Pieces:
        return Pieces(PIECES.__getitem__)


def tokens(text: str) -> tuple[int, ...]:
    return tuple(Alphabet().encode(text))


def one_of(*weighted: tuple[str, int]) -> list[int]:
    """A table with so many copies of each piece."""
    return [ID[piece] for piece, copies in weighted for _ in range(copies)]


PLAIN = [*LETTERS * 2, EOS, STOP]

_LETTERS = one_of(("a", 3), ("ba", 2), ("abc", 1))
TALKATIVE = [*_LETTERS, *one_of(("<Goal>", 6), ("</", 1), ("</Path>", 2), ("$", 1), ("</Goal>", 1))]
FOLLOWS = {
    ID["<Goal>"]: one_of(("<Outline>", 8), ("</Goal>", 1), ("a", 1)),
    ID["<Outline>"]: one_of(("1", 3), ("2", 3), ("3", 2), ("a", 1)),
    **{ID[digit]: one_of((":", 6), (".", 1), ("a", 1)) for digit in "123"},
    ID["."]: one_of(("1", 1), ("2", 1)),
    ID[":"]: one_of(("a", 2), ("</Outline>", 2), ("<Outline>", 2), ("</Goal>", 5), ("</", 3)),
    ID["</Outline>"]: one_of(("<Outline>", 3), ("</Goal>", 3), ("</", 1)),
    ID["</"]: one_of(("Goal>", 4), ("Path>", 3), ("a", 1)),
}
"""What a model that likes to fork says next; it makes mistakes."""

NPR_LIKE = TagGrammar(
    name="npr-like",
    plan_open="<Goal>",
    outline=Numbered("<Outline>", "", r"\d"),
    plan_close="</Goal>",
    branch_open="",
    branch_close="</Path>",
    join_open="",
    join="reprefill",
)
GRAMMARS = (MULTIVERSE, NPR_LIKE)
