"""Shape checks in the array rooms, for the folders whose tests are about arrays: see their conftest.py."""

from __future__ import annotations

import importlib
import pkgutil
import typing

import beartype  # noqa: F401 (see import_checked)
import flax.nnx  # noqa: F401
import gguf  # noqa: F401
import jinja2.sandbox  # noqa: F401
import orbax.checkpoint  # noqa: F401
import safetensors.numpy  # noqa: F401
import tokenizers  # noqa: F401
import tyro.extras  # noqa: F401
from jaxtyping import install_import_hook


def import_checked(*packages: str) -> None:
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
