"""What a bundle is worth: the demonstration, and the commands that measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thoraxrt.cli.app import track


def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes; exchanged as a whole.")] = Path("demo"),
) -> None:
    """The main job on phantoms: export, serve, ask over gRPC, and a picture of what was found.

    Needs no data set, no download and no GPU.
    """
    from thoraxrt.benchmarks.demo import run_demo

    run_demo(out, track)
