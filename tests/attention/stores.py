"""What kernels store where: an interpreted kernel drops a store beyond its array, a device writes there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import triton


def note_stores(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each store that a kernel makes from now on, whether all that it writes lies inside its array."""
    inside: list[bool] = []
    store = triton.store

    def noting(ref: Any, value: jax.Array, *, mask: jax.Array, **options: Any) -> None:
        places = jnp.broadcast_arrays(*ref.transforms[-1].indices, mask)[:-1]
        beyond = [(at < 0) | (at >= size) for at, size in zip(places, ref.ref.shape, strict=True)]
        written = jnp.broadcast_to(mask, beyond[0].shape)
        wrong = jnp.any(jnp.stack(beyond) & written)
        jax.debug.callback(lambda wrong: inside.append(not wrong), wrong)
        store(ref, value, mask=mask, **options)

    monkeypatch.setattr(triton, "store", noting)
    return inside
