"""The decoder computes what transformers does, for every shape of checkpoint that it claims to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Backend
from attention.reference import Reference
from attention.xla import Xla
from model.checkpoint import load_model
from model.decoder import Decoder
from model.kv_cache import KVCache
from model.sharding import ON_ONE_DEVICE
from model.step import StepLayout
from model.weights import place_model
from tests.model.checkpoints import CHECKPOINTS, Golden
from tests.model.dense import dense_logits
from tests.model.paged import Sequence, step_inputs

pytestmark = pytest.mark.usefixtures("quick_compiler")

PAGE_SIZE = 16
NUM_PAGES = 12


def layout_of(model: Decoder, rows: int, backend: Backend) -> StepLayout:
    sizes = {"num_pages": NUM_PAGES, "page_size": PAGE_SIZE, "samples": rows}
    return StepLayout.for_bucket(model.config, backend, rows, **sizes)


def paged_logits(model: Decoder, tokens: list[int], backend: Backend) -> np.ndarray:
    """Logits of all tokens, read in one step into pages that lie in no particular order."""
    layout = layout_of(model, len(tokens), backend)
    sequence = Sequence(pages=[7, 2, 9, 0, 11, 4, 5], page_size=PAGE_SIZE)
    inputs = step_inputs([sequence.feed(tokens)], layout)
    cache = KVCache.abstract(backend, model.config, NUM_PAGES, PAGE_SIZE, model.dtype).zeros()
    structure, weights = model.split()

    @jax.jit
    def run(weights: tuple, cache: KVCache) -> jax.Array:
        model = structure.merge(weights)
        rows = [jnp.asarray(array, jnp.int32) for array in inputs[:4]]
        work = jax.tree.map(jnp.asarray, inputs.work)
        hidden, _ = model.forward(*rows[:2], cache, *rows[2:], work, backend)
        return model.logits(hidden)

    return np.asarray(run(weights, cache))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_those_of_transformers(name: str, golden_folder: Callable[[str], Path]) -> None:
    golden = Golden.load(name)
    model = load_model(str(golden_folder(name)), jnp.float32)
    logits = paged_logits(model, [*CHECKPOINTS[name].prompt, *golden.greedy.tolist()], Xla())
    np.testing.assert_allclose(logits[golden.positions], golden.logits, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(logits[golden.positions[-1]].argmax(), golden.logits[-1].argmax())


@pytest.mark.parametrize("backend", [Reference(), Xla()], ids=lambda backend: backend.name)
@pytest.mark.usefixtures("x64")
def test_float64_is_float64_throughout(backend: Backend, golden_folder: Callable[[str], Path]) -> None:
    name = "qwen3-gqa1-tied"
    model = load_model(str(golden_folder(name)), jnp.float64)
    tokens = list(range(3, 40))
    expected = dense_logits(CHECKPOINTS[name].tensors(), model.config, tokens)
    np.testing.assert_allclose(paged_logits(model, tokens, backend), expected, atol=1e-11, rtol=0)


def test_bfloat16_weights_give_float32_logits_of_the_same_model(
    golden_folder: Callable[[str], Path],
) -> None:
    name = "qwen3-gqa2-untied-wide-heads-bf16"
    model = load_model(str(golden_folder(name)), jnp.bfloat16)
    tokens = list(range(3, 40))
    logits = paged_logits(model, tokens, Xla())
    expected = dense_logits(CHECKPOINTS[name].tensors(), model.config, tokens)
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).mean() < 0.02 * expected.std()


def test_the_layer_is_traced_once_however_many_there_are() -> None:
    config = replace(CHECKPOINTS["qwen3-gqa1-tied"].config, num_layers=5)
    model = place_model(Decoder(config, jnp.float32), ON_ONE_DEVICE)
    rows = jax.ShapeDtypeStruct((8,), jnp.int32)
    work = step_inputs([Sequence([0], PAGE_SIZE).feed([1])], layout_of(model, 8, Xla())).work
    cache = KVCache.abstract(Xla(), config, NUM_PAGES, PAGE_SIZE, jnp.float32)
    structure, weights = model.split()

    def run(weights: tuple, cache: KVCache, *rows: jax.Array) -> tuple[jax.Array, KVCache]:
        tokens, positions, page, offset = rows
        return structure.merge(weights).forward(tokens, positions, cache, page, offset, work, Xla())

    jaxpr = jax.make_jaxpr(run)(weights, cache, *[rows] * 4)
    layers = [eqn for eqn in jaxpr.eqns if eqn.params.get("name") == "decoder_layer"]
    assert len(layers) == 5
    assert len({id(eqn.params["jaxpr"]) for eqn in layers}) == 1


def test_structure_is_shared_by_models_of_one_config_and_static_under_jit() -> None:
    config = CHECKPOINTS["qwen3-gqa1-tied"].config
    first, second = (Decoder(config, jnp.float32).split()[0] for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
