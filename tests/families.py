"""Small tokenizers of the three families that checkpoints come with, made of the same parts as theirs.

qwen    byte-level BPE, as Qwen's and SmolLM's
llama2  SentencePiece's like: a space before the text, single bytes for what has no token, as Llama 2's
llama3  byte-level BPE that begins a text with a special token, as Llama 3's
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from model.tokenizer import Tokenizer

FAMILIES = ("qwen", "llama2", "llama3")
CORPUS = [
    "the cat sat on the mat, and the cat said: Observation: the end.",
    "Straße, naïve café, “quotes” 日本語のテキスト 한국어 텍스트",
    "🙂🙃 👩‍👩‍👧 🏳️‍🌈 Привет мир, مرحبا بالعالم",
    "  spaces\n\n\tand lines\r\n",
] * 2


def _byte_level(begin: str, end: str, split: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([begin, end])
    backend.add_tokens(["<think>", AddedToken("two words", special=False)])
    return backend


def _qwen() -> tokenizers.Tokenizer:
    backend = _byte_level(
        "<|im_start|>", "<|im_end|>", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    )
    backend.normalizer = normalizers.NFC()
    return backend


def _llama3() -> tokenizers.Tokenizer:
    words = Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend = _byte_level("<|begin_of_text|>", "<|eot_id|>", split)
    begin = backend.token_to_id("<|begin_of_text|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    return backend


def _llama2() -> tokenizers.Tokenizer:
    words = ["▁", "▁the", "▁cat", "▁Observation", ":", "▁end", "é", "日", "▁日", "the", "cat", "END", "▁END"]
    letters = [letter for letter in "abcdefghijklmnopqrstuvwxyzEND.,!" if letter not in words]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [
        ("t", "h"), ("th", "e"), ("c", "a"), ("ca", "t"), ("▁", "the"), ("▁", "cat"), ("e", "n"), ("en", "d"),
        ("▁", "end"), ("▁", "日"),
    ]  # fmt: skip
    for merge in merges:
        vocabulary.setdefault("".join(merge), len(vocabulary))
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def write_family(name: str, folder: Path) -> Path:
    """Writes the tokenizer's files to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = {"qwen": _qwen, "llama2": _llama2, "llama3": _llama3}[name]()
    backend.save(str(folder / "tokenizer.json"))
    ends = {"qwen": "<|im_end|>", "llama2": "</s>", "llama3": "<|eot_id|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": ends[name]}))
    return folder


@cache
def family(name: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.from_folder(write_family(name, Path(folder)))
