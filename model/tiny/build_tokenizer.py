"""Makes the default model's tokenizer.json again: `python -m model.tiny.build_tokenizer`.

A byte-level BPE of 1024 tokens, digits one by one, learned from corpus.txt. The tags with which a model
opens and closes branches are tokens of their own, but not special ones: they are part of what it says.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

FOLDER = Path(__file__).parent
VOCAB_SIZE = 1024
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = tuple(
    tag
    for name in ("Parallel", "Goal", "Outline", "Path", "Conclusion")
    for tag in (f"<{name}>", f"</{name}>")
)


def build() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(TAGS),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(FOLDER / "corpus.txt")], trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return tokenizer


if __name__ == "__main__":
    build().save(str(FOLDER / "tokenizer.json"))
