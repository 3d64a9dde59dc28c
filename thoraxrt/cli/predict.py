"""Findings and boxes, from this process or from a server."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

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

    _Answer = tuple[Prediction | ThoraxrtError, str]
    """What is said of one image, and the manifest_sha256 of the model that says it; empty for an error."""

_LINE: Final = b'{"image": '
_NAME_CELLS: Final = 40
_Asked = list[tuple[str, Path | None]]
"""Images, and where the overlay of each goes, if anywhere."""


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
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep answers in FILE as they come, as lines of JSON that name the model too; what has one there is not "
            "asked again.",
        ),
    ] = None,
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
    lost, it goes on with what has no answer yet once the server is back within 30 seconds. After a longer absence, or
    where it was ended itself, the same command with --out goes on where it stopped; where another model answers by
    then, it refuses: one file is of one model.

    [bold]thoraxrt predict chexnet.bundle images/*.png --overlay pictures[/]

    [bold]thoraxrt predict --server localhost:8500 images/*.png --json[/]

    [bold]thoraxrt predict --server localhost:8500 archive --out answers.jsonl[/]
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
    failed = 0
    with _Answered(out) if out else nullcontext() as answered:
        done = answered.images if answered else set()
        asked = [pair for pair in zip(images, _overlay_paths(overlay, images), strict=True) if pair[0] not in done]
        answers = (
            _ask_server(server, asked, model, stat, Connection(token_file, tls_ca, tls_cert, tls_key))
            if server
            else _ask_engine(
                open_bundle(arguments[0], require_signature),
                asked,
                backend=backend,
                precision=precision,
                device=device,
                batch=batch,
                profile=recorded,
            )
        )
        rows = _Rows([image for image, _ in asked])
        for (image, _), (answer, model_sha256) in zip(asked, track(answers, "Predicting", len(asked)), strict=True):
            said = {"error": str(answer)} if isinstance(answer, ThoraxrtError) else answer.to_dict()
            failed += "error" in said
            if answered and "error" not in said:
                answered.add(image, model_sha256, said)
            elif answered and not as_json:
                print(f"{image}: {said['error']}", file=sys.stderr)
            if as_json:
                print(json.dumps({"image": image, **said}), flush=True)
            elif not answered:
                rows.show(image, answer)
    if not as_json and not answered:
        rows.end()
    if profile and recorded:
        recorded.write(profile)
        _show_profile(recorded, len(asked))
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


def _ask_engine(bundle: Bundle, asked: _Asked, **options: Any) -> Iterator[_Answer]:
    from thoraxrt.engine.engine import Engine
    from thoraxrt.engine.overlay import render_overlay

    with Engine.open(bundle, **options) as engine:
        answers = engine.predict((Path(image) for image, _ in asked), cam=_any_overlay(asked))
        for (_, path), answer in zip(asked, answers, strict=True):
            if isinstance(answer, ThoraxrtError):
                yield answer, ""
                continue
            if path:
                render_overlay(answer, engine.manifest.preprocess).save(path)
            yield answer, bundle.sha256


def _ask_server(
    address: str, asked: _Asked, model: str | None, stat: bool, connection: Connection
) -> Iterator[_Answer]:
    from thoraxrt.server.client import Priority

    priority = Priority.STAT if stat else Priority.ROUTINE
    with connection.client(address, model=model, priority=priority) as client:
        replies = client.predict_many((Path(image) for image, _ in asked), overlay=_any_overlay(asked))
        for (_, path), reply in zip(asked, replies, strict=True):
            if isinstance(reply, ThoraxrtError):
                yield reply, ""
                continue
            if path and reply.overlay_png is not None:
                path.write_bytes(reply.overlay_png)
            yield reply.prediction, reply.manifest_sha256


def _overlay_paths(folder: Path | None, images: list[str]) -> Iterator[Path | None]:
    """Where each image's overlay goes, if anywhere; a name that is taken is numbered, until it is not."""
    seen: Counter[str] = Counter()
    for stem in (Path(image).stem for image in images):
        name = stem
        while seen[name]:
            seen[stem] += 1
            name = f"{stem}-{seen[stem]}"
        seen[name] += 1
        yield folder / f"{name}.overlay.png" if folder else None


def _any_overlay(asked: _Asked) -> bool:
    return any(path for _, path in asked)


class _Answered:
    """A file with a line for each image that has its answer, all of one model, and nothing else: `images` are those.

    Raises RequestError where it holds something else, `--json`'s lines say, which name no model and may be errors.
    """

    def __init__(self, path: Path) -> None:
        self.images: set[str] = set()
        self._path, self._model_sha256 = path, ""
        with path.open("a+b") as file:
            file.seek(0)
            whole = 0  # bytes of lines that were written to their end
            for number, line in enumerate(file, 1):
                try:
                    if line.endswith(b"\n"):
                        answer = json.loads(line)
                        self.images.add(answer["image"])
                        self._check_model(answer["manifest_sha256"])
                        whole += len(line)
                    elif not line.startswith(_LINE[: len(line)]):
                        raise ValueError
                except (ValueError, TypeError, KeyError):
                    raise RequestError(
                        f"{path}, line {number}: expected an answer that --out has kept; name a new file"
                    ) from None
            file.truncate(whole)
        self._file = path.open("ab")

    def add(self, image: str, model_sha256: str, answer: dict[str, Any]) -> None:
        """Keep an answer, once. Raises RequestError where another model gave those that are there."""
        self._check_model(model_sha256)
        if image not in self.images:
            self.images.add(image)
            line = json.dumps({"image": image, "manifest_sha256": model_sha256, **answer})
            self._file.write(line.encode() + b"\n")
            self._file.flush()

    def _check_model(self, sha256: str) -> None:
        if sha256 != (self._model_sha256 or sha256):
            raise RequestError(
                f"{self._path} holds answers of the model with the manifest_sha256 {self._model_sha256[:12]}..., and "
                f"this one is of {sha256[:12]}...: name a new file for that model's"
            )
        self._model_sha256 = sha256

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


class _Rows:
    """The reported findings and their boxes, shown an image after the other, as they come."""

    def __init__(self, images: Sequence[str]) -> None:
        from rich.cells import cell_len
        from rich.console import Console

        self._console = Console()
        self._name_cells = min(max((cell_len(Path(image).name) for image in images), default=5), _NAME_CELLS)
        self._headed = False
        self._executed: set[str] = set()

    def show(self, image: str, answer: Prediction | ThoraxrtError) -> None:
        """Print one image's rows, below the columns' names if they are the first."""
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, show_edge=False, show_header=not self._headed, expand=True)
        self._headed = True
        for column, cells in (("image", self._name_cells), ("finding", 20), ("probability", 11)):
            table.add_column(column, width=cells, overflow="fold")
        table.add_column("boxes x, y, width, height (score)", ratio=1)
        name = escape(Path(image).name)
        if isinstance(answer, ThoraxrtError):
            table.add_row(name, "[red]error", "", escape(str(answer)))
            return self._print(table)
        self._executed.add(f"{answer.backend} {answer.precision}")
        reported = [finding for finding in answer.findings if finding.reported]
        for finding in reported:
            boxes = [
                f"{box.x:.0f}, {box.y:.0f}, {box.width:.0f}, {box.height:.0f} ({box.score:.2f})"
                for box in answer.boxes
                if box.finding == finding.finding
            ]
            table.add_row(name, finding.finding, f"{finding.probability:.3f}", "\n".join(boxes))
            name = ""
        if not reported:
            table.add_row(name, "[dim]nothing reported", "", "")
        self._print(table)

    def end(self) -> None:
        """Print what executed the network."""
        self._print(f"[dim]executed by {', '.join(sorted(self._executed)) or 'nothing'}")

    def _print(self, what: Any) -> None:
        with self._console.capture() as text:
            self._console.print(what)
        print(text.get(), end="", flush=True)  # past a progress bar in the same terminal, as all that is printed
