"""The application that the commands join, and what several of them share: options, progress, words."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import typer

from thoraxrt import __version__
from thoraxrt.engine.errors import RequestError

if TYPE_CHECKING:
    from thoraxrt.engine.bundle import Agreement, Bundle, Manifest
    from thoraxrt.engine.preprocess import PreprocessSpec
    from thoraxrt.server.client import Client
    from thoraxrt.server.probe import ClientTls

_T = TypeVar("_T")


app = typer.Typer(
    name="thoraxrt",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A trained chest X-ray model in; out comes an engine that answers with findings and boxes.\n\n"
    "Try [bold]thoraxrt demo[/] first. Then: [bold]export[/] a checkpoint to a bundle, [bold]predict[/] with it, "
    "[bold]serve[/] it over gRPC.",
)


Backend = Annotated[
    str | None,
    typer.Option(help="tensorrt, openvino or onnxruntime; else what the bundle recommends.", show_default=False),
]


Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:N (of the GPUs that CUDA_VISIBLE_DEVICES leaves).", show_default=False),
]


RequireSignature = Annotated[
    Path | None,
    typer.Option(
        metavar="KEYS",
        help="Refuse a bundle that no public key in this PEM file, or folder of them, signed.",
        show_default=False,
    ),
]


Precision = Annotated[
    str | None,
    typer.Option(help="fp32, bf16, fp16 or int8; else what the bundle recommends, else fp32.", show_default=False),
]

TokenFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The token that the server knows you by.", show_default=False),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Ask the server over TLS, where this CA vouches for it.", show_default=False),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Ask the server over TLS, with this certificate.", show_default=False),
]
TlsKey = Annotated[Path | None, typer.Option(metavar="FILE", help="The private key of --tls-cert.", show_default=False)]


@dataclass(frozen=True)
class Connection:
    """How to reach a server, as the options say."""

    token_file: Path | None
    tls_ca: Path | None
    tls_cert: Path | None
    tls_key: Path | None

    def tls(self) -> ClientTls | None:
        """None for a connection without TLS. Raises RequestError for half a pair."""
        from thoraxrt.server.probe import ClientTls

        if not (self.tls_ca or self.tls_cert or self.tls_key):
            return None
        try:
            return ClientTls(ca=self.tls_ca, certificate=self.tls_cert, private_key=self.tls_key)
        except ValueError as error:
            raise RequestError("--tls-cert and --tls-key go together: give both, or neither") from error

    def client(self, address: str, **options: Any) -> Client:
        """A client of the server there."""
        from thoraxrt.server.client import Client

        return Client(address, token_file=self.token_file, tls=self.tls(), **options)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"thoraxrt {__version__}")
        raise typer.Exit


def track(items: Iterable[_T], description: str, total: int) -> Iterator[_T]:
    """Draw a progress bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    progress = Progress(
        *Progress.get_default_columns(),
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),  # else what is printed would go to the terminal, not into its file
        disable=not sys.stderr.isatty(),
    )
    with progress:
        yield from progress.track(items, total, description=description)


def open_bundle(bundle: str | Path, require_signature: Path | None) -> Bundle:
    """The bundle, its signature checked where keys are given."""
    from thoraxrt.engine.bundle import Bundle

    return Bundle.open(bundle, None if require_signature is None else [require_signature])


def items(text: str) -> tuple[str, ...]:
    """What is separated by commas."""
    return tuple(item.strip() for item in text.split(","))


def one_of(option: str, value: str, choices: Any) -> Any:
    """The value, where it is one of a Literal's. Raises RequestError."""
    if value not in (names := get_args(choices)):
        raise RequestError(f"{option} {value}: expected one of {', '.join(names)}")
    return value


def preprocess_text(spec: PreprocessSpec) -> str:
    """The geometry in words."""
    from thoraxrt.engine.preprocess import Shorter

    resize = spec.resize
    size = f"shorter side to {resize.pixels}" if isinstance(resize, Shorter) else f"{resize.width} x {resize.height}"
    crop = f", centre crop {spec.crop}" if spec.crop else ""
    square = "centre square, then " if spec.square else ""
    return f"{square}resize {size}{crop}, Pillow's bilinear filter"


def activation_text(manifest: Manifest) -> str:
    """The activation's name."""
    return str(type(manifest.activation).__struct_config__.tag)


def auroc_text(agreement: Agreement) -> str:
    """How many findings' AUROC could be judged, and which of them moved too far."""
    told = [finding for finding in agreement.findings if finding.verdict != "cannot tell"]
    beyond = [f"{finding.finding} {finding.difference:+.4f}" for finding in told if finding.verdict == "beyond"]
    if not told:
        return "AUROC cannot be told of any finding, for that 20 images with it and 20 without are needed"
    return f"AUROC within 0.005 for {len(told) - len(beyond)} of {len(told)} findings with enough images" + (
        f", not for {', '.join(beyond)}" if beyond else ""
    )


def image_arguments(arguments: list[str]) -> list[str]:
    """The images named, each folder replaced by the images in it, sorted."""
    from thoraxrt.engine.engine import image_files

    images: list[str] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            images += map(str, image_files(path))
        else:
            images.append(argument)
    if not images:
        raise RequestError(
            "no image named: expected a bundle (or --server), then PNG, JPEG or DICOM files, or folders that hold some"
        )
    return images
