"""Backend: one way of computing attention of ragged query rows over shared, paged KV.

It is a value. Whoever starts a server or a benchmark chooses one and passes it on, down to the compiled step,
where it is a static argument. What it makes of a step's reads (the work), the arrays that its pages are, and
the room that it needs are its own business: everybody else hands them from one of its methods to the next.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import jax.numpy as jnp

if TYPE_CHECKING:
    import numpy as np
    from jax import Array
    from jaxtyping import Float, Int, Int32

    from attention.heads import HeadNorms, Places
    from attention.reads import Reads

Pages = Any
"""A layer's KV pages: a pytree of arrays, as `Backend.pages` describes them."""
Work = Any
"""What a step's rows read, as a backend lays it out: a pytree of int32 arrays, NumPy or JAX."""


@runtime_checkable
class Capacity(Protocol):
    """Room for the work of a row bucket. Hashable, and equal where programs can be the same."""

    @property
    def rows(self) -> int: ...

    def empty(self) -> Work:
        """Work in which nobody reads anything, in arrays of the bucket's sizes: it pads a smaller step's."""
        ...


@dataclass(frozen=True, slots=True)
class PageArray:
    """One array of a layer's pages: its shape, and logical axes by which it may be divided (None: not)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: Any

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the sizes of a backend's arrays follow from.

    num_pages        pages of the pool
    page_size        positions of a page
    heads, kv_heads  query and KV heads of one device
    paths            different runs of pages in front of one page, in the reads of one step: a branch reads
                     its page after its ancestors', whoever goes on from a kv join after its siblings', too
    """

    num_pages: int
    page_size: int
    heads: int
    kv_heads: int
    paths: int = 1


class Backend(ABC):
    """What attention is to the rest of the project. Implementations are frozen dataclasses.

    A step goes through `lay_out` on the host, then, on the device and for each layer, through `write` and
    `attend`. Query head h reads KV head h // (heads // kv_heads).
    """

    __slots__ = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """What users, profiles and results call it."""

    def supports(self, head_dim: int, dtype: Any) -> bool:
        """Whether it takes a model's head size and type."""
        del head_dim, dtype
        return True

    @property
    def triton(self) -> Literal["compiled", "interpreted"] | None:
        """How its device runs kernels that are lowered by Triton; None where it does not.

        If it does, `write` also takes heads as partial sums, [parts, rows, all_heads, head_dim] of float32.
        """
        return None

    def deterministic(self) -> Backend:
        """The form of this backend in which what a row computes does not depend on the other rows.

        See docs/schedule-invariance.md. Raises ValueError if it has none.
        """
        raise ValueError(f"attention by {self.name} has no deterministic form: leave --deterministic out")

    def fitted(self, head_dim: int, dtype: Any, devices: int) -> Backend:
        """This backend, with whatever the devices at hand have for a model of this head size and type, which
        so many of them share."""
        del head_dim, dtype, devices
        return self

    def pages(self, sizes: Sizes, head_dim: int, dtype: Any) -> Sequence[PageArray]:
        """The arrays that hold the pages of one layer.

        Their first axis is "pages". Unless a backend says otherwise: keys and values apart, heads first.
        """
        shape = (sizes.num_pages, sizes.kv_heads, sizes.page_size, head_dim)
        array = PageArray(shape, ("pages", "kv_heads", "page", "head_dim"), dtype)
        return array, array

    def stored(
        self,
        k: Float[Array, "pages kv_heads page head_dim"],
        v: Float[Array, "pages kv_heads page head_dim"],
    ) -> Pages:
        """A layer's pages that hold these keys and values: for checks and benchmarks, which write none."""
        return k, v

    @abstractmethod
    def capacity(self, rows: int, sizes: Sizes, pages_per_read: int | None = None) -> Capacity:
        """Room for every step of at most `rows` rows.

        `pages_per_read` (the longest context in pages) may bound it further. Raises ValueError if the heads
        are not a multiple of the KV heads.
        """

    @abstractmethod
    def lay_out(self, reads: Reads, capacity: Capacity) -> tuple[Int[np.ndarray, " reads"], Work]:
        """What a step reads, as work of `capacity`'s sizes; on the host, without a device.

        Rows are packed without gaps from row 0 on: `order[i]` is the index of the read whose rows come i-th.
        Reads that come in ascending order of their pages keep their order.

        Raises:
          ValueError: a read is malformed, or the step needs more of something than `capacity` has.
        """

    def lay_out_unpadded(self, reads: Reads, capacity: Capacity) -> tuple[Int[np.ndarray, " reads"], Work]:
        """As `lay_out`, but arrays may end where the step has no more for them.

        For whoever copies them: room for page references is a hundred times what most steps need.
        """
        return self.lay_out(reads, capacity)

    @abstractmethod
    def write(
        self,
        qkv: Float[Array, "rows all_heads head_dim"],
        norms: HeadNorms | None,
        angles: tuple[Float[Array, "rows pairs"], Float[Array, "rows pairs"]],
        pages: Pages,
        places: Places,
    ) -> tuple[Float[Array, "rows heads head_dim"], Pages]:
        """Normalises and rotates queries and keys, and writes keys and values to their places.

        `qkv` are the heads of each row: queries, then keys, then values; `angles` are (cos, sin) of its
        position. Returns the queries and the pages, which are updated in place where they are donated.
        """

    @abstractmethod
    def attend(
        self, q: Float[Array, "rows heads head_dim"], pages: Pages, work: Work, *, scale: float
    ) -> tuple[Float[Array, "rows heads head_dim"], Float[Array, "rows heads"]]:
        """Softmax attention of every row over the positions that the work gives it.

        Returns the weighted means of the values, in q's dtype, and the natural log-sum-exp of the scaled
        scores. Sums are kept in max(float32, q's dtype). Rows that read nothing give zeros and -inf. Page
        slots that nobody reads may hold anything, NaN included.

        Raises:
          ValueError: heads is not a multiple of the pages' kv_heads, or what `supports` says is not.
        """

    @abstractmethod
    def refill(self, work: Work, filled: Int32[Array, " pages"]) -> Work:
        """The same work when page p has filled[p] positions, for a loop on the device.

        Where filled[p] is negative, the page is as full as it was laid out. A page that is refilled must have
        been laid out with less than `page_size` positions (but for pages of one), all of them for all of its
        readers; nobody reads one that has none.
        """
