"""A model folder loads the same model whatever its weights are kept as."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from model import checkpoint, convert
from model.checkpoint import (
    OWN_HEAD,
    LoadFormat,
    ModelSource,
    convert_hf,
    load_model,
)
from model.config import PRESETS
from model.find import model_config, model_folder
from model.version import versions
from model.weights import WeightsError, hf_tensors
from tests.model.checkpoints import CHECKPOINTS

NAME = "qwen3-gqa2-untied-wide-heads-bf16"


@pytest.fixture
def converted(golden_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    source = shutil.copytree(golden_folder(NAME), tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    index = {"weight_map": dict.fromkeys(CHECKPOINTS[NAME].tensors(), "model.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    out = tmp_path / "converted"
    convert_hf(source, out)
    return out


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_orbax_folder_restores_the_same_weights_in_the_dtype_asked_for(
    converted: Path, golden_folder: Callable[[str], Path], dtype: type
) -> None:
    restored, original = load_model(str(converted), dtype), load_model(str(golden_folder(NAME)), dtype)
    assert restored.config == original.config
    assert restored.split()[0] == original.split()[0]
    for mine, theirs in zip(restored.split()[1], original.split()[1], strict=True):
        assert (mine.dtype, mine.sharding) == (theirs.dtype, theirs.sharding)
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_checkpoint_is_converted_in_the_dtype_that_its_config_names(
    key: str, golden_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """As either major version of transformers writes it. More bits would take more room, fewer lose some."""
    source = shutil.copytree(golden_folder(NAME), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    (source / "config.json").write_text(json.dumps(config | {key: "bfloat16"}))
    convert_hf(source, tmp_path / "out")
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata((tmp_path / "out" / "orbax").absolute()).item_metadata
    arrays = jax.tree.leaves(dict(stored), is_leaf=lambda node: hasattr(node, "dtype"))
    assert {jnp.dtype(array.dtype).name for array in arrays} == {"bfloat16"}


def test_orbax_is_taken_where_a_folder_has_both(
    converted: Path, golden_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in golden_folder(NAME).glob("*.safetensors"):
        shutil.copyfile(file, converted / file.name)
    taken: list[str] = []
    for reader in ("restore_orbax", "load_safetensors"):
        monkeypatch.setattr(
            checkpoint, reader, lambda model, *_, reader=reader: taken.append(reader) or model
        )
    load_model(str(converted), jnp.float32)
    load_model(str(converted), jnp.float32, "safetensors")
    assert taken == ["restore_orbax", "load_safetensors"]


def test_a_converted_folder_keeps_config_and_tokenizer_and_drops_safetensors(converted: Path) -> None:
    assert {path.name for path in converted.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "orbax",
    }


def test_a_checkpoint_of_another_model_is_refused_with_all_its_faults(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    config |= {"num_hidden_layers": 4, "intermediate_size": 97, "tie_word_embeddings": True}
    (converted / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError) as error:
        load_model(str(converted), jnp.float32)
    message = str(error.value)
    assert "missing: layers.3.attention.q" in message
    assert "unexpected: head" in message
    assert "wrong shape: layers.0.mlp.down is (96, 64), config.json asks for (97, 64)" in message


def test_asking_for_an_orbax_checkpoint_that_is_not_there_says_how_to_make_one(
    golden_folder: Callable[[str], Path],
) -> None:
    with pytest.raises(WeightsError, match="taper-convert"):
        load_model(str(golden_folder(NAME)), jnp.float32, "orbax")


def test_random_weights_need_a_config_only(tmp_path: Path) -> None:
    config = CHECKPOINTS[NAME].config
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    model = load_model(str(tmp_path), jnp.float32, "random", seed=3)
    again = load_model(str(tmp_path), jnp.float32, "random", seed=3)
    assert model.config == config
    for mine, theirs in zip(hf_tensors(model).values(), hf_tensors(again).values(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("load_format", ["auto", "safetensors", "orbax"])
def test_a_preset_has_no_weights_of_its_own(load_format: LoadFormat) -> None:
    with pytest.raises(WeightsError, match="load format random"):
        load_model("qwen3-0.6b", jnp.float32, load_format)


def test_a_preset_is_described_without_being_allocated() -> None:
    model = ModelSource.find("qwen3-32b", "random").abstract(jnp.bfloat16)
    assert model_folder("qwen3-32b") is None
    assert model.config == model_config("qwen3-32b") == PRESETS["qwen3-32b"]
    assert model.dtype == jnp.bfloat16


def test_a_model_that_is_not_there_is_named_with_what_would_be_accepted() -> None:
    with pytest.raises(FileNotFoundError, match=r"'no/such/model'.*default.*qwen3-0\.6b"):
        load_model("no/such/model", jnp.float32)


def test_float64_without_x64_is_refused_rather_than_rounded() -> None:
    with pytest.raises(ValueError, match="jax_enable_x64"):
        load_model("qwen3-0.6b", jnp.float64, "random")


@pytest.mark.parametrize("name", [NAME, "qwen2-yarn-untruncated"])
def test_the_convert_command_converts(
    name: str, golden_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["taper-convert", "hf", str(golden_folder(name)), str(tmp_path / "out")])
    convert.main()
    model = load_model(str(tmp_path / "out"), jnp.float32, "orbax")
    assert model.config == CHECKPOINTS[name].config
    tensors = CHECKPOINTS[name].tensors()
    for key, tensor in hf_tensors(model).items():
        np.testing.assert_array_equal(tensor, tensors[key].astype(np.float32), err_msg=key)


def test_the_convert_command_tells_its_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["taper-convert", "--version"])
    convert.main()
    assert capsys.readouterr().out == f"{versions()}\n"


def test_a_folder_that_cannot_be_converted_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "float8"}')
    monkeypatch.setattr("sys.argv", ["taper-convert", "hf", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"^taper-convert: .*config\.json: dtype: expected float32,"):
        convert.main()


def test_a_head_that_is_not_tied_after_all_is_converted_as_its_own(
    golden_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = shutil.copytree(golden_folder("qwen3-gqa1-tied"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, source / "model.safetensors")
    assert convert_hf(source, tmp_path / "out") == (OWN_HEAD,)
    model = load_model(str(tmp_path / "out"), jnp.float32)
    np.testing.assert_array_equal(hf_tensors(model)["lm_head.weight"], tensors["lm_head.weight"])
