"""Several questions at a time, with asyncio; one that is no longer needed is given up."""

import asyncio
import sys

from taper_client import AsyncClient, model_driven

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
WORDS = ["cat, lemon", "river, tree, stone", "bread, apple"]


async def main() -> None:
    async with AsyncClient(address) as client:

        async def ask(words: str) -> str:
            question = f"Reverse each word: {words}. Then say which result is longest."
            answer = await client.complete(
                [{"role": "user", "content": question}], plan=model_driven(), timeout=120
            )
            return f"{words}: {len(answer.branches)} branches, {answer.usage.completion_tokens} tokens"

        for line in await asyncio.gather(*map(ask, WORDS)):
            print(line)

        stream = client.generate("Once upon a time", max_tokens=200)
        async with stream:  # leaving the block ends the request on the server, too
            async for _ in stream:
                break
        print("given up after the first event")


asyncio.run(main())
