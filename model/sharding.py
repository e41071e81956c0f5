"""ShardingRules: which physical mesh axis each logical axis of an array is laid out over.

Every parameter names its logical axes where it is defined (model/layers.py); these rules, and nothing in
the model, decide what is sharded. The default replicates everything, which is right for one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

LOGICAL_AXES = ("vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "pages", "page")

MeshAxis = str | tuple[str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingRules:
    """The mesh axis (or axes, or None for replicated) of each logical axis."""

    vocab: MeshAxis = None
    embed: MeshAxis = None
    heads: MeshAxis = None
    kv_heads: MeshAxis = None
    head_dim: MeshAxis = None
    mlp: MeshAxis = None
    pages: MeshAxis = None
    page: MeshAxis = None

    @classmethod
    def tensor_parallel(cls, axis: str) -> ShardingRules:
        """Megatron's split: heads, MLP and vocabulary over `axis`, the residual stream replicated."""
        return cls(vocab=axis, heads=axis, kv_heads=axis, mlp=axis)

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes; one that is None is never divided.

        Raises ValueError for an unknown axis.
        """
        unknown = [axis for axis in axes if axis not in (None, *LOGICAL_AXES)]
        if unknown:
            raise ValueError(f"unknown logical axes {unknown}; known: {', '.join(LOGICAL_AXES)}")
        return PartitionSpec(*(axis and getattr(self, axis) for axis in axes))


@dataclass(frozen=True, slots=True)
class Placement:
    """Where arrays live: laid out over a mesh by the rules, or, without a mesh, whole on one device."""

    mesh: Mesh | None = None
    rules: ShardingRules = ShardingRules()
    device: Any = None

    def sharding(self, axes: Sequence[str | None]) -> Sharding:
        """The sharding of an array with these logical axes. Raises ValueError for an unknown axis."""
        spec = self.rules.spec(axes)
        if self.mesh is None:
            return SingleDeviceSharding(self.device or jax.devices()[0])
        return NamedSharding(self.mesh, spec)


ON_ONE_DEVICE = Placement()
