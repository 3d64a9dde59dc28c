"""`thoraxrt dataset`: what an NIH-layout folder holds, and where that is not what was published.

Owns the counting and how it is drawn; the layout is `thoraxrt.export.nih`'s, the published numbers
`thoraxrt.benchmarks.published`'s.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from thoraxrt.benchmarks.published import DATA_SHEET
from thoraxrt.engine.decode import decode
from thoraxrt.engine.engine import read_image
from thoraxrt.engine.errors import DatasetError, ImageError
from thoraxrt.export import Track, no_progress
from thoraxrt.export.nih import LABELS, SIDE, NihBox, NihDataset, Split, boxes_in, entry_file, image_files

__all__ = [
    "BoxCount",
    "Description",
    "LabelCount",
    "OutsideBox",
    "SplitCount",
    "Spread",
    "Unreadable",
    "describe",
    "rendered",
]


class Spread(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The least, middle, mean and greatest of some numbers."""

    low: int
    median: float
    mean: float
    high: int


class SplitCount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One official list: its images, those at hand, and its patients."""

    split: Split
    images: int
    present: int
    patients: int


class LabelCount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many images are labelled with a finding: in all, in each list, and at hand.

    `published` is the data sheet's number; None where the folder lists another number of images than it.
    """

    finding: str
    images: int
    train_val: int
    test: int
    present: int
    published: int | None


class BoxCount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many boxes a finding has, on how many images, and how many boxes are on images at hand."""

    finding: str
    boxes: int
    images: int
    present: int


class Unreadable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An image at hand that cannot be decoded, and why."""

    image: str
    reason: str


class OutsideBox(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A box that leaves its image, by `pixels` at most."""

    image: str
    finding: str
    pixels: float


class Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an NIH-layout folder holds.

    `entries` names the data entry file; `images` are its rows and `present` those whose file is at hand. `formats`
    counts the decoded ones by kind and size (empty where decoding was skipped, and `unreadable` and `identical` too).
    `age` is by image, in years, `sexes` and `views` count images. `patients_in_both` are in both official lists, which
    none should be. `no_finding` images have no label. `co_occurrence[i][j]` images have labels i and j (in the order of
    `labels`), and on the diagonal label i *alone*, as in the data sheet. `boxes` are those of listed images;
    `boxes_of_unlisted` name images without a row, `boxes_outside` leave their image.

    Duplicates: `listed_twice` have several rows, `in_several_places` several files, and each group of `identical` the
    same bytes. `unlisted` files have no row.
    """

    entries: str
    images: int
    present: int
    formats: dict[str, int]
    unreadable: tuple[Unreadable, ...]
    patients: int
    images_per_patient: Spread
    age: Spread
    sexes: dict[str, int]
    views: dict[str, int]
    splits: tuple[SplitCount, ...]
    patients_in_both: tuple[int, ...]
    no_finding: int
    labels: tuple[LabelCount, ...]
    co_occurrence: tuple[tuple[int, ...], ...]
    boxes: tuple[BoxCount, ...]
    boxes_of_unlisted: tuple[str, ...]
    boxes_outside: tuple[OutsideBox, ...]
    listed_twice: tuple[str, ...]
    in_several_places: tuple[str, ...]
    identical: tuple[tuple[str, ...], ...]
    unlisted: tuple[str, ...]


def describe(folder: str | os.PathLike[str], *, decode_images: bool = True, track: Track = no_progress) -> Description:
    """Read the lists of an NIH-layout folder and, unless told not to, every image at hand, on all cores.

    Raises DatasetError where a list is missing, malformed or at odds with the others, or lists no image.
    """
    root = Path(folder)
    dataset = NihDataset.open(root)
    if not dataset.records:
        raise DatasetError(f"{entry_file(root)} lists no image; expected the file as NIH publishes it: fetch it again")
    present = [record for record in dataset.present() if record.path is not None]
    looks = _looks([record.path for record in present if record.path], track) if decode_images else []
    seen = {look.image: look for look in looks if isinstance(look, _Seen)}
    rows = Counter(record.image for record in dataset)
    files = Counter(image for _, image in image_files(root))
    by_patient = Counter(record.patient for record in dataset)
    boxes = boxes_in(root)
    labels = dataset.label_matrix()  # (N, 14)
    patients = {split: {r.patient for r in dataset.split(split)} for split in _SPLITS}
    return Description(
        entries=entry_file(root).name,
        images=len(dataset),
        present=len(present),
        formats=dict(Counter(look.kind for look in seen.values()).most_common()),
        unreadable=tuple(look for look in looks if isinstance(look, Unreadable)),
        patients=len(by_patient),
        images_per_patient=_spread(by_patient.values()),
        age=_spread(record.age for record in dataset),
        sexes=dict(Counter(record.sex for record in dataset).most_common()),
        views=dict(Counter(record.view for record in dataset).most_common()),
        splits=tuple(
            SplitCount(
                split=split,
                images=len(dataset.split(split)),
                present=len(dataset.split(split).present()),
                patients=len(patients[split]),
            )
            for split in _SPLITS
        ),
        patients_in_both=tuple(sorted(patients["train_val"] & patients["test"])),
        no_finding=int((labels.sum(axis=1) == 0).sum()),
        labels=_label_counts(dataset, labels),
        co_occurrence=_co_occurrence(labels),
        boxes=_box_counts(dataset),
        boxes_of_unlisted=tuple(image for image in boxes if image not in rows),
        boxes_outside=tuple(_outside(boxes, {image: (look.width, look.height) for image, look in seen.items()})),
        listed_twice=tuple(image for image, count in rows.items() if count > 1),
        in_several_places=tuple(sorted(image for image, count in files.items() if count > 1)),
        identical=_identical(seen.values()),
        unlisted=tuple(sorted(image for image in files if image not in rows)),
    )


_SPLITS: Final[tuple[Split, ...]] = ("train_val", "test")


# --- the images ------------------------------------------------------------------------------------------


class _Seen(msgspec.Struct, frozen=True, kw_only=True):
    """A decoded image."""

    image: str
    sha256: bytes
    kind: str
    width: int
    height: int


def _looks(paths: Sequence[Path], track: Track) -> list[_Seen | Unreadable]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        portions = (paths[start : start + 1024] for start in range(0, len(paths), 1024))  # not 112,120 futures at once
        looks = itertools.chain.from_iterable(pool.map(_look, portion) for portion in portions)
        return list(track(looks, "Decoding images", len(paths)))


def _look(path: Path) -> _Seen | Unreadable:
    try:
        data = read_image(path)
        image = decode(data)
    except ImageError as error:
        return Unreadable(image=path.name, reason=str(error))
    return _Seen(
        image=path.name,
        sha256=hashlib.sha256(data).digest(),
        kind=f"{image.source.format} {image.source.photometric}, {image.source.bits} bit, {image.width} x {image.height}",
        width=image.width,
        height=image.height,
    )


def _identical(seen: Iterable[_Seen]) -> tuple[tuple[str, ...], ...]:
    groups = defaultdict(list)
    for look in seen:
        groups[look.sha256].append(look.image)
    return tuple(tuple(sorted(images)) for images in groups.values() if len(images) > 1)


# --- the lists -------------------------------------------------------------------------------------------


def _spread(numbers: Iterable[int]) -> Spread:
    values = np.fromiter(numbers, np.int64)
    return Spread(
        low=int(values.min()), median=float(np.median(values)), mean=float(values.mean()), high=int(values.max())
    )


def _label_counts(dataset: NihDataset, labels: npt.NDArray[np.uint8]) -> tuple[LabelCount, ...]:
    test = np.array([record.split == "test" for record in dataset])
    present = np.array([record.folder is not None for record in dataset])
    whole = len(dataset) == DATA_SHEET.images
    return tuple(
        LabelCount(
            finding=finding,
            images=int(column.sum()),
            train_val=int(column[~test].sum()),
            test=int(column[test].sum()),
            present=int(column[present].sum()),
            published=DATA_SHEET.counts[index] if whole else None,
        )
        for index, (finding, column) in enumerate(zip(LABELS, labels.T.astype(bool), strict=True))
    )


def _co_occurrence(labels: npt.NDArray[np.uint8]) -> tuple[tuple[int, ...], ...]:
    counts = labels.astype(np.int64)
    together = counts.T @ counts  # (14, 14)
    np.fill_diagonal(together, counts[counts.sum(axis=1) == 1].sum(axis=0))
    return tuple(map(tuple, together.tolist()))


def _box_counts(dataset: NihDataset) -> tuple[BoxCount, ...]:
    found = [(box.finding, record) for record in dataset.boxed() for box in record.boxes]
    counts = Counter(finding for finding, _ in found)
    return tuple(
        BoxCount(
            finding=finding,
            boxes=counts[finding],
            images=len({record.image for name, record in found if name == finding}),
            present=sum(name == finding and record.folder is not None for name, record in found),
        )
        for finding in LABELS
        if counts[finding]
    )


def _outside(boxes: Mapping[str, Iterable[NihBox]], sizes: Mapping[str, tuple[int, int]]) -> Iterable[OutsideBox]:
    """The boxes that leave their image, of the published size where it was not decoded."""
    for image, annotated in boxes.items():
        width, height = sizes.get(image, (SIDE, SIDE))
        for box in annotated:
            beyond = max(-box.x, -box.y, box.x + box.width - width, box.y + box.height - height)
            if beyond > 1e-6:  # the list has twelve decimals, and sums of them
                yield OutsideBox(image=image, finding=box.finding, pixels=beyond)


# --- drawn -----------------------------------------------------------------------------------------------

_SHORT: Final = dict(
    zip(
        LABELS,
        ("Atel", "Card", "Effu", "Infi", "Mass", "Nodu", "Pna", "Ptx", "Cons", "Edem", "Emph", "Fibr", "Plth", "Hern"),
        strict=True,
    )
)


def rendered(description: Description) -> RenderableType:
    """The description for a terminal of 80 columns: facts, labels, co-occurrence, boxes, and what is amiss."""
    return Group(
        _facts(description), "", _labels_table(description), "", _matrix(description), "", _boxes_table(description)
    )


def _facts(description: Description) -> Table:
    d = description
    missing = d.images - d.present
    table = Table.grid(padding=(0, 2))
    table.add_row("data entry file", d.entries)
    table.add_row("images", f"{d.images:,} listed, {d.present:,} at hand, {missing:,} missing")
    for kind, count in d.formats.items():
        table.add_row("", f"{count:,} {kind}")
    if not d.formats:
        table.add_row("", "not decoded")
    table.add_row("patients", f"{d.patients:,}, images of each {_range(d.images_per_patient)}")
    table.add_row("age", f"{_range(d.age)} years, by image")
    table.add_row("sex, view", ", ".join(f"{count:,} {name}" for name, count in (d.sexes | d.views).items()))
    for split in d.splits:
        table.add_row(
            split.split, f"{split.images:,} images of {split.patients:,} patients, {split.present:,} images at hand"
        )
    for what, items in _amiss(d).items():
        table.add_row(Text(what, style="red" if items else ""), Text(_some(items)))  # Text: no markup in names
    return table


def _amiss(d: Description) -> dict[str, list[str]]:
    """What should not be, each with what it is of."""
    return {
        "unreadable": [f"{bad.image}: {bad.reason}" for bad in d.unreadable],
        "patients in both lists": [str(patient) for patient in d.patients_in_both],
        "listed twice": list(d.listed_twice),
        "in several places": list(d.in_several_places),
        "identical files": [" = ".join(images) for images in d.identical],
        "files without a row": list(d.unlisted),
        "boxes without a row": list(d.boxes_of_unlisted),
        "boxes beyond the image": [f"{box.image} {box.finding} by {box.pixels:.1f}" for box in d.boxes_outside],
    }


def _some(items: Sequence[str]) -> str:
    if not items:
        return "none"
    return f"{len(items):,}: " + "; ".join(items[:3]) + ("; ..." if len(items) > 3 else "")


def _range(spread: Spread) -> str:
    return f"{spread.low:,} to {spread.high:,} (median {spread.median:g}, mean {spread.mean:.1f})"


def _labels_table(description: Description) -> Table:
    table = Table(
        "finding", "", "images", "published", "differs", "train_val", "test", "at hand", box=None, pad_edge=False
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for label in description.labels:
        table.add_row(
            label.finding,
            _SHORT[label.finding],
            f"{label.images:,}",
            *_published(label.images, label.published),
            *(f"{count:,}" for count in (label.train_val, label.test, label.present)),
        )
    sheet = DATA_SHEET.no_finding if description.images == DATA_SHEET.images else None
    table.add_row("No Finding", "", f"{description.no_finding:,}", *_published(description.no_finding, sheet))
    return table


def _published(count: int, published: int | None) -> tuple[str, Text]:
    """The data sheet's number, and by how much the file at hand differs from it."""
    if published is None:
        return "", Text()
    return f"{published:,}", Text(f"{count - published:+,}" if count != published else "", style="yellow")


def _matrix(description: Description) -> Group:
    """The co-occurrence matrix, redder where it is a larger share of the row's finding."""
    table = Table("", *_SHORT.values(), box=None, padding=(0, 0, 0, 1), pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    published = DATA_SHEET.co_occurrence if description.images == DATA_SHEET.images else description.co_occurrence
    differ = 0
    for row, label in enumerate(description.labels):
        cells = []
        for other, count in enumerate(description.co_occurrence[row]):
            mark = count != published[row][other]
            differ += mark and row <= other
            cell = Text(str(count) if count else ".", style=_shade(count / max(label.images, 1)))
            cells.append(cell)
            if mark:
                cell.stylize("underline")
        table.add_row(_SHORT[label.finding], *cells)
    notes = ["Images with both, on the diagonal with that alone; red where much of the row's."]
    if differ:
        notes.append(f"{differ} of 105 differ from the data sheet (underlined).")
    return Group(table, *(Text(note, style="dim") for note in notes))


def _shade(share: float) -> str:
    """Redder from a twentieth of the row's finding to half of it; black on it, to be read on any terminal."""
    if share < 0.05:
        return ""
    rest = 235 - round(150 * min(1.0, share / 0.5))
    return f"black on rgb(255,{rest},{rest})"


def _boxes_table(description: Description) -> RenderableType:
    if not description.boxes:
        return "no boxes"
    table = Table("finding", "boxes", "images", "boxes at hand", "of missing images", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for count in description.boxes:
        numbers = (count.boxes, count.images, count.present, count.boxes - count.present)
        table.add_row(count.finding, *map(str, numbers))
    total, present = (sum(getattr(count, name) for count in description.boxes) for name in ("boxes", "present"))
    table.add_row("all", str(total), "", str(present), str(total - present), style="bold")
    return table
