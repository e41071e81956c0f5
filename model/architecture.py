"""Architectures: what the decoders of one family have that those of another do not.

All families share one decoder (model/decoder.py): RMSNorm before each half of a layer, rotary positions,
grouped queries, a SwiGLU. A family of checkpoints is a line here, and model/layers.py does what it says.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One family of checkpoints.

    name      its `model_type` in a Hugging Face `config.json`
    hf_class  transformers' class for it
    qk_norm   whether each head's queries and keys are normalized before they are turned to their positions
    qkv_bias  whether queries, keys and values have a bias
    head_dim  what a config that names none means; None: hidden size / heads
    kv_heads  what a config that names none means; None: as many as query heads
    """

    name: str
    hf_class: str
    qk_norm: bool = False
    qkv_bias: bool = False
    head_dim: int | None = None
    kv_heads: int | None = None


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(name="qwen3", hf_class="Qwen3ForCausalLM", qk_norm=True, head_dim=128, kv_heads=32),
        Architecture(name="qwen2", hf_class="Qwen2ForCausalLM", qkv_bias=True, kv_heads=32),
        Architecture(name="llama", hf_class="LlamaForCausalLM"),
    )
}
