"""A config says exactly which model it is, and refuses by name what the model does not implement."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.architecture import ARCHITECTURES, Architecture
from model.config import PRESETS, ModelConfig, UnsupportedModelError
from model.decoder import Decoder
from model.hf_config import read_config, read_folder
from model.rotary import LinearScaling, Llama3Scaling, YarnScaling, yarn_attention_factor
from model.settings import MOST, CheckpointError
from model.weights import parameters

# Parameters of the published checkpoints, a tied head counted once.
PUBLISHED_PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
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
        PRESETS["qwen2.5-32b"],
        replace(PRESETS["qwen3-8b"], rope_scaling=LinearScaling(factor=4.0), max_context=163840),
        replace(PRESETS["qwen2.5-7b"], rope_scaling=LinearScaling(factor=4 / 3), max_context=1333),
        replace(
            PRESETS["qwen2.5-32b"],
            rope_scaling=YarnScaling(
                factor=4.0, original_max_context=32768, attention_factor=1.1, beta_fast=16.0, truncate=False
            ),
            max_context=131072,
        ),
    ],
)
def test_a_config_survives_its_hugging_face_form(config: ModelConfig) -> None:
    assert read_config(json.loads(json.dumps(config.to_hf()))) == config


def test_a_llama_config_is_of_its_architecture_and_has_its_own_rotary_base() -> None:
    config = read_config(LLAMA)
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
    config = read_config({key: value for key, value in LLAMA.items() if key not in optional})
    assert config.num_kv_heads == config.num_heads
    assert config.head_dim == config.hidden_size // config.num_heads
    assert (config.rope_theta, config.rms_norm_eps) == (10_000.0, 1e-6)
    assert not config.tie_embeddings
    assert config.eos_ids == ()


def test_rotary_settings_are_read_as_either_major_version_of_transformers_writes_them() -> None:
    old = read_config(LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING})
    without_theta = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    new = read_config(
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
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e6}}, "mrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "each type of layer"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_key_value_heads": 2}, "9 query heads"),
        ({"taper": {"join": "merge"}}, "merge"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(extra: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        read_config(LLAMA | extra)


def test_an_architecture_that_is_not_in_the_table_is_refused_with_those_that_are() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' \(supported: qwen3, qwen2, llama\)"):
        replace(PRESETS["qwen3-0.6b"], architecture="gpt2")


def test_queries_and_keys_are_normalized_in_qwen3_alone_and_have_biases_in_qwen2() -> None:
    assert [name for name, architecture in ARCHITECTURES.items() if architecture.qk_norm] == ["qwen3"]
    assert [name for name, architecture in ARCHITECTURES.items() if architecture.qkv_bias] == ["qwen2"]


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_decoder_has_what_its_architecture_has(architecture: Architecture) -> None:
    config = replace(PRESETS["qwen3-0.6b"], architecture=architecture.name, num_layers=1)
    names = {".".join(map(str, path)) for path, _ in parameters(Decoder(config, np.float32))}
    assert ("layers.0.attention.q_norm.scale" in names) == architecture.qk_norm
    assert ("layers.0.attention.k_norm.scale" in names) == architecture.qk_norm
    for bias in ("q_bias", "k_bias", "v_bias"):
        assert (f"layers.0.attention.{bias}" in names) == architecture.qkv_bias
    assert config.to_hf()["architectures"] == [architecture.hf_class]


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(UnsupportedModelError, match=r"gelu.*attention_bias.*longrope.*hidden_size"):
        read_config(
            LLAMA
            | {"hidden_act": "gelu", "attention_bias": True, "rope_scaling": {"rope_type": "longrope"}}
            | {"hidden_size": "576"}
        )


def test_a_folder_adds_the_end_tokens_of_its_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    config = read_folder(tmp_path)
    assert config.eos_ids == (2, 7, 9)
    assert config.name == tmp_path.name


# Qwen2.5-32B as published, which Multiverse-32B is made of; the keys that say nothing new are left out.
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "max_position_embeddings": 32768,
    "max_window_layers": 70,
    "model_type": "qwen2",
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def test_the_published_qwen2_is_the_preset() -> None:
    preset = PRESETS["qwen2.5-32b"]
    assert replace(read_config(QWEN2), name=preset.name, eos_ids=preset.eos_ids) == preset
    assert read_config(QWEN2 | {"attention_bias": False}) == read_config(QWEN2 | {"attention_bias": True})


def test_a_qwen3_that_names_no_head_size_has_heads_of_128_as_in_transformers() -> None:
    config = PRESETS["qwen3-0.6b"].to_hf()
    del config["head_dim"]
    assert read_config(config).head_dim == 128
    assert read_config(QWEN2).head_dim == 5120 // 40
    assert (
        read_config(
            {k: v for k, v in QWEN2.items() if k != "num_key_value_heads"} | {"num_attention_heads": 64}
        ).num_kv_heads
        == 32
    )


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, {}),
        ({"factor": 2.0}, {"factor": 2.0}),
        ({"attention_factor": 1.5}, {"attention_factor": 1.5}),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, {"attention_factor": yarn_attention_factor(4.0, 1.0, 0.5)}),
        ({"mscale": 0.7}, {}),
        (
            {"beta_fast": 16, "beta_slow": 2, "truncate": False},
            {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        ),
        ({"beta_fast": 0, "beta_slow": None}, {}),
        ({"rope_type": "yarn", "type": "linear"}, {}),
        ({"original_max_position_embeddings": None}, {}),
        ({"original_max_position_embeddings": 16384}, {"original_max_context": 16384}),
        (
            {"factor": None, "original_max_position_embeddings": 16384},
            {"factor": 2.0, "original_max_context": 16384},
        ),
    ],
)
def test_yarn_is_read_as_transformers_reads_it(extra: dict[str, Any], expected: dict[str, Any]) -> None:
    scaling = read_config(QWEN2 | {"rope_scaling": YARN | extra}).rope_scaling
    fields = {"factor": 4.0, "original_max_context": 32768} | expected
    fields.setdefault("attention_factor", yarn_attention_factor(fields["factor"]))
    assert scaling == YarnScaling(**fields)


def test_yarns_attention_factor_is_that_of_its_paper() -> None:
    assert yarn_attention_factor(4.0) == pytest.approx(0.1 * np.log(4.0) + 1)
    assert yarn_attention_factor(1.0) == 1.0
    both = (0.1 * np.log(40) + 1) / (0.1 * 0.5 * np.log(40) + 1)
    assert yarn_attention_factor(40.0, 1.0, 0.5) == pytest.approx(both)


def test_an_original_context_beside_the_rotary_settings_counts() -> None:
    config = read_config(QWEN2 | {"rope_scaling": YARN, "original_max_position_embeddings": 8192})
    assert isinstance(config.rope_scaling, YarnScaling)
    assert config.rope_scaling.original_max_context == 8192


@pytest.mark.parametrize(
    ("extra", "context"),
    [
        ({}, 32768),
        ({"rope_scaling": YARN}, 131072),
        ({"rope_scaling": YARN, "max_position_embeddings": 131072}, 131072),
        ({"rope_scaling": YARN, "max_position_embeddings": 40960}, 131072),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 81920),
        ({"rope_scaling": LLAMA3_SCALING, "max_position_embeddings": 131072}, 131072),
    ],
)
def test_the_longest_context_is_the_stretched_one(extra: dict[str, Any], context: int) -> None:
    assert read_config(QWEN2 | extra).max_context == context


@pytest.mark.parametrize(
    ("extra", "theta", "factor"),
    [
        ({"rope_parameters": {"rope_theta": 5e5}}, 5e5, None),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 1e6, 2.0),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 3}}, 1e6, 3.0),
        (
            {
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
                "rope_scaling": {},
            },
            5e5,
            2.0,
        ),
        # both: the older key is taken whole, and a base inside of it before the one beside it
        (
            {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "linear", "factor": 3.0}},
            1e6,
            3.0,
        ),
        (
            {
                "rope_parameters": {"rope_theta": 5e5},
                "rope_scaling": {"type": "linear", "factor": 3.0, "rope_theta": 4e5},
            },
            4e5,
            3.0,
        ),
    ],
)
def test_of_two_rotary_keys_the_one_counts_that_transformers_5_takes(
    extra: dict[str, Any], theta: float, factor: float | None
) -> None:
    config = read_config(QWEN2 | extra)
    assert config.rope_theta == theta
    assert config.rope_scaling == (factor and LinearScaling(factor=factor))


def test_a_rotary_base_that_transformers_would_forget_is_refused() -> None:
    without = {key: value for key, value in QWEN2.items() if key != "rope_theta"}
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN}
    with pytest.raises(
        CheckpointError, match=r"rope_scaling: rope_theta: expected the 1000000\.0 of rope_parameters"
    ):
        read_config(without | both)


def test_a_model_may_have_a_thousand_layers_and_no_more() -> None:
    assert read_config(LLAMA | {"num_hidden_layers": 1024}).num_layers == 1024
    with pytest.raises(CheckpointError, match="num_hidden_layers: expected a whole number from 1 to 1024"):
        read_config(LLAMA | {"num_hidden_layers": 1025})


def test_of_several_begin_tokens_the_first_counts() -> None:
    assert read_config(LLAMA | {"bos_token_id": [5, 6]}).bos_id == 5
    assert read_config(LLAMA | {"bos_token_id": None}).bos_id is None


def test_a_context_has_as_many_positions_as_the_device_can_count() -> None:
    longest = LLAMA | {"max_position_embeddings": MOST}
    assert read_config(longest).max_context == MOST
    with pytest.raises(CheckpointError, match="a context of at most 2147483647 tokens, stretched"):
        read_config(longest | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}})


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        (LLAMA3_SCALING | {"low_freq_factor": 4.0}, "high_freq_factor: expected more than low_freq_factor 4"),
        (YARN | {"beta_fast": 2, "beta_slow": 3}, "beta_fast: expected at least beta_slow 3"),
        (YARN | {"beta_fast": 2, "beta_slow": 2}, None),
        (YARN | {"factor": None}, "factor: expected a number"),  # 8192 of 32768: no stretching to be told
        (YARN | {"factor": 0.5}, "factor: expected a number of at least 1"),
        (YARN | {"factor": 1.0}, None),
    ],
)
def test_a_scaling_has_to_stretch_what_it_says(scaling: dict[str, Any], named: str | None) -> None:
    config = LLAMA | {"rope_scaling": scaling}
    if named is None:
        assert read_config(config).rope_scaling is not None
    else:
        with pytest.raises(CheckpointError, match=named):
            read_config(config)
