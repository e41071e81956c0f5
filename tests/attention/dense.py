"""Brute-force attention in float64 NumPy, straight from the reads, and pools with NaN wherever nothing is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from attention import Backend, Capacity, Read, Reads, Sizes, Work
from attention.xla import Xla
from tests.attention.forest import filled, pages_of


@partial(jax.jit, static_argnames=("scale", "backend"))
def _attend(q, pages, work, *, scale: float, backend: Backend):
    return backend.attend(q, pages, work, scale=scale)


@dataclass(frozen=True)
class Case:
    """Inputs of one attention call and the right answer. Rows past the reads' are padding."""

    q: np.ndarray
    k_pages: np.ndarray
    v_pages: np.ndarray
    work: Work
    scale: float
    out: np.ndarray
    lse: np.ndarray

    def errors(self, backend: Backend) -> tuple[float, float]:
        """(relative norm of the output's error, largest error of a log-sum-exp) of a backend."""
        out, lse = self.run(backend)
        real = np.isfinite(self.lse)
        assert (np.isfinite(lse) == real).all()
        assert (lse[~real] == -np.inf).all()
        assert (out[~real] == 0).all()
        norm = np.linalg.norm(out - self.out) / max(np.linalg.norm(self.out), 1e-300)
        return float(norm), float(np.abs(lse[real] - self.lse[real]).max(initial=0.0))

    def run(self, backend: Backend) -> tuple[np.ndarray, np.ndarray]:
        q, k_pages, v_pages = map(jnp.asarray, (self.q, self.k_pages, self.v_pages))
        pages = backend.stored(k_pages, v_pages)
        out, lse = _attend(q, pages, self.work, scale=self.scale, backend=backend)
        assert out.dtype == self.q.dtype
        return np.asarray(out, np.float64), np.asarray(lse, np.float64)


def make_case(
    reads: Sequence[Read],
    *,
    page_size: int,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 16,
    dtype: np.dtype | type = np.float32,
    backend: Backend | None = None,
    capacity: Capacity | None = None,
    num_pages: int | None = None,
    magnitude: float = 1.0,
    seed: int = 0,
) -> Case:
    rng, backend = np.random.default_rng(seed), backend or Xla()
    num_pages = num_pages or max((page for read in reads for page in pages_of(read)), default=0) + 2
    heads = kv_heads * group
    sizes = Sizes(num_pages=num_pages, page_size=page_size, heads=heads, kv_heads=kv_heads)
    capacity = capacity or backend.capacity(sum(read.rows for read in reads) + 3, sizes)
    order, work = backend.lay_out(Reads.of(reads), capacity)
    pool = (num_pages, kv_heads, page_size, head_dim)
    # Cast first, so that the answer is that of the same inputs.
    q = (magnitude * rng.normal(size=(capacity.rows, heads, head_dim))).astype(dtype)
    unused = ~used_slots(reads, num_pages, page_size)[:, None, :, None]
    k, v = (np.where(unused, np.nan, rng.normal(size=pool)).astype(dtype) for _ in range(2))
    scale = head_dim**-0.5
    out, lse = dense_attention(q, k, v, [reads[index] for index in order], scale)
    return Case(q, k, v, work, scale, out, lse)


def used_slots(reads: Sequence[Read], num_pages: int, page_size: int) -> np.ndarray:
    """[pages, page_size]: slots that hold a position that some read was given."""
    valid = np.zeros(num_pages, np.int64)
    for read in reads:
        for page, count in filled((*read.context, read.own), page_size):
            valid[page] = max(valid[page], count)
    return np.arange(page_size) < valid[:, None]


def dense_attention(
    q: np.ndarray, k_pages: np.ndarray, v_pages: np.ndarray, reads: Sequence[Read], scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of `reads`, in that order, packed from row 0."""
    q = q.astype(np.float64)
    group, page_size = q.shape[1] // k_pages.shape[1], k_pages.shape[2]
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    first_row = 0
    for read in reads:
        k, v = (
            np.concatenate(
                [pages[page, :, :valid] for page, valid in filled((*read.context, read.own), page_size)],
                axis=1,
            )
            .astype(np.float64)
            .repeat(group, axis=0)
            for pages in (k_pages, v_pages)
        )
        before = sum(segment.length for segment in read.context)
        for index in range(read.rows):
            row, seen = first_row + index, before + read.ordinal + index + 1
            scores = np.einsum("hd,hpd->hp", q[row], k[:, :seen]) * scale
            lse[row] = np.logaddexp.reduce(scores, axis=1)
            out[row] = np.einsum("hp,hpd->hd", np.exp(scores - lse[row][:, None]), v[:, :seen])
        first_row += read.rows
    return out, lse
