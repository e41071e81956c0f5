"""A Hugging Face `config.json` as a ModelConfig.

What a checkpoint asks for and the model does not implement (sliding windows, other biases, experts, other
rope scalings) is refused by name: a silent approximation would look like a bad model. docs/checkpoints.md is
the table of what is read, what wins where two keys disagree, and what is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.architecture import ARCHITECTURES, Architecture
from model.config import ModelConfig, UnsupportedModelError
from model.rotary import (
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
    stretched_context,
    yarn_attention_factor,
)
from model.settings import MOST, CheckpointError, Settings, listed, read_object, read_optional, shown

_MOST_LAYERS = 1024
_THETA = 10_000.0  # transformers' base where a config names none


def read_folder(folder: Path) -> ModelConfig:
    """Reads `config.json`, and the end-of-sequence ids of `generation_config.json` where there is one.

    Raises CheckpointError, or UnsupportedModelError, in a line that names every key at fault.
    """
    path, beside = folder / "config.json", folder / "generation_config.json"
    values, source = read_object(path), str(path)
    config = read_config({"_name_or_path": folder.name} | values, source)
    generation = Settings(read_optional(beside), str(beside))
    ids = (*config.eos_ids, *generation.ids("eos_token_id"))
    if generation.faults:
        raise CheckpointError(listed(generation.faults))
    return replace(config, eos_ids=tuple(dict.fromkeys(ids)))


def read_config(values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads a Hugging Face config of one of ARCHITECTURES, as transformers 4 and 5 write it; `source` is its
    name in errors. Raises as `read_folder` does."""
    settings = Settings(values, source)
    architecture, needs = _architecture(settings)
    needs += _unsupported(settings, architecture)
    theta, scaling = _rotary(settings, needs)
    fields = {**_sizes(settings, architecture), **_ids_and_names(settings, architecture)}
    max_positions = fields["max_context"]
    faults = [f"{source} needs what is not implemented: {'; '.join(needs)}"] if needs else []
    faults += settings.faults
    if faults:
        raise (UnsupportedModelError if needs else CheckpointError)(listed(faults))
    fields["max_context"] = stretched_context(scaling, max_positions)
    if fields["max_context"] > MOST:
        raise CheckpointError(f"{source}: expected a context of at most {MOST} tokens, stretched, found more")
    try:
        return ModelConfig(architecture=architecture.name, rope_theta=theta, rope_scaling=scaling, **fields)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{source}: {error}") from error


def _architecture(settings: Settings) -> tuple[Architecture, list[str]]:
    """The config's architecture, or any one and why its own is refused."""
    known = ", ".join(ARCHITECTURES)
    name = settings.get("model_type")
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        return next(iter(ARCHITECTURES.values())), [f"model_type {shown(name)} (supported: {known})"]
    classes = settings.texts("architectures")
    if classes and architecture.hf_class not in classes:
        return architecture, [f"architectures {shown(list(classes))} (supported: {architecture.hf_class})"]
    return architecture, []


def _sizes(settings: Settings, architecture: Architecture) -> dict[str, Any]:
    heads, hidden = settings.size("num_attention_heads"), settings.size("hidden_size")
    if architecture.head_dim is None and "head_dim" not in settings and hidden % heads:
        settings.fault("hidden_size", f"a multiple of num_attention_heads {heads}, or a head_dim")
    return {
        "vocab_size": settings.size("vocab_size"),
        "hidden_size": hidden,
        "num_layers": settings.size("num_hidden_layers", most=_MOST_LAYERS),
        "num_heads": heads,
        "num_kv_heads": settings.size("num_key_value_heads", architecture.kv_heads or heads),
        "head_dim": settings.size("head_dim", architecture.head_dim or max(1, hidden // heads)),
        "intermediate_size": settings.size("intermediate_size"),
        "rms_norm_eps": settings.number("rms_norm_eps", 1e-6, or_equal=True),
        "tie_embeddings": settings.flag("tie_word_embeddings"),
        "max_context": settings.size("max_position_embeddings"),
    }


def _ids_and_names(settings: Settings, architecture: Architecture) -> dict[str, Any]:
    taper = settings.section("taper")
    bos = settings.ids("bos_token_id")
    return {
        "name": settings.text("_name_or_path") or architecture.name,
        "eos_ids": settings.ids("eos_token_id"),
        "bos_id": bos[0] if bos else None,
        "join": taper.text("join", "reprefill"),
        "tag_grammar": taper.text("tag_grammar"),
    }


def _unsupported(settings: Settings, architecture: Architecture) -> list[str]:
    """Everything in the config that would need code which this model does not have, but for the rotary."""
    needs = []
    if settings.text("hidden_act", "silu") not in ("silu", None):
        needs.append(f"hidden_act {shown(settings.get('hidden_act'))} (supported: silu)")
    # Qwen2's biases are part of its architecture: transformers does not read the flag there.
    for name in ("mlp_bias", "use_sliding_window", *(() if architecture.qkv_bias else ("attention_bias",))):
        if settings.flag(name):
            needs.append(f"{name} true")
    for name in ("quantization_config", "compression_config"):
        section = settings.section(name)
        if name in settings:
            needs.append(f"{name} with quant_method {shown(section.get('quant_method'))}")
    other = sorted(set(settings.texts("layer_types")) - {"full_attention"})
    if other:
        needs.append(f"layer_types with {', '.join(map(shown, other))}")
    return needs


# --- rotary positions --------------------------------------------------------------------------------------


def _rotary(settings: Settings, needs: list[str]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, by the rules of transformers 5: see `_rope`."""
    rope = _rope(settings, needs)
    top = settings.number("rope_theta", _THETA, above=1.0)
    theta = rope.number("rope_theta", top, above=1.0)
    for place in (rope, settings):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            needs.append(f"partial_rotary_factor {shown(place.get('partial_rotary_factor'))}")
    kind = rope.text("rope_type") or rope.text("type") or "default"
    read = {"default": lambda *_: None, "linear": _linear, "llama3": _llama3, "yarn": _yarn}.get(kind)
    if read is None:
        needs.append(f"rope scaling {shown(kind)} (supported: default, linear, llama3, yarn)")
        return theta, None
    return theta, read(rope, settings)


def _rope(settings: Settings, needs: list[str]) -> Settings:
    """`rope_scaling` where it holds anything, else `rope_parameters`.

    transformers 5 takes the older key whole where a config has both, and would so forget a `rope_theta` that
    stands in the newer one alone: that is refused.
    """
    new, old = settings.section("rope_parameters"), settings.section("rope_scaling")
    if "full_attention" in new or "full_attention" in old:
        needs.append("rope_parameters for each type of layer")
    if not settings.get("rope_scaling"):
        return new
    if "rope_theta" in new and "rope_theta" not in old and "rope_theta" not in settings:
        old.fault("rope_theta", f"the {shown(new.get('rope_theta'))} of rope_parameters, which it overrides")
    return old


def _original_context(rope: Settings, settings: Settings) -> int:
    """The context before it was stretched; where a config has the key outside, too, that one counts."""
    own = rope.size("original_max_position_embeddings", settings.size("max_position_embeddings"))
    return settings.size("original_max_position_embeddings", own)


def _factor(rope: Settings) -> float:
    factor = rope.number("factor")
    if factor < 1:
        rope.fault("factor", "a number of at least 1")
    return max(factor, 1.0)


def _linear(rope: Settings, settings: Settings) -> LinearScaling:
    del settings
    return LinearScaling(factor=_factor(rope))


def _llama3(rope: Settings, settings: Settings) -> Llama3Scaling:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        rope.fault("high_freq_factor", f"more than low_freq_factor {low:g}")
    return Llama3Scaling(
        factor=_factor(rope),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_context=_original_context(rope, settings),
    )


def _yarn(rope: Settings, settings: Settings) -> YarnScaling:
    original = _original_context(rope, settings)
    stretched = settings.size("max_position_embeddings") / original
    factor = _factor(rope) if "factor" in rope or stretched < 1 else stretched
    mscale, mscale_all_dim = (rope.number(k) if rope.get(k) else None for k in ("mscale", "mscale_all_dim"))
    fast = rope.number("beta_fast") if rope.get("beta_fast") else 32.0  # 0 counts as not given
    slow = rope.number("beta_slow") if rope.get("beta_slow") else 1.0
    if fast < slow:
        rope.fault("beta_fast", f"at least beta_slow {slow:g}")
    return YarnScaling(
        factor=factor,
        original_max_context=original,
        attention_factor=rope.number(
            "attention_factor", yarn_attention_factor(factor, mscale, mscale_all_dim)
        ),
        beta_fast=fast,
        beta_slow=slow,
        truncate=rope.flag("truncate", default=True),
    )
