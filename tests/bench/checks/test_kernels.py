from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attention.wrapped import Wrapped
from attention.xla import Xla
from bench.checks.forests import SMALL, Forest, Grid, Matrix, Tree
from bench.checks.kernels import all_cases, main
from tests.attention.forest import pages_of

pytestmark = pytest.mark.usefixtures("quick_compiler")


def test_a_sample_of_the_small_matrix_passes(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    assert (
        main(["--backend", "xla", "--scale", "small", "--sample", "2", "--seed", "1", "--json", str(out)])
        == 0
    )
    result = json.loads(out.read_text())
    assert (result["cases"], result["bad"]) == (2, 0)
    assert result["error"] < 3e-3


class SlightlyWrong(Wrapped):
    __slots__ = ()

    def attend(self, q: Any, pages: Any, work: Any, *, scale: float) -> tuple[Any, Any]:
        return self.inner.attend(q, pages, work, scale=1.01 * scale)


def test_a_wrong_backend_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--scale", "small", "--sample", "1", "--seed", "1"], SlightlyWrong(Xla())) == 1
    assert "1 beyond the limits" in capsys.readouterr().out


def test_the_matrix_is_the_whole_product() -> None:
    matrix = Matrix(mixed=3)
    cases = list(all_cases(matrix, 0))
    assert len(cases) == 16 * (4 * 6 * 7 * 5 + 3)
    assert len(set(cases)) == len(cases)


@pytest.mark.parametrize("seed", range(8))
def test_a_forest_gives_each_row_its_prefix_and_its_tail(seed: int) -> None:
    grid = Grid.of(SMALL, 16, narrow=False)
    forest = Forest.of(grid, 3, 5, 37, 40, seed)
    assert len(forest.reads) == 15
    for read, row in zip(forest.reads, forest.rows, strict=True):
        length = forest.tail_length[row]
        assert [segment.length for segment in (*read.context, read.own)] == [37, length]
        assert list(pages_of(read)[:3]) == list(forest.prefix_ids[row // grid.width, :3])
        assert read.ordinal == length - 1
        assert grid.pool_pages - 1 not in pages_of(read)


def test_rows_without_anything_to_read_have_no_read() -> None:
    forest = Forest.of(Grid.of(SMALL, 16, narrow=True), 3, 2, 0, 0, 3)
    assert forest.reads == []


@pytest.mark.parametrize("seed", range(5))
def test_a_tree_counts_what_its_reads_see(seed: int) -> None:
    tree = Tree.of(16, seed)
    rows = sum(read.rows for read in tree.reads)
    assert any(read.rows > 1 for read in tree.reads) or seed
    sums = tree.counts.sum(1)
    seen = [
        sum(segment.length for segment in read.context) + read.ordinal + index + 1
        for read in tree.reads
        for index in range(read.rows)
    ]
    np.testing.assert_array_equal(sums[:rows], seen)
    assert (sums[rows:] == 0).all()
