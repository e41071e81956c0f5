from __future__ import annotations

import numpy as np
import pytest

from bench.device.shapes import PageTables, Shape, random_shapes, shrunk, suite_shapes
from tests.attention.forest import pages_of


@pytest.fixture
def shape() -> Shape:
    return Shape("shared", 2, 3, 64, 20, 16, 8, 2, ragged=7)


def test_the_bytes_are_those_of_the_published_table() -> None:
    published = [25, 51, 136, 814, 814, 679, 688, 172]  # MB; 64 query and 8 KV heads
    shapes = [shape for shape in suite_shapes("shared", [64]) if shape.q_heads == 64]
    assert [round(shape.unique_bytes / 1e6) for shape in shapes] == published


def test_every_page_is_given_out_once(shape: Shape) -> None:
    tables = PageTables.of(shape, seed=1)
    pages = np.concatenate([tables.prefix.ravel(), *tables.tails])
    assert sorted(pages) == list(range(shape.pages))


def test_a_read_sees_its_prefix_and_its_tail(shape: Shape) -> None:
    tables = PageTables.of(shape, seed=1)
    for read, tail in zip(tables.reads(), shape.tails, strict=True):
        assert [segment.length for segment in read.context] == [shape.prefix] * (shape.prefix > 0)
        assert (read.own.length, read.ordinal) == (tail, tail - 1)
    assert max(len(pages_of(read)) for read in tables.reads()) == shape.longest


def test_a_prompt_chunk_is_one_read_of_many_rows() -> None:
    shape = suite_shapes("prefill", [64])[0]
    (read,) = PageTables.of(shape, seed=1).reads()
    assert (read.rows, read.ordinal, read.own.length, read.context[0].length) == (512, 0, 512, 8192)
    assert shape.flops == 4 * 64 * 128 * sum(8192 + row + 1 for row in range(512))


def test_random_shapes_follow_the_seed_and_fit_the_bench() -> None:
    shapes = random_shapes(50, 5, (16, 64))
    assert shapes == random_shapes(50, 5, (16, 64))
    assert shapes != random_shapes(50, 6, (16, 64))
    assert max(shape.rows for shape in shapes) <= 512
    assert max(shape.kv_tokens for shape in shapes) <= 2**18


def test_an_unknown_suite_is_named() -> None:
    with pytest.raises(ValueError, match="no suite 'sort'"):
        suite_shapes("sort", [16])


def test_shrunk_shapes_are_small() -> None:
    shapes = [shrunk(shape) for shape in random_shapes(20, 1, (16, 64))]
    assert max(shape.kv_tokens for shape in shapes) < 400
