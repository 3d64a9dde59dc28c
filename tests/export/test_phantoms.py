from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from thoraxrt.engine.errors import DatasetError
from thoraxrt.export.nih import LABELS, NihBox, NihDataset
from thoraxrt.export.phantoms import PLANTED, SIDE, Phantom, phantom, write_phantoms

SEED = 4
T = TypeVar("T")


@pytest.fixture(scope="module")
def series() -> list[Phantom]:
    return [phantom(SEED, index) for index in range(32)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "nih"
    write_phantoms(folder, 20, SEED)
    return folder


def covered(boxes: tuple[NihBox, ...], margin: int) -> npt.NDArray[np.bool_]:
    """Whether each pixel lies in a box, or within `margin` pixels of one: bool `(SIDE, SIDE)`."""
    inside = np.zeros((SIDE, SIDE), bool)
    for box in boxes:
        x, y = int(box.x), int(box.y)
        rows = slice(max(0, y - margin), y + int(box.height) + margin)
        inside[rows, max(0, x - margin) : x + int(box.width) + margin] = True
    return inside


def test_a_phantom_depends_on_its_seed_and_index_only(series: list[Phantom]) -> None:
    again = phantom(SEED, 5)
    assert np.array_equal(again.pixels, series[5].pixels)
    assert (again.findings, again.boxes, again.name) == (series[5].findings, series[5].boxes, series[5].name)
    assert not np.array_equal(phantom(SEED + 1, 5).pixels, again.pixels)
    assert not np.array_equal(series[4].pixels, again.pixels)


def test_pixels_look_like_an_exposure(series: list[Phantom]) -> None:
    for made in series:
        assert made.pixels.shape == (1024, 1024)
        assert made.pixels.dtype == np.uint8
        lung = made.pixels[400:520, 230:360].mean()
        abdomen = made.pixels[900:960, 400:600].mean()
        assert abdomen > lung + 20
        assert (made.pixels == 255).mean() < 0.05
        assert made.pixels.std() > 30


def test_findings_and_boxes_tell_the_same(series: list[Phantom]) -> None:
    for made in series:
        assert {box.finding for box in made.boxes} == set(made.findings)
        assert list(made.findings) == [label for label in LABELS if label in made.findings]
        for box in made.boxes:
            assert 0 <= box.x < box.x + box.width <= SIDE
            assert 0 <= box.y < box.y + box.height <= SIDE


def test_every_planted_finding_and_normals_occur() -> None:
    names = [phantom(SEED, index).findings for index in range(60)]
    assert {name for findings in names for name in findings} == set(PLANTED)
    assert set(PLANTED) < set(LABELS)
    assert 0.25 < sum(not findings for findings in names) / len(names) < 0.55


def test_boxes_cover_what_the_findings_change(series: list[Phantom]) -> None:
    """The same patient without findings differs inside the boxes, and next to nowhere else."""
    sick = [index for index, made in enumerate(series) if made.findings][:10]
    for index in sick:
        healthy = phantom(SEED, index, planted=False)
        assert not healthy.findings
        assert not healthy.boxes
        change = np.abs(series[index].pixels.astype(int) - healthy.pixels)
        visible = cv2.blur(change.astype(np.float32), (7, 7)) > 9
        inside = covered(series[index].boxes, margin=6)
        assert (visible & ~inside).sum() < 0.04 * visible.sum(), series[index].name
        for box in series[index].boxes:
            window = covered((box,), margin=0)
            assert change[window].max() > 12, (series[index].name, box)
            rows, columns = np.nonzero(visible & window)
            assert np.ptp(rows) > 0.6 * box.height, (series[index].name, box)
            assert np.ptp(columns) > 0.6 * box.width, (series[index].name, box)


def test_a_normal_phantom_is_the_same_without_planting(series: list[Phantom]) -> None:
    index = next(index for index, made in enumerate(series) if not made.findings)
    assert np.array_equal(phantom(SEED, index, planted=False).pixels, series[index].pixels)


def test_patients_have_follow_ups(series: list[Phantom]) -> None:
    names = [made.name for made in series[:9]]
    assert names == [
        *("00000001_000.png", "00000002_000.png", "00000002_001.png", "00000002_002.png", "00000003_000.png"),
        *("00000003_001.png", "00000004_000.png", "00000004_001.png", "00000005_000.png"),
    ]
    assert (series[1].sex, series[1].age + 2) == (series[3].sex, series[3].age)


def test_the_folder_reads_as_a_data_set(written: Path, series: list[Phantom]) -> None:
    dataset = NihDataset.open(written)
    assert len(dataset.present()) == len(dataset) == 20
    for record, made in zip(dataset, series, strict=False):
        assert record.path is not None
        assert (record.image, record.labels, record.patient) == (made.name, made.findings, made.patient)
        assert record.boxes == made.boxes
    first = dataset.records[0].path
    assert first is not None
    assert np.array_equal(cv2.imread(str(first), cv2.IMREAD_UNCHANGED), series[0].pixels)


def test_patients_do_not_cross_the_split(written: Path) -> None:
    dataset = NihDataset.open(written)
    train, test = ({record.patient for record in dataset.split(split)} for split in ("train_val", "test"))
    assert train
    assert test
    assert not train & test


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(DatasetError, match="not an empty folder"):
        write_phantoms(tmp_path, 1, SEED)
    with pytest.raises(DatasetError, match="not an empty folder"):
        write_phantoms(tmp_path / "thesis.txt", 1, SEED)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_is_cut_short_leaves_nothing(tmp_path: Path) -> None:
    def pull_the_plug(items: Iterable[T], description: str, total: int) -> Iterator[T]:
        yield next(iter(items))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_phantoms(tmp_path / "new" / "cut", 2, SEED, pull_the_plug)
    assert list((tmp_path / "new").iterdir()) == []


def test_no_phantoms_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        write_phantoms(tmp_path / "none", 0, SEED)
