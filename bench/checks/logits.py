"""Logits in bfloat16 of forked sequences on pages, against a dense float32 pass that knows no pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from attention import Backend, PageRun, Read, Reads, default_backend
from bench.checks.scale import PAGE, Scale
from model.config import ModelConfig
from model.decoder import Decoder
from model.kv_cache import KVCache
from model.sampling import SampleInputs
from model.sharding import ON_ONE_DEVICE, Placement
from model.step import StepInputs, StepLayout, forward
from model.weights import hf_tensors, random_weights

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float

ERROR_BAR = 2e-2  # of ||logits - reference|| / ||reference||
LEAD = 0.1  # of the reference's best token over its second: where the best must be the same...
AGREEMENT_BAR = 0.99  # ...in this share of the places


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

    def filled(self) -> PageRun:
        """What has been fed."""
        return PageRun(self.pages[: -(-self.fed // PAGE)], self.fed)


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

    def __init__(
        self, scale: Scale, seed: int, backend: Backend | None, placement: Placement = ON_ONE_DEVICE
    ) -> None:
        self.scale, self.config = scale, scale.logits
        dtype = jnp.bfloat16
        backend = backend or default_backend(self.config.head_dim, dtype)
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
            placement=placement,
        )
        self.model = random_weights(Decoder(self.config, dtype), seed, placement)
        self.cache = KVCache.abstract(backend, self.config, self.num_pages, PAGE, dtype, placement).zeros()
        structure, self.weights = self.model.split()

        def step(weights: Any, cache: KVCache, packed: Array) -> tuple[KVCache, Array]:
            nothing = jnp.zeros(1, jnp.int32)
            model = structure.merge(weights)
            return forward(model, cache, nothing, packed, layout=self.layout)[:2]

        self.inputs = placement.abstract((self.layout.size,), jnp.int32, [None])
        arguments = self.weights, self.cache, self.inputs
        logits = placement.abstract((scale.rows, self.config.vocab_size), jnp.float32, [None, "vocab"])
        self.step = placement.compile(step, arguments, (self.cache, logits), donate=[1])

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
        order, work = self.layout.backend.lay_out(Reads.of(reads), self.layout.capacity)
        arrays = [np.concatenate([rows[i][part] for i in order]).astype(np.int32) for part in range(4)]
        every = np.arange(len(arrays[0]), dtype=np.int32)
        sample = SampleInputs(**dict.fromkeys(SampleInputs._fields, every))
        packed = self.layout.pack(StepInputs(*arrays, work=work, sample=sample))
        packed = jax.device_put(packed, self.inputs.sharding)
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
