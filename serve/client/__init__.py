"""The client: a request's answer as events, and as a whole."""

from .client import (
    AsyncClient,
    Client,
    Options,
    Prompt,
    branch,
    model_driven,
    parallel,
    sampling,
    serial,
    stopping,
)

__all__ = [
    "AsyncClient",
    "Client",
    "Options",
    "Prompt",
    "branch",
    "model_driven",
    "parallel",
    "sampling",
    "serial",
    "stopping",
]
