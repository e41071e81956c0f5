"""What layers are made of: norms, rotary positions and products, in the precision that they promise."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.config import PRESETS
from model.decoder import Decoder
from model.layers import RMSNorm, parameter, product, rotary_angles
from model.rotary import YarnScaling, inverse_frequencies

CONFIG = replace(PRESETS["qwen3-0.6b"], num_layers=1)


def test_every_norm_has_the_configs_epsilon() -> None:
    model = Decoder(replace(CONFIG, rms_norm_eps=0.25), jnp.float32)
    norms = [module for _, module in nnx.iter_modules(model) if isinstance(module, RMSNorm)]
    assert len(norms) == 5
    assert {norm.eps for norm in norms} == {0.25}


def test_epsilon_counts_where_activations_are_small() -> None:
    norm = RMSNorm(4, "embed", 0.25, jnp.float32)
    norm.scale.set_value(jnp.array([1.0, 2.0, 1.0, 1.0]))
    x = np.array([[0.5, -0.5, 0.0, 0.0]])
    expected = x / np.sqrt(0.125 + 0.25) * [1, 2, 1, 1]
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-6)


def test_positions_are_exact_to_the_end_of_a_long_context_in_a_bfloat16_model() -> None:
    cos, sin = rotary_angles(CONFIG, jnp.array([40_959]), jnp.bfloat16)
    angles = 40_959 * inverse_frequencies(128, 1e6, None)
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(cos[0], np.cos(angles), atol=4e-3)
    np.testing.assert_allclose(sin[0], np.sin(angles), atol=4e-3)


def test_cos_and_sin_grow_by_yarns_attention_factor_and_by_no_other() -> None:
    scaling = YarnScaling(factor=4.0, original_max_context=32768, attention_factor=1.25)
    stretched = replace(CONFIG, rope_scaling=replace(scaling, attention_factor=1.0))
    plain = rotary_angles(stretched, jnp.array([7, 40_000]), jnp.float32)
    grown = rotary_angles(replace(CONFIG, rope_scaling=scaling), jnp.array([7, 40_000]), jnp.float32)
    for mine, theirs in zip(grown, plain, strict=True):
        np.testing.assert_allclose(mine, 1.25 * theirs, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "precision"),
    [
        (jnp.float32, None, jax.lax.Precision.HIGHEST),
        (jnp.bfloat16, None, None),
        (jnp.bfloat16, jnp.float32, None),
    ],
)
def test_float32_products_ask_for_float32_and_others_for_what_they_give(
    dtype: type, out_dtype: type | None, precision: jax.lax.Precision | None
) -> None:
    """On an accelerator float32 means less unless it is asked for; a CPU gives it in any case."""
    x, weight = jnp.zeros((2, 4), dtype), nnx.Param(jnp.zeros((4, 3), dtype))
    program = jax.make_jaxpr(lambda x: product("re,em->rm", x, weight, out_dtype=out_dtype))(x)
    (dot,) = (equation for equation in program.eqns if equation.primitive.name == "dot_general")
    assert dot.params["preferred_element_type"] == (out_dtype or dtype)
    assert dot.outvars[0].aval.dtype == (out_dtype or dtype)
    asked = dot.params["precision"]
    assert asked == (None if precision is None else (precision, precision))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_accumulated_in_float32(tied: bool) -> None:
    config = replace(CONFIG, tie_embeddings=tied, vocab_size=64, hidden_size=32)
    model = Decoder(config, jnp.bfloat16)
    structure, weights = model.split()
    hidden = jax.ShapeDtypeStruct((2, 32), jnp.bfloat16)
    program = jax.make_jaxpr(lambda weights, hidden: structure.merge(weights).logits(hidden))(weights, hidden)
    (dot,) = (equation for equation in program.eqns if equation.primitive.name == "dot_general")
    assert dot.params["preferred_element_type"] == jnp.float32
    assert [operand.aval.dtype for operand in dot.invars] == [jnp.bfloat16] * 2


def test_a_parameter_names_each_of_its_axes() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        parameter((2, 3), ("embed",), jnp.float32, fan_in=2)
