"""The console commands `taper-serve` and `taper-client`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console

from serve.api.errors import ServiceError
from serve.client import Client, Options, Prompt, branch, model_driven, parallel, sampling, serial
from serve.client.terminal import show
from serve.config import ServerConfig


def serve(args: list[str] | None = None) -> None:
    """Serve a model over gRPC until SIGTERM."""
    config = tyro.cli(ServerConfig, prog="taper-serve", description=serve.__doc__, args=args)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # of a GPU: the server owns it
    from serve.engine.startup import load  # JAX takes seconds to import: not for --help
    from serve.server.server import run

    try:
        run(config, load)
    except (OSError, ValueError) as error:
        sys.exit(f"taper-serve: {error}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Ask a server, and watch its answer grow."""

    prompt: Annotated[str, tyro.conf.Positional]
    """The question, or what to go on from with --raw."""
    branch: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text that one branch begins with; repeat it for each branch."""
    conclude: str = ""
    """Text that goes on after the branches have been joined."""
    raw: bool = False
    """Go on from the prompt as it is, also where the model could be asked in a chat."""
    max_tokens: int | None = None
    """Limit of each sequence; the server's own unless set."""
    temperature: float | None = None
    """0 is greedy, the default."""
    seed: int | None = None
    """Same seed, same answer."""
    address: str = "127.0.0.1:50051"
    """Where the server listens."""


def client(args: list[str] | None = None) -> None:
    """Run one request, with branches side by side in a terminal, as plain lines otherwise."""
    ask = tyro.cli(Ask, prog="taper-client", description=Ask.__doc__, args=args)
    try:
        with Client(ask.address) as connection:
            prompt, options = _question(connection, ask)
            show(connection.generate(prompt, **options), Console())
    except ServiceError as error:
        sys.exit(f"taper-client: {error.code.name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _question(connection: Client, ask: Ask) -> tuple[Prompt, Options]:
    """As a chat where the model knows chats; with the model's own branches unless others are asked for."""
    info = connection.model_info()
    chat = info.supports_chat and not ask.raw
    options = Options(
        max_tokens=ask.max_tokens, sampling=sampling(temperature=ask.temperature, seed=ask.seed)
    )
    if ask.branch:
        unique = len(set(map(str.strip, ask.branch))) == len(ask.branch)
        labels = [text.strip() if unique else "" for text in ask.branch]
        branches = [branch(text, label=label) for text, label in zip(ask.branch, labels, strict=True)]
        options["plan"] = [parallel(branches, max_tokens=ask.max_tokens)]
        if ask.conclude:
            options["plan"] = [*options["plan"], serial(ask.conclude, max_tokens=ask.max_tokens)]
    elif chat and info.default_tag_set:
        options["plan"] = model_driven(max_tokens=ask.max_tokens)
    return ([{"role": "user", "content": ask.prompt}] if chat else ask.prompt), options
