"""Talks to OpenAI's HTTP API with OpenAI's own client, and prints what came of it as one JSON object.

python chat.py URL calls              each kind of call that the gateway passes
python chat.py URL many COUNT         streamed answers, 8 at a time: for each its text, or how it failed
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import APIError, BadRequestError, OpenAI

QUESTION = "Reverse each word: cat, lemon, tree. Then say which result is longest."


def calls(client: OpenAI, model: str) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 300,
    }
    whole = client.chat.completions.create(**asked)
    usage = whole.usage
    found: dict[str, Any] = {
        "models": [each.id for each in client.models.list()],
        "text": whole.choices[0].message.content,
        "finish": whole.choices[0].finish_reason,
        "usage": usage and [usage.prompt_tokens, usage.completion_tokens],
    }
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = [*stream]
    found["pieces"] = [each.choices[0].delta.content or "" for each in chunks if each.choices]
    found["streamed_usage"] = [each.usage.prompt_tokens for each in chunks if each.usage]
    several = client.chat.completions.create(**{**asked, "temperature": 1.0, "max_tokens": 5}, n=3, seed=1)
    found["choices"] = [each.index for each in several.choices]
    stopped = client.chat.completions.create(**asked, stop=["</Goal>"])
    found["stopped"] = stopped.choices[0].message.content
    certain = client.chat.completions.create(**{**asked, "max_tokens": 2}, logprobs=True, top_logprobs=2)
    logprobs = certain.choices[0].logprobs
    found["logprobs"] = [len(each.top_logprobs) for each in (logprobs and logprobs.content) or ()]
    found["length"] = certain.choices[0].finish_reason
    try:
        client.chat.completions.create(**asked, response_format={"type": "json_object"})
    except BadRequestError as error:
        found["refused"] = str(error)
    for _ in client.chat.completions.create(**asked, stream=True):
        break  # whoever leaves hangs up
    return found


def many(client: OpenAI, model: str, count: int) -> list[dict[str, Any]]:
    def one(_: int) -> dict[str, Any]:
        text = ""
        try:
            for chunk in client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": QUESTION}],
                temperature=0,
                max_tokens=300,
                stream=True,
            ):
                text += chunk.choices[0].delta.content or "" if chunk.choices else ""
        except APIError as error:
            return {"text": text, "error": str(error)}
        return {"text": text, "error": ""}

    with ThreadPoolExecutor(8) as pool:
        answers = []
        for answer in pool.map(one, range(count)):
            answers.append(answer)
            print(len(answers), file=sys.stderr, flush=True)
        return answers


def main() -> None:
    url, what, *more = sys.argv[1:]
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    print(json.dumps(calls(client, model) if what == "calls" else many(client, model, int(more[0]))))


if __name__ == "__main__":
    main()
