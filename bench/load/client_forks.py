"""What a user does whose server knows no branches: the client forks and joins an answer by itself.

Each branch is a request of its own, whose prompt is all that was said before the fork and the branch's first
words; what the branches said is joined on the client, and sent again as the prompt of what follows. The
server's prefix cache finds again what it has computed, in whole pages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bench.load.driver import Driver, Reply, asking_for
from bench.load.workload import Item
from bench.timing import clock
from scheduler.program import ParallelStage, Plan
from scheduler.request import Slo
from taper_client import Options, generate_request
from taper_client.v1 import inference_service_pb2 as pb

Ids = tuple[int, ...]


class Part(NamedTuple):
    """A request without branches: its prompt, and how many tokens it gets."""

    prompt: Ids
    tokens: int


def parts_of(item: Item, seed: int, vocab_size: int = 32_000) -> Generator[list[Part], Sequence[Ids], None]:
    """What is asked for at a time, stage after stage; it is told what was sampled for each part.

    Prompts and lengths are those of `item.request`.
    """
    request = item.request("", Slo(), seed, vocab_size)
    assert isinstance(request.program, Plan)
    said = request.prompt
    for stage in request.program.stages:
        branches = stage.branches if isinstance(stage, ParallelStage) else (stage,)
        prefixes = [tuple(branch.prefix) for branch in branches]
        sampled = yield [
            Part(said + prefix, branch.stopping.max_tokens or 0)
            for prefix, branch in zip(prefixes, branches, strict=True)
        ]
        for prefix, ids in zip(prefixes, sampled, strict=True):
            said += prefix + ids


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkingClient:
    """Asks for the tokens of `item`, stage after stage; the same lengths as bench.load.driver.message forces.

    Every request has the targets of the whole. Only requests of the same `salt` find each other's prompts.
    """

    item: Item
    id: str
    seed: int
    vocab_size: int
    slo: Slo
    salt: str

    async def ask(self, driver: Driver, reply: Reply) -> None:
        """Read all requests into `reply.parts`, until one fails, whose error is then the answer's."""
        parts, reply.sent = parts_of(self.item, self.seed, self.vocab_size), clock()
        try:
            wanted = next(parts)
            while not reply.error:
                reply.parts.append(replies := [Reply(clock()) for _ in wanted])
                async with asyncio.TaskGroup() as calls:
                    for number, (part, own) in enumerate(zip(wanted, replies, strict=True)):
                        message = self._message(part, len(reply.parts), number)
                        calls.create_task(driver.ask(message, own))
                reply.error = next((own.error for own in replies if own.error), "")
                wanted = parts.send([sampled(own) for own in replies])
        except StopIteration:
            return
        except asyncio.CancelledError:
            reply.error = "cancelled by the client"
            raise
        finally:
            reply.ended = clock()

    def _message(self, part: Part, stage: int, branch: int) -> bytes:
        options = Options(
            max_tokens=part.tokens,
            ignore_eos=True,
            seed=self.seed + branch,
            token_ids=True,
            request_id=f"{self.id}.{stage}.{branch}",
            cache_salt=self.salt,
        )
        return generate_request(part.prompt, **options | asking_for(self.slo)).SerializeToString()


def sampled(reply: Reply) -> Ids:
    """The token ids of an answer without branches."""
    ids: list[int] = []
    for _, raw in reply.messages:
        for event in pb.GenerateResponse.FromString(raw).events:
            ids += event.delta.token_ids
    return tuple(ids)
