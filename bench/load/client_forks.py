"""What a user does whose server knows no branches: the client forks and joins an answer by itself.

Each branch is a request of its own, whose prompt is all that was said before the fork and the branch's first
words; what the branches said is joined on the client, and sent again as the prompt of what follows. The
server's prefix cache finds again what it has computed, in whole pages.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from bench.load.driver import Driver, Reply
from bench.load.workload import Item
from bench.timing import clock
from scheduler.program import ParallelStage, Plan
from scheduler.request import Slo
from taper_client import Options, generate_request
from taper_client.v1 import inference_service_pb2 as pb

Ids = tuple[int, ...]


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
        request = self.item.request(self.id, Slo(), self.seed, self.vocab_size)
        assert isinstance(request.program, Plan)
        said, reply.sent = request.prompt, clock()
        try:
            for stage in request.program.stages:
                branches = stage.branches if isinstance(stage, ParallelStage) else (stage,)
                prefixes = [tuple(branch.prefix) for branch in branches]
                lengths = [branch.stopping.max_tokens or 0 for branch in branches]
                reply.parts.append(parts := [Reply(clock()) for _ in branches])
                async with asyncio.TaskGroup() as calls:
                    for number, part in enumerate(parts):
                        message = self._message(said + prefixes[number], lengths[number], number, reply)
                        calls.create_task(driver.ask(message, part))
                reply.error = next((part.error for part in parts if part.error), "")
                if reply.error:
                    return
                for prefix, part in zip(prefixes, parts, strict=True):
                    said += prefix + sampled(part)
        except asyncio.CancelledError:
            reply.error = "cancelled by the client"
            raise
        finally:
            reply.ended = clock()

    def _message(self, prompt: Ids, tokens: int, branch: int, reply: Reply) -> bytes:
        options = Options(
            max_tokens=tokens,
            ignore_eos=True,
            seed=self.seed + branch,
            token_ids=True,
            request_id=f"{self.id}.{len(reply.parts)}.{branch}",
            cache_salt=self.salt,
            tpot_slo_ms=1e3 * self.slo.tpot,
            ttft_slo_ms=1e3 * self.slo.ttft,
        )
        return generate_request(prompt, **options).SerializeToString()


def sampled(reply: Reply) -> Ids:
    """The token ids of an answer without branches."""
    ids: list[int] = []
    for _, raw in reply.messages:
        for event in pb.GenerateResponse.FromString(raw).events:
            ids += event.delta.token_ids
    return tuple(ids)
