"""What `--version` says: asked of the packages that are installed, without importing any."""

from __future__ import annotations

import platform
from importlib.metadata import version


def versions() -> str:
    return f"taper {version('taper')} (jax {version('jax')}, Python {platform.python_version()})"
