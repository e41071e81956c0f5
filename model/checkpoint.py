"""Model folders: what `load_model` reads and `taper-convert` writes.

A folder holds config.json, the tokenizer's files and the weights: Hugging Face safetensors, or an Orbax
checkpoint under `orbax/`. Orbax holds the pure dict of the model's state, never NNX objects, and restores
through abstract arrays straight into the target dtype and sharding.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import PRESETS, ModelConfig
from model.decoder import Decoder
from model.sharding import ON_ONE_DEVICE, Placement
from model.weights import WeightsError, check_tensors, load_safetensors, place_model, random_weights

LoadFormat = Literal["auto", "safetensors", "orbax", "random"]

# What goes along with the weights when a folder is converted.
COMPANION_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
_ORBAX = "orbax"


def model_folder(name: str) -> Path | None:
    """The folder of a model: None for a preset, the embedded model's for "default", else the path itself.

    Raises FileNotFoundError, saying what would be accepted, if there is no such folder.
    """
    if name in PRESETS:
        return None
    folder = Path(__file__).parent / "tiny" if name == "default" else Path(name)
    if not (folder / "config.json").exists():
        presets = ", ".join(PRESETS)
        raise FileNotFoundError(
            f'no model {name!r}: give a folder with a config.json, "default", or one of {presets}'
        )
    return folder


def model_config(name: str) -> ModelConfig:
    """The config of a folder, a preset or "default"."""
    folder = model_folder(name)
    return PRESETS[name] if folder is None else ModelConfig.from_folder(folder)


def abstract_model(name: str, dtype: Any, placement: Placement = ON_ONE_DEVICE) -> Decoder:
    """The model without its weights: shapes, dtype and sharding, to compile programs from."""
    return place_model(Decoder(model_config(name), dtype), placement)


def load_model(
    name: str,
    dtype: Any,
    load_format: LoadFormat = "auto",
    *,
    placement: Placement = ON_ONE_DEVICE,
    seed: int = 0,
) -> Decoder:
    """Loads a folder, a preset or "default" in `dtype`; `.config` is its config, `.split()` its arrays.

    "auto" takes the Orbax checkpoint where there is one, else safetensors. "random" needs no weights, and
    is what "default" falls back to; `seed` is its seed. Raises WeightsError, FileNotFoundError or
    UnsupportedModelError.
    """
    if jnp.dtype(dtype) == jnp.float64 and jnp.result_type(float) != jnp.float64:
        raise ValueError("float64 needs jax_enable_x64 to be set before anything is computed")
    folder, model = model_folder(name), Decoder(model_config(name), dtype)
    match _resolve(load_format, folder, name):
        case "orbax", Path() as folder:
            return restore_orbax(model, folder, placement)
        case "safetensors", Path() as folder:
            return load_safetensors(model, folder, placement)
        case "random", _:
            return random_weights(model, seed, placement)
        case kind, _:
            raise WeightsError(f"the preset {name} comes without weights: use load format random, not {kind}")


def _resolve(load_format: LoadFormat, folder: Path | None, name: str) -> tuple[str, Path | None]:
    if load_format != "auto" or folder is None:
        return load_format, folder
    if (folder / _ORBAX).exists():
        return "orbax", folder
    if name == "default" and not any(folder.glob("*.safetensors")):
        return "random", folder
    return "safetensors", folder


def save_orbax(model: Decoder, folder: Path) -> None:
    """Writes the model's arrays, in the dtype they have, to `folder`/orbax, replacing what was there."""
    import orbax.checkpoint as ocp

    # A plain file for each array: OCDBT copies what it wrote, and weights hardly compress.
    plain = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    with ocp.Checkpointer(plain) as checkpointer:
        arrays = ocp.args.PyTreeSave(nnx.to_pure_dict(nnx.state(model)))
        checkpointer.save((folder / _ORBAX).absolute(), arrays, force=True)


def restore_orbax(model: Decoder, folder: Path, placement: Placement) -> Decoder:
    """Fills the model from `folder`/orbax. Raises WeightsError listing everything that does not fit."""
    import orbax.checkpoint as ocp

    path = (folder / _ORBAX).absolute()
    if not path.exists():
        raise WeightsError(f"no Orbax checkpoint in {folder}: taper-convert writes one")
    state = nnx.state(place_model(model, placement))
    abstract = nnx.to_pure_dict(state)
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(path).item_metadata
        check_tensors(_shapes(abstract), _shapes(dict(stored)), path)
        nnx.replace_by_pure_dict(state, checkpointer.restore(path, abstract))
    nnx.update(model, state)
    return model


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves
    }


def convert_hf(source: Path, out: Path) -> None:
    """Turns a Hugging Face folder into an Orbax folder with the same config, tokenizer and dtype."""
    dtype = _stored_dtype(source)
    model = load_model(str(source), dtype, "safetensors")
    out.mkdir(parents=True, exist_ok=True)
    for pattern in COMPANION_FILES:
        for file in source.glob(pattern):
            if not file.name.endswith(".safetensors.index.json"):
                shutil.copyfile(file, out / file.name)
    save_orbax(model, out)


def _stored_dtype(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    return jnp.dtype(config.get("dtype") or config.get("torch_dtype") or "float32")
