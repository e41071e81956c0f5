"""The blocks of pages of a core's tiles, brought into its memories ahead of their use. Parts of a kernel.

References come first, into scalar memory; then the pages that they name, into vector memory; then who sees
which of their tokens is laid out. Steps count the blocks of a core, from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention.tiles import unpack_sees
from attention.tpu_pages import LANES
from attention.tpu_plan import BUFFERS, CHUNK, TILE_WORDS, Plan

if TYPE_CHECKING:
    from jax import Array

_ISSUED_AT_ONCE = 16


class Tile(NamedTuple):
    """A tile's words; `wholes` and `maskeds` are counts."""

    row: Array
    rows: Array
    whole: Array
    wholes: Array
    masked: Array
    maskeds: Array


class Block(NamedTuple):
    """Some references of a tile: the first, how many, and whether not all of the tile's rows may see them."""

    first: Array
    pages: Array
    masked: Array


class Cursor(NamedTuple):
    """A block among those of a core: the tile's index, and the block's in the tile."""

    tile: Array
    block: Array


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a core's tiles, and the references of those that are near: a ring in scalar memory.

    end    the tile that is the first of the next core
    words  the ring, of BUFFERS + 1 pairs of chunks; there, a semaphore for each
    """

    plan: Plan
    tiles_ref: Any
    end: Array
    refs_ref: Any
    words: Any
    there: Any

    def tile(self, index: Array) -> Tile:
        return Tile(*(self.tiles_ref[TILE_WORDS * index + word] for word in range(TILE_WORDS)))

    def count(self, tile: Tile) -> Array:
        """How many blocks a tile has."""
        return self._blocks(tile.wholes) + self._blocks(tile.maskeds)

    def block(self, tile: Tile, number: Array) -> Block:
        """A tile's blocks of pages that all of its rows see whole come first."""
        size = self.plan.block_pages
        whole = self._blocks(tile.wholes)
        masked = number >= whole
        first = jnp.where(masked, tile.masked + (number - whole) * size, tile.whole + number * size)
        end = jnp.where(masked, tile.masked + tile.maskeds, tile.whole + tile.wholes)
        return Block(first, jnp.minimum(size, end - first), masked)

    def _blocks(self, refs: Array) -> Array:
        size = self.plan.block_pages  # a power of two
        return refs + (size - 1) >> size.bit_length() - 1

    def ask(self, cursor: Cursor, step: Array) -> tuple[Block, Cursor]:
        """The block at the cursor, the core's step-th, with its references on their way; the next cursor.

        Past the core's last tile it is a block of nothing.
        """
        some = cursor.tile < self.end
        tile = self.tile(jnp.where(some, cursor.tile, 0))
        block = self.block(tile, cursor.block)
        block = block._replace(pages=jnp.where(some, block.pages, 0))

        @pl.when(some)
        def _() -> None:
            self._copy(block, step).start()

        more = cursor.block + 1 < self.count(tile)
        return block, Cursor(
            jnp.where(more, cursor.tile, cursor.tile + 1), jnp.where(more, cursor.block + 1, 0)
        )

    def wait(self, block: Block, step: Array) -> None:
        self._copy(block, step).wait()

    def word(self, block: Block, step: Array, index: Array, kind: int) -> Array:
        """Of the index-th reference of the core's step-th block: its page (0), or who sees what of it (1)."""
        begin = 4 * CHUNK * lax.rem(step, BUFFERS + 1) + (block.first & CHUNK - 1)
        return self.words[begin + (2 * CHUNK * kind + index)]

    def _copy(self, block: Block, step: Array):
        chunk, slot = block.first >> CHUNK.bit_length() - 1, lax.rem(step, BUFFERS + 1)
        pair_at = [pl.ds(pl.multiple_of(4 * CHUNK * at, 4 * CHUNK), 4 * CHUNK) for at in (chunk, slot)]
        return pltpu.make_async_copy(
            self.refs_ref.at[pair_at[0]], self.words.at[pair_at[1]], self.there.at[slot]
        )


@dataclass(frozen=True, slots=True)
class Copies:
    """The pages of the blocks that are near: a ring of BUFFERS blocks in vector memory."""

    plan: Plan
    blocks: Blocks
    pages_ref: Any
    ring: Any
    there: Any

    def ask(self, block: Block, step: Array) -> None:
        """Starts to bring the pages of the core's step-th block."""

        @pl.when(block.pages > 0)
        def _() -> None:
            self.blocks.wait(block, step)
            slot = lax.rem(step, BUFFERS)

            def one(index: Array) -> None:
                page = self.pages_ref.at[self.blocks.word(block, step, index, 0)]
                pltpu.make_async_copy(page, self.ring.at[slot, index], self.there.at[slot]).start()

            def some(index: Array, _: None) -> None:
                for more in range(_ISSUED_AT_ONCE):
                    one(index * _ISSUED_AT_ONCE + more)

            many = block.pages >> _ISSUED_AT_ONCE.bit_length() - 1
            lax.fori_loop(0, many, some, None)
            lax.fori_loop(many * _ISSUED_AT_ONCE, block.pages, lambda index, _: one(index), None)

    def wait(self, block: Block, step: Array) -> None:
        """For all pages of the block at once: semaphores count bytes."""
        slot = lax.rem(step, BUFFERS)
        pages = self.ring.at[slot, pl.ds(0, block.pages)]
        pltpu.make_async_copy(pages, pages, self.there.at[slot]).wait()


@dataclass(frozen=True, slots=True)
class Masks:
    """Which rows of a tile see each token of a block: those from `low` to before `high`, [1, tokens]."""

    plan: Plan
    blocks: Blocks
    ring: Any
    low: Any
    high: Any

    def lay_out(self, block: Block, step: Array) -> None:
        """For all tokens of the core's step-th block, some of which are of no page: those are nobody's."""
        plan = self.plan
        each = LANES // plan.page_size  # pages whose tokens fill the lanes of a vector
        vectors = plan.block_tokens // LANES
        together = next(n for n in (8, 4, 2, 1) if vectors % n == 0)
        lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        offset = lane & plan.page_size - 1

        def some(index: Array, _: None) -> None:
            page = index * (together * each)
            words = [self.blocks.word(block, step, page + more, 1) for more in range(together * each)]
            for vector in range(together):
                word = self._spread(words[vector * each : (vector + 1) * each])
                valid, first, end, causal = unpack_sees(word)
                token = (index * together + vector) * LANES
                tokens = pl.ds(pl.multiple_of(token, LANES), LANES)
                filled = (offset < valid) & (token + lane < block.pages * plan.page_size)
                self.low[:, tokens] = jnp.maximum(first, offset - causal)
                self.high[:, tokens] = jnp.where(filled, end, 0)

            least = reduce(jnp.minimum, [word & 0xFF for word in words])

            @pl.when((least < plan.page_size) | (page + together * each > block.pages))
            def _() -> None:
                lax.fori_loop(
                    page, page + together * each, lambda page, _: self._clean(block, step, page), None
                )

        lax.fori_loop(0, vectors // together, some, None)

    def _spread(self, words: Sequence[Array]) -> Array:
        """[1, 128]: each token's word, of as many pages as have so many tokens."""
        lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        word = jnp.full((1, LANES), words[0])
        for page, later in enumerate(words[1:], 1):
            word = jnp.where(lane >= page * self.plan.page_size, later, word)
        return word

    def _clean(self, block: Block, step: Array, page: Array) -> None:
        """Makes values of a page zero that nobody sees: these may be anything, and 0 * NaN is not 0."""
        word, slot = self.blocks.word(block, step, page, 1), lax.rem(step, BUFFERS)
        valid = jnp.where(page < block.pages, word & 0xFF, 0)

        @pl.when(valid < self.plan.page_size)
        def _() -> None:
            values = self.ring.at[slot, page, :, self.ring.shape[3] - 1]
            token = lax.broadcasted_iota(jnp.int32, values.shape, 1)
            values[...] = jnp.where(token < valid, values[...], jnp.zeros(values.shape, values.dtype))
