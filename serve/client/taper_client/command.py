"""`taper-client`: one question to a server, for a person or for a script.

A terminal shows branches side by side as they grow. Anything else gets the answer alone, or one JSON object
with --json. Errors go to stderr. Exit codes: 0, 1 for an error, 2 for a wrong flag, 130 when interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro
from rich.console import Console

from .client import Client
from .credentials import Tls, token_file
from .errors import ServiceError
from .options import Options, SamplingOptions
from .plan import branch, model_driven, parallel, serial
from .request import Prompt
from .terminal import SHOWN_AGAIN, show_live
from .v1 import inference_service_pb2 as pb
from .version import VERSION

_INTERRUPTED = 130
_STDOUT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Ask a server, and watch its answer grow; where the output is not a terminal, print the answer alone.

    `taper-client --version` says the version.
    """

    prompt: Annotated[str, tyro.conf.Positional]
    """The question, or what to go on from with --raw."""
    branch: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text that one branch begins with; repeat it for each branch."""
    conclude: str = ""
    """Text that goes on after the branches have been joined."""
    n: int = 1
    """So many answers, each drawn for itself; needs a temperature."""
    raw: bool = False
    """Go on from the prompt as it is, also where the model could be asked in a chat."""
    max_tokens: int | None = None
    """Limit of each sequence; the server's own unless set."""
    branch_max_tokens: int | None = None
    """Limit of each branch that the model opens by itself; as the answer's unless set."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text that ends a sequence; repeat it for each such text."""
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = field(default_factory=SamplingOptions)
    keep_special_tokens: bool = False
    """Show special tokens; and in a terminal the tags by which some models branch, special or not."""
    timeout: float | None = None
    """Seconds after which to give up; as long as it takes unless set."""
    json: bool = False
    """Print one JSON object: the answer, its branches, its usage and its timing."""
    address: str = "127.0.0.1:50051"
    """Where the server listens; several that are alike have commas between them."""
    tls: bool = False
    """Encrypt the connection; the server's certificate comes from an authority that the system trusts."""
    tls_ca_cert_path: str | None = None
    """PEM file of the authorities that its certificate may come from instead."""
    tls_cert_path: str | None = None
    """PEM file of the client's own certificate, where the server asks for one."""
    tls_key_path: str | None = None
    """PEM file of its key."""
    tls_server_name: str | None = None
    """The name in the server's certificate, where the address is another."""
    token_file: str | None = None
    """File that holds the bearer token, where the server asks for one."""
    plaintext_token: bool = False
    """Send the token without TLS, too, to where others could read it on its way."""

    def connect(self) -> Client:
        tls = Tls(
            ca_cert_path=self.tls_ca_cert_path,
            cert_path=self.tls_cert_path,
            key_path=self.tls_key_path,
            server_name=self.tls_server_name,
        )
        return Client(
            self.address,
            timeout=self.timeout,
            tls=self.tls if tls == Tls() else tls,
            token=None if self.token_file is None else token_file(self.token_file),
            plaintext_token=self.plaintext_token,
        )


def main(args: list[str] | None = None) -> None:
    """Run one request, and end the process with a line if it fails."""
    args = sys.argv[1:] if args is None else args
    if args == ["--version"]:
        print(f"taper-client {VERSION}")
        return
    flags = (tyro.conf.FlagCreatePairsOff,)
    ask = tyro.cli(Ask, prog="taper-client", description=Ask.__doc__, args=args, config=flags)
    try:
        with _left_at_once_when_interrupted(), ask.connect() as client:
            _answer(client, ask)
            sys.stdout.flush()
    except ServiceError as error:
        sys.exit(f"taper-client: {error.code.name}: {error}")
    except ValueError as error:
        sys.exit(f"taper-client: {error}")
    except BrokenPipeError:
        # Whoever reads has seen enough. The interpreter would write what is left when it ends, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:  # as `main` begins or ends
        sys.exit(_INTERRUPTED)


@contextlib.contextmanager
def _left_at_once_when_interrupted() -> Iterator[None]:
    """An interrupt ends the process where it comes, without raising KeyboardInterrupt.

    That may be raised anywhere in gRPC's Python: where a condition has released its lock and not yet begun to
    wait, it turns into a RuntimeError; where a call begins, it leaves a channel that never closes. The server
    ends the request when it sees that the connection is gone.
    """
    before = signal.getsignal(signal.SIGINT)
    on_main = threading.current_thread() is threading.main_thread()
    if not on_main or before is not signal.default_int_handler:  # such as ignored, by whoever started us
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(*_: object) -> None:
    with contextlib.suppress(OSError):
        if os.isatty(_STDOUT):  # past its buffer and its lock, which may be held
            os.write(_STDOUT, SHOWN_AGAIN)
    os._exit(_INTERRUPTED)


def _answer(client: Client, ask: Ask) -> None:
    prompt, options = _question(client, ask)
    if ask.json:
        print(json.dumps(client.complete(prompt, **options).as_dict()))
    elif sys.stdout.isatty():
        forks_by_itself = isinstance(options.get("plan"), pb.ModelDriven)
        tags = ask.keep_special_tokens or not forks_by_itself
        show_live(client.generate(prompt, **options), Console(), tags=tags)
    else:
        print(client.complete(prompt, **options))


def _question(client: Client, ask: Ask) -> tuple[Prompt, Options]:
    """As a chat where the model knows chats; with the model's own branches unless others are asked for."""
    if ask.conclude and not ask.branch:
        raise ValueError("--conclude goes on after branches: give one --branch at least")
    info = client.model_info()
    chat = info.supports_chat and not ask.raw
    asked: dict[str, Any] = {**ask.sampling}
    shown = {"keep_special_tokens": True} if ask.keep_special_tokens else {}
    options = Options(max_tokens=ask.max_tokens, stop=ask.stop, n=ask.n, **shown, **asked)
    if ask.branch:
        unique = len(set(map(str.strip, ask.branch))) == len(ask.branch)
        labels = [text.strip() if unique else "" for text in ask.branch]
        stage = parallel([branch(text, label=label) for text, label in zip(ask.branch, labels, strict=True)])
        options["plan"] = [stage, serial(ask.conclude)] if ask.conclude else [stage]
    elif chat and info.default_tag_set and ask.n == 1:
        options["plan"] = model_driven(branch_max_tokens=ask.branch_max_tokens)
    elif ask.branch_max_tokens is not None:
        raise ValueError("--branch-max-tokens is for a chat with a model that branches by itself")
    return ([{"role": "user", "content": ask.prompt}] if chat else ask.prompt), options
