"""Makes the Python stubs from the protos: `python -m serve.api.protos.generate`.

The stubs are checked in. protoc writes imports by proto path (`from taper.v1 import …`), which would need the
protos' folder on sys.path; here they become relative, so that the stubs can live in any package. File names
inside the descriptors stay `taper/v1/….proto`, which is what reflection shows to clients in other languages.
"""

from __future__ import annotations

import sys
from pathlib import Path

SOURCE = Path(__file__).parent


def generate(target: Path = SOURCE) -> list[Path]:
    """Write the stubs of every proto under `target`; returns the files written. Needs grpcio-tools."""
    from grpc_tools import protoc

    protos = sorted(str(path.relative_to(SOURCE)) for path in SOURCE.glob("taper/**/*.proto"))
    well_known = Path(protoc.__file__).parent / "_proto"
    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"-I{SOURCE}", f"-I{well_known}", *outputs, *protos]):
        raise RuntimeError("protoc failed; what it printed says why")
    written = sorted(target.glob("taper/**/*_pb2*.py*"))
    for path in written:
        path.write_text(path.read_text().replace("from taper.v1 import", "from . import"))
    return written


if __name__ == "__main__":
    for file in generate():
        print(file.relative_to(SOURCE), file=sys.stderr)
