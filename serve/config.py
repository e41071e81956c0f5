"""ServerConfig: everything an operator chooses, built once at the edge and passed down in parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from scheduler.policy import policy

CPU_BUCKETS = (8, 16, 32, 64)
ACCELERATOR_BUCKETS = (8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 384, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Options of `taper-serve`."""

    model: str = "default"
    """`default` (the embedded tiny model), the name of a preset, or a model folder."""
    load_format: Literal["auto", "random"] = "auto"
    """`random` makes weights on the device instead of reading them."""
    dtype: Literal["bfloat16", "float32", "float64"] | None = None
    """Type of weights, activations and KV pages: bfloat16 on an accelerator, float32 on a CPU, unless set.
    float64 is for exact tests on CPU."""
    attention: str = "auto"
    """Attention backend; `auto` picks by device."""
    tensor_parallel: int = 1
    """Devices of this machine that share the model: its heads, MLP and vocabulary are divided over them."""
    peer_memory: bool = False
    """Let two GPUs that share the model add up each layer's parts through each other's memory, where they can
    reach it, in place of by NCCL: a third of the time. New: no server has run with it for long."""
    deterministic: bool = False
    """On a GPU: what a row computes does not depend on the rows beside it. Slower where branches share a
    prefix; with a single bucket, tokens are the same under every schedule."""

    host: str = "127.0.0.1"
    """Address to listen on: loopback unless told otherwise."""
    port: int = 50051
    """Port to listen on; 0 picks a free one."""
    tokens: str | None = None
    """File of bearer tokens: who calls brings one of them, which says whose requests its are, and what it may
    do. Read again when it changes."""
    share_prefix_cache: bool = False
    """Let tenants share the KV pages of equal prompt beginnings. By the time to its first token, one can
    then tell whether another has sent a prompt."""
    control_host: str = "127.0.0.1"
    """Address for reflection and for what operators ask, if `control_port` gives them one of their own."""
    control_port: int | None = None
    """Port for reflection and for what operators ask: that of all else unless set. 0 picks a free one."""
    metrics_port: int | None = None
    """Serve Prometheus metrics on this port of the loopback interface; 0 picks a free one."""
    step_log: str | None = None
    """Write a line of JSON about every step to this file: what it held, its predicted and measured time."""
    engine_in_process: bool = False
    """Run the engine in the server's own process, where they take the interpreter from each other, instead of
    in one of its own."""
    step_timeout: float = 60.0
    """Seconds without the end of a step, while requests run, after which the engine's process is given up: it
    is killed, callers are told, and the server ends with an error. 0: never."""
    drain_timeout: float = 30.0
    """Seconds that running requests get to finish after SIGTERM."""

    policy: str = "taper"
    """Admission policy of extra branches: off, cap:N, eager, taper, or taper:linear, taper:concave,
    taper:priority, taper:paper. Can be switched while running."""
    tpot_slo_ms: float = 50.0
    """Default target of the gap between a request's tokens, in milliseconds."""
    min_tpot_slo_ms: float | None = None
    """The least such target that a request may ask for: what asks for less is refused, unless it wants best
    effort. The default target, but no more than 1.5 times the measured step of one row, unless set."""
    ttft_slo_ms: float = 5000.0
    """Default target of the time to a request's first token, in milliseconds."""
    reject_late: bool = False
    """Refuse a request whose first token can be expected to miss its target, instead of letting it wait; a
    request may say itself what it would rather have."""
    rho: float = 1.0
    """The share of the slack that extra branches may spend; 0.8 is the paper's."""
    repay: float = 8.0
    """Tokens within which a request that fell behind its pace catches up; 0, as in the paper: never."""
    reserve: float = 1.0
    """The share of what running requests may still need in KV pages that a new one must leave to them."""
    fill: bool = True
    """Let extra branches fill the padding of the baseline's own bucket."""

    profile: str = "auto"
    """Step times that the controller starts from: the file or the shipped name of a profile; `auto`, one that
    fits device and model, if there is one; `measure`, or no profile: a few steps are timed at start."""
    predictor: Literal["staircase", "staircase-raw", "linear", "linear-unique", "constant"] = "staircase"
    """Form of the step-time predictor; all but the default are for comparison, and need a profile."""

    page_size: int | None = None
    """KV positions in a page: 64 on an accelerator, 16 on a CPU, unless set."""
    num_pages: int | None = None
    """KV pages in the pool: as many as fit an accelerator's memory, 2048 on a CPU, unless set."""
    prefix_cache: bool = True
    """Share the KV pages of equal prompt beginnings between requests."""
    max_context: int | None = None
    """Longest context of a request in tokens; the model's own unless set."""
    buckets: tuple[int, ...] | None = None
    """Row counts that steps are padded to; one program is compiled for each. From 8 on, to 512 on an
    accelerator and to 64 on a CPU, unless set."""
    max_chunk: int | None = None
    """Most prompt tokens of one request in one step: as many as the largest bucket has rows unless set."""
    max_queue: int = 256
    """Most requests waiting to start."""
    max_client_queue: int | None = None
    """Most requests of one client (one tenant, or one connection where nobody tells them apart) waiting to
    start; as many as of all unless set."""
    max_client_running: int | None = None
    """Most requests of one client that run at once; its others wait. As many as can run unless set."""
    max_client_kv: float | None = None
    """The share of the KV pages that the running requests of one client may come to need; what may need more
    by itself is refused. No limit unless set."""

    max_calls: int = 4096
    """Most calls in flight that bring or brought a prompt, and as many others."""
    max_client_calls: int = 1024
    """Of these, the most of one client."""
    max_message_bytes: int = 1 << 22
    """Largest message that brings a prompt."""
    readers: int = 2
    """Processes that read prompts: they tokenize, and run the chat template. 0, and always with the engine in
    this process: threads of the server's, which nothing can stop."""
    read_timeout: float = 5.0
    """Seconds that reading one message may take."""
    read_memory_mb: int = 1024
    """MiB of memory that reading one message may take."""

    max_branches: int = 64
    """Most branches of one request, all stages together; where the model forks, of each fork."""
    max_depth: int = 4
    """Deepest nesting of forks."""
    max_logit_bias: int = 64
    """Most logit biases of one branch."""
    max_top_logprobs: int = 8
    """Most alternatives reported for each token."""
    default_max_tokens: int = 512
    """Limit of a stage whose request names none."""

    compilation_cache: str | None = "~/.cache/taper"
    """Folder that keeps compiled programs between starts; None compiles them anew."""
    seed: int = 0
    """Seed of random weights."""
    explain: bool = False
    """Get ready to serve, say what that took and how the memory is divided, and leave."""

    def for_platform(self, platform: str) -> ServerConfig:
        """With dtype, page size and buckets filled in for a JAX platform, "cpu" or another."""
        accelerated = platform != "cpu"
        buckets = ACCELERATOR_BUCKETS if accelerated else CPU_BUCKETS
        return replace(
            self,
            dtype=self.dtype or ("bfloat16" if accelerated else "float32"),
            page_size=self.page_size or (64 if accelerated else 16),
            buckets=self.buckets or buckets,
        )

    def __post_init__(self) -> None:
        """Raises ValueError for what would only be found after minutes of loading."""
        policy(self.policy)
        optional = ("page_size", "num_pages", "max_chunk", "max_context", "min_tpot_slo_ms")
        clients = ("max_client_queue", "max_client_running")
        bounds = ("max_calls", "max_client_calls", "max_message_bytes", "read_timeout", "read_memory_mb")
        counts = ("max_queue", "max_branches", "max_depth", "default_max_tokens", "tensor_parallel")
        for name in (*optional, *clients, *counts, *bounds, "tpot_slo_ms", "ttft_slo_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be more than 0, not {value}")
        if self.buckets is not None and (not self.buckets or any(bucket < 1 for bucket in self.buckets)):
            raise ValueError(f"buckets must be row counts of at least 1, not {self.buckets}")
        seconds = ("step_timeout", "drain_timeout")
        for name in ("max_logit_bias", "max_top_logprobs", "repay", "readers", *seconds):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a number that is not negative, not {value}")
        for name, most in (
            ("port", 65535),
            ("control_port", 65535),
            ("metrics_port", 65535),
            ("seed", 2**32 - 1),
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise ValueError(f"{name} must be from 0 to {most}, not {value}")
        for name in ("rho", "reserve", "max_client_kv"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be a share between 0 and 1, not {getattr(self, name)}")
