"""Makes the default model's tokenizer.json again: `python -m model.tiny.build_tokenizer`.

Every token is one byte, so that a model this small sees the letters that it is asked about. The tags with
which it opens and closes branches are tokens of their own, but not special ones: they are part of what it
says.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

FOLDER = Path(__file__).parent
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = tuple(
    tag
    for name in ("Parallel", "Goal", "Outline", "Path", "Conclusion")
    for tag in (f"<{name}>", f"</{name}>")
)


def build() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate((*SPECIAL, *letters))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return tokenizer


if __name__ == "__main__":
    build().save(str(FOLDER / "tokenizer.json"))
