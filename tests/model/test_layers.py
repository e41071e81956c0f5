"""What layers are made of: norms, rotary positions and products, in the precision that they promise."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.config import PRESETS, Llama3Scaling, ModelConfig
from model.decoder import Decoder
from model.layers import RMSNorm, inverse_frequencies, parameter, product, rotary_angles

CONFIG = replace(PRESETS["qwen3-0.6b"], num_layers=1)
SCALED = replace(
    CONFIG,
    rope_theta=5e5,
    rope_scaling=Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_context=8192
    ),
)


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


def llama3_frequency(frequency: float, config: ModelConfig) -> float:
    """As Meta's apply_scaling has it: by wavelength, in three ranges."""
    scaling = config.rope_scaling
    assert scaling is not None
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_max_context / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_max_context / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = scaling.original_max_context / wavelength - scaling.low_freq_factor
    smooth /= scaling.high_freq_factor - scaling.low_freq_factor
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def test_rotary_scaling_stretches_long_waves_keeps_short_ones_and_goes_over_in_between() -> None:
    plain = inverse_frequencies(replace(SCALED, rope_scaling=None))
    np.testing.assert_allclose(plain, 5e5 ** -(np.arange(64) / 64), rtol=1e-12)
    scaled = inverse_frequencies(SCALED)
    np.testing.assert_allclose(scaled, [llama3_frequency(f, SCALED) for f in plain], rtol=1e-12)
    stretched, kept = np.isclose(scaled, plain / 8), np.isclose(scaled, plain)
    assert stretched.any()
    assert kept.any()
    assert (~stretched & ~kept).any()


def test_positions_are_exact_to_the_end_of_a_long_context_in_a_bfloat16_model() -> None:
    cos, sin = rotary_angles(CONFIG, jnp.array([40_959]), jnp.bfloat16)
    angles = 40_959 * inverse_frequencies(CONFIG)
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(cos[0], np.cos(angles), atol=4e-3)
    np.testing.assert_allclose(sin[0], np.sin(angles), atol=4e-3)


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
