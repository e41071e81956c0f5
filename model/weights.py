"""Weights: where a model's arrays come from. Hugging Face safetensors, or random ones made on the device.

A model is built without values (model/layers.py); the functions here put one array after the other in
place, in the model's dtype and in the sharding that its axes ask for, so that no second copy of the model
ever exists on the host or on the device.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from safetensors import safe_open
from safetensors.numpy import save_file

from model.config import ModelConfig
from model.decoder import Decoder
from model.hf_tensor import ParameterPath, Source
from model.sharding import Placement


class WeightsError(ValueError):
    """The tensors on disk are not the tensors of the model. Lists every fault at once."""


def parameters(model: Decoder) -> Iterator[tuple[ParameterPath, nnx.Param]]:
    """Every parameter with its path, in the order of the model's flat weights."""
    yield from nnx.to_flat_state(nnx.state(model))


def parameter_sharding(param: nnx.Param, placement: Placement) -> Sharding:
    """Where a parameter lives, from its logical axes."""
    return placement.sharding(param.get_metadata("axes"))


def _fill(model: Decoder, make: Callable[[ParameterPath, nnx.Param], jax.Array]) -> Decoder:
    for path, param in parameters(model):
        param.set_value(make(path, param))
    return model


def place_model(model: Decoder, placement: Placement) -> Decoder:
    """Gives an abstract model the shardings of `placement`: enough to compile programs before it loads."""

    def place(path: ParameterPath, param: nnx.Param) -> Any:
        return jax.ShapeDtypeStruct(
            param.shape, param.get_value().dtype, sharding=parameter_sharding(param, placement)
        )

    return _fill(model, place)


def random_weights(model: Decoder, seed: int, placement: Placement) -> Decoder:
    """Fills the model with random weights, made on the device: normal, of variance 1 / fan-in; norms of one.

    The weights depend on the seed and each parameter's path only. They are drawn in float32 and then cast,
    so the same seed means the same model in every dtype (up to rounding) and every sharding.
    """
    key = jax.random.key(seed)

    def make(path: ParameterPath, param: nnx.Param) -> jax.Array:
        fan_in = param.get_metadata("fan_in")
        draw = _draw(param.shape, param.get_value().dtype, fan_in, parameter_sharding(param, placement))
        return draw(jax.random.fold_in(key, zlib.crc32(repr(path).encode())))

    return _fill(model, make)


@lru_cache
def _draw(
    shape: tuple[int, ...], dtype: Any, fan_in: int, sharding: Sharding
) -> Callable[[jax.Array], jax.Array]:
    def draw(key: jax.Array) -> jax.Array:
        if fan_in == 0:
            return jnp.ones(shape, dtype)
        return (jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)


def load_safetensors(model: Decoder, folder: Path, placement: Placement) -> Decoder:
    """Fills the model from a Hugging Face folder, tensor by tensor, casting to the model's dtype.

    Raises WeightsError with every missing tensor, unexpected tensor and wrong shape.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "np")) for path in _safetensors_files(folder)]
        holder = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)
        wanted = {path: Source.of(path, param) for path, param in parameters(model)}
        optional = {"lm_head.weight"} if model.config.tie_embeddings else set()
        found = {
            name: tuple(file.get_slice(name).get_shape())
            for name, file in holder.items()
            if name not in optional and not name.endswith("rotary_emb.inv_freq")
        }
        check_tensors(_shapes(wanted.values()), found, folder)

        def make(path: ParameterPath, param: nnx.Param) -> jax.Array:
            # Sent as stored and permuted on the device, where it is fast; no byte moves between devices.
            axes, source, sent = param.get_metadata("axes"), wanted[path], []
            for tensor in source.tensors:
                stored = holder[tensor.name].get_tensor(tensor.name).reshape(tensor.view)
                sent.append(jax.device_put(stored, placement.sharding(tensor.stored_axes(axes))))
            permutations = tuple(tensor.to_ours for tensor in source.tensors)
            join = _join(permutations, source.axis, param.get_value().dtype, placement.sharding(axes))
            return join(*sent)

        return _fill(model, make)


def _shapes(sources: Iterable[Source]) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for source in sources for tensor in source.tensors}


@lru_cache
def _join(
    permutations: tuple[tuple[int, ...], ...], axis: int, dtype: Any, sharding: Sharding
) -> Callable[..., jax.Array]:
    """A program that turns tensors as they are stored into the parameter that they are together."""

    def join(*stored: jax.Array) -> jax.Array:
        parts = [part.astype(dtype).transpose(axes) for part, axes in zip(stored, permutations, strict=True)]
        return jnp.concatenate(parts, axis)

    return jax.jit(join, out_shardings=sharding)


def _safetensors_files(folder: Path) -> list[Path]:
    """The files of a checkpoint: those of its index, or all there are; WeightsError if one is absent."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    absent = [path.name for path in files if not path.exists()]
    if absent:
        raise WeightsError(f"{index} names files that are not there: {', '.join(absent)}")
    if not files:
        raise WeightsError(f"no *.safetensors in {folder}")
    return files


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: Path
) -> None:
    """Raises WeightsError listing everything by which `found` differs from `expected` (names to shapes)."""
    faults = [f"missing: {name}" for name in expected if name not in found]
    faults += [f"unexpected: {name}" for name in found if name not in expected]
    faults += [
        f"wrong shape: {name} is {found[name]}, config.json asks for {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if faults:
        raise WeightsError(
            f"{source} does not hold the model that its config.json describes:\n  " + "\n  ".join(faults)
        )


def hf_tensors(model: Decoder) -> dict[str, np.ndarray]:
    """The model's weights on the host, under Hugging Face's names and in its layout."""
    tensors = {}
    for path, param in parameters(model):
        tensors |= Source.of(path, param).split(np.asarray(param.get_value()))
    return tensors


def save_hf(folder: Path, config: ModelConfig, tensors: Mapping[str, np.ndarray], *, shards: int = 1) -> None:
    """Writes `config.json` and safetensors (in `shards` files with an index) that transformers can load.

    `tensors` is what `hf_tensors` gives. Raises WeightsError if these are not the config's tensors.
    """
    model = Decoder(config, jnp.float32)
    expected = _shapes(Source.of(path, param) for path, param in parameters(model))
    check_tensors(expected, {name: t.shape for name, t in tensors.items()}, folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(tensors.values())).dtype)
    (folder / "config.json").write_text(json.dumps(config.to_hf() | {"dtype": dtype}, indent=2) + "\n")
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = list(tensors)[shard::shards]
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
