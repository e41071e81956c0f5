"""A plan of your own: three branches that are written at the same time, and a conclusion that reads them."""

import sys

from taper_client import Client, branch, parallel, serial

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"

with Client(address) as client:
    answer = client.complete(
        "Plan a weekend in Lisbon.\n",
        plan=[
            parallel(
                [
                    branch("Saturday:", label="Saturday"),
                    branch("Sunday:", label="Sunday"),
                    branch("What to eat:", label="food", temperature=0.7, seed=1),
                ],
                max_tokens=16,
            ),
            serial("\nIn short:", max_tokens=16),
        ],
    )

for each in answer.branches:
    print(f"{each.label}: {each.completion_tokens} tokens, ended by {each.finish_reason}")
print(answer)
print(f"{answer.usage.completion_tokens} tokens, {answer.usage.critical_path_tokens} one after the other")
