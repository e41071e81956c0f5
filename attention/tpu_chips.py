"""What the TPU kernels and their planner need to know of each kind of chip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

MIB = 2**20
UPDATE = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """Of one device, as JAX counts them.

    kinds    what JAX calls it (`device_kind`)
    cores    TensorCores of one device: they share its memory, and nothing else
    hbm      bytes a second, published (cloud.google.com/tpu/docs, the page of each kind)
    clock    Hz, from the published peak and the size of the matrix units
    vmem     bytes of a core's vector memory
    smem     bytes of its scalar memory
    updates  (lanes, cycles): of adding UPDATE tokens of one KV head to the running softmax of so many lanes
             (query rows times heads), by the compiler's static schedule
    """

    name: str
    kinds: tuple[str, ...]
    cores: int
    hbm: float
    clock: float
    vmem: int
    smem: int = MIB
    updates: tuple[tuple[int, int], ...]

    def update_cycles(self, lanes: int) -> int:
        """Of UPDATE tokens of one KV head."""
        return update_cycles(dict(self.updates), lanes)

    def token_seconds(self, lanes: int, token_bytes: int) -> float:
        """What a core takes for a token of one KV head while all are busy: to read it, or to add it."""
        return max(
            token_bytes * self.cores / self.hbm,
            self.update_cycles(lanes) / UPDATE / self.clock,
        )


def update_cycles(variants: Mapping[int, int], lanes: int) -> int:
    """Cycles by the smallest variant with room for so many lanes, or by the largest as often as it takes."""
    widest = max(variants)
    if lanes > widest:
        return -(-lanes // widest) * variants[widest]
    return variants[min(size for size in variants if size >= lanes)]


# By libtpu 0.0.42.1. Those of v4 are taken from v5e, whose matrix units are alike, and those of v7x from v6e.
_V5 = ((8, 855), (64, 1058), (128, 1718))
_V6 = ((8, 1051), (64, 1133), (128, 1353))

CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        chip.name: chip
        for chip in (
            Chip(
                name="v4",
                kinds=("TPU v4",),
                cores=2,
                hbm=1.228e12,
                clock=1.05e9,
                vmem=16 * MIB,
                updates=_V5,
            ),
            Chip(
                name="v5e",
                kinds=("TPU v5 lite", "TPU v5e"),
                cores=1,
                hbm=0.819e12,
                clock=1.5e9,
                vmem=128 * MIB,
                updates=_V5,
            ),
            Chip(
                name="v5p",
                kinds=("TPU v5", "TPU v5p"),
                cores=2,
                hbm=2.765e12,
                clock=1.75e9,
                vmem=64 * MIB,
                updates=_V5,
            ),
            Chip(
                name="v6e",
                kinds=("TPU v6 lite", "TPU v6e"),
                cores=1,
                hbm=1.638e12,
                clock=1.75e9,
                vmem=128 * MIB,
                updates=_V6,
            ),
            Chip(
                name="v7x",
                kinds=("TPU7x",),
                cores=1,  # a chip is two devices
                hbm=3.69e12,
                clock=2.2e9,
                vmem=64 * MIB,
                updates=_V6,
            ),
        )
    }
)


def chip_of(kind: str) -> Chip | None:
    """The chip that JAX calls so; None if the kernels do not know it."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
