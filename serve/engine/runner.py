"""Runs step plans on the device: its weights, KV cache and slots, and the programs that step them.

One program per row bucket, and two small ones for slots that change hands, all compiled before the first
request. A launch hands over one int32 vector and returns at once: steps run in order on one donated cache,
and what a step sampled stays on the device for the next one. The vector's memory is used again once the step
has ended.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from attention import Backend
from model.decoder import Decoder
from model.kv_cache import KVCache, bytes_per_page
from model.sampling import (
    NO_TOKEN,
    SampleOutputs,
    SlotState,
    assign,
    count_history,
    pack_assignments,
    uses_of,
)
from model.sharding import ON_ONE_DEVICE, Placement, bytes_each
from model.step import StepBuffer, StepLayout, StepProgram, compile_step
from scheduler.buckets import Buckets
from scheduler.predictor import StepLatencyModel, StepLoad
from scheduler.sampling import SamplingParams
from scheduler.step import Entry, Sample, SegmentRead, SlotSetup, Step
from serve.engine.memory import MemoryPlan
from serve.engine.packing import step_inputs
from serve.logs.bugs import OperatorError


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """Sizes that programs are compiled for.

    buckets           row counts that steps are padded to
    num_slots         branches that keep device state
    max_logit_bias    biases of one slot
    max_top_logprobs  alternatives that a sample can report
    max_depth         nested forks of a request
    placement         the devices that share the model, its KV pages and the slots' state
    """

    num_pages: int
    page_size: int
    buckets: tuple[int, ...]
    num_slots: int
    backend: Backend
    max_logit_bias: int = 64
    max_top_logprobs: int = 8
    max_depth: int = 4
    placement: Placement = ON_ONE_DEVICE


class GarbageError(OperatorError):
    """The device sampled a token that there is not."""

    def __init__(self, token: int) -> None:
        what = "logits that are not numbers" if token == NO_TOKEN else f"token {token}, which there is not"
        super().__init__(f"the device came to {what}: the model, its kernels or the device are broken")


class StepHandle:
    """A launched step, of a model with `vocab` tokens."""

    def __init__(self, outputs: SampleOutputs, wanted: list[SamplingParams], vocab: int) -> None:
        self._outputs = outputs
        self._wanted = wanted
        self._vocab = vocab
        outputs.token.copy_to_host_async()

    def is_ready(self) -> bool:
        return cast(Any, self._outputs.token).is_ready()  # which jax's stubs do not know

    def samples(self) -> tuple[Sample, ...]:
        """Wait for the step; its sampled tokens, in the step's order. Raises GarbageError, or what JAX raises
        where the step failed."""
        sampled = np.asarray(self._outputs.token)[: len(self._wanted)]
        known = sampled.astype(np.uint32) < self._vocab  # and not less than 0
        if not known.all():
            raise GarbageError(sampled[~known][0])
        tokens = sampled.tolist()
        if not any(sampling.logprobs for sampling in self._wanted):
            return tuple(map(Sample, tokens))
        logprob, top_id, top_logprob = (np.asarray(output).tolist() for output in self._outputs[1:])
        samples: list[Sample] = []
        for i, (token, sampling) in enumerate(zip(tokens, self._wanted, strict=True)):
            top = tuple(zip(top_id[i], top_logprob[i], strict=True))[: sampling.top_logprobs]
            samples.append(Sample(token, logprob[i], top) if sampling.logprobs else Sample(token))
        return tuple(samples)


class Runner:
    """The device's side of a server: `launch` takes Steps, in order."""

    ASSIGNMENTS = 16  # slots that one call of the assign program sets
    HISTORY = 512  # known tokens that one call of the history program counts

    def __init__(self, model: Decoder, config: RunnerConfig) -> None:
        """`model` needs no weights yet: programs are compiled from shapes. They lie where `config` says."""
        self.config = config
        self.model_config = model.config
        self.buckets = Buckets(config.buckets)
        self._structure, weights = model.split()
        self._weight_shapes = tuple(
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for leaf in weights
        )
        self.dtype = model.dtype
        self._programs: dict[int, StepProgram] = {}
        # The buffers that steps of a bucket have read or still read, each with a result of its last reader.
        self._read: defaultdict[int, deque[tuple[StepBuffer, Any]]] = defaultdict(deque)
        self._params = [SamplingParams()] * config.num_slots  # what each slot was last set to
        self._uses = [0] * config.num_slots  # and the sampler's bits of it

    # --- start-up --------------------------------------------------------------------------------------

    def compile(self, told: Callable[[int, float], object] | None = None) -> dict[int, float]:
        """Compile every program; returns the seconds that each bucket took, of which `told` is told as it is
        done. Nothing compiles after this."""

        def compiled(bucket: int) -> float:
            seconds = self._compile_bucket(bucket)
            if told is not None:
                told(bucket, seconds)
            return seconds

        with self._precision():
            self._assign = self._compiled(assign, self._assignments([]))
            count = partial(count_history, peers=self.config.placement.vocab_peers)
            self._count = self._compiled(count, *_history_call(0, (), self.HISTORY, False))
        largest_first = [*self.buckets][::-1]
        with ThreadPoolExecutor(max_workers=4) as pool:
            return dict(zip(largest_first, pool.map(compiled, largest_first), strict=True))

    def hold(self, model: Decoder, known: Collection[int] | None = None) -> None:
        """Take the weights, and make room for KV and slots. `known`: the ids that may be sampled, or all."""
        _, self.weights = model.split()
        config, vocab = self.config, self.model_config.vocab_size
        with self._precision():
            self.cache = self._cache_shapes.zeros()
            self.slots = SlotState.create(
                config.num_slots, vocab, config.max_logit_bias, known, config.placement
            )

    @property
    def _slot_shapes(self) -> SlotState:
        config, vocab = self.config, self.model_config.vocab_size
        return SlotState.abstract(config.num_slots, vocab, config.max_logit_bias, config.placement)

    @property
    def _cache_shapes(self) -> KVCache:
        config = self.config
        return KVCache.abstract(
            config.backend,
            self.model_config,
            config.num_pages,
            config.page_size,
            self.dtype,
            config.placement,
        )

    def memory(self, limit: int) -> MemoryPlan:
        """How `limit` bytes of each device divide; compiles the largest step to learn what it needs."""
        self._compile_bucket(self.buckets.largest)
        config = self.config
        return MemoryPlan(
            limit=limit,
            weights=bytes_each(self._weight_shapes),
            slots=bytes_each(self._slot_shapes),
            step=self._programs[self.buckets.largest].working_bytes,
            page=bytes_per_page(
                config.backend, self.model_config, config.page_size, self.dtype, config.placement
            ),
        )

    def _compile_bucket(self, bucket: int) -> float:
        config, started = self.config, time.perf_counter()
        # The context bounds no read: what a kv join leaves behind are branches with the same positions.
        layout = StepLayout.for_bucket(
            self.model_config,
            config.backend,
            bucket,
            num_pages=config.num_pages,
            page_size=config.page_size,
            samples=min(bucket, config.num_slots),
            paths=1 + config.max_depth,  # a page's own branch, and the join of every fork around it
            placement=config.placement,
        )
        with self._precision():
            self._programs[bucket] = compile_step(
                self._structure,
                self._weight_shapes,
                self._cache_shapes,
                self._slot_shapes,
                layout=layout,
                max_top_logprobs=config.max_top_logprobs,
            )
        return time.perf_counter() - started

    def measure(self, repeats: int = 5) -> StepLatencyModel:
        """Time every bucket, full of decode rows, and the largest also with as much KV as the pool holds.

        Writes to the pool's pages: call it before there are requests.
        """
        seconds = {bucket: self.seconds(self.probe(bucket, 1), repeats) for bucket in self.buckets}
        largest, page_size = self.buckets.largest, self.config.page_size
        pages_each = max(1, self.config.num_pages // largest)
        kv_tokens = largest * (pages_each - 1) * page_size
        more = self.seconds(self.probe(largest, pages_each), repeats) - seconds[largest]
        return StepLatencyModel(seconds, more / kv_tokens if kv_tokens else 0.0)

    def seconds(self, step: Step, repeats: int) -> float:
        """Median time of a step on the device: from the end of one to the end of the next, in a queue of two.

        It is greedy whatever the step's slots want, and writes to the step's pages and slots.
        """
        program, packed = self.packed(step)
        packed = jax.device_put(packed, program.inputs)

        def launch() -> SampleOutputs:
            with self._precision():
                self.cache, self.slots, outputs = program(self.weights, self.cache, self.slots, packed)
            return outputs

        flying, ends = deque([launch(), launch()]), []
        for _ in range(repeats + 1):
            jax.block_until_ready(flying.popleft())
            ends.append(time.perf_counter())
            flying.append(launch())
        jax.block_until_ready(flying)
        return statistics.median(end - start for start, end in pairwise(ends))

    def probe(self, bucket: int, pages_each: int) -> Step:
        """A step of `bucket` decode rows with `pages_each` full pages each."""
        config = self.config
        length = pages_each * config.page_size

        def entry(row: int) -> Entry:
            pages = tuple((row * pages_each + page) % config.num_pages for page in range(pages_each))
            return Entry(
                request_id="",
                branch=row,
                segment=row,
                slot=row,
                start=length - 1,
                ordinal=length - 1,
                rows=1,
                tokens=(0,),
                context=(),
                own=SegmentRead(pages, length),
                samples=True,
                path=(),
            )

        return Step(-1, tuple(entry(row) for row in range(bucket)), slots=(), bucket=bucket)

    def probe_load(self, bucket: int, pages_each: int) -> StepLoad:
        """What `probe` computes and reads."""
        positions = bucket * pages_each * self.config.page_size
        return StepLoad(bucket, private_kv=positions, items=bucket, raw_kv=positions)

    # --- steps -----------------------------------------------------------------------------------------

    def launch(self, step: Step) -> StepHandle:
        """Start a step, after giving slots that change hands to their new branches."""
        sampled = [entry.slot for entry in step.entries if entry.slot is not None]
        with self._precision():
            self._set_slots(step.slots)
            uses = 0
            for slot in sampled:
                uses |= self._uses[slot]
            program, buffer = self._programs[step.bucket], self._buffer(step.bucket)
            packed = buffer.pack(step_inputs(step, program.layout))
            self.cache, self.slots, outputs = program(self.weights, self.cache, self.slots, packed, uses)
        self._read[step.bucket].append((buffer, outputs.token))
        wanted = [self._params[slot] for slot in sampled]
        return StepHandle(outputs, wanted, self.model_config.vocab_size)

    def packed(self, step: Step) -> tuple[StepProgram, np.ndarray]:
        """The program of a step's bucket, and what it is told."""
        program = self._programs[step.bucket]
        return program, program.layout.pack(step_inputs(step, program.layout))

    def _buffer(self, bucket: int) -> StepBuffer:
        """One that no step in flight reads. Steps end in their order: the first one in use is free first."""
        read = self._read[bucket]
        if read and read[0][1].is_ready():
            return read.popleft()[0]
        return StepBuffer(self._programs[bucket].layout)

    def _set_slots(self, setups: Sequence[SlotSetup]) -> None:
        for start in range(0, len(setups), self.ASSIGNMENTS):
            self.slots = self._assign(self.slots, self._assignments(setups[start : start + self.ASSIGNMENTS]))
        for setup in setups:
            for ids, generated in ((setup.given, False), (setup.generated, True)):
                for start in range(0, len(ids), self.HISTORY):
                    call = _history_call(
                        setup.slot, ids[start : start + self.HISTORY], self.HISTORY, generated
                    )
                    self.slots = self._count(self.slots, *call)

    def _assignments(self, setups: Sequence[SlotSetup]) -> np.ndarray:
        for setup in setups:
            self._params[setup.slot] = setup.sampling
            self._uses[setup.slot] = uses_of(setup.sampling)
        return pack_assignments(
            [(setup.slot, setup.sampling) for setup in setups],
            capacity=self.ASSIGNMENTS,
            slots=self.config.num_slots,
            vocab=self.model_config.vocab_size,
            max_bias=self.config.max_logit_bias,
        )

    def _compiled(
        self, function: Callable[..., SlotState], *arguments: np.ndarray
    ) -> Callable[..., SlotState]:
        """A program that changes the slots, which it takes first and donated."""
        slots = self._slot_shapes
        return self.config.placement.compile(function, (slots, *arguments), slots, donate=[0])

    def _precision(self) -> AbstractContextManager[Any]:
        """64-bit types are a per-thread setting of JAX: on exactly where the model is float64."""
        return jax.enable_x64(self.dtype == jnp.float64)


def _history_call(slot: int, ids: Sequence[int], room: int, generated: bool) -> tuple[np.ndarray, ...]:
    """Arguments of `count_history`, the ids padded to `room`."""
    padded = np.zeros(room, np.int32)
    padded[: len(ids)] = ids
    return np.int32(slot), padded, np.int32(len(ids)), np.bool_(generated)  # type: ignore[return-value]
