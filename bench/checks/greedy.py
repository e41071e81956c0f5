"""Greedy tokens in float32: ours on this device, taper-decode's on the CPU, and those of transformers."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from attention import Backend
from bench.checks.scale import PAGE, Scale
from model.checkpoint import load_model
from model.config import ModelConfig
from model.decode import generate
from model.decoder import Decoder
from model.sharding import ON_ONE_DEVICE, Placement
from model.weights import hf_tensors, random_weights, save_hf

Tokens = list[list[list[int]]]  # of each branch of each prompt


def random_prompts(scale: Scale, config: ModelConfig, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, config.vocab_size, length).tolist() for length in scale.prompts]


def greedy_here(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    scale: Scale,
    backend: Backend | None,
    placement: Placement = ON_ONE_DEVICE,
) -> Tokens:
    run = generate(
        load_model(str(folder), jnp.float32, placement=placement),
        prompts,
        max_tokens=scale.new_tokens,
        branches=scale.branches,
        page_size=PAGE,
        backend=backend,
        placement=placement,
    )
    return run.ids


def greedy_on_cpu(folder: Path, prompts: Sequence[Sequence[int]], scale: Scale) -> Tokens:
    """What taper-decode says where JAX sees nothing but the CPU."""
    ids = [word for prompt in prompts for word in ("--prompt-ids", ",".join(map(str, prompt)))]
    sizes = ["--max-tokens", str(scale.new_tokens), "--branches", str(scale.branches)]
    command = [sys.executable, "-c", "from model.decode_command import main; main()", "--model", str(folder)]
    command += [*ids, *sizes, "--ignore-eos", "--attention", "xla", "--json"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    answers = json.loads(done.stdout)["prompts"]
    return [[branch["token_ids"] for branch in answer["branches"]] for answer in answers]


def greedy_of_transformers(folder: Path, prompts: Sequence[Sequence[int]], scale: Scale) -> Tokens | None:
    """Its tokens in float32 without TF32, one for all branches; None if it is not installed."""
    try:
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        return None
    torch.set_float32_matmul_precision("highest")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    answers: Tokens = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=device)
        options = {"max_new_tokens": scale.new_tokens, "do_sample": False, "eos_token_id": None}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        answers.append([out[0, len(prompt) :].tolist()] * scale.branches)
    return answers


def compare_tokens(ours: Tokens, theirs: Tokens | None) -> dict[str, Any] | None:
    """How many tokens are the same up to each branch's first difference, of how many."""
    if theirs is None:
        return None
    same = total = 0
    for mine, reference in zip(chain(*ours), chain(*theirs), strict=True):
        pairs = [a == b for a, b in zip(mine, reference, strict=True)]
        same += [*pairs, False].index(False)
        total += len(pairs)
    return {"same": same, "tokens": total, "ok": same == total}


def check_greedy(
    scale: Scale,
    config: ModelConfig,
    seed: int,
    backend: Backend | None,
    placement: Placement = ON_ONE_DEVICE,
) -> dict[str, Any]:
    prompts = random_prompts(scale, config, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_hf(folder, config, hf_tensors(random_weights(Decoder(config, jnp.float32), seed, ON_ONE_DEVICE)))
        ours = greedy_here(folder, prompts, scale, backend, placement)
        return {
            "model": config.name,
            "cpu": compare_tokens(ours, greedy_on_cpu(folder, prompts, scale)),
            "transformers": compare_tokens(ours, greedy_of_transformers(folder, prompts, scale)),
        }
