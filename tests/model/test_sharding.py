"""Every array names its logical axes, and a placement says over which devices each of them is divided."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec, SingleDeviceSharding

from attention.xla import Xla
from model.checkpoint import restore_orbax, save_orbax
from model.config import PRESETS
from model.decoder import Decoder
from model.kv_cache import KVCache, page_sizes
from model.sharding import (
    COPY,
    KV,
    LOGICAL_AXES,
    ON_ONE_DEVICE,
    Placement,
    PlacementError,
    ShardingRules,
    ask_for_devices,
    bytes_each,
)
from model.tensor_files import TensorFiles
from model.weights import hf_tensors, load_safetensors, parameters, place_model
from tests.model.checkpoints import CHECKPOINTS
from tests.model.meshes import divisible, over

pytestmark = pytest.mark.usefixtures("quick_compiler")

MODELS = {
    "qwen3": PRESETS["qwen3-8b"],
    "qwen2": PRESETS["qwen2.5-7b"],
    "llama-tied": replace(PRESETS["qwen3-0.6b"], architecture="llama"),
}
ALL = (KV, COPY)
TENSOR_PARALLEL = {
    ("embedding",): PartitionSpec(ALL, None),
    ("head",): PartitionSpec(None, ALL),
    ("attention", "q"): PartitionSpec(None, ALL, None),
    ("attention", "k"): PartitionSpec(None, KV, None),
    ("attention", "v"): PartitionSpec(None, KV, None),
    ("attention", "q_bias"): PartitionSpec(ALL, None),
    ("attention", "k_bias"): PartitionSpec(KV, None),
    ("attention", "v_bias"): PartitionSpec(KV, None),
    ("attention", "o"): PartitionSpec(ALL, None, None),
    ("mlp", "gate"): PartitionSpec(None, ALL),
    ("mlp", "up"): PartitionSpec(None, ALL),
    ("mlp", "down"): PartitionSpec(ALL, None),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_carries_a_logical_axis_per_dimension(name: str) -> None:
    for path, param in parameters(Decoder(MODELS[name], jnp.bfloat16)):
        axes = param.get_metadata("axes")
        assert len(axes) == len(param.shape), path
        assert set(axes) <= set(LOGICAL_AXES), path


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_is_divided_and_every_norm_is_whole(name: str) -> None:
    rules = Placement.over(MODELS[name], 4).rules
    for path, param in parameters(Decoder(MODELS[name], jnp.bfloat16)):
        key = path[2:] if path[0] == "layers" else path
        expected = TENSOR_PARALLEL.get(key, PartitionSpec(*[None] * len(param.shape)))
        assert rules.spec(param.get_metadata("axes")) == expected, path
    for array in Xla().pages(page_sizes(MODELS[name], 4, 16), 32, jnp.bfloat16):
        assert rules.spec(array.axes) == PartitionSpec(None, KV, None, None)


def test_by_default_everything_is_whole_on_one_device() -> None:
    model = place_model(Decoder(MODELS["qwen3"], jnp.bfloat16), ON_ONE_DEVICE)
    arrays = [*model.split()[1], *jax.tree.leaves(KVCache.abstract(Xla(), model.config, 4, 16, jnp.bfloat16))]
    assert {array.sharding for array in arrays} == {SingleDeviceSharding(jax.devices()[0])}


@pytest.mark.parametrize(("platform", "given"), [("gpu", {"xla_some_flag": 3}), ("tpu", None), ("cpu", None)])
def test_only_a_gpu_gets_a_gpu_s_options(
    monkeypatch: pytest.MonkeyPatch, platform: str, given: dict[str, int] | None
) -> None:
    compiled = MagicMock(return_value=MagicMock(spec=jax.stages.Compiled))
    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)
    placement = Placement(device=SimpleNamespace(platform=platform, device_kind="made up", num_cores=None))
    one = jax.ShapeDtypeStruct((1,), np.float32)
    placement.compile(lambda x: x + 1, (one,), one, donate=[], gpu_options={"xla_some_flag": 3})
    compiled.assert_called_once_with(compiler_options=given)


def test_an_unknown_axis_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="experts"):
        ShardingRules().spec(("experts", "embed"))


# --- which numbers of devices -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "able"),
    [("qwen3-32b", [1, 2, 4, 8, 16, 32, 64]), ("qwen2.5-0.5b", [1, 2]), ("qwen2.5-7b", [1, 2, 4])],
)
def test_what_would_divide_a_model_is_said_where_something_does_not(name: str, able: list[int]) -> None:
    for count in range(1, 9):
        if count in able:
            assert Placement.over(PRESETS[name], count).count == count
        else:
            with pytest.raises(PlacementError, match=f"evenly, as {', '.join(map(str, able))} would"):
                Placement.over(PRESETS[name], count)


@pytest.mark.parametrize("count", [0, -1, 16])
def test_more_devices_than_there_are_are_refused(count: int) -> None:
    with pytest.raises(PlacementError, match=f"over {count} devices: JAX finds 8 of kind cpu"):
        Placement.over(PRESETS["qwen3-32b"], count)


@pytest.mark.parametrize("count", [1, 2])
def test_a_model_lies_on_the_devices_that_were_given(count: int) -> None:
    given = jax.devices()[3:]
    assert Placement.over(divisible(2), count, given).devices == given[:count]


def test_devices_keep_a_kv_head_between_them_where_there_are_more_of_them() -> None:
    placement = Placement.over(divisible(2), 8)
    assert placement.mesh is not None
    assert dict(placement.mesh.shape) == {KV: 2, COPY: 4}
    parts = [placement.parts(axis) for axis in ("heads", "kv_heads", "mlp", "vocab", "embed", None)]
    assert parts == [8, 2, 8, 8, 1, 1]
    sizes = page_sizes(divisible(2), 3, 4, placement)
    assert (sizes.heads, sizes.kv_heads) == (1, 1)


# --- loading ------------------------------------------------------------------------------------------------

NAME = "qwen2-gqa8-untied-sharded-bf16"


def test_weights_go_straight_to_where_they_lie(
    golden_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor is read once, and each device is sent its own part of it."""
    config, folder = CHECKPOINTS[NAME].config, golden_folder(NAME)
    placement = Placement.over(config, 2)
    expected = hf_tensors(load_safetensors(Decoder(config, jnp.float32), folder, ON_ONE_DEVICE))
    read, reads = TensorFiles.read, Counter[str]()
    put, sent = jax.device_put, []

    def counted(files: TensorFiles, name: str) -> np.ndarray:
        reads[name] += 1
        return read(files, name)

    def noted(*arguments: Any) -> jax.Array:
        sent.append(put(*arguments))
        return sent[-1]

    monkeypatch.setattr(TensorFiles, "read", counted)
    monkeypatch.setattr(jax, "device_put", noted)
    loaded = load_safetensors(Decoder(config, jnp.float32), folder, placement)
    assert reads == dict.fromkeys(expected, 1)
    assert 2 * bytes_each(sent) == bytes_each(loaded.split()[1]), "two bytes a number are stored, four kept"
    jax.tree.map(np.testing.assert_array_equal, hf_tensors(loaded), expected)
    assert_placed(loaded, placement)


def test_random_weights_are_those_of_one_device_wherever_they_lie() -> None:
    (_, one), (placement, shared) = over(divisible(2), 1, jnp.float32), over(divisible(2), 8, jnp.float32)
    assert_placed(shared, placement)
    jax.tree.map(np.testing.assert_array_equal, shared.split()[1], one.split()[1])


def test_orbax_restores_on_another_mesh_than_it_was_written_on(tmp_path: Path) -> None:
    config = divisible(2)
    _, written = over(config, 4, jnp.float32)
    save_orbax(written, tmp_path)
    for count in (1, 2, 8):
        placement = Placement.over(config, count)
        restored = restore_orbax(Decoder(config, jnp.float32), tmp_path, placement)
        assert_placed(restored, placement)
        jax.tree.map(np.testing.assert_array_equal, restored.split()[1], written.split()[1])


def assert_placed(model: Decoder, placement: Placement) -> None:
    for path, param in parameters(model):
        assert param.get_value().sharding == placement.sharding(param.get_metadata("axes")), path


# --- before JAX finds its devices ---------------------------------------------------------------------------

FOUND = (
    "import jax; from model.sharding import ask_for_devices; ask_for_devices({}); print(len(jax.devices()))"
)


@pytest.mark.parametrize(
    ("asked", "environment", "found"),
    [
        (1, {}, 1),
        (3, {}, 3),
        (3, {"JAX_NUM_CPU_DEVICES": "2"}, 2),
        (3, {"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
        (10**9, {}, 64),
        (-1, {}, 1),
    ],
)
def test_a_cpu_counts_as_many_devices_unless_the_environment_says_otherwise(
    asked: int, environment: dict[str, str], found: int
) -> None:
    clean = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    said = subprocess.run(
        [sys.executable, "-c", FOUND.format(asked)],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(said.stdout) == found


def test_the_flag_that_leaves_xla_s_all_reduce_out_is_set_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    for _ in range(2):
        ask_for_devices(2)
    assert os.environ["XLA_FLAGS"].split() == [
        "--xla_cpu_enable_fast_math=false",
        "--xla_gpu_unsupported_use_all_reduce_one_shot_kernel=false",
    ]
