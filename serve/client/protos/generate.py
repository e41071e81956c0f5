"""Makes the Python stubs from the protos: `python serve/client/protos/generate.py`, with grpcio-tools.

The stubs are checked in. protoc names modules by proto path (`taper.v1`), which would need the protos' folder
on sys.path; here they become the modules of `taper_client.v1`, under which messages can also be pickled. File
names inside the descriptors stay `taper/v1/….proto`, which is what reflection shows to clients in other
languages.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

PROTOS = Path(__file__).parent
STUBS = PROTOS.parent / "taper_client" / "v1"


def generate(target: Path = STUBS) -> list[Path]:
    """Write the stubs of every proto into the folder `target`; returns the files written."""
    from grpc_tools import protoc

    protos = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("taper/v1/*.proto"))
    well_known = Path(protoc.__file__).parent / "_proto"
    written = []
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        if protoc.main(["protoc", f"-I{PROTOS}", f"-I{well_known}", *outputs, *protos]):
            raise RuntimeError("protoc failed; what it printed says why")
        for path in sorted(Path(folder).glob("taper/v1/*_pb2*.py*")):
            text = path.read_text().replace("from taper.v1 import", "from . import")
            written.append(target / path.name)
            written[-1].write_text(re.sub(r"'taper\.v1\.(\w+_pb2)'", r"'taper_client.v1.\1'", text))
    return written


if __name__ == "__main__":
    for file in generate():
        print(file)
