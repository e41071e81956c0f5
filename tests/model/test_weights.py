"""Weights arrive whole, in the model's dtype and layout, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from model import tensor_files
from model.checkpoint import OWN_HEAD, ModelSource
from model.decoder import Decoder
from model.sharding import ON_ONE_DEVICE
from model.weights import WeightsError, hf_tensors, load_safetensors, parameters, random_weights, save_hf
from tests.model.checkpoints import CHECKPOINTS
from tests.model.dense import dense_logits

pytestmark = pytest.mark.usefixtures("quick_compiler")

TIED, SHARDED = "qwen3-gqa8-tied-narrow-heads-f16", "qwen3-gqa8-untied-sharded"
PLAIN = "qwen3-gqa1-tied"
BIASED = "qwen2-gqa8-untied-sharded-bf16"


def load(folder: Path, name: str, dtype: type = jnp.float32) -> Decoder:
    return load_safetensors(Decoder(CHECKPOINTS[name].config, dtype), folder, ON_ONE_DEVICE)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_is_loaded_is_what_was_saved(name: str, golden_folder: Callable[[str], Path]) -> None:
    """Over every source dtype (float32, bfloat16, float16), with and without an index."""
    tensors = CHECKPOINTS[name].tensors()
    loaded = hf_tensors(load(golden_folder(name), name))
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(loaded[key], tensor.astype(np.float32), err_msg=key)


def test_every_tensor_is_read_once(
    golden_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    class Counting:
        """A file that notes what is read of it; the shapes that are looked up first cost nothing."""

        def __init__(self, path: Path, framework: str) -> None:
            self._context = safe_open(path, framework)

        def __enter__(self) -> Counting:
            self._file = self._context.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self._context.__exit__(*error)

        def keys(self) -> list[str]:
            return self._file.keys()

        def get_slice(self, name: str) -> Any:
            return self._file.get_slice(name)

        def get_tensor(self, name: str) -> np.ndarray:
            read.append(name)
            return self._file.get_tensor(name)

    monkeypatch.setattr(tensor_files, "safe_open", Counting)
    load(golden_folder(SHARDED), SHARDED)
    assert sorted(read) == sorted(CHECKPOINTS[SHARDED].tensors())


def test_weights_are_sent_as_they_are_stored(
    golden_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 model of a float16 checkpoint is cast where it is fast, and half as many bytes travel."""
    sent: list[np.ndarray] = []
    device_put = jax.device_put

    def counted(array: Any, *arguments: Any, **options: Any) -> jax.Array:
        sent.append(array)
        return device_put(array, *arguments, **options)

    monkeypatch.setattr(jax, "device_put", counted)
    load(golden_folder(TIED), TIED)
    tensors = CHECKPOINTS[TIED].tensors().values()
    assert {array.dtype for array in sent} == {np.dtype(np.float16)}
    assert sum(array.nbytes for array in sent) == sum(tensor.nbytes for tensor in tensors)


def test_weights_are_cast_to_the_dtype_of_the_model(golden_folder: Callable[[str], Path]) -> None:
    model = load(golden_folder(TIED), TIED, jnp.bfloat16)
    assert {weight.dtype for weight in model.split()[1]} == {jnp.dtype(jnp.bfloat16)}
    for key, tensor in CHECKPOINTS[TIED].tensors().items():
        np.testing.assert_array_equal(hf_tensors(model)[key], tensor.astype(ml_dtypes.bfloat16), err_msg=key)


def changed(folder: Path, **tensors: np.ndarray | None) -> Path:
    """The plain checkpoint with other tensors (None: without that one), "__" for each dot of a name."""
    CHECKPOINTS[PLAIN].write(folder)
    stored = load_file(folder / "model.safetensors") | {
        name.replace("__", "."): tensor for name, tensor in tensors.items()
    }
    save_file({name: t for name, t in stored.items() if t is not None}, folder / "model.safetensors")
    return folder


def test_every_missing_unexpected_and_misshapen_tensor_is_in_one_line(tmp_path: Path) -> None:
    folder = changed(
        tmp_path,
        model__norm__weight=None,
        model__layers__1__mlp__up_proj__weight=None,
        model__embed_tokens__weight=np.zeros((7, 5), np.float16),
        model__layers__0__self_attn__q_proj__bias=np.zeros(48, np.float16),
        model__layers__0__input_layernorm__weight=np.zeros(64, np.int8),
    )
    with pytest.raises(WeightsError) as error:
        load(folder, PLAIN)
    assert str(error.value) == (
        f"{folder} does not hold the model of its config.json: "
        "missing: model.norm.weight; missing: model.layers.1.mlp.up_proj.weight; "
        "unexpected: model.layers.0.self_attn.q_proj.bias; "
        "wrong shape: model.embed_tokens.weight in model.safetensors is (7, 5), "
        "config.json asks for (259, 64); "
        "wrong type: model.layers.0.input_layernorm.weight in model.safetensors is I8, "
        "expected one of float64, float32, float16, bfloat16"
    )


def test_of_many_faults_the_first_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    folder = CHECKPOINTS[PLAIN].write(tmp_path)
    config = replace(CHECKPOINTS[PLAIN].config, num_layers=5)
    with pytest.raises(WeightsError, match=r"missing: model\.layers\.3\..*; and 18 more") as error:
        load_safetensors(Decoder(config, jnp.float32), folder, ON_ONE_DEVICE)
    assert "\n" not in str(error.value)


def test_the_same_head_beside_tied_embeddings_and_old_rotary_tables_are_ignored(tmp_path: Path) -> None:
    """Some published checkpoints carry both."""
    head = CHECKPOINTS[PLAIN].tensors()["model.embed_tokens.weight"]
    folder = changed(
        tmp_path, lm_head__weight=head, model__layers__0__self_attn__rotary_emb__inv_freq=np.zeros(8)
    )
    source = ModelSource.find(str(folder))
    assert (source.config.tie_embeddings, source.notes) == (True, ())
    assert load(folder, PLAIN).head is None


def test_another_head_beside_tied_embeddings_is_used_and_said(tmp_path: Path) -> None:
    head = CHECKPOINTS[PLAIN].tensors()["model.embed_tokens.weight"]
    head[-1, -1] += 1
    source = ModelSource.find(str(changed(tmp_path, lm_head__weight=head)))
    assert source.notes == (OWN_HEAD,)
    model = source.load(jnp.float32)
    assert not model.config.tie_embeddings
    np.testing.assert_array_equal(hf_tensors(model)["lm_head.weight"], head)
    tensors = CHECKPOINTS[PLAIN].tensors() | {"lm_head.weight": head}
    assert dense_logits(tensors, source.config, [1, 2]).shape == (2, 259)


def test_the_embedding_of_a_tied_model_may_be_kept_as_its_head(tmp_path: Path) -> None:
    """Of tensors that share their memory, a saver keeps one name; it may be this one."""
    embedding = CHECKPOINTS[PLAIN].tensors()["model.embed_tokens.weight"]
    folder = changed(tmp_path, lm_head__weight=embedding, model__embed_tokens__weight=None)
    source = ModelSource.find(str(folder))
    assert source.config.tie_embeddings
    model = source.load(jnp.float32)
    np.testing.assert_array_equal(hf_tensors(model)["model.embed_tokens.weight"], embedding)


def test_files_that_the_index_names_but_are_not_there_are_named(tmp_path: Path) -> None:
    folder = CHECKPOINTS[SHARDED].write(tmp_path)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match="model-00002-of-00003"):
        load(folder, SHARDED)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        load(tmp_path, TIED)


def test_saving_tensors_that_are_not_the_configs_is_refused(tmp_path: Path) -> None:
    tensors = CHECKPOINTS[SHARDED].tensors()
    tensors.pop("lm_head.weight")
    with pytest.raises(WeightsError, match=r"missing: lm_head\.weight"):
        save_hf(tmp_path, CHECKPOINTS[SHARDED].config, tensors)


def test_the_index_lists_every_tensor_once(golden_folder: Callable[[str], Path]) -> None:
    index = json.loads((golden_folder(SHARDED) / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == CHECKPOINTS[SHARDED].tensors().keys()
    assert len(set(index["weight_map"].values())) == 3
    tensors = CHECKPOINTS[SHARDED].tensors().values()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)


def test_random_weights_depend_on_the_seed_alone() -> None:
    config = CHECKPOINTS[SHARDED].config
    first, again, other, narrow = (
        hf_tensors(random_weights(Decoder(config, dtype), seed, ON_ONE_DEVICE))
        for dtype, seed in ((jnp.float32, 1), (jnp.float32, 1), (jnp.float32, 2), (jnp.bfloat16, 1))
    )
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, again[name])
        np.testing.assert_array_equal(tensor.astype(ml_dtypes.bfloat16), narrow[name])
        assert name.endswith("norm.weight") or (tensor != other[name]).any()
    matrices = [tensor.ravel()[:16].tobytes() for tensor in first.values() if tensor.ndim == 2]
    assert len(set(matrices)) == len(matrices)


def test_parameters_of_one_shape_are_drawn_by_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers there are: a deep model starts as soon as a shallow one."""
    traced: list[tuple[int, ...]] = []
    normal = jax.random.normal

    def noting(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        traced.append(shape)
        return normal(key, shape, dtype)

    monkeypatch.setattr(jax.random, "normal", noting)
    config = replace(CHECKPOINTS[TIED].config, vocab_size=40, intermediate_size=24, num_layers=2)
    random_weights(Decoder(config, jnp.float32), 0, ON_ONE_DEVICE)
    assert (40, config.hidden_size) in traced
    assert len(traced) == len({*traced})


def test_random_biases_are_as_large_as_what_they_are_added_to() -> None:
    model = random_weights(Decoder(CHECKPOINTS[BIASED].config, jnp.float32), 1, ON_ONE_DEVICE)
    biases = [tensor for name, tensor in hf_tensors(model).items() if name.endswith(".bias")]
    assert len(biases) == 9
    assert 0.8 < np.concatenate(biases).std() < 1.2
    assert len({bias[:8].tobytes() for bias in biases}) == 9


def test_random_weights_of_a_seed_are_those_of_every_other_process() -> None:
    model = random_weights(Decoder(CHECKPOINTS[SHARDED].config, jnp.float32), 1, ON_ONE_DEVICE)
    first = np.asarray(model.embedding.get_value())[0, :4]
    np.testing.assert_allclose(first, [0.092414, 0.162601, 0.006529, 0.120962], rtol=1e-3)


def test_a_deep_random_model_has_activations_of_order_one() -> None:
    config = replace(CHECKPOINTS["qwen3-gqa1-tied"].config, num_layers=16)
    model = random_weights(Decoder(config, jnp.float32), 0, ON_ONE_DEVICE)
    logits = dense_logits(hf_tensors(model), config, range(40))
    assert 0.5 < logits.std() < 2


def test_parameters_come_in_the_order_of_the_flat_weights() -> None:
    model = random_weights(Decoder(CHECKPOINTS[TIED].config, jnp.float32), 0, ON_ONE_DEVICE)
    by_path = [param.get_value() for _, param in parameters(model)]
    assert all(mine is theirs for mine, theirs in zip(by_path, model.split()[1], strict=True))
    assert all(isinstance(weight, jax.Array) for weight in by_path)
