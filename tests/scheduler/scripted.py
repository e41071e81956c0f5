"""A symbolic model that says what a script tells it to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from scheduler.sampling import SamplingParams
from tests.scheduler.alphabet import ID, tokens
from tests.scheduler.symbolic import Path, SymbolicModel

NEWLINE = ID["\n"]


class Scripted(SymbolicModel):
    """Says given texts: a branch, by its path, has one to begin with and one after each join.

    When a text is over it goes on with "d". No text holds a newline: one that was fed ends the server's own.
    """

    def __init__(self, texts: Mapping[Path, Iterable[str]]) -> None:
        super().__init__((ID["d"],))
        self._texts = {path: [tokens(text) for text in said] for path, said in texts.items()}
        self._begun: dict[Path, list[int]] = {}

    def choose(
        self,
        read: int,
        fed: int,
        path: Path,
        position: int,
        sampling: SamplingParams,
        given: Iterable[int],
        generated: Iterable[int],
    ) -> int:
        begun = self._begun.setdefault(path, [position])
        if fed == NEWLINE and position > begun[-1]:
            begun.append(position)
        texts = self._texts.get(path, [])
        text = texts[len(begun) - 1] if len(begun) <= len(texts) else ()
        index = position - begun[-1]
        return text[index] if index < len(text) else ID["d"]


def outlines(count: int) -> str:
    return "<Goal>" + "".join(f"<Outline>{number}:" for number in numbers(count)) + "</Goal>"


def numbers(count: int) -> list[str]:
    """So many different labels of the digits that the alphabet has."""
    return [f"{a}.{b}.{c}.{d}" for a in "123" for b in "123" for c in "123" for d in "123"][:count]
