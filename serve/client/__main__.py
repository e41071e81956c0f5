"""`taper-client`, also as `python -m serve.client`."""

from __future__ import annotations

import os


def main(args: list[str] | None = None) -> None:
    """As in `command`; gRPC itself says nothing on standard error, such as of a handshake that failed."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # it looks when it is imported
    from .command import main as run

    run(args)


if __name__ == "__main__":
    main()
