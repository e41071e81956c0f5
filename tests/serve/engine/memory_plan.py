"""A plan of a device's memory, as it might be measured."""

from __future__ import annotations

from serve.engine.memory import MemoryPlan

GIB = 2**30
PLAN = MemoryPlan(limit=128 * GIB, weights=61 * GIB, slots=GIB, step=GIB, page=16 * 2**20)
