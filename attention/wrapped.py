"""Wrapped: a backend that does as another one does, but for what a subclass changes.

For benchmarks that leave something out, and for tests that plant a fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from attention.backend import Backend, Capacity, PageArray, Sizes


@dataclass(frozen=True, slots=True)
class Wrapped(Backend):
    inner: Backend

    @property
    def name(self) -> str:
        return self.inner.name

    def supports(self, head_dim: int, dtype: Any) -> bool:
        return self.inner.supports(head_dim, dtype)

    @property
    def triton(self) -> Literal["compiled", "interpreted"] | None:
        return self.inner.triton

    def deterministic(self) -> Backend:
        return self.inner.deterministic()

    def pages(self, sizes: Sizes, head_dim: int, dtype: Any) -> Sequence[PageArray]:
        return self.inner.pages(sizes, head_dim, dtype)

    def stored(self, k: Any, v: Any) -> Any:
        return self.inner.stored(k, v)

    def capacity(self, rows: int, sizes: Sizes, pages_per_read: int | None = None) -> Capacity:
        return self.inner.capacity(rows, sizes, pages_per_read)

    def lay_out(self, reads: Any, capacity: Any) -> tuple[Any, Any]:
        return self.inner.lay_out(reads, capacity)

    def lay_out_unpadded(self, reads: Any, capacity: Any) -> tuple[Any, Any]:
        return self.inner.lay_out_unpadded(reads, capacity)

    def write(self, qkv: Any, norms: Any, angles: Any, pages: Any, places: Any) -> tuple[Any, Any]:
        return self.inner.write(qkv, norms, angles, pages, places)

    def attend(self, q: Any, pages: Any, work: Any, *, scale: float) -> tuple[Any, Any]:
        return self.inner.attend(q, pages, work, scale=scale)

    def refill(self, work: Any, filled: Any) -> Any:
        return self.inner.refill(work, filled)
