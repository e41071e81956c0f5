"""What all tests share: shape checks in the array rooms, float64, and the golden checkpoints."""

from __future__ import annotations

import importlib
import pkgutil
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import beartype  # noqa: F401 (see _import_checked)
import flax.nnx  # noqa: F401
import gguf  # noqa: F401
import jax
import jinja2.sandbox  # noqa: F401
import orbax.checkpoint  # noqa: F401
import pytest
import safetensors.numpy  # noqa: F401
import tokenizers  # noqa: F401
import tyro.extras  # noqa: F401
from jaxtyping import install_import_hook


def _import_checked(*packages: str) -> None:
    """Imports packages so that every call checks the shapes in its annotations.

    jaxtyping is not needed to run, so the packages import it for type checkers only; here we are one. Third
    parties must be loaded before, because theirs are not meant to be imported so.
    """
    typing.TYPE_CHECKING = True
    try:
        with install_import_hook(packages, "beartype.beartype"):
            for package in packages:
                for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
                    importlib.import_module(module.name)
    finally:
        typing.TYPE_CHECKING = False


_import_checked("attention", "model")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-goldens",
        action="store_true",
        help="oracle tests write what transformers computes to tests/model/goldens",
    )
    parser.addoption(
        "--questions", type=int, default=16, help="how many held-out questions the default model is asked"
    )


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 means float64 inside the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def golden_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a checkpoint of tests/model/checkpoints.py, once, and gives its folder."""
    from tests.model.checkpoints import CHECKPOINTS

    root = tmp_path_factory.mktemp("goldens")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else CHECKPOINTS[name].write(path)

    return folder
