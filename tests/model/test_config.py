"""A config says exactly which model it is, and refuses by name what the model does not implement."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.architecture import ARCHITECTURES, Architecture
from model.config import PRESETS, Llama3Scaling, ModelConfig, UnsupportedModelError
from model.decoder import Decoder
from model.weights import parameters

# Parameters of the published checkpoints, a tied head counted once.
PUBLISHED_PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}

LLAMA = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_presets_have_the_published_number_of_parameters() -> None:
    for name, published in PUBLISHED_PARAMETERS.items():
        weights = Decoder(PRESETS[name], np.float32).split()[1]
        assert sum(int(np.prod(weight.shape)) for weight in weights) == published, name
    assert PRESETS.keys() == PUBLISHED_PARAMETERS.keys()


@pytest.mark.parametrize(
    "config",
    [
        PRESETS["qwen3-0.6b"],
        replace(PRESETS["qwen3-8b"], join="kv", tag_grammar="multiverse"),
        replace(
            PRESETS["qwen3-8b"],
            architecture="llama",
            rms_norm_eps=1e-5,
            max_context=8192,
            bos_id=None,
            rope_scaling=Llama3Scaling(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_context=8192
            ),
        ),
    ],
)
def test_a_config_survives_its_hugging_face_form(config: ModelConfig) -> None:
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_a_llama_config_is_of_its_architecture_and_has_its_own_rotary_base() -> None:
    config = ModelConfig.from_hf(LLAMA)
    assert config.architecture == "llama"
    assert config.rope_theta == 100000.0
    assert config.head_dim == 64
    assert (config.bos_id, config.eos_ids) == (1, (2,))


def test_what_a_config_leaves_out_is_what_transformers_takes_it_for() -> None:
    optional = (
        "num_key_value_heads",
        "head_dim",
        "rope_theta",
        "rms_norm_eps",
        "tie_word_embeddings",
        "eos_token_id",
    )
    config = ModelConfig.from_hf({key: value for key, value in LLAMA.items() if key not in optional})
    assert config.num_kv_heads == config.num_heads
    assert config.head_dim == config.hidden_size // config.num_heads
    assert (config.rope_theta, config.rms_norm_eps) == (10_000.0, 1e-6)
    assert not config.tie_embeddings
    assert config.eos_ids == ()


def test_rotary_settings_are_read_as_either_major_version_of_transformers_writes_them() -> None:
    old = ModelConfig.from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING})
    without_theta = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    new = ModelConfig.from_hf(
        without_theta | {"rope_parameters": LLAMA3_SCALING | {"rope_theta": 5e5}},
    )
    assert old == new
    assert old.rope_theta == 5e5
    assert old.rope_scaling is not None
    assert old.rope_scaling.original_max_context == 8192


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_key_value_heads": 2}, "9 query heads"),
        ({"taper": {"join": "merge"}}, "merge"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(extra: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        ModelConfig.from_hf(LLAMA | extra)


def test_an_architecture_that_is_not_in_the_table_is_refused_with_those_that_are() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' \(supported: qwen3, llama\)"):
        replace(PRESETS["qwen3-0.6b"], architecture="gpt2")


def test_queries_and_keys_are_normalized_in_qwen3_alone() -> None:
    assert [name for name, architecture in ARCHITECTURES.items() if architecture.qk_norm] == ["qwen3"]


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_decoder_has_what_its_architecture_has(architecture: Architecture) -> None:
    config = replace(PRESETS["qwen3-0.6b"], architecture=architecture.name, num_layers=1)
    names = {".".join(map(str, path)) for path, _ in parameters(Decoder(config, np.float32))}
    assert ("layers.0.attention.q_norm.scale" in names) == architecture.qk_norm
    assert ("layers.0.attention.k_norm.scale" in names) == architecture.qk_norm
    assert config.to_hf()["architectures"] == [architecture.hf_class]


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(UnsupportedModelError, match=r"gelu.*attention_bias.*yarn"):
        ModelConfig.from_hf(
            LLAMA | {"hidden_act": "gelu", "attention_bias": True, "rope_scaling": {"rope_type": "yarn"}}
        )


def test_a_folder_adds_the_end_tokens_of_its_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    config = ModelConfig.from_folder(tmp_path)
    assert config.eos_ids == (2, 7, 9)
    assert config.name == tmp_path.name
