"""`taper-decode`: continues texts or token ids offline, and prints what the branches say."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import tyro

from attention import BACKENDS, backend_named
from model.checkpoint import LoadFormat, ModelSource
from model.decode import generate
from model.find import model_tokenizer
from model.progress import SaidSometimes
from model.settings import one_line, out_of_memory
from model.sharding import Placement, ask_for_devices
from model.tokenizer import Tokenizer
from model.version import versions
from scheduler.sampling import SamplingParams, faults_of_sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sampling(SamplingParams):
    """How the tokens are drawn."""

    # The loop reports no log-probabilities.

    logprobs: tyro.conf.Suppress[bool] = False
    top_logprobs: tyro.conf.Suppress[int] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """Generate offline: one jitted loop on the device, no server."""

    model: str = "default"
    """`default` (the embedded tiny model), the name of a preset, or a model folder."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; repeat it for more prompts."""
    prompt_ids: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Token ids to continue, such as 1,2,3; repeat it for more prompts. They come after the texts."""
    max_tokens: int = 64
    """Most tokens of each branch."""
    branches: int = 1
    """Continuations of each prompt, which share the prompt's KV pages."""
    sampling: tyro.conf.OmitArgPrefixes[_Sampling] = _Sampling()
    ignore_eos: bool = False
    """Go on after an end-of-sequence token."""
    dtype: Literal["bfloat16", "float32", "float64"] = "float32"
    """Type of weights, activations and KV pages."""
    load_format: LoadFormat = "auto"
    """`random` makes weights on the device instead of reading them."""
    weights_seed: int = 0
    """Seed of random weights."""
    tensor_parallel: int = 1
    """Devices of this machine that share the model."""
    peer_memory: bool = False
    """Let two GPUs that share the model add up through each other's memory, as taper-serve does. Nobody has
    run the decode loop so yet."""
    attention: str = "auto"
    """Attention backend; `auto` picks by device, `reference` is the oracle."""
    page_size: int = 16
    """KV positions in a page."""
    json: bool = False
    """Print one JSON object instead of text."""
    version: tyro.conf.FlagCreatePairsOff[bool] = False
    """Say the versions of taper, JAX and Python, and leave."""


def main(args: list[str] | None = None) -> None:
    command = tyro.cli(Decode, prog="taper-decode", description=Decode.__doc__, args=args)
    if command.version:
        print(versions())
        return
    ask_for_devices(command.tensor_parallel)
    try:
        with jax.enable_x64(command.dtype == "float64"):
            print(_report(command))
    except (OSError, ValueError) as error:
        sys.exit(f"taper-decode: {error}")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        sys.exit(f"taper-decode: not enough memory: {one_line(error)}")


def _report(command: Decode) -> str:
    if command.attention not in ("auto", *BACKENDS):
        raise ValueError(f"--attention must be auto or one of {', '.join(BACKENDS)}")
    found, known = model_tokenizer(command.model)
    tokenizer = found if found.supports_text else None
    prompts = _prompts(command, tokenizer)
    source = ModelSource.find(command.model, command.load_format)
    _check_ids(prompts, source.config.vocab_size)
    if faults := list(faults_of_sampling(command.sampling, source.config.vocab_size)):
        raise ValueError("; ".join(faults))
    for note in source.notes:
        _say(note)
    placement = Placement.over(source.config, command.tensor_parallel, peer_memory=command.peer_memory)
    model = source.load(
        jnp.dtype(command.dtype),
        placement,
        seed=command.weights_seed,
        watch=SaidSometimes(lambda size: _say(f"{size} of the weights are loaded")),
    )
    _say("the weights are loaded, and the loop is compiled now: the first time, that takes a while")
    generation = generate(
        model,
        prompts,
        max_tokens=command.max_tokens,
        branches=command.branches,
        sampling=command.sampling,
        eos_ids=() if command.ignore_eos else (tokenizer and tokenizer.eos_ids) or model.config.eos_ids,
        known=known,
        page_size=command.page_size,
        backend=None if command.attention == "auto" else backend_named(command.attention),
        placement=placement,
        on_compiled=lambda seconds: _say(f"compiled after {seconds:.1f} s; the device generates"),
    )
    answers = [
        [
            {"token_ids": ids, "text": _continuation(tokenizer, prompt, ids) if tokenizer else ""}
            for ids in branches
        ]
        for prompt, branches in zip(prompts, generation.ids, strict=True)
    ]
    if command.json:
        prompts_json = [{"branches": branches} for branches in answers]
        return json.dumps({"prompts": prompts_json, "tokens_per_second": generation.tokens_per_second})
    lines = []
    for number, branches in enumerate(answers, 1):
        for letter, branch in enumerate(branches, 1):
            text = branch["text"] if tokenizer else " ".join(map(str, branch["token_ids"]))
            lines += [f"--- prompt {number}, branch {letter}", text]
    return "\n".join([*lines, f"--- {generation.tokens_per_second:.1f} tokens/s"])


def _say(text: str) -> None:
    """To whoever waits, and not into the result."""
    print(f"taper-decode: {text}", file=sys.stderr, flush=True)


def _continuation(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    """What `ids` add to the text of the prompt.

    By themselves they would lose the space that a tokenizer drops at the beginning of a text.
    """
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *ids], skip_special_tokens=True)
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(ids, skip_special_tokens=True)  # they complete a character of the prompt


def _prompts(command: Decode, tokenizer: Tokenizer | None) -> list[list[int]]:
    if not command.prompt and not command.prompt_ids:
        raise ValueError("give a --prompt or --prompt-ids")
    if command.prompt and tokenizer is None:
        raise ValueError(f"{command.model} has no tokenizer.json: give --prompt-ids")
    texts = [tokenizer.encode(text, add_special_tokens=True) for text in command.prompt] if tokenizer else []
    try:
        return texts + [[int(word) for word in ids.split(",")] for ids in command.prompt_ids]
    except ValueError as error:
        raise ValueError(f"--prompt-ids takes numbers with commas between them: {error}") from error


def _check_ids(prompts: list[list[int]], vocab_size: int) -> None:
    """A gather would silently read another row."""
    outside = next((i for prompt in prompts for i in prompt if not 0 <= i < vocab_size), None)
    if outside is not None:
        raise ValueError(f"token {outside} is not in the model's vocabulary of {vocab_size}")
