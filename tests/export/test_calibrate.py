"""Which radiographs serve what, exact histograms, the four rules for a range, and going on after an interruption."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from thoraxrt.engine.errors import CheckpointError, DatasetError, ImageError
from thoraxrt.engine.preprocess import Exact, PreprocessSpec
from thoraxrt.export import calibrate
from thoraxrt.export.calibrate import (
    BINS,
    METHODS,
    Histogram,
    Method,
    Part,
    histograms,
    parts_from_path,
    range_from_histogram,
)
from thoraxrt.export.phantoms import write_phantoms

TINY = PreprocessSpec(resize=Exact(width=8, height=8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 small pictures, one of them twice under another name."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(40):
        pixels = np.random.default_rng(number % 39).integers(0, 256, (32, 32), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


# --- parts -----------------------------------------------------------------------------------------


def test_no_content_is_in_two_parts_and_the_same_folder_makes_the_same_parts(folder: Path) -> None:
    parts = parts_from_path(folder)
    hashes = [sample.sha256 for part in (parts.calibrate, parts.select, parts.judge) for sample in part.samples]
    assert len(hashes) == len(set(hashes)) == 39
    assert len(parts.calibrate) > len(parts.select) > 5
    assert parts_from_path(folder) == parts
    assert parts.judge.positive(("Mass",)) is None  # nothing is known of plain pictures


def test_a_list_makes_the_parts_of_its_folder(folder: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    (folder / "list.txt").write_text("\n".join(names) + "\n\n")
    try:
        assert parts_from_path(folder / "list.txt") == parts_from_path(folder)
    finally:
        (folder / "list.txt").unlink()


def test_nih_parts_keep_patients_apart_and_the_test_images_for_the_judge(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "phantoms", 64, 3)
    parts = parts_from_path(tmp_path / "phantoms")
    patients = [
        {sample.path.name[:8] for sample in part.samples} for part in (parts.calibrate, parts.select, parts.judge)
    ]
    assert all(patients)
    assert patients[0].isdisjoint(patients[1])
    tests = set((tmp_path / "phantoms" / "test_list.txt").read_text().split())
    assert {sample.path.name for sample in parts.judge.samples} == tests
    positive = parts.judge.positive(("Cardiomegaly", "Nodule", "Flu"))
    assert positive is not None
    assert positive.shape == (len(tests), 3)
    assert not positive[:, 2].any()


def test_real_radiographs_are_parted_as_the_issue_says(nih: Path) -> None:
    parts = parts_from_path(nih)
    assert len(parts.calibrate) + len(parts.select) == 203
    assert 118 <= len(parts.calibrate) <= 126
    assert len(parts.judge) == 76


@pytest.mark.parametrize("count", [0, 1, 12])
def test_too_few_images_are_refused(count: int, tmp_path: Path) -> None:
    for number in range(count):
        Image.new("L", (32, 32), number).save(tmp_path / f"{number}.png")
    with pytest.raises(DatasetError, match="to judge: INT8 needs"):
        parts_from_path(tmp_path)


def test_plain_folders_keep_the_patients_of_nih_names_together(tmp_path: Path) -> None:
    for number in range(60):
        Image.new("L", (32, 32), number).save(tmp_path / f"{number // 3:08d}_{number % 3:03d}.png")
    parts = parts_from_path(tmp_path)
    patients = [{s.path.name[:8] for s in part.samples} for part in (parts.calibrate, parts.select, parts.judge)]
    assert patients[0].isdisjoint(patients[1] | patients[2])
    assert patients[1].isdisjoint(patients[2])


def test_lists_that_are_none_are_refused_without_their_bytes(folder: Path, tmp_path: Path) -> None:
    for image in sorted(folder.iterdir())[:8]:
        with pytest.raises(DatasetError, match=r"is no text") as refusal:
            parts_from_path(image)
        assert str(refusal.value).isascii()
    (tmp_path / "list.txt").write_text("missing.png\n" * 40)
    with pytest.raises(DatasetError, match=r"missing\.png, named by .*list\.txt"):
        parts_from_path(tmp_path / "list.txt")


def test_a_bundle_is_no_folder_of_radiographs(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"ranges\.json"):
        parts_from_path(tmp_path)


def test_a_path_that_is_not_there_and_a_file_that_is_no_radiograph_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nowhere"):
        parts_from_path(tmp_path / "nowhere")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    sample = calibrate.Sample(path=tmp_path / "bad.png", sha256="", labels=None)
    with pytest.raises(ImageError, match=r"bad\.png"):
        list(Part((sample,)).inputs(TINY))


# --- histograms ------------------------------------------------------------------------------------

Values = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=1, max_dims=2), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(Values, min_size=1, max_size=5))
def test_merging_in_any_order_equals_counting_at_once(arrays: list[npt.NDArray[np.float32]]) -> None:
    once = Histogram.of(np.concatenate([array.ravel() for array in arrays]))
    for order in (arrays, arrays[::-1]):
        merged = Histogram.of(order[0])
        for array in order[1:]:
            merged = merged.merged(Histogram.of(array))
        assert (merged.limit, merged.largest) == (once.limit, once.largest)
        np.testing.assert_array_equal(merged.counts, once.counts)
    bins = np.floor(np.abs(np.concatenate([a.ravel() for a in arrays]).astype(np.float64)) / once.limit * BINS)
    np.testing.assert_array_equal(once.counts, np.bincount(bins.astype(int), minlength=BINS))


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        Histogram.of(np.array([1, np.nan], np.float32))


# --- ranges ----------------------------------------------------------------------------------------


def quantisation_error(values: npt.NDArray[np.float32], top: float) -> float:
    """The slow, obvious oracle: quantise every value."""
    scale = top / 127
    return float(np.mean((np.clip(np.rint(values / scale), -127, 127) * scale - values) ** 2))


def test_the_rules_on_a_long_tail() -> None:
    values = np.random.default_rng(1).exponential(1.0, 400_000).astype(np.float32)
    values[0] = 60.0  # far out
    ranges = {method: range_from_histogram(Histogram.of(values), method) for method in METHODS}
    assert ranges["minmax"] == 60.0
    assert ranges["percentile"] == pytest.approx(np.quantile(values, 0.99999), rel=0.02)
    assert 0 < ranges["entropy"] < 60
    best = min(quantisation_error(values, top) for top in np.linspace(1, 60, 500))
    assert quantisation_error(values, ranges["mse"]) < 1.05 * best


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_of_zeros_and_one_of_equal_values_have_a_range(method: Method) -> None:
    assert range_from_histogram(Histogram.of(np.zeros(9, np.float32)), method) > 0
    assert range_from_histogram(Histogram.of(np.full(9, 3.0, np.float32)), method) > 0


# --- streaming -------------------------------------------------------------------------------------


def doubling() -> onnx.ModelProto:
    """`twice` is the image times two."""
    nodes = [
        onnx.helper.make_node("Cast", ["image"], ["x"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Add", ["x", "x"], ["twice"]),
        onnx.helper.make_node("Neg", ["twice"], ["logits"]),
    ]
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, ["N", 1, 8, 8])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["N", 1, 8, 8])
    graph = onnx.helper.make_graph(nodes, "doubling", [image], [logits])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)


def test_an_interrupted_calibration_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    part = Part(parts_from_path(folder).calibrate.samples + parts_from_path(folder).select.samples)
    expected = histograms(doubling(), ["twice"], part, TINY, tmp_path)["twice"]
    values = np.concatenate([2 * image.astype(np.float32) for image in part.inputs(TINY)])
    np.testing.assert_array_equal(expected.counts, Histogram.of(values).counts)

    class KilledError(Exception):
        pass

    def killed_after_20(items, description, total):  # type: ignore[no-untyped-def]
        for number, item in enumerate(items):
            if number == 20:
                raise KilledError
            yield item

    with pytest.raises(KilledError):
        histograms(doubling(), ["twice"], part, TINY, tmp_path, killed_after_20)
    asked = []

    def watched(items, description, total):  # type: ignore[no-untyped-def]
        asked.append(total)
        yield from items

    other = PreprocessSpec(resize=Exact(width=8, height=16), crop=8)
    histograms(doubling(), ["twice"], part, other, tmp_path, watched)  # another geometry begins anew
    resumed = histograms(doubling(), ["twice"], part, TINY, tmp_path, watched)["twice"]
    assert asked == [len(part), len(part) - 16]  # saved every 16
    np.testing.assert_array_equal(resumed.counts, expected.counts)
    assert (resumed.limit, resumed.largest) == (expected.limit, expected.largest)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_state_is_counted_anew(data: st.DataObject, folder: Path, tmp_path: Path) -> None:
    part = Part(parts_from_path(folder).calibrate.samples[:18])

    def killed(items, description, total):  # type: ignore[no-untyped-def]
        yield from itertools.islice(items, 17)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        histograms(doubling(), ["twice"], part, TINY, tmp_path, killed)
    (state,) = tmp_path.iterdir()
    saved = bytearray(state.read_bytes())
    if data.draw(st.booleans()):
        saved[data.draw(st.integers(0, len(saved) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del saved[data.draw(st.integers(0, len(saved) - 1)) :]
    state.write_bytes(saved)
    result = histograms(doubling(), ["twice"], part, TINY, tmp_path)["twice"]
    assert result.counts.sum() == 64 * len(part)


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DatasetError, match="THORAXRT_CACHE"):
        histograms(doubling(), ["twice"], parts_from_path(folder).calibrate, TINY, tmp_path / "file" / "calibration")
