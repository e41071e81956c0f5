"""The golden checkpoints, live in transformers. Needs torch: `make test-oracle`, RECORD=1 to record again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.model.checkpoints import CHECKPOINTS, GREEDY_TOKENS, PROMPT_TOKENS, Golden
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
    """Logits and greedy continuation as transformers computes them now, in float32."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(golden_folder(name), dtype=torch.float32)
    tokens = list(CHECKPOINTS[name].prompt)
    with torch.no_grad():
        for _ in range(GREEDY_TOKENS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        logits = model(torch.tensor([tokens])).logits[0].numpy()
    return Golden(POSITIONS, logits[POSITIONS], np.array(tokens[PROMPT_TOKENS:], np.int32))


def test_goldens_are_what_transformers_computes(
    name: str, live: Golden, request: pytest.FixtureRequest
) -> None:
    if request.config.getoption("--record-goldens"):
        live.save(name)
    golden = Golden.load(name)
    np.testing.assert_array_equal(golden.positions, live.positions)
    np.testing.assert_allclose(golden.logits, live.logits, atol=1e-5)
    np.testing.assert_array_equal(golden.greedy, live.greedy)


def test_the_dense_oracle_agrees_with_transformers(name: str, live: Golden) -> None:
    checkpoint = CHECKPOINTS[name]
    tokens = [*checkpoint.prompt, *live.greedy.tolist()]
    logits = dense_logits(checkpoint.tensors(), checkpoint.config, tokens)
    np.testing.assert_allclose(logits[live.positions], live.logits, atol=1e-4)
    assert dense_greedy(checkpoint.tensors(), checkpoint.config, checkpoint.prompt, GREEDY_TOKENS) == list(
        live.greedy
    )
