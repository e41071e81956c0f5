"""A client of TAPER, a server of language models whose requests branch.

    from taper_client import Client, parallel, serial

    with Client("127.0.0.1:50051") as client:
        answer = client.complete("Tea or coffee?", plan=[parallel(["Tea:", "Coffee:"]), serial("So:")])
    print(answer, answer.usage.completion_tokens)

`Client.generate` streams the same answer as the events of `taper_client.events`, and `AsyncClient` has the
same methods with `await`. A call that fails raises a `ServiceError`: its `reason` is a constant to branch on,
and its `retry_after` says whether trying again makes sense. The messages are in `taper_client.v1`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .names import *  # noqa: F403


def __getattr__(name: str) -> object:
    """Names are imported when they are asked for: `taper-client` sets up gRPC before that is imported."""
    names = importlib.import_module(".names", __name__)
    if name == "__all__" or name in names.__all__:
        return getattr(names, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *importlib.import_module(".names", __name__).__all__]
