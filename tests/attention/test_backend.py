"""What every backend promises, whatever its work is."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from attention import BACKENDS, Backend, PageArray, PageRun, Read, Reads, Sizes
from attention.gpu import Gpu
from attention.reference import Reference
from attention.tpu import Tpu
from attention.wrapped import Wrapped
from attention.xla import Xla
from tests.attention.forest import Forest, forests, pages_of

PAGE_SIZE, NUM_PAGES, HEADS, KV_HEADS, HEAD_DIM = 16, 8, 2, 1, 128
RUNNING = [Reference(), Xla(), Gpu(interpret=True), Tpu(interpret=True, block_tokens=128), Wrapped(Xla())]
EVERY_BACKEND = pytest.mark.parametrize("backend", RUNNING, ids=lambda backend: type(backend).__name__)


def capacity(backend: Backend, rows: int, heads: int = HEADS, kv_heads: int = KV_HEADS):
    sizes = Sizes(num_pages=NUM_PAGES, page_size=PAGE_SIZE, heads=heads, kv_heads=kv_heads)
    return backend.capacity(rows, sizes)


@cache
def compiled_attend(backend: Backend) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """An interpreted kernel that is not compiled as a whole is compiled anew at every call."""
    return jax.jit(partial(backend.attend, scale=1.0))


def seen(backend: Backend, work: object, rows: int) -> list[list[int]]:
    """The positions of the pool that each row reads, as the lse of equal scores and one-hot values tell."""
    shape = (NUM_PAGES, KV_HEADS, PAGE_SIZE, HEAD_DIM)
    values = np.eye(NUM_PAGES * PAGE_SIZE, HEAD_DIM, dtype=np.float32).reshape(shape)
    pages = backend.stored(jnp.zeros(shape), jnp.asarray(values))
    attend = compiled_attend(backend)
    out, lse = attend(jnp.zeros((rows, HEADS, HEAD_DIM)), pages, work)
    read = [np.flatnonzero(row[0]).tolist() for row in np.asarray(out)]
    counts = np.rint(np.exp(np.asarray(lse)[:, 0])).astype(int).tolist()
    assert counts == [len(row) for row in read]
    return read


@EVERY_BACKEND
def test_pages_are_refilled_where_it_says_and_nowhere_else(backend: Backend) -> None:
    """Two branches on pages of their own, one after another, behind a prefix that stays as it is."""
    nearly = PAGE_SIZE - 1
    prefix = PageRun((0, 1), PAGE_SIZE + 6)
    reads = [
        Read((prefix, PageRun((first,), nearly)), PageRun((first + 1,), nearly), 1, nearly - 1)
        for first in (2, 4)
    ]
    order, work = backend.lay_out(Reads.of(reads), capacity(backend, 2))
    assert order.tolist() == [0, 1]
    for steps in (1, nearly, PAGE_SIZE, PAGE_SIZE + 1, 2 * PAGE_SIZE):
        begin = np.full(NUM_PAGES, -1)
        begin[[2, 3, 4, 5]] = [0, PAGE_SIZE, 0, PAGE_SIZE]
        filled = np.where(begin < 0, -1, np.clip(steps - begin, 0, PAGE_SIZE)).astype(np.int32)
        own = [[PAGE_SIZE * first + i for i in range(steps)] for first in (2, 4)]
        refilled = backend.refill(work, jnp.asarray(filled))
        assert seen(backend, refilled, 2) == [[*range(prefix.length), *mine] for mine in own], steps


@EVERY_BACKEND
@given(forest=forests(page_sizes=(PAGE_SIZE,)))
@settings(max_examples=25)
def test_unpadded_work_is_the_beginning_of_the_padded(backend: Backend, forest: Forest) -> None:
    """So whoever copies it over padding has the bucket's arrays."""
    rows = sum(read.rows for read in forest.reads)
    pages = 1 + max(page for read in forest.reads for page in pages_of(read))
    sizes = Sizes(num_pages=pages, page_size=PAGE_SIZE, heads=HEADS, kv_heads=KV_HEADS, paths=8)
    room, reads = backend.capacity(rows, sizes), Reads.of(forest.reads)
    order, work = backend.lay_out(reads, room)
    again, unpadded = backend.lay_out_unpadded(reads, room)
    np.testing.assert_array_equal(order, again)
    for whole, part, empty in zip(work, unpadded, room.empty(), strict=True):
        assert (whole.shape, whole.dtype, part.dtype) == (empty.shape, np.int32, np.int32)
        empty[tuple(map(slice, part.shape))] = part
        np.testing.assert_array_equal(empty, whole)


@pytest.mark.parametrize("backend", [Xla(), Gpu(), Wrapped(Gpu())], ids=repr)
def test_unpadded_work_is_as_small_as_the_step(backend: Backend) -> None:
    room = backend.capacity(64, Sizes(num_pages=4000, page_size=PAGE_SIZE, heads=HEADS, kv_heads=KV_HEADS))
    _, work = backend.lay_out_unpadded(Reads.of([Read((), PageRun((3, 5, 4), 40), 1, 39)]), room)
    assert sum(array.size for array in work) < 100


@EVERY_BACKEND
def test_query_heads_must_be_a_multiple_of_kv_heads(backend: Backend) -> None:
    with pytest.raises(ValueError, match="3 query heads cannot share 2 KV heads"):
        capacity(backend, 4, heads=3, kv_heads=2)
    pool = jnp.zeros((NUM_PAGES, 2, PAGE_SIZE, HEAD_DIM))
    work = capacity(backend, 4, heads=4, kv_heads=2).empty()
    with pytest.raises(ValueError, match="3 query heads cannot share 2 KV heads"):
        backend.attend(jnp.zeros((4, 3, HEAD_DIM)), backend.stored(pool, pool), work, scale=1.0)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_is_a_value(name: str) -> None:
    """As a static argument of compiled programs, and for the processes that plan."""
    backend = BACKENDS[name]
    again = pickle.loads(pickle.dumps(backend))
    assert again == backend
    assert hash(again) == hash(backend)
    assert [other for other in BACKENDS.values() if other == backend] == [backend]
    sizes = Sizes(num_pages=9, page_size=64, heads=2, kv_heads=1)
    rooms = [each.capacity(8, sizes) for each in (again, backend)]
    assert len(set(rooms)) == 1


def test_only_the_tiles_of_a_gpu_have_a_deterministic_form() -> None:
    assert Gpu().deterministic() == Gpu(alone=True)
    assert Gpu(interpret=True).deterministic() == Gpu(alone=True, interpret=True)
    assert Gpu(alone=True).tiling(16, 8, 64).alone
    assert not Gpu().tiling(16, 8, 64).alone
    for backend in (Reference(), Xla(), Tpu()):
        with pytest.raises(ValueError, match=f"{backend.name} has no deterministic form"):
            backend.deterministic()


def test_an_array_of_pages_knows_its_bytes() -> None:
    assert PageArray((3, 2, 5), ("pages", None, "head_dim"), jnp.bfloat16).nbytes == 60


def test_room_for_work_is_no_larger_than_it_must_be() -> None:
    """It is in every step's packed vector, and what a kernel's grid is made of."""
    sizes = Sizes(num_pages=1000, page_size=64, heads=16, kv_heads=8)
    items = Xla().capacity(8, sizes, pages_per_read=10)
    assert (items.items, items.page_refs) == (16, 80)
    tiles = Gpu().capacity(8, sizes, pages_per_read=10)
    assert (tiles.tiles, tiles.page_refs, tiles.slots) == (8 + 33, 80, 8 + 33 * 8)
    assert Gpu().capacity(8, sizes).page_refs == 1000 + 8, "no run of rows is cut"
    assert Xla().capacity(64, sizes, pages_per_read=200).page_refs == 1000 + 64
    cut = Gpu().capacity(64, sizes, pages_per_read=200)
    assert cut.page_refs == 1000 + 64 + 3 * 200, "tiles of 32 rows: three cuts at most"
    narrow = Gpu().capacity(8, replace(sizes, page_size=16), pages_per_read=10)
    assert narrow.page_refs == 80 + 8 * 3, "each tile fills a block of four pages"
