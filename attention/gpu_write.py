"""The kernel that writes KV on a GPU: norms, rotary positions and the write in one launch.

A program takes a few heads of one row. Its plain form is `attention.heads.write`.
"""

from __future__ import annotations

from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from attention.gpu_tiles import launch
from attention.heads import HeadNorms, Places

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jax import Array

HEADS = 8  # of one row, that a program normalises, rotates and writes


def write(
    qkv: Array,
    norms: HeadNorms | None,
    angles: tuple[Array, Array],
    pages: Sequence[Array],
    places: Places,
    *,
    interpret: bool,
) -> tuple[Array, tuple[Array, Array]]:
    """`attention.backend.Backend.write` to pages of keys and of values."""
    *_, rows, all_heads, head_dim = qkv.shape
    kv_heads = pages[0].shape[1]
    heads = all_heads - 2 * kv_heads
    dtype = qkv.dtype if qkv.ndim == 3 else pages[0].dtype
    scales = () if norms is None else (norms.q_scale, norms.k_scale)
    arguments = (qkv, *angles, *places, *scales, *pages)
    shape = jax.ShapeDtypeStruct
    q, *written = launch(
        partial(_write_kernel, eps=None if norms is None else norms.eps),
        grid=(rows, pl.cdiv(heads, HEADS) + pl.cdiv(kv_heads, HEADS)),
        out_shape=(
            shape((rows, heads, head_dim), dtype),
            *(shape(array.shape, array.dtype) for array in pages),
        ),
        num_warps=4,
        interpret=interpret,
        input_output_aliases={len(arguments) - 2: 1, len(arguments) - 1: 2},
    )(*arguments)
    return q, tuple(written)


def _write_kernel(qkv_ref, cos_ref, sin_ref, page_ref, offset_ref, *refs, eps: float | None) -> None:
    *scale_refs, _k_pages, _v_pages, q_out_ref, k_pages_ref, v_pages_ref = refs
    q_scale_ref, k_scale_ref = scale_refs or (None, None)
    row, block = pl.program_id(0), pl.program_id(1)
    _, heads, head_dim = q_out_ref.shape
    kv_heads, half = k_pages_ref.shape[1], head_dim // 2
    pair = jnp.arange(half, dtype=jnp.int32)
    halves = pair[None, :], pair[None, :] + half
    cos, sin = cos_ref[row, pair], sin_ref[row, pair]
    query_blocks = pl.cdiv(heads, HEADS)

    dtype, wide = q_out_ref.dtype, cos.dtype

    def read_heads(head: Array, dims: Array) -> Array:
        if len(qkv_ref.shape) == 3:
            return qkv_ref[row, head[:, None], dims]
        parts = range(qkv_ref.shape[0])
        return reduce(add, [qkv_ref[part, row, head[:, None], dims] for part in parts]).astype(dtype)

    def rotated(head: Array, scale_ref) -> tuple[Array, Array]:
        """The two halves of the heads, normalised and rotated."""
        a, b = (read_heads(head, dims).astype(wide) for dims in halves)
        if scale_ref is not None:
            mean = ((a * a).sum(axis=1) + (b * b).sum(axis=1)) / head_dim
            shrink = lax.rsqrt(mean + eps)[:, None]
            a = (a * shrink * scale_ref[pair].astype(wide)).astype(dtype).astype(wide)
            b = (b * shrink * scale_ref[pair + half].astype(wide)).astype(dtype).astype(wide)
        return (a * cos - b * sin).astype(dtype), (b * cos + a * sin).astype(dtype)

    def some_heads(count: int, block: Array) -> tuple[Array, Array, Array]:
        """Heads of the block, clamped to those there are; the same; and where they are not clamped."""
        head = block * HEADS + jnp.arange(HEADS, dtype=jnp.int32)
        exists = jnp.broadcast_to((head < count)[:, None], (HEADS, half))
        return jnp.minimum(head, count - 1), head, exists

    @pl.when(block < query_blocks)
    def _() -> None:
        read, head, exists = some_heads(heads, block)
        for dims, new in zip(halves, rotated(read, q_scale_ref), strict=True):
            plt.store(q_out_ref.at[row, head[:, None], dims], new, mask=exists)

    page, offset = page_ref[row], offset_ref[row]

    @pl.when((block >= query_blocks) & (page >= 0) & (page < k_pages_ref.shape[0]))
    def _() -> None:
        read, head, exists = some_heads(kv_heads, block - query_blocks)
        keys = rotated(heads + read, k_scale_ref)
        values = (read_heads(heads + kv_heads + read, dims) for dims in halves)
        for pages_ref, parts in ((k_pages_ref, keys), (v_pages_ref, values)):
            for dims, new in zip(halves, parts, strict=True):
                new = new.astype(pages_ref.dtype)
                plt.store(pages_ref.at[page, head[:, None], offset, dims], new, mask=exists)
