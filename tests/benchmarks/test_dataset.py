"""What a folder holds, on phantoms whole and damaged, against counting slowly, and on the real lists."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
from rich.console import Console

from thoraxrt.benchmarks.dataset import Description, OutsideBox, describe, rendered
from thoraxrt.benchmarks.published import DATA_SHEET
from thoraxrt.engine.errors import DatasetError
from thoraxrt.export.nih import LABELS
from thoraxrt.export.phantoms import write_phantoms

_T = TypeVar("_T")

COUNT = 8
"""Phantoms of four patients with 1, 3, 2 and 2 images; the fourth patient is in the test list."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "nih"
    write_phantoms(folder, COUNT, seed=3)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "nih"))


def drawn(description: Description) -> str:
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(rendered(description))
    return capture.get()


def amiss(description: Description) -> set[str]:
    """The fields that say what should not be, where they say something."""
    names = ("unreadable", "patients_in_both", "listed_twice", "in_several_places", "identical", "unlisted")
    return {name for name in (*names, "boxes_of_unlisted", "boxes_outside") if getattr(description, name)}


def append(file: Path, line: str) -> None:
    file.write_text(file.read_text().rstrip("\n") + "\n" + line + "\n")


def test_a_whole_folder(whole: Path) -> None:
    description = describe(whole)
    assert (description.entries, description.images, description.present) == ("Data_Entry_2017.csv", COUNT, COUNT)
    assert description.formats == {"png gray, 8 bit, 1024 x 1024": COUNT}
    assert (description.patients, description.images_per_patient.low, description.images_per_patient.high) == (4, 1, 3)
    assert (description.images_per_patient.median, description.images_per_patient.mean) == (2, 2)
    assert [(s.split, s.images, s.present, s.patients) for s in description.splits] == [
        ("train_val", 6, 6, 3),
        ("test", 2, 2, 1),
    ]
    assert sum(description.sexes.values()) == description.views["PA"] == COUNT
    assert all(label.published is None for label in description.labels)  # it is another data set
    assert amiss(description) == set()


def test_counts_are_those_of_counting_slowly(whole: Path) -> None:
    description = describe(whole, decode_images=False)
    with (whole / "Data_Entry_2017.csv").open(newline="") as file:
        labels = {row["Image Index"]: set(row["Finding Labels"].split("|")) for row in csv.DictReader(file)}
    with (whole / "BBox_List_2017.csv").open(newline="") as file:
        boxes = [(row[0], row[1]) for row in list(csv.reader(file))[1:]]
    test = set((whole / "test_list.txt").read_text().split())
    assert description.no_finding == sum(found == {"No Finding"} for found in labels.values()) > 0
    for i, count in enumerate(description.labels):
        having = {image for image, found in labels.items() if count.finding in found}
        assert (count.finding, count.images, count.present) == (LABELS[i], len(having), len(having))
        assert (count.train_val, count.test) == (len(having - test), len(having & test))
        for j, other in enumerate(LABELS):
            wanted = {LABELS[i]} if i == j else {LABELS[i], other}
            together = sum(found == wanted if i == j else found >= wanted for found in labels.values())
            assert description.co_occurrence[i][j] == together
    assert {c.finding: c.boxes for c in description.boxes} == {
        finding: sum(name == finding for _, name in boxes) for finding in {name for _, name in boxes}
    }
    assert all(c.images == len({image for image, name in boxes if name == c.finding}) for c in description.boxes)


def test_everything_amiss_is_named(folder: Path) -> None:
    images = sorted(file.name for file in (folder / "images").iterdir())
    gone, broken, twice, moved, annotated = images[:5]
    (folder / "images" / gone).unlink()
    (folder / "images" / broken).write_bytes((folder / "images" / broken).read_bytes()[:9999])
    (folder / "images_003").mkdir()
    shutil.copy(folder / "images" / twice, folder / "images_003")
    shutil.copy(folder / "images" / images[5], folder / "images" / images[6])
    (folder / "images" / "stray.png").touch()
    entries = folder / "Data_Entry_2017.csv"
    append(entries, next(line for line in entries.read_text().splitlines() if line.startswith(annotated)))
    train_val, test = folder / "train_val_list.txt", folder / "test_list.txt"
    train_val.write_text(train_val.read_text().replace(moved + "\n", ""))
    append(test, moved)
    append(folder / "BBox_List_2017.csv", "99999999_000.png,Mass,1,2,3,4")
    append(folder / "BBox_List_2017.csv", f"{annotated},Infiltrate,1000,2,30.5,4")

    description = describe(folder)
    assert (description.images, description.present) == (COUNT + 1, COUNT)
    (unreadable,) = description.unreadable
    assert unreadable.image == broken
    assert "truncated or corrupt" in unreadable.reason
    assert description.patients_in_both == (int(moved[:8]),)
    assert description.listed_twice == (annotated,)
    assert description.in_several_places == (twice,)
    assert description.identical == ((images[5], images[6]),)
    assert description.unlisted == ("stray.png",)
    assert description.boxes_of_unlisted == ("99999999_000.png",)
    assert description.boxes_outside == (OutsideBox(image=annotated, finding="Infiltration", pixels=6.5),)
    text = drawn(description)
    for named in (broken, moved[3:8], annotated, twice, images[6], "stray.png", "99999999_000.png", "by 6.5"):
        assert named in text


def test_decoding_may_be_skipped(folder: Path) -> None:
    for image in (folder / "images").iterdir():
        image.write_bytes(b"no image")
    skipped, decoded = describe(folder, decode_images=False), describe(folder)
    assert len(decoded.unreadable) == COUNT
    assert msgspec.structs.replace(decoded, unreadable=()) == skipped
    assert "not decoded" in drawn(skipped)


def test_decoding_is_followed(whole: Path) -> None:
    followed: list[tuple[str, int, int]] = []

    def track(items: Iterable[_T], description: str, total: int) -> Iterable[_T]:
        listed = list(items)
        followed.append((description, total, len(listed)))
        return listed

    describe(whole, track=track)
    assert followed == [("Decoding images", COUNT, COUNT)]


def test_the_json_is_the_description(whole: Path) -> None:
    description = describe(whole, decode_images=False)
    assert msgspec.json.decode(msgspec.json.encode(description), type=Description) == description


def test_a_folder_that_is_none_is_one_error(folder: Path) -> None:
    with pytest.raises(DatasetError, match="expected a folder in the NIH layout"):
        describe(folder / "nowhere")
    entries = folder / "Data_Entry_2017.csv"
    entries.write_text(entries.read_text().splitlines()[0] + "\n")
    with pytest.raises(DatasetError, match=r"Data_Entry_2017.csv lists no image; expected"):
        describe(folder)


def test_the_real_lists_beside_what_was_published(nih: Path) -> None:
    description = describe(nih)
    assert (description.images, description.patients, description.present) == (112_120, 30_805, 279)
    assert sum(description.formats.values()) == 279
    assert all(" 1024 x 1024" in kind for kind in description.formats)
    assert amiss(description) == set()
    assert [(s.images, s.patients) for s in description.splits] == [(86_524, 28_008), (25_596, 2_797)]
    assert tuple(label.published for label in description.labels) == DATA_SHEET.counts
    assert sum(count.boxes for count in description.boxes) == 984
    assert sum(count.present for count in description.boxes) == 27
    text = drawn(description)
    assert all(len(line) <= 80 and "…" not in line for line in text.splitlines())
    assert "Pneumonia Pna 1,431 1,353 +78 876 555 29" in " ".join(text.split())
    assert "62 of 105 differ from the data sheet" in text
