from __future__ import annotations

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from attention import PageRun, Places, Read, Reads
from attention.layout import ItemCapacity, WorkList
from attention.reference import Reference
from attention.xla import ROW_TILE, Softmax, Xla
from tests.attention.dense import Case, make_case
from tests.attention.forest import Forest, forests, mixed_reads
from tests.durations import takes_less
from tests.sizes import sampled

attend = partial(Xla().attend, scale=0.25)


pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.mark.parametrize(
    ("kv_heads", "group", "page_size", "head_dim"),
    sampled(
        [(3, 1, 4, 64), (1, 2, 16, 128), (2, 5, 64, 16), (1, 8, 16, 64), (2, 2, 64, 128), (8, 1, 16, 16)],
        [(3, 1, 4, 64), (2, 5, 64, 16), (1, 8, 16, 64)],
    ),
)
def test_it_agrees_with_brute_force(kv_heads: int, group: int, page_size: int, head_dim: int) -> None:
    case = make_case(
        mixed_reads(page_size), page_size=page_size, kv_heads=kv_heads, group=group, head_dim=head_dim
    )
    out, lse = case.errors(Xla())
    assert out < 2e-6
    assert lse < 5e-6


@given(forests(page_sizes=(4,)))
@settings(max_examples=40)
def test_it_agrees_with_brute_force_on_random_trees(forest: Forest) -> None:
    capacity = ItemCapacity(rows=256, items=256, page_refs=512, page_size=4)
    case = make_case(forest.reads, page_size=4, capacity=capacity, num_pages=forest.num_pages)
    assert max(case.errors(Xla())) < 5e-6


@pytest.mark.parametrize("page_size", sampled([16, 64], [16]))
def test_bfloat16_inputs_are_summed_in_float32(page_size: int) -> None:
    case = make_case(mixed_reads(page_size), page_size=page_size, head_dim=64, dtype=jnp.bfloat16)
    out, lse = case.errors(Xla())
    assert out < 3e-3
    assert lse < 1e-5


@pytest.mark.usefixtures("x64")
def test_float64_stays_float64() -> None:
    case = make_case(mixed_reads(16), page_size=16, head_dim=64, dtype=np.float64)
    assert max(case.errors(Xla())) < 1e-12


@pytest.mark.parametrize("magnitude", [0.0, 60.0])
def test_equal_and_extreme_scores_are_safe(magnitude: float) -> None:
    """60: the scores are normal with that deviation, so nearly all weight is on one position."""
    case = make_case(mixed_reads(16), page_size=16, magnitude=magnitude)
    out, lse = case.errors(Xla())
    assert out < 2e-5
    assert lse < 1e-4


def test_a_work_list_without_items_gives_zeros() -> None:
    assert make_case([], page_size=4).errors(Xla()) == (0, 0)


def test_fewer_rows_than_a_tile() -> None:
    reads = [
        Read((PageRun([0], 4),), PageRun([own], length), length - 1, 1) for own, length in ((1, 2), (2, 3))
    ]
    capacity = ItemCapacity(rows=3, items=6, page_refs=4, page_size=4)
    assert capacity.rows < ROW_TILE
    assert max(make_case(reads, page_size=4, capacity=capacity).errors(Xla())) < 5e-6


def test_an_item_may_end_at_the_last_row() -> None:
    reads = [Read((), PageRun([0], 1), 1, 0), Read((), PageRun([1, 2, 3, 4, 5], 20), 20, 0)]
    capacity = ItemCapacity(rows=21, items=42, page_refs=6, page_size=4)
    assert max(make_case(reads, page_size=4, capacity=capacity).errors(Xla())) < 5e-6


def test_it_agrees_with_the_reference_where_items_alias_page_references() -> None:
    """Two items may list the same pages, and single rows need not be listed as such."""
    case = make_case(mixed_reads(4), page_size=4)
    work = WorkList(
        item_pages=np.array([[0, 3], [1, 2], [0, 3]], np.int32),
        item_rows=np.array([[2, 1], [0, 2], [4, 2]], np.int32),
        item_causal=np.array([2**30, 3, 5], np.int32),
        page_ids=np.array([3, 3, 1, 0], np.int32),
        page_valid=np.array([2, 4, 3, 0], np.int32),
        num_items=np.array(3, np.int32),
        num_single=np.zeros((), np.int32),
    )
    full = np.nan_to_num(case.k_pages), np.nan_to_num(case.v_pages)
    aliased = Case(case.q, *full, work, case.scale, case.out, case.lse)
    for ours, oracle in zip(aliased.run(Xla()), aliased.run(Reference()), strict=True):
        np.testing.assert_allclose(ours, oracle, atol=5e-6)


def test_where_pages_lie_in_the_pool_does_not_matter() -> None:
    case = make_case(mixed_reads(16), page_size=16)
    permutation = np.random.default_rng(5).permutation(len(case.k_pages))
    moved = Case(
        case.q,
        case.k_pages[np.argsort(permutation)],
        case.v_pages[np.argsort(permutation)],
        case.work._replace(page_ids=permutation[case.work.page_ids].astype(np.int32)),
        case.scale,
        case.out,
        case.lse,
    )
    np.testing.assert_array_equal(moved.run(Xla())[0], case.run(Xla())[0])


def test_one_program_serves_every_list_and_its_time_follows_the_list() -> None:
    """At the same capacity, a nearly empty list takes a small part of a full one's time."""
    capacity = ItemCapacity(rows=512, items=1024, page_refs=8192, page_size=16)
    pages = jnp.zeros((8192, 2, 16, 32))
    q = jnp.zeros((512, 4, 32))
    everything = [Read((), PageRun(range(16 * i, 16 * i + 16), 256), 1, 255) for i in range(512)]
    compiled = jax.jit(attend).lower(q, (pages, pages), capacity.empty()).compile()

    def seconds(reads: list[Read]) -> float:
        work = jax.tree.map(jnp.asarray, Xla().lay_out(Reads.of(reads), capacity)[1])
        began = time.perf_counter()
        jax.block_until_ready(compiled(q, (pages, pages), work))
        return time.perf_counter() - began

    assert takes_less(lambda: seconds(everything[:1]), 1 / 8, lambda: seconds(everything))


@pytest.mark.parametrize(
    ("shared", "longer", "expected"), [(9, 5, 3 + 2), (8, 4, 2 + 1)], ids=["blocks with room", "full blocks"]
)
def test_no_more_blocks_are_read_than_hold_the_items_pages(
    monkeypatch: pytest.MonkeyPatch, shared: int, longer: int, expected: int
) -> None:
    """Two rows in lockstep with tails of 3 pages and more, two a block, after shared ones, eight a block."""
    blocks: list[int] = []
    add = Softmax.add

    def counting(state: Softmax, scores: jax.Array, values: jax.Array) -> Softmax:
        jax.debug.callback(lambda: blocks.append(1))
        return add(state, scores, values)

    monkeypatch.setattr(Softmax, "add", counting)
    prefix, end = [PageRun(range(shared), shared * 16)], 16 * longer
    reads = [
        Read(prefix, PageRun(range(9, 12), 45), 1, 44),
        Read(prefix, PageRun(range(12, 12 + longer), end), 1, end - 1),
    ]
    capacity = ItemCapacity(rows=2, items=4, page_refs=64, page_size=16)
    pages = jnp.zeros((17, 1, 16, 16))
    attend(jnp.zeros((2, 1, 16)), (pages, pages), Xla().lay_out(Reads.of(reads), capacity)[1])
    jax.effects_barrier()
    assert len(blocks) == expected


def test_writing_and_reading_a_donated_pool_copies_none_of_it() -> None:
    pool = jax.ShapeDtypeStruct((4096, 2, 16, 32), jnp.float32)
    rows = jax.ShapeDtypeStruct((8, 6, 32), jnp.float32)
    angle = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    places = Places(*[jax.ShapeDtypeStruct((8,), jnp.int32)] * 2)
    work = ItemCapacity(rows=8, items=16, page_refs=64, page_size=16).empty()

    def step(k_pages, v_pages, qkv, angle, places, work):
        q, pools = Xla().write(qkv, None, (angle, angle), (k_pages, v_pages), places)
        return attend(q, pools, work), pools

    program = jax.jit(step, donate_argnums=(0, 1)).lower(pool, pool, rows, angle, places, work)
    memory = program.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * pool.size * 4
    assert memory.temp_size_in_bytes < pool.size * 4 / 4
