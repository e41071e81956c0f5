"""The GPU kernels, interpreted on CPU: the same code, tile by tile. And that they still lower for CUDA."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from random import Random
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import Array

from attention import HeadNorms, PageRun, Places, Read, Reads, Sizes, gpu_tiles
from attention.gpu import Gpu
from attention.tiles import TileCapacity
from tests.attention.dense import make_case
from tests.attention.forest import Forest, forests, groups_of_branches, mixed_reads
from tests.attention.stores import note_stores
from tests.sizes import sampled

pytestmark = pytest.mark.usefixtures("quick_compiler")

BACKEND = Gpu(interpret=True)
case = partial(make_case, backend=BACKEND)


# Groups, width, prefix, tails, GQA, page size, head size. `bench.checks.kernels` runs all of them on a GPU.
MATRIX = list(
    product(
        [1, 2, 3],
        [1, 2, 5, 16],
        [0, 1, 15, 16, 17, 511],
        [[0], [1], [16], [37], [300, 1, 64, 17, 255]],
        [1, 2, 5, 8],
        [16, 64],
        [64, 128],
    )
)


@pytest.mark.parametrize("seed", sampled(range(10), range(2)))
def test_groups_of_branches_agree_with_brute_force(seed: int) -> None:
    groups, width, prefix, tails, gqa, page_size, head_dim = Random(seed).choice(MATRIX)
    if not prefix and tails == [0]:
        tails = [1]
    reads = groups_of_branches(groups, width, prefix, tails, page_size)
    dtype = jnp.bfloat16 if seed % 2 else np.float32
    out, lse = case(
        reads, page_size=page_size, kv_heads=2, group=gqa, head_dim=head_dim, dtype=dtype, seed=seed
    ).errors(BACKEND)
    assert out < (3e-3 if seed % 2 else 2e-6)
    assert lse < 5e-6


@pytest.mark.parametrize(
    ("kv_heads", "group", "page_size", "head_dim", "dtype"),
    [
        (3, 1, 16, 64, np.float32),
        (1, 5, 64, 16, np.float32),
        (1, 8, 16, 128, jnp.bfloat16),
        pytest.param(2, 2, 128, 32, jnp.bfloat16, marks=pytest.mark.full),
    ],
)
def test_trees_and_prompt_chunks_agree_with_brute_force(
    kv_heads: int, group: int, page_size: int, head_dim: int, dtype: type
) -> None:
    reads = mixed_reads(page_size)
    out, lse = case(
        reads, page_size=page_size, kv_heads=kv_heads, group=group, head_dim=head_dim, dtype=dtype
    ).errors(BACKEND)
    assert out < (2e-6 if dtype is np.float32 else 3e-3)
    assert lse < 5e-6


@given(forests(page_sizes=(4,)))
@settings(max_examples=20)
def test_random_trees_agree_with_brute_force(forest: Forest) -> None:
    tiling = replace(BACKEND.tiling(heads=4, kv_heads=2, page_size=4), workers=16)
    capacity = TileCapacity.for_bucket(256, forest.num_pages, tiling, pages_per_read=64)
    made = case(forest.reads, page_size=4, capacity=capacity, num_pages=forest.num_pages)
    assert max(made.errors(BACKEND)) < 5e-6


@pytest.mark.parametrize("magnitude", [0.0, 60.0])
def test_equal_and_extreme_scores_are_safe(magnitude: float) -> None:
    """60: the scores are normal with that deviation, so nearly all weight is on one position."""
    out, lse = case(mixed_reads(16), page_size=16, magnitude=magnitude).errors(BACKEND)
    assert out < 2e-5
    assert lse < 1e-4


def fused_exp2(factor: float, x: Array, shift: Array, *, fast: bool) -> Array:
    """What a GPU computes: the product of the multiply-add is not rounded."""
    del fast
    product = x.astype(jnp.float64) * jnp.float64(np.float32(factor))
    return jnp.exp2((product + shift).astype(jnp.float32))


@pytest.mark.full
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("head_dim", sampled([16, 32, 64, 128], [16]))
def test_the_fused_exponential_is_safe_where_a_row_has_seen_nothing(
    head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_tiles, "exponential", fused_exp2)
    jax.clear_caches()
    reads = groups_of_branches(1, 5, 16, [200], 16)
    tiling = replace(BACKEND.tiling(heads=16, kv_heads=2, page_size=16), workers=16)
    capacity = TileCapacity.for_bucket(8, 256, tiling)
    made = case(
        reads, page_size=16, group=8, head_dim=head_dim, dtype=np.float32, capacity=capacity, num_pages=256
    )
    out, lse = made.errors(BACKEND)
    assert out < 2e-6
    assert lse < 5e-6


@pytest.mark.parametrize("workers", sampled([2, 64, 4096], [4096]))
def test_splits_change_nothing(workers: int) -> None:
    reads = groups_of_branches(1, 5, 511, [300, 1, 64, 17, 255], 16)
    tiling = replace(BACKEND.tiling(heads=4, kv_heads=2, page_size=16), workers=workers)
    capacity = TileCapacity.for_bucket(8, 256, tiling)
    made = case(reads, page_size=16, capacity=capacity, num_pages=256)
    assert (int(made.work.num_tiles) > 10) == (workers > 32)
    out, lse = made.errors(BACKEND)
    assert out < 2e-6
    assert lse < 5e-6


def test_partial_results_are_merged_by_what_each_weighs() -> None:
    """More of them than the merge reads at once, of which the heaviest may come in any place."""
    tiling = replace(BACKEND.tiling(heads=8, kv_heads=1, page_size=64), workers=24)
    rows = 17
    capacity = TileCapacity.for_bucket(rows, 64, tiling)
    reads = groups_of_branches(1, 1, 0, [24 * 64], 64)
    made = case(
        reads, page_size=64, kv_heads=1, group=8, capacity=capacity, num_pages=64, magnitude=6.0, seed=2
    )
    _, at_once = gpu_tiles.merged_at_once(rows)
    assert made.work.row_parts[0, 1] > at_once
    out, lse = made.errors(BACKEND)
    assert out < 5e-6
    assert lse < 5e-6


def test_a_gpu_is_told_to_store_nothing_beyond_its_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of fewer rows than they have room for, split and not; heads that do not fill a program."""
    inside = note_stores(monkeypatch)
    tiling = replace(BACKEND.tiling(heads=5, kv_heads=1, page_size=16), workers=4)
    capacity = TileCapacity.for_bucket(3, 64, tiling)
    reads = [*groups_of_branches(1, 2, 16, [100], 16), Read((), PageRun([40], 5), 1, 4)]
    made = case(reads, page_size=16, kv_heads=1, group=5, capacity=capacity, num_pages=64)
    assert {-1} < set(made.work.row_parts[:, 1].tolist()), "some rows are merged, and some are not"
    q, k_pages, v_pages = map(jnp.asarray, (made.q, made.k_pages, made.v_pages))
    gpu_tiles.attend(q, (k_pages, v_pages), made.work, tiling, scale=1.0, interpret=True)
    jax.effects_barrier()
    assert inside
    assert all(inside)


def test_all_workers_of_the_device_are_launched_and_planned_for() -> None:
    """Twice as many programs as run at a time, unless there are fewer (tile, KV head) pairs; where there are
    few rows, the merge has one for each head."""
    heads, kv_heads, page_size = 64, 8, 64
    assert Gpu().tiling(heads, kv_heads, page_size).head_workers == 33
    for rows, programs, merging in ((1, 8 * (1 + 33), 64), (512, 2 * 264, 16)):
        sizes = Sizes(num_pages=64, page_size=page_size, heads=heads, kv_heads=kv_heads)
        work = Gpu().capacity(rows, sizes).empty()
        q = jax.ShapeDtypeStruct((rows, heads, 64), jnp.bfloat16)
        pool = jax.ShapeDtypeStruct((64, kv_heads, page_size, 64), jnp.bfloat16)
        jaxpr = jax.make_jaxpr(partial(Gpu().attend, scale=1.0))(q, (pool, pool), work)
        launches = [e.params["grid_mapping"].grid for e in jaxpr.eqns if e.primitive.name == "pallas_call"]
        assert launches == [(programs,), (rows, merging)]


def test_a_row_alone_computes_the_same_bits_whatever_the_other_rows_are() -> None:
    """Decode rows beside siblings, requests and prompt chunks; and parts of each as steps of their own."""
    page_size, heads, kv_heads, head_dim, num_pages = 64, 4, 2, 16, 64
    context = (PageRun((5, 9, 30), 150), PageRun((7,), 64))
    reads = [
        Read(context, PageRun((11, 3), 70), rows=1, ordinal=69),
        Read(context, PageRun((12,), 9), rows=1, ordinal=8),
        Read(context[:1], PageRun((20, 21, 22), 140), rows=20, ordinal=120),
        Read((), PageRun((40, 41), 128), rows=1, ordinal=127),
        Read((), PageRun((50, 51, 52), 131), rows=30, ordinal=101),
    ]
    alone = Gpu(alone=True, interpret=True)
    capacity = TileCapacity.for_bucket(64, num_pages, alone.tiling(heads, kv_heads, page_size))
    keys = jax.random.split(jax.random.key(3), 3)
    k, v = (jax.random.normal(key, (num_pages, kv_heads, page_size, head_dim)) for key in keys[:2])
    queries = jax.random.normal(keys[2], (len(reads), 64, heads, head_dim))
    attend = jax.jit(partial(alone.attend, scale=0.25))

    def rows_of(parts: list[tuple[int, int, int]]) -> dict[tuple[int, int], np.ndarray]:
        """What the rows first..end of each read compute, in one step: by (read, row)."""
        step = [
            reads[n]._replace(
                own=reads[n].own._replace(
                    pages=reads[n].own.pages[: -(-(reads[n].ordinal + end) // page_size)],
                    length=reads[n].ordinal + end,
                ),
                rows=end - first,
                ordinal=reads[n].ordinal + first,
            )
            for n, first, end in parts
        ]
        order, tiles = alone.lay_out(Reads.of(step), capacity)
        names = [(parts[i][0], row) for i in order for row in range(*parts[i][1:])]
        q = (
            jnp.zeros((64, heads, head_dim))
            .at[: len(names)]
            .set(jnp.stack([queries[name] for name in names]))
        )
        out, lse = attend(q, (k, v), tiles)
        both = np.concatenate([out, lse[..., None]], axis=-1)
        return dict(zip(names, both, strict=False))

    together = rows_of([(n, 0, read.rows) for n, read in enumerate(reads)])
    assert len(together) == 53
    for n, read in enumerate(reads):
        for first, end in {(0, read.rows), (read.rows // 2, read.rows), (read.rows - 1, read.rows)}:
            for name, bits in rows_of([(n, first, end)]).items():
                np.testing.assert_array_equal(bits, together[name])


def test_no_work_gives_zeros() -> None:
    assert case([], page_size=16).errors(BACKEND) == (0, 0)


def test_what_the_kernels_cannot_do_is_refused() -> None:
    capacity = BACKEND.capacity(4, Sizes(num_pages=8, page_size=16, heads=2, kv_heads=2))
    q, pages = jnp.zeros((4, 2, 48)), jnp.zeros((8, 2, 16, 48))
    with pytest.raises(ValueError, match="not 48, float32"):
        BACKEND.attend(q, (pages, pages), capacity.empty(), scale=1.0)
    assert not BACKEND.supports(48, jnp.bfloat16)
    assert not BACKEND.supports(64, np.float64)
    q, pages = jnp.zeros((4, 2, 32)), jnp.zeros((8, 2, 24, 32))
    with pytest.raises(ValueError, match="power of two, not 24"):
        BACKEND.attend(q, (pages, pages), capacity.empty(), scale=1.0)
    with pytest.raises(ValueError, match="power of two, not 1"):
        BACKEND.attend(q, (pages[:, :, :1],) * 2, capacity.empty(), scale=1.0)


def test_what_the_kernels_just_can_do_is_not_refused() -> None:
    assert BACKEND.supports(16, np.float32)
    assert not BACKEND.supports(8, np.float32)
    sizes = Sizes(num_pages=2**31 // (2 * 16 * 32), page_size=16, heads=2, kv_heads=2)
    work = BACKEND.capacity(4, replace(sizes, num_pages=8)).empty()
    q, attend = jax.ShapeDtypeStruct((4, 2, 32), jnp.bfloat16), partial(BACKEND.attend, scale=1.0)
    for more, refused in ((0, False), (1, True)):
        pages = jax.ShapeDtypeStruct((sizes.num_pages + more, 2, 16, 32), jnp.bfloat16)
        with pytest.raises(ValueError, match="reach") if refused else nullcontext():
            jax.eval_shape(attend, q, (pages, pages), work)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("page_size", [16, 64])
def test_the_kernels_lower_for_cuda_without_a_gpu(page_size: int, dtype: type) -> None:
    """No PTX is made here; this notices a JAX whose Pallas no longer takes what the kernels are made of."""
    rows, heads, kv_heads, head_dim, num_pages = 16, 40, 8, 128, 64
    tall = dtype is jnp.bfloat16 and page_size == 64
    gpu = Gpu(tall_step=rows if tall else 0)
    sizes = Sizes(num_pages=num_pages, page_size=page_size, heads=heads, kv_heads=kv_heads)
    tiles = gpu.capacity(rows, sizes).empty()
    pool = jax.ShapeDtypeStruct((num_pages, kv_heads, page_size, head_dim), dtype)
    new = jax.ShapeDtypeStruct((rows, heads + 2 * kv_heads, head_dim), dtype)
    scale = jax.ShapeDtypeStruct((head_dim,), dtype)
    angle = jax.ShapeDtypeStruct((rows, head_dim // 2), jnp.float32)
    index = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def layer(k_pages, v_pages, qkv, scale, angle, places, tiles):
        norms, angles = HeadNorms(scale, scale, 1e-6), (angle, angle)
        q, pools = gpu.write(qkv, norms, angles, (k_pages, v_pages), places)
        return gpu.attend(q, pools, tiles, scale=0.1), pools

    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    calls = "__gpu$xla.gpu.triton", "mosaic_gpu_v2"
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(call) for call in calls]
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        # Triton is announced to leave Pallas some day: docs/gpu-attention.md.
        warnings.simplefilter("ignore", DeprecationWarning)
        exported = jax.export.export(jax.jit(layer), platforms=["cuda"], disabled_checks=unchecked)(
            pool, pool, new, scale, angle, Places(index, index), tiles
        )
    text = exported.mlir_module()
    assert [text.count(f"@{call}(") for call in calls] == [3, tall]


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype", "devices", "tall"),
    [
        ("9.0", 128, jnp.bfloat16, 1, True),
        ("9.0", 128, jnp.bfloat16, 2, False),
        ("8.0", 128, jnp.bfloat16, 1, False),
        ("9.0", 64, jnp.bfloat16, 1, False),
        ("9.0", 128, jnp.float32, 1, False),
    ],
)
def test_a_hopper_gpu_has_tall_tiles_for_steps_of_many_rows(
    capability: str, head_dim: int, dtype: type, devices: int, tall: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    gpu = Gpu().fitted(head_dim, dtype, devices)
    assert [gpu.tiling(64, 8, 64, rows).tall_rows for rows in (256, 384)] == [0, 16 * tall]
    assert not gpu.tiling(64, 8, 8, 384).tall_rows, "pages that no block of keys is made of"
    assert gpu.deterministic() == Gpu(alone=True).fitted(head_dim, dtype, devices) == Gpu(alone=True)
