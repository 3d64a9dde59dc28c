"""The skew against each training pipeline, written out here with the library that it used."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import skimage.transform
import torch
from PIL import Image
from torch import nn

from thoraxrt.engine.bundle import Bundle, Manifest
from thoraxrt.engine.errors import DatasetError, RequestError
from thoraxrt.engine.postprocess import Activation, Sigmoid, SigmoidOpNorm, Softmax
from thoraxrt.engine.preprocess import Exact, PreprocessSpec, Shorter
from thoraxrt.export.skew import TrainedWith, measure_skew, trained_inputs

Pixels = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]

SQUARE = PreprocessSpec(resize=Exact(width=48, height=48), square=True)
OP_NORM = SigmoidOpNorm(thresholds=(0.1, 0.6, 0.3))


@pytest.fixture
def network() -> nn.Module:
    """Three findings from pixels in -1024..1024, sensitive to fine detail."""
    torch.manual_seed(5)
    layers = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    layers[0].weight.data /= 128
    return layers.eval()


@pytest.fixture
def reference(network: nn.Module) -> Callable[[npt.NDArray[np.float32]], Logits]:
    def logits(images: npt.NDArray[np.float32]) -> Logits:
        assert images.dtype == np.float32
        with torch.inference_mode():
            return np.asarray(network((torch.tensor(images) / 255 * 2 - 1) * 1024))

    return logits


@pytest.fixture
def images() -> list[Pixels]:
    """Noise over a gradient, of several sizes: no two resizers agree on it."""
    rng = np.random.default_rng(3)
    sizes = [(97, 130), (130, 97), (64, 64), (111, 200)]
    return [
        (np.linspace(0, 155, h * w).reshape(h, w) + rng.integers(0, 100, (h, w))).astype(np.uint8) for h, w in sizes
    ]


def probabilities(logits: npt.NDArray[np.float64], activation: Activation) -> npt.NDArray[np.float64]:
    if isinstance(activation, Softmax):
        return np.asarray(np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True))
    s = 1 / (1 + np.exp(-logits))
    if isinstance(activation, SigmoidOpNorm):
        return np.stack([np.interp(s[..., i], [0, t, 1], [0, 0.5, 1]) for i, t in enumerate(activation.thresholds)], -1)
    return np.asarray(s)


@pytest.mark.parametrize("activation", [Sigmoid(), OP_NORM, Softmax()])
@pytest.mark.parametrize("trained_with", ["skimage", "opencv-area", "opencv-linear"])
def test_a_resize_in_torchxrayvisions_range(
    trained_with: TrainedWith,
    activation: Activation,
    network: nn.Module,
    reference: Callable[[npt.NDArray[np.float32]], Logits],
    images: list[Pixels],
) -> None:
    """TorchXRayVision's steps: scale to -1024..1024, cut the square, resize, and straight into the network."""
    skew = measure_skew(reference, images, "noise", spec=SQUARE, trained_with=trained_with, activation=activation)
    trained, served = [], []
    for pixels in images:
        height, width = pixels.shape
        side = min(pixels.shape)
        top, left = height // 2 - side // 2, width // 2 - side // 2
        cut = pixels[top : top + side, left : left + side]
        scaled = ((2 * (cut.astype(np.float32) / 255)) - 1.0) * 1024
        if trained_with == "skimage":
            small = skimage.transform.resize(scaled[None], (1, 48, 48), mode="constant", preserve_range=True)[0]
        else:
            flag = cv2.INTER_AREA if trained_with == "opencv-area" else cv2.INTER_LINEAR
            small = cv2.resize(scaled, (48, 48), interpolation=flag)
        ours = np.asarray(Image.fromarray(cut).resize((48, 48), Image.Resampling.BILINEAR), np.float32)
        for made, logits in ((small, trained), ((ours / 255 * 2 - 1) * 1024, served)):
            with torch.inference_mode():
                logits.append(network(torch.tensor(np.asarray(made, np.float32))[None, None]).double().numpy()[0])
    difference = np.abs(probabilities(np.array(trained), activation) - probabilities(np.array(served), activation))
    assert difference.max() > 1e-4  # the resizers differ, so agreement means something
    assert skew.mean_probability_difference == pytest.approx(difference.mean(), abs=1e-6)
    assert skew.max_probability_difference == pytest.approx(difference.max(), abs=1e-6)
    if not isinstance(activation, Softmax):
        assert skew.max_logit_difference == pytest.approx(np.abs(np.subtract(trained, served)).max(), abs=1e-5)
    assert (skew.trained_with, skew.images, skew.data) == (trained_with, 4, "noise")


@pytest.mark.parametrize("trained_with", ["skimage", "opencv-area", "opencv-linear"])
def test_without_a_resize_there_is_no_skew(
    trained_with: TrainedWith, reference: Callable[[npt.NDArray[np.float32]], Logits], images: list[Pixels]
) -> None:
    spec = PreprocessSpec(resize=Exact(width=64, height=64))
    skew = measure_skew(reference, [images[2]], "one", spec=spec, trained_with=trained_with, activation=Sigmoid())
    assert skew.max_logit_difference < 1e-5


def test_a_crop_follows_training_s_resize(images: list[Pixels]) -> None:
    whole = trained_inputs(images[0], SQUARE, "skimage")
    cropped = trained_inputs(images[0], msgspec.structs.replace(SQUARE, crop=40), "skimage")
    np.testing.assert_array_equal(cropped, whole[..., 4:44, 4:44])


def test_ten_crops_by_hand(reference: Callable[[npt.NDArray[np.float32]], Logits], images: list[Pixels]) -> None:
    spec = PreprocessSpec(resize=Shorter(pixels=48), crop=41)
    pixels = images[0]  # 97 x 130: resized to 64 x 48
    small = np.asarray(Image.fromarray(pixels).resize((64, 48), Image.Resampling.BILINEAR))
    mirrored = np.asarray(Image.fromarray(small).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    crops = []
    for image in (small, mirrored):
        crops += [image[:41, :41], image[:41, 23:], image[7:, :41], image[7:, 23:]]
        crops += [image[4:45, 12:53]]  # torchvision: round(3.5) = 4, round(11.5) = 12
    logits = reference(np.stack(crops)[:, None].astype(np.float32)).astype(np.float64)
    served = reference(small[None, None, 4:45, 12:53].astype(np.float32)).astype(np.float64)[0]
    for activation in (Sigmoid(), OP_NORM, Softmax()):
        expected = np.abs(probabilities(logits, activation).mean(axis=0) - probabilities(served, activation))
        skew = measure_skew(reference, [pixels], "one", spec=spec, trained_with="ten-crop", activation=activation)
        assert skew.max_probability_difference == pytest.approx(expected.max(), abs=1e-6)
        assert skew.mean_probability_difference == pytest.approx(expected.mean(), abs=1e-6)
    np.testing.assert_array_equal(trained_inputs(pixels, spec, "ten-crop"), np.stack(crops)[:, None])


def test_what_cannot_be_measured_is_refused(
    reference: Callable[[npt.NDArray[np.float32]], Logits], images: list[Pixels]
) -> None:
    with pytest.raises(RequestError, match="ten-crop needs a crop"):
        measure_skew(reference, images, "", spec=SQUARE, trained_with="ten-crop", activation=Sigmoid())
    with pytest.raises(DatasetError, match="no image"):
        measure_skew(reference, [], "", spec=SQUARE, trained_with="skimage", activation=Sigmoid())


def test_the_manifest_holds_the_skew(
    sample_bundle: Bundle, reference: Callable[[npt.NDArray[np.float32]], Logits], images: list[Pixels]
) -> None:
    skew = measure_skew(reference, images, "noise", spec=SQUARE, trained_with="skimage", activation=Sigmoid())
    manifest = msgspec.structs.replace(sample_bundle.manifest, skew=skew)
    assert msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest).skew == skew
    assert sample_bundle.manifest.skew is None
