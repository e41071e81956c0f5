"""The model on the device: Qwen3 and its kin over a paged KV cache, sampling, checkpoints, tokenizer."""
