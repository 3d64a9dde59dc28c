"""From a checkpoint to a bundle, its plans, its signature; and phantoms to try it on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thoraxrt.cli.app import (
    RequireSignature,
    activation_text,
    auroc_text,
    items,
    one_of,
    open_bundle,
    preprocess_text,
    track,
)
from thoraxrt.engine.errors import RequestError

if TYPE_CHECKING:
    from thoraxrt.engine.backends.tensorrt_plan import PlanOptions
    from thoraxrt.engine.bundle import Bundle
    from thoraxrt.engine.plans import Compiled
    from thoraxrt.engine.preprocess import Exact, PreprocessSpec, Shorter


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
            precisions=items(precision),
            given=Given(
                labels=items(labels) if labels else None,
                activation=ACTIVATIONS[activation] if activation else None,
                preprocess=_preprocess(input_size, resize, crop, square),
                normalisation=Normalisation(mean=_numbers(mean), std=_numbers(std)) if mean and std else None,
                trained_with=one_of("--trained-with", trained_with, TrainedWith) if trained_with else None,
                network=network,
            ),
            boxes=BoxSpec(threshold=box_threshold),
            operating_points=operating_points,
            images=images,
            calibrate=calibrate,
            method=one_of("--calibration-method", method, Choice),
            replace=replace,
        )
    except ValueError as error:
        raise RequestError(str(error)) from error
    if target:  # refused before the long work, not after it
        _plan_options(target)
    bundle = export_bundle(checkpoint, out, options, track)
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
    from thoraxrt.export.agreement import agreement_text

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
            f"{name} against fp32 on {agreement.images} radiographs that nothing was chosen on: "
            f"{agreement_text(agreement)}; {auroc_text(agreement)}: "
            + ("meets the bar" if agreement.meets_bar else "MISSES THE BAR")
        )
    if manifest.calibration and not manifest.calibration.quantised:
        print(
            "int8: NOT WRITTEN, since no choice of convolutions meets the bar; sensitivity.png in the bundle shows why"
        )
    if folded := manifest.normalisation:
        print(
            f"{preprocess_text(manifest.preprocess)}; mean {folded.mean} and std {folded.std} of pixels in 0..1 folded into "
            f"the network; activation {activation_text(manifest)}"
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
    opened = open_bundle(bundle, require_signature)
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
    precisions = items(precision) if precision else held
    cache = PlanCache(trusted=[require_signature] if require_signature else [])
    for compiled in track(compile_plans(opened, precisions, options, cache), "Compiling plans", len(precisions)):
        folder = PlanCache(out).ship(compiled.cached, key) if out and key else compiled.cached.folder
        print(f"{_plan_text(compiled)} -> {folder}")


def _plan_options(target: str | None, batch: str = "1,8,32", **options: Any) -> PlanOptions:
    from thoraxrt.engine.backends.tensorrt_plan import PlanOptions, installed_flavour, supported_options

    if not all(size.isdecimal() for size in batch.split(",")):
        raise RequestError(f"--batch {batch}: expected sizes separated by commas, 1,8,32 for example")
    try:
        wanted = PlanOptions(
            buckets=tuple(map(int, batch.split(","))), targets=items(target) if target else (), **options
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

    sign_bundle(open_bundle(bundle, None), key)
    print(f"{bundle} signed")


def recommend(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder, with the receipt of parity.", show_default=False)],
    times: Annotated[Path, typer.Argument(help="What `thoraxrt bench --json` said of it.", show_default=False)],
    key: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY", help="Sign bundle and receipt anew with this private key.")
    ] = None,
    require_signature: RequireSignature = None,
) -> None:
    """Write into a bundle what it runs on by default: the fastest backend and precision that its parity
    receipt lets run, see `serve --require-parity`.

    Measure on the machine that is to serve. Without this, FP32 runs on the first backend that can.

    [bold]thoraxrt recommend chexnet.bundle today.json[/]
    """
    from thoraxrt.benchmarks.bench import read_result
    from thoraxrt.benchmarks.recommend import recommend as choose

    chosen = choose(open_bundle(bundle, require_signature), read_result(times), key)
    print(f"{bundle} runs {chosen.backend} {chosen.precision} unless told otherwise")


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
        open_bundle(bundle, require_signature),
        repository,
        precision=precision,
        batch=batch,
        plan=cached,
        replace=replace,
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


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise RequestError(f"{text!r}: expected numbers separated by commas, 0.485,0.456,0.406 for example") from error


def phantoms(
    folder: Annotated[Path, typer.Argument(help="A folder that does not exist yet.", show_default=False)],
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 100,
    seed: Annotated[int, typer.Option(help="The same seed gives the same images.")] = 1,
) -> None:
    """Make a data set of phantom radiographs with known findings and boxes, in the NIH layout.

    [bold]thoraxrt phantoms phantoms --count 200[/]
    """
    from thoraxrt.export.phantoms import write_phantoms

    write_phantoms(folder, count, seed, track)
    print(f"{count} phantoms -> {folder}")
