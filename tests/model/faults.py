"""Everything that can be wrong with a model folder, of which a command has to say in a line what it is.

Each fault belongs to a row of docs/checkpoints.md, and names what the line must hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.tensor_files import INDEX, WHOLE
from tests.model.folders import EMBEDDING, NORM, Folder


@dataclass(frozen=True, slots=True)
class Fault:
    """row: its row in the table; break_: what damages a folder; says: what the line holds, in any order."""

    row: str
    break_: Callable[[Folder], Any]
    says: tuple[str, ...]


def _config(row: str, *says: str, without: tuple[str, ...] = (), **changes: Any) -> Fault:
    return Fault(row, lambda f: f.edit("config.json", *without, **changes), ("config.json", *says))


def _file(row: str, name: str, content: Any, *says: str) -> Fault:
    return Fault(row, lambda f: f.write(name, content), (name, *says))


def _tokenizer_config(row: str, *says: str, **changes: Any) -> Fault:
    says = ("tokenizer_config.json", *says)
    return Fault(row, lambda f: f.edit("tokenizer_config.json", **changes), says)


def _index(row: str, *says: str, **weight_map: Any) -> Fault:
    """An index whose weight map says something else of a tensor ("embedding", "norm", "other")."""
    names = {"embedding": EMBEDDING, "norm": NORM, "other": "other"}

    def break_(folder: Folder) -> None:
        files = folder.shard() | {names[name]: file for name, file in weight_map.items()}
        folder.write(INDEX, {"weight_map": {name: file for name, file in files.items() if file != "absent"}})

    return Fault(row, break_, (INDEX, *says))


def _rotary(*says: str, **rope: Any) -> Fault:
    return _config("rotary-scalings", *says, rope_parameters=None, rope_scaling=rope)


def _orbax(folder: Folder) -> None:
    (folder.path / "orbax").mkdir()


JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
UNREADABLE: dict[str, Any] = {
    "no-json": "{",
    "an-array": [{"model_type": "qwen3"}],
    "a-number": 7,
    "empty": "",
    "latin-1": '{"eos_token": "é"}'.encode("latin-1"),
    "half-a-character": '{"eos_token": "\\ud800"}',
    "deep": "[" * 100_000,
    "long-number": '{"vocab_size": ' + "9" * 5000 + "}",
}


def _legacy_only(fault: Fault) -> Fault:
    """Without the newer files, so that the older ones count."""

    def break_(folder: Folder) -> None:
        folder.remove("chat_template.jinja")
        fault.break_(folder)

    return Fault(fault.row, break_, fault.says)


CONFIG: dict[str, Fault] = {
    "config-absent": Fault("config", lambda f: f.remove("config.json"), ("config.json",)),
    "config-is-a-folder": Fault(
        "config",
        lambda f: f.becomes_a_folder("config.json"),
        ("config.json: expected a file, found a folder",),
    ),
    **{
        f"config-without-{key}": _config(
            "config-keys", f"{key}: expected a whole number", "found nothing", without=(key,)
        )
        for key in (
            "hidden_size",
            "vocab_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        )
    },
    **{
        f"hidden-size-{name}": _config(
            "config-keys", "hidden_size: expected a whole number", found, hidden_size=value
        )
        for name, value, found in (
            ("text", "16", "'16'"),
            ("negative", -16, "-16"),
            ("zero", 0, "found 0"),
            ("fraction", 16.5, "16.5"),
            ("true", True, "True"),
            ("huge", 10**30, "1000"),
            ("list", [16], "[16]"),
            ("object", {"a": 1}, "'a'"),
        )
    },
    "layers-beyond-all-bounds": _config(
        "config-keys", "num_hidden_layers", "from 1 to 1024", num_hidden_layers=10**6
    ),
    "no-kv-heads": _config("config-keys", "num_key_value_heads", "found 0", num_key_value_heads=0),
    "kv-heads-that-do-not-divide": _config(
        "config-keys", "4 query heads", "3 KV heads", num_key_value_heads=3
    ),
    "odd-head-size": _config("config-keys", "head_dim must be even", head_dim=7),
    "epsilon-text": _config("config-keys", "rms_norm_eps: expected a number", "'1e-6'", rms_norm_eps="1e-6"),
    "epsilon-negative": _config(
        "config-keys", "rms_norm_eps: expected a number of at least 0", "-1", rms_norm_eps=-1
    ),
    "tied-text": _config(
        "config-keys", "tie_word_embeddings: expected true or false", "'no'", tie_word_embeddings="no"
    ),
    "taper-array": _config("config-keys", "taper: expected an object", taper=[]),
    "join-unknown": _config("config-keys", "join", "'merge'", taper={"join": "merge"}),
    "name-number": _config("config-keys", "_name_or_path: expected a text", _name_or_path=3),
    "name-of-two-lines": _config("config-keys", "_name_or_path", "'a\\nb'", _name_or_path="a\nb"),
    "type-unknown": _config("architectures", "model_type 'mamba'", "qwen3, qwen2, llama", model_type="mamba"),
    "type-absent": _config("architectures", "model_type None", without=("model_type",)),
    "type-list": _config("architectures", "model_type ['qwen3']", model_type=["qwen3"]),
    "class-other": _config("architectures", "Qwen3ForReward", architectures=["Qwen3ForReward"]),
    "class-number": _config("architectures", "architectures: expected a list", architectures=3),
    "activation-other": _config("not-implemented", "hidden_act 'gelu'", hidden_act="gelu"),
    "activation-list": _config("not-implemented", "hidden_act: expected a text", hidden_act=["silu"]),
    "window": _config("not-implemented", "use_sliding_window true", use_sliding_window=True),
    "layer-types": _config("not-implemented", "sliding_attention", layer_types=["sliding_attention"]),
    "layer-types-number": _config("not-implemented", "layer_types", layer_types=[1]),
    "bias": _config("not-implemented", "attention_bias true", attention_bias=True),
    "quantized": _config("quantized", "quant_method 'fp8'", quantization_config={"quant_method": "fp8"}),
    "quantized-text": _config(
        "quantized", "quantization_config: expected an object", quantization_config="fp8"
    ),
    "theta-text": _config(
        "rotary-base", "rope_theta: expected a number", rope_parameters=None, rope_theta="1e6"
    ),
    "theta-negative": _config("rotary-base", "rope_theta", rope_parameters={"rope_theta": -1.0}),
    "theta-infinite": _config("rotary-base", "rope_theta", rope_parameters={"rope_theta": float("inf")}),
    "theta-nan": _config("rotary-base", "rope_theta", rope_parameters={"rope_theta": float("nan")}),
    "theta-of-the-other-key": _config(
        "rotary-both",
        "rope_scaling: rope_theta",
        "of rope_parameters",
        without=("rope_theta",),
        rope_scaling={"type": "linear", "factor": 2},
    ),
    "rope-array": _config("rotary-both", "rope_scaling: expected an object", rope_scaling=[1]),
    "rope-text": _config("rotary-both", "rope_parameters: expected an object", rope_parameters="yarn"),
    "context-beyond-all-bounds": _config(
        "context",
        "a context of at most",
        rope_parameters=None,
        rope_scaling={"type": "linear", "factor": 1e20},
    ),
    "rope-dynamic": _rotary("dynamic", "linear, llama3, yarn", type="dynamic", factor=2),
    "rope-longrope": _rotary("longrope", rope_type="longrope", factor=2),
    "rope-type-number": _rotary("rope_type: expected a text", rope_type=3),
    "linear-without-factor": _rotary("factor: expected a number", "found nothing", type="linear"),
    "linear-factor-text": _rotary("factor", "'4'", type="linear", factor="4"),
    "linear-factor-small": _rotary("factor", "at least 1", "0.5", type="linear", factor=0.5),
    "yarn-betas": _rotary("beta_fast", "at least beta_slow", type="yarn", factor=4, beta_fast=1, beta_slow=2),
    "yarn-original-zero": _rotary(
        "original_max_position_embeddings", type="yarn", factor=4, original_max_position_embeddings=0
    ),
    "yarn-attention-factor": _rotary("attention_factor", type="yarn", factor=4, attention_factor=-1),
    "yarn-truncate": _rotary("truncate: expected true or false", type="yarn", factor=4, truncate="no"),
    "llama3-bounds": _rotary(
        "high_freq_factor", type="llama3", factor=8, low_freq_factor=4, high_freq_factor=1
    ),
    "llama3-without-bounds": _rotary("low_freq_factor", "found nothing", type="llama3", factor=8),
    "eos-text": _config("ends", "eos_token_id: expected a token id", eos_token_id="2"),
    "eos-negative": _config("ends", "eos_token_id", "-1", eos_token_id=-1),
    "eos-nested": _config("ends", "eos_token_id", eos_token_id=[[2]]),
    "eos-of-generation": _file("ends", "generation_config.json", {"eos_token_id": {}}, "eos_token_id"),
}

TOKENIZER: dict[str, Fault] = {
    "tokenizer-cut": Fault(
        "tokenizer", lambda f: f.cut("tokenizer.json", 999), ("cannot read", "tokenizer.json")
    ),
    "tokenizer-array": _file("tokenizer", "tokenizer.json", [], "cannot read"),
    "tokenizer-empty": _file("tokenizer", "tokenizer.json", "", "cannot read"),
    "tokenizer-not-utf8": _file("tokenizer", "tokenizer.json", b"\xff\xfe{}", "UTF-8"),
    "tokenizer-is-a-folder": Fault(
        "tokenizer", lambda f: f.becomes_a_folder("tokenizer.json"), ("tokenizer.json: expected a file",)
    ),
    "tokenizer-of-another-kind": Fault(
        "tokenizer", lambda f: f.edit("tokenizer.json", model={"type": "Magic"}), ("tokenizer.json",)
    ),
    "tokenizer-merges-numbers": Fault(
        "tokenizer",
        lambda f: f.edit("tokenizer.json", model=f.read("tokenizer.json")["model"] | {"merges": [1, 2]}),
        ("tokenizer.json",),
    ),
    "token-number": _tokenizer_config("special-tokens", "eos_token: expected a token, found 5", eos_token=5),
    "token-without-content": _tokenizer_config(
        "special-tokens", "bos_token: expected a token", bos_token={"lstrip": True}
    ),
    "more-tokens-text": _tokenizer_config(
        "special-tokens", "additional_special_tokens", additional_special_tokens="<a>"
    ),
    "more-tokens-numbers": _tokenizer_config(
        "special-tokens", "extra_special_tokens", extra_special_tokens=[1]
    ),
    "added-array": _tokenizer_config(
        "added-tokens", "added_tokens_decoder: expected an object", added_tokens_decoder=[1]
    ),
    "added-key": _tokenizer_config(
        "added-tokens", "'first'", added_tokens_decoder={"first": {"content": "<a>"}}
    ),
    "added-text": _tokenizer_config("added-tokens", "'<a>'", added_tokens_decoder={"269": "<a>"}),
    "added-without-content": _tokenizer_config(
        "added-tokens", "269", added_tokens_decoder={"269": {"special": True}}
    ),
    "added-elsewhere": _tokenizer_config(
        "added-tokens",
        "tokenizer.json disagree about '<|im_end|>'",
        "expected id 7, found 2",
        added_tokens_decoder={"7": {"content": "<|im_end|>"}},
    ),
    "added-with-a-gap": _tokenizer_config(
        "added-tokens",
        "'<a>'",
        "expected id 275, found 269",
        added_tokens_decoder={"275": {"content": "<a>", "special": True}},
    ),
    "map-token-number": _file("special-tokens", "special_tokens_map.json", {"eos_token": 5}, "eos_token"),
    "added-list-text": _file("added-tokens", "added_tokens.json", {"<a>": "269"}, "'<a>'", "'269'"),
    "added-list-elsewhere": _file(
        "added-tokens", "added_tokens.json", {"<|im_end|>": 9}, "expected id 9, found 2"
    ),
    "template-not-utf8": _file("chat-template", "chat_template.jinja", b"\xe9", "UTF-8"),
    "template-is-a-folder": Fault(
        "chat-template",
        lambda f: f.becomes_a_folder("chat_template.jinja"),
        ("chat_template.jinja: expected a file",),
    ),
    "template-unfinished": _file("chat-template", "chat_template.jinja", "{% if %}", "not valid jinja"),
    "template-unknown-filter": _file(
        "chat-template", "chat_template.jinja", "{{ messages | magic }}", "magic"
    ),
    "template-deep": _file(
        "chat-template", "chat_template.jinja", "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}", "not valid jinja"
    ),
    "named-template-unfinished": _file(
        "chat-template", "additional_chat_templates/default.jinja", "{% for %}", "not valid"
    ),
    "config-template-number": _legacy_only(
        _tokenizer_config("chat-template", "chat_template: expected a text", chat_template=5)
    ),
    "config-template-texts": _legacy_only(
        _tokenizer_config("chat-template", "names and templates", chat_template=["{{ 1 }}"])
    ),
    "config-template-inside": _legacy_only(
        _tokenizer_config(
            "chat-template", "expected a text", chat_template=[{"name": "default", "template": 5}]
        )
    ),
    "json-template-number": _legacy_only(
        _file("chat-template", "chat_template.json", {"chat_template": 5}, "expected a text")
    ),
}
TOKENIZER["named-template-unfinished"] = _legacy_only(TOKENIZER["named-template-unfinished"])

WEIGHTS: dict[str, Fault] = {
    "no-weights": Fault("weights", lambda f: f.remove(WHOLE), (f"no {WHOLE} and no {INDEX}",)),
    "only-others": Fault(
        "weights",
        lambda f: (f.remove(WHOLE), f.write("pytorch_model.bin", b"")),
        (f"no {WHOLE}", "pytorch_model.bin"),
    ),
    "shards-without-an-index": Fault(
        "weights", lambda f: (f.shard(), f.remove(INDEX)), (f"no {INDEX}", "a.safetensors")
    ),
    "weights-cut": Fault("weights", lambda f: f.cut(WHOLE, 3000), ("cannot read", WHOLE)),
    "weights-empty": _file("weights", WHOLE, b"", "cannot read"),
    "weights-header-cut": Fault("weights", lambda f: f.cut(WHOLE, 100), ("cannot read", WHOLE)),
    "weights-are-text": _file("weights", WHOLE, "weights", "cannot read"),
    "weights-are-a-folder": Fault(
        "weights", lambda f: f.becomes_a_folder(WHOLE), (f"{WHOLE}: expected a file, found a folder",)
    ),
    "tensor-absent": Fault(
        "tensors",
        lambda f: f.store({k: v for k, v in f.tensors().items() if k != NORM}),
        (f"missing: {NORM}",),
    ),
    "tensor-unknown": Fault(
        "tensors", lambda f: f.store(f.tensors() | {"a\nb": np.zeros(2)}), ("unexpected: a\\nb",)
    ),
    "tensor-shape": Fault(
        "tensors",
        lambda f: f.store(f.tensors() | {NORM: np.zeros(5)}),
        (NORM, WHOLE, "is (5,)", "asks for (16,)"),
    ),
    "tensor-scalar": Fault("tensors", lambda f: f.store(f.tensors() | {NORM: np.zeros(())}), (NORM, "is ()")),
    "tensor-head-scalar": Fault(
        "head", lambda f: f.store(f.tensors() | {"lm_head.weight": np.zeros(())}), ("lm_head.weight", "is ()")
    ),
    "tensor-fp8": Fault(
        "types", lambda f: f.store_raw(NORM, "F8_E4M3", [16], 16), (NORM, WHOLE, "is F8_E4M3", "bfloat16")
    ),
    "head-fp8": Fault(
        "types",
        lambda f: f.store_raw("lm_head.weight", "F8_E5M2", [280, 16], 4480),
        ("lm_head.weight", "is F8_E5M2"),
    ),
    "tensor-int8": Fault(
        "types", lambda f: f.store(f.tensors() | {NORM: np.zeros(16, np.int8)}), (NORM, "is I8")
    ),
    "tensor-bool": Fault(
        "types", lambda f: f.store(f.tensors() | {NORM: np.zeros(16, bool)}), (NORM, "is BOOL")
    ),
    "tensor-int4": Fault(
        "types", lambda f: f.store(f.tensors() | {NORM: np.zeros(4, np.int32)}), (NORM, "is I32", "is (4,)")
    ),
    "index-not-json": Fault("index", lambda f: (f.shard(), f.write(INDEX, "{")), ("cannot read", INDEX)),
    "index-an-array": Fault("index", lambda f: (f.shard(), f.write(INDEX, [])), (INDEX, "JSON object")),
    "index-without-map": Fault(
        "index", lambda f: (f.shard(), f.write(INDEX, {})), (INDEX, "weight_map", "None")
    ),
    "index-map-an-array": Fault(
        "index", lambda f: (f.shard(), f.write(INDEX, {"weight_map": [1]})), (INDEX, "[1]")
    ),
    "index-number": _index("index", EMBEDDING, "found 5", embedding=5),
    "index-leads-up": _index("index-names", EMBEDDING, "'../a.safetensors'", embedding="../a.safetensors"),
    "index-leads-away": _index("index-names", "'/etc/passwd'", embedding="/etc/passwd"),
    "index-leads-down": _index("index-names", "'sub/a.safetensors'", embedding="sub/a.safetensors"),
    "index-leads-up-on-windows": _index("index-names", "a.safetensors", embedding="..\\a.safetensors"),
    "index-is-dots": _index("index-names", "'..'", embedding=".."),
    "index-nul": _index("index-names", "x00", embedding="a\0.safetensors"),
    "index-nothing": _index("index-names", "found ''", embedding=""),
    "index-too-long": _index("index-stale", "not there", embedding="a" * 5000),
    "index-names-an-absent-file": _index("index-stale", "'c.safetensors'", embedding="c.safetensors"),
    "index-names-the-wrong-file": _index(
        "index-stale", EMBEDDING, "'b.safetensors'", "but 'a.safetensors' does", embedding="b.safetensors"
    ),
    "index-names-an-absent-tensor": _index(
        "index-stale", "'other'", "'a.safetensors'", other="a.safetensors"
    ),
    "index-omits-a-tensor": _index(
        "index-stale", f"does not name '{NORM}'", "'a.safetensors'", norm="absent"
    ),
    "index-beside-a-whole-checkpoint": Fault(
        "index-stale",
        lambda f: ((t := f.tensors()), f.shard(), f.store(t)),
        (INDEX, f"{WHOLE}, which is there, too"),
    ),
    "index-left-behind": Fault(
        "index-stale",
        lambda f: (
            (t := f.tensors()),
            f.shard(),
            f.store(t),
            f.remove("a.safetensors"),
            f.remove("b.safetensors"),
        ),
        (INDEX, f"while {WHOLE} lies beside it", "'a.safetensors'"),
    ),
    "orbax-empty": Fault("orbax", _orbax, ("Orbax checkpoint", "orbax: expected a _METADATA, found none")),
    "orbax-is-a-file": _file("orbax", "orbax", "", "orbax: expected a _METADATA"),
    "orbax-is-a-link-to-nothing": Fault("links", lambda f: f.links_to_nothing("orbax"), ("a _METADATA",)),
    "orbax-of-garbage": Fault(
        "orbax",
        lambda f: [f.write(f"orbax/{name}", "{}") for name in ("_METADATA", "_CHECKPOINT_METADATA")],
        ("orbax: expected what taper-convert writes, found",),
    ),
}

JSONS = {
    f"{file}-{name}": _file("json", file, content, "cannot read")
    for file in JSON_FILES
    for name, content in UNREADABLE.items()
}
for name, fault in JSONS.items():
    if name.startswith("chat_template.json"):
        JSONS[name] = _legacy_only(fault)
NOT_THERE: dict[str, Fault] = {
    **{
        f"{name}-is-a-link-to-nothing": Fault(
            "links",
            lambda f, name=name: f.links_to_nothing(name),
            (f"{name}: expected a file, found a link to nothing",),
        )
        for name in (*JSON_FILES, "tokenizer.json", "chat_template.jinja", WHOLE, INDEX)
        if name != "chat_template.json"
    },
    "chat_template.json-is-a-link-to-nothing": _legacy_only(
        Fault("links", lambda f: f.links_to_nothing("chat_template.json"), ("found a link to nothing",))
    ),
    **{
        f"{name}-was-not-fetched": _file(
            "weights", name, "version https://git-lfs.github.com/spec/v1\noid 1\n", "a pointer of Git LFS"
        )
        for name in ("config.json", "tokenizer.json", WHOLE, INDEX)
    },
}

FAULTS = NOT_THERE | CONFIG | TOKENIZER | WEIGHTS | JSONS
