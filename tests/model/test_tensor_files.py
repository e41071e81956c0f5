"""Two tensors are compared without either being read as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from model import tensor_files
from model.tensor_files import TensorFiles


def files(folder: Path, **tensors: np.ndarray) -> TensorFiles:
    save_file(tensors, folder / "model.safetensors")
    return TensorFiles(folder)


NUMBERS = np.arange(10, dtype=np.float32).reshape(5, 2)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (NUMBERS, True),
        (NUMBERS.astype(np.float64), True),
        (NUMBERS + np.eye(5, 2, k=-4, dtype=np.float32), False),  # in the last row
        (NUMBERS[:4], False),
        (NUMBERS.astype(np.int32), False),
    ],
)
def test_tensors_of_floats_are_the_same_if_all_their_numbers_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: np.ndarray, same: bool
) -> None:
    monkeypatch.setattr(tensor_files, "_ROWS", 2)
    with files(tmp_path, one=NUMBERS, other=np.ascontiguousarray(other)) as found:
        assert found.same("one", "other") is same


def test_what_has_no_rows_is_not_compared(tmp_path: Path) -> None:
    with files(tmp_path, one=np.array(1.0), other=np.array(1.0)) as found:
        assert not found.same("one", "other")


@pytest.mark.parametrize(("changed", "parts"), [(None, 3), (4, 3), (0, 1)])
def test_rows_are_read_a_few_at_a_time_up_to_the_first_that_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: int | None, parts: int
) -> None:
    read: list[tuple[int, int]] = []

    class Noted:
        def __init__(self, part: Any) -> None:
            self.get_shape, self.get_dtype, self._part = part.get_shape, part.get_dtype, part

        def __getitem__(self, rows: slice) -> np.ndarray:
            read.append((rows.start, rows.stop))
            return self._part[rows]

    part_of = TensorFiles._slice
    monkeypatch.setattr(TensorFiles, "_slice", lambda self, name: Noted(part_of(self, name)))
    monkeypatch.setattr(tensor_files, "_ROWS", 2)
    other = NUMBERS.copy()
    if changed is not None:
        other[changed] += 1
    with files(tmp_path, one=NUMBERS, other=other) as found:
        assert found.same("one", "other") is (changed is None)
    assert read == [rows for rows in [(0, 2), (2, 4), (4, 5)][:parts] for _ in "ab"]
