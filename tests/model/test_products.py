"""Products that kernels stream, interpreted: they give what XLA's give, and are chosen where they can."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Backend, Sizes
from attention.gpu import Gpu
from attention.heads import Places, rms_norm
from attention.wrapped import Wrapped
from attention.xla import Xla
from model import streamed
from model.config import PRESETS, ModelConfig
from model.decoder import Decoder
from model.layers import Attention, DecoderLayer, Products, Rows, Stream, decoder_layer
from model.products import Plain, Streamed, products_for
from model.sharding import ALONE, EVERYWHERE, ON_ONE_DEVICE, Peers, Placement
from model.weights import place_model, random_weights
from tests.attention.stores import note_stores

pytestmark = pytest.mark.usefixtures("quick_compiler")

# A model of the smallest sizes that can be streamed.
CONFIG = replace(
    PRESETS["qwen3-0.6b"],
    hidden_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=256,
    num_layers=1,
    vocab_size=16,
)


PAIR = Peers(("kv",), 2)


def normal(seed: int, *shape: int, deviation: float = 1.0) -> jax.Array:
    return (deviation * jax.random.normal(jax.random.key(seed), shape)).astype(jnp.bfloat16)


def error(x: jax.Array, expected: jax.Array) -> float:
    """Relative to the length of what is expected."""
    one, other = (np.asarray(array, np.float64) for array in (x, expected))
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


class QueriesBack(Wrapped):
    """Writes as a GPU's kernels do, and attends to nothing."""

    __slots__ = ()

    def attend(self, q: jax.Array, pages: Any, work: Any, *, scale: float) -> tuple[jax.Array, jax.Array]:
        return q, scale * q[..., 0]


@pytest.mark.parametrize(("rows", "programs", "parts"), [(1, 1, 1), (5, 9, 3), (16, 12, 4), (33, 10**6, 5)])
def test_partial_sums_add_up_to_the_products_side_by_side(
    rows: int, programs: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many that programs fill the device, and at most as many as there are steps: five."""
    monkeypatch.setattr(streamed, "PROGRAMS", programs)
    x = normal(0, rows, 320)
    weights = [normal(1 + i, 320, columns) for i, columns in enumerate((128, 256))]
    sums = streamed.partial_sums(x, weights, interpret=True)
    assert sums.shape == (parts, rows, 384)
    assert sums.dtype == jnp.float32
    wide = [jnp.asarray(array, jnp.float32) for array in (x, *weights)]
    expected = wide[0] @ jnp.concatenate(wide[1:], axis=1)
    np.testing.assert_allclose(sums.sum(axis=0), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("rows", "programs"), [(3, 1), (17, 132)])
def test_the_gate_opens_as_xla_s(rows: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "PROGRAMS", programs)
    x, gate, up = normal(0, rows, 128), *(normal(i, 128, 256, deviation=0.3) for i in (1, 2))
    gated = streamed.gated(x, gate, up, interpret=True)
    assert gated.dtype == jnp.bfloat16
    wide = [jnp.asarray(array, jnp.float32) for array in (x, gate, up)]
    assert error(gated, jax.nn.silu(wide[0] @ wide[1]) * (wide[0] @ wide[2])) < 5e-3


def test_what_is_added_is_rounded_as_a_product_and_then_normed() -> None:
    sums, hidden = jax.random.normal(jax.random.key(0), (3, 5, 384)), normal(1, 5, 384)
    scale = normal(2, 384)
    new, normed = streamed.add_and_norm(sums, hidden, scale, 0.25, interpret=True)
    expected = hidden + (sums[0] + sums[1] + sums[2]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(new, np.float32), np.asarray(expected, np.float32))
    assert error(normed, rms_norm(expected.astype(jnp.float32), scale, 0.25)) < 3e-3


def test_a_gpu_is_told_to_store_nothing_beyond_its_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = note_stores(monkeypatch)
    x, weight = normal(0, 3, 128), normal(1, 128, 128)
    streamed.partial_sums(x, [weight], interpret=True)
    streamed.gated(x, weight, weight, interpret=True)
    jax.effects_barrier()
    assert inside
    assert all(inside)


def test_a_streamed_layer_computes_what_a_plain_one_does() -> None:
    layer, stream, pages, rows = case(rows=5)
    norm, backend = layer.mlp_norm, QueriesBack(Gpu(interpret=True))
    (plain, plain_pages), (mine, my_pages) = (
        decoder_layer(layer, norm, stream, pages, rows, backend=backend, products=products)
        for products in (Plain(), Streamed(interpret=True))
    )
    assert error(mine.hidden, plain.hidden) < 8e-3
    assert error(mine.normed, plain.normed) < 8e-3
    for written, expected in zip(my_pages, plain_pages, strict=True):
        assert error(written[1], expected[1]) < 8e-3


@pytest.mark.parametrize("count", [2, 4])
def test_peers_stream_their_parts_of_a_layer_and_add_them_up(count: int) -> None:
    config = replace(CONFIG, num_heads=8, num_kv_heads=8, intermediate_size=512)
    placement, rows = Placement.over(config, count), 5
    model = random_weights(Decoder(config, jnp.bfloat16), 0, placement)
    structure, weights = model.split()
    hidden, angle = normal(7, rows, config.hidden_size), jnp.ones((rows, config.head_dim // 2), jnp.float32)

    def layer_of(peers: Peers, products: Products, weights: Any, hidden: jax.Array) -> Stream:
        layer = structure.merge(weights).layers[0]
        pages = jnp.zeros((rows, config.num_kv_heads // peers.count, 16, config.head_dim), jnp.bfloat16)
        places = Places(jnp.arange(rows, dtype=jnp.int32), jnp.zeros(rows, jnp.int32))
        return decoder_layer(
            layer,
            layer.mlp_norm,
            Stream(hidden, layer.attention_norm(hidden)),
            (pages, pages),
            Rows((angle, 0 * angle), places, ()),
            backend=QueriesBack(Gpu(interpret=True)),
            products=products,
        )[0]

    peers = placement.peers
    products = products_for(config, Gpu(interpret=True), peers, rows, jnp.bfloat16)
    assert products == Streamed(interpret=True, peers=peers)
    divided = jax.jit(placement.program(partial(layer_of, peers, products), (weights, hidden), EVERYWHERE))
    alone = jax.device_put(weights, jax.devices()[0])
    expected = layer_of(ALONE, Plain(), alone, hidden)
    found = divided(weights, hidden)
    assert error(found.hidden, expected.hidden) < 8e-3
    assert error(found.normed, expected.normed) < 8e-3


def case(rows: int) -> tuple[DecoderLayer, Stream, tuple[jax.Array, jax.Array], Rows]:
    """A layer, and rows that write to a page each."""
    model = random_weights(Decoder(CONFIG, jnp.bfloat16), 0, ON_ONE_DEVICE)
    layer, hidden = model.layers[0], normal(7, rows, CONFIG.hidden_size)
    pages = jnp.zeros((rows, CONFIG.num_kv_heads, 16, CONFIG.head_dim), jnp.bfloat16)
    angle = jnp.ones((rows, CONFIG.head_dim // 2), jnp.float32)
    places = Places(jnp.arange(rows, dtype=jnp.int32), jnp.zeros(rows, jnp.int32))
    stream = Stream(hidden, layer.attention_norm(hidden))
    return layer, stream, (pages, pages), Rows((angle, 0 * angle), places, ())


def test_biases_are_added_where_there_are_some() -> None:
    config = replace(CONFIG, architecture="qwen2")
    attention = random_weights(Decoder(config, jnp.bfloat16), 0, ON_ONE_DEVICE).layers[0].attention
    assert isinstance(attention, Attention)
    x = normal(0, 2, config.hidden_size)
    mine, plain = (products.heads(attention, x) for products in (Streamed(interpret=True), Plain()))
    np.testing.assert_array_equal(np.asarray(mine, np.float32), np.asarray(plain, np.float32))


@pytest.mark.parametrize(
    ("changed", "backend", "peers", "rows", "dtype", "expected"),
    [
        ({}, Gpu(), ALONE, 128, jnp.bfloat16, Streamed(interpret=False)),
        ({}, Gpu(interpret=True), ALONE, 1, jnp.float16, Streamed(interpret=True)),
        ({}, Gpu(), ALONE, 129, jnp.bfloat16, Plain()),
        ({}, Gpu(), ALONE, 8, jnp.float32, Plain()),
        ({}, Gpu(), PAIR, 8, jnp.bfloat16, Plain(PAIR)),
        ({"num_kv_heads": 4}, Gpu(), PAIR, 8, jnp.bfloat16, Streamed(interpret=False, peers=PAIR)),
        ({"num_kv_heads": 4}, Gpu(), PAIR, 129, jnp.bfloat16, Plain(PAIR)),
        ({"num_kv_heads": 4, "intermediate_size": 384}, Gpu(), PAIR, 8, jnp.bfloat16, Plain(PAIR)),
        ({}, Xla(), ALONE, 8, jnp.bfloat16, Plain()),
        ({"intermediate_size": 4864 + 64}, Gpu(), ALONE, 8, jnp.bfloat16, Plain()),
        ({"num_kv_heads": 1}, Gpu(), ALONE, 8, jnp.bfloat16, Plain()),
    ],
)
def test_products_are_streamed_where_that_is_faster_and_can_be(
    changed: dict, backend: Backend, peers: Peers, rows: int, dtype: type, expected: object
) -> None:
    assert products_for(replace(CONFIG, **changed), backend, peers, rows, dtype) == expected


def lowered_for_cuda(config: ModelConfig, rows: int) -> str:
    model = place_model(Decoder(config, jnp.bfloat16), ON_ONE_DEVICE)
    structure, weights = model.split()
    sizes = Sizes(num_pages=8, page_size=64, heads=config.num_heads, kv_heads=config.num_kv_heads)
    work = Gpu().capacity(rows, sizes).empty()
    pool = jax.ShapeDtypeStruct((8, config.num_kv_heads, 64, config.head_dim), jnp.bfloat16)
    hidden = jax.ShapeDtypeStruct((rows, config.hidden_size), jnp.bfloat16)
    angle = jax.ShapeDtypeStruct((rows, config.head_dim // 2), jnp.float32)
    index = jax.ShapeDtypeStruct((rows,), jnp.int32)
    products = products_for(config, Gpu(), ALONE, rows, jnp.bfloat16)

    def run(weights, hidden, pages, angle, index, work):
        layer, rows = structure.merge(weights).layers[0], Rows((angle, angle), Places(index, index), work)
        stream = Stream(hidden, hidden)
        return decoder_layer(layer, layer.mlp_norm, stream, pages, rows, backend=Gpu(), products=products)

    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        # Triton is announced to leave Pallas some day: docs/gpu-attention.md.
        warnings.simplefilter("ignore", DeprecationWarning)
        exported = jax.export.export(jax.jit(run), platforms=["cuda"], disabled_checks=unchecked)(
            weights, hidden, (pool, pool), angle, index, work
        )
    return exported.mlir_module()


@pytest.mark.parametrize(("rows", "launches", "left"), [(64, 9, 0), (128, 8, 2), (129, 3, 7)])
def test_a_layer_of_few_rows_is_nine_launches(rows: int, launches: int, left: int) -> None:
    """It lowers for CUDA without a GPU; which products are left to XLA follows from the rows."""
    text = lowered_for_cuda(replace(PRESETS["qwen3-32b"], num_layers=1, vocab_size=16), rows)
    assert text.count("__gpu$xla.gpu.triton") == launches
    assert text.count("stablehlo.dot_general") == left
