"""The options of `taper-serve`, group by group: each class is a group of --help, and a table of its file.

A field is an option: its name is the flag's, the text below it the flag's help, and a range beside its type
is checked at start. What is wrong with several fields together is for the group's `check`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scheduler.config import RESERVE
from scheduler.policy import policy
from serve.config.errors import OptionError, flag, naming
from serve.config.ranges import (
    MOST,
    Count,
    CountOfGrpc,
    CountOrZero,
    Mebibytes,
    NotNegative,
    Port,
    Positive,
    Seconds,
    Seed,
    Share,
)


@dataclass(frozen=True, kw_only=True)
class Group:
    """What all groups have."""

    def check(self) -> None:
        """Raises OptionError for what would only be found after minutes of loading, besides ranges."""


@dataclass(frozen=True, kw_only=True)
class Model(Group):
    """What is served, and on which devices."""

    model: str = "default"
    """`default` (the embedded tiny model), the name of a preset, or a model folder."""
    tag_set: Literal["multiverse", "npr", "threadweaver"] | None = None
    """The tags by which the model forks by itself, and the join that goes with them, where its config.json
    does not say: checkpoints as published do not."""
    load_format: Literal["auto", "random"] = "auto"
    """`random` makes weights on the device instead of reading them."""
    seed: Seed[int] = 0
    """Seed of random weights."""
    dtype: Literal["bfloat16", "float32", "float64"] | None = None
    """Type of weights, activations and KV pages: bfloat16 on an accelerator, float32 on a CPU, unless set.
    float64 is for exact tests on CPU."""
    attention: str = "auto"
    """Attention backend; `auto` picks by device."""
    tensor_parallel: Count[int] = 1
    """Devices of this machine that share the model: its heads, MLP and vocabulary are divided over them."""
    peer_memory: bool = True
    """Let two GPUs that share the model add up each layer's parts through each other's memory, where they can
    reach it: a third of the time that NCCL takes."""
    deterministic: bool = False
    """On a GPU: what a row computes does not depend on the rows beside it. Slower where branches share a
    prefix; with a single bucket, tokens are the same under every schedule."""


@dataclass(frozen=True, kw_only=True)
class Listening(Group):
    """Where clients find the server."""

    host: str = "127.0.0.1"
    """Address to listen on: loopback unless told otherwise."""
    port: Port[int] = 50051
    """Port to listen on; 0 picks a free one."""
    control_host: str = "127.0.0.1"
    """Address for reflection and for what operators ask, if `control_port` gives them one of their own."""
    control_port: Port[int | None] = None
    """Port for reflection and for what operators ask: that of all else unless set. 0 picks a free one."""
    gateway_host: str = "127.0.0.1"
    """Address for gateways, if `gateway_port` lets them in: whoever reaches it may use the model."""
    gateway_port: Port[int | None] = None
    """Port for gateways that speak OpenAI's HTTP API to their clients, such as SMG: the gRPC service of
    vLLM's engine, in plaintext and without tokens. Closed unless set. 0 picks a free one."""


@dataclass(frozen=True, kw_only=True)
class Security(Group):
    """Who may call the server, and what callers may learn of each other."""

    tokens: str | None = None
    """File of bearer tokens: who calls brings one of them, which says whose requests its are, and what it may
    do. Read again when it changes."""
    tls_cert_path: str | None = None
    """PEM file of the server's certificate, and of those that lead from it to its authority. With it and its
    key, every port speaks TLS. Read again when it changes."""
    tls_key_path: str | None = None
    """PEM file of the certificate's key, without a password."""
    tls_client_ca_cert_path: str | None = None
    """PEM file of the authorities that clients' certificates may come from: each client needs one. Without
    `tokens`, the name in it says whose requests its are."""
    share_prefix_cache: bool = False
    """Let tenants share the KV pages of equal prompt beginnings. By the time to its first token, one can
    then tell whether another has sent a prompt."""

    def check(self) -> None:
        cert, key, authorities = "tls_cert_path", "tls_key_path", "tls_client_ca_cert_path"
        for option, needed in ((cert, key), (key, cert), (authorities, cert)):
            if getattr(self, option) is not None and getattr(self, needed) is None:
                raise OptionError(f"{flag(option)} needs {flag(needed)}, too", option, needed)


@dataclass(frozen=True, kw_only=True)
class Scheduling(Group):
    """Which branches run, and what every request is owed."""

    policy: str = "taper"
    """Admission policy of extra branches: off, cap:N, eager, taper, or taper:linear, taper:concave,
    taper:priority, taper:paper. Can be switched while running."""
    tpot_slo_ms: Positive[float] = 50.0
    """Default target of the gap between a request's tokens, in milliseconds."""
    min_tpot_slo_ms: Positive[float | None] = None
    """The least such target that a request may ask for: what asks for less is refused, unless it wants best
    effort. The default target, but no more than 1.5 times the measured step of one row, unless set."""
    ttft_slo_ms: Positive[float] = 5000.0
    """Default target of the time to a request's first token, in milliseconds."""
    reject_late: bool = False
    """Refuse a request whose first token can be expected to miss its target, instead of letting it wait; a
    request may say itself what it would rather have."""
    rho: Share[float] = 1.0
    """The share of the slack that extra branches may spend; 0.8 is the paper's."""
    repay: NotNegative[float] = 8.0
    """Tokens within which a request that fell behind its pace catches up; 0, as in the paper: never."""
    reserve: Share[float] = RESERVE
    """The share of what running requests may still need in KV pages that a new one must leave to them. Where
    they come to need more, the youngest are preempted; where less, others wait for pages that nobody uses."""
    fill: bool = True
    """Let extra branches fill the padding of the baseline's own bucket."""
    profile: str = "auto"
    """Step times that the controller starts from: the file or the shipped name of a profile; `auto`, one that
    fits device and model, if there is one; `measure`, or no profile: a few steps are timed at start."""
    predictor: Literal["staircase", "staircase-raw", "linear", "linear-unique", "constant"] = "staircase"
    """Form of the step-time predictor; all but the default are for comparison, and need a profile."""

    def check(self) -> None:
        with naming("policy"):
            policy(self.policy)
        if self.predictor != "staircase" and self.profile == "measure":
            raise OptionError(
                f"--predictor {self.predictor} needs a --profile: it cannot be measured",
                "predictor",
                "profile",
            )


@dataclass(frozen=True, kw_only=True)
class Memory(Group):
    """How the KV cache is divided, and how large a step is."""

    page_size: Count[int | None] = None
    """KV positions in a page: 64 on an accelerator, 16 on a CPU, unless set."""
    num_pages: Count[int | None] = None
    """KV pages in the pool: as many as fit an accelerator's memory, 2048 on a CPU, unless set."""
    prefix_cache: bool = True
    """Share the KV pages of equal prompt beginnings between requests."""
    max_context: Count[int | None] = None
    """Longest context of a request in tokens; the model's own unless set."""
    buckets: tuple[int, ...] | None = None
    """Row counts that steps are padded to; one program is compiled for each. From 8 on, to 512 on an
    accelerator and to 64 on a CPU, unless set."""
    max_chunk: Count[int | None] = None
    """Most prompt tokens of one request in one step: as many as the largest bucket has rows unless set."""

    def check(self) -> None:
        if self.buckets is not None and not (
            self.buckets and all(1 <= rows <= MOST for rows in self.buckets)
        ):
            raise OptionError.must_be("buckets", f"row counts from 1 to {MOST}", self.buckets)


@dataclass(frozen=True, kw_only=True)
class Clients(Group):
    """How much all clients, and each of them, may ask for at a time."""

    max_queue: Count[int] = 256
    """Most requests waiting to start."""
    max_client_queue: Count[int | None] = None
    """Most requests of one client (one tenant, or one connection where nobody tells them apart) waiting to
    start; as many as of all unless set."""
    max_client_running: Count[int | None] = None
    """Most requests of one client that run at once; its others wait. As many as can run unless set."""
    max_client_kv: Share[float | None] = None
    """The share of the KV pages that the running requests of one client may come to need; what may need more
    by itself is refused. No limit unless set."""
    max_calls: Count[int] = 4096
    """Most calls in flight that bring or brought a prompt, and as many others."""
    max_client_calls: CountOfGrpc[int] = 1024
    """Of these, the most of one client."""


@dataclass(frozen=True, kw_only=True)
class Reading(Group):
    """What reading a prompt may take."""

    max_message_bytes: CountOfGrpc[int] = 1 << 22
    """Largest message that brings a prompt."""
    readers: CountOrZero[int] = 2
    """Processes that read prompts: they tokenize, and run the chat template. 0, and always with the engine in
    this process: threads of the server's, which nothing can stop."""
    read_timeout: Positive[float] = 5.0
    """Seconds that reading one message may take."""
    read_memory_mb: Mebibytes[int] = 1024
    """MiB of memory that reading one message may take."""


@dataclass(frozen=True, kw_only=True)
class Requests(Group):
    """What one request may ask for."""

    max_branches: Count[int] = 64
    """Most branches of one request, all stages together; where the model forks, of each fork."""
    max_depth: Count[int] = 4
    """Deepest nesting of forks."""
    max_logit_bias: CountOrZero[int] = 64
    """Most logit biases of one branch."""
    max_top_logprobs: CountOrZero[int] = 8
    """Most alternatives reported for each token."""
    default_max_tokens: Count[int] = 512
    """Limit of a stage whose request names none."""


@dataclass(frozen=True, kw_only=True)
class Observing(Group):
    """What the server says about itself."""

    log_format: Literal["console", "json"] = "console"
    """Lines of the log for people, or a JSON object each."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least important lines that are written. At debug, what a bug's exception says is shown, which may
    be a part of a prompt."""
    metrics_port: Port[int | None] = None
    """Serve Prometheus metrics on this port, by HTTP or, with a certificate, by HTTPS; 0 picks a free one."""
    metrics_host: str = "127.0.0.1"
    """Address of that port: loopback unless told otherwise."""
    vllm_metric_names: bool = False
    """Report how busy the server is under vLLM's names, too (vllm:num_requests_waiting and others), for
    autoscalers and routers that read those."""
    step_log: str | None = None
    """Write a line of JSON about every step to this file: what it held, its predicted and measured time."""


@dataclass(frozen=True, kw_only=True)
class Running(Group):
    """How the server starts, and when it ends."""

    compilation_cache: str | None = "~/.cache/taper"
    """Folder that keeps compiled programs between starts; None compiles them anew."""
    engine_in_process: bool = False
    """Run the engine in the server's own process, where they take the interpreter from each other, instead of
    in one of its own."""
    step_timeout: Seconds[float] = 60.0
    """Seconds without the end of a step, while requests run, after which the engine's process is given up: it
    is killed, callers are told, and the server ends with an error. 0: never."""
    drain_timeout: Seconds[float] = 30.0
    """Seconds that running requests get to finish after SIGTERM."""
    explain: bool = False
    """Get ready to serve, say what that took and how the memory is divided, and leave."""
