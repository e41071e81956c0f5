"""The embedded default model, by name "default": a small Qwen3-type decoder, its tokenizer and template."""
