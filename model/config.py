"""ModelConfig: the architecture and shape of a decoder-only model, read from a Hugging Face `config.json`.

Checkpoints differ only by the values in here. What a checkpoint asks for and the model does not implement
(sliding windows, biases, experts, other rope scalings) is refused by name: a silent approximation would look
like a bad model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.architecture import ARCHITECTURES


class UnsupportedModelError(ValueError):
    """The checkpoint's config asks for something that this model does not implement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's rotary scaling: long wavelengths are stretched by `factor`, short ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_context: int


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
    rope_scaling: Llama3Scaling | None = None
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

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Reads `config.json`, and the end-of-sequence ids of `generation_config.json` where there is one."""
        config = json.loads((folder / "config.json").read_text())
        config.setdefault("_name_or_path", folder.name)
        generation = folder / "generation_config.json"
        if generation.exists():
            ids = _as_ids(json.loads(generation.read_text()).get("eos_token_id"))
            config["eos_token_id"] = [*dict.fromkeys((*_as_ids(config.get("eos_token_id")), *ids))]
        return cls.from_hf(config)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Reads a Hugging Face config of one of ARCHITECTURES, as transformers 4 and 5 write it.

        Raises UnsupportedModelError, naming every key at fault at once.
        """
        _refuse_unsupported(config)
        heads = config["num_attention_heads"]
        theta, scaling = _rotary(config)
        taper = config.get("taper", {})
        return cls(
            name=config.get("_name_or_path") or config["model_type"],
            architecture=config["model_type"],
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate_size=config["intermediate_size"],
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            tie_embeddings=config.get("tie_word_embeddings", False),
            max_context=config["max_position_embeddings"],
            eos_ids=_as_ids(config.get("eos_token_id")),
            bos_id=config.get("bos_token_id"),
            join=taper.get("join", "reprefill"),
            tag_grammar=taper.get("tag_grammar"),
        )

    def to_hf(self) -> dict[str, Any]:
        """The same model as a `config.json`, readable by transformers 4 and 5 and by `from_hf`."""
        scaling = self.rope_scaling and {
            "rope_type": "llama3",
            "factor": self.rope_scaling.factor,
            "low_freq_factor": self.rope_scaling.low_freq_factor,
            "high_freq_factor": self.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": self.rope_scaling.original_max_context,
        }
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
            "max_position_embeddings": self.max_context,
            "eos_token_id": list(self.eos_ids) or None,
            "bos_token_id": self.bos_id,
            "taper": {"join": self.join, "tag_grammar": self.tag_grammar},
        }


def _as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _rotary(config: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    # transformers 5 keeps base and scaling together in rope_parameters; 4 kept them at the top level.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if rope.get("rope_type", rope.get("type", "default")) != "llama3":
        return theta, None
    return theta, Llama3Scaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_context=rope["original_max_position_embeddings"],
    )


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Lists everything in the config that would need code which this model does not have."""
    faults = []
    if config.get("model_type") not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        faults.append(f"model_type {config.get('model_type')!r} (supported: {known})")
    if config.get("hidden_act", "silu") != "silu":
        faults.append(f"hidden_act {config['hidden_act']!r} (supported: silu)")
    for flag in ("attention_bias", "mlp_bias", "use_sliding_window", "quantization_config"):
        if config.get(flag):
            faults.append(f"{flag} {config[flag]!r}")
    if "sliding_attention" in (config.get("layer_types") or ()):
        faults.append("layer_types with sliding_attention")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        faults.append(f"rope scaling {kind!r} (supported: default, llama3)")
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        faults.append(f"partial_rotary_factor {partial}")
    if faults:
        raise UnsupportedModelError("this checkpoint needs what is not implemented: " + "; ".join(faults))


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


# The dense models as published: https://huggingface.co/collections/Qwen/qwen3
PRESETS: dict[str, ModelConfig] = {
    preset.name: preset
    for preset in (
        _qwen3("0.6b", 1024, 28, 16, 3072, tied=True),
        _qwen3("1.7b", 2048, 28, 16, 6144, tied=True),
        _qwen3("4b", 2560, 36, 32, 9728, tied=True),
        _qwen3("8b", 4096, 36, 32, 12288, tied=False),
        _qwen3("14b", 5120, 40, 40, 17408, tied=False),
        _qwen3("32b", 5120, 64, 64, 25600, tied=False),
    )
}
