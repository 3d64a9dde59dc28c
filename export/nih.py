"""The NIH ChestX-ray14 layout: which images there are, their labels, their boxes and the official split.

Wang et al., ChestX-ray8, CVPR 2017 (arXiv 1705.02315). Reads the lists and finds the images; opens no
image, and needs neither torch nor onnx.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from thoraxrt.engine.errors import DatasetError

__all__ = [
    "LABELS",
    "SIDE",
    "NihBox",
    "NihDataset",
    "NihRecord",
    "Sex",
    "Split",
    "View",
    "boxes_in",
    "entry_file",
    "image_files",
    "is_nih_layout",
]

LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
"""The 14 findings, in the order of CheXNet's outputs (arXiv 1711.05225)."""

SIDE: Final = 1024
"""Height and width of every image in pixels, as published."""

Split = Literal["train_val", "test"]
Sex = Literal["F", "M"]
View = Literal["PA", "AP"]

_ENTRIES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
_BOXES = "BBox_List_2017.csv"
_LISTS: dict[Split, str] = {"train_val": "train_val_list.txt", "test": "test_list.txt"}
_FOLDERS = (
    "images",
    "",
    *(f"images_{number:03d}{within}" for number in range(1, 13) for within in ("/images", "")),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class NihBox:
    """One annotated box: `x, y, width, height` in pixels of the original image, origin at the top left."""

    finding: str
    x: float
    y: float
    width: float
    height: float


class NihRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the data set.

    `folder` is where the image lies, None where it is not at hand; `age` in whole years at the time of the image.
    """

    image: str
    folder: Path | None
    labels: tuple[str, ...]
    patient: int
    age: int
    sex: Sex
    view: View
    split: Split
    boxes: tuple[NihBox, ...]

    @property
    def path(self) -> Path | None:
        """The image's file, None where it is not at hand."""
        return self.folder and self.folder / self.image  # made when asked for: 112,120 paths take a second


@dataclass(frozen=True)
class NihDataset:
    """Records in the order of the data entry file, and ways to choose among them.

    Example: `NihDataset.open("nih").split("test").present()` are the test images at hand.
    """

    folder: Path
    records: tuple[NihRecord, ...]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> NihDataset:
        """Read the lists of `folder` and look for its images.

        Expects `Data_Entry_2017_v2020.csv` (or the older `Data_Entry_2017.csv`), `train_val_list.txt` and
        `test_list.txt`; images where `image_files` looks. Images may be absent, and `BBox_List_2017.csv`: without
        boxes.

        Raises DatasetError where a list is missing, malformed or at odds with the others.
        """
        root = Path(folder)
        splits = _splits(root)
        boxes = boxes_in(root)
        folders: dict[str, Path] = {}
        for place, image in image_files(root):
            folders.setdefault(image, place)
        rows = list(_entries(root))
        unlisted = [image for image, *_ in rows if image not in splits]
        if unlisted:
            raise DatasetError(
                f"{root}: {len(unlisted)} images of the data entry file ({unlisted[0]} first) are in neither "
                f"{' nor '.join(_LISTS.values())}; expected each in one: take the lists of the same release"
            )
        records = tuple(
            NihRecord(
                image=image,
                folder=folders.get(image),
                labels=labels,
                patient=patient,
                age=age,
                sex=sex,
                view=view,
                split=splits[image],
                boxes=boxes.get(image, ()),
            )
            for image, labels, patient, age, sex, view in rows
        )
        return cls(root, records)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[NihRecord]:
        return iter(self.records)

    def split(self, split: Split) -> NihDataset:
        """Only the records of one official list."""
        return self._where(record for record in self.records if record.split == split)

    def present(self) -> NihDataset:
        """Only the records whose image is at hand."""
        return self._where(record for record in self.records if record.folder is not None)

    def boxed(self) -> NihDataset:
        """Only the records with at least one box."""
        return self._where(record for record in self.records if record.boxes)

    def label_matrix(self) -> npt.NDArray[np.uint8]:
        """1 where the image has the label, else 0: uint8 `(N, 14)`, columns in the order of `LABELS`."""
        column = {label: index for index, label in enumerate(LABELS)}
        matrix = np.zeros((len(self.records), len(LABELS)), np.uint8)
        for row, record in enumerate(self.records):
            for label in record.labels:
                matrix[row, column[label]] = 1
        return matrix

    def _where(self, records: Iterable[NihRecord]) -> NihDataset:
        return NihDataset(self.folder, tuple(records))


def is_nih_layout(folder: Path) -> bool:
    """Whether a folder has the data entry file that `NihDataset.open` begins with."""
    return entry_file(folder).is_file()


def entry_file(folder: Path) -> Path:
    """The data entry file that is read: the revision of 2020 where there is one, else the older file, there or not."""
    newer, older = (folder / name for name in _ENTRIES)
    return newer if newer.is_file() else older


def image_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Place and name of every PNG of an NIH-layout folder; of an image in several places the first is the one read.

    Looks in `images/`, in the folder itself, and in `images_001` to `images_012`, with `images/` below and without.
    """
    for name in _FOLDERS:
        place = folder / name
        if place.is_dir():
            yield from ((place, image) for image in os.listdir(place) if image.endswith(".png"))


def boxes_in(folder: Path) -> dict[str, tuple[NihBox, ...]]:
    """The boxes of `BBox_List_2017.csv` by image, in the file's order; its Infiltrate is the labels' Infiltration.

    None where there is no such file. Raises DatasetError where it is malformed.
    """
    file = folder / _BOXES
    if not file.exists():
        return {}
    boxes: dict[str, tuple[NihBox, ...]] = {}
    rows = _rows(file)
    next(rows, None)  # the header: six columns, or nine, for `Bbox [x,y,w,h]` is not quoted
    for number, row in enumerate(rows, 2):
        try:
            boxes[row[0]] = (*boxes.get(row[0], ()), _box(row))
        except (IndexError, ValueError):
            raise DatasetError(
                f"{file}, line {number}: not a box; expected image, finding, x, y, width and height: take the file "
                "as NIH publishes it"
            ) from None
    return boxes


# --- the files -------------------------------------------------------------------------------------------

_COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "Patient Gender", "View Position")
_SEXES: dict[str, Sex] = {"F": "F", "M": "M"}
_VIEWS: dict[str, View] = {"PA": "PA", "AP": "AP"}
_YEAR = {"": 1, "Y": 1, "M": 12, "D": 365}  # how many of the unit make one


def _entries(root: Path) -> Iterator[tuple[str, tuple[str, ...], int, int, Sex, View]]:
    """Image, labels, patient, age, sex and view of each row."""
    file = entry_file(root)
    rows = _rows(file)
    header = next(
        rows, []
    )  # `OriginalImage[Width,Height]` is not quoted: more columns than names, the same in each row
    try:
        image, labels, patient, age, sex, view = map(header.index, _COLUMNS)
    except ValueError:
        raise DatasetError(
            f"{file} begins with {', '.join(header[:4])}; expected the columns {', '.join(_COLUMNS)}: take the file "
            "as NIH publishes it"
        ) from None
    for number, row in enumerate(rows, 2):
        try:
            yield (
                row[image],
                _labels(row[labels]),
                int(row[patient]),
                _age(row[age]),
                _SEXES[row[sex]],
                _VIEWS[row[view]],
            )
        except (LookupError, ValueError):
            raise DatasetError(
                f"{file}, line {number}: not a row of the data set; expected an image, labels of the 14 findings "
                "separated by |, a patient's number, age (58 or 058Y), sex (F, M) and view (PA, AP): take the file as "
                "NIH publishes it"
            ) from None


@cache
def _labels(text: str) -> tuple[str, ...]:
    if text == "No Finding":
        return ()
    return tuple(sorted(text.split("|"), key=LABELS.index))  # ValueError for an unknown one


@cache
def _age(text: str) -> int:
    """Whole years: the newer file says 58, the older one 058Y, and 011M or 013D of infants."""
    number = text.rstrip("YMD")
    return int(number) // _YEAR[text[len(number) :]]


def _box(row: list[str]) -> NihBox:
    finding = "Infiltration" if row[1] == "Infiltrate" else row[1]
    x, y, width, height = map(float, row[2:6])
    if finding not in LABELS or not (width > 0 and height > 0):
        raise ValueError(finding)
    return NihBox(finding=finding, x=x, y=y, width=width, height=height)


def _splits(root: Path) -> dict[str, Split]:
    splits: dict[str, Split] = {}
    for split, name in _LISTS.items():
        images = _text(root / name).split()
        both = next((image for image in images if image in splits), None)
        if both:
            raise DatasetError(
                f"{root / name} lists {both} again; expected each image once in {' or '.join(_LISTS.values())}: "
                "take the lists of the same release"
            )
        splits.update(dict.fromkeys(images, split))
    return splits


def _rows(file: Path) -> Iterator[list[str]]:
    return csv.reader(_text(file).splitlines())


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DatasetError(f"{file} is not UTF-8 text; expected the file as NIH publishes it: fetch it again") from None
    except OSError as error:
        raise DatasetError(
            f"{file} cannot be read ({error.strerror}); expected a folder in the NIH layout, with {_ENTRIES[0]} or "
            f"{_ENTRIES[1]}, {', '.join(_LISTS.values())} and images/: check the path"
        ) from error
