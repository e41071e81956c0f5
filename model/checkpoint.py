"""Model folders: what `load_model` reads and `taper-convert` writes.

A folder holds config.json, the tokenizer's files and the weights: Hugging Face safetensors, or an Orbax
checkpoint under `orbax/`. Orbax holds the pure dict of the model's state, never NNX objects, and restores
through abstract arrays straight into the target dtype and sharding.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.decoder import Decoder
from model.find import model_config, model_folder
from model.progress import Watch, unwatched
from model.settings import CheckpointError, Settings, listed, one_line, present, read_object
from model.sharding import ON_ONE_DEVICE, Placement
from model.tensor_files import Stored, TensorFiles, WeightsError
from model.weights import (
    check_safetensors,
    check_tensors,
    has_own_head,
    load_safetensors,
    place_model,
    random_weights,
)

LoadFormat = Literal["auto", "safetensors", "orbax", "random"]

# What goes along with the weights when a folder is converted.
COMPANION_FILES = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.txt", "*.model", "LICENSE*")
_ORBAX, _ORBAX_METADATA = "orbax", "_METADATA"

OWN_HEAD = (
    "config.json ties the head to the embedding, but lm_head.weight differs from model.embed_tokens.weight: "
    "the head of the file is used, as transformers does"
)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that can be loaded: its config, as all of its files have it, and where its weights come from.

    notes  what an operator should hear, where the files contradict each other
    """

    config: ModelConfig
    load_format: Literal["safetensors", "orbax", "random"]
    folder: Path | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def find(cls, name: str, load_format: LoadFormat = "auto") -> ModelSource:
        """Reads the config of a folder, a preset or "default", and checks the weights' headers against it.

        "auto" takes the Orbax checkpoint where there is one, else safetensors. "random" needs no weights, and
        is what "default" falls back to. Raises WeightsError, FileNotFoundError or CheckpointError.
        """
        folder, config = model_folder(name), model_config(name)
        kind = _resolve(load_format, folder, name)
        if kind == "random":
            return cls(config, kind, folder)
        if folder is None:
            raise WeightsError(f"the preset {name} comes without weights: use load format random, not {kind}")
        if kind == "orbax":
            check_orbax(Decoder(config, jnp.float32), folder)
            return cls(config, kind, folder)
        with TensorFiles(folder) as files:
            notes = ()
            if config.tie_embeddings and has_own_head(files):
                config, notes = replace(config, tie_embeddings=False), (OWN_HEAD,)
            check_safetensors(Decoder(config, jnp.float32), files, folder)
        return cls(config, kind, folder, notes)

    def abstract(self, dtype: Any, placement: Placement = ON_ONE_DEVICE) -> Decoder:
        """The model without its weights: shapes, dtype and sharding, to compile programs from."""
        return place_model(Decoder(self.config, dtype), placement)

    def load(
        self,
        dtype: Any,
        placement: Placement = ON_ONE_DEVICE,
        *,
        seed: int = 0,
        watch: Watch = unwatched,
    ) -> Decoder:
        """The model with its weights in `dtype`; `seed` is that of random ones. Raises as `find` does.

        `watch` hears how many bytes are in place while safetensors are read. Orbax reads everything at once,
        and random weights are made within seconds: of them it hears nothing.
        """
        if jnp.dtype(dtype) == jnp.float64 and jnp.result_type(float) != jnp.float64:
            raise ValueError("float64 needs jax_enable_x64 to be set before anything is computed")
        if not 0 <= seed < 2**32:  # JAX would fold a greater one to a smaller one's, in silence
            raise ValueError(f"the seed of random weights must be from 0 to {2**32 - 1}, not {seed}")
        model = Decoder(self.config, dtype)
        match self.load_format, self.folder:
            case "orbax", Path() as folder:
                return restore_orbax(model, folder, placement)
            case "safetensors", Path() as folder:
                return load_safetensors(model, folder, placement, watch)
            case _:
                return random_weights(model, seed, placement)


def load_model(
    name: str,
    dtype: Any,
    load_format: LoadFormat = "auto",
    *,
    placement: Placement = ON_ONE_DEVICE,
    seed: int = 0,
) -> Decoder:
    """Finds and loads a model: `.config` is its config, `.split()` its arrays. See ModelSource."""
    return ModelSource.find(name, load_format).load(dtype, placement, seed=seed)


def _resolve(
    load_format: LoadFormat, folder: Path | None, name: str
) -> Literal["safetensors", "orbax", "random"]:
    if load_format != "auto":
        return load_format
    if folder is not None and present(folder / _ORBAX):
        return "orbax"
    if name == "default" and folder is not None and not any(folder.glob("*.safetensors")):
        return "random"
    return "safetensors"


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

    path = check_orbax(model, folder)
    state = nnx.state(place_model(model, placement))
    abstract = nnx.to_pure_dict(state)
    with _orbax_errors(path), ocp.StandardCheckpointer() as checkpointer:
        nnx.replace_by_pure_dict(state, checkpointer.restore(path, abstract))
    nnx.update(model, state)
    return model


def check_orbax(model: Decoder, folder: Path) -> Path:
    """The Orbax checkpoint of a folder, if its metadata says that it is the model's; else WeightsError."""
    import orbax.checkpoint as ocp

    path = (folder / _ORBAX).absolute()
    if not present(path):
        raise WeightsError(f"no Orbax checkpoint in {folder}: taper-convert writes one")
    if not (path / _ORBAX_METADATA).is_file():
        raise WeightsError(
            f"cannot read the Orbax checkpoint {path}: expected a {_ORBAX_METADATA}, found none"
        )
    with _orbax_errors(path), ocp.StandardCheckpointer() as checkpointer:
        stored = _described(dict(checkpointer.metadata(path).item_metadata or {}))
    expected = _described(nnx.to_pure_dict(nnx.state(model)))
    check_tensors({name: tensor.shape for name, tensor in expected.items()}, stored, path)
    return path


@contextmanager
def _orbax_errors(path: Path) -> Iterator[None]:
    """Whatever the library raises for a damaged checkpoint, and that is a lot, becomes a WeightsError."""
    try:
        yield
    except Exception as error:
        found = f"{type(error).__name__}: {one_line(error)}"
        raise WeightsError(
            f"cannot read the Orbax checkpoint {path}: expected what taper-convert writes, found {found}"
        ) from error


def _described(tree: Any) -> dict[str, Stored]:
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): Stored(
            tuple(leaf.shape), str(jnp.dtype(leaf.dtype)), ""
        )
        for path, leaf in leaves
    }


def convert_hf(source: Path, out: Path, watch: Watch = unwatched) -> tuple[str, ...]:
    """Turns a Hugging Face folder into an Orbax folder with the same config, tokenizer and dtype.

    Returns what an operator should hear of it. Raises as ModelSource does.
    """
    dtype, found = _stored_dtype(source), ModelSource.find(str(source), "safetensors")
    model = found.load(dtype, watch=watch)
    out.mkdir(parents=True, exist_ok=True)
    for file in (file for pattern in COMPANION_FILES for file in source.glob(pattern)):
        copy = out / file.relative_to(source)
        if file.is_file() and not file.name.endswith(".safetensors.index.json") and file != copy:
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    # The weights say better than the config whether the head is the embedding.
    config = read_object(source / "config.json") | {"tie_word_embeddings": found.config.tie_embeddings}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_orbax(model, out)
    return found.notes


def _stored_dtype(folder: Path) -> Any:
    """The type that a config says its weights have, as either major version of transformers writes it."""
    settings = Settings(read_object(folder / "config.json"), str(folder / "config.json"))
    name = settings.text("dtype") or settings.text("torch_dtype") or "float32"
    if name not in ("float32", "bfloat16", "float16"):
        settings.fault("dtype" if "dtype" in settings else "torch_dtype", "float32, bfloat16 or float16")
    if settings.faults:
        raise CheckpointError(listed(settings.faults))
    return jnp.dtype(name)
