"""The command line: the only module above all rooms, importing each when a command needs it.

Exit status: 0; 1 where some images failed; 2 for usage, bundle, checkpoint or server errors.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import typer

from thoraxrt import __version__
from thoraxrt.engine.errors import RequestError, ThoraxrtError

if TYPE_CHECKING:
    from thoraxrt.engine.backends.tensorrt_plan import PlanOptions
    from thoraxrt.engine.bundle import Agreement, Bundle, Manifest
    from thoraxrt.engine.engine import Prediction
    from thoraxrt.engine.plans import Compiled
    from thoraxrt.engine.preprocess import Exact, PreprocessSpec, Shorter
    from thoraxrt.engine.profile import Profile
    from thoraxrt.server.config import Config

__all__ = ["app", "main"]

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


def main() -> None:
    """Run the command line; an error of ours becomes one line and exit status 2."""
    try:
        app()
    except ThoraxrtError as error:
        sys.exit(_complain(str(error)))
    except ModuleNotFoundError as error:  # an extra that is not installed
        if (error.name or "thoraxrt").startswith("thoraxrt"):
            raise
        sys.exit(
            _complain(
                f"{error.name} is not installed, which this command needs: pip install 'thoraxrt[cpu,export,bench]'"
            )
        )
    except BrokenPipeError:  # the reader of our output has gone, `| head` say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a full disk under --overlay, say
        sys.exit(_complain(f"{error.filename or 'a file'}: {error.strerror}"))


def _complain(message: str) -> int:
    """Print one line to stderr; the exit status for it."""
    print("thoraxrt: error:", " ".join(message.split()), file=sys.stderr)
    return 2


def _track(items: Iterable[_T], description: str, total: int) -> Iterator[_T]:
    """Draw a progress bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description, total=total, console=Console(stderr=True), disable=not sys.stderr.isatty())


def _open(bundle: str | Path, require_signature: Path | None) -> Bundle:
    from thoraxrt.engine.bundle import Bundle

    return Bundle.open(bundle, None if require_signature is None else [require_signature])


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"thoraxrt {__version__}")
        raise typer.Exit


@app.command()
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A .pth, .pt, .tar, .ckpt, .safetensors or .onnx file, or a Hugging Face style folder.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The bundle's folder, made whole or not at all.", show_default=False)],
    precision: Annotated[str, typer.Option(help="Graphs to write, comma-separated: fp32, fp16, int8.")] = "fp32,fp16",
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="For int8: a folder of radiographs (NIH layout or not), a text file that lists some, or another "
            "bundle's ranges.json.",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option("--calibration-method", help="minmax, percentile, entropy, mse; best measures all four.")
    ] = "best",
    target: Annotated[
        str | None,
        typer.Option(help="Compile TensorRT plans as well, for these GPU architectures: sm86,sm89,sm120 for example."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="The network's outputs in order, comma-separated; else the file's, else the 14 NIH findings."
        ),
    ] = None,
    activation: Annotated[
        str | None, typer.Option(help="sigmoid or softmax; else the file's, else sigmoid.", show_default=False)
    ] = None,
    operating_points: Annotated[
        Path | None,
        typer.Option(
            help='A JSON file ({"Edema": 0.3, ...}), or an NIH-layout folder to choose them on (Youden\'s J, '
            "train_val images only); else 0.5, marked as default."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="A folder of radiographs to check the graphs on; else phantoms."),
    ] = None,
    input_size: Annotated[
        int | None, typer.Option(help="Resize the shorter side to N and crop N x N: 320, 448, 512 ...")
    ] = None,
    resize: Annotated[
        str | None, typer.Option(help="shorter:N, or exact:WxH; else the file's, else shorter:256.")
    ] = None,
    crop: Annotated[
        int | None, typer.Option(help="Side of the centre crop, 0 for none; else the file's, else 224.")
    ] = None,
    square: Annotated[
        bool, typer.Option("--square", help="Cut the radiograph to its centre square before the resize.")
    ] = False,
    trained_with: Annotated[
        str | None,
        typer.Option(
            help="What training did instead of Pillow's bilinear resize and one crop (skimage, opencv-area, "
            "opencv-linear, pillow-bicubic, ten-crop): how far serving is from it is measured and written down."
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(
            help="What training subtracted, per channel, of pixels in 0..1; else the file's, else ImageNet's."
        ),
    ] = None,
    std: Annotated[str | None, typer.Option(help="What training divided by; goes with --mean.")] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:FACTORY",
            help="Your own code: called without arguments, it makes the module whose weights the checkpoint holds.",
        ),
    ] = None,
    box_threshold: Annotated[
        float, typer.Option(help="Share of a CAM's range from which a pixel belongs to a box.")
    ] = 180 / 255,
    replace: Annotated[bool, typer.Option("--replace", help="Exchange an existing bundle, atomically.")] = False,
) -> None:
    """Turn a trained classifier into a bundle.

    DenseNets and ResNets are recognised by their weights' names; any other network that ends in global average
    pooling and one linear layer comes as ONNX or with --network. Every graph is checked against the original.

    [bold]thoraxrt export densenet121-nih.pth.tar --out chexnet.bundle[/]

    [bold]thoraxrt export densenet121-nih.pth.tar --out chexnet.bundle --precision fp32,fp16,int8 --calibrate nih[/]
    """
    from thoraxrt.engine.boxes import BoxSpec
    from thoraxrt.engine.bundle import TrainedWith
    from thoraxrt.export.bundle import ExportOptions, export_bundle
    from thoraxrt.export.graph import Normalisation
    from thoraxrt.export.int8 import Choice
    from thoraxrt.export.source import ACTIVATIONS, Given

    if (mean is None) != (std is None):
        raise RequestError("--mean and --std go together: give both, or neither")
    if activation is not None and activation not in ACTIVATIONS:
        raise RequestError(f"--activation {activation}: expected one of {', '.join(ACTIVATIONS)}")
    try:
        options = ExportOptions(
            precisions=_items(precision),
            given=Given(
                labels=_items(labels) if labels else None,
                activation=ACTIVATIONS[activation] if activation else None,
                preprocess=_preprocess(input_size, resize, crop, square),
                normalisation=Normalisation(mean=_numbers(mean), std=_numbers(std)) if mean and std else None,
                trained_with=_one_of("--trained-with", trained_with, TrainedWith) if trained_with else None,
                network=network,
            ),
            boxes=BoxSpec(threshold=box_threshold),
            operating_points=operating_points,
            images=images,
            calibrate=calibrate,
            method=_one_of("--calibration-method", method, Choice),
            replace=replace,
        )
    except ValueError as error:
        raise RequestError(str(error)) from error
    if target:  # refused before the long work, not after it
        _plan_options(target)
    bundle = export_bundle(checkpoint, out, options, _track)
    _show_export(bundle)
    if target:
        compile_bundle(out, target=target)


def _preprocess(input_size: int | None, resize: str | None, crop: int | None, square: bool) -> PreprocessSpec | None:
    from thoraxrt.engine.preprocess import PreprocessSpec, Shorter

    if input_size is not None:
        if resize is not None or crop is not None:
            raise RequestError("--input-size says both resize and crop: leave out --resize and --crop, or --input-size")
        return PreprocessSpec(resize=Shorter(pixels=input_size), crop=input_size, square=square)
    if resize is None and crop is None and not square:
        return None
    return PreprocessSpec(
        resize=_resize(resize or "shorter:256"), crop=224 if crop is None else crop or None, square=square
    )


def _show_export(bundle: Bundle) -> None:
    manifest = bundle.manifest
    for name, check in manifest.checks.items():
        kept = manifest.kept_in_fp32.get(name)
        print(
            f"{name}: logits within {check.max_logit_difference:.1e} of the original on {check.data}, "
            f"{manifest.files[bundle.graph_name(name)].size / 1e6:.1f} MB"
            + (f", {len(kept)} {'convolutions' if name == 'int8' else 'nodes'} kept in fp32" if kept else "")
        )
    for name, agreement in manifest.agreement.items():
        print(
            f"{name} against fp32 on {agreement.images} radiographs that nothing was chosen on: probability error "
            f"{agreement.mean_error:.4f} on average, {agreement.p99_error:.4f} at the 99th percentile, rank correlation "
            f"{agreement.rank_correlation:.4f}; {_auroc_text(agreement)}: "
            + ("meets the bar" if agreement.meets_bar else "MISSES THE BAR")
        )
    if manifest.calibration and not manifest.calibration.quantised:
        print(
            "int8: NOT WRITTEN, since no choice of convolutions meets the bar; sensitivity.png in the bundle shows why"
        )
    if folded := manifest.normalisation:
        print(
            f"{_preprocess_text(manifest.preprocess)}; mean {folded.mean} and std {folded.std} of pixels in 0..1 folded into "
            f"the network; activation {_activation_text(manifest)}"
        )
    if manifest.assumed:
        print(
            f"ASSUMED, since neither the file nor an option says so: {', '.join(manifest.assumed)} (the CheXNet recipe)"
        )
    if skew := manifest.skew:
        print(
            f"served geometry against {skew.trained_with} of training: probability differs by "
            f"{skew.mean_probability_difference:.4f} on average, at most {skew.max_probability_difference:.4f}, on {skew.data}"
        )
    print(f"{manifest.network.name} -> {bundle.path}")


def _auroc_text(agreement: Agreement) -> str:
    """How many findings' AUROC could be judged, and which of them moved too far."""
    told = [finding for finding in agreement.findings if finding.verdict != "cannot tell"]
    beyond = [f"{finding.finding} {finding.difference:+.4f}" for finding in told if finding.verdict == "beyond"]
    if not told:
        return "AUROC cannot be told of any finding, for that 20 images with it and 20 without are needed"
    return f"AUROC within 0.005 for {len(told) - len(beyond)} of {len(told)} findings with enough images" + (
        f", not for {', '.join(beyond)}" if beyond else ""
    )


@app.command("compile")
def compile_bundle(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.", show_default=False)],
    precision: Annotated[
        str | None, typer.Option(help="Comma-separated: fp32, fp16, int8; else every graph the bundle holds.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated; one optimisation profile each.")] = "1,8,32",
    target: Annotated[
        str | None,
        typer.Option(help="GPU architectures, sm86,sm89 say (tensorrt_rtx, needs no GPU); else this machine's GPU."),
    ] = None,
    optimization_level: Annotated[int, typer.Option(help="How long the builder searches, 0 to 5.")] = 3,
    workspace: Annotated[
        int | None, typer.Option(metavar="MIB", help="Most scratch memory of a layer; else all of the device's.")
    ] = None,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible", help="For every GPU from Ampere on; with tensorrt_rtx instead of --target."
        ),
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="For later runtimes of the same major version (tensorrt).")
    ] = False,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="Leave the weights out: the graph's are put in on loading.")
    ] = False,
    key: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY", help="Sign the plans with this private key; needs --out.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for the signed plans, to copy into another machine's cache.")
    ] = None,
    require_signature: RequireSignature = None,
) -> None:
    """Compile a bundle's graphs to TensorRT plans, ahead of time, into the plan cache.

    The cache is $THORAXRT_CACHE, else ~/.cache/thoraxrt. A plan that is there is not compiled again.

    [bold]thoraxrt compile chexnet.bundle --precision fp16,int8 --target sm86,sm89,sm120[/]
    """
    from thoraxrt.engine.plans import PRECISIONS, PlanCache, compile_plans

    if (key is None) != (out is None):
        raise RequestError("--sign KEY and --out DIR go together: a plan leaves this machine signed")
    opened = _open(bundle, require_signature)
    options = _plan_options(
        target,
        batch,
        optimization_level=optimization_level,
        workspace_mib=workspace,
        hardware_compatible=hardware_compatible,
        version_compatible=version_compatible,
        strip_weights=strip_weights,
    )
    held = [name for name in PRECISIONS if opened.graph_name(name) in opened.manifest.files]
    precisions = _items(precision) if precision else held
    cache = PlanCache(trusted=[require_signature] if require_signature else [])
    for compiled in _track(compile_plans(opened, precisions, options, cache), "Compiling plans", len(precisions)):
        folder = PlanCache(out).ship(compiled.cached, key) if out and key else compiled.cached.folder
        print(f"{_plan_text(compiled)} -> {folder}")


def _plan_options(target: str | None, batch: str = "1,8,32", **options: Any) -> PlanOptions:
    from thoraxrt.engine.backends.tensorrt_plan import PlanOptions, installed_flavour, supported_options

    if not all(size.isdecimal() for size in batch.split(",")):
        raise RequestError(f"--batch {batch}: expected sizes separated by commas, 1,8,32 for example")
    try:
        wanted = PlanOptions(
            buckets=tuple(map(int, batch.split(","))), targets=_items(target) if target else (), **options
        )
    except ValueError as error:
        raise RequestError(str(error)) from error
    return supported_options(wanted, installed_flavour())


def _plan_text(compiled: Compiled) -> str:
    record = compiled.cached.record
    how = "compiled before" if compiled.seconds is None else f"compiled in {compiled.seconds:.1f} s"
    again = f", again since {compiled.reason}" if compiled.reason else ""
    return (
        f"{record.key.precision} for {', '.join(record.key.options.targets)}, "
        f"batches of {', '.join(map(str, record.key.options.buckets))}: {how}{again}, "
        f"{record.plan.size / 1e6:.1f} MB, {record.layers}"
    )


@app.command()
def sign(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.", show_default=False)],
    key: Annotated[Path, typer.Option(help="An Ed25519 private key in PEM, unencrypted.", show_default=False)],
) -> None:
    """Sign a bundle: its manifest, which names every file's sha256.

    Keep the private key off the machines that serve; give them the public one.

    [bold]openssl genpkey -algorithm ed25519 -out private.pem[/]

    [bold]openssl pkey -in private.pem -pubout -out public.pem[/]

    [bold]thoraxrt sign chexnet.bundle --key private.pem[/]

    [bold]thoraxrt serve chexnet.bundle --require-signature public.pem[/]
    """
    from thoraxrt.export.publish import sign_bundle

    sign_bundle(_open(bundle, None), key)
    print(f"{bundle} signed")


@app.command("export-triton")
def export_triton(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.", show_default=False)],
    repository: Annotated[
        Path, typer.Argument(help="Triton's model repository; the model is a folder in it.", show_default=False)
    ],
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16 or int8; else what the bundle recommends, else fp32.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Most images that Triton runs at once; else 32.")] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="A plan instead of the graph: a folder that `thoraxrt compile` printed. From anywhere but this "
            "machine's own plan cache it needs --require-signature."
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Exchange an existing model, atomically.")] = False,
    require_signature: RequireSignature = None,
) -> None:
    """Write a bundle's network as a model for a Triton Inference Server, or KServe.

    Its tensors are image, logits and cam: what stands around the network stays the client's.

    [bold]thoraxrt export-triton chexnet.bundle models --precision fp16[/]
    """
    from thoraxrt.engine.plans import PlanCache
    from thoraxrt.export.triton import triton_from_bundle

    trusted = [require_signature] if require_signature else []
    folder = plan.resolve() if plan else Path()
    cached = PlanCache(Path(*folder.parts[:-3]), trusted).read(folder) if plan else None
    model = triton_from_bundle(
        _open(bundle, require_signature), repository, precision=precision, batch=batch, plan=cached, replace=replace
    )
    print(f"{bundle} -> {model}")


def _resize(text: str) -> Exact | Shorter:
    from thoraxrt.engine.preprocess import Exact, Shorter

    mode, _, size = text.partition(":")
    numbers = size.split("x")
    if mode == "shorter" and len(numbers) == 1 and numbers[0].isdecimal():
        return Shorter(pixels=int(size))
    if mode == "exact" and len(numbers) == 2 and all(number.isdecimal() for number in numbers):
        return Exact(width=int(numbers[0]), height=int(numbers[1]))
    raise RequestError(f"--resize {text}: expected shorter:N or exact:WxH, shorter:256 for example")


def _items(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(","))


def _one_of(option: str, value: str, choices: Any) -> Any:
    """The value, where it is one of a Literal's. Raises RequestError."""
    if value not in (names := get_args(choices)):
        raise RequestError(f"{option} {value}: expected one of {', '.join(names)}")
    return value


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise RequestError(f"{text!r}: expected numbers separated by commas, 0.485,0.456,0.406 for example") from error


@app.command()
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
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --server: the token that it knows you by.", show_default=False),
    ] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --server: over TLS, where this CA vouches for it.", show_default=False),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --server: over TLS, with this certificate.", show_default=False),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The private key of --tls-cert.", show_default=False)
    ] = None,
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
    images = _images(arguments if server else arguments[1:])
    if overlay:
        overlay.mkdir(parents=True, exist_ok=True)
    answers = (
        _ask_server(server, images, overlay, model, stat, token_file, (tls_ca, tls_cert, tls_key))
        if server
        else _ask_engine(
            _open(arguments[0], require_signature),
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
    for image, answer in zip(images, _track(answers, "Predicting", len(images)), strict=True):
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


def _images(arguments: list[str]) -> list[str]:
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
    address: str,
    images: list[str],
    overlay: Path | None,
    model: str | None,
    stat: bool,
    token_file: Path | None,
    tls_files: tuple[Path | None, Path | None, Path | None],
) -> Iterator[Prediction | ThoraxrtError]:
    from thoraxrt.server.client import Client, ClientTls, Priority

    ca, certificate, private_key = tls_files
    try:
        tls = ClientTls(ca=ca, certificate=certificate, private_key=private_key) if any(tls_files) else None
    except ValueError as error:
        raise RequestError("--tls-cert and --tls-key go together: give both, or neither") from error
    priority = Priority.STAT if stat else Priority.ROUTINE
    with Client(address, model=model, priority=priority, token_file=token_file, tls=tls) as client:
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


@app.command()
def serve(
    models: Annotated[
        Path | None,
        typer.Argument(
            metavar="[BUNDLE]", help="A bundle's folder, or a repository of them: NAME/VERSION/.", show_default=False
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Everything else: a TOML file.", show_default=False)
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Show what would be served, and what is wrong; serve nothing.")
    ] = False,
    host: Annotated[str | None, typer.Option(help="127.0.0.1 unless told otherwise.", show_default=False)] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="8500 unless told otherwise; 0 takes a free one.")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="8501 unless told otherwise; a second server needs another."),
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option(
            "--insecure", help="Beyond loopback also without encryption and authentication.", show_default=False
        ),
    ] = None,
    backend: Backend = None,
    precision: Precision = None,
    device: Device = None,
    fall_back: Annotated[
        bool | None,
        typer.Option(
            "--fall-back",
            help="Go on with the CPU (fp32) where a lost GPU cannot be opened again.",
            show_default=False,
        ),
    ] = None,
    require_signature: RequireSignature = None,
) -> None:
    """Answer gRPC requests with a bundle, or with a repository of models.

    What is given here goes over the environment (THORAXRT_SERVER__PORT=8600), that over the file, that over the
    defaults. Health, reflection, the Open Inference Protocol and metrics (port 8501) are on. Ctrl-C or SIGTERM finishes
    what is in flight, then stops; SIGHUP looks at the bundles again.

    [bold]thoraxrt serve chexnet.bundle --port 8500[/]

    [bold]thoraxrt serve --config thoraxrt.toml --check[/]
    """
    from thoraxrt.server.config import load_config

    flags = {
        "models.path": models,
        "models.backend": backend,
        "models.precision": precision,
        "models.device": device,
        "models.fall_back": fall_back,
        "models.trusted": [require_signature] if require_signature else None,
        "server.host": host,
        "server.port": port,
        "server.insecure": insecure,
        "metrics.port": metrics_port,
    }
    loaded = load_config(config, {key: value for key, value in flags.items() if value is not None})
    if check:
        raise typer.Exit(_show_check(loaded))
    from thoraxrt.server.run import run

    run(loaded)


def _show_check(config: Config) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from thoraxrt.server.config import check, exit_status

    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    table, findings = Table("", "what", "found"), check(config)
    for finding in findings:
        level = f"[{colours[finding.level]}]{finding.level}"
        table.add_row(level, escape(finding.about), escape(finding.text))
    Console().print(table)
    return exit_status(findings)


@app.command()
def token(
    file: Annotated[
        Path, typer.Argument(help="The server's file of hashed tokens (security.tokens).", show_default=False)
    ],
    name: Annotated[str, typer.Argument(help="Whom the token is for, as the audit log shows it.", show_default=False)],
    roles: Annotated[
        str, typer.Option("--roles", help="predict, or predict,admin to load and unload models too.")
    ] = "predict",
) -> None:
    """Make a bearer token: it is shown once, and only its hash is kept.

    [bold]thoraxrt token tokens.toml pacs-1[/]
    """
    from thoraxrt.server.tokens import add_token

    print(add_token(file, name, _items(roles)))  # type: ignore[arg-type]  # it checks the roles itself


@app.command("audit")
def verify_audit(
    log: Annotated[Path, typer.Argument(help="The audit log (audit.path); the files it was rotated to are found.")],
    noted: Annotated[
        str | None, typer.Option(metavar="HASH", help="A hash that was noted earlier, and must be in the log.")
    ] = None,
) -> None:
    """Check that nothing in an audit log was changed, left out or cut off.

    [bold]thoraxrt audit /var/log/thoraxrt/audit.jsonl[/]
    """
    from thoraxrt.server.audit import verify

    found = verify(log, noted)
    print(f"lines {found.first} to {found.last} are unbroken; the last one's hash is {found.head}")
    if found.recovered or found.unfinished:
        print(
            f"{found.recovered} times a half-written line was closed off; {found.unfinished} bytes are half-written now"
        )


@app.command()
def top(
    url: Annotated[str, typer.Argument(help="Where the server's metrics are.")] = "http://127.0.0.1:8501/metrics",
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
) -> None:
    """A live view of a server: throughput, latencies, queue, batches, refusals.

    [bold]thoraxrt top[/]
    """
    from thoraxrt.server.top import top as watch

    watch(url, once=once)


@app.command()
def info(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="The same as one JSON object.")] = False,
    require_signature: RequireSignature = None,
) -> None:
    """What is in a bundle, whether its files are intact, which backends can run it here, and which plans fit.

    [bold]thoraxrt info chexnet.bundle[/]
    """
    import msgspec

    from thoraxrt.engine.backends import available, backend_names
    from thoraxrt.engine.bundle import SIGNATURE

    opened = _open(bundle, require_signature)
    opened.verify()
    backends = {name: available(name, opened) for name in backend_names()}
    if as_json:
        manifest = msgspec.to_builtins(opened.manifest)
        facts = {"bundle": str(bundle), "sha256": opened.sha256, "manifest": manifest, "backends": backends}
        print(json.dumps({**facts, "plans": list(_plans(opened, require_signature))}))
        return
    signed = "none"
    if require_signature:
        signed = f"by a key of {require_signature}"
    elif (opened.path / SIGNATURE).exists():
        signed = "there, not checked: --require-signature KEYS does"
    _show_info(opened, backends, _plans(opened, require_signature), signed)


def _plans(bundle: Bundle, require_signature: Path | None) -> Iterator[dict[str, Any]]:
    """The bundle's cached plans; `reason` says why one cannot run here, None where it can."""
    from thoraxrt.engine.errors import PlanError
    from thoraxrt.engine.plans import PlanCache, misfit, this_machine

    cache, machine = PlanCache(trusted=[require_signature] if require_signature else []), this_machine()
    for folder in cache.folders(bundle):
        plan: dict[str, Any] = {
            "folder": str(folder),
            "precision": None,
            "targets": None,
            "batches": None,
            "bytes": None,
        }
        try:
            record = cache.read(folder).record
        except PlanError as error:
            yield {**plan, "reason": str(error)}
            continue
        options = record.key.options
        facts = (record.key.precision, options.targets, options.buckets, record.plan.size)
        yield dict(zip(plan, (str(folder), *facts), strict=True)) | {"reason": misfit(record.key, machine)}


def _show_info(
    bundle: Bundle, backends: dict[str, dict[str, str | None]], plans: Iterable[dict[str, Any]], signed: str
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    manifest = bundle.manifest
    console = Console()
    facts = Table.grid("fact", "value", padding=(0, 2))
    facts.columns[1].overflow = "fold"
    facts.add_row(
        "network", f"{manifest.network.name}, CAM {manifest.network.cam_height} x {manifest.network.cam_width}"
    )
    facts.add_row("manifest sha256", bundle.sha256)
    facts.add_row("signature", signed)
    facts.add_row("checkpoint sha256", manifest.network.checkpoint_sha256)
    facts.add_row("preprocess", _preprocess_text(manifest.preprocess))
    facts.add_row("boxes", f"threshold {manifest.boxes.threshold:.3f}")
    if folded := manifest.normalisation:
        facts.add_row("normalisation", f"mean {folded.mean}, std {folded.std} of pixels in 0..1, folded in")
    facts.add_row("activation", _activation_text(manifest))
    if skew := manifest.skew:
        facts.add_row(
            "trained with",
            f"{skew.trained_with}: serving moves a probability by {skew.mean_probability_difference:.4f} on average, "
            f"{skew.max_probability_difference:.4f} at most ({skew.data})",
        )
    if calibration := manifest.calibration:
        counts = ", ".join(f"{len(hashes)} to {part}" for part, hashes in calibration.images.items())
        counts += "; reused from an earlier export" if calibration.reused else ""
        facts.add_row(
            "int8",
            f"{calibration.quantised} of {calibration.layers} convolutions, {calibration.method} ranges; {counts} "
            f"({calibration.split})",
        )
    if manifest.assumed:
        facts.add_row("assumed", f"{', '.join(manifest.assumed)}: nobody said; the CheXNet recipe's")
    facts.add_row("recommended", str(manifest.recommended or "none: fp32 on the first backend that can"))
    facts.add_row("made by", ", ".join(f"{name} {version}" for name, version in manifest.producer.items()))
    console.print(facts)

    chosen_on = {point.data for point in manifest.operating_points if point.data}
    findings = Table("finding", "operating point", "sensitivity", "specificity", "how", title="Labels")
    findings.caption = f"operating points from {', '.join(sorted(chosen_on))}" if chosen_on else None
    for point in manifest.operating_points:
        rates = ("" if rate is None else f"{rate:.3f}" for rate in (point.sensitivity, point.specificity))
        findings.add_row(point.finding, f"{point.probability:.4f}", *rates, point.method)
    console.print(findings)

    files = Table("file", "MB", "sha256", title="Files, all intact")
    for name, entry in manifest.files.items():
        files.add_row(name, f"{entry.size / 1e6:.1f}", entry.sha256[:16])
    console.print(files)

    if not manifest.agreement:
        console.print("[dim]agreement with fp32 not measured; `thoraxrt export --calibrate FOLDER` does")
    else:
        close = Table("precision", "mean error", "99th percentile", "rank correlation", "AUROC", "meets the bar")
        close.title, close.caption = "Agreement with FP32", "errors: absolute differences of probabilities"
        for name, agreement in manifest.agreement.items():
            numbers = (agreement.mean_error, agreement.p99_error, agreement.rank_correlation)
            met = "[green]yes" if agreement.meets_bar else "[red]no"
            close.add_row(name, *(f"{number:.4f}" for number in numbers), _auroc_text(agreement), met)
        console.print(close)

    usable = Table("backend", "precision", "usable here", title="Backends")
    for name, reasons in backends.items():
        grouped: dict[str | None, list[str]] = {}  # no driver is no driver, whatever the precision
        for precision, reason in reasons.items():
            grouped.setdefault(reason, []).append(precision)
        for reason, precisions in grouped.items():
            usable.add_row(name, ", ".join(precisions), "[green]yes" if reason is None else f"no: {escape(reason)}")
    console.print(usable)

    cached = Table("plan", "batches", "MB", "fits this machine", title="Cached TensorRT plans")
    cached.columns[0].overflow = "fold"
    for plan in plans:
        batches = ", ".join(map(str, plan["batches"] or ()))
        size = "" if plan["bytes"] is None else f"{plan['bytes'] / 1e6:.1f}"
        fits = "[green]yes" if plan["reason"] is None else f"no: {escape(plan['reason'])}"
        cached.add_row(escape(Path(plan["folder"]).name), batches, size, fits)
    console.print(cached if cached.row_count else "[dim]no plan in the cache; `thoraxrt compile` makes some")


def _activation_text(manifest: Manifest) -> str:
    return str(type(manifest.activation).__struct_config__.tag)


def _preprocess_text(spec: PreprocessSpec) -> str:
    from thoraxrt.engine.preprocess import Shorter

    resize = spec.resize
    size = f"shorter side to {resize.pixels}" if isinstance(resize, Shorter) else f"{resize.width} x {resize.height}"
    crop = f", centre crop {spec.crop}" if spec.crop else ""
    square = "centre square, then " if spec.square else ""
    return f"{square}resize {size}{crop}, Pillow's bilinear filter"


@app.command()
def phantoms(
    folder: Annotated[Path, typer.Argument(help="A folder that does not exist yet.", show_default=False)],
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 100,
    seed: Annotated[int, typer.Option(help="The same seed gives the same images.")] = 1,
) -> None:
    """Make a data set of phantom radiographs with known findings and boxes, in the NIH layout.

    [bold]thoraxrt phantoms phantoms --count 200[/]
    """
    from thoraxrt.export.phantoms import write_phantoms

    write_phantoms(folder, count, seed, _track)
    print(f"{count} phantoms -> {folder}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes; exchanged as a whole.")] = Path("demo"),
) -> None:
    """The main job on phantoms: export, serve, ask over gRPC, and a picture of what was found.

    Needs no data set, no download and no GPU.
    """
    from thoraxrt.benchmarks.demo import run_demo

    run_demo(out, _track)


if __name__ == "__main__":
    main()
