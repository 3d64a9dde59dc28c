"""What a bundle is worth: how fast, how close to the model that was validated, and on which data."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

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
    items,
    one_of,
    open_bundle,
    track,
)
from thoraxrt.engine.errors import RequestError

if TYPE_CHECKING:
    import msgspec

    from thoraxrt.benchmarks.receipt import Receipt

Checkpoint = Annotated[
    Path | None,
    typer.Option(help="The original, as it was given to `thoraxrt export`: PyTorch runs it.", show_default=False),
]


def _creatable(file: Path | None) -> Path | None:
    """Raise RequestError for a file that cannot be written: now, not after hours of work."""
    if file is not None and (file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK)):
        raise RequestError(f"{file} cannot be written; expected a file in a folder that is there and can be written to")
    return file


Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.", callback=_creatable)
]
Margin = Annotated[float, typer.Option(help="The slowdown that matters, as a share.")]
Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write a report for a browser, in one file.", callback=_creatable),
]


def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes; exchanged as a whole.")] = Path("demo"),
) -> None:
    """The main job on phantoms: export, serve, ask over gRPC, and a picture of what was found.

    Needs no data set, no download and no GPU.
    """
    from thoraxrt.benchmarks.demo import run_demo

    run_demo(out, track)


def dataset(
    folder: Annotated[Path, typer.Argument(help="A folder in the NIH ChestX-ray14 layout.", show_default=False)],
    decode: Annotated[bool, typer.Option(help="Decode every image, to find those that cannot be read.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """What a data set holds, and where it is not what NIH published.

    Labels and their co-occurrence beside the data sheet's, patients, splits, boxes, missing and unreadable images.

    [bold]thoraxrt dataset nih[/]
    """
    import msgspec
    from rich.console import Console

    from thoraxrt.benchmarks.dataset import describe, rendered

    description = describe(folder, decode_images=decode, track=track)
    if as_json:
        print(msgspec.json.encode(description).decode())
    else:
        Console().print(rendered(description))


def parity(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle's folder.", show_default=False)] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Radiographs in the NIH layout.", show_default=False)
    ] = None,
    split: Annotated[str | None, typer.Option(help="test, train_val or all.", show_default="test")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many images.")] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Only so many images, of patients drawn at random, the same every time.")
    ] = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            metavar="BACKEND:PRECISION,...", help="What to judge; else all that runs here.", show_default=False
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    network: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE.MODULE:FACTORY", help="As for export, where the checkpoint needs your code."),
    ] = None,
    served: Annotated[bool, typer.Option(help="Judge also what a client gets, through a server.")] = True,
    server: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="That server; else one on loopback for the time.", show_default=False),
    ] = None,
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    dicom: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="DICOM files named as the PNGs that show the same.", show_default=False),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(metavar="CSV", help="Published probabilities instead of a bundle.", show_default=False),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="CSV", help="With --predictions: judge them beside these.", show_default=False),
    ] = None,
    margin: Annotated[float, typer.Option(help="The loss of AUROC that matters.")] = 0.005,
    work: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where answers are kept, to go on from; else in the cache."),
    ] = None,
    json_file: Json = None,
    html: Html = None,
    write: Annotated[
        bool, typer.Option("--write", help="Put the receipt into the bundle, as parity.json, for `serve` to look at.")
    ] = False,
    key: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY", help="Sign it with this private key; with --write.")
    ] = None,
    require_signature: RequireSignature = None,
) -> None:
    """Is it still the model that was validated? Every backend and precision beside the reference, judged.

    The reference is the checkpoint in PyTorch, else FP32 on ONNX Runtime. AUROC with intervals and a non-inferiority
    verdict, operating points, reliability, boxes, agreement; through each backend and through a server. Exit status 1
    where something failed. What was answered is kept: the same command goes on where it stopped.

    [bold]thoraxrt parity chexnet.bundle --data nih --checkpoint densenet121-nih.pth.tar --html parity.html --write[/]

    [bold]thoraxrt parity --predictions published.csv --data nih --json published.json[/]
    """
    from thoraxrt.benchmarks.candidates import candidates_from_text
    from thoraxrt.benchmarks.parity import ParityOptions, predictions_parity
    from thoraxrt.benchmarks.parity import parity as check
    from thoraxrt.benchmarks.parity_gallery import gallery
    from thoraxrt.benchmarks.parity_report import parity_report
    from thoraxrt.benchmarks.receipt import Cohorts
    from thoraxrt.engine.trust import sign
    from thoraxrt.export.nih import NihDataset
    from thoraxrt.export.publish import write_receipt

    if data is None:
        raise RequestError("--data is missing; expected a folder in the NIH layout")
    if (bundle is None) == (predictions is None) or (against and not predictions):
        raise RequestError("expected a bundle, or --predictions (and --against): one of the two")
    if ((key or write) and bundle is None) or (key and not write):
        raise RequestError("--write puts the receipt into a bundle, and --sign goes with it")
    cohorts = one_of("--split", split, Cohorts) if split else None
    if not server and (token_file or tls_ca or tls_cert or tls_key):
        raise RequestError(
            "--token-file, --tls-ca, --tls-cert and --tls-key are of the connection to a server: add --server, or leave "
            "them out"
        )
    if predictions:
        others = {
            "--limit": limit, "--sample": sample, "--candidates": candidates, "--checkpoint": checkpoint,
            "--network": network, "--server": server, "--dicom": dicom, "--work": work,
        }  # fmt: skip
        if senseless := [name for name, value in others.items() if value is not None]:
            raise RequestError(f"{', '.join(senseless)}: expected with a bundle alone; leave it out with --predictions")
        split_of_file = {"split": cohorts} if cohorts else {}  # without an option, whatever is in it
        receipt = predictions_parity(predictions, data, against, margin=margin, **split_of_file)
        _show(receipt, json_file)
        if html:
            html.write_text(parity_report(receipt), encoding="utf-8")
        raise typer.Exit(0 if receipt.passed else 1)
    assert bundle
    opened = open_bundle(bundle, require_signature)
    if write and not os.access(opened.path, os.W_OK):
        raise RequestError(f"--write: {opened.path} cannot be written to; expected a bundle that takes its receipt")
    if key:
        sign(b"", key)  # what is no key is refused now, not after hours of work
    connection = Connection(token_file, tls_ca, tls_cert, tls_key)
    options = ParityOptions(
        split=cohorts or "test",
        limit=limit,
        sample=sample,
        candidates=candidates_from_text(candidates) if candidates else None,
        checkpoint=checkpoint,
        network=network,
        serve=served,
        dicom=dicom,
        margin=margin,
        work=work,
    )
    with connection.client(server) if server else nullcontext() as client:
        receipt = check(opened, data, replace(options, server=client), track)
    _show(receipt, json_file)
    if write:
        write_receipt(opened, _json(receipt), key)
    if html:
        cases = gallery(receipt, opened, {record.image: record for record in NihDataset.open(data)}, track)
        html.write_text(parity_report(receipt, cases), encoding="utf-8")
    raise typer.Exit(0 if receipt.passed else 1)


def _json(result: msgspec.Struct) -> bytes:
    """As it is written: indented, for who opens it."""
    import msgspec

    return msgspec.json.format(msgspec.json.encode(result))


def _show(receipt: Receipt, json_file: Path | None) -> None:
    """What was found, as a table and a file, before anything that may yet fail."""
    from rich.console import Console

    from thoraxrt.benchmarks.parity_table import render

    Console().print(*render(receipt))
    if json_file:
        json_file.write_bytes(_json(receipt))


class _BenchGroup(TyperGroup):
    """`bench BUNDLE IMAGES...` is `bench run BUNDLE IMAGES...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click."""
        named = not args or args[0] in (*self.commands, "-h", "--help")
        return super().parse_args(ctx, args if named else ["run", *args])


bench = typer.Typer(
    cls=_BenchGroup,
    no_args_is_help=True,
    help="How fast is it really? MLPerf's scenarios, curves, stages, the floor, other runtimes: "
    "[bold]thoraxrt bench chexnet.bundle images/*.png --html bench.html[/]",
)


@bench.command("run")
def bench_run(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.", show_default=False)],
    images: Annotated[list[str], typer.Argument(help="PNG, JPEG or DICOM files, or folders.", show_default=False)],
    backend: Backend = None,
    precision: Precision = None,
    device: Device = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Most images the network takes at once.", show_default="8")
    ] = None,
    targets: Annotated[
        str, typer.Option(help="The engine in this process, and a server over its own and the open protocol.")
    ] = "engine,grpc,oip",
    seconds: Annotated[
        float | None, typer.Option(help="Least time of each scenario, and of a point of a curve.", show_default="5")
    ] = None,
    peers: Annotated[bool, typer.Option(help="Time the network in other runtimes too, in turn with ours.")] = True,
    checkpoint: Checkpoint = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Every part for a moment, without peers; too short for figures, and called INVALID."
        ),
    ] = False,
    json_file: Json = None,
    html: Html = None,
) -> None:
    """Measure; `thoraxrt bench BUNDLE IMAGES...` is the same.

    MLPerf's LoadGen says whether a scenario is VALID. Latencies count from when a request was due. Exit status 1 where
    an answer was an error.
    """
    from rich.console import Console

    from thoraxrt.benchmarks.bench import BenchOptions, print_result
    from thoraxrt.benchmarks.bench import bench as measure
    from thoraxrt.benchmarks.scenarios import LoadOptions
    from thoraxrt.benchmarks.targets import TargetName

    names = tuple(one_of("--targets", name, TargetName) for name in items(targets))
    if quick:
        if seconds is not None or batch is not None or checkpoint:
            raise RequestError(
                "--quick has a time and batches of its own, and no peers: leave out --seconds, --batch and --checkpoint"
            )
        options = replace(BenchOptions.brief(), targets=names)
    else:
        least = 5.0 if seconds is None else seconds
        load = LoadOptions(seconds=least, longest_s=max(40.0, least))
        options = BenchOptions(targets=names, load=load, batch=batch or 8, peers=peers)
    result = measure(
        bundle,
        [Path(image) for image in image_arguments(images)],
        backend=backend,
        precision=precision,
        device=device,
        checkpoint=checkpoint,
        options=options,
        track=track,
    )
    print_result(result, Console())
    if json_file:
        json_file.write_bytes(_json(result))
    if html:
        from thoraxrt.benchmarks.bench_report import bench_report

        html.write_text(bench_report(result), encoding="utf-8")
    raise typer.Exit(1 if any(run.errors for run in result.scenarios) else 0)


@bench.command("compare")
def bench_compare(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="BEFORE... AFTER", help="What `thoraxrt bench --json` wrote, the last one last.", show_default=False
        ),
    ],
    margin: Margin = 0.05,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Also where bundle, backend, precision or machine differ.")
    ] = False,
) -> None:
    """What changed beyond noise; exit status 1 where something got slower than in every earlier result whose yardstick agrees.

    A shared machine has slow hours that look like a slower build. The sure way is `bench against`.

    [bold]thoraxrt bench compare monday.json tuesday.json today.json[/]
    """
    from rich.console import Console

    from thoraxrt.benchmarks.bench import read_result
    from thoraxrt.benchmarks.gate import compare, print_comparison

    *befores, after = map(read_result, results)
    comparison = compare(befores, after, margin=margin, anyway=anyway)
    print_comparison(comparison, Console())
    raise typer.Exit(1 if comparison.regressed else 0)


@bench.command("against")
def bench_against(
    other: Annotated[
        Path,
        typer.Argument(
            help="A Python whose thoraxrt is the one before, or another bundle's folder.", show_default=False
        ),
    ],
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.", show_default=False)],
    images: Annotated[list[str], typer.Argument(help="PNG, JPEG or DICOM files, or folders.", show_default=False)],
    backend: Backend = None,
    precision: Precision = None,
    device: Device = None,
    batch: Annotated[int, typer.Option(min=1, help="Most images the network takes at once.")] = 8,
    margin: Margin = 0.05,
) -> None:
    """Whether this thoraxrt, with this bundle, is slower than another: both in turn, in the same rounds.

    The engine and the server of each side, an image at a time and a batch, in processes of their own. Exit status 1
    where something is slower beyond the margin and beyond noise.

    [bold]thoraxrt bench against release-1/bin/python chexnet.bundle nih/images[/]

    [bold]thoraxrt bench against current.bundle new.bundle nih/images[/]
    """
    from rich.console import Console

    from thoraxrt.benchmarks.against import against
    from thoraxrt.benchmarks.bench import IMAGES
    from thoraxrt.benchmarks.rounds import change_table
    from thoraxrt.engine.engine import read_image
    from thoraxrt.server.models import EngineOptions

    files = [read_image(Path(image)) for image in image_arguments(images)[:IMAGES]]
    ran = EngineOptions(backend=backend, precision=precision, device=device)
    changes = against(bundle, files, ran, other, batch=batch, margin=margin, track=track)
    Console().print(change_table(changes, f"from {other.name} to this; slower or faster: beyond {margin:.0%}"))
    raise typer.Exit(1 if any(change.verdict == "slower" for change in changes) else 0)


def score(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.", show_default=False)],
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder of radiographs, a text file that lists some, or a Parquet file with a column path.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder of Parquet files; what is there stays.", show_default=False)],
    engine: Annotated[str, typer.Option(help="local, or ray: on all of a Ray cluster.")] = "local",
    backend: Backend = None,
    precision: Precision = None,
    device: Device = None,
    batch: Annotated[int, typer.Option(min=1, help="Most images the network takes at once.")] = 1,
    require_signature: RequireSignature = None,
) -> None:
    """Score a whole archive: probabilities and boxes of every image, as Parquet.

    An image that fails is a row with its error; the exit status is then 1. The same command goes on where it stopped.

    [bold]thoraxrt score chexnet.bundle archive --out scores[/]
    """
    from thoraxrt.benchmarks.archive import score_archive

    if engine not in ("local", "ray"):
        raise RequestError(f"--engine {engine}: expected local or ray")
    summary = score_archive(
        source,
        out,
        open_bundle(bundle, require_signature),
        ray=engine == "ray",
        backend=backend,
        precision=precision,
        device=device,
        batch=batch,
        track=track,
    )
    print(
        f"{summary.images} images in {out}, {summary.failed} of them failed; {summary.scored} scored now, "
        f"{summary.per_s:.1f} a second"
    )
    raise typer.Exit(1 if summary.failed else 0)
