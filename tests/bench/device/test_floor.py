from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import pytest

from bench.device.floor import floor_seconds, kv_bytes, weight_bytes
from bench.device.step import tiny
from model.config import PRESETS
from model.decoder import Decoder
from model.sharding import ON_ONE_DEVICE, Placement, bytes_each
from model.weights import place_model

CONFIG = replace(tiny(PRESETS["qwen3-32b"]), num_heads=4, num_kv_heads=2)


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab", [64, 63])
def test_a_device_reads_what_it_holds_but_for_an_embedding_that_is_only_looked_up(
    devices: int, tied: bool, vocab: int
) -> None:
    config = replace(CONFIG, tie_embeddings=tied, vocab_size=vocab)
    placement = Placement.over(config, devices)
    model = place_model(Decoder(config, jnp.bfloat16), placement)
    looked_up = 0 if tied else bytes_each(model.embedding.get_value())
    assert weight_bytes(config, jnp.bfloat16, placement) == bytes_each(model.split()[1]) - looked_up


def test_devices_that_keep_the_same_kv_heads_read_no_less() -> None:
    one, two, four = (
        kv_bytes(CONFIG, jnp.bfloat16, 100, Placement.over(CONFIG, devices)) for devices in (1, 2, 4)
    )
    assert one == 100 * 2 * CONFIG.num_layers * 2 * 16 * 2
    assert two == four == one / 2


def test_the_floor_is_that_of_one_device_of_those_that_share_the_model() -> None:
    whole, part = (
        floor_seconds(CONFIG, jnp.bfloat16, 100, 1.0, placement)
        for placement in (ON_ONE_DEVICE, Placement.over(CONFIG, 2))
    )
    assert whole / 2 < part < 0.51 * whole  # norms are whole on both
