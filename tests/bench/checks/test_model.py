from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import attention
from bench.checks import model as check_model
from bench.checks.model import SCALES, compare_tokens, dense_logits, main, passed, random_prompts
from model.decoder import Decoder
from model.sharding import ON_ONE_DEVICE
from model.weights import hf_tensors, random_weights, save_hf
from tests.model import dense

TINY = SCALES["tiny"]


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_model, "greedy_of_transformers", lambda *_: None)


@pytest.mark.usefixtures("without_transformers")
def test_a_right_model_passes_every_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "check.json"
    result = main(["--scale", "tiny", "--json", str(out)])
    assert json.loads(out.read_text()) == result
    assert result["ok"]
    tokens = len(TINY.prompts) * TINY.branches * TINY.new_tokens
    assert result["greedy"][0]["cpu"] == {"same": tokens, "tokens": tokens, "ok": True}
    assert result["logits"]["positions"] == TINY.requests * (TINY.trunk + TINY.width * TINY.tail)
    again, *others = result["schedules"]
    assert again["bit_equal_rows"] == 1
    assert all(row["largest_difference"] < 0.2 and row["same_top_token"] > 0.9 for row in others)
    assert "transformers  not installed" in capsys.readouterr().out


@pytest.mark.usefixtures("without_transformers")
def test_a_model_that_attends_wrongly_fails_every_check(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.BACKENDS["xla"]

    def attend(*arrays: Any, scale: float) -> tuple[Any, Any]:
        return right.attend(*arrays, scale=0.7 * scale)

    here = check_model.greedy_here
    monkeypatch.setitem(attention.BACKENDS, "wrong", right._replace(attend=attend))
    monkeypatch.setattr(check_model, "greedy_on_cpu", lambda *arguments: here(*arguments, "xla"))
    result = main(["--scale", "tiny", "--backend", "wrong"])
    assert not result["ok"]
    assert not result["greedy"][0]["cpu"]["ok"]
    assert not result["logits"]["ok"]
    assert result["logits"]["error"] > 2 * check_model.ERROR_BAR


def test_tokens_count_up_to_a_branchs_first_difference() -> None:
    ours = [[[1, 2, 3, 4], [5, 6, 7, 8]]]
    assert compare_tokens(ours, [[[1, 9, 3, 4], [5, 6, 7, 8]]]) == {"same": 5, "tokens": 8, "ok": False}


def test_one_missed_bar_fails() -> None:
    good, bad = {"ok": True}, {"ok": False}
    assert passed({"greedy": [{"cpu": good, "transformers": None}], "logits": good})
    assert not passed({"greedy": [{"cpu": good, "transformers": bad}], "logits": good})
    assert not passed({"greedy": [{"cpu": good, "transformers": good}], "logits": bad})


def test_the_dense_reference_agrees_with_another_one() -> None:
    model = random_weights(Decoder(TINY.logits, jnp.float32), 3, ON_ONE_DEVICE)
    tokens = np.random.default_rng(3).integers(0, TINY.logits.vocab_size, 20)
    mine = dense_logits({k: jnp.asarray(v) for k, v in hf_tensors(model).items()}, tokens, TINY.logits)
    np.testing.assert_allclose(mine, dense.dense_logits(hf_tensors(model), TINY.logits, tokens), atol=1e-4)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_transformers_continues_as_we_do(tmp_path: Path) -> None:
    config = TINY.greedy[0]
    save_hf(tmp_path, config, hf_tensors(random_weights(Decoder(config, jnp.float32), 5, ON_ONE_DEVICE)))
    prompts = random_prompts(TINY, config, 5)
    ours = check_model.greedy_here(tmp_path, prompts, TINY, None)
    theirs = check_model.greedy_of_transformers(tmp_path, prompts, TINY)
    assert theirs is not None
    assert ours == theirs
