"""The client: a request's answer as events, and as a whole."""

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
