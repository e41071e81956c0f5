"""How a device's memory is divided, and so how many KV pages there are.

    KV = limit - weights - slots - what the largest step needs - reserve,   rounded down to limit / 64

What a step needs is known once it is compiled, and does not depend on the number of pages. The rounding makes
the next start find the same number, and with it the compiled programs in JAX's cache: these have the size of
the pool in their shapes. The result is kept beside that cache, so that only the first start compiles a step
just to learn its size. Devices that share a model hold equal parts of it: the plan is that of each.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHARES = 64  # the pool is a multiple of this part of the device's memory
IN_FLIGHT = 2  # steps whose buffers may exist at once: one runs, one is queued


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes of a device, and the KV pages that fit. `step` is what one step of the largest bucket needs."""

    limit: int
    weights: int
    slots: int
    step: int
    page: int

    @property
    def reserve(self) -> int:
        """Left alone: fragments, and what XLA tries out while it compiles."""
        return self.limit // SHARES

    @property
    def kv(self) -> int:
        """Bytes of the pool before it is cut into pages. Raises ValueError if nothing is left for it."""
        free = self.limit - self.weights - self.slots - IN_FLIGHT * self.step - self.reserve
        share = self.limit // SHARES
        if free < share:
            gib = {name: f"{size / 2**30:.1f} GiB" for name, size in asdict(self).items()}
            raise ValueError(f"no memory is left for KV pages: {gib}")
        return free // share * share

    @property
    def num_pages(self) -> int:
        return self.kv // self.page


def device_limit(devices: Sequence[Any]) -> int | None:
    """Bytes that JAX may take of each of the devices; None where it does not say, as on a CPU."""
    stats = [device.memory_stats() or {} for device in devices]
    return min((each["bytes_limit"] for each in stats if "bytes_limit" in each), default=None)


def remembered(folder: Path | None, key: dict[str, Any], measure: Callable[[], MemoryPlan]) -> MemoryPlan:
    """The plan that an earlier start with the same `key` wrote to `folder`, or else a new one, written there.

    The device's memory limit belongs into the key.
    """
    if folder is None:
        return measure()
    digest = hashlib.blake2s(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
    path = folder / f"memory-{digest}.json"
    try:
        plan = MemoryPlan(**json.loads(path.read_text()))
        if all(type(size) is int for size in asdict(plan).values()):
            return plan
    except (OSError, ValueError, TypeError):
        pass
    plan = measure()
    with contextlib.suppress(OSError):  # it is measured again the next time
        path.write_text(json.dumps(asdict(plan)) + "\n")
    return plan
