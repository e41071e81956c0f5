"""Several answers to one question, which share its KV cache; the client keeps the likeliest."""

import sys
from statistics import mean

from taper_client import Client

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"

with Client(address) as client:
    answer = client.complete(
        "A name for a cat:", n=4, temperature=1.0, seed=7, max_tokens=8, logprobs=True, stop="\n"
    )

scored = sorted(
    ((mean(each.logprob for each in branch.logprobs), branch.text) for branch in answer.branches),
    reverse=True,
)
for score, text in scored:
    print(f"{score:6.2f}  {text!r}")
print("best:", scored[0][1])
