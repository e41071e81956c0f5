"""Folders in the shape of published models that fork by themselves: random weights in few, narrow layers.

What a name, a number or a file decides is as published: the files, the keys of the configs, the vocabulary
with its padding, the ids of the tags, heads, biases, tied embeddings, shards and the type of the weights. The
tags were added to Qwen's tokenizers by transformers (`add_special_tokens`), and the embeddings resized to
a multiple of 64. Of the tokenizer's ordinary tokens only a few are words; the others are there to be counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from model.hf_config import read_folder
from model.weights import save_hf
from tests.model.checkpoints import Checkpoint

QUIET = 0.01  # of the last norm: small logits, so that small biases decide what is written
WORDS = (" :", "plan", "Outline", " red", " green", " blue")
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_5 = {
    **dict.fromkeys(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), True),
    **{
        f"<|{name}_{end}|>": True
        for name in ("object_ref", "box", "quad", "vision")
        for end in ("start", "end")
    },
    **{f"<|{name}_pad|>": True for name in ("vision", "image", "video")},
    **dict.fromkeys(("<tool_call>", "</tool_call>"), False),
    **{f"<|fim_{part}|>": False for part in ("prefix", "middle", "suffix", "pad")},
    **dict.fromkeys(("<|repo_name|>", "<|file_sep|>"), False),
}
_QWEN3 = _QWEN2_5 | dict.fromkeys(("<tool_response>", "</tool_response>", "<think>", "</think>"), False)
_CHATML = """\
{%- if SYSTEM and messages[0].role != "system" %}
    {{- "<|im_start|>system\\n" + SYSTEM + "<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- "<think>\\n\\n</think>\\n\\n" }}
    {%- endif %}
{%- endif %}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A model as its folder is published.

    tag_set   the built-in tags that it was trained with; `join`, how its branches are joined
    config    of config.json, all but the vocabulary and the ends of a text
    added     tokens that Qwen's tokenizer had, and whether they are special; `tags`, what training added
    system    what the chat template begins with where a chat does not say it
    ordinary  tokens before the added ones
    """

    tag_set: str
    join: str = "kv"
    config: Mapping[str, Any]
    added: Mapping[str, bool]
    tags: tuple[str, ...]
    generation: Mapping[str, Any]
    system: str = ""
    template_is_a_file: bool = True
    dtype: Any = ml_dtypes.bfloat16
    shards: int = 1
    ordinary: int = 151643

    def id_of(self, token: str) -> int:
        """Of an added token."""
        return self.ordinary + [*self.added, *self.tags].index(token)

    @property
    def vocab_size(self) -> int:
        """What resizing the embeddings for the tags made of it."""
        return -(-(self.ordinary + len(self.added) + len(self.tags)) // 64) * 64

    def write(self, folder: Path, **cut: int) -> Path:
        """All files. `cut` are keys of config.json in the place of those that are published."""
        folder.mkdir(parents=True)
        end, text_end = self.id_of("<|im_end|>"), self.id_of("<|endoftext|>")
        config = {
            **self.config,
            **cut,
            "vocab_size": self.vocab_size,
            "eos_token_id": end,
            "bos_token_id": text_end,
        }
        generation = {"bos_token_id": text_end, "eos_token_id": [end, text_end], **self.generation}
        _write(folder / "config.json", config)
        recipe = Checkpoint(config=read_folder(folder), dtype=self.dtype, seed=1)
        tensors = recipe.tensors()
        tensors["model.norm.weight"] *= np.array(QUIET, self.dtype)
        save_hf(folder, recipe.config, tensors, shards=self.shards)
        _write(folder / "config.json", config)  # as it was, and not as `save_hf` has it
        _write(folder / "generation_config.json", generation)
        self._write_tokenizer(folder)
        return folder

    def _write_tokenizer(self, folder: Path) -> None:
        special = {**self.added, **dict.fromkeys(self.tags, True), "<|fim_pad|>": True}
        tokens = {
            self.id_of(token): {"content": token, **_FLAGS, "special": flag}
            for token, flag in special.items()
        }
        vocabulary, merges = _ordinary(self.ordinary)
        model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
        added = [{"id": id, **token} for id, token in sorted(tokens.items())]
        _write(folder / "tokenizer.json", {"version": "1.0", "added_tokens": added, **_STEPS, "model": model})
        _write(folder / "vocab.json", vocabulary)
        (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges))
        config = {**_TOKENIZER_CONFIG, "additional_special_tokens": [*self.tags]}
        config["added_tokens_decoder"] = {str(id): token for id, token in sorted(tokens.items())}
        template = _CHATML.replace("SYSTEM", json.dumps(self.system))
        if self.template_is_a_file:
            (folder / "chat_template.jinja").write_text(template)
        else:
            config["chat_template"] = template
        _write(folder / "tokenizer_config.json", config)
        named = {name: {"content": config[name], **_FLAGS} for name in ("eos_token", "pad_token")}
        _write(folder / "special_tokens_map.json", {**named, "additional_special_tokens": [*self.tags]})
        _write(folder / "added_tokens.json", {token["content"]: id for id, token in tokens.items()})


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def _ordinary(count: int) -> tuple[dict[str, int], list[str]]:
    """All bytes, the words with what leads to them, and fillers up to `count` tokens; and the merges."""
    tokens, merges = dict.fromkeys(sorted(ByteLevel.alphabet())), list[str]()
    for word in (word.replace(" ", "Ġ") for word in WORDS):
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
                tokens[word[:end]] = None
    tokens |= dict.fromkeys(f"filler{number}" for number in range(count - len(tokens)))
    return {token: id for id, token in enumerate(tokens)}, merges


def _tags(*names: str) -> tuple[str, ...]:
    return tuple(tag for name in names for tag in (f"<{name}>", f"</{name}>"))


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
_SPLIT = {"type": "Split", "pattern": {"Regex": _PIECES}, "behavior": "Isolated", "invert": False}
_STEPS = {
    "truncation": None,
    "padding": None,
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_SPLIT, _BYTES]},
    "post_processor": _BYTES,
    "decoder": _BYTES,
}
_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
_TOKENIZER_CONFIG: dict[str, Any] = {
    "add_bos_token": False,
    "bos_token": None,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "extra_special_tokens": {},
    "model_max_length": 131072,
    "pad_token": "<|fim_pad|>",
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}
_OF_BOTH = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "transformers_version": "4.51.1",
    "use_cache": False,
    "use_sliding_window": False,
}
_OF_QWEN3 = _OF_BOTH | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "rope_scaling": None,
    "sliding_window": None,
}
PUBLISHED = {
    "NPR-4B": Published(
        tag_set="npr",
        config=_OF_QWEN3
        | {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "max_position_embeddings": 262144,
            "rope_theta": 5000000,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
        },
        added=_QWEN3,
        tags=_tags("guideline", "plan", "step", "takeaway"),
        generation={"_from_model_config": True},
        dtype=np.float32,
        shards=4,
    ),
    "Multiverse-32B": Published(
        tag_set="multiverse",
        config=_OF_BOTH
        | {
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "max_position_embeddings": 32768,
            "max_window_layers": 70,
            "model_type": "qwen2",
            "num_attention_heads": 40,
            "num_hidden_layers": 64,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        added=_QWEN2_5,
        tags=_tags("Think", "Parallel", "Goal", "Outline", "Path", "Conclusion"),
        system="You are Qwen.",
        generation={"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
        template_is_a_file=False,
        shards=14,
    ),
    "ThreadWeaver-8B": Published(
        tag_set="threadweaver",
        join="reprefill",
        config=_OF_QWEN3
        | {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_position_embeddings": 131072,
            "rope_theta": 1000000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        added=_QWEN3,
        tags=_tags("Think", "Parallel", "Outlines", "Outline", "Thread", "Conclusion"),
        generation={"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
        template_is_a_file=False,
        shards=4,
    ),
}
