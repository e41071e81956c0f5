"""Hostile clients of a server, each in a process of its own: `python -m bench.host.attackers KIND ADDRESS`.

Each has one connection, and goes on until it is killed. What the server answers does not matter to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from bench.load.driver import SERVICE
from taper_client import Options, generate_request, model_driven
from taper_client.v1 import control_service_pb2 as control_pb
from taper_client.v1 import inference_service_pb2 as pb

CONNECTION = (
    ("grpc.use_local_subchannel_pool", 1),  # no connection is shared with other channels
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_retries", 0),
)
GENERATE = f"/{SERVICE.full_name}/Generate"
_CONTROL = f"/{control_pb.DESCRIPTOR.services_by_name['ControlService'].full_name}"
_LARGE = 4 * 2**20 - 1024  # bytes, which the server takes
_AT_ONCE = 32

Attack = Callable[[grpc.aio.Channel], Awaitable[None]]


async def _read(call: Any) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for _ in call:
            pass


async def _again_and_again(attack: Callable[[], Awaitable[None]], at_once: int) -> None:
    """So many of them at any time."""

    async def one() -> None:
        while True:
            await attack()
            await asyncio.sleep(0.001)

    await asyncio.gather(*(one() for _ in range(at_once)))


def _generating(channel: grpc.aio.Channel, **options: Any) -> Any:
    request = generate_request("Hello", **Options(ignore_eos=True, **options))
    return channel.unary_stream(GENERATE)(request.SerializeToString())


async def tight(channel: grpc.aio.Channel) -> None:
    """Asks for the tightest target that there is, for long answers."""
    info = channel.unary_unary(f"{_CONTROL}/GetModelInfo")
    least = control_pb.GetModelInfoResponse.FromString(await info(b"")).min_tpot_slo_ms
    targets = itertools.cycle([{"tpot_slo_ms": least}, {"tpot_slo_ms": 0.001, "on_miss": "best_effort"}])
    await _again_and_again(lambda: _read(_generating(channel, max_tokens=400, **next(targets))), 8)


async def flood(channel: grpc.aio.Channel) -> None:
    """More requests for long answers than anybody should have."""
    await _again_and_again(lambda: _read(_generating(channel, max_tokens=400)), 200)


async def cancels(channel: grpc.aio.Channel) -> None:
    """Asks and goes away."""

    async def come_and_go() -> None:
        call = _generating(channel, max_tokens=400)
        await asyncio.sleep(0.005)
        call.cancel()

    await _again_and_again(come_and_go, 4)


async def deaf(channel: grpc.aio.Channel) -> None:
    """Asks for as much as there is, and reads nothing."""
    calls = [
        _generating(channel, max_tokens=2000, logprobs=True, top_logprobs=8, token_ids=True)
        for _ in range(_AT_ONCE)
    ]
    await asyncio.sleep(3600)
    del calls


async def watch(channel: grpc.aio.Channel) -> None:
    """Watches the server's health a thousand times over."""
    method = channel.unary_stream("/grpc.health.v1.Health/Watch")
    await asyncio.gather(*(_read(method(b"")) for _ in range(1000)))


async def tags(channel: grpc.aio.Channel) -> None:
    """Brings tags that are hard to match, and forces the model to say what nearly matches."""
    hard = pb.ForkTags(
        plan_open="e",
        label_open=" ",
        label_close="\x01",
        plan_close=" ",
        branch_open="b",
        branch_close="c",
        join_open="d",
        join=pb.JOIN_REPREFILL,
    )
    driven = model_driven(fork_tags=hard)
    await _again_and_again(lambda: _read(_generating(channel, plan=driven, max_tokens=2000)), 16)


async def large(channel: grpc.aio.Channel) -> None:
    """Sends messages as large as they may be, of all that takes long to look at."""
    ids = pb.TokenIds(ids=[99_999_999] * (_LARGE // 4))
    turn = pb.ChatMessage(role="x", content="a")
    generate = [
        pb.GenerateRequest(prompt=pb.Prompt(token_ids=ids)),
        pb.GenerateRequest(prompt=pb.Prompt(text="a " * (_LARGE // 2))),
        pb.GenerateRequest(prompt=pb.Prompt(chat=pb.Chat(messages=[turn] * (_LARGE // 9)))),
    ]
    bodies = [(GENERATE, each.SerializeToString()) for each in generate]
    bodies.append((GENERATE, b"\xf8\x01\x01" * (_LARGE // 3)))  # fields that nobody knows
    abort = control_pb.AbortRequest(request_ids=[f"{n:x}" for n in range(_LARGE // 8)])
    bodies.append((f"{_CONTROL}/Abort", abort.SerializeToString()))
    turns = itertools.cycle(bodies)

    async def send() -> None:
        method, body = next(turns)
        await _read(channel.unary_stream(method)(body))

    await _again_and_again(send, 4)


async def texts(channel: grpc.aio.Channel) -> None:
    """Has a megabyte of text tokenized, again and again."""
    request = pb.TokenizeRequest(prompt=pb.Prompt(text="ab " * 350_000)).SerializeToString()
    method = channel.unary_stream(f"/{SERVICE.full_name}/Tokenize")
    await _again_and_again(lambda: _read(method(request)), 8)


KINDS: dict[str, Attack] = {
    attack.__name__: attack for attack in (tight, flood, cancels, deaf, watch, tags, large, texts)
}


async def _attack(kind: str, address: str) -> None:
    async with grpc.aio.insecure_channel(address, options=CONNECTION) as channel:
        print("attacking", flush=True)
        await KINDS[kind](channel)


if __name__ == "__main__":
    asyncio.run(_attack(*sys.argv[1:]))
