"""Where every token of an answer with branches stands: its position, and what it sees.

The paths of a fork all begin at the position of the fork and see neither each other nor each other's forks;
what follows a join begins after the longest path and sees all of them. This is the definition that the
default model was trained by; the server, which keeps pages and no masks, has to agree with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from model.tiny.tasks import Answer, Fork

Encode = Callable[[str], Sequence[int]]

Rule = Literal["trained", "sequential", "seeing", "join at the fork", "join after the sum"]
"""How positions and sight are laid out: as trained, or wrong in one way, to show that each matters.

    sequential          each path begins where the one before ended, and the conclusion after the last
    seeing              each path sees the paths before it
    join at the fork    the conclusion begins at the position of the fork
    join after the sum  the conclusion begins as if the paths had been written one after the other
"""

DEPTH = 2  # of nested forks

# What the server writes at the beginning of each path, and after the last one.
PATH_OPEN = "\n<Path>\n{label}:"
CONCLUSION_OPEN = "\n<Conclusion>\n"


@dataclass(slots=True)
class Tokens:
    """One question and its answer as a flat sequence.

    positions  rotary position of each token
    branch     for each token and depth: (fork, branch), both from 1; (0, 0) outside of any fork
    learned    whether the model has to say the token
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branch: list[tuple[tuple[int, int], ...]] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)


class _Writer:
    def __init__(self, encode: Encode, rule: Rule) -> None:
        self.sequence = Tokens()
        self._encode = encode
        self._rule = rule
        self._forks = 0

    def text(self, text: str, start: int, branch: tuple[tuple[int, int], ...], *, learned: bool) -> int:
        """Adds a text that is tokenized by itself; returns the position after it."""
        ids = self._encode(text)
        out = self.sequence
        out.tokens += ids
        out.positions += range(start, start + len(ids))
        out.branch += [branch + ((0, 0),) * (DEPTH - len(branch))] * len(ids)
        out.learned += [learned] * len(ids)
        return start + len(ids)

    def answer(self, answer: Answer, start: int, branch: tuple[tuple[int, int], ...] = ()) -> int:
        for part in answer:
            if isinstance(part, Fork):
                start = self._fork(part, start, branch)
                start = self.text(CONCLUSION_OPEN, start, branch, learned=False)
            else:
                start = self.text(part, start, branch, learned=True)
        return start

    def _fork(self, fork: Fork, start: int, branch: tuple[tuple[int, int], ...]) -> int:
        """Adds the paths; returns the position at which they are joined."""
        self._forks += 1
        number, ends = self._forks, [start]
        for child, (label, path) in enumerate(fork.branches.items(), 1):
            own = branch + (((number, child),) if self._rule != "seeing" else ())
            begin = ends[-1] if self._rule == "sequential" else start
            seeded = self.text(PATH_OPEN.format(label=label), begin, own, learned=False)
            ends.append(self.answer(path, seeded, own))
        if self._rule == "join at the fork":
            return start
        if self._rule == "join after the sum":
            return start + sum(end - start for end in ends)
        return max(ends)


def lay_out(prompt: str, answer: Answer, encode: Encode, rule: Rule = "trained") -> Tokens:
    """The whole of a question and its answer, ended by <|im_end|>."""
    writer = _Writer(encode, rule)
    start = writer.text(prompt, 0, (), learned=False)
    end = writer.answer(answer, start)
    writer.text("<|im_end|>", end, (), learned=True)
    return writer.sequence


class Rows(NamedTuple):
    """Sequences packed into rows of one length: int32 arrays of NumPy or JAX.

    tokens, positions  [rows, length]
    document           [rows, length]: which sequence, from 1; 0 marks padding
    branch             [rows, length, 2 * DEPTH]: (fork, branch) at each depth
    target             [rows, length]: the token to be said next, or -1 where none is learned
    """

    tokens: Any
    positions: Any
    document: Any
    branch: Any
    target: Any

    def resized(self, rows: int) -> Rows:
        """The first `rows` of them, or all and empty ones behind them."""
        out = Rows.empty(rows, self.tokens.shape[1])
        for name in Rows._fields:
            getattr(out, name)[: len(self.tokens)] = getattr(self, name)[:rows]
        return out

    @classmethod
    def empty(cls, rows: int, length: int) -> Rows:
        def zeros(*shape: int) -> np.ndarray:
            return np.zeros((rows, length, *shape), np.int32)

        return cls(zeros(), zeros(), zeros(), zeros(2 * DEPTH), zeros() - 1)

    def put(self, row: int, start: int, document: int, sequence: Tokens) -> None:
        span = slice(start, start + len(sequence.tokens))
        tokens = np.array(sequence.tokens, np.int32)
        self.tokens[row, span] = tokens
        self.positions[row, span] = sequence.positions
        self.document[row, span] = document
        self.branch[row, span] = np.array(sequence.branch, np.int32).reshape(-1, 2 * DEPTH)
        said = np.array(sequence.learned[1:])
        self.target[row, span][:-1] = np.where(said, tokens[1:], -1)


def pack(sequences: Sequence[Tokens], length: int) -> Rows:
    """First fit, longest first; the n-th sequence is document n + 1.

    Raises ValueError for a sequence that is longer than a row.
    """
    space: list[int] = []
    placed: list[tuple[int, int]] = []
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index].tokens))
    for index in order:
        size = len(sequences[index].tokens)
        if size > length:
            raise ValueError(f"a sequence of {size} tokens does not fit into a row of {length}")
        row = next((row for row, left in enumerate(space) if left >= size), len(space))
        if row == len(space):
            space.append(length)
        placed.append((row, length - space[row]))
        space[row] -= size
    rows = Rows.empty(len(space), length)
    for index, (row, start) in zip(order, placed, strict=True):
        rows.put(row, start, index + 1, sequences[index])
    return rows
