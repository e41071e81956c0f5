"""Training and measuring the default model: a few steps, and what they write."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from model.checkpoint import load_model
from model.config import ModelConfig
from model.hf_config import read_folder
from model.tiny import dense
from model.tiny.layout import pack
from model.tiny.lessons import FOLDER, draw_rows, sequence
from model.tiny.measure import accuracy, held_out, load
from model.tiny.tasks import write_task
from model.tiny.train import CONFIG, Training, batches, loss, train
from model.weights import hf_tensors
from tests.model.dense import dense_logits

SMALL = ModelConfig(
    name="small",
    vocab_size=269,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    intermediate_size=32,
    rope_theta=10000.0,
    tie_embeddings=True,
    max_context=2048,
)


@pytest.mark.full
def test_a_few_steps_lower_the_loss_and_write_a_model_that_loads(tmp_path: Path, capsys):
    training = Training(
        out=tmp_path,
        steps=8,
        rows=1,
        warmup=2,
        learning_rate=0.02,
        evaluate_every=4,
        questions=1,
        processes=0,
    )
    train(training, SMALL)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines()]
    assert losses[0] > losses[1]
    stored = load(tmp_path)
    model = load_model(str(tmp_path), jnp.float32)
    for name, tensor in hf_tensors(model).items():
        np.testing.assert_array_equal(tensor, stored[name])


def test_training_batches_are_the_same_whoever_writes_them():
    training = Training(out=Path(), steps=2, rows=1, processes=0)
    for number, batch in enumerate(batches(training)):
        again = draw_rows(training.seed, number, rows=1, length=training.length)
        assert all(np.array_equal(a, b) for a, b in zip(batch, again, strict=True))


def test_the_dense_model_agrees_with_the_oracle():
    weights = dense.initial_weights(SMALL, 0)
    rows = pack([sequence(write_task(1, 5))], 1024)
    seen = dense.sight(jnp.asarray(rows.document), jnp.asarray(rows.branch))
    logits = dense.logits(weights, SMALL, rows.tokens, rows.positions, seen)[0]
    expected = dense_logits(weights, SMALL, rows.tokens[0], rows.positions[0], np.asarray(seen[0]))
    length = int((rows.document[0] > 0).sum())
    np.testing.assert_allclose(logits[:length], expected[:length], atol=2e-4)


def test_only_what_the_model_has_to_say_costs():
    weights = dense.initial_weights(SMALL, 0)
    rows = pack([sequence(write_task(1, 5))], 1024)
    assert float(loss(weights, rows, SMALL, jnp.float32)) > 1
    one = int(np.argmax(rows.target[0] >= 0))
    silent = rows._replace(target=np.where(np.arange(1024) == one, rows.target, -1))
    seen = dense.sight(jnp.asarray(rows.document), jnp.asarray(rows.branch))
    logits = np.asarray(dense.logits(weights, SMALL, rows.tokens, rows.positions, seen))[0, one]
    cost = np.log(np.exp(logits).sum()) - logits[rows.target[0, one]]
    np.testing.assert_allclose(float(loss(weights, silent, SMALL, jnp.float32)), cost, rtol=1e-4)


def test_the_shipped_weights_are_of_the_trained_shape_and_small():
    assert read_folder(FOLDER) == CONFIG
    assert (FOLDER / "model.safetensors").stat().st_size < 10e6


@pytest.mark.full
def test_the_shipped_model_needs_branches_that_do_not_see_each_other_and_the_right_join():
    tasks = [task for task in held_out(40) if task.kind in ("reverse", "nested")][:6]
    weights = load(FOLDER)
    assert accuracy(weights, CONFIG, tasks).answers == 1
    for rule in ("seeing", "join at the fork"):
        assert accuracy(weights, CONFIG, tasks, rule).answers < 0.5
