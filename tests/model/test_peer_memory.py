"""Sums through each other's memory: the PTX, run by two simulated GPUs, and the programs that have it."""

from __future__ import annotations

import ctypes
import gc
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, PartitionSpec

from attention.xla import Xla
from bench.hlo import collectives
from model import peer_memory
from model.kv_cache import KVCache, page_sizes
from model.peer_memory import (
    ASM,
    BLOCK,
    BYTES,
    MOST_POLLS,
    MOST_VALUES,
    PLACES,
    PeerMemory,
    peer_sum,
    reaching,
)
from model.sharding import Peers, Placement
from tests.model.meshes import divisible, over
from tests.model.ptx import Thread, TrapError

WORKSPACES = (7 << 40, 9 << 40)
PATIENCE = 20_000  # polls of a simulated GPU: far more than it ever needs, and soon over


class TwoGpus:
    """Their memory, and items of words that they add up in threads, which take turns as `random` says."""

    def __init__(self, seed: int, text: str = ASM) -> None:
        self.random = Random(seed)
        self.text = text.replace(str(MOST_POLLS), str(PATIENCE))
        self.memory: defaultdict[int, int] = defaultdict(int)

    def thread(self, gpu: int, item: int, words: tuple[int, int]) -> Thread:
        halves = [
            half for at in (WORKSPACES[1 - gpu], WORKSPACES[gpu]) for half in (at & 0xFFFFFFFF, at >> 32)
        ]
        registers = {"$2": words[0], "$3": words[1], "$4": 4 * item}
        return Thread(
            self.text, registers | {f"${8 + 4 * i}": half for i, half in enumerate(halves)}, self.memory
        )

    def gpu(
        self, gpu: int, sums: list[dict[int, tuple[int, int]]]
    ) -> Iterator[list[dict[int, tuple[int, int]]]]:
        """One kernel after the other, the threads of each in any order."""
        done: list[dict[int, tuple[int, int]]] = []
        for items in sums:
            threads = {item: self.thread(gpu, item, words) for item, words in items.items()}
            running = [thread.run() for thread in threads.values()]
            while running:
                thread = self.random.choice(running)
                if next(thread, running) is running:
                    running.remove(thread)
                yield done
            done.append(
                {item: (each.registers["$0"], each.registers["$1"]) for item, each in threads.items()}
            )
        yield done

    def run(self, sums: list[list[dict[int, tuple[int, int]]]], favour: float = 0.5) -> Any:
        """What both have in the end; the first gets on with this likelihood, else the second."""
        gpus = [self.gpu(i, sums[i]) for i in (0, 1)]
        results: list[Any] = [None, None]
        while None in results:
            at = int(self.random.random() > favour)
            if (done := next(gpus[at], None)) is not None and len(done) == len(sums[at]):
                results[at] = done
        return results


def drawn(random: Random, shapes: list[int]) -> list[dict[int, tuple[int, int]]]:
    """Bfloat16 of either sign between 1 and 4, two in a word."""

    def word() -> int:
        return sum((random.randrange(0x3F80, 0x4080) | random.choice((0, 0x8000))) << s for s in (0, 16))

    return [{item: (word(), word()) for item in range(items)} for items in shapes]


def values(words: tuple[int, int]) -> Any:
    return np.array(words, np.uint32).view(jnp.bfloat16)


@pytest.mark.parametrize("seed", range(6))
def test_both_gpus_have_the_sum_however_their_threads_take_turns(seed: int) -> None:
    """Sums of several sizes, one after another, on one GPU more slowly than on the other."""
    random = Random(seed)
    shapes = [random.choice((1, 2, 5)) for _ in range(7)]
    mine, theirs = drawn(random, shapes), drawn(random, shapes)
    first, second = TwoGpus(seed).run([mine, theirs], favour=random.choice((0.02, 0.5, 0.95)))
    assert first == second
    for sums, a, b in zip(first, mine, theirs, strict=True):
        for item, words in sums.items():
            assert (values(words) == values(a[item]) + values(b[item])).all()


def test_with_one_place_for_a_word_a_gpu_would_write_over_what_its_peer_has_yet_to_read() -> None:
    text = ASM.replace("and.b32 turn, number, 1;", "and.b32 turn, number, 0;").replace(str(MOST_POLLS), "500")
    assert text.count("500") == 1

    def right(seed: int) -> bool:
        mine, theirs = drawn(Random(seed), [2, 2, 2]), drawn(Random(-seed - 1), [2, 2, 2])
        try:
            first, second = TwoGpus(seed, text).run([mine, theirs])
        except TrapError:
            return False
        return first == second

    assert not all(right(seed) for seed in range(8))


def test_a_gpu_whose_peer_does_not_come_stops_with_an_error() -> None:
    gpu = TwoGpus(0, ASM.replace(str(MOST_POLLS), "5")).gpu(0, drawn(Random(0), [1]))
    with pytest.raises(TrapError):
        list(gpu)


def test_numbers_begin_again_after_the_last_of_32_bits() -> None:
    """With 129 sums a step and a step in 10 ms, that is after four days."""
    gpus = TwoGpus(0)
    for workspace in WORKSPACES:
        gpus.memory[workspace + 2 * PLACES] = (1 << 32) - 3
    mine, theirs = drawn(Random(1), [1] * 6), drawn(Random(2), [1] * 6)
    first, second = gpus.run([mine, theirs])
    assert first == second
    for sums, a, b in zip(first, mine, theirs, strict=True):
        assert (values(sums[0]) == values(a[0]) + values(b[0])).all()
    assert {gpus.memory[workspace + 2 * PLACES] for workspace in WORKSPACES} == {3}


def test_a_workspace_has_two_places_for_every_word_and_a_number_for_every_item() -> None:
    items = MOST_VALUES // 4
    gpus = TwoGpus(0)
    last = [{items - 1: (1 << 16, 2)}] * 2
    gpus.run([last, last])
    for workspace in WORKSPACES:
        touched = [at - workspace for at in gpus.memory if 0 <= at - workspace < 1 << 32]
        assert max(touched) == BYTES - 4
        assert sorted(at for at in touched if at < 2 * PLACES) == [
            place - 16 + 4 * word for place in (PLACES, 2 * PLACES) for word in range(4)
        ]


# --- in programs --------------------------------------------------------------------------------------------

ADDRESSES = np.arange(8, dtype=np.int32).reshape(2, 4)


@pytest.mark.parametrize(
    ("shape", "dtype", "taken"),
    [
        ((8, 5120), jnp.bfloat16, True),
        ((512, 5120), jnp.bfloat16, True),
        ((513, 5120), jnp.bfloat16, False),
        ((8, 5120), jnp.float32, False),
        ((8, 5120), jnp.float16, False),
        ((0, 5120), jnp.bfloat16, False),
        ((3, BLOCK // 2), jnp.bfloat16, False),
    ],
)
def test_whole_blocks_of_bfloat16_are_added_up_unless_they_are_many(
    shape: tuple[int, int], dtype: Any, taken: bool
) -> None:
    with patch.object(peer_memory, "exchanged", lambda x, _: x):
        assert peer_sum(jnp.zeros(shape, dtype)) is None
        with reaching(jnp.asarray(ADDRESSES[:1])):
            assert (peer_sum(jnp.zeros(shape, dtype)) is not None) == taken
        assert peer_sum(jnp.zeros(shape, dtype)) is None


def test_it_lowers_for_cuda() -> None:
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="cuda")
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    arguments = jax.ShapeDtypeStruct((8, 5120), jnp.bfloat16), jax.ShapeDtypeStruct((1, 4), jnp.int32)
    with (
        jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)),
        warnings.catch_warnings(),
    ):
        # Triton is announced to leave Pallas some day: docs/gpu-attention.md.
        warnings.simplefilter("ignore", DeprecationWarning)
        program = jax.jit(peer_memory.exchanged)
        text = jax.export.export(program, platforms=["cuda"], disabled_checks=unchecked)(
            *arguments
        ).mlir_module()
    assert text.count("__gpu$xla.gpu.triton") == 1


def pair() -> Mesh:
    return Mesh(np.array(jax.devices()[:2]).reshape(2, 1), ("kv", "copy"))


def at(first: int, mesh: Mesh) -> PeerMemory:
    """Memory with other addresses than at another first one."""
    each = jax.sharding.NamedSharding(mesh, PartitionSpec(("kv", "copy")))
    return PeerMemory(jnp.zeros(2), jax.device_put(first + ADDRESSES, each))


def test_a_compiled_program_is_told_the_addresses_of_each_device() -> None:
    """On CPUs, with a sum that adds the first half of the address instead of what the peer has."""
    mesh = pair()
    each = jax.sharding.NamedSharding(mesh, PartitionSpec(("kv", "copy")))
    placement = Placement(mesh, memory=at(0, mesh))
    peers = Peers(("kv", "copy"), 2)

    def doubled(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x + y, peers.quick_sum(y)

    x = jax.device_put(jnp.ones((2, BLOCK), jnp.bfloat16), each)
    arguments = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=each),) * 2
    with patch.object(peer_memory, "exchanged", lambda x, addresses: x + addresses[0, 0].astype(x.dtype)):
        program = placement.compile(doubled, arguments, arguments, donate=[1])
    given = jax.device_put(jnp.full((2, BLOCK), 3, jnp.bfloat16), each)
    total, shared = program(x, given)
    assert (np.asarray(total) == 4).all()
    assert np.asarray(shared).astype(np.float32)[:, 0].tolist() == [3, 7]
    assert given.is_deleted()
    assert not x.is_deleted()
    assert program.memory_analysis() is not None
    assert "all-reduce" not in (program.as_text() or "")


@pytest.mark.parametrize("argument", range(6))
def test_a_thread_gets_its_values_their_places_and_the_addresses(argument: int) -> None:
    """The kernel, interpreted, with a sum that gives back one of what the PTX is given."""

    def given(text: str, *, args: list[jax.Array], **_: Any) -> list[jax.Array]:
        assert text == ASM
        return [(args[argument] % 251).astype(jnp.bfloat16)]

    values = jnp.arange(3 * BLOCK, dtype=jnp.int32).reshape(6, -1)
    with (
        patch.object(plt, "elementwise_inline_asm", given),
        patch.object(pl, "pallas_call", partial(pl.pallas_call, interpret=True)),
    ):
        found = peer_memory.exchanged((values // 16 % 128).astype(jnp.bfloat16), jnp.asarray([[7, 5, 3, 1]]))
    expected = (values // 16 % 128, values % 251, *(jnp.full_like(values, half) for half in (7, 5, 3, 1)))
    np.testing.assert_array_equal(np.asarray(found, np.int32), expected[argument])


@pytest.mark.usefixtures("quick_compiler")
def test_a_step_reaches_its_own_memory_whatever_was_compiled_before_it() -> None:
    """The layers are one jitted function, of which JAX keeps what it has traced. On CPUs, with a sum that
    adds an eighth of the first half of the address: 0, and 128 in other memory."""
    config = replace(divisible(2, num_layers=1), hidden_size=BLOCK // 8)
    placement, model = over(config, 2, jnp.bfloat16)
    assert placement.mesh is not None
    structure, weights = model.split()
    cache = KVCache.abstract(Xla(), config, 4, 16, jnp.bfloat16, placement).zeros()
    rows = np.zeros(8, np.int32)
    work = Xla().capacity(8, page_sizes(config, 4, 16, placement)).empty()

    def hidden(weights: Any, cache: KVCache, rows: jax.Array) -> jax.Array:
        model = structure.merge(weights)
        return model.forward(rows, rows, cache, rows, rows, work, Xla(), placement)[0][0]

    def run(memory: PeerMemory | None) -> tuple[int, Any]:
        """All-gathers, and the residual stream of each device."""
        program = replace(placement, memory=memory).compile(
            hidden, (weights, cache, rows), PartitionSpec(("kv", "copy")), donate=[]
        )
        gathers = sum(each.kind == "all-gather" for each in collectives(program.as_text() or ""))
        return gathers, np.asarray(program(weights, cache, rows), np.float32).reshape(2, -1)

    def gathered(x: jax.Array, addresses: jax.Array) -> jax.Array:
        return lax.all_gather(x, ("kv", "copy")).sum(axis=0) + (addresses[0, 0] // 8).astype(x.dtype)

    with patch.object(peer_memory, "exchanged", gathered):
        results = [run(memory) for memory in (None, at(0, placement.mesh), at(1024, placement.mesh), None)]
    assert [gathers for gathers, _ in results] == [0, 2, 2, 0]
    plain, near, far, again = (hidden for _, hidden in results)
    np.testing.assert_array_equal(plain, again)
    np.testing.assert_allclose(near, plain, atol=0.05)
    assert (far - plain > 200).all()


def test_a_program_keeps_the_workspaces_that_it_writes_to() -> None:
    mesh = pair()
    memory = at(0, mesh)
    workspaces = weakref.ref(memory.workspaces)
    whole = jax.ShapeDtypeStruct((8,), jnp.float32)
    program = Placement(mesh, memory=memory).compile(lambda x: x + 1, (whole,), PartitionSpec(), donate=[])
    del memory
    gc.collect()
    assert workspaces() is not None
    assert (np.asarray(program(jnp.zeros(8))) == 1).all()


def test_without_memory_in_common_a_quick_sum_is_a_collective() -> None:
    mesh = pair()
    assert PeerMemory.between(mesh) is None
    each = jax.sharding.NamedSharding(mesh, PartitionSpec(("kv", "copy")))
    shapes = (jax.ShapeDtypeStruct((2, BLOCK), jnp.bfloat16, sharding=each),)
    program = Placement(mesh).compile(Peers(("kv", "copy"), 2).quick_sum, shapes, shapes[0], donate=[])
    assert "all-reduce" in (program.as_text() or "")
    assert (np.asarray(program(jax.device_put(jnp.ones((2, BLOCK), jnp.bfloat16), each))) == 2).all()


# --- which devices, and where -------------------------------------------------------------------------------


def gpu(ordinal: int = 0, kind: str = "NVIDIA H200", capability: str = "9.0", platform: str = "gpu") -> Any:
    return SimpleNamespace(
        platform=platform, device_kind=kind, local_hardware_id=ordinal, compute_capability=capability
    )


def test_only_two_gpus_of_nvidia_are_asked_whether_they_reach_each_other() -> None:
    cpu, other = gpu(platform="cpu", kind="cpu"), gpu(kind="AMD Instinct MI300X")
    with patch("ctypes.CDLL", side_effect=OSError) as asked:
        for devices in ([cpu, cpu], [other, other], [gpu()], [gpu()] * 4):
            assert not peer_memory.reach_each_other(devices)
        assert not asked.called
        assert not peer_memory.reach_each_other([gpu(), gpu()])
        assert asked.called


class Driver(ctypes.CDLL):
    """CUDA's, of devices that have handles; `reach` are the pairs of which the first reaches the second."""

    def __init__(self, reach: set[tuple[int, int]], *, get: int = 0, ask: int = 0) -> None:
        self.reach, self.get, self.ask = reach, get, ask

    def cuDeviceGet(self, handle: Any, ordinal: int) -> int:  # noqa: N802
        handle._obj.value = 100 + ordinal
        return self.get

    def cuDeviceCanAccessPeer(self, able: Any, device: Any, peer: Any) -> int:  # noqa: N802
        able._obj.value = (device.value - 100, peer.value - 100) in self.reach
        return self.ask


@pytest.mark.parametrize(
    ("driver", "capability", "reach"),
    [
        (Driver({(3, 1), (1, 3)}), "8.0", True),
        (Driver({(3, 1), (1, 3)}), "12.0", True),
        (Driver({(3, 1), (1, 3)}), "7.5", False),
        (Driver({(3, 1)}), "9.0", False),
        (Driver({(1, 3)}), "9.0", False),
        (Driver({(3, 1), (1, 3)}, get=101), "9.0", False),
        (Driver({(3, 1), (1, 3)}, ask=101), "9.0", False),
    ],
)
def test_each_of_two_gpus_must_reach_the_other_and_add_bfloat16(
    driver: Driver, capability: str, reach: bool
) -> None:
    with patch("ctypes.CDLL", return_value=driver):
        assert peer_memory.reach_each_other([gpu(3), gpu(1, capability=capability)]) == reach


@pytest.mark.parametrize(("disabled", "reach"), [("1", False), ("0", True)])
def test_what_is_kept_from_nccl_is_not_done_without_it(
    disabled: str, reach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", disabled)
    with patch("ctypes.CDLL", return_value=Driver({(0, 1), (1, 0)})):
        assert peer_memory.reach_each_other([gpu(0), gpu(1)]) == reach


def test_a_gpu_is_told_where_its_peer_s_workspace_lies_and_then_its_own() -> None:
    mesh = pair()
    with patch.object(peer_memory, "reach_each_other", return_value=True):
        memory = PeerMemory.between(mesh)
    assert memory is not None
    assert not np.asarray(memory.workspaces).any()
    at = {part.device: part.data.unsafe_buffer_pointer() for part in memory.workspaces.addressable_shards}
    for device, peer in (mesh.devices.flat, [*mesh.devices.flat][::-1]):
        (told,) = (part.data for part in memory.addresses.addressable_shards if part.device == device)
        assert [*np.asarray(told).view(np.uint64)[0]] == [at[peer], at[device]]
    (size,) = {part.data.nbytes for part in memory.workspaces.addressable_shards}
    assert size == BYTES


@pytest.mark.parametrize(
    ("vocabulary", "asked", "has"), [(136, True, True), (136, False, False), (135, True, False)]
)
def test_memory_is_in_common_where_it_is_asked_for_and_steps_begin_with_a_collective(
    vocabulary: int, asked: bool, has: bool
) -> None:
    """A step of a model whose vocabulary is whole on every device does not."""
    with patch.object(PeerMemory, "between", lambda _: PeerMemory(jnp.zeros(2), jnp.zeros(2))):
        placement = Placement.over(divisible(2, vocab_size=vocabulary), 2, peer_memory=asked)
    assert (placement.memory is not None) == has


def test_placements_of_two_processes_are_represented_alike() -> None:
    """How memory was divided is kept under it: serve.engine.memory."""
    one, other = (repr(Placement(memory=PeerMemory(jnp.zeros(2), jnp.full(2, at)))) for at in (1, 2))
    assert one == other
    assert one != repr(Placement())
