"""Branches that the model opens by its own tags, watched as they grow."""

import sys

from taper_client import BranchFinished, Client, Delta, Finished, StageStarted, WidthChanged, model_driven

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
question = "Reverse each word: cat, lemon, tree. Then say which result is longest."

with (
    Client(address) as client,
    client.generate([{"role": "user", "content": question}], plan=model_driven()) as stream,
):
    for event in stream:
        match event:
            case StageStarted(branches=branches):
                print("begin:", ", ".join(each.label or "the trunk" for each in branches))
            case Delta(branch=number, text=text):
                print(f"  {number}: {text!r}")
            case WidthChanged(width=width, wanted=wanted):
                print(f"{width} of {wanted} branches advance")
            case BranchFinished(branch=number, reason=reason):
                print(f"end: {number}, by {reason}")
            case Finished(timing=timing):
                print(f"{timing.total:.2f} s, the first token after {timing.ttft:.2f} s")
