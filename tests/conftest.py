"""What every room's tests share: the real material where it exists, and the sample bundle, exported once."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from thoraxrt.engine.backends.tensorrt_plan import Flavour, installed_flavour
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.errors import BackendUnavailableError

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def nih() -> Path:
    """The folder of real NIH material beside the repository; tests that need it skip without it."""
    folder = REPOSITORY.parent / "shared" / "nih"
    if not folder.is_dir():
        pytest.skip("no real radiographs beside this checkout (../shared/nih)")
    return folder


@pytest.fixture(scope="session")
def nih_images(nih: Path) -> list[Path]:
    return sorted((nih / "images").glob("*.png"))


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An Ed25519 key pair, private and public, made as the help text says."""
    folder = tmp_path_factory.mktemp("keys")
    private, public = folder / "private.pem", folder / "public.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public


@pytest.fixture(scope="session")
def sample_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The sample network's bundle, FP32 and FP16, with default operating points."""
    from thoraxrt.export.bundle import ExportOptions, export_bundle
    from thoraxrt.export.sample import SAMPLE_BOXES, SAMPLE_CHECKPOINT

    out = tmp_path_factory.mktemp("sample") / "sample.bundle"
    return export_bundle(SAMPLE_CHECKPOINT, out, ExportOptions(boxes=SAMPLE_BOXES))


@pytest.fixture(scope="session")
def chexnet_bundle(nih: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of the real DenseNet-121 checkpoint."""
    from thoraxrt.export.bundle import ExportOptions, export_bundle

    out = tmp_path_factory.mktemp("chexnet") / "chexnet.bundle"
    return export_bundle(nih / "checkpoints" / "densenet121-nih.pth.tar", out, ExportOptions(images=nih / "images"))


@pytest.fixture(scope="session")
def rtx() -> Flavour:
    """TensorRT-RTX, which compiles without a GPU."""
    try:
        flavour = installed_flavour()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    if flavour.name != "tensorrt_rtx":
        pytest.skip("tensorrt is installed and would be used; these tests compile for named GPUs with tensorrt_rtx")
    return flavour
