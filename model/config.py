"""ModelConfig: the architecture and shape of a decoder-only model, and the models that are known by a name.

Checkpoints differ only by the values in here. model/hf_config.py reads them from a `config.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.architecture import ARCHITECTURES
from model.rotary import RopeScaling, stated_context
from model.settings import CheckpointError


class UnsupportedModelError(CheckpointError):
    """The checkpoint's config asks for something that this model does not implement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model's architecture, by its name in ARCHITECTURES, and shape. Sizes are in elements, `max_context`
    in tokens.

    `join` is the join the model was trained for ("kv" or "reprefill"), `tag_grammar` the name of the tag
    grammar its own text forks by, or None. Both live under the key "taper" of config.json.
    """

    name: str
    architecture: str = "qwen3"
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    max_context: int
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    join: str = "reprefill"
    tag_grammar: str | None = None

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UnsupportedModelError(f"architecture {self.architecture!r} (supported: {known})")
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly"
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(f"head_dim must be even for rotary positions, not {self.head_dim}")
        if self.join not in ("kv", "reprefill"):
            raise UnsupportedModelError(f'join must be "kv" or "reprefill", not {self.join!r}')

    def to_hf(self) -> dict[str, Any]:
        """The same model as a `config.json`, readable by transformers 4 and 5 and by model/hf_config.py."""
        scaling = self.rope_scaling and self.rope_scaling.to_hf()
        rotary = {"rope_theta": self.rope_theta, **(scaling or {"rope_type": "default"})}
        return {
            "_name_or_path": self.name,
            "architectures": [ARCHITECTURES[self.architecture].hf_class],
            "model_type": self.architecture,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "hidden_act": "silu",
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": rotary,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "attention_bias": False,
            "max_position_embeddings": stated_context(self.rope_scaling, self.max_context),
            "eos_token_id": list(self.eos_ids) or None,
            "bos_token_id": self.bos_id,
            "taper": {"join": self.join, "tag_grammar": self.tag_grammar},
        }


def _qwen3(size: str, hidden: int, layers: int, heads: int, intermediate: int, *, tied: bool) -> ModelConfig:
    return ModelConfig(
        name=f"qwen3-{size}",
        vocab_size=151936,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=intermediate,
        rope_theta=1e6,
        tie_embeddings=tied,
        max_context=40960,
        eos_ids=(151645, 151643),  # <|im_end|>, <|endoftext|>
        bos_id=151643,
    )


def _qwen2_5(
    size: str, hidden: int, layers: int, heads: tuple[int, int], intermediate: int, *, tied: bool = False
) -> ModelConfig:
    return ModelConfig(
        name=f"qwen2.5-{size}",
        architecture="qwen2",
        vocab_size=151936 if tied else 152064,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=hidden // heads[0],
        intermediate_size=intermediate,
        rope_theta=1e6,
        tie_embeddings=tied,
        max_context=32768,
        eos_ids=(151645, 151643),  # <|im_end|>, <|endoftext|>
        bos_id=151643,
    )


# The dense models as published: https://huggingface.co/collections/Qwen/qwen3 and (the instruct models of)
# https://huggingface.co/collections/Qwen/qwen25
PRESETS: dict[str, ModelConfig] = {
    preset.name: preset
    for preset in (
        _qwen3("0.6b", 1024, 28, 16, 3072, tied=True),
        _qwen3("1.7b", 2048, 28, 16, 6144, tied=True),
        _qwen3("4b", 2560, 36, 32, 9728, tied=True),
        _qwen3("8b", 4096, 36, 32, 12288, tied=False),
        _qwen3("14b", 5120, 40, 40, 17408, tied=False),
        _qwen3("32b", 5120, 64, 64, 25600, tied=False),
        _qwen2_5("0.5b", 896, 24, (14, 2), 4864, tied=True),
        _qwen2_5("1.5b", 1536, 28, (12, 2), 8960, tied=True),
        _qwen2_5("3b", 2048, 36, (16, 2), 11008, tied=True),
        _qwen2_5("7b", 3584, 28, (28, 4), 18944),
        _qwen2_5("14b", 5120, 48, (40, 8), 13824),
        _qwen2_5("32b", 5120, 64, (40, 8), 27648),
        _qwen2_5("72b", 8192, 80, (64, 8), 29568),
    )
}
