"""The reference that shares no code with ours agrees with it in every bit, and would say so if it did not."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from thoraxrt.benchmarks.preprocessing import dicom_pairs, preprocessing_parity, torchvision_input
from thoraxrt.engine.errors import DatasetError, ImageError
from thoraxrt.engine.preprocess import Exact, PreprocessSpec, Shorter

CHEXNET = PreprocessSpec(resize=Shorter(pixels=256), crop=224)
T = TypeVar("T")

SPECS = (
    CHEXNET,
    PreprocessSpec(resize=Shorter(pixels=97), crop=64),
    PreprocessSpec(resize=Exact(width=224, height=224)),
    PreprocessSpec(square=True, resize=Exact(width=96, height=96)),
)


def image(path: Path, width: int, height: int, mode: str = "L") -> Path:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.mark.parametrize("spec", SPECS)
def test_every_size_and_mode_is_the_same_in_every_bit(spec: PreprocessSpec, tmp_path: Path) -> None:
    sizes = ((256, 256), (301, 299), (257, 400), (400, 257), (1024, 999), (130, 111))
    paths = [image(tmp_path / f"{width}-{height}.png", width, height) for width, height in sizes]
    paths += [image(tmp_path / f"{mode}.png", 300, 280, mode) for mode in ("RGB", "RGBA", "LA")]
    found = preprocessing_parity(paths, spec)
    assert found is not None
    assert (found.images, found.identical, found.max_difference, found.different) == (len(paths), len(paths), 0, ())


def test_a_difference_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV-like sampling without antialiasing in place of Pillow's."""
    paths = [image(tmp_path / f"{size}.png", size, size) for size in (500, 64)]
    spec = PreprocessSpec(resize=Exact(width=64, height=64))
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, _, **__: resize(self, size, Image.Resampling.NEAREST))
    expected = [torchvision_input(path, spec) for path in paths]
    monkeypatch.undo()
    monkeypatch.setattr(
        "thoraxrt.benchmarks.preprocessing.torchvision_input", lambda path, _: expected[paths.index(path)]
    )
    found = preprocessing_parity(paths, spec)
    assert found is not None
    assert (found.images, found.identical, found.different) == (2, 1, ("500.png",))
    assert found.max_difference > 20


def test_what_pillow_would_clip_is_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((300, 300), 40_000, np.uint16)).save(path)
    assert torchvision_input(path, CHEXNET) is None
    assert preprocessing_parity([path], CHEXNET) is None


def test_at_most_512_are_compared_spread_evenly(tmp_path: Path) -> None:
    first = image(tmp_path / "0000.png", 64, 64)
    paths = [first, *(shutil.copy(first, tmp_path / f"{index:04d}.png") for index in range(1, 600))]
    asked: list[object] = []

    def track(items: Iterable[T], description: str, total: int) -> Iterable[T]:
        asked.extend(kept := list(items))
        return kept

    found = preprocessing_parity(paths, PreprocessSpec(resize=Exact(width=64, height=64)), track)
    assert found is not None
    assert (found.images, found.identical) == (512, 512)
    assert (asked[0], asked[-1]) == (paths[0], paths[-1])


def write_dicom(path: Path, pixels: np.ndarray[tuple[int, int], np.dtype[np.uint8]]) -> None:
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset.SOPInstanceUID = generate_uid()
    dataset.Modality = "DX"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelData = pixels.tobytes()
    dataset.save_as(path, enforce_file_format=True)


def test_dicom_is_compared_with_the_image_that_its_name_names(tmp_path: Path) -> None:
    png = image(tmp_path / "00000002_000.png", 300, 280)
    pixels = np.asarray(Image.open(png)).copy()
    write_dicom(tmp_path / "a_00000002_000_same.dcm", pixels)
    pixels[0, 0] ^= 16
    write_dicom(tmp_path / "b_00000002_000_changed.dcm", pixels)
    write_dicom(tmp_path / "c_00000002_000_smaller.dcm", pixels[:270])
    write_dicom(tmp_path / "00000009_000.dcm", pixels)
    same, changed, smaller = dicom_pairs(tmp_path, {png.name: png}, PreprocessSpec(resize=Exact(width=64, height=64)))
    assert (same.image, same.pixels_difference, same.input_difference) == (png.name, 0, 0)
    assert changed.pixels_difference == 16
    (broken := tmp_path / "d_00000002_000_broken.dcm").write_bytes(b"nothing")
    with pytest.raises(ImageError, match=f"{broken}: "):
        dicom_pairs(tmp_path, {png.name: png}, PreprocessSpec(resize=Exact(width=64, height=64)))
    assert smaller.pixels_difference is None
    assert smaller.input_difference > 0
    with pytest.raises(DatasetError, match="names an image at hand"):
        dicom_pairs(tmp_path, {}, CHEXNET)
