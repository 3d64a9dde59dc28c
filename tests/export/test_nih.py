import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from thoraxrt.engine.errors import DatasetError
from thoraxrt.export.nih import LABELS, NihBox, NihDataset, boxes_in, image_files

NIH = Path(__file__).parents[3] / "shared" / "nih"

needs_nih = pytest.mark.skipif(not NIH.is_dir(), reason=f"needs the NIH data in {NIH}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three patients, four images, written as NIH writes them; one image is at hand."""
    (tmp_path / "Data_Entry_2017.csv").write_text(
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
        "00000001_000.png,Hernia|Cardiomegaly,0,1,57,M,PA,2682,2749,0.143,0.143,\n"
        "00000001_001.png,No Finding,1,1,58,M,PA,2682,2749,0.143,0.143,\n"
        "00000002_000.png,Infiltration,0,2,58,F,AP,2682,2749,0.143,0.143,\n"
        "00000003_000.png,Mass,0,3,58,F,AP,2682,2749,0.143,0.143,\n"
    )
    (tmp_path / "BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
        "00000002_000.png,Infiltrate,10.5,20,30,40\n"
        "00000002_000.png,Mass,1,2,3,4,,,\n"
    )
    (tmp_path / "train_val_list.txt").write_text("00000001_000.png\n00000001_001.png\n00000003_000.png")
    (tmp_path / "test_list.txt").write_text("00000002_000.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "00000002_000.png").touch()
    return tmp_path


def edit(folder: Path, name: str, change: Callable[[str], str]) -> None:
    (folder / name).write_text(change((folder / name).read_text()))


def test_records(folder: Path) -> None:
    first, second, third, _ = NihDataset.open(folder)
    assert first.labels == ("Cardiomegaly", "Hernia")  # in CheXNet order, whatever the file's
    assert (second.labels, second.patient, second.split, second.path) == ((), 1, "train_val", None)
    assert (third.patient, third.split, third.path) == (2, "test", folder / "images" / "00000002_000.png")
    assert third.boxes == (
        NihBox(finding="Infiltration", x=10.5, y=20.0, width=30.0, height=40.0),
        NihBox(finding="Mass", x=1.0, y=2.0, width=3.0, height=4.0),
    )


def test_who_and_how(folder: Path) -> None:
    assert [(r.age, r.sex, r.view) for r in NihDataset.open(folder)] == [
        (57, "M", "PA"),
        (58, "M", "PA"),
        (58, "F", "AP"),
        (58, "F", "AP"),
    ]


def test_the_older_file(folder: Path) -> None:
    """Ages with a unit, padded patients, CRLF, a BOM, and a header without the comma at its end."""
    (folder / "Data_Entry_2017.csv").write_bytes(
        b"\xef\xbb\xbfImage Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        b"OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]\r\n"
        b"00000001_000.png,Hernia|Cardiomegaly,000,00000001,058Y,M,PA,2682,2749,0.143,0.143\r\n"
        b"00000001_001.png,No Finding,001,00000001,011M,M,PA,2682,2749,0.143,0.143\r\n"
        b"00000002_000.png,Infiltration,000,00000002,028M,F,AP,2682,2749,0.143,0.143\r\n"
        b"00000003_000.png,Mass,000,00000003,009D,F,AP,2682,2749,0.143,0.143\r\n"
    )
    records = NihDataset.open(folder).records
    assert [record.age for record in records] == [58, 0, 2, 0]
    assert [record.patient for record in records] == [1, 1, 2, 3]
    assert records[0].labels == ("Cardiomegaly", "Hernia")


def test_selections(folder: Path) -> None:
    dataset = NihDataset.open(folder)
    names = {
        "split": [record.image for record in dataset.split("train_val")],
        "present": [record.image for record in dataset.present()],
        "boxed": [record.image for record in dataset.boxed()],
        "both": [record.image for record in dataset.split("train_val").present()],
    }
    assert names == {
        "split": ["00000001_000.png", "00000001_001.png", "00000003_000.png"],
        "present": ["00000002_000.png"],
        "boxed": ["00000002_000.png"],
        "both": [],
    }


def test_label_matrix(folder: Path) -> None:
    matrix = NihDataset.open(folder).label_matrix()
    assert matrix.dtype == np.uint8
    assert matrix.shape == (4, 14)
    assert [[LABELS[c] for c in np.flatnonzero(row)] for row in matrix] == [
        ["Cardiomegaly", "Hernia"],
        [],
        ["Infiltration"],
        ["Mass"],
    ]
    assert NihDataset.open(folder).split("train_val").split("test").label_matrix().shape == (0, 14)


@pytest.mark.parametrize("place", ["", "images", "images_001/images", "images_012/images", "images_001", "images_012"])
def test_where_images_may_be(folder: Path, place: str) -> None:
    file = folder / place / "00000001_000.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    assert NihDataset.open(folder).records[0].path == file


def test_of_an_image_in_two_places_the_first_is_read(folder: Path) -> None:
    (folder / "images_003").mkdir()
    (folder / "images_003" / "00000002_000.png").touch()
    assert [(place.name, name) for place, name in image_files(folder)] == [
        ("images", "00000002_000.png"),
        ("images_003", "00000002_000.png"),
    ]
    assert NihDataset.open(folder).records[2].path == folder / "images" / "00000002_000.png"


def test_boxes_of_images_that_no_list_names_are_still_read(folder: Path) -> None:
    edit(folder, "BBox_List_2017.csv", lambda t: t + "00000009_000.png,Mass,1,2,3,4\n")
    assert set(boxes_in(folder)) == {"00000002_000.png", "00000009_000.png"}
    assert len(NihDataset.open(folder).boxed()) == 1


def test_the_newer_entry_file_is_preferred(folder: Path) -> None:
    text = (folder / "Data_Entry_2017.csv").read_text()
    (folder / "Data_Entry_2017_v2020.csv").write_text("".join(text.splitlines(keepends=True)[:2]))
    assert len(NihDataset.open(folder)) == 1


@pytest.mark.parametrize("name", ["Data_Entry_2017.csv", "train_val_list.txt", "test_list.txt"])
def test_a_missing_list_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(DatasetError, match=rf"{name} cannot be read.*expected a folder in the NIH layout.*check"):
        NihDataset.open(folder)


def test_a_folder_of_ones_own_needs_no_boxes(folder: Path) -> None:
    (folder / "BBox_List_2017.csv").unlink()
    assert len(NihDataset.open(folder)) == 4
    assert not NihDataset.open(folder).boxed()


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="NIH layout"):
        NihDataset.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("Data_Entry_2017.csv", lambda t: t.replace("Patient ID", "Who"), "expected the columns"),
        ("Data_Entry_2017.csv", lambda t: "", "expected the columns"),
        ("Data_Entry_2017.csv", lambda t: t.replace("Hernia", "Measles"), "line 2: not a row"),
        ("Data_Entry_2017.csv", lambda t: t.replace("1,1,58", "1,one,58"), "line 3: not a row"),
        ("Data_Entry_2017.csv", lambda t: t.replace("1,1,58", "1,1,5x"), "line 3: not a row"),
        ("Data_Entry_2017.csv", lambda t: t.replace("58,F", "58,?"), "line 4: not a row"),
        ("Data_Entry_2017.csv", lambda t: t.replace("F,AP", "F,LL"), "line 4: not a row"),
        ("Data_Entry_2017.csv", lambda t: t + "00000004_000.png\n", "line 6: not a row"),
        ("BBox_List_2017.csv", lambda t: t.replace("30,40", "30"), "line 2: not a box"),
        ("BBox_List_2017.csv", lambda t: t.replace("30,40", "0,40"), "line 2: not a box"),
        ("BBox_List_2017.csv", lambda t: t.replace(",Mass", ",Measles"), "line 3: not a box"),
        ("test_list.txt", lambda t: "", "1 images .*00000002_000.png first.* in neither"),
        ("test_list.txt", lambda t: t + "\n00000003_000.png", "lists 00000003_000.png again"),
    ],
)
def test_a_damaged_list_is_named(folder: Path, name: str, change: Callable[[str], str], message: str) -> None:
    edit(folder, name, change)
    with pytest.raises(DatasetError, match=message):
        NihDataset.open(folder)


def test_binary_instead_of_text(folder: Path) -> None:
    (folder / "test_list.txt").write_bytes(b"\xff\xfe\x00\x00")
    with pytest.raises(DatasetError, match="not UTF-8"):
        NihDataset.open(folder)


@needs_nih
def test_the_real_data_set() -> None:
    dataset = NihDataset.open(NIH)
    assert len(dataset) == 112_120
    assert (len(dataset.split("train_val")), len(dataset.split("test"))) == (86_524, 25_596)
    assert len(dataset.present()) == 279
    assert (len(dataset.boxed()), sum(len(record.boxes) for record in dataset)) == (880, 984)
    assert all(record.split == "test" for record in dataset.boxed())
    assert sum(box.finding == "Infiltration" for record in dataset for box in record.boxes) == 123
    assert sum(record.sex == "F" for record in dataset) == 48_780
    assert sum(record.view == "AP" for record in dataset) == 44_810
    assert max(record.age for record in dataset) == 95
    published = (11559, 2776, 13317, 19894, 5782, 6331, 1431, 5302, 4667, 2303, 2516, 1686, 3385, 227)
    assert tuple(dataset.label_matrix().sum(axis=0, dtype=int)) == published


@needs_nih
def test_the_manifest_agrees() -> None:
    with (NIH / "MANIFEST.csv").open(newline="") as stream:
        manifest = {row["image"]: row for row in csv.DictReader(stream)}
    for record in NihDataset.open(NIH).present():
        row = manifest.pop(record.image)
        assert "|".join(sorted(record.labels)) == "|".join(
            sorted(row["finding_labels"].replace("No Finding", "").split("|"))
        )
        assert (str(record.patient), record.split) == (row["patient_id"], row["official_split"])
        assert len(record.boxes) == int(row["nih_boxes"])
    assert not manifest
