"""How often the default model is right: `python -m model.tiny.measure`, by kind of question and by rule.

One forward pass over the right answer tells it: the model would give that answer, greedily, if and only if
each token of it is its first choice after those before. So it costs no decoding, and wrong positions or
sight can be tried, to show what they do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from safetensors.numpy import load_file

from model.config import ModelConfig
from model.hf_config import read_folder
from model.tiny import dense
from model.tiny.layout import Rows, Rule, pack
from model.tiny.lessons import FOLDER, sequence
from model.tiny.tasks import Task, write_task

HELD_OUT_SEED = 2_000_003


def held_out(count: int) -> list[Task]:
    """Questions that training does not contain, a part of whose words it never shows."""
    return [write_task(HELD_OUT_SEED, index, held_out=True) for index in range(count)]


@dataclass(frozen=True, slots=True)
class Scores:
    """Shares of tokens and of whole answers that are right; answers also by kind of question."""

    tokens: float
    answers: float
    kinds: Mapping[str, float]

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in self.kinds.items())
        return f"tokens {self.tokens:.3%}, answers {self.answers:.1%} ({kinds})"


@partial(jax.jit, static_argnames=("config", "dtype"))
def wrong_choices(weights: dense.Weights, config: ModelConfig, rows: Rows, dtype: Any) -> jax.Array:
    """Where a token that the model has to say is not its first choice, [rows, length]."""
    seen = dense.sight(rows.document, rows.branch)
    logits = dense.logits(weights, config, rows.tokens, rows.positions, seen, dtype)
    return (logits.argmax(-1) != rows.target) & (rows.target >= 0)


def accuracy(
    weights: Mapping[str, Any],
    config: ModelConfig,
    tasks: Sequence[Task],
    rule: Rule = "trained",
    *,
    length: int = 1024,
    dtype: Any = jnp.float32,
) -> Scores:
    """The model's accuracy on `tasks`, its answers laid out by `rule`."""
    rows = pack([sequence(task, rule) for task in tasks], length)
    wrong = np.zeros(len(tasks) + 1, int)
    for row in range(len(rows.tokens)):
        one = Rows(*(array[row : row + 1] for array in rows))
        np.add.at(wrong, one.document, np.asarray(wrong_choices(dict(weights), config, one, dtype)))
    correct: dict[str, list[bool]] = defaultdict(list)
    for task, faults in zip(tasks, wrong[1:], strict=True):
        correct[task.kind].append(not faults)
    return Scores(
        tokens=1 - float(wrong.sum() / (rows.target >= 0).sum()),
        answers=float(np.mean(wrong[1:] == 0)),
        kinds={kind: float(np.mean(correct[kind])) for kind in sorted(correct)},
    )


def load(folder: Path) -> dict[str, np.ndarray]:
    """A model folder's tensors in float32."""
    return {name: value.astype(np.float32) for name, value in load_file(folder / "model.safetensors").items()}


def measure(folder: Path = FOLDER, count: int = 500) -> None:
    """Prints accuracy on held-out questions, as trained and with each rule broken.

    Args:
        folder: Model folder.
        count: Number of questions.
    """
    weights, config, tasks = load(folder), read_folder(folder), held_out(count)
    for rule in get_args(Rule):
        print(f"{rule}: {accuracy(weights, config, tasks, rule)}", flush=True)


if __name__ == "__main__":
    tyro.cli(measure)
