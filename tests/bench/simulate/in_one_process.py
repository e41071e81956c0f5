"""Simulations one after the other, in the process of the test."""

from __future__ import annotations

from typing import Any


class InOneProcess:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __enter__(self) -> InOneProcess:
        return self

    def __exit__(self, *_: Any) -> None: ...

    map = staticmethod(map)
