"""Findings and boxes, from this process or from a server."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thoraxrt.cli.app import (
    Backend,
    Connection,
    Device,
    Precision,
    RequireSignature,
    TlsCa,
    TlsCert,
    TlsKey,
    TokenFile,
    image_arguments,
    open_bundle,
    track,
)
from thoraxrt.engine.errors import RequestError, ThoraxrtError

if TYPE_CHECKING:
    from thoraxrt.engine.bundle import Bundle
    from thoraxrt.engine.engine import Prediction
    from thoraxrt.engine.profile import Profile


def predict(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="BUNDLE IMAGES...",
            help="A bundle, then PNG, JPEG or DICOM files or folders; with --server only the images.",
        ),
    ],
    server: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Ask a running server instead of opening a bundle."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="With --server: which of its models; else its default one.", show_default=False)
    ] = None,
    stat: Annotated[bool, typer.Option("--stat", help="With --server: before all routine images.")] = False,
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per image and line, unrounded.")] = False,
    overlay: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write each radiograph with its CAM and boxes as a PNG."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Most images the network takes at once.")] = 1,
    backend: Backend = None,
    precision: Precision = None,
    device: Device = None,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="TRACE", help="Show each stage's time, and write a trace (.json) that Perfetto opens."),
    ] = None,
    require_signature: RequireSignature = None,
) -> None:
    """Findings and boxes for radiographs.

    An image that fails is reported and the others go on; the exit status is then 1. Where the connection to a server is
    lost, it goes on with what has no answer yet once the server is back within 30 seconds.

    [bold]thoraxrt predict chexnet.bundle images/*.png --overlay pictures[/]

    [bold]thoraxrt predict --server localhost:8500 images/*.png --json[/]
    """
    if server and (backend or precision or device or profile or require_signature):
        raise RequestError(
            "--backend, --precision, --device, --profile and --require-signature are of the engine in this process: "
            "leave --server out, or give them to `thoraxrt serve`"
        )
    if not server and (model or stat or token_file or tls_ca or tls_cert or tls_key):
        raise RequestError(
            "--model, --stat, --token-file, --tls-ca, --tls-cert and --tls-key are of the connection to a server: "
            "add --server, or leave them out"
        )
    from thoraxrt.engine.profile import Profile

    recorded = Profile() if profile else None
    images = image_arguments(arguments if server else arguments[1:])
    if overlay:
        overlay.mkdir(parents=True, exist_ok=True)
    answers = (
        _ask_server(server, images, overlay, model, stat, Connection(token_file, tls_ca, tls_cert, tls_key))
        if server
        else _ask_engine(
            open_bundle(arguments[0], require_signature),
            images,
            overlay,
            backend=backend,
            precision=precision,
            device=device,
            batch=batch,
            profile=recorded,
        )
    )
    failed = 0
    table = _Table()
    for image, answer in zip(images, track(answers, "Predicting", len(images)), strict=True):
        failed += isinstance(answer, ThoraxrtError)
        if as_json:
            result = {"error": str(answer)} if isinstance(answer, ThoraxrtError) else answer.to_dict()
            print(json.dumps({"image": image, **result}), flush=True)
        else:
            table.add(image, answer)
    if not as_json:
        table.show()
    if profile and recorded:
        recorded.write(profile)
        _show_profile(recorded, len(images))
    raise typer.Exit(1 if failed else 0)


def _show_profile(profile: Profile, images: int) -> None:
    """Each stage's time, on standard error, where --json does not mind it."""
    from rich.console import Console
    from rich.table import Table

    table = Table("lane", "stage", "spans", "ms an image", "ms a span: p50", "p99")
    for stage in profile.stages():
        times = (1e3 * stage.seconds / images, stage.p50_ms, stage.p99_ms)
        table.add_row(stage.lane, stage.stage, str(stage.spans), *(f"{ms:.2f}" for ms in times))
    Console(stderr=True).print(table)


def _ask_engine(
    bundle: Bundle, images: list[str], overlay: Path | None, **options: Any
) -> Iterator[Prediction | ThoraxrtError]:
    from thoraxrt.engine.engine import Engine
    from thoraxrt.engine.overlay import render_overlay

    with Engine.open(bundle, **options) as engine:
        answers = engine.predict((Path(image) for image in images), cam=overlay is not None)
        for path, answer in zip(_overlay_paths(overlay, images), answers, strict=True):
            if path and not isinstance(answer, ThoraxrtError):
                render_overlay(answer, engine.manifest.preprocess).save(path)
            yield answer


def _ask_server(
    address: str, images: list[str], overlay: Path | None, model: str | None, stat: bool, connection: Connection
) -> Iterator[Prediction | ThoraxrtError]:
    from thoraxrt.server.client import Priority

    priority = Priority.STAT if stat else Priority.ROUTINE
    with connection.client(address, model=model, priority=priority) as client:
        replies = client.predict_many((Path(image) for image in images), overlay=overlay is not None)
        for path, reply in zip(_overlay_paths(overlay, images), replies, strict=True):
            if isinstance(reply, ThoraxrtError):
                yield reply
                continue
            if path and reply.overlay_png is not None:
                path.write_bytes(reply.overlay_png)
            yield reply.prediction


def _overlay_paths(folder: Path | None, images: list[str]) -> Iterator[Path | None]:
    """Where each image's overlay goes, if anywhere; images of one name in several folders are numbered."""
    seen: Counter[str] = Counter()
    for stem in (Path(image).stem for image in images):
        seen[stem] += 1
        again = f"-{seen[stem]}" if seen[stem] > 1 else ""
        yield folder / f"{stem}{again}.overlay.png" if folder else None


class _Table:
    """The reported findings and their boxes, an image after the other."""

    def __init__(self) -> None:
        from rich.table import Table

        self._table = Table("image", "finding", "probability", "boxes x, y, width, height (score)")
        self._executed: set[str] = set()

    def add(self, image: str, answer: Prediction | ThoraxrtError) -> None:
        """One image's rows."""
        from rich.markup import escape

        name = escape(Path(image).name)
        if isinstance(answer, ThoraxrtError):
            self._table.add_row(name, "[red]error", "", escape(str(answer)))
            return
        self._executed.add(f"{answer.backend} {answer.precision}")
        reported = [finding for finding in answer.findings if finding.reported]
        for finding in reported:
            boxes = [
                f"{box.x:.0f}, {box.y:.0f}, {box.width:.0f}, {box.height:.0f} ({box.score:.2f})"
                for box in answer.boxes
                if box.finding == finding.finding
            ]
            self._table.add_row(name, finding.finding, f"{finding.probability:.3f}", "\n".join(boxes))
            name = ""
        if not reported:
            self._table.add_row(name, "[dim]nothing reported", "", "")
        self._table.add_section()

    def show(self) -> None:
        """Print the table, and what executed the network."""
        from rich.console import Console

        console = Console()
        console.print(self._table)
        console.print(f"[dim]executed by {', '.join(sorted(self._executed)) or 'nothing'}")
