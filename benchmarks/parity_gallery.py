"""The cases that a candidate moved most: radiograph, CAM and boxes as the reference and as the candidate give them.

Owns which cases are shown and how they are drawn; where answers stand in a receipt, they are taken from there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
from PIL import Image

from thoraxrt.benchmarks.receipt import Candidate, Moved, Receipt
from thoraxrt.benchmarks.report import picture
from thoraxrt.engine.boxes import Rectangle
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.engine import Engine, Prediction
from thoraxrt.engine.errors import ThoraxrtError
from thoraxrt.engine.overlay import GROUND_TRUTH, draw_box, heat, radiograph_image
from thoraxrt.engine.preprocess import PreprocessSpec
from thoraxrt.export import Track, no_progress
from thoraxrt.export.nih import NihRecord

__all__ = ["VISIBLE", "Case", "View", "gallery"]

VISIBLE: Final = 0.0005
"""Of a probability: what moved less is no case to look at."""

_log = logging.getLogger(__name__)

_OPENED = ("engine", "server")
_CASES = 12
_WIDTH = 320  # pixels of a picture: a case is some 30 kB
_DETECTED = (255, 159, 10)  # the annotation is blue: these two nobody mixes up


class View(msgspec.Struct, frozen=True, kw_only=True):
    """One side of a case: who answers, with what probability, what of it is reported; its picture as a data URI.

    `drawn_by` is whose CAM and boxes are seen where it is another, for PyTorch's are not kept; else None.
    """

    name: str
    probability: float
    reported: bool
    boxes: int
    picture: str
    drawn_by: str | None


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """An image and the finding that moved most in it. `labels` are the annotation's; `annotated` counts its boxes."""

    image: str
    finding: str
    labels: tuple[str, ...]
    annotated: int
    radiograph: str
    reference: View
    candidate: View


def gallery(
    receipt: Receipt, bundle: Bundle, records: Mapping[str, NihRecord], track: Track = no_progress
) -> tuple[Case, ...]:
    """At most 12 cases, shared among the candidates of the bundle, an image once for each.

    `records` are the data set's by image name; those whose image is not at hand are passed over. Every case is
    answered again, in this process: on the backend and at the precision of each side; what this machine cannot run so, a
    server's say, has no cases, and the log says why.
    """
    reference, drawn = receipt.reference, receipt.boxes_reference
    moving = [
        (result.candidate, cases)
        for result in receipt.results
        if result.candidate.through in _OPENED and (cases := _apart(result.moved, records, _CASES))
    ]
    if not moving or drawn is None or reference is None:
        return ()
    share = max(1, _CASES // len(moving))
    chosen = [(candidate, moved) for candidate, cases in moving for moved in cases[:share]][:_CASES]
    wanted: dict[tuple[str, str], dict[str, Path]] = {}
    for candidate, moved in chosen:
        for side in (drawn, candidate):
            wanted.setdefault((side.backend, side.precision), {})[moved.image] = _path(records, moved)
    answers: dict[tuple[str, str], dict[str, Prediction]] = {}
    for key, paths in wanted.items():
        try:
            answers[key] = _answers(bundle, *key, paths, track)
        except ThoraxrtError as error:
            _log.warning("no cases of %s %s are drawn: %s", *key, error)

    def case(candidate: Candidate, moved: Moved) -> Case:
        record, spec = records[moved.image], bundle.manifest.preprocess
        truths = [box for box in record.boxes if box.finding == moved.finding]
        theirs = answers[drawn.backend, drawn.precision][moved.image]
        ours = answers[candidate.backend, candidate.precision][moved.image]
        assert theirs.radiograph is not None  # the engine decoded it in this process
        plain = radiograph_image(theirs.radiograph)
        return Case(
            image=moved.image,
            finding=moved.finding,
            labels=record.labels,
            annotated=len(truths),
            radiograph=picture(_boxed(plain, truths, GROUND_TRUTH), _WIDTH),
            reference=_view(reference, drawn, moved.reference, theirs, moved.finding, truths, spec),
            candidate=_view(candidate, candidate, moved.probability, ours, moved.finding, truths, spec),
        )

    return tuple(
        case(candidate, moved)
        for candidate, moved in chosen
        if all((side.backend, side.precision) in answers for side in (drawn, candidate))
    )


def _apart(moved: Sequence[Moved], records: Mapping[str, NihRecord], count: int) -> list[Moved]:
    """The first `count` that are worth looking at, each of another image that is at hand."""
    first: dict[str, Moved] = {}
    for each in moved:
        visible = abs(each.probability - each.reference) >= VISIBLE
        if visible and each.image in records and records[each.image].path is not None:
            first.setdefault(each.image, each)
    return list(first.values())[:count]


def _path(records: Mapping[str, NihRecord], moved: Moved) -> Path:
    path = records[moved.image].path
    assert path is not None  # see _apart
    return path


def _answers(
    bundle: Bundle, backend: str, precision: str, paths: Mapping[str, Path], track: Track
) -> dict[str, Prediction]:
    predictions = {}
    with Engine.open(bundle, backend=backend, precision=precision) as engine:
        answers = engine.predict(paths.values(), cam=True)
        for image, answer in zip(
            paths, track(answers, f"Drawing cases on {backend} {precision}", len(paths)), strict=True
        ):
            if isinstance(answer, ThoraxrtError):
                raise answer
            predictions[image] = answer
    return predictions


def _view(
    named: Candidate,
    drawn: Candidate,
    probability: float,
    prediction: Prediction,
    finding: str,
    truths: Sequence[Rectangle],
    spec: PreprocessSpec,
) -> View:
    assert prediction.radiograph is not None
    boxes = [box for box in prediction.boxes if box.finding == finding]
    image = heat(prediction.radiograph, prediction, spec, [finding])
    image = _boxed(_boxed(image, truths, GROUND_TRUTH), boxes, _DETECTED)
    return View(
        name=str(named),
        probability=probability,
        reported=any(answer.reported for answer in prediction.findings if answer.finding == finding),
        boxes=len(boxes),
        picture=picture(image, _WIDTH),
        drawn_by=None if named == drawn else str(drawn),
    )


def _boxed(image: Image.Image, boxes: Sequence[Rectangle], colour: tuple[int, int, int]) -> Image.Image:
    for box in boxes:
        draw_box(image, box, colour)
    return image
