"""Questions as the model reads them: rendered, tokenized and packed. Deterministic by seed and number."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from model.tiny.layout import Rows, Rule, Tokens, lay_out, pack
from model.tiny.tasks import Task, write_task
from model.tokenizer import Tokenizer

FOLDER = Path(__file__).parent
TOKENS_PER_TASK = 430  # on average, and a little more: what rows are filled by


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(FOLDER)


def prompt(question: str) -> str:
    """A question as a chat, up to where the answer begins."""
    return tokenizer().render_chat([{"role": "user", "content": question}])


def sequence(task: Task, rule: Rule = "trained") -> Tokens:
    return lay_out(prompt(task.question), task.answer, tokenizer().encode, rule)


def draw_rows(seed: int, number: int, *, rows: int, length: int) -> Rows:
    """Batch `number` of a seed's training questions."""
    count = rows * length // TOKENS_PER_TASK
    tasks = (write_task(seed, number * count + index) for index in range(count))
    sequences = [tokens for tokens in map(sequence, tasks) if len(tokens.tokens) <= length]
    return pack(sequences, length).resized(rows)
