from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from attention.layout import ItemCapacity
from attention.reference import Reference
from tests.attention.dense import make_case
from tests.attention.forest import Forest, forests, mixed_reads


@pytest.mark.parametrize(("group", "page_size", "head_dim"), [(1, 4, 16), (2, 16, 64)])
def test_it_agrees_with_brute_force(group: int, page_size: int, head_dim: int) -> None:
    case = make_case(mixed_reads(page_size), page_size=page_size, group=group, head_dim=head_dim)
    out, lse = case.errors(Reference())
    assert out < 2e-6
    assert lse < 5e-6


@given(forests(page_sizes=(4,)))
@settings(max_examples=25)
def test_it_agrees_with_brute_force_on_random_trees(forest: Forest) -> None:
    capacity = ItemCapacity(rows=256, items=256, page_refs=512, page_size=4)
    case = make_case(forest.reads, page_size=4, capacity=capacity, num_pages=forest.num_pages)
    assert max(case.errors(Reference())) < 5e-6


@pytest.mark.usefixtures("x64")
def test_float64_stays_float64() -> None:
    assert max(make_case(mixed_reads(16), page_size=16, dtype=np.float64).errors(Reference())) < 1e-12


def test_nothing_to_read_gives_zeros() -> None:
    case = make_case([], page_size=4)
    assert case.errors(Reference()) == (0, 0)
