"""Where a model's arrays lie: whole on one device, or divided over a mesh of them (tensor parallelism).

Every array names its logical axes where it is defined, and `ShardingRules` alone say over which axes of the
mesh each of them is divided. A program is written once, for what one device holds: `Placement.program` runs
it on every device of the mesh at once (`jax.shard_map`), and what the devices must tell each other goes
through their `Peers`. On one device there is no mesh, and peers have nothing to do.

The split is Megatron's (arXiv 1909.08053): heads, MLP and vocabulary are divided, the residual stream is
whole on every device. Where a model has fewer KV heads than there are devices, several of them keep the same
KV head: the mesh is `kv` x `copy`, and KV heads are divided over `kv` alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from model.config import ModelConfig
from model.peer_memory import PeerMemory, peer_sum, reaching

if TYPE_CHECKING:
    from jax import Array

LOGICAL_AXES = ("vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "pages", "page")
# The axes of a mesh. Devices that differ in `copy` alone keep the same KV heads.
KV, COPY = "kv", "copy"

_MOST_CPU_DEVICES = 64
_OWN_ALL_REDUCE = "xla_gpu_unsupported_use_all_reduce_one_shot_kernel"

MeshAxis = str | tuple[str, ...] | None


class PlacementError(ValueError):
    """A model cannot be divided over as many devices."""


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

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes; one that is None is never divided.

        Raises ValueError for an unknown axis.
        """
        unknown = [axis for axis in axes if axis not in (None, *LOGICAL_AXES)]
        if unknown:
            raise ValueError(f"unknown logical axes {unknown}; known: {', '.join(LOGICAL_AXES)}")
        return PartitionSpec(*(axis and getattr(self, axis) for axis in axes))


@dataclass(frozen=True, slots=True)
class Peers:
    """The devices that compute something together, each a part of it, as a program on one of them sees them.

    axes   of the mesh: none where a device computes all of it by itself
    count  how many they are
    """

    axes: tuple[str, ...] = ()
    count: int = 1

    @property
    def index(self) -> Array | int:
        """Which of the parts is this device's."""
        return lax.axis_index(self.axes) if self.axes else 0

    def sum(self, x: Array) -> Array:
        """The sum of all devices' x: an all-reduce."""
        return lax.psum(x, self.axes) if self.axes else x

    def quick_sum(self, x: Array) -> Array:
        """`sum`, where it is one of many: two GPUs that can use each other's memory (model.peer_memory).

        A program that has one begins with a collective, as a step does where the vocabulary is divided. With
        that the runtime sees to it that all devices have loaded a program before one of them runs it: a GPU
        that waits for its peer in a kernel could keep it from loading.
        """
        total = peer_sum(x) if self.axes else x
        return lax.psum(x, self.axes) if total is None else total

    def max(self, x: Array) -> Array:
        """The greatest of all devices' x: an all-reduce."""
        return lax.pmax(x, self.axes) if self.axes else x

    def gather(self, x: Array) -> Array:
        """All devices' x, in the order of their parts, on a new first axis: an all-gather."""
        return lax.all_gather(x, self.axes) if self.axes else x[None]


ALONE = Peers()
EVERYWHERE = PartitionSpec()  # how a result is divided of which every device has all


class Reaching(jax.stages.Compiled):
    """A compiled program that takes, before its arguments, the addresses of its devices' workspaces.

    It keeps these: nothing else may come to lie where it writes.
    """

    __slots__ = ("memory", "program")

    def __init__(self, program: jax.stages.Compiled, memory: PeerMemory) -> None:
        self.program = program
        self.memory = memory

    def __call__(self, *arguments: Any) -> Any:
        return self.program(self.memory.addresses, *arguments)

    def as_text(self) -> str | None:
        return self.program.as_text()

    def memory_analysis(self) -> Any:
        return self.program.memory_analysis()


def _told(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, told by an argument before its own where the devices reach each other's memory.

    In the program itself, addresses would make it another one in every process, and none would be found in
    the compilation cache.
    """

    def told(addresses: Array, *arguments: Any) -> Any:
        with reaching(addresses):
            return function(*arguments)

    return told


def own_ids(ids: Array, size: int, peers: Peers) -> Array:
    """Indices into a device's own part, of `size`, of a divided axis; `size`, out of range, for its peers'.

    One device has all there is: its ids, out of range or not, stay as they are.
    """
    if peers == ALONE:
        return ids
    own = ids - peers.index * size
    return jnp.where((own >= 0) & (own < size), own, size)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where arrays live: divided over a mesh by the rules, or, without a mesh, whole on one device."""

    mesh: Mesh | None = None
    rules: ShardingRules = ShardingRules()
    device: Any = None
    memory: PeerMemory | None = None  # that its devices, two GPUs, reach of each other

    @classmethod
    def over(
        cls,
        config: ModelConfig,
        count: int,
        devices: Sequence[Any] | None = None,
        *,
        peer_memory: bool = False,
    ) -> Placement:
        """A model over the first `count` of `devices` (all that JAX has, unless given).

        A vocabulary that `count` does not divide is whole on every device. With `peer_memory`, two GPUs add
        up a layer's parts through each other's memory, if they can reach it. Raises PlacementError, saying
        what would do, if there are not as many devices or `count` does not divide the model.
        """
        devices = jax.devices() if devices is None else devices
        if not 1 <= count <= len(devices):
            there = f"{len(devices)} of kind {devices[0].device_kind}"
            more = ": JAX_NUM_CPU_DEVICES in the environment makes more of a CPU"
            hint = more if devices[0].platform == "cpu" else ""
            raise PlacementError(f"cannot divide a model over {count} devices: JAX finds {there}{hint}")
        if not _divides(config, count):
            able = [str(n) for n in range(1, config.num_heads + 1) if _divides(config, n)]
            raise PlacementError(
                f"cannot divide {config.name} over {count} devices: they must share its {config.num_heads} "
                f"heads, {config.num_kv_heads} KV heads and MLP of {config.intermediate_size} evenly, as "
                f"{', '.join(able)} would"
            )
        if count == 1:
            return cls(device=devices[0])
        shards = min(config.num_kv_heads, count)
        mesh = Mesh(np.array(devices[:count]).reshape(shards, count // shards), (KV, COPY))
        everywhere = (KV, COPY)
        vocab = everywhere if config.vocab_size % count == 0 else None
        return cls(
            mesh,
            ShardingRules(
                vocab=vocab,
                heads=everywhere,
                kv_heads=KV,
                mlp=everywhere,
            ),
            memory=PeerMemory.between(mesh) if peer_memory and vocab else None,
        )

    @property
    def count(self) -> int:
        """Number of devices."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def devices(self) -> list[Any]:
        return [self.device or jax.devices()[0]] if self.mesh is None else [*self.mesh.devices.flat]

    @property
    def peers(self) -> Peers:
        """Those that share the heads and the MLP of each layer."""
        return self._peers("heads")

    @property
    def vocab_peers(self) -> Peers:
        """Those that share the vocabulary."""
        return self._peers("vocab")

    def sharding(self, axes: Sequence[str | None]) -> Sharding:
        """The sharding of an array with these logical axes. Raises ValueError for an unknown axis."""
        spec = self.rules.spec(axes)
        if self.mesh is None:
            return SingleDeviceSharding(self.device or jax.devices()[0])
        return NamedSharding(self.mesh, spec)

    def parts(self, axis: str | None) -> int:
        """Into how many parts a logical axis is divided."""
        return 1 if axis is None else self._peers(axis).count

    def _peers(self, axis: str) -> Peers:
        over: MeshAxis = getattr(self.rules, axis)
        if self.mesh is None or over is None:
            return ALONE
        axes = (over,) if isinstance(over, str) else over
        return Peers(axes, math.prod(self.mesh.shape[axis] for axis in axes))

    def abstract(self, shape: Sequence[int], dtype: Any, axes: Sequence[str | None]) -> jax.ShapeDtypeStruct:
        """The shape, type and sharding of an array, to compile programs from before it exists."""
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=self.sharding(axes))

    def program(self, function: Callable[..., Any], arguments: Any, results: Any) -> Callable[..., Any]:
        """`function` of one device's parts of its arguments, as a function of whole arrays.

        Arrays, or their shapes, in the trees `arguments` and `results` say by their shardings how each is
        divided; what has no sharding, or is EVERYWHERE, is whole on every device. `results` may be a prefix
        of the real tree.
        """
        if self.mesh is None:
            return function
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=jax.tree.map(_spec, arguments),
            out_specs=jax.tree.map(_spec, results),
            check_vma=False,
        )

    def compile(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        results: Any,
        *,
        donate: Sequence[int],
        gpu_options: Mapping[str, Any] = MappingProxyType({}),
    ) -> jax.stages.Compiled:
        """`program` compiled ahead of time; the arguments at the places `donate` are updated in place.

        XLA gets `gpu_options` where the devices are GPUs.
        """
        memory = self.memory
        if memory is not None:
            function, arguments = _told(function), (memory.addresses, *arguments)
            donate = [1 + place for place in donate]
        program = jax.jit(self.program(function, arguments, results), donate_argnums=donate)
        with self._as_its_kind():
            lowered = program.lower(*arguments)
        on_gpu = self.devices[0].platform == "gpu"
        compiled = lowered.compile(compiler_options=dict(gpu_options) if on_gpu else None)
        return compiled if memory is None else Reaching(compiled, memory)

    def _as_its_kind(self) -> AbstractContextManager[Any]:
        """Kernels ask what they are lowered for: of a device that is not here they are told.

        A mesh says by itself of which kind its devices are.
        """
        device = self.device
        if device is None or device.platform == jax.default_backend():
            return nullcontext()
        kind = AbstractDevice(device.device_kind, device.num_cores, device.platform)
        return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind))


ON_ONE_DEVICE = Placement()


def ask_for_devices(count: int) -> None:
    """Prepares JAX for a mesh of `count` devices; has no effect once JAX has found its devices.

    A CPU counts as so many, to try a mesh out, unless JAX_NUM_CPU_DEVICES in the environment, or XLA's flag
    for it, says otherwise. On GPUs NCCL adds up what they have: XLA's own all-reduce is no faster, and takes
    memory beyond JAX's for each one in a program, together gigabytes.
    """
    if count <= 1:
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if "JAX_NUM_CPU_DEVICES" not in os.environ and "host_platform_device_count" not in flags:
        with suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", min(count, _MOST_CPU_DEVICES))
    if _OWN_ALL_REDUCE not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{_OWN_ALL_REDUCE}=false".strip()


def bytes_each(tree: Any) -> int:
    """Bytes that one device holds of arrays, or of their shapes."""
    return sum(_bytes_each(leaf) for leaf in jax.tree.leaves(tree))


def _bytes_each(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _spec(leaf: Any) -> PartitionSpec:
    if isinstance(leaf, PartitionSpec):
        return leaf
    sharding = getattr(leaf, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def _divides(config: ModelConfig, count: int) -> bool:
    heads, kv_heads = config.num_heads, config.num_kv_heads
    shared = kv_heads % count == 0 or count % kv_heads == 0
    return heads % count == 0 and shared and config.intermediate_size % count == 0
