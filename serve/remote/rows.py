"""News of many requests as rows of numbers: a plain token costs no object on its way between processes."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from scheduler.events import TokenEmitted
from scheduler.step import Sample
from serve.door import News

_RARE = -1  # in the place of a branch: the row stands for one of the other news
_WIDTH = 4


class Rows(NamedTuple):
    """Rows of four 64-bit numbers: handle, branch, token and count of the branch's tokens; or, for what is no
    plain token, handle, -1, its place in `rare`, and 0."""

    data: bytes
    rare: tuple[News, ...]


def pack(batches: Iterable[tuple[int, Sequence[News]]]) -> Rows:
    """Handles with their news, in order."""
    rows, rare = list[int](), list[News]()
    for handle, batch in batches:
        for news in batch:
            if isinstance(news, TokenEmitted):
                _, branch, (token, logprob, top), count = news
                if logprob is None and not top:
                    rows += (handle, branch, token, count)
                    continue
            rows += (handle, _RARE, len(rare), 0)
            rare.append(news)
    return Rows(array("q", rows).tobytes(), tuple(rare))


def unpack(packed: Rows, names: Mapping[int, str]) -> dict[int, list[News]]:
    """The news of each handle that has a name, its request's id; others have been forgotten."""
    numbers, found = iter(array("q", packed.data).tolist()), dict[int, list[News]]()
    for handle, branch, token, count in zip(*[numbers] * _WIDTH, strict=True):
        if handle in names:
            rare = branch == _RARE
            news = packed.rare[token] if rare else TokenEmitted(names[handle], branch, Sample(token), count)
            found.setdefault(handle, []).append(news)
    return found
