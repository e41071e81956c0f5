"""Checks what a model computes on the device at hand: greedy tokens, logits, and what a row's bits depend on.

    python -m bench.checks.model --json OUT           # a minute on a GPU
    python -m bench.checks.model --scale tiny         # anywhere

greedy    float32: the tokens of `model.decode` equal those of taper-decode on the CPU, in a process of its
          own, and of transformers (optional: torch, on its own device), all from one Hugging Face folder.
logits    bfloat16: every position of forked sequences, fed in random chunks through one step program,
          against a dense float32 forward pass of the same weights that knows nothing of pages.
schedule  bfloat16: one request through the same program alone, with others, elsewhere among the rows, in
          other chunks. Which of these keep its logits bit for bit is reported, not judged.

Exits with 1 if the tokens differ or the logits miss a bar.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some memory too

import jax
import jax.numpy as jnp
import numpy as np

import attention
from attention.reads import Read, Reads
from attention.reads import Segment as Filled
from bench import hardware
from model.checkpoint import load_model
from model.config import ModelConfig
from model.decode import generate
from model.decoder import Decoder
from model.kv_cache import KVCache
from model.sampling import SampleInputs
from model.sharding import ON_ONE_DEVICE
from model.step import StepInputs, StepLayout, forward
from model.weights import hf_tensors, random_weights, save_hf

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float

Tokens = list[list[list[int]]]

ERROR_BAR = 2e-2  # of ||logits - reference|| / ||reference||
LEAD = 0.1  # of the reference's best token over its second: where the best must be the same...
AGREEMENT_BAR = 0.99  # ...in this share of the places
PAGE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Sizes of all checks.

    greedy          a model for each head size
    prompts         lengths of the greedy prompts; each has `branches` branches of `new_tokens`
    rows            the step program's bucket
    trunk, tail     tokens of a request before its fork, and of each branch after it
    """

    greedy: tuple[ModelConfig, ...]
    prompts: tuple[int, ...]
    branches: int
    new_tokens: int
    logits: ModelConfig
    rows: int
    trunk: int
    tail: int
    requests: int
    width: int = 3


def _config(name: str, vocab: int, hidden: int, layers: int, heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        name=name,
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads // 2,
        head_dim=head_dim,
        intermediate_size=3 * hidden,
        rope_theta=1e6,
        max_context=4096,
    )


SCALES = {
    "full": Scale(
        greedy=tuple(_config(f"greedy, head size {size}", 1000, 256, 4, 8, size) for size in (64, 128)),
        prompts=(1, 3, 17, 64, 129, 300),
        branches=3,
        new_tokens=64,
        logits=_config("8 layers of 1024", 32768, 1024, 8, 16, 128),
        rows=128,
        trunk=300,
        tail=100,
        requests=3,
    ),
    "tiny": Scale(
        greedy=(_config("greedy, head size 16", 131, 64, 2, 4, 16),),
        prompts=(1, 9, 20),
        branches=2,
        new_tokens=8,
        logits=_config("2 layers of 128", 512, 128, 2, 4, 32),
        rows=32,
        trunk=24,
        tail=8,
        requests=2,
        width=2,
    ),
}


# --- greedy tokens ------------------------------------------------------------------------------------------


def random_prompts(scale: Scale, config: ModelConfig, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, config.vocab_size, length).tolist() for length in scale.prompts]


def greedy_here(folder: Path, prompts: Sequence[Sequence[int]], scale: Scale, backend: str | None) -> Tokens:
    model = load_model(str(folder), jnp.float32)
    return generate(
        model,
        prompts,
        max_tokens=scale.new_tokens,
        branches=scale.branches,
        page_size=PAGE,
        backend=backend,
    ).ids


def greedy_on_cpu(folder: Path, prompts: Sequence[Sequence[int]], scale: Scale) -> Tokens:
    """What taper-decode says where JAX sees nothing but the CPU."""
    ids = [word for prompt in prompts for word in ("--prompt-ids", ",".join(map(str, prompt)))]
    sizes = ["--max-tokens", str(scale.new_tokens), "--branches", str(scale.branches)]
    command = [sys.executable, "-c", "from model.decode import main; main()", "--model", str(folder)]
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


def check_greedy(scale: Scale, config: ModelConfig, seed: int, backend: str | None) -> dict[str, Any]:
    prompts = random_prompts(scale, config, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_hf(folder, config, hf_tensors(random_weights(Decoder(config, jnp.float32), seed, ON_ONE_DEVICE)))
        ours = greedy_here(folder, prompts, scale, backend)
        return {
            "model": config.name,
            "cpu": compare_tokens(ours, greedy_on_cpu(folder, prompts, scale)),
            "transformers": compare_tokens(ours, greedy_of_transformers(folder, prompts, scale)),
        }


# --- logits -------------------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Segment:
    """Tokens on pages of their own, after those of `parent`; `fed` of them have been fed."""

    tokens: np.ndarray
    pages: list[int]
    parent: Segment | None = None
    fed: int = 0
    logits: list[np.ndarray] = field(default_factory=list)

    @property
    def start(self) -> int:
        return 0 if self.parent is None else self.parent.start + len(self.parent.tokens)

    @property
    def left(self) -> int:
        return len(self.tokens) - self.fed

    def filled(self) -> Filled:
        """What has been fed."""
        return Filled(self.pages[: -(-self.fed // PAGE)], self.fed)


class Pages:
    """Gives out page ids, from the first on or from the last."""

    def __init__(self, count: int) -> None:
        self.free = list(range(count))

    def segment(self, tokens: np.ndarray, parent: Segment | None = None, *, last: bool = False) -> Segment:
        count = -(-len(tokens) // PAGE)
        taken = self.free[-count:] if last else self.free[:count]
        self.free = self.free[:-count] if last else self.free[count:]
        return Segment(tokens, taken, parent)


class Served:
    """A model behind one compiled step program that gives the logits of every row."""

    def __init__(self, scale: Scale, seed: int, backend: str | None) -> None:
        self.scale, self.config = scale, scale.logits
        dtype = jnp.bfloat16
        backend = backend or attention.default_backend(self.config.head_dim, dtype)
        longest = -(-scale.trunk // PAGE) - (-scale.tail // PAGE)
        # Everything that a check feeds, twice: for the requests, and for those beside them.
        self.num_pages = 2 * scale.requests * (scale.width + 1) * longest
        self.layout = StepLayout.for_bucket(
            self.config,
            backend,
            scale.rows,
            num_pages=self.num_pages,
            page_size=PAGE,
            samples=scale.rows,
            pages_per_read=longest,
        )
        self.model = random_weights(Decoder(self.config, dtype), seed, ON_ONE_DEVICE)
        self.cache = KVCache.create(self.config, self.num_pages, PAGE, dtype)
        structure, self.weights = self.model.split()

        def step(weights: Any, cache: KVCache, packed: Array) -> tuple[KVCache, Array]:
            nothing = jnp.zeros(1, jnp.int32)
            model = structure.merge(weights)
            return forward(model, cache, nothing, packed, layout=self.layout, backend=backend)[:2]

        arguments = self.weights, self.cache, jax.ShapeDtypeStruct((self.layout.size,), jnp.int32)
        self.step = jax.jit(step, donate_argnums=1).lower(*arguments).compile()

    def feed(self, *parts: tuple[Segment, int]) -> None:
        """One step: the next so many tokens of each segment. Appends their logits."""
        reads, rows = [], []
        for segment, count in parts:
            first = segment.fed
            segment.fed += count
            ordinals = np.arange(first, segment.fed)
            context = (segment.parent.filled(),) if segment.parent else ()
            reads.append(Read(context, segment.filled(), count, first))
            page, offset = np.array(segment.pages)[ordinals // PAGE], ordinals % PAGE
            rows.append((segment.tokens[ordinals], segment.start + ordinals, page, offset))
        order, work = attention.plan(Reads.of(reads), self.layout.capacity, PAGE)
        arrays = [np.concatenate([rows[i][part] for i in order]).astype(np.int32) for part in range(4)]
        every = np.arange(len(arrays[0]), dtype=np.int32)
        sample = SampleInputs(**dict.fromkeys(SampleInputs._fields, every))
        packed = self.layout.pack(StepInputs(*arrays, work=work, sample=sample))
        self.cache, logits = self.step(self.weights, self.cache, packed)
        logits, row = np.asarray(logits), 0
        for index in order.tolist():
            segment, count = parts[index]
            segment.logits.append(logits[row : row + count])
            row += count


def random_request(
    scale: Scale, rng: np.random.Generator, pages: Pages, *, last: bool = False
) -> list[Segment]:
    """A trunk and the branches that share it."""

    def tokens(count: int) -> np.ndarray:
        return rng.integers(0, scale.logits.vocab_size, count)

    trunk = pages.segment(tokens(scale.trunk), last=last)
    branches = [pages.segment(tokens(scale.tail), trunk, last=last) for _ in range(scale.width)]
    return [trunk, *branches]


def random_steps(served: Served, segments: Sequence[Segment], rng: np.random.Generator) -> None:
    """Feeds everything, in steps of single rows and chunks of segments whose parents have been read."""
    while unread := [s for s in segments if s.left and not (s.parent and s.parent.left)]:
        room, step = served.scale.rows, []
        for index in rng.permutation(len(unread)).tolist():
            count = min(int(rng.choice([1, 1, 5, 48])), unread[index].left, room)
            if count:
                step.append((unread[index], count))
                room -= count
        served.feed(*step)


def dense_logits(
    tensors: Mapping[str, Array], tokens: np.ndarray | Array, config: ModelConfig
) -> Float[Array, "tokens vocab"]:
    """Logits of a whole sequence at once, all in float32, from tensors under Hugging Face's names."""
    heads, kv_heads, size, count = config.num_heads, config.num_kv_heads, config.head_dim, len(tokens)

    def weight(name: str) -> Array:
        return tensors[f"{name}.weight"].astype(jnp.float32)

    def times(x: Array, name: str) -> Array:
        return jnp.matmul(x, weight(name).T, precision="highest")

    def norm(x: Array, name: str) -> Array:
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + config.rms_norm_eps) * weight(name)

    pairs = np.outer(np.arange(count), config.rope_theta ** -(np.arange(size // 2) * 2 / size))[:, None]
    cos, sin = (jnp.asarray(of(pairs), jnp.float32) for of in (np.cos, np.sin))

    def turn(x: Array) -> Array:
        first, second = x[..., : size // 2], x[..., size // 2 :]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    hidden = weight("model.embed_tokens")[tokens]
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        x = norm(hidden, f"{layer}.input_layernorm")
        q = times(x, f"{layer}.self_attn.q_proj").reshape(count, heads, size)
        k, v = (
            times(x, f"{layer}.self_attn.{name}_proj").reshape(count, kv_heads, size) for name in ("k", "v")
        )
        q, k = (turn(norm(y, f"{layer}.self_attn.{name}_norm")) for y, name in ((q, "q"), (k, "k")))
        k, v = (jnp.repeat(y, heads // kv_heads, axis=1) for y in (k, v))
        scores = jnp.einsum("ihd,jhd->hij", q, k, precision="highest") / np.sqrt(size)
        scores = jnp.where(np.tril(np.ones((count, count), bool)), scores, -jnp.inf)
        out = jnp.einsum("hij,jhd->ihd", jax.nn.softmax(scores), v, precision="highest")
        hidden += times(out.reshape(count, heads * size), f"{layer}.self_attn.o_proj")

        x = norm(hidden, f"{layer}.post_attention_layernorm")
        gate, up = times(x, f"{layer}.mlp.gate_proj"), times(x, f"{layer}.mlp.up_proj")
        hidden += times(jax.nn.silu(gate) * up, f"{layer}.mlp.down_proj")
    return times(norm(hidden, "model.norm"), "lm_head")


def check_logits(served: Served, seed: int) -> dict[str, Any]:
    rng, pages, scale = np.random.default_rng(seed), Pages(served.num_pages), served.scale
    requests = [random_request(scale, rng, pages) for _ in range(scale.requests)]
    random_steps(served, list(chain(*requests)), rng)
    tensors = {name: jnp.asarray(tensor) for name, tensor in hf_tensors(served.model).items()}
    oracle = jax.jit(partial(dense_logits, config=served.config))
    difference = size = 0.0
    clear = same = positions = 0
    for trunk, *branches in requests:
        for branch in branches:
            first = 0 if branch is branches[0] else len(trunk.tokens)  # the trunk counts once
            logits = np.concatenate([*trunk.logits, *branch.logits])[first:]
            reference = np.asarray(oracle(tensors, tokens=np.concatenate([trunk.tokens, branch.tokens])))[
                first:
            ]
            difference += float(np.square(logits - reference, dtype=np.float64).sum())
            size += float(np.square(reference, dtype=np.float64).sum())
            second, best = np.partition(reference, -2, axis=-1)[:, -2:].T
            leads = best - second > LEAD
            clear += int(leads.sum())
            same += int((logits.argmax(-1) == reference.argmax(-1))[leads].sum())
            positions += len(reference)
    error, agreement = (difference / size) ** 0.5, same / clear if clear else 0.0
    return {
        "model": served.config.name,
        "positions": positions,
        "error": error,
        "clear_positions": clear,
        "same_top_token": agreement,
        "ok": bool(error < ERROR_BAR and agreement >= AGREEMENT_BAR),
    }


# --- schedule invariance ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How the observed request is served.

    mates     other requests' rows in every step, as many as fit
    last      its pages have the highest ids, so that its rows come after the others'
    chunk     most rows of its trunk in a step
    width     branches that advance in a step; all unless set
    sharing   a branch of another request reads the same trunk in every step
    """

    mates: bool = False
    last: bool = False
    chunk: int | None = None
    width: int | None = None
    sharing: bool = False


SCHEDULES = {
    "alone, once more": Schedule(),
    "with others": Schedule(mates=True),
    "after others": Schedule(mates=True, last=True),
    "in small chunks": Schedule(chunk=7),
    "one branch at a time": Schedule(width=1),
    "its trunk shared": Schedule(sharing=True),
}


def serve_once(served: Served, schedule: Schedule, seed: int) -> np.ndarray:
    """Logits [tokens, vocab] of a request's trunk and branches, which depend on the seed only if at all."""
    scale, pages = served.scale, Pages(served.num_pages)
    rng, others = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    trunk, *branches = random_request(scale, rng, pages, last=schedule.last)
    guest = pages.segment(others.integers(0, scale.logits.vocab_size, scale.tail), trunk)
    mates = [s for _ in range(scale.requests - 1) for s in random_request(scale, others, pages)]
    width, chunk = schedule.width or scale.width, schedule.chunk or scale.rows // 2

    def feed(*parts: tuple[Segment, int]) -> None:
        room = scale.rows - sum(count for _, count in parts)
        step = list(parts)
        if schedule.sharing and guest.left and not trunk.left:
            step.append((guest, 1))
        ready = [s for s in mates if s.left and not (s.parent and s.parent.left)] if schedule.mates else []
        for segment in ready:
            count = min(int(others.choice([1, 3, 10])), segment.left, room)
            if count:
                step.append((segment, count))
                room -= count
        served.feed(*step)

    while trunk.left:
        feed((trunk, min(chunk, trunk.left)))
    for first in range(0, len(branches), width):
        for _ in range(scale.tail):
            feed(*((branch, 1) for branch in branches[first : first + width]))
    return np.concatenate([part for segment in (trunk, *branches) for part in segment.logits])


def check_schedules(served: Served, seed: int) -> list[dict[str, Any]]:
    alone = serve_once(served, Schedule(), seed)
    rows = []
    for name, schedule in SCHEDULES.items():
        logits = serve_once(served, schedule, seed)
        rows.append(
            {
                "schedule": name,
                "bit_equal_rows": float((logits == alone).all(-1).mean()),
                "largest_difference": float(np.abs(logits - alone).max()),
                "same_top_token": float((logits.argmax(-1) == alone.argmax(-1)).mean()),
            }
        )
    return rows


# --- the command --------------------------------------------------------------------------------------------


def passed(result: Mapping[str, Any]) -> bool:
    """Whether everything that could be compared is as it should be."""
    compared = [case[peer] for case in result["greedy"] for peer in ("cpu", "transformers") if case[peer]]
    return all(each["ok"] for each in [*compared, result["logits"]])


def print_result(result: Mapping[str, Any]) -> None:
    print(f"float32, backend {result['backends']['float32']}: greedy tokens as those of")
    for case in result["greedy"]:
        for peer in ("cpu", "transformers"):
            found = case[peer]
            says = (
                f"{found['same']} of {found['tokens']} {_verdict(found['ok'])}" if found else "not installed"
            )
            print(f"  {case['model']:<24}{peer:<14}{says}")
    logits = result["logits"]
    print(
        f"bfloat16, backend {result['backends']['bfloat16']}: {logits['positions']} positions of "
        f"{logits['model']} against float32: error {logits['error']:.2e} (bar {ERROR_BAR}), same top token "
        f"in {logits['same_top_token']:.2%} of the {logits['clear_positions']} that lead by {LEAD} "
        f"(bar {AGREEMENT_BAR:.0%}) {_verdict(logits['ok'])}"
    )
    print(f"one request in a bucket of {result['rows']} rows, compared with itself alone:")
    print(f"  {'':<24}{'bit-equal rows':>16}{'largest difference':>20}{'same top token':>16}")
    for row in result["schedules"]:
        print(
            f"  {row['schedule']:<24}{row['bit_equal_rows']:>16.1%}{row['largest_difference']:>20.2e}"
            f"{row['same_top_token']:>16.2%}"
        )


def _verdict(ok: bool) -> str:
    return "(ok)" if ok else "(MISSED)"


def main(arguments: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.checks.model", description="Checks what a model computes on this device."
    )
    parser.add_argument("--backend", default=None, help="default: the device's")
    parser.add_argument("--scale", choices=sorted(SCALES), default="full")
    parser.add_argument("--without-greedy", action="store_true", help="check logits and schedules only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    scale = SCALES[options.scale]
    backends = {
        jnp.dtype(dtype).name: options.backend or attention.default_backend(config.head_dim, dtype)
        for dtype, config in ((jnp.float32, scale.greedy[0]), (jnp.bfloat16, scale.logits))
    }
    result: dict[str, Any] = {
        **hardware.describe("python -m bench.checks.model"),
        "backends": backends,
        "rows": scale.rows,
        "seed": options.seed,
        "greedy": [
            check_greedy(scale, config, options.seed, options.backend)
            for config in (() if options.without_greedy else scale.greedy)
        ],
    }
    served = Served(scale, options.seed, options.backend)
    result["logits"] = check_logits(served, options.seed)
    result["schedules"] = check_schedules(served, options.seed)
    result["ok"] = passed(result)
    hardware.save(result, options.json)
    print_result(result)
    return result


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1:])["ok"] else 1)
