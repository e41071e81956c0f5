"""A name becomes a backend in one place."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from attention import BACKENDS, backend_named, default_backend


def test_every_backend_is_found_by_the_name_that_users_type() -> None:
    gpus = ["gpu", "gpu-alone", "gpu-interpreted"]
    tpus = ["tpu-v4", "tpu-v5e", "tpu-v5p", "tpu-v6e", "tpu-v7x", "tpu-v5e-interpreted"]
    assert list(BACKENDS) == ["reference", "xla", *gpus, *tpus]
    assert [backend_named(name).name for name in BACKENDS] == list(BACKENDS)


def test_an_unknown_backend_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'cuda'.*reference, xla"):
        backend_named("cuda")


@pytest.mark.parametrize(
    ("device", "dtype", "name"),
    [("cpu", jnp.bfloat16, "xla"), ("gpu", jnp.bfloat16, "gpu"), ("gpu", jnp.float64, "xla")],
)
def test_the_default_goes_by_the_device_and_by_what_its_kernels_take(
    device: str, dtype: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jax.default_backend", lambda: device)
    assert default_backend(128, dtype) == backend_named(name)
