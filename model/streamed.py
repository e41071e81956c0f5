"""Products of few rows on a GPU, and what stands between them: Pallas kernels, lowered by Triton.

In a step of few rows the products of a layer take as long as reading their weights does. A program multiplies
all rows with some columns of a weight, which it streams: Triton keeps several blocks of it in flight. Where a
weight has too few columns to give every multiprocessor a program, its rows are divided, too. The partial sums
that this leaves, float32, are added up by whoever reads the product next: the KV write, or the kernel that
adds it to the residual stream and takes the next norm. They do so in order: a row's bits do not depend on the
other rows.

What is rounded is rounded as by `model.layers`: every product, the gate, the sum and the norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from attention.gpu_tiles import launch

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Float32

MOST_ROWS = 128  # of a step, that kernels multiply: XLA is faster with more
MOST_GATED = 64  # the same, with the weights of a gated MLP
COLUMNS = 128  # of a weight, or of each of two, that a program multiplies
DEPTH = 64  # rows of a weight that it multiplies at once
PROGRAMS = 132  # multiprocessors of an H100 or H200: so many programs stream a weight
MOST_PARTS = 8
SHARED_BYTES = 160 * 1024  # for what a program keeps in flight; of 163 KiB of an A100
NORM_BLOCK = 1024  # numbers of a row that its program takes at once


def divides(rows: int, columns: int) -> bool:
    """Whether a weight [rows, columns] consists of whole blocks."""
    return rows % DEPTH == 0 and columns % COLUMNS == 0


def partial_sums(
    x: Float[Array, "rows depth"], weights: Sequence[Float[Array, "depth _"]], *, interpret: bool
) -> Float32[Array, "parts rows columns"]:
    """Partial sums of products with weights that lie side by side: over the first axis, they sum up to x @ w.

    How many there are follows from the weights' shapes.
    """
    rows, depth = x.shape
    blocks = [weight.shape[1] // COLUMNS for weight in weights]
    parts = max(1, min(PROGRAMS // sum(blocks), MOST_PARTS, depth // DEPTH))
    lanes = _lanes(rows)
    few = 4 * parts * sum(blocks) < 3 * PROGRAMS  # programs: each of them keeps more in flight
    step_bytes = DEPTH * (lanes + COLUMNS) * x.dtype.itemsize
    return launch(
        partial(_partial_sums_kernel, lanes=lanes, blocks=blocks),
        grid=(sum(blocks), parts),
        out_shape=jax.ShapeDtypeStruct((parts, rows, sum(blocks) * COLUMNS), jnp.float32),
        num_warps=4 if lanes <= 64 else 8,
        num_stages=min(6, SHARED_BYTES // step_bytes) if few else 4,
        interpret=interpret,
    )(x, *weights)


def gated(
    x: Float[Array, "rows depth"],
    gate: Float[Array, "depth columns"],
    up: Float[Array, "depth columns"],
    *,
    interpret: bool,
) -> Float[Array, "rows columns"]:
    """silu(x @ gate) * (x @ up)"""
    rows, columns = x.shape[0], gate.shape[1]
    programs = columns // COLUMNS
    # Where there are more programs than multiprocessors, two of them must fit into one.
    depth = DEPTH if programs <= PROGRAMS else DEPTH // 2
    return launch(
        partial(_gated_kernel, sizes=(_lanes(rows), depth, COLUMNS)),
        grid=(programs,),
        out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        num_warps=4,
        num_stages=4,
        interpret=interpret,
    )(x, gate, up)


def add_and_norm(
    sums: Float[Array, "parts rows size"],
    hidden: Float[Array, "rows size"],
    scale: Float[Array, " size"],
    eps: float,
    *,
    interpret: bool,
) -> tuple[Float[Array, "rows size"], Float[Array, "rows size"]]:
    """The residual stream with the sum of some partial sums, and its RMS norm."""
    shape = jax.ShapeDtypeStruct(hidden.shape, hidden.dtype)
    return launch(
        partial(_add_and_norm_kernel, eps=eps),
        grid=(hidden.shape[0],),
        out_shape=(shape, shape),
        num_warps=8,
        interpret=interpret,
    )(sums, hidden, scale)


def _lanes(rows: int) -> int:
    """Rows of the matrix product: a power of two, of which Triton's smallest is 16."""
    return max(16, pl.next_power_of_2(rows))


def _partial_sums_kernel(x_ref, *refs, lanes: int, blocks: Sequence[int]) -> None:
    *weight_refs, sums_ref = refs
    block, part = pl.program_id(0), pl.program_id(1)
    steps, parts = x_ref.shape[1] // DEPTH, sums_ref.shape[0]
    begin, end = part * steps // parts, (part + 1) * steps // parts

    def of_weight(weight_ref, first: int) -> None:
        (sums,) = _products(x_ref, (weight_ref,), block - first, (lanes, DEPTH, COLUMNS), begin, end)
        _store(sums_ref, (part,), block, sums)

    first = 0
    for weight_ref, count in zip(weight_refs, blocks, strict=True):
        pl.when((first <= block) & (block < first + count))(partial(of_weight, weight_ref, first))
        first += count


def _gated_kernel(x_ref, gate_ref, up_ref, out_ref, *, sizes: tuple[int, int, int]) -> None:
    block, dtype = pl.program_id(0), out_ref.dtype
    steps = jnp.int32(x_ref.shape[1] // sizes[1])
    products = _products(x_ref, (gate_ref, up_ref), block, sizes, jnp.int32(0), steps)
    gate, up = (_rounded(product, dtype) for product in products)
    _store(out_ref, (), block, _rounded(gate / (1 + jnp.exp(-gate)), dtype) * up)


def _products(
    x_ref, weight_refs: Sequence[Any], block: Array, sizes: tuple[int, int, int], begin: Array, end: Array
) -> tuple[Array, ...]:
    """x times a block of columns of each weight, over the steps begin..end of their rows.

    sizes: of a step's product: rows of x, rows of a weight, columns
    """
    lanes, depth, columns = sizes
    row = jnp.minimum(jnp.arange(lanes, dtype=jnp.int32), x_ref.shape[0] - 1)
    column = block * columns + jnp.arange(columns, dtype=jnp.int32)
    inner = jnp.arange(depth, dtype=jnp.int32)

    def accumulate(step: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        at = step * depth + inner
        x = x_ref[row[:, None], at[None, :]]
        weights = (weight_ref[at[:, None], column[None, :]] for weight_ref in weight_refs)
        return tuple(
            total + jnp.dot(x, weight, preferred_element_type=jnp.float32)
            for total, weight in zip(sums, weights, strict=True)
        )

    zeros = jnp.zeros((lanes, columns), jnp.float32)
    return lax.fori_loop(begin, end, accumulate, (zeros,) * len(weight_refs))


def _store(ref, index: tuple[Any, ...], block: Array, values: Array) -> None:
    """To a block of columns of ref[index], of the lanes that are rows."""
    lanes, columns = values.shape
    row = jnp.arange(lanes, dtype=jnp.int32)[:, None]
    column = block * columns + jnp.arange(columns, dtype=jnp.int32)[None, :]
    exists = jnp.broadcast_to(row < ref.shape[-2], values.shape)
    plt.store(ref.at[(*index, row, column)], values.astype(ref.dtype), mask=exists)


def _add_and_norm_kernel(sums_ref, hidden_ref, scale_ref, out_ref, norm_ref, *, eps: float) -> None:
    row, size = pl.program_id(0), hidden_ref.shape[1]
    block = math.gcd(size, NORM_BLOCK)
    places = [first + jnp.arange(block, dtype=jnp.int32) for first in range(0, size, block)]
    # All is loaded before anything is stored: no load can be moved ahead of a store.
    parts = range(sums_ref.shape[0])
    sums = [reduce(add, [sums_ref[part, row, at] for part in parts]) for at in places]
    hidden = [hidden_ref[row, at].astype(jnp.float32) for at in places]
    scales = [scale_ref[at].astype(jnp.float32) for at in places]

    dtype = out_ref.dtype
    new = [_rounded(x + _rounded(total, dtype), dtype) for x, total in zip(hidden, sums, strict=True)]
    shrink = lax.rsqrt(reduce(add, [(x * x).sum() for x in new]) / size + eps)
    for at, x, scale in zip(places, new, scales, strict=True):
        out_ref[row, at] = x.astype(dtype)
        norm_ref[row, at] = (x * shrink * scale).astype(dtype)


def _rounded(x: Array, dtype: Any) -> Array:
    """What is left of float32 numbers in another type."""
    return x.astype(dtype).astype(jnp.float32)
