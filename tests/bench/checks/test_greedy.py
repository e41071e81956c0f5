from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import pytest

from bench.checks import greedy
from bench.checks.greedy import (
    check_greedy,
    compare_tokens,
    greedy_here,
    greedy_of_transformers,
    random_prompts,
)
from bench.checks.scale import SCALES
from model.decoder import Decoder
from model.sharding import ON_ONE_DEVICE
from model.weights import hf_tensors, random_weights, save_hf

pytestmark = pytest.mark.usefixtures("quick_compiler")

TINY = SCALES["tiny"]


def test_tokens_count_up_to_a_branchs_first_difference() -> None:
    ours = [[[1, 2, 3, 4], [5, 6, 7, 8]]]
    assert compare_tokens(ours, [[[1, 9, 3, 4], [5, 6, 7, 8]]]) == {"same": 5, "tokens": 8, "ok": False}


@pytest.mark.full
def test_taper_decode_in_a_process_of_its_own_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy, "greedy_of_transformers", lambda *_: None)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # there, as here
    tokens = len(TINY.prompts) * TINY.branches * TINY.new_tokens
    found = check_greedy(TINY, TINY.greedy[0], 0, None)
    assert found["cpu"] == {"same": tokens, "tokens": tokens, "ok": True}
    assert found["transformers"] is None


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_transformers_continues_as_we_do(tmp_path: Path) -> None:
    config = TINY.greedy[0]
    save_hf(tmp_path, config, hf_tensors(random_weights(Decoder(config, jnp.float32), 5, ON_ONE_DEVICE)))
    prompts = random_prompts(TINY, config, 5)
    ours = greedy_here(tmp_path, prompts, TINY, None)
    theirs = greedy_of_transformers(tmp_path, prompts, TINY)
    assert theirs is not None
    assert ours == theirs
