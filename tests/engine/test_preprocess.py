"""Geometry against Pillow itself, against a slow oracle of Pillow's arithmetic, and back to the source."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from thoraxrt.engine.decode import decode
from thoraxrt.engine.errors import ImageLimitError
from thoraxrt.engine.preprocess import Exact, PreprocessSpec, Shorter, network_input

CHEXNET = PreprocessSpec(resize=Shorter(pixels=256), crop=224)


def coefficients(source: int, target: int) -> list[tuple[int, list[int]]]:
    """Pillow's precompute_coeffs and normalize_coeffs_8bpc (Resample.c) for the bilinear filter, one list per target."""
    scale = source / target
    support = max(scale, 1.0)
    taps = []
    for i in range(target):
        center = (i + 0.5) * scale
        low = max(int(center - support + 0.5), 0)
        high = min(int(center + support + 0.5), source)
        weights = [max(1.0 - abs((x - center + 0.5) / support), 0.0) for x in range(low, high)]
        total = sum(weights)
        taps.append((low, [math.floor(0.5 + w / total * (1 << 22)) for w in weights]))
    return taps


def pass_over_rows(pixels: npt.NDArray[np.uint8], target: int) -> npt.NDArray[np.uint8]:
    """One resampling pass along the last axis, with 22-bit integer coefficients and a rounded uint8 result."""
    out = np.empty((pixels.shape[0], target), np.uint8)
    for i, (low, weights) in enumerate(coefficients(pixels.shape[1], target)):
        window = pixels[:, low : low + len(weights)].astype(np.int64)
        out[:, i] = np.clip((window @ np.array(weights) + (1 << 21)) >> 22, 0, 255)
    return out


def slow_network_input(pixels: npt.NDArray[np.uint8], spec: PreprocessSpec) -> npt.NDArray[np.uint8]:
    height, width = pixels.shape
    new_width, new_height = spec.resize.size(width, height)
    resized = pass_over_rows(pass_over_rows(pixels, new_width).T, new_height).T
    size = spec.input_size
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    return resized[top : top + size, left : left + size]


@settings(max_examples=60, deadline=None)
@given(st.integers(64, 400), st.integers(64, 400), st.integers(0, 2**32 - 1))
def test_integer_oracle_agrees_on_random_sizes(width: int, height: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    for spec in (PreprocessSpec(resize=Shorter(pixels=72), crop=64), PreprocessSpec(resize=Exact(width=80, height=80))):
        np.testing.assert_array_equal(network_input(pixels, spec)[0], slow_network_input(pixels, spec))


def test_every_real_radiograph_as_the_training_pipeline_makes_it(nih_images: list[Path]) -> None:
    """torchvision's Resize(256), CenterCrop(224) on Image.open(...).convert('RGB'), as CheXNet's code does."""
    for path in nih_images:
        with Image.open(path) as image:
            trained = image.convert("RGB").resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
        served = network_input(decode(path.read_bytes()).pixels, CHEXNET)
        assert served.shape == (1, 224, 224)
        assert served.dtype == np.uint8
        np.testing.assert_array_equal(np.repeat(served, 3, axis=0), np.asarray(trained).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("width", "height", "resized"),
    [(1024, 1024, (256, 256)), (1841, 1955, (256, 271)), (2500, 2048, (312, 256)), (100, 333, (256, 852))],
)
def test_shorter_side_truncates_as_torchvision_does(width: int, height: int, resized: tuple[int, int]) -> None:
    assert Shorter(pixels=256).size(width, height) == resized


def test_crop_offset_rounds_half_to_even_as_torchvision_does() -> None:
    geometry = CHEXNET.geometry(1841, 1955)  # 256 x 271: (271 - 224) / 2 = 23.5 -> 24
    assert (geometry.left, geometry.top) == (16, 24)
    spec = PreprocessSpec(resize=Shorter(pixels=225), crop=224)  # 0.5 -> 0
    assert spec.geometry(1000, 1000).left == 0


def test_coordinates_map_back_to_the_source() -> None:
    geometry = CHEXNET.geometry(2048, 1024)  # resized 512 x 256, crop at (144, 16)
    assert (geometry.source_x(0), geometry.source_y(0)) == (576.0, 64.0)
    assert (geometry.source_x(224), geometry.source_y(224)) == (1472.0, 960.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([None, 50]), st.integers(0, 2**32 - 1))
def test_the_square_is_cut_from_the_source_before_the_resize(
    width: int, height: int, crop: int | None, seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    side = min(width, height)
    left, top = math.floor(width / 2) - math.floor(side / 2), math.floor(height / 2) - math.floor(side / 2)
    square = Image.fromarray(pixels[top : top + side, left : left + side]).resize((64, 64), Image.Resampling.BILINEAR)
    margin = (64 - (crop or 64)) // 2
    spec = PreprocessSpec(resize=Exact(width=64, height=64), crop=crop, square=True)
    expected = np.asarray(square.crop((margin, margin, 64 - margin, 64 - margin)))
    np.testing.assert_array_equal(network_input(pixels, spec)[0], expected)


def test_an_odd_side_starts_where_torchxrayvision_starts_it() -> None:
    spec = PreprocessSpec(resize=Exact(width=5, height=5), square=True)
    pixels = np.repeat(np.arange(8, dtype=np.uint8)[np.newaxis], 5, axis=0)
    assert network_input(pixels, spec)[0, 0].tolist() == [2, 3, 4, 5, 6]  # 8 // 2 - 5 // 2, not (8 - 5) // 2


def test_coordinates_of_a_square_map_back_to_the_whole_source() -> None:
    spec = PreprocessSpec(resize=Exact(width=256, height=256), crop=224, square=True)
    geometry = spec.geometry(2048, 1024)  # a square at (512, 0), 4 source pixels each, crop at (16, 16)
    assert (geometry.source_x(0), geometry.source_y(0)) == (576.0, 64.0)
    assert (geometry.source_x(224), geometry.source_y(224)) == (1472.0, 960.0)
    assert spec.geometry(1024, 2048).source_y(0) == 576.0


@pytest.mark.parametrize(("x", "y"), [(600, 40), (900, 500), (1450, 980)])
def test_what_the_network_sees_maps_back_to_where_it_is(x: int, y: int) -> None:
    """A bright spot planted in the source is found there through the square, the resize and the map back."""
    pixels = np.zeros((1024, 2048), np.uint8)
    pixels[y - 8 : y + 8, x - 8 : x + 8] = 255
    spec = PreprocessSpec(resize=Exact(width=256, height=256), square=True)
    row, column = np.unravel_index(np.argmax(network_input(pixels, spec)[0]), (256, 256))
    geometry = spec.geometry(2048, 1024)
    assert geometry.source_x(float(column) + 0.5) == pytest.approx(x, abs=8)
    assert geometry.source_y(float(row) + 0.5) == pytest.approx(y, abs=8)


def test_slivers_are_refused() -> None:
    with pytest.raises(ImageLimitError, match=r"40 x 90000"):
        CHEXNET.geometry(40, 90000)


@pytest.mark.parametrize(
    ("resize", "crop", "complaint"),
    [
        (Shorter(pixels=256), None, "without a crop"),
        (Shorter(pixels=200), 224, "centre crop of 224"),
        (Exact(width=256, height=200), 224, "centre crop of 224"),
        (Exact(width=256, height=224), None, "without a crop"),
    ],
)
def test_specs_that_give_no_square_are_refused(resize: Exact | Shorter, crop: int | None, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        PreprocessSpec(resize=resize, crop=crop)
