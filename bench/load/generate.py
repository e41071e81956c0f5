"""Output tokens per second of a batch of requests: the server through gRPC, and transformers.

    python -m bench.load.generate --model qwen3-8b --peers transformers --json OUT
    python -m bench.load.generate --model qwen3-8b --interval-ms 50 -- --attention xla  # taper-serve's

All prompts are sent at once, as random token ids; answers are greedy and all have the same length. Every
contender runs in a process of its own (this one leaves the device alone), one after the other, with random
weights of the same shapes, and runs twice with different prompts: the first run warms up, the second counts.
What is timed ends with the last token, and begins with the first request sent (taper), or with the batch on
its way to the device (transformers). --interval-ms asks the server for fewer, larger messages; a token counts
when its message comes.

The byte floor of decoding: every weight and every position of KV read once for a step, at the copy rate of
this device. It is compared with the time in which all requests were decoding and none was finished.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from bench import hardware
from bench.command import Command, split
from bench.device.floor import floor_seconds, kv_bytes, weight_bytes
from bench.load.driver import Answer, connected, message, play
from bench.load.workload import Item
from bench.result import conclude, head, keep
from bench.server import started
from bench.timing import clock
from model.config import ModelConfig
from model.find import model_config
from scheduler.request import Slo

# transformers' ways: (mode, attention, options). Those that an installation cannot run are reported.
SETTINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "static sdpa": ("static", "sdpa", {}),
    "static flash_attention_2": ("static", "flash_attention_2", {}),
    "static sdpa compiled": ("static", "sdpa", {"cache_implementation": "static"}),
    "continuous sdpa": ("continuous", "sdpa", {}),
    "continuous paged|sdpa": ("continuous", "paged|sdpa", {}),
    "continuous paged|eager": ("continuous", "paged|eager", {}),
    "continuous sdpa graphs": ("continuous", "sdpa", {"use_cuda_graph": True, "use_async_batching": True}),
    "continuous flash_attention_2": ("continuous", "flash_attention_2", {}),
}
PAGE = 64
PATIENT = Slo(tpot=1e3, ttft=1e3)  # no target of latency holds a request back
TIMEOUT = 400  # seconds that a peer's setting gets


@dataclass(frozen=True, slots=True)
class Load:
    """`prompts` requests of `prompt_tokens` random ids, each continued by exactly `new_tokens`."""

    model: str
    dtype: str
    prompts: int
    prompt_tokens: int
    new_tokens: int
    seed: int

    @property
    def config(self) -> ModelConfig:
        return model_config(self.model)

    @property
    def output_tokens(self) -> int:
        return self.prompts * self.new_tokens

    def seeds(self, run: int) -> list[int]:
        """Of the prompts of a run, for taper; no two are the same."""
        first = self.prompts * (2 * self.seed + run)
        return [*range(first, first + self.prompts)]

    def ids(self, run: int) -> list[list[int]]:
        """The prompts of a run, for its peers; each run has others, so that none finds them in a cache."""
        rng = np.random.default_rng((self.seed, run))
        return rng.integers(0, self.config.vocab_size, (self.prompts, self.prompt_tokens)).tolist()


# --- this server --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When each request's tokens arrived: [requests, new_tokens] seconds since the first was sent."""

    seconds: np.ndarray

    @property
    def total(self) -> float:
        return float(self.seconds.max())

    @property
    def together(self) -> tuple[float, float]:
        """From when all requests have their first token until the first has its last."""
        return float(self.seconds[:, 0].max()), float(self.seconds[:, -1].min())

    def decoded_together(self) -> tuple[float, float] | None:
        """(tokens per second, mean tokens of an answer so far) while all were decoding; None if never.

        The sum of each request's own pace, from its first message in that time to its last: what a step
        brings comes spread over milliseconds, and between two common moments there may be a token of each
        more or less.
        """
        begin, end = self.together
        paces: list[float] = []
        for times in self.seconds:
            inside = times[(times >= begin) & (times <= end)]
            if not inside.size or inside[0] == inside[-1]:
                return None
            paces.append((inside > inside[0]).sum() / (inside[-1] - inside[0]))
        before, after = ((self.seconds <= moment).sum(1) for moment in (begin, end))
        return float(sum(paces)), float((before + after).mean() / 2)


async def send_all(address: str, load: Load, run: int, interval_ms: float = 0.0) -> Arrivals:
    """Sends all requests at once and notes when each token comes."""
    item, salt = Item(0.0, load.prompt_tokens, ((load.new_tokens,),)), uuid.uuid4().hex
    seeds = load.seeds(run)
    requests = [
        message(item, f"{salt}-{seed}", seed, load.config.vocab_size, slo=PATIENT, interval_ms=interval_ms)
        for seed in seeds
    ]
    async with connected(address) as driver:
        replies = await play(driver, requests, [0.0] * len(requests))
    answers = [Answer.of(reply) for reply in replies]
    short = [reply for answer, reply in zip(answers, replies, strict=True) if answer.stages != item.stages]
    if short:
        raise RuntimeError(f"an answer has fewer than {load.new_tokens} tokens: {short[0].error}")
    began = replies[0].due
    return Arrivals(np.array([[at - began for at in answer.token_times] for answer in answers]))


def server_options(load: Load, buckets: Sequence[int]) -> list[str]:
    """Room for all requests at once and an eighth more."""
    pages = load.prompts * (-(-(load.prompt_tokens + load.new_tokens) // PAGE) + 1) * 9 // 8
    return [
        *("--model", load.model, "--load-format", "random", "--dtype", load.dtype, "--policy", "off"),
        *("--page-size", str(PAGE), "--num-pages", str(pages), "--buckets", *map(str, buckets)),
    ]


def measure_taper(load: Load, options: Sequence[str], interval_ms: float) -> dict[str, Any]:
    with started(options) as server:
        _, arrivals = (asyncio.run(send_all(server.address, load, run, interval_ms)) for run in range(2))
    first = np.sort(arrivals.seconds[:, 0])
    decoding = arrivals.decoded_together()
    return {
        "options": list(options),
        "interval_ms": interval_ms,
        "ready_seconds": server.ready_seconds,
        "seconds": arrivals.total,
        "tokens_per_second": load.output_tokens / arrivals.total,
        "first_token_seconds": {"median": float(np.median(first)), "last": float(first[-1])},
        "decode": decoding and {"tokens_per_second": decoding[0], "mean_answer_tokens": decoding[1]},
    }


def decode_floor(load: Load, answer_tokens: float, copy_tb_s: float) -> dict[str, Any]:
    """Most tokens per second that bytes allow while every answer has so many tokens, on average."""
    read = load.prompts * (load.prompt_tokens + answer_tokens)
    seconds = floor_seconds(load.config, load.dtype, read, copy_tb_s)
    return {
        "weight_bytes": weight_bytes(load.config, load.dtype),
        "kv_bytes": kv_bytes(load.config, load.dtype, read),
        "step_ms": 1e3 * seconds,
        "tokens_per_second": load.prompts / seconds,
    }


# --- transformers, in a process of its own ------------------------------------------------------------------


def run_transformers(load: Load, setting: str) -> dict[str, Any]:
    """Times one of SETTINGS on the device of this process. Raises whatever keeps it from running."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    mode, attention, options = SETTINGS[setting]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    skipped = ("architectures", "taper", "_name_or_path", "model_type", "eos_token_id")
    shape = {key: value for key, value in load.config.to_hf().items() if key not in skipped}
    config = transformers.AutoConfig.for_model(load.config.architecture, **shape)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, load.dtype), attn_implementation=attention
        ).eval()
    run = {"static": _static, "continuous": _continuous}[mode](torch, transformers, model, load, options)
    _, seconds = run(load.ids(0)), run(load.ids(1))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"seconds": seconds, "tokens_per_second": load.output_tokens / seconds, "versions": versions}


def _static(
    torch: Any, transformers: Any, model: Any, load: Load, options: Mapping[str, Any]
) -> Callable[[list[list[int]]], float]:
    settings = transformers.GenerationConfig(
        max_new_tokens=load.new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )

    def run(prompts: list[list[int]]) -> float:
        ids = torch.tensor(prompts, device=model.device)
        began = clock()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        _expect(load, [len(row) - load.prompt_tokens for row in out.tolist()])
        return clock() - began

    return run


def _continuous(
    torch: Any, transformers: Any, model: Any, load: Load, options: Mapping[str, Any]
) -> Callable[[list[list[int]]], float]:
    settings = transformers.GenerationConfig(
        max_new_tokens=load.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    module = importlib.import_module("transformers.generation.configuration_utils")
    batching = module.ContinuousBatchingConfig(**options)
    if hasattr(batching, "auto_switch_to_flash"):  # newer than 5.17
        batching.auto_switch_to_flash = False

    def run(prompts: list[list[int]]) -> float:
        began = clock()
        results = model.generate_batch(
            prompts,
            generation_config=settings,
            continuous_batching_config=batching,
            persistent_manager=True,
        ).values()
        errors = [result.error for result in results if result.error]
        if errors:
            raise RuntimeError(errors[0])
        _expect(load, [len(result.generated_tokens) for result in results])
        # Not to the return of the call, which also stops its thread.
        return max(result.lifespan[1] for result in results) - began

    return run


def _expect(load: Load, lengths: Sequence[int]) -> None:
    if list(lengths) != [load.new_tokens] * load.prompts:
        raise RuntimeError(f"expected {load.prompts} answers of {load.new_tokens} tokens, got {lengths}")


# --- processes ----------------------------------------------------------------------------------------------


def describe_device() -> dict[str, Any]:
    size = {"size": 2**20} if jax.default_backend() == "cpu" else {}
    return hardware.describe() | {"copy_tb_s": hardware.copy_tb_s(**size)}


def child(part: str, load: Load) -> dict[str, Any]:
    """Runs "device" or a peer's setting in a process of its own, so that its memory is free again.

    A failure is {"error": its last line}.
    """
    told = ["--part", part, "--load", json.dumps(asdict(load))]
    command = [sys.executable, "-m", "bench.load.generate", *told]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {TIMEOUT} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": lines[-1][:300] if lines else f"ended with {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def run_part(part: str, load: Load) -> dict[str, Any]:
    return describe_device() if part == "device" else run_transformers(load, part)


# --- the command --------------------------------------------------------------------------------------------


def best_peer(result: Mapping[str, Any]) -> tuple[str, float] | None:
    """The fastest setting that ran, and its tokens per second."""
    rates = {name: each["tokens_per_second"] for name, each in result["peers"].items() if "error" not in each}
    return max(rates.items(), key=lambda item: item[1]) if rates else None


def compare(result: dict[str, Any], load: Load) -> None:
    """Adds what the figures mean: the ratio to the best peer, and the share of the floor."""
    ours, best = result["taper"], best_peer(result)
    if best:
        result["best_peer"], result["ratio"] = best[0], ours["tokens_per_second"] / best[1]
    if ours["decode"]:
        floor = decode_floor(load, ours["decode"]["mean_answer_tokens"], result["copy_tb_s"])
        share = ours["decode"]["tokens_per_second"] / floor["tokens_per_second"]
        result |= {"floor": floor, "share_of_floor": share}


def text(result: Mapping[str, Any]) -> str:
    ours = result["taper"]
    lines = [f"{'':<42}{'tokens/s':>10}{'seconds':>10}"]
    rows = {"taper-serve, gRPC": ours, **{f"transformers {k}": v for k, v in result["peers"].items()}}
    for name, row in rows.items():
        figures = row.get("error") or f"{row['tokens_per_second']:>10.0f}{row['seconds']:>10.2f}"
        lines.append(f"{name:<42}{figures}")
    if "ratio" in result:
        lines.append(f"{result['ratio']:.2f} x the best of transformers ({result['best_peer']})")
    if "floor" in result:
        floor, decode = result["floor"], ours["decode"]
        lines.append(
            f"decoding together: {decode['tokens_per_second']:.0f} tokens/s; bytes allow "
            f"{floor['tokens_per_second']:.0f} ({floor['step_ms']:.2f} ms a step): share "
            f"{result['share_of_floor']:.2f}"
        )
    first = ours["first_token_seconds"]
    lines.append(
        f"first tokens: median {first['median']:.2f} s, last {first['last']:.2f} s; "
        f"ready after {ours['ready_seconds']:.0f} s"
    )
    return "\n".join(lines)


def command() -> Command:
    parser = Command("bench.load.generate", "Output tokens per second of a batch of requests.")
    add = parser.add_argument
    add("--model", default="qwen3-8b", help="a preset, a folder or default")
    add("--dtype", default="bfloat16")
    add("--prompts", type=int, default=64)
    add("--prompt-tokens", type=int, default=512)
    add("--new-tokens", type=int, default=128)
    add("--buckets", type=int, nargs="+", default=[64, 128, 256, 512])
    add("--interval-ms", type=float, default=0.0, help="least time between two messages of a stream")
    add("--peers", nargs="*", choices=["transformers"], default=[])
    add("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    add("--seed", type=int, default=0)
    return parser


def main(arguments: Sequence[str]) -> dict[str, Any]:
    own, extra = split(arguments)
    options = command().parse_args(own)
    load = Load(
        options.model, options.dtype, options.prompts, options.prompt_tokens, options.new_tokens, options.seed
    )
    device = child("device", load)
    if "error" in device:
        sys.exit(f"bench.load.generate: {device['error']}")
    result: dict[str, Any] = {**head(command().typed(arguments), device), "load": asdict(load), "peers": {}}
    served = [*server_options(load, options.buckets), *extra]
    result["taper"] = measure_taper(load, served, options.interval_ms)
    compare(result, load)
    keep(result, options.json)
    for setting in options.settings if options.peers else ():
        result["peers"][setting] = child(setting, load)
        compare(result, load)
        keep(result, options.json)
    return conclude(result, text(result), options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        _, part, _, described = sys.argv[1:]
        print(json.dumps(run_part(part, Load(**json.loads(described)))))
    else:
        main(sys.argv[1:])
