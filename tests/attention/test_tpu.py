"""The TPU kernel of attention, interpreted: the same code, copy by copy. tests/tpu compiles it for chips."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.experimental.pallas import tpu as pltpu

from attention import PageRun, Read, Reads, Sizes, default_backend
from attention.tpu import CoreCapacity, Tpu
from attention.tpu_chips import CHIPS, chip_of
from attention.tpu_pages import LANES
from attention.tpu_plan import CHUNK, TILE_WORDS
from attention.xla import Xla
from tests.attention.dense import Case, make_case
from tests.attention.forest import Forest, forests, groups_of_branches, mixed_reads
from tests.sizes import sampled

pytestmark = pytest.mark.usefixtures("quick_compiler")

# Copies happen as late as they may, memory is NaN before it is written, and races are looked for.
STRICT = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")


def interpreted(chip: str = "v5e", block_tokens: int = 256) -> Tpu:
    return Tpu(CHIPS[chip], STRICT, block_tokens)


def check(case: Case, backend: Tpu) -> None:
    """The answer is right, no copy raced with a use, and each page and list of references came once."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    out, lse = case.errors(backend)
    pages = case.work.tiles.reshape(-1, TILE_WORDS)[: case.work.cores[-1], [3, 5]]
    block_pages = backend.block_tokens // case.k_pages.shape[2]
    assert interpreter.dma_id_counter.get_next() - 100 == pages.sum() + (-(-pages // block_pages)).sum()
    assert out < (2e-6 if case.q.dtype == np.float32 else 3e-3)
    assert lse < 5e-6
    assert not interpreter.races.races_found


# Chip, KV heads, group, page size, head size, type: a program each, so that most are left to `make test-all`.
PROGRAMS = [
    *product(["v5e", "v5p"], [1, 2], [1, 2, 5, 8], [16, 32, 64, 128], [32, 64, 128], ["bfloat16", "float32"]),
]
EVERY_RUN = [
    ("v5e", 2, 2, 16, 32, "bfloat16"),  # two heads at once
    ("v5p", 1, 5, 16, 32, "float32"),  # a window begins before its tile; keys and values in one plane
]


@pytest.mark.parametrize(
    ("chip", "kv_heads", "group", "page_size", "head_dim", "dtype"), sampled(PROGRAMS, EVERY_RUN)
)
def test_trees_and_prompt_chunks_agree_with_brute_force(
    chip: str, kv_heads: int, group: int, page_size: int, head_dim: int, dtype: str
) -> None:
    """Three levels, more rows than lanes, chunks longer than a block, tiles of both cores."""
    backend = interpreted(chip)
    case = make_case(
        mixed_reads(page_size),
        backend=backend,
        page_size=page_size,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        dtype=jnp.dtype(dtype),
    )
    assert np.diff(case.work.cores).min() > 0, "every core has work"
    check(case, backend)


def of_three_heads(reads: list[Read]) -> Case:
    """By one program, of two cores: groups of 3, 256 rows, pages of 16."""
    backend = interpreted("v5p")
    sizes = Sizes(num_pages=4096, page_size=16, heads=3, kv_heads=1, paths=8)
    capacity = backend.capacity(256, sizes, pages_per_read=64)
    case = make_case(
        reads,
        backend=backend,
        capacity=capacity,
        page_size=16,
        kv_heads=1,
        group=3,
        head_dim=64,
        num_pages=sizes.num_pages,
    )
    check(case, backend)
    return case


@given(forests(page_sizes=(16,)))
@settings(max_examples=3)
def test_random_trees_agree_with_brute_force(forest: Forest) -> None:
    of_three_heads(forest.reads)


def test_a_tile_begins_between_the_lanes_at_which_a_window_may() -> None:
    """And so ends behind the 16, 64 or 128 lanes that it would fit into."""
    forest = Forest(page_size=16, stride=1237)
    reads: list[Read] = []
    for width in (5, 21, 42, 21):
        trunk = (forest.segment(80),)
        reads += [Read(trunk, forest.segment(1), 1, 0) for _ in range(width)]
    case = of_three_heads(reads)
    row, rows = case.work.tiles.reshape(-1, TILE_WORDS)[: case.work.cores[-1], :2].T
    for size in (16, 64, 128):
        assert ((3 * rows <= size) & (3 * rows + 3 * row % 8 > size)).any(), size


@pytest.mark.parametrize(("rows", "group"), [(256, 3), (256, 5), (64, 8), (8, 1)])
def test_there_is_room_for_the_widest_tile_wherever_it_begins(rows: int, group: int) -> None:
    """For its running softmax, and, at the end of all rows, for the lanes behind it."""
    plan = Tpu().plan(rows, Sizes(num_pages=64, page_size=16, heads=group, kv_heads=1), 64, jnp.bfloat16)
    largest = plan.variants[-1]
    for first in range(rows - plan.lanes // group + 1):
        before = first * group % 8
        window = -(-(before + plan.lanes) // largest) * largest
        assert window <= plan.window
        assert first * group - before + window <= plan.all_lanes


@pytest.fixture
def pages_ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the pages that are on their way where the kernel begins to wait for some of them."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    ahead, of_references = [0], set[int]()
    a_page, a_list = 16 * 2 * LANES * 4, 4 * CHUNK * 4

    def told(function: Any, note: Callable[[dict[str, Any]], None]) -> Any:
        def instead(*arguments: Any, **options: Any) -> Any:
            note(inspect.signature(function).bind(*arguments, **options).arguments)
            return function(*arguments, **options)

        return instead

    def started(copy: dict[str, Any]) -> None:
        into = int(copy["dst_id"])
        of_references.update(() if of_references else [into])  # the first is one
        ahead[-1] += a_page * (into not in of_references)

    def waited(copy: dict[str, Any]) -> None:
        if copy["size"] != a_list:
            ahead.append(ahead[-1] - int(copy["size"]))

    monkeypatch.setattr(interpreter, "dma_start", told(interpreter.dma_start, started))
    monkeypatch.setattr(interpreter, "dma_wait", told(interpreter.dma_wait, waited))
    return ahead


def test_a_group_wider_than_a_tile_that_is_longer_than_its_chunk_of_references(
    pages_ahead: list[int],
) -> None:
    """Four times as many lanes as are computed at once, blocks whose references lie in two chunks; scores so
    far apart that nearly all weight is on one position. While a block is used, two are on their way."""
    backend = Tpu(interpret=True, block_tokens=128)
    reads = groups_of_branches(1, 64, 16 * 221, [1], 16)
    case = make_case(reads, backend=backend, page_size=16, kv_heads=1, group=8, head_dim=128, magnitude=30.0)
    tiles = case.work.tiles.reshape(-1, TILE_WORDS)[: case.work.cores[-1]]
    assert tiles[:, 1].tolist() == [64], "one tile of 512 lanes"
    _, _, whole, wholes, masked, maskeds = tiles[0]
    firsts = [*range(whole, whole + wholes, 8), *range(masked, masked + maskeds, 8)]
    assert any(first // CHUNK < (first + 7) // CHUNK for first in firsts)
    out, lse = case.errors(backend)
    assert out < 2e-5
    assert lse < 1e-4
    block = 128 * 2 * LANES * 4
    assert max(pages_ahead) == 3 * block
    assert min(pages_ahead[:-3]) > 2.5 * block
    assert pages_ahead[-1] == 0


def test_no_work_gives_zeros() -> None:
    assert of_three_heads([]).errors(interpreted("v5p")) == (0, 0)


# --- what is copied ----------------------------------------------------------------------------------------


def copied(reads: list[Read], page_size: int = 64) -> int:
    """Pages that the kernel copies in a step, of one KV head of eight query heads."""
    pages = 1 + max(page for read in reads for run in (*read.context, read.own) for page in run.pages)
    sizes = Sizes(num_pages=pages, page_size=page_size, heads=8, kv_heads=1)
    backend = Tpu()
    _, work = backend.lay_out(Reads.of(reads), backend.capacity(sum(read.rows for read in reads), sizes))
    tiles = work.tiles.reshape(-1, TILE_WORDS)[: work.cores[-1]]
    return int(tiles[:, [3, 5]].sum())


def unshared(reads: list[Read]) -> list[Read]:
    """The same reads, each with pages of its own."""
    lengths = [[run.length for run in (*read.context, read.own)] for read in reads]
    forest = Forest(page_size=64, stride=1237, num_pages=1 << 14)
    runs = [[forest.segment(length) for length in each] for each in lengths]
    return [Read(tuple(context), own, 1, own.length - 1) for *context, own in runs]


@pytest.mark.parametrize(("width", "tail", "fewer"), [(16, 64, 12.0), (16, 256, 8.0), (8, 256, 5.5)])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_shared_prefix_is_copied_once(groups: int, width: int, tail: int, fewer: float) -> None:
    reads = groups_of_branches(groups, width, 4096, [tail], 64)
    assert copied(unshared(reads)) == groups * width * (4096 + tail) // 64
    assert copied(unshared(reads)) >= fewer * copied(reads)


# --- what a core is given ----------------------------------------------------------------------------------


def laid_out(reads: list[Read], chip: str, rows: int = 64) -> tuple[CoreCapacity, np.ndarray, np.ndarray]:
    """The capacity, the tiles' words and the core of each."""
    backend, sizes = Tpu(CHIPS[chip]), Sizes(num_pages=4096, page_size=64, heads=8, kv_heads=1)
    capacity = backend.capacity(rows, sizes)
    _, work = backend.lay_out(Reads.of(reads), capacity)
    assert (work.cores[0], len(work.cores)) == (0, 1 + CHIPS[chip].cores)
    tiles = work.tiles.reshape(-1, TILE_WORDS)[: work.cores[-1]]
    return capacity, tiles, np.repeat(np.arange(CHIPS[chip].cores), np.diff(work.cores))


def test_a_core_never_splits_a_tile() -> None:
    _, tiles, _ = laid_out(groups_of_branches(1, 16, 64 * 512, [64], 64), "v5p")
    assert tiles[:, :2].tolist() == [[0, 16]]


def test_the_longest_tiles_come_first_and_each_core_has_as_much_to_do() -> None:
    lengths = [64 * 40, 64 * 600, 64 * 200, 64 * 210, 64 * 190, 64 * 33]
    forest = Forest(page_size=64, stride=1237)
    reads = [Read((), forest.segment(length), 1, length - 1) for length in lengths]
    _, tiles, core = laid_out(reads, "v5p")
    pages = tiles[:, 3] + tiles[:, 5]
    for each in (0, 1):
        assert (np.diff(pages[core == each]) <= 0).all()
    assert pages[core == 0].tolist() == [600, 33]
    assert pages[core == 1].tolist() == [210, 200, 190, 40]


def test_a_core_is_charged_by_how_many_rows_a_tile_has_and_not_by_which() -> None:
    forest = Forest(page_size=64, stride=1237)
    reads = [Read((), forest.segment(length), 1, length - 1) for length in (64 * 2000, *[64 * 30] * 60)]
    _, tiles, core = laid_out(reads, "v5p")
    assert tiles[core == 0, 3].tolist() == [2000, 30, 30, 30, 30]


def test_rows_that_share_go_into_wide_tiles_where_that_is_faster() -> None:
    """Adding a token to 512 lanes takes v5e less than reading it four times, and v6e as long."""
    for chip, rows in (("v5e", [64]), ("v6e", [16, 16, 16, 16])):
        _, tiles, _ = laid_out(groups_of_branches(1, 64, 64 * 2000, [1], 64), chip)
        assert tiles[:, 1].tolist() == rows, chip


def test_references_leave_room_for_the_chunk_behind_them() -> None:
    capacity, _, _ = laid_out(groups_of_branches(1, 4, 64, [64], 64), "v5e")
    assert capacity.chunks == -(-capacity.tiles.page_refs // CHUNK) + 1
    assert capacity.empty().refs.shape == (capacity.chunks, 2, CHUNK)


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_page_that_is_not_in_the_pool_is_refused_before_it_is_copied() -> None:
    backend = Tpu()
    capacity = backend.capacity(4, Sizes(num_pages=8, page_size=16, heads=2, kv_heads=2))
    with pytest.raises(ValueError, match="not among the pool's 8"):
        backend.lay_out(Reads.of([Read((), PageRun((8,), 16), 1, 15)]), capacity)


@pytest.mark.parametrize("page_size", [8, 24, 256])
def test_pages_that_do_not_fill_vectors_are_refused(page_size: int) -> None:
    with pytest.raises(ValueError, match=f"16, 32, 64 or 128, not {page_size}"):
        Tpu().capacity(4, Sizes(num_pages=8, page_size=page_size, heads=2, kv_heads=2))


def attended(chip: str, rows: int, heads: int, kv_heads: int, head_dim: int = 128, dtype=jnp.bfloat16):
    """The shapes that attention gives, without a device."""
    backend, sizes = Tpu(CHIPS[chip]), Sizes(num_pages=64, page_size=64, heads=heads, kv_heads=kv_heads)
    work = backend.capacity(rows, sizes).empty()
    (array,) = backend.pages(sizes, head_dim, dtype)
    q, pages = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((rows, heads, head_dim), array.shape))
    return jax.eval_shape(partial(backend.attend, scale=1.0), q, (pages,), work)


def test_more_than_a_core_remembers_is_refused_with_the_numbers() -> None:
    out, lse = attended("v5p", rows=512, heads=16, kv_heads=2)
    assert (out.shape, lse.shape) == ((512, 16, 128), (512, 16))
    numbers = r"pages [\d.]+, queries and results [\d.]+, running softmax [\d.]+, scores [\d.]+ MiB, of 62.00"
    with pytest.raises(ValueError, match=f"more vector memory than a core of v5p has: {numbers}"):
        attended("v5p", rows=512, heads=128, kv_heads=8)
    with pytest.raises(ValueError, match=r"more scalar memory than a core of v5e has: tiles 1\.1"):
        attended("v5e", rows=50_000, heads=1, kv_heads=1)


def test_head_sizes_and_types_that_the_kernels_do_not_take_are_refused() -> None:
    assert Tpu().supports(32, jnp.float32)
    assert Tpu().supports(128, jnp.bfloat16)
    assert not Tpu().supports(256, jnp.bfloat16)
    assert not Tpu().supports(64, jnp.float64)
    assert not Tpu().supports(64, jnp.float16)
    with pytest.raises(ValueError, match="not 64, float16"):
        attended("v5e", 8, 2, 1, 64, jnp.float16)


def test_blocks_are_as_long_as_fast_memory_allows() -> None:
    for chip, kv_heads, tokens in (("v5e", 1, 2048), ("v5e", 8, 2048), ("v4", 1, 2048), ("v4", 8, 256)):
        tiling = Tpu(CHIPS[chip]).tiling(8 * kv_heads, kv_heads, 64)
        assert tiling.block_pages * 64 == tokens, (chip, kv_heads)


# --- which one is taken ------------------------------------------------------------------------------------


def test_the_chip_at_hand_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = "TPU v6 lite"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "devices", lambda: [type("Device", (), {"device_kind": kind})])
    assert default_backend(128, jnp.bfloat16) == Tpu(CHIPS["v6e"])
    assert default_backend(256, jnp.bfloat16) == Xla()
    kind = "TPU v2"
    assert default_backend(128, jnp.bfloat16) == Xla()


def test_what_a_chip_takes_for_a_token() -> None:
    """Reading it, or adding it to the softmax; wider tiles in parts."""
    v5e, v5p = CHIPS["v5e"], CHIPS["v5p"]
    assert chip_of("TPU v5 lite") == v5e
    kinds = {"TPU v4": "v4", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "v7x"}
    assert {kind: chip.name for kind in kinds if (chip := chip_of(kind))} == kinds
    assert chip_of("TPU v9") is None
    assert [v5e.update_cycles(lanes) for lanes in (1, 8, 9, 64, 128)] == [855, 855, 1058, 1058, 1718]
    assert v5e.update_cycles(129) == v5e.update_cycles(256) == 2 * 1718
    assert v5e.token_seconds(128, 512) == pytest.approx(512 / 819e9)
    assert v5e.token_seconds(512, 512) == pytest.approx(4 * 1718 / 2048 / 1.5e9)
    assert v5p.token_seconds(8, 512) == pytest.approx(2 * 512 / 2765e9), "two cores share what is read"
