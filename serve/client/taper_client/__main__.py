"""`taper-client`, also as `python -m taper_client`."""

from __future__ import annotations

import os
import sys


def main(args: list[str] | None = None) -> None:
    """As in `command`; gRPC itself says nothing on standard error, such as of a handshake that failed."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # it looks when it is imported
    try:
        from .command import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "tyro"):
            raise
        sys.exit("taper-client: the command needs two more packages: pip install rich tyro")
    run(args)


if __name__ == "__main__":
    main()
