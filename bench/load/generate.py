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

import argparse
import asyncio
import importlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import hardware
from bench.arguments import split
from model.checkpoint import model_config
from model.config import ModelConfig
from model.decoder import Decoder
from model.kv_cache import bytes_per_page
from serve.client.answer import Delta
from serve.client.client import AsyncClient, serial, stopping

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
SLOW = 1e6  # milliseconds: no target of latency holds a request back
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

    def ids(self, run: int) -> list[list[int]]:
        """The prompts of a run; each run has others, so that none finds them in a cache."""
        rng = np.random.default_rng((self.seed, run))
        return rng.integers(0, self.config.vocab_size, (self.prompts, self.prompt_tokens)).tolist()


# --- this server --------------------------------------------------------------------------------------------


@contextmanager
def running_server(options: Sequence[str]) -> Iterator[str]:
    """Starts taper-serve on a free port, yields its address when it is ready, and ends it."""
    command = [sys.executable, "-c", "from serve.commands import serve; serve()", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        ready = (re.search(r"ready on (\S+:\d+)", line) for line in server.stdout)
        address = next((match[1] for match in ready if match), None)
        if address is None:
            raise RuntimeError(f"taper-serve did not start: it ended with {server.wait()}")
        try:
            yield address
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


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
        """(tokens per second, mean tokens of an answer so far) while all were decoding; None if never."""
        begin, end = self.together
        inside = (self.seconds > begin) & (self.seconds <= end)
        if end <= begin or not inside.any():
            return None
        before = (self.seconds <= begin).sum(1)
        return float(inside.sum() / (end - begin)), float((before + inside.sum(1) / 2).mean())


async def send_all(
    address: str, prompts: Sequence[Sequence[int]], new_tokens: int, interval_ms: float = 0.0
) -> Arrivals:
    """Sends all prompts at once and notes when each token comes."""
    plan = [serial(stopping=stopping(new_tokens, ignore_eos=True))]
    arrivals = np.full((len(prompts), new_tokens), np.nan)

    async with AsyncClient(address) as client:
        started = time.perf_counter()

        async def one(index: int, prompt: Sequence[int]) -> None:
            known = 0
            stream = client.generate(
                prompt, plan=plan, tpot_slo_ms=SLOW, ttft_slo_ms=SLOW, interval_ms=interval_ms
            )
            async for event in stream:
                if isinstance(event, Delta):
                    arrivals[index, known : event.completion_tokens] = time.perf_counter() - started
                    known = event.completion_tokens

        await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts)))
    if np.isnan(arrivals).any():
        raise RuntimeError(f"an answer has fewer than {new_tokens} tokens")
    return Arrivals(arrivals)


def server_options(load: Load, buckets: Sequence[int]) -> list[str]:
    """Room for all requests at once and an eighth more."""
    pages = load.prompts * (-(-(load.prompt_tokens + load.new_tokens) // PAGE) + 1) * 9 // 8
    return [
        *("--model", load.model, "--load-format", "random", "--dtype", load.dtype, "--policy", "off"),
        *("--page-size", str(PAGE), "--num-pages", str(pages), "--buckets", *map(str, buckets)),
    ]


def measure_taper(load: Load, options: Sequence[str], interval_ms: float) -> dict[str, Any]:
    started = time.perf_counter()
    with running_server(options) as address:
        ready = time.perf_counter() - started
        _, arrivals = (
            asyncio.run(send_all(address, load.ids(run), load.new_tokens, interval_ms)) for run in range(2)
        )
    first = np.sort(arrivals.seconds[:, 0])
    decoding = arrivals.decoded_together()
    return {
        "options": list(options),
        "interval_ms": interval_ms,
        "ready_seconds": ready,
        "seconds": arrivals.total,
        "tokens_per_second": load.output_tokens / arrivals.total,
        "first_token_seconds": {"median": float(np.median(first)), "last": float(first[-1])},
        "decode": decoding and {"tokens_per_second": decoding[0], "mean_answer_tokens": decoding[1]},
    }


def decode_floor(load: Load, answer_tokens: float, copy_tb_s: float) -> dict[str, Any]:
    """Most tokens per second that bytes allow while every answer has so many tokens, on average."""
    config, dtype = load.config, jnp.dtype(load.dtype)
    sizes = [leaf.size for leaf in Decoder(config, dtype).split()[1]]
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    weights = dtype.itemsize * (sum(sizes) - looked_up)
    kv = load.prompts * (load.prompt_tokens + answer_tokens) * bytes_per_page(config, 1, dtype)
    seconds = (weights + kv) / copy_tb_s / 1e12
    return {
        "weight_bytes": weights,
        "kv_bytes": kv,
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
        started = time.perf_counter()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        _expect(load, [len(row) - load.prompt_tokens for row in out.tolist()])
        return time.perf_counter() - started

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
        started = time.perf_counter()
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
        return max(result.lifespan[1] for result in results) - started

    return run


def _expect(load: Load, lengths: Sequence[int]) -> None:
    if list(lengths) != [load.new_tokens] * load.prompts:
        raise RuntimeError(f"expected {load.prompts} answers of {load.new_tokens} tokens, got {lengths}")


# --- processes ----------------------------------------------------------------------------------------------


def describe_device() -> dict[str, Any]:
    size = {"size": 2**20} if jax.default_backend() == "cpu" else {}
    return hardware.describe("python -m bench.load.generate") | {"copy_tb_s": hardware.copy_tb_s(**size)}


def child(part: str, load: Load) -> dict[str, Any]:
    """Runs "device" or a peer's setting in a process of its own, so that its memory is free again.

    A failure is {"error": its last line}.
    """
    command = [
        sys.executable,
        "-m",
        "bench.load.generate",
        "--part",
        part,
        "--load",
        json.dumps(asdict(load)),
    ]
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


def print_result(result: Mapping[str, Any]) -> None:
    ours = result["taper"]
    print(f"{'':<42}{'tokens/s':>10}{'seconds':>10}")
    rows = {"taper-serve, gRPC": ours, **{f"transformers {k}": v for k, v in result["peers"].items()}}
    for name, row in rows.items():
        figures = row.get("error") or f"{row['tokens_per_second']:>10.0f}{row['seconds']:>10.2f}"
        print(f"{name:<42}{figures}")
    if "ratio" in result:
        print(f"{result['ratio']:.2f} x the best of transformers ({result['best_peer']})")
    if "floor" in result:
        floor, decode = result["floor"], ours["decode"]
        print(
            f"decoding together: {decode['tokens_per_second']:.0f} tokens/s; bytes allow "
            f"{floor['tokens_per_second']:.0f} ({floor['step_ms']:.2f} ms a step): share "
            f"{result['share_of_floor']:.2f}"
        )
    first = ours["first_token_seconds"]
    print(
        f"first tokens: median {first['median']:.2f} s, last {first['last']:.2f} s; "
        f"ready after {ours['ready_seconds']:.0f} s"
    )


def main(arguments: Sequence[str]) -> dict[str, Any]:
    own, extra = split(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m bench.load.generate", description="Output tokens per second of a batch of requests."
    )
    parser.add_argument("--model", default="qwen3-8b", help="a preset, a folder or default")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--buckets", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument(
        "--interval-ms", type=float, default=0.0, help="least time between two messages of a stream"
    )
    parser.add_argument("--peers", nargs="*", choices=["transformers"], default=[])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(own)
    load = Load(
        options.model, options.dtype, options.prompts, options.prompt_tokens, options.new_tokens, options.seed
    )
    result: dict[str, Any] = {**child("device", load), "load": asdict(load), "peers": {}}
    result["command"] = f"python -m bench.load.generate {shlex.join(arguments)}"
    if "error" in result:
        sys.exit(f"bench.load.generate: {result['error']}")
    served = [*server_options(load, options.buckets), *extra]
    result["taper"] = measure_taper(load, served, options.interval_ms)
    compare(result, load)
    hardware.save(result, options.json)
    for setting in options.settings if options.peers else ():
        result["peers"][setting] = child(setting, load)
        compare(result, load)
        hardware.save(result, options.json)
    print_result(result)
    return result


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        _, part, _, load = sys.argv[1:]
        print(json.dumps(run_part(part, Load(**json.loads(load)))))
    else:
        main(sys.argv[1:])
