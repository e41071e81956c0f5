"""Small random checkpoints that anyone can make again, and the goldens recorded from them.

A checkpoint is a recipe: NumPy's frozen RandomState stream makes its weights, `save_hf` writes them. A
golden holds what transformers computed from it: logits at some positions, and the greedy continuation of a
prompt (`make test-oracle RECORD=1` records them again). Where a context is stretched, prompts of other
lengths have continuations, too: they end before, at and after the end of the original context.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from model.config import ModelConfig
from model.decoder import Decoder
from model.hf_tensor import Source
from model.rotary import LinearScaling, Llama3Scaling, YarnScaling, yarn_attention_factor
from model.weights import parameters, save_hf

GOLDENS = Path(__file__).parent / "goldens"
PROMPT_TOKENS = 24
GREEDY_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A recipe: what `write` puts into a folder, and which prompt the golden continues."""

    config: ModelConfig
    dtype: Any = np.float32
    shards: int = 1
    seed: int = 0
    lengths: tuple[int, ...] = ()

    @property
    def prompt(self) -> list[int]:
        return self.prompt_of(PROMPT_TOKENS)

    def prompt_of(self, length: int) -> list[int]:
        stream = np.random.RandomState(self.seed)
        return stream.randint(0, self.config.vocab_size, length).tolist()

    def tensors(self) -> dict[str, np.ndarray]:
        """The weights under Hugging Face's names; of a scale at which greedy choices are clear-cut."""
        tensors = {}
        for path, param in parameters(Decoder(self.config, np.float32)):
            (tensor,) = Source.of(path, param).tensors
            stream = np.random.RandomState(zlib.crc32(tensor.name.encode()) ^ self.seed)
            values = stream.standard_normal(tensor.shape)
            if tensor.name.endswith(".bias"):
                values *= 0.5
            elif len(tensor.shape) == 1:
                values = 1 + 0.1 * values
            else:
                values *= 2.0 * tensor.shape[1] ** -0.5
            tensors[tensor.name] = values.astype(self.dtype)
        return tensors

    def write(self, folder: Path) -> Path:
        save_hf(folder, self.config, self.tensors(), shards=self.shards)
        return folder


@dataclass(frozen=True, slots=True)
class Golden:
    """What transformers computed in float32: logits [positions, vocab], and the greedy continuation.

    further  continuations of the prompts of the checkpoint's other lengths, [lengths, tokens]
    """

    positions: np.ndarray
    logits: np.ndarray
    greedy: np.ndarray
    further: np.ndarray = field(default_factory=lambda: np.zeros((0, GREEDY_TOKENS), np.int32))

    @classmethod
    def load(cls, name: str) -> Golden:
        with np.load(GOLDENS / f"{name}.npz") as stored:
            return cls(**stored)

    def save(self, name: str) -> None:
        arrays = {"positions": self.positions, "logits": self.logits, "greedy": self.greedy}
        if len(self.further):
            arrays["further"] = self.further
        np.savez_compressed(GOLDENS / f"{name}.npz", **arrays)

    def continuations(self, checkpoint: Checkpoint) -> list[tuple[list[int], list[int]]]:
        """Every prompt of the checkpoint, with what follows it."""
        lengths = (PROMPT_TOKENS, *checkpoint.lengths)
        answers = (self.greedy, *self.further)
        return [
            (checkpoint.prompt_of(length), answer.tolist())
            for length, answer in zip(lengths, answers, strict=True)
        ]


_QWEN3 = ModelConfig(
    name="qwen3-golden",
    vocab_size=259,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    rope_theta=1e6,
    tie_embeddings=True,
    max_context=512,
)
_QWEN2 = replace(_QWEN3, name="qwen2-golden", architecture="qwen2")
_LLAMA = replace(_QWEN3, name="llama-golden", architecture="llama", rms_norm_eps=1e-5)

CHECKPOINTS = {
    "qwen3-gqa1-tied": Checkpoint(config=replace(_QWEN3, num_kv_heads=4), seed=3),
    "qwen3-gqa2-untied-wide-heads-bf16": Checkpoint(
        config=replace(_QWEN3, head_dim=24, tie_embeddings=False), dtype=ml_dtypes.bfloat16, seed=3
    ),
    "qwen3-gqa8-untied-sharded": Checkpoint(
        config=replace(_QWEN3, num_heads=8, num_kv_heads=1, tie_embeddings=False), shards=3
    ),
    "qwen3-gqa8-tied-narrow-heads-f16": Checkpoint(
        config=replace(_QWEN3, num_heads=8, num_kv_heads=1, head_dim=6, vocab_size=321),
        dtype=np.float16,
        shards=2,
        seed=8,
    ),
    "llama-gqa3-tied": Checkpoint(
        config=replace(_LLAMA, num_heads=6, hidden_size=96, num_kv_heads=2, rope_theta=1e5), seed=5
    ),
    "llama3-scaled-untied-bf16": Checkpoint(
        config=replace(
            _LLAMA,
            tie_embeddings=False,
            rope_theta=5e5,
            rope_scaling=Llama3Scaling(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_context=64
            ),
        ),
        dtype=ml_dtypes.bfloat16,
        seed=3,
    ),
    "qwen2-gqa2-tied": Checkpoint(config=_QWEN2, seed=2),
    "qwen2-gqa8-untied-sharded-bf16": Checkpoint(
        config=replace(_QWEN2, num_heads=8, num_kv_heads=1, head_dim=8, tie_embeddings=False),
        dtype=ml_dtypes.bfloat16,
        shards=3,
        seed=4,
    ),
    # Original contexts end at position 64: prompts of 24 and 60 tokens are continued across it, those of 64
    # and 130 beyond it.
    "qwen3-yarn": Checkpoint(
        config=replace(
            _QWEN3,
            rope_theta=1e4,
            rope_scaling=YarnScaling(
                factor=4.0, original_max_context=64, attention_factor=yarn_attention_factor(4.0)
            ),
            max_context=256,
        ),
        lengths=(60, 64, 130),
        seed=6,
    ),
    "qwen2-yarn-untruncated": Checkpoint(
        config=replace(
            _QWEN2,
            rope_theta=1e4,
            rope_scaling=YarnScaling(
                factor=4.0,
                original_max_context=64,
                attention_factor=1.3,
                beta_fast=8.0,
                beta_slow=0.5,
                truncate=False,
            ),
            max_context=256,
        ),
        lengths=(60, 64, 130),
        seed=7,
    ),
    "llama-linear": Checkpoint(
        config=replace(_LLAMA, rope_theta=1e4, rope_scaling=LinearScaling(factor=4.0), max_context=256),
        lengths=(60, 64, 130),
        seed=9,
    ),
    "llama3-scaled-long": Checkpoint(
        config=replace(
            _LLAMA,
            rope_theta=5e5,
            rope_scaling=Llama3Scaling(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_context=64
            ),
        ),
        lengths=(60, 64, 130),
        seed=10,
    ),
}
