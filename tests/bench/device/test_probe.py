from __future__ import annotations

import pytest

from bench.device.probe import Shape, probe, shapes
from tests.scheduler.symbolic import unique_kv_tokens

BUCKETS = (1, 8, 16, 64)


@pytest.mark.parametrize(
    "shape", [Shape(8, 8, 1, 8, 0), Shape(16, 12, 4, 60, 0), Shape(64, 30, 4, 90, 32, 7)]
)
def test_a_made_up_steps_load_is_its_entries(shape: Shape) -> None:
    step, load = probe(shape, page_size=4)
    assert (step.rows, step.bucket) == (shape.rows + shape.chunk, shape.bucket)
    assert sum(entry.rows for entry in step.entries) == step.rows
    assert load.kv_tokens == unique_kv_tokens(step.entries, page_size=4)
    assert len({entry.own.pages for entry in step.entries}) == len(step.entries)
    assert load.items == len({read for e in step.entries for read in (*e.context, e.own)})
    raw = sum(sum(read.length for read in entry.context) + entry.own.length for entry in step.entries)
    assert load.raw_kv == raw
    seen = [e.ordinal + row + 1 for e in step.entries for row in range(1, e.rows)]
    assert load.chunk_context == sum(seen)


def test_shapes_cover_buckets_fills_widths_levels_and_chunks() -> None:
    made = [*shapes(BUCKETS, num_pages=400, page_size=16)]
    assert {shape.bucket for shape in made} == {*BUCKETS}
    totals = {shape.rows + shape.chunk for shape in made}
    assert totals == {1, 2, 8, 9, 16, 17, 64}
    assert {shape.width for shape in made} == {1, 4, 16}
    assert {shape.chunk for shape in made} == {0, 32}
    assert len({shape.pages for shape in made}) > 4
