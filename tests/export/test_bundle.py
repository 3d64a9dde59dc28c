"""Writing a bundle: what is in it, that it appears whole or not at all, and operating points."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.errors import BundleError, CheckpointError, DatasetError, ImageError, RequestError
from thoraxrt.engine.postprocess import Sigmoid, Softmax
from thoraxrt.engine.preprocess import Exact, PreprocessSpec
from thoraxrt.export import agreement as agreement_module
from thoraxrt.export import source as source_module
from thoraxrt.export.bundle import ExportOptions, export_bundle
from thoraxrt.export.networks import ResNet
from thoraxrt.export.operating_points import operating_points_from_file, youden
from thoraxrt.export.phantoms import write_phantoms
from thoraxrt.export.source import Given

Options = Callable[..., ExportOptions]

TINY = PreprocessSpec(resize=Exact(width=64, height=64))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    safetensors.torch.save_file(ResNet((1, 1), width=8, num_classes=14).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ExportOptions]:
    """Options for the tiny network, checked on two small pictures."""
    folder = tmp_path_factory.mktemp("images")
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64), np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    return partial(ExportOptions, given=Given(preprocess=TINY), images=folder)


def test_a_bundle_holds_what_its_manifest_says(checkpoint: Path, options: Options, tmp_path: Path) -> None:
    bundle = export_bundle(checkpoint, tmp_path / "tiny.bundle", options())
    bundle.verify()
    assert {path.name for path in bundle.path.iterdir()} == {"manifest.json", *bundle.manifest.files}
    assert set(bundle.manifest.checks) == {"fp32", "fp16"}
    assert bundle.manifest.checks["fp32"].max_logit_difference < 1e-4
    assert {point.method for point in bundle.manifest.operating_points} == {"default"}
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.bundle"]  # nothing left beside it


def test_the_same_export_twice_is_the_same_bundle(checkpoint: Path, options: Options, tmp_path: Path) -> None:
    first = export_bundle(checkpoint, tmp_path / "a.bundle", options())
    second = export_bundle(checkpoint, tmp_path / "b.bundle", options())
    assert first.sha256 == second.sha256


def test_replacing_is_asked_for_and_whole(checkpoint: Path, options: Options, tmp_path: Path) -> None:
    out = tmp_path / "tiny.bundle"
    before = export_bundle(checkpoint, out, options(precisions=("fp32",)))
    with pytest.raises(BundleError, match="--replace"):
        export_bundle(checkpoint, out, options())
    assert Bundle.open(out).sha256 == before.sha256
    after = export_bundle(checkpoint, out, options(replace=True))
    assert set(after.manifest.files) == {"model.fp32.onnx", "model.fp16.onnx"}
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.bundle"]


def test_a_folder_that_is_no_bundle_is_never_replaced(checkpoint: Path, options: Options, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(BundleError, match="is no bundle"):
        export_bundle(checkpoint, tmp_path / "thesis", options(replace=True))
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"


def test_a_graph_that_disagrees_with_torch_writes_nothing(
    checkpoint: Path, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = source_module.reference_logits
    monkeypatch.setattr(source_module, "reference_logits", lambda *arguments: real(*arguments) + 1)
    with pytest.raises(CheckpointError, match="differ from the original"):
        export_bundle(checkpoint, tmp_path / "tiny.bundle", options())
    assert list(tmp_path.iterdir()) == []


def test_labels_must_fit_the_network(checkpoint: Path, options: Options, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="14 outputs, these labels are 2"):
        export_bundle(
            checkpoint, tmp_path / "tiny.bundle", options(given=Given(labels=("Mass", "Edema"), preprocess=TINY))
        )


def test_labels_and_activation_are_checked_before_the_work(checkpoint: Path, options: Options, tmp_path: Path) -> None:
    twice = Given(labels=("Mass",) * 14, preprocess=TINY)
    with pytest.raises(RequestError, match="names Mass more than once"):
        export_bundle(checkpoint, tmp_path / "tiny.bundle", options(given=twice))
    torch.manual_seed(0)
    safetensors.torch.save_file(ResNet((1, 1), width=8, num_classes=1).state_dict(), tmp_path / "one.safetensors")
    one = Given(labels=("Mass",), activation=Softmax(), preprocess=TINY)
    with pytest.raises(RequestError, match="softmax for a network of one output"):
        export_bundle(tmp_path / "one.safetensors", tmp_path / "tiny.bundle", options(given=one))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough small pictures to calibrate on."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(40):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64), np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    return folder


def test_where_no_int8_meets_the_bar_there_is_none_and_the_curve_shows_why(
    checkpoint: Path, options: Options, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement_module, "MEAN_ERROR", 0.0)
    bundle = export_bundle(
        checkpoint, tmp_path / "tiny.bundle", options(precisions=("fp32", "int8"), calibrate=pictures)
    )
    calibration = bundle.manifest.calibration
    assert calibration is not None
    assert calibration.quantised == 0
    assert "model.int8.onnx" not in bundle.manifest.files
    assert set(bundle.manifest.checks) == {"fp32"}
    assert bundle.manifest.agreement == {}
    trade_off = json.loads(bundle.read("sensitivity.json"))
    assert not any(step["agreement"]["meets_bar"] for step in trade_off["curve"][:-1])
    assert trade_off["chosen"]["float_layers"] == calibration.layers


def test_ranges_that_overflow_leave_the_old_bundle(
    checkpoint: Path, options: Options, pictures: Path, tmp_path: Path
) -> None:
    int8 = options(precisions=("fp32", "int8"), calibrate=pictures, method="minmax")
    before = export_bundle(checkpoint, tmp_path / "tiny.bundle", int8)
    ranges = json.loads(before.read("ranges.json"))
    ranges["ranges"]["minmax"] = dict.fromkeys(ranges["ranges"]["minmax"], 1e39)  # a float64, no float32
    (tmp_path / "ranges.json").write_text(json.dumps(ranges))
    huge = options(precisions=("fp32", "int8"), calibrate=tmp_path / "ranges.json", replace=True)
    with pytest.raises(DatasetError, match="float32"):
        export_bundle(checkpoint, tmp_path / "tiny.bundle", huge)
    after = Bundle.open(tmp_path / "tiny.bundle")
    after.verify()
    assert after.sha256 == before.sha256


@pytest.mark.parametrize("precisions", [("fp16",), ("fp32", "fp8")])
def test_precisions_that_cannot_be_written(precisions: tuple[str, ...]) -> None:
    with pytest.raises(RequestError, match=r"precision|oracle"):
        ExportOptions(precisions=precisions)


def test_operating_points_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "points.json"
    file.write_text(json.dumps({"Mass": 0.2}))
    mass, edema = operating_points_from_file(file, ["Mass", "Edema"])
    assert (mass.probability, mass.method, mass.data) == (0.2, "file", "points.json")
    assert (edema.probability, edema.method) == (0.5, "default")


@pytest.mark.parametrize("content", ['{"Mass": 2}', '{"Flu": 0.5}', "[]", "{", '{"Mass": "high"}'])
def test_senseless_operating_points(content: str, tmp_path: Path) -> None:
    (tmp_path / "points.json").write_text(content)
    with pytest.raises(DatasetError, match=r"points\.json"):
        operating_points_from_file(tmp_path / "points.json", ["Mass"])


def test_youden_by_hand() -> None:
    logits = np.array([-2.0, -1.0, 0.0, 1.0, 2.0], np.float32)
    positive = np.array([False, False, True, False, True])
    point = youden("Mass", logits, positive, "five images")
    # From 0 up: both positives and one of three negatives, J = 1 + 2/3 - 1, the largest.
    assert (point.sensitivity, point.specificity) == (1.0, pytest.approx(2 / 3))
    assert Sigmoid().threshold(point.probability, 0) == pytest.approx(-0.5)  # midway between 0 and the next lower logit
    assert youden("Mass", logits, np.zeros(5, bool), "no positives").method == "default"
    assert youden("Mass", logits + 50, positive, "certain").method == "default"  # sigmoid(49.5) is 1.0
    assert youden("Mass", logits, ~positive & False | (logits < 0), "inverted").method == "default"


def test_operating_points_from_a_folder_use_its_train_val_images(
    checkpoint: Path, options: Options, tmp_path: Path
) -> None:
    write_phantoms(tmp_path / "phantoms", 16, 3)
    bundle = export_bundle(
        checkpoint, tmp_path / "tiny.bundle", options(operating_points=tmp_path / "phantoms", precisions=("fp32",))
    )
    chosen = [point for point in bundle.manifest.operating_points if point.method == "youden"]
    assert chosen
    count = len((tmp_path / "phantoms" / "train_val_list.txt").read_text().split())
    assert {point.data for point in chosen} == {f"{count} train_val images of phantoms"}


@pytest.mark.parametrize("option", ["images", "operating_points"])
def test_a_file_that_is_no_radiograph_is_named(option: str, checkpoint: Path, options: Options, tmp_path: Path) -> None:
    write_phantoms(tmp_path / "phantoms", 4, 3)
    name = (tmp_path / "phantoms" / "train_val_list.txt").read_text().split()[0]
    (tmp_path / "phantoms" / "images" / name).write_bytes(b"nothing")
    with pytest.raises(ImageError, match=f"{name}: the file is neither PNG"):
        export_bundle(checkpoint, tmp_path / "tiny.bundle", options(**{option: tmp_path / "phantoms"}))
