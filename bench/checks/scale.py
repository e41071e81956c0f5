"""Scale: the models and lengths that `bench.checks.model` runs with, on a GPU or anywhere."""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig

PAGE = 64  # tokens of a KV page


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Sizes of all checks.

    greedy          a model for each head size
    prompts         lengths of the greedy prompts; each has `branches` branches of `new_tokens`
    rows            the step program's bucket
    trunk, tail     tokens of a request before its fork, and of each branch after it
    """

    greedy: tuple[ModelConfig, ...]
    prompts: tuple[int, ...]
    branches: int
    new_tokens: int
    logits: ModelConfig
    rows: int
    trunk: int
    tail: int
    requests: int
    width: int = 3


def _config(name: str, vocab: int, hidden: int, layers: int, heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        name=name,
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads // 2,
        head_dim=head_dim,
        intermediate_size=3 * hidden,
        rope_theta=1e6,
        max_context=4096,
    )


SCALES = {
    "full": Scale(
        greedy=tuple(_config(f"greedy, head size {size}", 1000, 256, 4, 8, size) for size in (64, 128)),
        prompts=(1, 3, 17, 64, 129, 300),
        branches=3,
        new_tokens=64,
        logits=_config("8 layers of 1024", 32768, 1024, 8, 16, 128),
        rows=128,
        trunk=300,
        tail=100,
        requests=3,
    ),
    "tiny": Scale(
        greedy=(_config("greedy, head size 16", 131, 64, 2, 4, 16),),
        prompts=(1, 9, 20),
        branches=2,
        new_tokens=8,
        logits=_config("2 layers of 128", 512, 128, 2, 4, 32),
        rows=32,
        trunk=24,
        tail=8,
        requests=2,
        width=2,
    ),
}
