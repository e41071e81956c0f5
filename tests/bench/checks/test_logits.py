from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from bench.checks.logits import dense_logits
from bench.checks.scale import SCALES
from model.decoder import Decoder
from model.sharding import ON_ONE_DEVICE
from model.weights import hf_tensors, random_weights
from tests.model import dense

TINY = SCALES["tiny"]


def test_the_dense_reference_agrees_with_another_one() -> None:
    model = random_weights(Decoder(TINY.logits, jnp.float32), 3, ON_ONE_DEVICE)
    tokens = np.random.default_rng(3).integers(0, TINY.logits.vocab_size, 20)
    mine = dense_logits({k: jnp.asarray(v) for k, v in hf_tensors(model).items()}, tokens, TINY.logits)
    np.testing.assert_allclose(mine, dense.dense_logits(hf_tensors(model), TINY.logits, tokens), atol=1e-4)
