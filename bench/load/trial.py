"""A workload played on a server under one policy: the same requests at the same times as under any other.

Requests that arrive within the window are measured, all of them, and served to their end, or count as not
finished; those before it warm the server up, those after it keep up the load. Times are the client's clock's:
a request of an open loop has arrived when it was due. No trial finds another's prompts in the server's cache.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

from bench.load.client_forks import ForkingClient
from bench.load.driver import Answer, Driver, Reply, message, sleep_until
from bench.load.measures import MEASURES, Record, Run, Window, milliseconds, quantile
from bench.load.server_metrics import late_shares, scrape, server_row
from bench.load.workload import ALONE, Fork, Workload
from bench.timing import clock, no_collections
from scheduler.request import Slo
from taper_client import AsyncClient
from taper_client.errors import ServiceError

Ask = Callable[[Reply], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is the same for every policy. `fork`: who divides answers into branches, and joins them."""

    workload: Workload
    slo: Slo
    window: Window
    vocab_size: int
    fork: Fork = "server"


@dataclass(slots=True)
class Trial:
    """A workload played once. Replies are in order of the workload's items, as far as these were sent."""

    setting: Setting
    policy: str
    start: float = math.nan
    replies: list[Reply] = field(default_factory=list)
    cpu_share: float = math.nan
    server: dict[str, float | None] = field(default_factory=dict)
    _calls: list[asyncio.Task[None]] = field(default_factory=list)
    _window_sent: asyncio.Event = field(default_factory=asyncio.Event)

    async def play(self, driver: Driver, metrics_url: str | None) -> None:
        """Serve until every request of the window is answered, then give up the others."""
        window, clients = self.setting.window, self.setting.workload.clients
        requests = [*self._requests(driver)]
        with no_collections():
            cpu, self.start = time.process_time(), clock()
            async with asyncio.TaskGroup() as group:
                senders = [group.create_task(sender) for sender in self._senders(group, requests)]
                await sleep_until(self.start + window.warmup)
                before = await asyncio.to_thread(scrape, metrics_url)
                await sleep_until(self.start + window.end)
                after = await asyncio.to_thread(scrape, metrics_url)
                self.server = server_row(before, after)
                await self._window_sent.wait()
                ran_dry = clients is not None and len(self.replies) == len(requests)
                pending = [self._calls[index] for index in self.measured]
                if pending:
                    await asyncio.wait(pending, timeout=window.drain)
                for task in (*senders, *self._calls):
                    task.cancel()
            if ran_dry:
                raise ValueError(f"{len(requests)} requests do not last for a window of {window.seconds:g} s")
            self.cpu_share = (time.process_time() - cpu) / (clock() - self.start)

    @property
    def measured(self) -> list[int]:
        """The requests that arrived within the window."""
        window = self.setting.window
        return [i for i, reply in enumerate(self.replies) if reply.due - self.start in window]

    def _requests(self, driver: Driver) -> Iterator[Ask]:
        """For each item of the workload, what asks for it."""
        salt, setting = uuid.uuid4().hex, self.setting
        for index, item in enumerate(setting.workload.items):
            asked = {"id": f"{salt}-{index}", "seed": index, "vocab_size": setting.vocab_size}
            asked |= {"slo": setting.slo, "salt": salt}
            if setting.fork == "client":
                yield partial(ForkingClient(item=item, **asked).ask, driver)
            else:
                yield partial(driver.ask, message(item, **asked))

    def _senders(self, group: asyncio.TaskGroup, requests: Sequence[Ask]) -> list[Any]:
        items, left = self.setting.workload.items, iter(requests)

        def send(request: Ask, due: float) -> asyncio.Task[None]:
            self.replies.append(Reply(due))
            self._calls.append(group.create_task(request(self.replies[-1])))
            return self._calls[-1]

        async def open_loop() -> None:
            for item, request in zip(items, left, strict=True):
                if item.arrival >= self.setting.window.end:
                    self._window_sent.set()
                due = self.start + item.arrival
                await sleep_until(due)
                send(request, due)
            self._window_sent.set()

        async def client() -> None:
            self._window_sent.set()  # what is sent now is due now
            for request in left:
                await asyncio.wait([send(request, clock())])

        clients = self.setting.workload.clients
        return [open_loop()] if clients is None else [client() for _ in range(clients)]

    def run(self, answers: Sequence[Answer]) -> Run:
        """What the clients saw; `answers` are the replies, read."""
        setting, window = self.setting, self.setting.window
        records = [self._record(index, answer) for index, answer in enumerate(answers)]
        within = [[each for each in one.emissions if each.at - self.start in window] for one in answers]
        tokens = [sum(emission.tokens for emission in own) for own in within]
        good = [record.good(setting.slo, "stage") for record in records]
        return Run(
            policy=self.policy,
            slo=setting.slo,
            seconds=window.seconds,
            records=[records[index] for index in self.measured],
            tokens=sum(tokens),
            good_tokens=sum(own for own, ok in zip(tokens, good, strict=True) if ok),
            turns=sum(emission.steps for own in within for emission in own),
        )

    def _record(self, index: int, answer: Answer) -> Record:
        reply = self.replies[index]
        record = answer.record(self.setting.workload.items[index], reply.due)
        record.refused = reply.refused
        return record

    def row(self) -> dict[str, Any]:
        """The run's row, and what else the client and the server know of it."""
        answers = [Answer.of(reply) for reply in self.replies]
        run, measured = self.run(answers), [self.replies[i] for i in self.measured]
        gaps = [gap for i in self.measured for gap in answers[i].gaps]
        messages = [sum(len(call.messages) for call in reply.calls) for reply in measured]
        lags = [reply.sent - reply.due for reply in measured]
        return {
            **run.row(),
            **{f"good_requests_s_{each}": sum(run.good(each)) / run.seconds for each in MEASURES},
            "gap_p99_ms": milliseconds(quantile(gaps, 0.99)),
            "calls": fmean(len(reply.calls) for reply in measured) if measured else None,
            "messages": fmean(messages) if measured else None,
            "arrived": len(measured),
            "finished": sum(record.finished for record in run.records),
            "errors": Counter(reply.error for reply in measured if reply.error),
            **late_shares(self.server),
            "server": self.server,
            "client_cpu_share": self.cpu_share,
            "send_lag_p99_ms": milliseconds(quantile(lags, 0.99)),
        }


async def unloaded_tpot(driver: Driver, vocab_size: int) -> float:
    """Seconds per token of one serial request that is served alone. Raises ServiceError if it fails."""
    salt = uuid.uuid4().hex

    async def one(seed: int) -> float:
        reply = Reply(clock())
        await driver.ask(message(ALONE, f"{salt}-{seed}", seed, vocab_size, salt=salt), reply)
        record = Answer.of(reply).record(ALONE, reply.due)
        if not record.finished:
            raise ServiceError(f"a request of {ALONE.prompt} + {ALONE.tokens} tokens failed: {reply.error}")
        return record.mean_tpot

    await one(0)  # warms the server up
    return await one(1)


async def drained(client: AsyncClient) -> None:
    """Once nothing runs or waits."""
    while (load := await client.load()).running_requests or load.queued_requests:
        await asyncio.sleep(0.02)
