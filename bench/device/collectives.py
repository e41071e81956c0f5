"""Times what devices that share a model tell each other: all-reduces, all-gathers, and the sampler's few.

    python -m bench.device.collectives --tensor-parallel 2 --json OUT    # sizes of Qwen3-32B
    python -m bench.device.collectives --tensor-parallel 2 --scale tiny  # anywhere

A collective is one of a chain in one program, each of which takes the result of the one before it.
All-reduces are bfloat16 [rows, hidden] of each device, and so are the quick sums of a layer, which two GPUs
need no collective for (model.peer_memory); all-gathers are those of a greedy choice, float32 [rows, 2].
Samplers, in chains too, are named by their bits in model.sampling. On one device there is nothing to tell:
compare the others' samplers with its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bench import hardware
from bench.command import Command
from bench.device.step import tiny
from bench.progress import waiting
from bench.result import conclude, head
from bench.timing import seconds_per_call
from model.config import PRESETS, ModelConfig
from model.sampling import SAMPLERS, SampleInputs, SampleOutputs, SlotState, sample
from model.sharding import EVERYWHERE, Placement

ROWS = (8, 64, 128, 512)
SAMPLES = 64
CHAIN, SAMPLER_CHAIN = 64, 4
TOP_LOGPROBS = 8


def microseconds(call: Callable[[Any], Any], carry: Any, chain: int, calls: int, repeats: int) -> float:
    """Of one in a chain; `call` runs a chain of them, from `carry` to the next."""
    seconds, _ = seconds_per_call(call, call(carry), calls, repeats)
    return 1e6 * seconds / chain


def collective(
    placement: Placement,
    link: Callable[[jax.Array], jax.Array],
    shape: tuple[int, int],
    dtype: Any,
    **timing: int,
) -> float:
    """Microseconds of `x + link(x)`, where every device has its own x of this shape."""

    def chained(x: jax.Array) -> jax.Array:
        # A quick sum comes after a collective, here the smallest there is.
        x = x + 0 * placement.peers.max(x[:1, :1])
        for _ in range(CHAIN):
            x = x + link(x)
        return x

    # Divided over all of them, so that XLA cannot know any part to be like another.
    parts = placement.abstract((shape[0] * placement.count, shape[1]), dtype, ["heads", None])
    program = placement.compile(chained, (parts,), parts, donate=[0])
    return microseconds(program, jnp.zeros(parts.shape, dtype, device=parts.sharding), CHAIN, **timing)


def sampler(placement: Placement, vocab: int, samples: int, uses: int, **timing: int) -> float:
    """Microseconds of sampling from float32 logits with these of model.sampling's options, in a chain."""
    choose = partial(sample, uses=uses, max_top_logprobs=TOP_LOGPROBS, peers=placement.vocab_peers)

    def chained(
        slots: SlotState, logits: jax.Array, inputs: SampleInputs
    ) -> tuple[SlotState, list[SampleOutputs]]:
        outputs: list[SampleOutputs] = []
        for _ in range(SAMPLER_CHAIN):
            fed = slots.last_token[inputs.slot]
            # No token is negative, which XLA does not know: it cannot take one sampling for another.
            slots, chosen = choose(jnp.where(fed[:, None] < 0, 0, logits), fed, slots, inputs)
            outputs.append(chosen)
        return slots, outputs

    logits = placement.abstract((samples, vocab), jnp.float32, [None, "vocab"])
    draw = partial(jax.random.normal, shape=logits.shape, dtype=logits.dtype)
    logits = jax.jit(draw, out_shardings=logits.sharding)(jax.random.key(0))
    every = jax.device_put(jnp.arange(samples, dtype=jnp.int32), placement.sharding([None]))
    inputs = SampleInputs(**dict.fromkeys(SampleInputs._fields, every))
    slots = SlotState.create(samples, vocab, 64, placement=placement)
    arguments = slots, logits, inputs
    compiled = placement.compile(chained, arguments, (slots, EVERYWHERE), donate=[0])
    return microseconds(lambda slots: compiled(slots, logits, inputs)[0], slots, SAMPLER_CHAIN, **timing)


def measure(config: ModelConfig, placement: Placement, samples: int, **timing: int) -> dict[str, Any]:
    peers = placement.peers

    def gathered(x: jax.Array) -> jax.Array:
        return jnp.max(peers.gather(x), axis=0)

    times: dict[str, Any] = {"all_reduce_us": {}, "quick_sum_us": {}, "all_gather_us": {}, "sampler_us": {}}
    for rows in ROWS if placement.count > 1 else ():
        width = config.hidden_size
        for name, link in (("all_reduce_us", peers.sum), ("quick_sum_us", peers.quick_sum)):
            times[name][str(rows)] = collective(placement, link, (rows, width), jnp.bfloat16, **timing)
        times["all_gather_us"][str(rows)] = collective(placement, gathered, (rows, 2), jnp.float32, **timing)
    for uses in SAMPLERS:
        times["sampler_us"][str(uses)] = sampler(placement, config.vocab_size, samples, uses, **timing)
    return times


def text(result: dict[str, Any]) -> str:
    reduces, sums, gathers = (result[f"{name}_us"] for name in ("all_reduce", "quick_sum", "all_gather"))
    lines = ["microseconds"]
    if reduces:
        lines.append(
            f"{'rows':>6}{'all-reduce [rows, ' + str(result['hidden']) + ']':>28}{'quick sum':>12}"
            f"{'all-gather [rows, 2]':>24}"
        )
        lines += [
            f"{rows:>6}{took:>28.1f}{sums[rows]:>12.1f}{gathers[rows]:>24.1f}"
            for rows, took in reduces.items()
        ]
    lines.append(f"sampler, {result['samples']} samples of a vocabulary of {result['vocab']}, by its options")
    lines += [f"{uses:>6}{took:>28.1f}" for uses, took in result["sampler_us"].items()]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> dict[str, Any]:
    parser = Command("bench.device.collectives", "Times what devices that share a model tell each other.")
    parser.add_argument("--model", choices=sorted(PRESETS), default="qwen3-32b", help="whose sizes")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_tensor_parallel()
    options = parser.parse_args(arguments)
    small = options.scale == "tiny"
    config = tiny(PRESETS[options.model]) if small else PRESETS[options.model]
    placement = hardware.placement(config, options.tensor_parallel, peer_memory=options.peer_memory)
    samples, timing = (4, {"calls": 2, "repeats": 1}) if small else (SAMPLES, {"calls": 10, "repeats": 5})
    with waiting("timing collectives and samplers"):
        times = measure(config, placement, samples, **timing)
    result = {
        **head(parser.typed(arguments), hardware.describe(placement.count)),
        "hidden": config.hidden_size,
        "vocab": config.vocab_size,
        "samples": samples,
        **times,
    }
    return conclude(result, text(result), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
