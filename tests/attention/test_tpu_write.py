"""The TPU's KV write, interpreted on CPU: copies end as late as they may, and races are looked for."""

from __future__ import annotations

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from attention import HeadNorms, Places, heads, tpu_pages, tpu_write
from tests.sizes import sampled

pytestmark = pytest.mark.usefixtures("quick_compiler")

PARAMS = pltpu.InterpretParams(
    detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan", out_of_bounds_reads="raise"
)
PAGES, PAGE_SIZE, ROWS, WAVE = 24, 32, 20, 8
NOWHERE = 2**30


class Layer:
    """Random heads on their way into pages of noise, some slots of which hold NaN.

    The kernel and its oracle are compiled once, for any places.
    """

    def __init__(
        self,
        *,
        rows: int = ROWS,
        query_heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 64,
        page_size: int = PAGE_SIZE,
        dtype: Any = jnp.bfloat16,
        page_dtype: Any = None,
        normed: bool = True,
        interpret: Any = PARAMS,
    ) -> None:
        random = np.random.default_rng(head_dim + query_heads)

        def normal(*shape: int) -> np.ndarray:
            return 3 * random.standard_normal(shape, np.float32)

        self.head_dim, self.slots = head_dim, 32 // jnp.dtype(page_dtype or dtype).itemsize
        self.qkv = jnp.asarray(normal(rows, query_heads + 2 * kv_heads, head_dim), dtype)
        scales = (jnp.asarray(normal(head_dim), dtype) for _ in range(2))
        self.norms = HeadNorms(*scales, 1e-6) if normed else None
        turns = 9 * normal(rows, head_dim // 2)
        self.angles = jnp.cos(turns), jnp.sin(turns)
        pool = normal(2, PAGES, kv_heads, page_size, head_dim)
        pool[:, :, :, 1::3] = np.nan
        self.pool = tuple(jnp.asarray(part, page_dtype or dtype) for part in pool)
        self.array = jnp.asarray(self.laid_out(*self.pool))

        def kernel(qkv, array, places):
            return tpu_write.write(qkv, self.norms, self.angles, (array,), places, interpret=interpret)

        def oracle(qkv, pool, places):
            return heads.write(qkv, self.norms, self.angles, pool, places)

        places = Places(*[jax.ShapeDtypeStruct((rows,), jnp.int32)] * 2)
        self.kernel = jax.jit(kernel).lower(self.qkv, self.array, places).compile()
        self.oracle = jax.jit(oracle).lower(self.qkv, self.pool, places).compile()

    def laid_out(self, k_pages: jax.Array, v_pages: jax.Array) -> np.ndarray:
        """Pages of keys and of values as a TPU has them."""
        pages, kv_heads, page_size, head_dim = k_pages.shape
        shape = (pages, kv_heads, tpu_pages.planes(head_dim), page_size, tpu_pages.LANES)
        array = np.zeros(shape, k_pages.dtype)
        first = tpu_pages.value_lane(head_dim)
        array[:, :, 0, :, :head_dim] = k_pages
        array[:, :, -1, :, first : first + head_dim] = v_pages
        return array

    def is_key(self) -> np.ndarray:
        """Where keys are, of the elements of a slot of `array`: [planes, 1, 128]."""
        lanes = np.arange(tpu_pages.LANES) < self.head_dim
        return np.stack([lanes, 0 * lanes])[: self.array.shape[2], None, :].astype(bool)

    def check(self, page: Any, offset: Any, *, exactly: bool = True) -> None:
        """Against the oracle: every bit, or those of values and of untouched slots."""
        places = Places(jnp.asarray(page, jnp.int32), jnp.asarray(offset, jnp.int32))
        q, (array,) = self.kernel(self.qkv, self.array, places)
        jax.block_until_ready((q, array))
        assert not interpreter.races.races_found
        known = (places.page >= 0) & (places.offset >= 0)  # an index below zero counts from the end there
        places = places._replace(page=jnp.where(known, places.page, NOWHERE))
        expected_q, pool = self.oracle(self.qkv, self.pool, places)
        expected = self.laid_out(*pool)
        if exactly:
            np.testing.assert_array_equal(bits(q), bits(expected_q))
            np.testing.assert_array_equal(bits(array), bits(expected))
            return
        close = {"rtol": 2e-6, "atol": 2e-5}
        np.testing.assert_allclose(q, expected_q, **close)
        np.testing.assert_allclose(array, expected, **close)
        touched = bits(expected) != bits(self.array)
        rest = ~(touched & self.is_key())
        np.testing.assert_array_equal(bits(array)[rest], bits(expected)[rest])


def bits(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def some_places(seed: int, rows: int, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Different slots, some of which share groups; one row in five goes nowhere."""
    random = np.random.default_rng(seed)
    slot = random.permutation(PAGES // 4 * page_size)[:rows]
    page = np.where(random.random(rows) < 0.2, random.choice([-1, PAGES, NOWHERE], rows), slot // page_size)
    return page, slot % page_size


@pytest.fixture(scope="module")
def layer() -> Layer:
    """20 rows in waves of 8; a page has two groups of 16 slots."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu_write, "WAVE_ROWS", WAVE)
        patch.setattr(tpu_write, "LEAST_ROWS", WAVE)
        return Layer()


RUN = 14 + np.arange(ROWS)
EVERY_ROW = np.arange(ROWS)
PLACES = {
    "each row in a page of its own": (EVERY_ROW + 3, 7 * EVERY_ROW % PAGE_SIZE),
    "a run across the border of a group and that of a page": (np.where(RUN < 32, 5, 2), RUN % 32),
    "two groups of a page by turns": (np.full(ROWS, 4), EVERY_ROW // 2 + 16 * (EVERY_ROW % 2)),
    "two pages by turns": (6 + EVERY_ROW % 2, EVERY_ROW // 2),
    "a run with gaps": (np.where(EVERY_ROW % 3, 9, NOWHERE), EVERY_ROW),
    "pages that are not in the pool": (np.array(5 * [-1, PAGES, 8, -(2**31)]), EVERY_ROW),
    "offsets that no page has": (
        np.full(ROWS, 8),
        np.array(5 * [-1, PAGE_SIZE, 3, NOWHERE]) + EVERY_ROW // 4,
    ),
    "nobody writes": (np.full(ROWS, NOWHERE), EVERY_ROW),
    "at random": some_places(1, ROWS, PAGE_SIZE),
}


def copies() -> int:
    """How many copies the program started that was interpreted last."""
    return interpreter.dma_id_counter.get_next() - 100


@pytest.mark.parametrize("name", PLACES)
def test_a_wave_reads_and_writes_each_group_of_slots_once(layer: Layer, name: str) -> None:
    page, offset = PLACES[name]
    layer.check(page, offset)
    exists = (page >= 0) & (page < PAGES) & (offset >= 0) & (offset < PAGE_SIZE)
    groups = {(row // WAVE, page[row], offset[row] // layer.slots) for row in np.flatnonzero(exists)}
    assert copies() == 2 * len(groups)


@pytest.mark.parametrize("seed", sampled(range(2, 20), [2]))
def test_any_places(layer: Layer, seed: int) -> None:
    layer.check(*some_places(seed, ROWS, PAGE_SIZE))


def test_of_rows_that_name_one_slot_the_last_stays(layer: Layer) -> None:
    """As in the oracle, which puts them in one after the other on a CPU."""
    layer.check(np.full(ROWS, 3), np.full(ROWS, 5))


@pytest.mark.parametrize("normed", sampled([True, False], [True]))
def test_float32_is_as_close_as_sums_in_another_order(normed: bool) -> None:
    """Without norms there are no sums, and every bit is the same."""
    layer = Layer(
        rows=5, query_heads=5, kv_heads=1, head_dim=128, page_size=16, dtype=jnp.float32, normed=normed
    )
    layer.check(*some_places(0, 5, 16), exactly=not normed)
    layer.check([6, 2, 2, 6, 6], [0, 15, 14, 7, 8], exactly=not normed)


HEADS = [(1, 1), (8, 4), (5, 1), (16, 8)]
SHAPES = [(size, *heads, page) for size, heads, page in product([32, 64, 96, 128], HEADS, [16, 64])]


@pytest.mark.full
@pytest.mark.parametrize(("head_dim", "query_heads", "kv_heads", "page_size"), SHAPES)
def test_any_shape(head_dim: int, query_heads: int, kv_heads: int, page_size: int) -> None:
    layer = Layer(rows=9, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size)
    layer.check(*some_places(0, 9, page_size))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "page_dtype"),
    sampled(
        product([32, 128], ["float32", "bfloat16"], ["float32", "bfloat16"]), [(32, "float32", "bfloat16")]
    ),
)
def test_pages_keep_their_dtype(head_dim: int, dtype: str, page_dtype: str) -> None:
    """And lanes that a head does not fill hold zeros, even if one of its elements is infinite."""
    layer = Layer(rows=4, head_dim=head_dim, dtype=dtype, page_dtype=page_dtype, normed=False)
    layer.qkv = layer.qkv.at[2, 4:, 21].set(jnp.inf)
    # Two compilers of one sum may round a float32 differently.
    layer.check([3, -1, 3, 4], [0, 1, 9, 31], exactly=dtype == "bfloat16")


def test_true_interprets_with_the_defaults() -> None:
    Layer(rows=1, query_heads=1, kv_heads=1, interpret=True).check([4], [17])


def launched(rows: int, query_heads: int, kv_heads: int, page_size: int = 64) -> dict[str, Any]:
    """Parameters of the kernel that a TPU would be given, with head size 128."""
    kind = jax.ShapeDtypeStruct
    qkv = kind((rows, query_heads + 2 * kv_heads, 128), jnp.bfloat16)
    angles = kind((rows, 64), jnp.float32)
    pages = kind((PAGES, kv_heads, 2, page_size, 128), jnp.bfloat16)
    places = Places(*[kind((rows,), jnp.int32)] * 2)
    program = jax.make_jaxpr(
        lambda qkv, angles, pages, places: tpu_write.write(
            qkv, None, angles, (pages,), places, interpret=False
        )
    )(qkv, (angles, angles), pages, places)
    (params,) = (eqn.params for eqn in program.eqns if eqn.primitive.name == "pallas_call")
    return params


def test_pages_are_not_copied() -> None:
    """The last argument is the last result."""
    params = launched(64, 8, 1)
    aliased = [params["out_avals"][out].shape for _, out in params["input_output_aliases"]]
    assert aliased == [(PAGES, 1, 2, 64, 128)]


def test_a_long_prompt_of_many_heads_takes_little_memory() -> None:
    params = launched(512, 40, 8)
    assert params["compiler_params"].vmem_limit_bytes <= 8 << 20
    assert params["grid_mapping"].grid == (16,)


def test_pages_of_less_than_a_group_are_refused() -> None:
    with pytest.raises(ValueError, match="pages of 8 bfloat16 slots: not a multiple of 16"):
        launched(1, 1, 1, page_size=8)
