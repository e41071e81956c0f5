"""The golden checkpoints, live in transformers. Needs torch: `make test-oracle`, RECORD=1 to record again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.hf_config import read_config
from model.rotary import inverse_frequencies
from tests.model.checkpoints import CHECKPOINTS, GOLDENS, GREEDY_TOKENS, PROMPT_TOKENS, Golden
from tests.model.dense import dense_greedy, dense_logits

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore"),  # torch and transformers warn as they like
]

# The last of these is the last token of the continuation: rotary positions past the prompt count too.
POSITIONS = np.array([0, 1, 7, 15, 22, 23, 40, 63, 87])


@pytest.fixture(params=CHECKPOINTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def live(name: str, golden_folder: Callable[[str], Path]) -> Golden:
    """Logits and greedy continuations as transformers computes them now, in float32."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(golden_folder(name), dtype=torch.float32)
    checkpoint = CHECKPOINTS[name]

    def greedy(prompt: list[int]) -> list[int]:
        tokens = list(prompt)
        for _ in range(GREEDY_TOKENS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        return tokens

    with torch.no_grad():
        tokens = greedy(checkpoint.prompt)
        logits = model(torch.tensor([tokens])).logits[0].numpy()
        further = [greedy(checkpoint.prompt_of(length))[length:] for length in checkpoint.lengths]
    return Golden(
        POSITIONS,
        logits[POSITIONS],
        np.array(tokens[PROMPT_TOKENS:], np.int32),
        np.array(further, np.int32).reshape(-1, GREEDY_TOKENS),
    )


def test_goldens_are_what_transformers_computes(
    name: str, live: Golden, request: pytest.FixtureRequest
) -> None:
    if request.config.getoption("--record-goldens") and not _same(name, live):
        live.save(name)
    golden = Golden.load(name)
    np.testing.assert_array_equal(golden.positions, live.positions)
    np.testing.assert_allclose(golden.logits, live.logits, atol=1e-5)
    np.testing.assert_array_equal(golden.greedy, live.greedy)
    np.testing.assert_array_equal(golden.further, live.further)


def _same(name: str, live: Golden) -> bool:
    """Whether a golden is recorded already: rounding alone should not change its file."""
    if not (GOLDENS / f"{name}.npz").exists():
        return False
    golden = Golden.load(name)
    return (
        np.array_equal(golden.positions, live.positions)
        and np.allclose(golden.logits, live.logits, atol=1e-5)
        and np.array_equal(golden.greedy, live.greedy)
        and np.array_equal(golden.further, live.further)
    )


def test_the_dense_oracle_agrees_with_transformers(name: str, live: Golden) -> None:
    checkpoint = CHECKPOINTS[name]
    tokens = [*checkpoint.prompt, *live.greedy.tolist()]
    logits = dense_logits(checkpoint.tensors(), checkpoint.config, tokens)
    np.testing.assert_allclose(logits[live.positions], live.logits, atol=1e-4)
    for prompt, answer in live.continuations(checkpoint):
        assert dense_greedy(checkpoint.tensors(), checkpoint.config, prompt, GREEDY_TOKENS) == answer


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 4e5},
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": YARN, "rope_theta": 1e6},
        {"rope_parameters": YARN | {"rope_theta": 1e6}, "rope_scaling": None},
        {"rope_parameters": YARN | {"rope_theta": 1e6}, "rope_scaling": {}},
        {"rope_scaling": YARN | {"type": "linear"}},
        {"rope_scaling": YARN | {"original_max_position_embeddings": 8192}},
        {"rope_scaling": {"type": "yarn", "factor": 2.5}},
        {"rope_scaling": YARN, "original_max_position_embeddings": 1024},
        {"rope_scaling": YARN | {"attention_factor": 1.7}},
        {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.6}},
        {"rope_scaling": YARN | {"mscale": 0.7}},
        {"rope_scaling": YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False}},
        {"rope_scaling": YARN | {"beta_fast": None, "beta_slow": 0}},
        {"rope_scaling": YARN | {"factor": None}},
        {"rope_scaling": LLAMA3, "rope_theta": 5e5},
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 2048}},
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_rotary_settings_mean_what_they_mean_to_transformers(family: str, extra: dict[str, Any]) -> None:
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = {
        "model_type": family,
        "vocab_size": 64,
        "hidden_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 16384,
        **extra,
    }
    mine = read_config(config)
    theirs = LlamaRotaryEmbedding(transformers.AutoConfig.for_model(**copy.deepcopy(config)))
    frequencies = inverse_frequencies(mine.head_dim, mine.rope_theta, mine.rope_scaling)
    np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=2e-6)
    factor = mine.rope_scaling.attention_factor if mine.rope_scaling else 1.0
    assert factor == pytest.approx(theirs.attention_scaling)
