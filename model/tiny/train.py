"""Trains the default model: `python -m model.tiny.train --out FOLDER` (needs `pip install -e '.[train]'`).

About ten minutes on one H100. Everything follows from the seed, up to the rounding of the machine.
"""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from model.config import ModelConfig
from model.tiny import dense
from model.tiny.layout import Rows
from model.tiny.lessons import FOLDER, draw_rows
from model.tiny.measure import accuracy, held_out, load
from model.weights import save_hf

CONFIG = ModelConfig(
    name="taper-tiny",
    vocab_size=269,
    hidden_size=256,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    intermediate_size=640,
    rope_theta=10000.0,
    tie_embeddings=True,
    max_context=2048,
    eos_ids=(2, 0),
    join="kv",
    tag_grammar="multiverse",
)
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How the model is trained."""

    out: Path
    """Folder for the checkpoint."""
    start: Path | None = None
    """Model folder to go on from; random weights unless given."""
    steps: int = 9500
    """Optimizer steps."""
    rows: int = 32
    """Rows in a batch; a row holds whole questions with their answers."""
    length: int = 1024
    """Tokens in a row."""
    learning_rate: float = 1.5e-3
    """At its peak; a cosine takes it to a hundredth."""
    warmup: int = 500
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """AdamW's, on matrices."""
    seed: int = 1
    """Of weights and questions."""
    evaluate_every: int = 950
    """Steps between measurements on held-out questions."""
    questions: int = 256
    """In such a measurement."""
    processes: int = 14
    """That write questions."""


def loss(weights: dense.Weights, batch: Rows, config: ModelConfig, dtype: jnp.dtype) -> jax.Array:
    """Mean cross-entropy, in nats, of the tokens that the model has to say."""
    seen = dense.sight(batch.document, batch.branch)
    logits = dense.logits(weights, config, batch.tokens, batch.positions, seen, dtype)
    said = batch.target >= 0
    costs = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch.target, 0))
    return jnp.sum(costs * said) / jnp.sum(said)


def optimizer(training: Training) -> optax.GradientTransformation:
    peak = training.learning_rate
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, training.warmup, training.steps, peak / 100)
    decayed = partial(jax.tree.map, lambda weight: weight.ndim > 1)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.99, weight_decay=training.weight_decay, mask=decayed),
    )


def batches(training: Training) -> Iterator[Rows]:
    """Batches without end, written by other processes, in order."""
    draw = partial(draw_rows, training.seed, rows=training.rows, length=training.length)
    if training.processes == 0:
        yield from map(draw, range(training.steps))
        return
    with multiprocessing.get_context("spawn").Pool(training.processes) as pool:
        yield from pool.imap(draw, range(training.steps), chunksize=8)


def train(training: Training, config: ModelConfig = CONFIG) -> None:
    """Trains, and writes a model folder after each measurement."""
    first = load(training.start) if training.start else dense.initial_weights(config, training.seed)
    weights: dense.Weights = jax.tree.map(jnp.asarray, first)
    rule = optimizer(training)
    state = rule.init(weights)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(weights: dense.Weights, state: optax.OptState, batch: Rows):
        cost, gradient = jax.value_and_grad(loss)(weights, batch, config, dtype)
        update, state = rule.update(gradient, state, weights)
        return optax.apply_updates(weights, update), state, cost

    questions = held_out(training.questions)
    started, costs = time.perf_counter(), []
    for number, batch in enumerate(batches(training), 1):
        weights, state, cost = step(weights, state, batch)
        costs.append(cost)
        if number % training.evaluate_every and number != training.steps:
            continue
        seconds = time.perf_counter() - started
        mean = float(np.mean(jax.device_get(costs)))
        scores = accuracy(weights, config, questions, dtype=dtype)
        print(f"step {number}: loss {mean:.5f}, {scores}, {seconds:.0f} s", flush=True)
        costs.clear()
        save(training.out, config, jax.device_get(weights))


def save(folder: Path, config: ModelConfig, weights: dict[str, np.ndarray]) -> None:
    """Writes a model folder, weights rounded to bfloat16."""
    save_hf(folder, config, {name: weight.astype(jnp.bfloat16) for name, weight in weights.items()})
    for name in COMPANIONS:
        if folder.resolve() != FOLDER.resolve():
            shutil.copyfile(FOLDER / name, folder / name)


def main() -> None:
    training = tyro.cli(Training, description=__doc__)
    print(training, flush=True)
    train(training)


if __name__ == "__main__":
    main()
