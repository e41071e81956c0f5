"""Weights: where a model's arrays come from. Hugging Face safetensors, or random ones made on the device.

A model is built without values (model/layers.py); the functions here put one array after the other in
place, in the model's dtype and in the sharding that its axes ask for, so that no second copy of the model
ever exists on the host or on the device.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from safetensors.numpy import save_file

from model.config import ModelConfig
from model.decoder import Decoder
from model.hf_tensor import ParameterPath, Source
from model.progress import Watch, unwatched
from model.settings import listed, shown
from model.sharding import Placement
from model.tensor_files import FLOATS, INDEX, WHOLE, Stored, TensorFiles, WeightsError, ignored

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def parameters(model: Decoder) -> Iterator[tuple[ParameterPath, nnx.Param]]:
    """Every parameter with its path, in the order of the model's flat weights."""
    yield from nnx.to_flat_state(nnx.state(model))


def parameter_sharding(param: nnx.Param, placement: Placement) -> Sharding:
    """Where a parameter lives, from its logical axes."""
    return placement.sharding(param.get_metadata("axes"))


def _fill(
    model: Decoder, make: Callable[[ParameterPath, nnx.Param], jax.Array], watch: Watch = unwatched
) -> Decoder:
    sizes = [param.size * param.get_value().dtype.itemsize for _, param in parameters(model)]
    done = 0
    for (path, param), size in zip(parameters(model), sizes, strict=True):
        param.set_value(make(path, param))
        done += size
        watch(done, sum(sizes))
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


def load_safetensors(model: Decoder, folder: Path, placement: Placement, watch: Watch = unwatched) -> Decoder:
    """Fills the model from a Hugging Face folder, tensor by tensor, casting to the model's dtype.

    The host holds one tensor at a time, beside what the devices have. Each device is sent its own part.
    Raises WeightsError with the missing and unexpected tensors, the wrong shapes and the wrong types.
    """
    with TensorFiles(folder) as files:
        wanted = check_safetensors(model, files, folder)
        embedding_name = _embedding_name(files)

        def make(path: ParameterPath, param: nnx.Param) -> jax.Array:
            # Sent as stored and permuted on the device, where it is fast; no byte moves between devices.
            axes, source, sent = param.get_metadata("axes"), wanted[path], []
            for tensor in source.tensors:
                name = embedding_name if tensor.name == EMBEDDING else tensor.name
                stored = files.read(name).reshape(tensor.view)
                sent.append(jax.device_put(stored, placement.sharding(tensor.stored_axes(axes))))
                sent[-1].block_until_ready()
            permutations = tuple(tensor.to_ours for tensor in source.tensors)
            join = _join(permutations, source.axis, param.get_value().dtype, placement.sharding(axes))
            return join(*sent)

        return _fill(model, make, watch)


def check_safetensors(model: Decoder, files: TensorFiles, folder: Path) -> dict[ParameterPath, Source]:
    """What each parameter is made of, once the headers of the files say that all of it is there.

    Raises WeightsError.
    """
    wanted = {path: Source.of(path, param) for path, param in parameters(model)}
    found = {name: stored for name, stored in files.stored().items() if not ignored(name)}
    if model.config.tie_embeddings:
        embedding = found.get(_embedding_name(files))
        found.pop(HEAD, None)
        found |= {} if embedding is None else {EMBEDDING: embedding}
    check_tensors(_shapes(wanted.values()), found, folder)
    return wanted


def has_own_head(files: TensorFiles) -> bool:
    """Whether a checkpoint whose config ties the head to the embedding holds a head that is another."""
    return HEAD in files and EMBEDDING in files and not files.same(HEAD, EMBEDDING)


def _embedding_name(files: TensorFiles) -> str:
    """Of tensors that are one, some savers keep the head alone: transformers 5 takes it for both."""
    return HEAD if HEAD in files and EMBEDDING not in files else EMBEDDING


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


def check_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Stored], source: Path) -> None:
    """Raises WeightsError listing by what `found` differs from `expected` (names to shapes)."""
    floats = tuple(FLOATS.values())
    missing = [f"missing: {name}" for name in expected if name not in found]
    unexpected = [f"unexpected: {shown(name)[1:-1]}" for name in found if name not in expected]
    shapes, types = [], []
    for name in expected.keys() & found.keys():
        shape, stored = expected[name], found[name]
        where = f"{name} in {stored.file}" if stored.file else name
        if stored.shape != shape:
            shapes.append(f"wrong shape: {where} is {stored.shape}, config.json asks for {shape}")
        if stored.dtype not in floats:
            types.append(f"wrong type: {where} is {stored.dtype}, expected one of {', '.join(floats)}")
    faults = [listed(kind, 4) for kind in (missing, unexpected, sorted(shapes), sorted(types)) if kind]
    if faults:
        raise WeightsError(f"{source} does not hold the model of its config.json: {'; '.join(faults)}")


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
    found = {name: Stored(tensor.shape, str(tensor.dtype), "") for name, tensor in tensors.items()}
    check_tensors(expected, found, folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(tensors.values())).dtype)
    (folder / "config.json").write_text(json.dumps(config.to_hf() | {"dtype": dtype}, indent=2) + "\n")
    if shards == 1:
        save_file(dict(tensors), folder / WHOLE, metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = list(tensors)[shard::shards]
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
