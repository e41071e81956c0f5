"""The sum of what two GPUs have, each of which writes its part into the other's memory: no barrier.

A collective of NCCL's takes about 20 us whatever it carries, and a step of a divided model waits for two in
every layer. Here a GPU writes its part straight into a workspace of its peer, over NVLink, and adds what the
peer has written into its own. Every 32-bit word (two bfloat16) travels together with a number, in one 64-bit
store: whoever finds the number of this sum there has the word, too, and no other signal is needed (the LL
protocol of NCCL). A workspace has two places for every word, which sums take in turn. Two are enough: a GPU
that has a word of sum n+1 knows that its peer has begun with n+1, so has read all of n, and n+2 may take the
places of n.

The number of the next sum is kept beside each item (what one thread carries), not handed from call to call.
So both GPUs must add up the same shapes in the same order, which two that run one program do anyway, as for
any collective. A peer that does not come within about half a minute stops the GPU with an error (a trap).
Where a sum has more blocks than a GPU runs at once, it must begin them in order: all do, and CUDA does not
promise it.

The kernel is PTX in a Pallas kernel for Triton; `tests/model/test_peer_memory.py` runs it without a GPU.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.sharding import Mesh, NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import BFloat16, Int

WORDS = 2  # of 32 bits, two bfloat16 each, that one thread carries: its item
WARPS = 8
BLOCK = 32 * WARPS * 2 * WORDS  # values of one block of threads
OLDEST = 8.0  # compute capability: older ones do not add bfloat16
# Above this a collective is about as fast: its start-up time is small beside what the bytes take.
MOST_VALUES = 512 * 5120
# A workspace, in bytes: two places for each word and its number, then the number of each item's last sum.
PLACES = MOST_VALUES * 4
BYTES = 2 * PLACES + MOST_VALUES // (2 * WORDS) * 4
MOST_POLLS = 1 << 26

_REACH: ContextVar[Array | None] = ContextVar("reach", default=None)

# $0 $1 are the sums of an item, $2 $3 its own words, $4 the place of its first value in the array; $8 to $20
# (every fourth: Triton passes one for each of four values) the workspaces' addresses, low half and high half.
ASM = f"""{{
.reg .b32 number, turn, polls, one, d0, d1, n0, n1;
.reg .b64 theirs, own, count, offset, w0, w1;
.reg .pred wait, gone;
mov.b64 theirs, {{$8, $12}};
mov.b64 own, {{$16, $20}};
cvt.u64.u32 offset, $4;
add.s64 count, own, offset;
ld.relaxed.gpu.global.b32 number, [count+{2 * PLACES}];
add.u32 number, number, 1;
and.b32 turn, number, 1;
mul.lo.u32 turn, turn, {PLACES};
mad.lo.u32 turn, $4, 4, turn;
cvt.u64.u32 offset, turn;
add.s64 theirs, theirs, offset;
add.s64 own, own, offset;
mov.b64 w0, {{$2, number}};
mov.b64 w1, {{$3, number}};
st.relaxed.sys.global.v2.b64 [theirs], {{w0, w1}};
mov.u32 polls, 0;
look:
ld.relaxed.sys.global.v2.b64 {{w0, w1}}, [own];
mov.b64 {{d0, n0}}, w0;
mov.b64 {{d1, n1}}, w1;
setp.ne.u32 wait, n0, number;
setp.ne.or.u32 wait, n1, number, wait;
add.u32 polls, polls, 1;
setp.gt.and.u32 gone, polls, {MOST_POLLS}, wait;
@gone trap;
@wait bra look;
mov.b32 one, 0x3f803f80;
fma.rn.bf16x2 $0, $2, one, d0;
fma.rn.bf16x2 $1, $3, one, d1;
st.relaxed.gpu.global.b32 [count+{2 * PLACES}], number;
}}"""
CONSTRAINTS = ",".join(["=r"] * WORDS + ["r"] * WORDS + ["r"] * 5 * 2 * WORDS)


@dataclass(frozen=True, slots=True, eq=False)
class PeerMemory:
    """A workspace of each of two GPUs, and where they are.

    workspaces  int32 [2, BYTES / 4], one row on each
    addresses   int32 [2, 4], one row on each: of its peer's workspace and of its own, low half and high half

    Its representation names neither: what is kept under a placement's is found by the next process, too.
    """

    workspaces: Array = field(repr=False)
    addresses: Array = field(repr=False)

    @classmethod
    def between(cls, mesh: Mesh) -> PeerMemory | None:
        """Workspaces on the two devices of a mesh; None unless they are GPUs that reach each other's."""
        if not reach_each_other([*mesh.devices.flat]):
            return None
        each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        workspaces = jax.jit(partial(jnp.zeros, (2, BYTES // 4), jnp.int32), out_shardings=each)()
        jax.block_until_ready(workspaces)
        parts = {part.device: part.data.unsafe_buffer_pointer() for part in workspaces.addressable_shards}
        own = [parts[device] for device in mesh.devices.flat]
        halves = [
            [half for at in (peer, mine) for half in (at & 0xFFFFFFFF, at >> 32)]
            for mine, peer in zip(own, reversed(own), strict=True)
        ]
        addresses = np.array(halves, np.uint32).view(np.int32)
        return cls(workspaces, jax.device_put(addresses, each))


@contextmanager
def reaching(addresses: Array | None) -> Iterator[None]:
    """While a program is traced: `peer_sum` may use this row of `PeerMemory.addresses`, int32 [1, 4]."""
    token = _REACH.set(addresses)
    try:
        yield
    finally:
        _REACH.reset(token)


def reached() -> Array | None:
    """What `peer_sum` may use here.

    A jitted function inside a program takes it as an argument and says it with `reaching`: JAX keeps what it
    has traced of such a function for other programs, which have other addresses or none.
    """
    return _REACH.get()


def peer_sum(x: Array) -> Array | None:
    """This GPU's x plus its peer's; None where only a collective does: other values, no memory to reach."""
    addresses = reached()
    if addresses is None or x.dtype != jnp.bfloat16 or x.size % BLOCK or not 0 < x.size <= MOST_VALUES:
        return None
    return exchanged(x, addresses)


def exchanged(x: BFloat16[Array, "*shape"], addresses: Int[Array, "1 4"]) -> BFloat16[Array, "*shape"]:
    total = pl.pallas_call(
        _kernel,
        grid=(x.size // BLOCK,),
        in_specs=[pl.no_block_spec, pl.no_block_spec],
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct((x.size,), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        name="peer_sum",
    )(x.reshape(x.size), addresses)
    return total.reshape(x.shape)


def _kernel(x_ref: Any, addresses_ref: Any, out_ref: Any) -> None:
    first = pl.program_id(0) * BLOCK
    places = first + jnp.arange(BLOCK, dtype=jnp.int32)
    halves = [jnp.broadcast_to(addresses_ref[0, i], places.shape) for i in range(4)]
    x = plt.load(x_ref.at[pl.ds(first, BLOCK)])
    (total,) = plt.elementwise_inline_asm(
        ASM,
        args=[x, places, *halves],
        constraints=CONSTRAINTS,
        pack=2 * WORDS,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    plt.store(out_ref.at[pl.ds(first, BLOCK)], total)


def reach_each_other(devices: list[Any]) -> bool:
    """Whether these are two NVIDIA GPUs of this process that may read and write each other's memory, and can
    run the kernel. Whoever keeps NCCL from that (`NCCL_P2P_DISABLE`) keeps this from it, too."""
    if (
        os.environ.get("NCCL_P2P_DISABLE", "0") != "0"
        or len(devices) != 2
        or any(device.platform != "gpu" or "NVIDIA" not in device.device_kind for device in devices)
    ):
        return False
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        ordinals = [int(device.local_hardware_id) for device in devices]
        able = all(float(device.compute_capability) >= OLDEST for device in devices)
        return able and all(_can_reach(cuda, a, b) for a, b in (ordinals, reversed(ordinals)))
    except (OSError, AttributeError, TypeError, ValueError):
        return False


def _can_reach(cuda: ctypes.CDLL, ordinal: int, peer: int) -> bool:
    handles = [ctypes.c_int(), ctypes.c_int()]
    able = ctypes.c_int()
    found = [
        cuda.cuDeviceGet(ctypes.byref(each), at) for each, at in zip(handles, (ordinal, peer), strict=True)
    ]
    asked = cuda.cuDeviceCanAccessPeer(ctypes.byref(able), *handles)
    return not any(found) and asked == 0 and able.value == 1
