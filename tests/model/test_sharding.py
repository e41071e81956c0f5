"""Every array names its logical axes, and the rules turn them into a layout."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from attention.xla import Xla
from model.config import PRESETS
from model.decoder import Decoder
from model.kv_cache import KVCache, page_sizes
from model.sharding import LOGICAL_AXES, ON_ONE_DEVICE, Placement, ShardingRules
from model.weights import load_safetensors, parameters, place_model, random_weights
from tests.model.checkpoints import CHECKPOINTS

pytestmark = pytest.mark.usefixtures("quick_compiler")

MODELS = {
    "qwen3": PRESETS["qwen3-8b"],
    "qwen2": PRESETS["qwen2.5-7b"],
    "llama-tied": replace(PRESETS["qwen3-0.6b"], architecture="llama"),
}
TENSOR_PARALLEL = {
    ("embedding",): PartitionSpec("tp", None),
    ("head",): PartitionSpec(None, "tp"),
    ("attention", "q"): PartitionSpec(None, "tp", None),
    ("attention", "k"): PartitionSpec(None, "tp", None),
    ("attention", "v"): PartitionSpec(None, "tp", None),
    ("attention", "q_bias"): PartitionSpec("tp", None),
    ("attention", "k_bias"): PartitionSpec("tp", None),
    ("attention", "v_bias"): PartitionSpec("tp", None),
    ("attention", "o"): PartitionSpec("tp", None, None),
    ("mlp", "gate"): PartitionSpec(None, "tp"),
    ("mlp", "up"): PartitionSpec(None, "tp"),
    ("mlp", "down"): PartitionSpec("tp", None),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_carries_a_logical_axis_per_dimension(name: str) -> None:
    for path, param in parameters(Decoder(MODELS[name], jnp.bfloat16)):
        axes = param.get_metadata("axes")
        assert len(axes) == len(param.shape), path
        assert set(axes) <= set(LOGICAL_AXES), path


@pytest.mark.parametrize("name", MODELS)
def test_tensor_parallel_rules_split_every_matrix_and_replicate_every_norm(name: str) -> None:
    rules = ShardingRules.tensor_parallel("tp")
    for path, param in parameters(Decoder(MODELS[name], jnp.bfloat16)):
        key = path[2:] if path[0] == "layers" else path
        expected = TENSOR_PARALLEL.get(key, PartitionSpec(*[None] * len(param.shape)))
        assert rules.spec(param.get_metadata("axes")) == expected, path
    for array in Xla().pages(page_sizes(MODELS[name], 4, 16), 32, jnp.bfloat16):
        assert rules.spec(array.axes) == PartitionSpec(None, "tp", None, None)


def test_by_default_everything_is_whole_on_one_device() -> None:
    model = place_model(Decoder(MODELS["qwen3"], jnp.bfloat16), ON_ONE_DEVICE)
    arrays = [*model.split()[1], *jax.tree.leaves(KVCache.abstract(Xla(), model.config, 4, 16, jnp.bfloat16))]
    assert {array.sharding for array in arrays} == {SingleDeviceSharding(jax.devices()[0])}


def test_weights_land_in_the_sharding_that_the_rules_ask_for(golden_folder) -> None:
    placement = Placement(Mesh(np.array(jax.devices()[:1]), ("tp",)), ShardingRules.tensor_parallel("tp"))
    name = "qwen2-gqa8-untied-sharded-bf16"
    config = CHECKPOINTS[name].config
    loaded = load_safetensors(Decoder(config, jnp.float32), golden_folder(name), placement)
    for model in (loaded, random_weights(Decoder(config, jnp.float32), 0, placement)):
        for path, param in parameters(model):
            expected = NamedSharding(placement.mesh, placement.rules.spec(param.get_metadata("axes")))
            assert param.get_value().sharding == expected, path


def test_an_unknown_axis_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="experts"):
        ShardingRules().spec(("experts", "embed"))
