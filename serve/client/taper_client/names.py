"""The names that `taper_client` exports."""

from .answer import Completion
from .client import AsyncClient, AsyncStream, Client, Stream
from .credentials import Tls, token_file
from .errors import (
    CancelledError,
    DeadlineExceededError,
    DuplicateRequestError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    PermissionDeniedError,
    ServiceError,
    UnauthenticatedError,
    UnavailableError,
    Violation,
)
from .events import (
    BranchFinished,
    Delta,
    Event,
    Finished,
    Joined,
    Logprob,
    StageStarted,
    Started,
    Timing,
    Usage,
    WidthChanged,
)
from .options import Options, sampling, stopping
from .plan import Join, branch, model_driven, parallel, serial
from .request import Prompt, generate_request
from .version import VERSION

__all__ = [
    "VERSION",
    "AsyncClient",
    "AsyncStream",
    "BranchFinished",
    "CancelledError",
    "Client",
    "Completion",
    "DeadlineExceededError",
    "Delta",
    "DuplicateRequestError",
    "Event",
    "Finished",
    "InternalError",
    "InvalidRequestError",
    "Join",
    "Joined",
    "Logprob",
    "Options",
    "OverloadedError",
    "PermissionDeniedError",
    "Prompt",
    "ServiceError",
    "StageStarted",
    "Started",
    "Stream",
    "Timing",
    "Tls",
    "UnauthenticatedError",
    "UnavailableError",
    "Usage",
    "Violation",
    "WidthChanged",
    "branch",
    "generate_request",
    "model_driven",
    "parallel",
    "sampling",
    "serial",
    "stopping",
    "token_file",
]
