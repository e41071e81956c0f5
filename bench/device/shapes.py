"""Shape: what one measured attention call reads, as a forest of shared prefixes with private tails.

The tables are those that the project's figures are quoted for; `random_shapes` draws others, so that nothing
is tuned to a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from attention import PageRun, Read

BYTES = 2  # of a bfloat16 element
WIDE_HEADS = (64, 8)  # query and KV heads of Qwen3-32B
NARROW_HEADS = (16, 8)  # of Qwen3-0.6B

# groups, width, prefix and tail tokens.
SHARED = (
    (1, 8, 4096, 256),
    (1, 32, 4096, 256),
    (4, 16, 4096, 256),
    (16, 16, 4096, 512),
    (32, 8, 4096, 256),
    (64, 4, 2048, 128),
    (32, 16, 4096, 64),
    (1, 128, 8192, 256),
)


@dataclass(frozen=True, slots=True)
class Shape:
    """`groups` prefixes, each read by `width` branches that have a tail of their own. Lengths in tokens.

    Suites: "decode" and "shared" have one query row per branch; in "prefill" all positions of the tail are
    query rows, causally masked. With a `ragged` seed the tails' lengths are uniform in 1 .. 2 * tail - 1.
    """

    suite: str
    groups: int
    width: int
    prefix: int
    tail: int
    page: int
    q_heads: int
    kv_heads: int
    head_dim: int = 128
    ragged: int | None = None

    def __post_init__(self) -> None:
        if self.prefix % self.page:
            raise ValueError(f"a prefix of {self.prefix} tokens does not fill pages of {self.page}")

    @property
    def label(self) -> str:
        tail = f"{self.tail}{'~' if self.ragged is not None else ''}"
        return f"{self.groups}x{self.width} {self.prefix}+{tail} {self.q_heads}/{self.kv_heads} p{self.page}"

    @property
    def branches(self) -> int:
        return self.groups * self.width

    @property
    def rows_per_branch(self) -> int:
        return self.tail if self.suite == "prefill" else 1

    @property
    def rows(self) -> int:
        return self.branches * self.rows_per_branch

    @property
    def tails(self) -> np.ndarray:
        """[branches] lengths."""
        if self.ragged is None:
            return np.full(self.branches, self.tail)
        return np.random.default_rng(self.ragged).integers(1, 2 * self.tail, self.branches)

    @property
    def kv_tokens(self) -> int:
        """Different positions that are read."""
        return self.groups * self.prefix + int(self.tails.sum())

    @property
    def unique_bytes(self) -> int:
        """Keys and values read once, queries read and outputs written: the fewest bytes to move."""
        return BYTES * self.kv_tokens * self.kv_heads * 2 * self.head_dim + self.rows_bytes

    @property
    def rows_bytes(self) -> int:
        """Of queries and outputs."""
        return BYTES * 2 * self.rows * self.q_heads * self.head_dim

    @property
    def flops(self) -> int:
        """Of the two matrix products, masked positions not counted."""
        if self.suite == "prefill":
            pairs = self.branches * self.tail * (2 * self.prefix + self.tail + 1) // 2
        else:
            pairs = self.branches * self.prefix + int(self.tails.sum())
        return 4 * pairs * self.q_heads * self.head_dim

    @property
    def pages(self) -> int:
        return self.groups * (self.prefix // self.page) + int((-(-self.tails // self.page)).sum())

    @property
    def longest(self) -> int:
        """Pages of the longest branch."""
        return self.prefix // self.page - int(-self.tails.max() // self.page)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"rows": self.rows, "unique_bytes": self.unique_bytes, "flops": self.flops}


def lengths(case: Mapping[str, Any]) -> str:
    """Of a shape's JSON: groups x width, prefix + tail tokens."""
    return f"{case['groups']} x {case['width']}, {case['prefix']} + {case['tail']}"


@dataclass(frozen=True)
class PageTables:
    """Where a shape's tokens lie: every page is used once, in random order.

    prefix  [groups, pages] page ids
    tails   page ids of each branch
    """

    shape: Shape
    prefix: np.ndarray
    tails: Sequence[np.ndarray]

    @classmethod
    def of(cls, shape: Shape, seed: int) -> PageTables:
        ids = np.random.default_rng(seed).permutation(shape.pages).astype(np.int32)
        prefix, rest = np.split(ids, [shape.groups * (shape.prefix // shape.page)])
        counts = -(-shape.tails // shape.page)
        return cls(shape, prefix.reshape(shape.groups, -1), np.split(rest, np.cumsum(counts)[:-1]))

    def moved(self, pages: int) -> PageTables:
        """The same tokens on pages that lie `pages` further on in the pool."""
        return replace(self, prefix=self.prefix + pages, tails=[tail + pages for tail in self.tails])

    def group_of(self, branch: int) -> int:
        return branch // self.shape.width

    @property
    def last_valid(self) -> np.ndarray:
        """[branches] filled positions of each branch's last page."""
        return ((self.shape.tails - 1) % self.shape.page + 1).astype(np.int32)

    @cached_property
    def branch_pages(self) -> list[np.ndarray]:
        """The whole page list of each branch, root first."""
        return [np.concatenate([self.prefix[self.group_of(i)], tail]) for i, tail in enumerate(self.tails)]

    def reads(self) -> list[Read]:
        """One per branch, in order."""
        shape, rows = self.shape, self.shape.rows_per_branch
        contexts = [(PageRun(pages, shape.prefix),) if shape.prefix else () for pages in self.prefix]
        return [
            Read(contexts[self.group_of(branch)], PageRun(pages, length), rows, length - rows)
            for branch, (pages, length) in enumerate(zip(self.tails, shape.tails.tolist(), strict=True))
        ]


def suite_shapes(suite: str, page_sizes: Sequence[int], q_heads: Sequence[int] = (64, 16)) -> list[Shape]:
    """The table of a suite: "decode", "shared" or "prefill"; raises ValueError for another name."""
    tables = {
        "decode": ((64, 1, 0, 4096),),
        "shared": SHARED,
        "prefill": ((1, 1, 8192, 512),),
    }
    if suite not in tables:
        raise ValueError(f"no suite {suite!r}; there are {', '.join(tables)}")
    return [
        Shape(suite, groups, width, prefix, tail, page, heads, kv_heads)
        for heads, kv_heads in (WIDE_HEADS, NARROW_HEADS)
        if heads in q_heads
        for page in page_sizes
        for groups, width, prefix, tail in tables[suite]
    ]


RANDOM_DISTRIBUTION = (
    "heads 64/8 or 16/8; page from the list; width log-uniform in 2..64; groups log-uniform in 1..64, "
    "at most 512 rows; prefix log-uniform in 256..8192, whole pages of 64; mean tail log-uniform in 16..512, "
    "tails uniform in 1..2*mean-1; at most 262144 different positions"
)


def random_shapes(count: int, seed: int, page_sizes: Sequence[int]) -> list[Shape]:
    """Shapes drawn from RANDOM_DISTRIBUTION."""
    rng = np.random.default_rng(seed)

    def log_uniform(low: int, high: int) -> int:
        return round(math.exp(rng.uniform(math.log(low), math.log(high))))

    shapes: list[Shape] = []
    while len(shapes) < count:
        q_heads, kv_heads = (WIDE_HEADS, NARROW_HEADS)[rng.integers(2)]
        shape = Shape(
            suite="random",
            groups=log_uniform(1, 64),
            width=log_uniform(2, 64),
            prefix=64 * max(4, log_uniform(256, 8192) // 64),
            tail=log_uniform(16, 512),
            page=int(rng.choice(page_sizes)),
            q_heads=q_heads,
            kv_heads=kv_heads,
            ragged=int(rng.integers(2**31)),
        )
        if shape.rows <= 512 and shape.kv_tokens <= 2**18:
            shapes.append(shape)
    return shapes


def shrunk(shape: Shape) -> Shape:
    """The same kind of shape at a size that a CPU runs in milliseconds."""
    groups, width = min(shape.groups, 2), min(shape.width, 3)
    prefix = min(shape.prefix, 2 * shape.page)
    heads = shape.q_heads // shape.kv_heads
    tail = min(shape.tail, 5)
    return replace(
        shape, groups=groups, width=width, prefix=prefix, tail=tail, q_heads=heads, kv_heads=1, head_dim=16
    )
