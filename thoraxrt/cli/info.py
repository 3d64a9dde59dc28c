"""What a bundle is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thoraxrt.cli.app import RequireSignature, activation_text, auroc_text, open_bundle, preprocess_text

if TYPE_CHECKING:
    from thoraxrt.engine.bundle import Bundle


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

    opened = open_bundle(bundle, require_signature)
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


def _parity_text(bundle: Bundle) -> str:
    """What the receipt says, or why it cannot be heeded: the rest of the bundle is sound."""
    from thoraxrt.engine.errors import BundleError
    from thoraxrt.engine.receipt import read_receipt

    try:
        receipt = read_receipt(bundle)
    except BundleError as error:
        return f"the receipt does not count: {error}"
    if receipt is None:
        return "no receipt"
    passed = ", ".join(" ".join(each) for each in sorted(receipt.candidates)) or "nothing"
    return f"{receipt.images} images, margin {receipt.margin:g}, {receipt.date}; passed: {passed}"


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
    facts.add_row("preprocess", preprocess_text(manifest.preprocess))
    facts.add_row("boxes", f"threshold {manifest.boxes.threshold:.3f}")
    if folded := manifest.normalisation:
        facts.add_row("normalisation", f"mean {folded.mean}, std {folded.std} of pixels in 0..1, folded in")
    facts.add_row("activation", activation_text(manifest))
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
    facts.add_row("parity", escape(_parity_text(bundle)))
    default = manifest.recommended
    facts.add_row(
        "recommended",
        f"{default.backend} {default.precision}" if default else "none: fp32 on the first backend that can",
    )
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
        close = Table("precision", "mean error", "99th percentile", "rank correlation", "least concordance")
        close.add_column("AUROC")
        close.add_column("meets the bar")
        close.title, close.caption = "Agreement with FP32", "errors: absolute differences of probabilities"
        for name, agreement in manifest.agreement.items():
            numbers = (agreement.mean_error, agreement.p99_error, agreement.rank_correlation)
            met = "[green]yes" if agreement.meets_bar else "[red]no"
            least = agreement.least_concordance
            concordance = f"{least[1]:.4f} ({escape(least[0])})" if least else "too few images"
            close.add_row(name, *(f"{number:.4f}" for number in numbers), concordance, auroc_text(agreement), met)
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
