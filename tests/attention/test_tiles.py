"""What a tiling may be, and the fields that a list of tiles packs."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from attention.gpu import H200
from attention.tiles import pack_sees, refilled, unpack_sees
from tests.attention.tile_lists import tiling


def test_packed_fields_come_back() -> None:
    fields = np.array([[1, 0, 1, -256], [128, 127, 128, 255], [64, 3, 8, -1], [5, 0, 128, 0]])
    words = pack_sees(*fields.T)
    assert words.dtype == np.int32
    np.testing.assert_array_equal(np.stack(unpack_sees(words), 1), fields)
    np.testing.assert_array_equal(np.stack(unpack_sees(jnp.asarray(words)), 1), fields)


def test_a_page_can_be_refilled() -> None:
    words = pack_sees(
        *(np.array(field) for field in ([3, 16, 128], [0, 127, 5], [1, 128, 9], [-256, 255, 7]))
    )
    for convert in (np.asarray, jnp.asarray):
        valid, first, end, causal = unpack_sees(
            refilled(convert(words), convert(np.array([16, 0, 1], np.int32)))
        )
        assert valid.tolist() == [16, 1, 1]
        assert first.tolist() == [0, 127, 5]
        assert end.tolist() == [1, 0, 9]
        assert causal.tolist() == [-256, 255, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 256}, "page_size"),
        ({"wide_rows": 256}, "wide_rows <= 128"),
        ({"narrow_rows": 16}, "narrow_rows <= wide_rows"),
        ({"narrow_rows": 0}, "1 <= narrow_rows"),
        ({"page_size": 0}, "page_size"),
        ({"workers": 0}, "workers"),
        ({"kv_heads": 0}, "kv_heads"),
        ({"block_pages": 0}, "block_pages"),
        ({"alone": True, "block_pages": 2}, "blocks of one page"),
        ({"tall_rows": 8, "tall_workers": 1}, "wide_rows < tall_rows"),
        ({"tall_rows": 129, "tall_workers": 1}, "tall_rows <= 128"),
        ({"tall_rows": 16}, "tall_workers >= 1"),
    ],
)
def test_a_tiling_must_be_possible(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(tiling(), **change)


def test_a_tiling_may_be_as_small_and_as_large_as_it_says() -> None:
    smallest = replace(tiling(), page_size=1, narrow_rows=1, wide_rows=1, kv_heads=1, workers=1)
    assert smallest.head_workers == 1
    assert replace(smallest, kv_heads=2).head_workers == 1, "a tile is computed by somebody"
    largest = replace(tiling(), page_size=128, narrow_rows=128, wide_rows=128, alone=True)
    assert largest.partial_row_seconds == H200.partial
    assert replace(largest, narrow_rows=2).partial_row_seconds == 8 * H200.partial


@pytest.mark.parametrize("group", [1, 2, 8, 16])
def test_a_tile_is_priced_as_wide_from_its_first_row_over_a_narrow_ones(group: int) -> None:
    cut = tiling(group)
    rows = np.array([1, cut.narrow_rows, cut.narrow_rows + 1, cut.wide_rows])
    token = cut.block_seconds(rows) / (cut.block_pages * cut.page_size)
    narrow, wide = H200.narrow_token, H200.wide_token
    np.testing.assert_allclose(token, [narrow, narrow, wide, wide])
