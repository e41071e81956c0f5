"""Before attention: each head's norm, its rotary position, and the KV write, in every backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Backend, HeadNorms, Places
from attention.gpu import Gpu
from attention.xla import Xla
from tests.attention.stores import note_stores

ROWS, PAGES, PAGE_SIZE, HEAD_DIM = 5, 6, 16, 32
pytestmark = pytest.mark.usefixtures("quick_compiler")

EVERY_BACKEND = pytest.mark.parametrize(
    "backend", [Xla(), Gpu(interpret=True)], ids=lambda backend: backend.name
)
# Page 6 and 2**30 are not in the pool.
PLACES = Places(jnp.array([4, 6, 0, 4, 2**30], jnp.int32), jnp.array([3, 1, 2, 15, 0], jnp.int32))


class Case:
    """Random heads on their way into a pool of ones."""

    def __init__(self, heads: int, kv_heads: int, dtype: type, *, normed: bool) -> None:
        keys = iter(jax.random.split(jax.random.key(heads), 6))

        def normal(*shape: int) -> jax.Array:
            return (3 * jax.random.normal(next(keys), shape)).astype(dtype)

        self.q = normal(ROWS, heads, HEAD_DIM)
        self.k, self.v = (normal(ROWS, kv_heads, HEAD_DIM) for _ in range(2))
        self.qkv = jnp.concatenate([self.q, self.k, self.v], axis=1)
        self.norms = HeadNorms(normal(HEAD_DIM), normal(HEAD_DIM), 1e-6) if normed else None
        turns = 9 * jax.random.normal(next(keys), (ROWS, HEAD_DIM // 2))
        self.angles = jnp.cos(turns), jnp.sin(turns)
        self.pool = jnp.ones((PAGES, kv_heads, PAGE_SIZE, HEAD_DIM), dtype)

    def write(self, backend: Backend) -> tuple[jax.Array, ...]:
        q, pages = backend.write(self.qkv, self.norms, self.angles, (self.pool, self.pool), PLACES)
        return q, *pages

    def expected(self, x: jax.Array, scale: jax.Array | None) -> np.ndarray:
        """In float64: heads of a root mean square of 1, times the scale, turned as complex pairs."""
        y = np.asarray(x, np.float64)
        if scale is not None:
            y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(scale, np.float64)
        pairs = y[..., : HEAD_DIM // 2] + 1j * y[..., HEAD_DIM // 2 :]
        cos, sin = (np.asarray(angle, np.float64)[:, None, :] for angle in self.angles)
        turned = pairs * (cos + 1j * sin)
        return np.concatenate([turned.real, turned.imag], axis=-1)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "normed"), [(2, 2, True), (9, 3, True), (20, 10, False)])
def test_heads_are_normalised_turned_and_written(
    backend: Backend, dtype: type, heads: int, kv_heads: int, normed: bool
) -> None:
    case = Case(heads, kv_heads, dtype, normed=normed)
    q, k_pages, v_pages = case.write(backend)
    q_scale, k_scale = case.norms[:2] if case.norms else (None, None)
    expected_k, expected_v = np.ones(case.pool.shape), np.ones(case.pool.shape)
    for row, (page, offset) in enumerate(zip(*map(np.asarray, PLACES), strict=True)):
        if page < PAGES:
            expected_k[page, :, offset] = case.expected(case.k, k_scale)[row]
            expected_v[page, :, offset] = case.v[row]
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype == jnp.float32 else {"rtol": 2e-2, "atol": 6e-2}
    np.testing.assert_allclose(np.asarray(q, np.float64), case.expected(case.q, q_scale), **tolerance)
    np.testing.assert_allclose(np.asarray(k_pages, np.float64), expected_k, **tolerance)
    np.testing.assert_array_equal(np.asarray(v_pages, np.float64), expected_v)


@EVERY_BACKEND
def test_heads_of_almost_nothing_are_not_blown_up(backend: Backend) -> None:
    """Their mean square is about that which is added to it."""
    case = Case(4, 2, jnp.float32, normed=True)
    case.q, case.k, case.qkv = (3e-4 * x for x in (case.q, case.k, case.qkv))
    q, k_pages, _ = case.write(backend)
    np.testing.assert_allclose(q, case.expected(case.q, case.norms.q_scale), rtol=2e-4, atol=2e-5)
    written = case.expected(case.k, case.norms.k_scale)[0]
    np.testing.assert_allclose(k_pages[4, :, 3], written, rtol=2e-4, atol=2e-5)


@EVERY_BACKEND
def test_what_no_row_writes_stays_as_it_was(backend: Backend) -> None:
    case = Case(4, 2, jnp.float32, normed=True)
    untouched = np.ones((PAGES, PAGE_SIZE), bool)
    untouched[[4, 0, 4], [3, 2, 15]] = False
    for pages in case.write(backend)[1:]:
        np.testing.assert_array_equal((np.asarray(pages) == 1).all(axis=(1, 3)), untouched)


@EVERY_BACKEND
def test_writes_take_the_pool_dtype(backend: Backend) -> None:
    case = Case(2, 2, jnp.float32, normed=False)
    case.pool = case.pool.astype(jnp.bfloat16)
    assert [array.dtype for array in case.write(backend)] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]


def test_a_donated_pool_is_written_in_place() -> None:
    case = Case(2, 2, jnp.float32, normed=True)
    pools = jnp.array(case.pool), jnp.array(case.pool)
    before = {pages.unsafe_buffer_pointer() for pages in pools}
    _, after = jax.jit(Xla().write, donate_argnums=3)(case.qkv, None, case.angles, pools, PLACES)
    assert {pages.unsafe_buffer_pointer() for pages in after} == before


def test_a_gpu_is_told_to_store_nothing_beyond_its_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on a page that is not in the pool, nor of heads that do not fill a program."""
    inside = note_stores(monkeypatch)
    Case(9, 3, jnp.float32, normed=False).write(Gpu(interpret=True))
    jax.effects_barrier()
    assert len(inside) == 2 * (ROWS * 2 + 3 * 2), "queries in two blocks; keys and values of three rows"
    assert all(inside)
