"""The model on the device: a decoder over a paged KV cache, sampling, checkpoints, tokenizer."""
