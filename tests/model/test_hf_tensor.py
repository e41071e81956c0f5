"""A parameter can be made of several tensors of a checkpoint, and is taken apart again when it is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model import hf_tensor
from model.decoder import Decoder
from model.hf_tensor import HfTensor, Source
from model.layers import Parts, parameter
from model.sharding import ON_ONE_DEVICE
from model.weights import WeightsError, hf_tensors, load_safetensors, parameters, save_hf
from tests.model.checkpoints import CHECKPOINTS

NAME = "qwen3-gqa2-untied-wide-heads-bf16"
PREFIX = "model.layers.*"


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """A decoder whose first layer has gate and up in one array, and queries, keys and values in another."""
    names = tuple(f"{PREFIX}.mlp.{part}_proj.weight" for part in ("gate", "up"))
    monkeypatch.setitem(hf_tensor.TENSORS, ("layers", "*", "mlp", "gate_up"), (1, *names))
    names = tuple(f"{PREFIX}.self_attn.{part}_proj.weight" for part in "qkv")
    monkeypatch.setitem(hf_tensor.TENSORS, ("layers", "*", "attention", "qkv"), (1, *names))
    config = CHECKPOINTS[NAME].config
    embed, mlp, size = config.hidden_size, config.intermediate_size, config.head_dim
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    model = Decoder(config, jnp.float32)
    layer = model.layers[0]
    layer.mlp.gate_up = parameter(
        (embed, 2 * mlp), ("embed", "mlp"), jnp.float32, fan_in=embed, parts=Parts(1, (mlp, mlp))
    )
    layer.attention.qkv = parameter(
        (embed, sum(heads), size),
        ("embed", "heads", "head_dim"),
        jnp.float32,
        fan_in=embed,
        parts=Parts(1, heads),
    )
    del layer.mlp.gate, layer.mlp.up, layer.attention.q, layer.attention.k, layer.attention.v
    return model


def test_parts_lie_side_by_side_in_the_order_of_their_names(
    fused: Decoder, golden_folder: Callable[[str], Path]
) -> None:
    folder = golden_folder(NAME)
    load_safetensors(fused, folder, ON_ONE_DEVICE)
    apart = load_safetensors(Decoder(fused.config, jnp.float32), folder, ON_ONE_DEVICE).layers[0]
    mlp, attention = apart.mlp, apart.attention
    expected = np.concatenate([mlp.gate[...], mlp.up[...]], 1)
    np.testing.assert_array_equal(fused.layers[0].mlp.gate_up[...], expected)
    expected = np.concatenate([attention.q[...], attention.k[...], attention.v[...]], 1)
    np.testing.assert_array_equal(fused.layers[0].attention.qkv[...], expected)


def test_what_was_loaded_in_one_array_is_saved_in_its_tensors(
    fused: Decoder, golden_folder: Callable[[str], Path]
) -> None:
    saved = hf_tensors(load_safetensors(fused, golden_folder(NAME), ON_ONE_DEVICE))
    tensors = CHECKPOINTS[NAME].tensors()
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(saved[name], tensor.astype(np.float32), err_msg=name)


def test_a_part_that_is_missing_is_named(fused: Decoder, tmp_path: Path) -> None:
    tensors = CHECKPOINTS[NAME].tensors()
    save_hf(tmp_path, fused.config, tensors)
    (file,) = tmp_path.glob("*.safetensors")
    stored = load_file(file)
    del stored["model.layers.0.mlp.up_proj.weight"]
    save_file(stored, file)
    with pytest.raises(WeightsError, match=r"missing: model\.layers\.0\.mlp\.up_proj\.weight"):
        load_safetensors(fused, tmp_path, ON_ONE_DEVICE)


@pytest.mark.parametrize(
    ("shape", "inputs"),
    [((5,), 0), ((5, 6), 0), ((5,), None), ((5, 6), None), ((5, 6), 1), ((5, 2, 3), 1), ((2, 3, 5), 2)],
)
def test_a_tensor_is_stored_output_axes_first_and_a_bias_as_a_vector(
    shape: tuple[int, ...], inputs: int | None
) -> None:
    ours = np.arange(np.prod(shape)).reshape(shape)
    tensor = HfTensor.of("x", shape, inputs)
    theirs = tensor.to_hf(ours)
    matrix = ours.reshape(int(np.prod(shape[:inputs])), -1)
    expected = ours if inputs is None else matrix.T if inputs else ours.ravel()
    np.testing.assert_array_equal(theirs, expected)
    np.testing.assert_array_equal(theirs.reshape(tensor.view).transpose(tensor.to_ours), ours)
    axes = ["a", "b", "c"][: len(shape)]
    assert [tensor.stored_axes(axes)[axis] for axis in tensor.to_ours] == axes


def test_every_parameter_of_every_architecture_has_its_tensors() -> None:
    for checkpoint in CHECKPOINTS.values():
        names = [
            tensor.name
            for path, param in parameters(Decoder(checkpoint.config, jnp.float32))
            for tensor in Source.of(path, param).tensors
        ]
        assert len(set(names)) == len(names)
        assert not any("*" in name for name in names)
