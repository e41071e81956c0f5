"""Clients of every kind for a while: they finish, hang up, run out of time, are killed, or never read."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import grpc

from taper_client import AsyncClient, branch, generate_request, model_driven, parallel, serial
from taper_client.errors import DeadlineExceededError, OverloadedError, ServiceError
from taper_client.v1 import inference_service_pb2_grpc as inference_grpc

POLICIES = ("off", "eager", "taper", "cap:2", "taper:priority", "taper:concave")
QUESTION = "Reverse each word: cat, lemon, tree. Then say which result is longest."
ENDS = {"whole": 48, "hang up": 30, "deadline": 14, "abort": 8}
MOST = 64  # calls at once
UNREAD = 3  # streams at once that nobody reads
# Or else the client itself takes megabytes that nobody reads.
NARROW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65535))

KILLED = """
import sys
from taper_client import Client
client = Client(sys.argv[1])
streams = [iter(client.generate([5] * 20, max_tokens=400, ignore_eos=True)) for _ in range(6)]
first = [next(stream) for stream in streams[:3]]
print("started", flush=True)
[*streams[0]]
"""


@dataclass
class Soak:
    """`requests` calls of one server, evenly over `seconds`.

    text   whether the model has a tokenizer, and forks by itself
    ended  how the calls ended: what they were meant to do, and what they met
    """

    address: str
    requests: int
    seconds: float
    text: bool
    seed: int = 0
    ended: Counter[str] = field(default_factory=Counter)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self._free = asyncio.Semaphore(MOST)
        async with AsyncClient(self.address) as client, asyncio.TaskGroup() as group:
            beside = [self._switch(client), self._kill(), *(self._ignore(number) for number in range(UNREAD))]
            tasks = [group.create_task(each) for each in beside]
            began = loop.time()
            async with asyncio.TaskGroup() as calls:
                self._ending = calls
                for number in range(self.requests):
                    await asyncio.sleep(began + number * self.seconds / self.requests - loop.time())
                    await self._free.acquire()
                    calls.create_task(self._call(client, random.Random(f"{self.seed}-{number}")))
            for task in tasks:
                task.cancel()

    # --- one call --------------------------------------------------------------------------------------

    async def _call(self, client: AsyncClient, rng: random.Random) -> None:
        meant = rng.choices([*ENDS], [*ENDS.values()])[0]
        prompt, options = self.request(rng)
        name = f"{rng.getrandbits(64):x}"
        timeout = rng.uniform(0.001, 0.5) if meant == "deadline" else 60.0
        try:
            async with client.generate(prompt, timeout=timeout, request_id=name, **options) as stream:
                if meant == "hang up":
                    how = "ok" if await self._read_some(stream, rng) else "HUNG_UP"
                else:
                    ending = (
                        asyncio.ensure_future(self._abort(client, name, rng)) if meant == "abort" else None
                    )
                    how = "ok" if [event async for event in stream] else "nothing"
                    if ending is not None:
                        await ending
        except (OverloadedError, DeadlineExceededError) as error:
            how = error.reason or type(error).__name__
        except ServiceError as error:
            how = error.reason or f"{type(error).__name__}: {error}"
        finally:
            self._free.release()
        self.ended[f"{meant}: {how}"] += 1

    async def _read_some(self, stream: Any, rng: random.Random) -> bool:
        """Up to a random time, or some events; whether that was all of it."""
        left = rng.choice([1, 2, 5, 10**9])
        try:
            async with asyncio.timeout(rng.uniform(0.0, 0.5)):
                async for _ in stream:
                    left -= 1
                    if not left:
                        return False
                return True
        except TimeoutError:
            return False

    async def _abort(self, client: AsyncClient, name: str, rng: random.Random) -> None:
        await asyncio.sleep(rng.uniform(0.0, 0.3))
        await client.abort(name)

    def request(self, rng: random.Random) -> tuple[Any, dict[str, Any]]:
        """A prompt, which others share the beginning of, and what is asked for."""
        prompt = [7] * rng.choice([1, 16, 40]) + [rng.randrange(1, 90) for _ in range(rng.choice([1, 8, 60]))]
        kind = rng.choice(["serial", "stops", "plan", "race", "nested"] + ["text", "forks"] * self.text)
        options: dict[str, Any] = {
            "max_tokens": rng.choice([1, 4, 12, 30]),
            "ignore_eos": True,
            "temperature": rng.choice([0.0, 1.0]),
            "priority": rng.randrange(3),
            "interval_ms": rng.choice([0, 0, 50]),
        }
        if kind == "serial" and rng.random() < 0.3:
            options |= {"logprobs": True, "top_logprobs": 4}
        if kind == "stops":
            options["stop"] = ["AAAAAAB", "zz"]
        if kind in ("plan", "race"):
            wide = [branch([rng.randrange(1, 90)], max_tokens=rng.choice([1, 5, 15])) for _ in range(4)]
            first = {"first_k": 2} if kind == "race" else {}
            join = rng.choice(["kv", "reprefill", "none"])
            options["plan"] = [serial(max_tokens=3), parallel(wide, join=join, **first)]
            options["plan"] += [serial([9], max_tokens=4)] * (join != "none")
        if kind == "nested":
            inner = parallel([branch([3], max_tokens=3), branch([4], max_tokens=5)])
            options["plan"] = [parallel([branch([1], max_tokens=2, then=[inner]), branch([2], max_tokens=9)])]
        if kind in ("text", "forks"):
            plan = {"plan": model_driven()} if kind == "forks" else {}
            return QUESTION, {"max_tokens": 60, **plan}
        return prompt, options

    # --- beside them -----------------------------------------------------------------------------------

    async def _switch(self, client: AsyncClient) -> None:
        rng = random.Random(self.seed)
        while True:
            await client.set_policy(rng.choice(POLICIES))
            self.ended["policies"] += 1
            await asyncio.sleep(0.5)

    async def _kill(self) -> None:
        """Clients in processes of their own, which are killed while their streams run."""
        rng = random.Random(self.seed)
        while True:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", KILLED, self.address, stdout=asyncio.subprocess.PIPE
            )
            try:
                assert process.stdout is not None
                await process.stdout.readline()
                await asyncio.sleep(rng.uniform(0.0, 1.0))
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.communicate()
            self.ended["killed"] += 1
            await asyncio.sleep(self.seconds / 20)

    async def _ignore(self, number: int) -> None:
        """Streams of many tokens, until the server gives them up, or their time is over."""
        rng = random.Random(f"{self.seed}-{number}")
        wide = parallel([branch([1 + n], max_tokens=400, ignore_eos=True) for n in range(32)], join="none")
        while True:
            plan = {"plan": [wide], "logprobs": True} if self.text and number == 0 else {}
            message = generate_request([5], **{"max_tokens": 900, "ignore_eos": True, **plan})
            most = self.seconds / (rng.uniform(1, 1.5) if plan else rng.uniform(4, 40))
            async with grpc.aio.insecure_channel(self.address, options=NARROW) as channel:
                stub = inference_grpc.InferenceServiceStub(channel)
                call = stub.Generate(message, timeout=most)
                while not call.done():
                    await asyncio.sleep(0.1)
                code = await call.code()
            self.ended[f"unread: {code.name}"] += 1
