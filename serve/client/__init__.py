"""The client: a request's answer as events, and as a whole."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .answer import Completion
    from .client import AsyncClient, Client
    from .credentials import Tls, token_file
    from .options import Options, sampling, stopping
    from .plan import Join, branch, model_driven, parallel, serial
    from .request import Prompt, generate_request

__all__ = [
    "AsyncClient",
    "Client",
    "Completion",
    "Join",
    "Options",
    "Prompt",
    "Tls",
    "branch",
    "generate_request",
    "model_driven",
    "parallel",
    "sampling",
    "serial",
    "stopping",
    "token_file",
]

# Imported when they are asked for: `taper-client` has something to say to gRPC before that is imported.
_MODULES = {
    "answer": ("Completion",),
    "client": ("AsyncClient", "Client"),
    "credentials": ("Tls", "token_file"),
    "options": ("Options", "sampling", "stopping"),
    "plan": ("Join", "branch", "model_driven", "parallel", "serial"),
    "request": ("Prompt", "generate_request"),
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
