"""The main job end to end on phantoms: export, serve, ask over gRPC, compare with what was planted.

Owns the story, its table and its contact sheet. Everything it shows comes back through the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from thoraxrt.benchmarks.auroc import auroc_per_finding
from thoraxrt.engine.boxes import Box, iobb
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.engine import Engine, Prediction, read_radiograph
from thoraxrt.engine.errors import ThoraxrtError
from thoraxrt.engine.overlay import CORRECT, FALSE_POSITIVE, GROUND_TRUTH, draw_box, heat, radiograph_image
from thoraxrt.engine.preprocess import PreprocessSpec
from thoraxrt.export import Track
from thoraxrt.export.bundle import ExportOptions, export_bundle
from thoraxrt.export.nih import NihDataset, NihRecord
from thoraxrt.export.phantoms import write_phantoms
from thoraxrt.export.sample import SAMPLE_BOXES, SAMPLE_CHECKPOINT, UNSEEN_SEED
from thoraxrt.server.client import Client
from thoraxrt.server.serve import running_server

__all__ = ["HIT", "contact_sheet", "run_demo"]

HIT = 0.25
"""IoBB from which a box counts as correct: the middle of the thresholds in Table 4 of arXiv 1705.02315."""

_PHANTOMS = 160
_SHEET_ROWS = 4
_PANEL, _CAPTION = 300, 24  # pixels


def run_demo(out: Path, track: Track) -> None:
    """Run the main job into the folder `out` and print what was found.

    Phantoms already in it are used again: the same seed makes the same ones.
    """
    console = Console()
    phantoms = out / f"phantoms-{UNSEEN_SEED}"
    if not phantoms.exists():
        write_phantoms(phantoms, _PHANTOMS, UNSEEN_SEED, track)
    records = NihDataset.open(phantoms).split("test").present().records
    bundle = export_bundle(
        SAMPLE_CHECKPOINT,
        out / "sample.bundle",
        ExportOptions(boxes=SAMPLE_BOXES, operating_points=phantoms, images=phantoms / "images", replace=True),
        track,
    )
    predictions = _ask_server(bundle, records, track)
    shown = _varied(records)
    chosen = [records[row] for row in shown], [predictions[row] for row in shown]
    console.print(_table(*chosen))
    console.print(_summary(bundle.manifest.labels, records, predictions))
    sheet = out / "contact-sheet.png"
    contact_sheet(*chosen, bundle.manifest.preprocess).save(sheet)
    console.print(f"bundle: [bold]{bundle.path}[/]   contact sheet: [bold]{sheet}[/]")


def _varied(records: Sequence[NihRecord]) -> list[int]:
    """The first records that each show something not shown before: whatever the network made of them."""
    seen: set[str] = set()
    rows = []
    for row, record in enumerate(records):
        if not seen.issuperset(record.labels):
            seen.update(record.labels)
            rows.append(row)
    return rows[:_SHEET_ROWS]


def _ask_server(bundle: Bundle, records: Sequence[NihRecord], track: Track) -> list[Prediction]:
    """Serve the bundle on loopback and send it every image over gRPC."""
    with (
        Engine.open(bundle) as engine,
        running_server(engine) as port,
        Client(f"127.0.0.1:{port}") as client,
    ):
        replies = client.predict_many((_path(record) for record in records), cam=True)
        predictions = []
        for reply in track(replies, f"Asking 127.0.0.1:{port}", len(records)):
            if isinstance(reply, ThoraxrtError):
                raise reply
            predictions.append(reply.prediction)
        return predictions


def _path(record: NihRecord) -> Path:
    assert record.path is not None  # records come from present()
    return record.path


def _table(records: Sequence[NihRecord], predictions: Sequence[Prediction]) -> Table:
    table = Table("phantom", "planted", "reported (probability)", "boxes", title="Findings, as the server answered")
    for record, prediction in zip(records, predictions, strict=True):
        reported = [
            f"[{'green' if f.finding in record.labels else 'red'}]{f.finding}[/] {f.probability:.2f}"
            for f in prediction.findings
            if f.reported
        ]
        hits = [_hit(box, record) for box in prediction.boxes]
        boxes = f"[green]{sum(hits)} correct[/], [red]{len(hits) - sum(hits)} false[/]" if hits else ""
        table.add_row(record.image, ", ".join(record.labels), ", ".join(reported), boxes)
    return table


def _hit(box: Box, record: NihRecord) -> bool:
    return any(box.finding == truth.finding and iobb(box, truth) >= HIT for truth in record.boxes)


def _summary(labels: Sequence[str], records: Sequence[NihRecord], predictions: Sequence[Prediction]) -> Table:
    """A row per planted finding: how many, AUROC, what was reported of them and beside them, and the boxes' hits."""
    positive = np.array([[label in record.labels for label in labels] for record in records])  # (N, C)
    logits = np.array([[finding.logit for finding in prediction.findings] for prediction in predictions])
    reported = np.array([[finding.reported for finding in prediction.findings] for prediction in predictions])
    areas = auroc_per_finding(positive.astype(np.uint8), logits, labels)
    hits: dict[str, list[bool]] = {label: [] for label in labels}
    for record, prediction in zip(records, predictions, strict=True):
        for box in prediction.boxes:
            hits[box.finding].append(_hit(box, record))
    executed = f"{predictions[0].backend} {predictions[0].precision}"
    table = Table(
        *("finding", "planted in", "AUROC", "reported there", "reported elsewhere", f"boxes with IoBB >= {HIT}"),
        title=f"{len(records)} phantoms the network never saw, {executed}",
    )
    for column, label in enumerate(labels):
        area, here = areas[label], positive[:, column]
        if area is None:
            continue
        found, elsewhere = reported[here, column].sum(), reported[~here, column].sum()
        boxes = f"{sum(hits[label])} of {len(hits[label])}"
        table.add_row(label, str(here.sum()), f"{area:.3f}", str(found), str(elsewhere), boxes)
    every = [hit for each in hits.values() for hit in each]
    mean = np.mean([area for area in areas.values() if area is not None])
    table.add_section()
    table.add_row("all", "", f"{mean:.3f} (mean)", "", "", f"{sum(every)} of {len(every)}")
    return table


def contact_sheet(records: Sequence[NihRecord], predictions: Sequence[Prediction], spec: PreprocessSpec) -> Image.Image:
    """Rows of radiograph, CAM overlay and boxes: correct green, false positive red, ground truth blue."""
    sheet = Image.new("RGB", (3 * _PANEL, len(records) * (_PANEL + _CAPTION)), (16, 16, 16))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for row, (record, prediction) in enumerate(zip(records, predictions, strict=True)):
        radiograph = read_radiograph(_path(record))
        reported = [finding for finding in prediction.findings if finding.reported]
        boxed = radiograph_image(radiograph)
        for truth in record.boxes:
            draw_box(boxed, truth, GROUND_TRUTH)
        for box in prediction.boxes:
            draw_box(boxed, box, CORRECT if _hit(box, record) else FALSE_POSITIVE, f"{box.finding} {box.score:.2f}")
        panels = (
            radiograph_image(radiograph),
            heat(radiograph, prediction, spec, [finding.finding for finding in reported]),
            boxed,
        )
        top = row * (_PANEL + _CAPTION)
        for column, panel in enumerate(panels):
            sheet.paste(panel.resize((_PANEL, _PANEL), Image.Resampling.LANCZOS), (column * _PANEL, top + _CAPTION))
        captions = (
            f"planted: {', '.join(record.labels) or 'nothing'}",
            "CAM of: " + (", ".join(f"{f.finding} {f.probability:.2f}" for f in reported) or "nothing reported"),
            "correct green, false red, truth blue",
        )
        for column, caption in enumerate(captions):
            draw.text((column * _PANEL + 6, top + 5), caption[:52], fill=(230, 230, 230), font=font)
    return sheet
