"""The shapes in the annotations of the array rooms are checked while their tests run."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.shapes import import_checked

import_checked("attention", "model")


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield np.dtype(request.param)
