"""Parity end to end on phantoms and the sample bundle: honest bundles pass, a badly quantised layer does not."""

from __future__ import annotations

import csv
import hashlib
import io
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from rich.console import Console

from thoraxrt import __version__
from thoraxrt.benchmarks.candidates import FP32, TORCH, candidates_from_text, runnable, served, torch_run, work_key
from thoraxrt.benchmarks.environment import Gpu, environment
from thoraxrt.benchmarks.parity import ParityOptions, parity, predictions_parity
from thoraxrt.benchmarks.parity_table import render
from thoraxrt.benchmarks.receipt import Candidate, Receipt
from thoraxrt.engine.boxes import BoxSpec
from thoraxrt.engine.bundle import MANIFEST, Bundle, FileEntry, Recommended
from thoraxrt.engine.decode import decode
from thoraxrt.engine.engine import Engine, read_image
from thoraxrt.engine.errors import (
    BackendUnavailableError,
    BundleError,
    CheckpointError,
    DatasetError,
    RequestError,
)
from thoraxrt.engine.postprocess import Softmax
from thoraxrt.engine.preprocess import network_input
from thoraxrt.engine.receipt import require_parity
from thoraxrt.export.nih import LABELS, NihDataset
from thoraxrt.export.phantoms import write_phantoms
from thoraxrt.export.publish import write_receipt
from thoraxrt.export.sample import SAMPLE_CHECKPOINT
from thoraxrt.server.client import Client
from thoraxrt.server.serve import running_server

IMAGES = 24
INT8 = (("onnxruntime", "int8"),)

T = TypeVar("T")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, IMAGES, seed=91)
    return folder


def rewritten(bundle: Bundle, out: Path, change: Callable[[onnx.ModelProto], None], **manifest: object) -> Bundle:
    """The bundle with an INT8 graph beside, the FP32 one after `change`; and other fields in its manifest."""
    graph = onnx.load(bundle.path / "model.fp32.onnx")
    change(graph)
    data = graph.SerializeToString()
    shutil.copytree(bundle.path, out)
    (out / "model.int8.onnx").write_bytes(data)
    files = {**bundle.manifest.files, "model.int8.onnx": FileEntry.of(data)}
    made = msgspec.structs.replace(bundle.manifest, files=files, **manifest)
    (out / MANIFEST).chmod(0o644)
    (out / MANIFEST).write_bytes(msgspec.json.encode(made))
    return Bundle.open(out)


def nothing(graph: onnx.ModelProto) -> None:
    """Change nothing."""


def two_bits(graph: onnx.ModelProto) -> None:
    """Round the weights of one 3 x 3 convolution, in the middle, to -1, 0 and 1 times their largest: two bits."""
    shapes = {each.name: each for each in graph.graph.initializer if list(each.dims)[2:] == [3, 3]}
    names = [node.input[1] for node in graph.graph.node if node.op_type == "Conv" and node.input[1] in shapes]
    chosen = shapes[names[len(names) // 2]]
    weights = numpy_helper.to_array(chosen)
    scale = np.abs(weights).max()
    chosen.CopyFrom(numpy_helper.from_array(np.round(weights / scale).astype(np.float32) * scale, chosen.name))


def not_numbers(graph: onnx.ModelProto) -> None:
    for each in graph.graph.initializer:
        if len(each.dims) == 4:
            each.CopyFrom(numpy_helper.from_array(np.full(each.dims, np.nan, np.float32), each.name))


@pytest.fixture(scope="module")
def honest(sample_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return rewritten(sample_bundle, tmp_path_factory.mktemp("honest") / "honest.bundle", nothing)


@pytest.fixture(scope="module")
def planted(sample_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return rewritten(sample_bundle, tmp_path_factory.mktemp("planted") / "planted.bundle", two_bits)


def quick(work: Path, **options: object) -> ParityOptions:
    """INT8 against FP32 on ONNX Runtime, on all phantoms, without a server."""
    return ParityOptions(**{"split": "all", "serve": False, "candidates": INT8, "work": work, **options})


@pytest.fixture(scope="module")
def complete(honest: Bundle, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Receipt:
    """Everything that runs here, and a server, against PyTorch."""
    work = tmp_path_factory.mktemp("work")
    return parity(honest, phantoms, ParityOptions(split="all", checkpoint=SAMPLE_CHECKPOINT, work=work))


def test_an_honest_bundle_passes_through_every_backend_and_a_server(complete: Receipt, honest: Bundle) -> None:
    assert complete.passed
    assert complete.reference == TORCH == complete.results[0].candidate
    engines = runnable(honest, None)
    through_server = msgspec.structs.replace(served(honest, engines), through="server")
    assert [result.candidate for result in complete.results[1:]] == [*engines, through_server]
    assert FP32 in engines
    assert complete.bundle == honest.sha256
    assert complete.checkpoint == honest.manifest.network.checkpoint_sha256
    assert (complete.data.images, complete.data.absent, complete.data.unreadable) == (IMAGES, 0, ())
    assert complete.preprocessing is not None
    assert (complete.preprocessing.images, complete.preprocessing.identical) == (IMAGES, IMAGES)
    for result in complete.results[1:]:
        assert result.agreement is not None
        assert result.agreement.mean_error < (1e-5 if result.candidate.precision == "fp32" else 0.01)
        assert result.verdict is not None
        assert not result.verdict.failures
        assert "answers agree within the bar" in result.verdict.shown[-1]
        assert any("few patients" in fact for fact in result.verdict.not_shown)
        assert [finding.finding for finding in result.aurocs] == list(LABELS)
        assert [change.finding for change in result.changes] == list(LABELS)


def test_the_server_gives_the_boxes_that_the_engine_gives(complete: Receipt) -> None:
    (here,) = [result for result in complete.results if str(result.candidate) == "openvino fp32"]
    (there,) = [result for result in complete.results if result.candidate.through == "server"]
    assert there.candidate.backend == "openvino"
    assert there.localisation == here.localisation
    assert there.boxes == here.boxes
    assert there.aurocs == here.aurocs
    assert complete.boxes_reference == FP32
    assert sum(finding.annotated for finding in there.localisation) > 10
    assert sum(finding.boxes for finding in there.boxes) > 5
    assert not complete.results[0].boxes  # PyTorch as loaded has no CAM


def test_the_receipt_is_its_file_and_lets_the_edge_serve(complete: Receipt, honest: Bundle, tmp_path: Path) -> None:
    encoded = msgspec.json.encode(complete)
    assert msgspec.json.decode(encoded, type=Receipt) == complete
    copy = Bundle.open(shutil.copytree(honest.path, tmp_path / "copy.bundle"))
    write_receipt(copy, encoded)
    require_parity(copy, "openvino", "bf16")
    with pytest.raises(BundleError, match="tensorrt:fp16 has not passed"):
        require_parity(copy, "tensorrt", "fp16")


def test_the_table_says_what_the_receipt_says(complete: Receipt) -> None:
    text = printed(complete)
    for word in ("openvino bf16", "through the server", "passed", "Pneumothorax", "CheXNet", "T(IoBB) = 0.25"):
        assert word in text
    assert "FAILED" not in text


def printed(receipt: Receipt) -> str:
    console = Console(file=io.StringIO(), width=200)
    for part in render(receipt):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_badly_quantised_layer_fails_on_few_positives_too(planted: Bundle, phantoms: Path, tmp_path: Path) -> None:
    receipt = parity(planted, phantoms, quick(tmp_path))
    reference, result = receipt.results
    assert (receipt.reference, reference.candidate, reference.verdict) == (FP32, FP32, None)
    assert result.verdict is not None
    assert not result.verdict.passed
    assert not receipt.passed
    assert "answers are too far from the reference's" in result.verdict.failures[-1]
    moves = [abs(case.probability - case.reference) for case in result.moved]
    assert moves == sorted(moves, reverse=True)
    assert moves[0] > 0.05
    assert "FAILED" in printed(receipt)
    copy = Bundle.open(shutil.copytree(planted.path, tmp_path / "copy.bundle"))
    write_receipt(copy, msgspec.json.encode(receipt))
    require_parity(copy, "onnxruntime", "fp32")
    with pytest.raises(BundleError, match="onnxruntime:int8 has not passed"):
        require_parity(copy, "onnxruntime", "int8")


def test_a_loss_in_fp32_itself_is_seen_by_the_original(sample_bundle: Bundle, phantoms: Path, tmp_path: Path) -> None:
    bundle = rewritten(sample_bundle, tmp_path / "other.bundle", two_bits)
    data = (bundle.path / "model.int8.onnx").read_bytes()
    files = {**bundle.manifest.files, "model.fp32.onnx": FileEntry.of(data)}
    (bundle.path / "model.fp32.onnx").unlink()
    (bundle.path / "model.fp32.onnx").write_bytes(data)
    (bundle.path / MANIFEST).write_bytes(msgspec.json.encode(msgspec.structs.replace(bundle.manifest, files=files)))
    options = quick(tmp_path, candidates=(("openvino", "fp32"),), checkpoint=SAMPLE_CHECKPOINT, limit=4)
    assert not parity(Bundle.open(bundle.path), phantoms, options).passed


def test_the_original_may_be_a_hugging_face_folder_as_in_export(sample_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        torch_run(sample_bundle.manifest, tmp_path, None)
    shutil.copyfile(SAMPLE_CHECKPOINT, tmp_path / "model.safetensors")
    run, sha256 = torch_run(sample_bundle.manifest, tmp_path, None)
    assert sha256 == sample_bundle.manifest.network.checkpoint_sha256
    with run.open():
        pass


def test_ten_runs_pass_and_say_the_same(honest: Bundle, phantoms: Path, tmp_path: Path) -> None:
    runs = [parity(honest, phantoms, quick(tmp_path / str(run), limit=4)) for run in range(10)]
    assert all(run.passed for run in runs)
    assert len({msgspec.json.encode((run.data, run.results)) for run in runs}) == 1


class Watched:
    """A track that counts what is scored, and can stop one candidate."""

    def __init__(self, stop_after: int | None = None, stopped: str = "onnxruntime int8") -> None:
        self.stop_after, self.stopped = stop_after, stopped
        self.totals: dict[str, int] = {}

    def __call__(self, items: Iterable[T], description: str, total: int) -> Iterator[T]:
        self.totals[description] = total
        for done, item in enumerate(items):
            if done == self.stop_after and description == self.stopped:
                raise KeyboardInterrupt
            yield item


def test_an_interrupted_run_goes_on_where_it_was(honest: Bundle, phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        parity(honest, phantoms, quick(tmp_path / "work"), Watched(stop_after=6))
    watched = Watched()
    receipt = parity(honest, phantoms, quick(tmp_path / "work"), watched)
    assert "onnxruntime fp32" not in watched.totals  # it was complete
    assert 6 <= watched.totals["onnxruntime int8"] < IMAGES
    assert receipt.results == parity(honest, phantoms, quick(tmp_path / "other")).results
    changed = shutil.copytree(phantoms, tmp_path / "changed")
    (changed / "images" / NihDataset.open(changed).records[0].image).touch()
    parity(honest, changed, quick(tmp_path / "work"), watched := Watched())
    assert watched.totals["onnxruntime int8"] == IMAGES  # another file: nothing of the old answers is taken


def test_what_nobody_can_read_is_named_and_left_out(honest: Bundle, phantoms: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(phantoms, tmp_path / "damaged")
    first, second, *_ = sorted((folder / "images").iterdir())
    first.write_bytes(first.read_bytes()[:5000])
    second.unlink()
    receipt = parity(honest, folder, quick(tmp_path / "work", limit=6))
    assert receipt.passed
    assert (receipt.data.images, receipt.data.absent, receipt.data.unreadable) == (5, 1, (first.name,))
    assert "answered by nobody" in printed(receipt)
    second.write_bytes(b"no image")
    with pytest.raises(
        DatasetError, match=r"none of 2 images was answered by the reference, onnxruntime fp32 \(the PNG"
    ):
        parity(honest, folder, quick(tmp_path / "work", limit=2))
    shutil.rmtree(folder / "images")
    with pytest.raises(DatasetError, match="holds no image of its split all; expected"):
        parity(honest, folder, quick(tmp_path / "work"))


def test_a_candidate_whose_runtime_breaks_has_failed(sample_bundle: Bundle, phantoms: Path, tmp_path: Path) -> None:
    bundle = rewritten(sample_bundle, tmp_path / "nan.bundle", not_numbers)
    receipt = parity(bundle, phantoms, quick(tmp_path, limit=4))
    assert not receipt.passed
    verdict = receipt.results[-1].verdict
    assert verdict is not None
    assert "it answered none of the images: onnxruntime int8 gave values that are not finite" in verdict.failures[0]
    assert "FAILED" in printed(receipt)


def test_what_one_candidate_does_not_answer_takes_nothing_from_the_others(
    sample_bundle: Bundle, phantoms: Path, tmp_path: Path
) -> None:
    spec = sample_bundle.manifest.preprocess
    files = [record.path for record in NihDataset.open(phantoms) if record.path is not None]
    darkest, second = sorted(float(network_input(decode(read_image(file)).pixels, spec).mean()) for file in files)[:2]

    def only_the_darkest(graph: onnx.ModelProto) -> None:
        """Answers that are not finite for an image brighter than the darkest: 0 times the root of what is negative."""
        constants = {
            "dark_limit": np.float32((darkest + second) / 2),
            "dark_zero": np.float32(0),
            "dark_axes": np.array([1, 2, 3]),
        }
        graph.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items())
        for node in graph.graph.node:
            node.output[:] = ["all_logits" if name == "logits" else name for name in node.output]
        make = onnx.helper.make_node
        graph.graph.node.extend(
            [
                make("Cast", ["image"], ["dark_float"], to=onnx.TensorProto.FLOAT),
                make("ReduceMean", ["dark_float", "dark_axes"], ["dark_four"], keepdims=1),
                make("Flatten", ["dark_four"], ["dark_mean"]),  # (N, 1)
                make("Sub", ["dark_limit", "dark_mean"], ["dark_left"]),
                make("Sqrt", ["dark_left"], ["dark_root"]),
                make("Mul", ["dark_root", "dark_zero"], ["dark_poison"]),
                make("Add", ["all_logits", "dark_poison"], ["logits"]),
            ]
        )

    bundle = rewritten(sample_bundle, tmp_path / "dark.bundle", only_the_darkest)
    receipt = parity(bundle, phantoms, quick(tmp_path, candidates=(("openvino", "fp32"), *INT8)))
    assert (receipt.data.images, receipt.data.unreadable) == (IMAGES, ())
    _, sound, failing = receipt.results
    alone = parity(bundle, phantoms, quick(tmp_path / "alone", candidates=(("openvino", "fp32"),)))
    assert (receipt.data, sound) == (alone.data, alone.results[1])
    assert sound.verdict is not None
    assert sound.verdict.passed
    assert failing.verdict is not None
    assert len(failing.unanswered) == IMAGES - 1
    assert any(f"{IMAGES - 1} images have no answer" in failure for failure in failing.verdict.failures)
    assert failing.agreement is not None
    assert failing.agreement.mean_error < 1e-5, "the one image that it answered is compared with the same image"


def test_labels_that_the_data_set_has_not_are_compared_with_the_reference_only(
    sample_bundle: Bundle, phantoms: Path, tmp_path: Path
) -> None:
    labels = ("COVID", *sample_bundle.manifest.labels[1:])
    points = tuple(
        msgspec.structs.replace(point, finding=label)
        for point, label in zip(sample_bundle.manifest.operating_points, labels, strict=True)
    )
    changed = {"labels": labels, "operating_points": points, "activation": Softmax(), "boxes": BoxSpec()}
    bundle = rewritten(sample_bundle, tmp_path / "softmax.bundle", nothing, **changed)
    receipt = parity(bundle, phantoms, quick(tmp_path, limit=8))
    assert receipt.passed
    assert receipt.data.unannotated == ("COVID",)
    assert receipt.data.annotated == labels[1:]
    (result,) = receipt.results[1:]
    assert [finding.finding for finding in result.aurocs] == list(labels[1:])
    assert [change.finding for change in result.changes] == list(labels)


def test_a_sample_is_of_whole_patients_and_always_the_same(honest: Bundle, phantoms: Path, tmp_path: Path) -> None:
    one, other = (parity(honest, phantoms, quick(tmp_path / name, sample=5)) for name in "ab")
    assert one.data == other.data
    assert 5 <= one.data.images < IMAGES
    in_all = [record.patient for record in NihDataset.open(phantoms)]
    assert (
        one.data.images == sum(sorted(in_all.count(patient) for patient in set(in_all))[-1:]) or one.data.patients > 1
    )


def test_a_server_that_runs_is_asked(honest: Bundle, sample_bundle: Bundle, phantoms: Path, tmp_path: Path) -> None:
    with (
        Engine.open(honest, backend="onnxruntime", precision="int8") as engine,
        running_server(engine) as port,
        Client(f"127.0.0.1:{port}") as client,
    ):
        receipt = parity(honest, phantoms, quick(tmp_path, server=client, limit=6))
        assert receipt.passed
        assert receipt.results[-1].candidate == Candidate(backend="onnxruntime", precision="int8", through="server")
        with pytest.raises(RequestError, match=r"serves the bundle .* expected"):
            parity(sample_bundle, phantoms, quick(tmp_path, server=client, candidates=None))


def test_a_servers_answers_are_asked_for_again_unless_the_run_was_ended(
    honest: Bundle, phantoms: Path, tmp_path: Path
) -> None:
    name = "onnxruntime int8 through the server"
    with (
        Engine.open(honest, backend="onnxruntime", precision="int8") as engine,
        running_server(engine) as port,
        Client(f"127.0.0.1:{port}") as client,
    ):
        options = quick(tmp_path, server=client)
        with pytest.raises(KeyboardInterrupt):
            parity(honest, phantoms, options, Watched(stop_after=6, stopped=name))
        parity(honest, phantoms, options, ended := Watched())
        receipt = parity(honest, phantoms, options, again := Watched())
    assert 0 < ended.totals[name] < IMAGES
    assert again.totals == {name: IMAGES, "Comparing with Pillow": IMAGES}
    assert receipt.environment.versions["thoraxrt of the server"] == __version__


def test_answers_do_not_hang_on_what_a_gpu_does_at_the_moment() -> None:
    gpu = Gpu(
        name="H100",
        driver="580.1",
        memory_mib=81559,
        sm_mhz=345,
        memory_mhz=2619,
        celsius=31,
        watts=71.5,
        mig="Disabled",
    )
    here = environment()
    keys = [
        work_key([], msgspec.structs.replace(here, gpus=(msgspec.structs.replace(gpu, **change),)))
        for change in ({}, {"sm_mhz": 1980.0, "memory_mhz": 2.0, "celsius": 60.0, "watts": 400.0}, {"driver": "581.0"})
    ]
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]


def test_an_image_that_is_listed_twice_is_refused(honest: Bundle, phantoms: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(phantoms, tmp_path / "twice")
    first, second, *_ = NihDataset.open(folder).records
    (entries,) = folder.glob("Data_Entry*.csv")
    entries.write_text(entries.read_text().replace(second.image, first.image))
    with pytest.raises(DatasetError, match=rf"lists 1 images more than once, {first.image} first; expected a row each"):
        parity(honest, folder, quick(tmp_path))
    with pytest.raises(DatasetError, match="more than once"):
        predictions_parity(tmp_path / "any.csv", folder)


def test_dicom_files_are_looked_for_before_anything_is_answered(honest: Bundle, phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no DICOM file"):
        parity(honest, phantoms, quick(tmp_path, dicom=tmp_path), watched := Watched())
    assert not watched.totals


def test_what_cannot_be_asked_is_refused(sample_bundle: Bundle, phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="int8"):
        parity(sample_bundle, phantoms, quick(tmp_path))
    with pytest.raises(RequestError, match="unknown backend"):
        parity(sample_bundle, phantoms, quick(tmp_path, candidates=(("magic", "fp32"),)))
    with pytest.raises(CheckpointError, match="cannot be read"):
        parity(sample_bundle, phantoms, quick(tmp_path, candidates=None, checkpoint=tmp_path / "none.pth"))
    for senseless in ({"limit": 0}, {"sample": -1}, {"margin": 0.0}):
        with pytest.raises(RequestError, match="expected"):
            quick(tmp_path, **senseless)


def test_candidates_as_they_are_typed() -> None:
    assert candidates_from_text("openvino:int8, onnxruntime:fp32,openvino:int8") == (
        ("openvino", "int8"),
        ("onnxruntime", "fp32"),
    )
    for senseless in ("", "openvino", "openvino:", "a:b:c", "openvino:int8,"):
        with pytest.raises(RequestError, match="expected BACKEND:PRECISION"):
            candidates_from_text(senseless)


def test_what_is_served_is_what_serve_would_run(honest: Bundle) -> None:
    engines = runnable(honest, None)
    assert served(honest, engines) == Candidate(backend="openvino", precision="fp32", through="engine")
    assert served(honest, runnable(honest, INT8)).precision == "int8"
    manifest = msgspec.structs.replace(honest.manifest, recommended=Recommended(backend="openvino", precision="bf16"))
    recommending = Bundle(honest.path, manifest, honest.sha256)
    assert served(recommending, engines).precision == "bf16"


# --- published predictions -----------------------------------------------------------------------------------


def test_published_aurocs_are_reproduced(nih: Path) -> None:
    """22,433 predictions of a DenseNet-121, and the labels as NIH publishes them."""
    receipt = predictions_parity(nih / "predictions" / "densenet121_reproduce-chexnet.csv", nih)
    with (nih / "predictions" / "densenet121_reproduce-chexnet_auroc.csv").open(newline="") as file:
        published = {line["label"]: float(line["auc"]) for line in csv.DictReader(file)}
    assert receipt.data.images == 22433
    (result,) = receipt.results
    assert result.verdict is None
    assert len(result.aurocs) == len(published) == 14
    for finding in result.aurocs:
        assert finding.auroc is not None
        assert finding.auroc.value == pytest.approx(published[finding.finding], abs=1e-9)
        assert finding.auroc.delong is not None
        assert finding.auroc.delong.low < finding.auroc.value < finding.auroc.delong.high
    assert msgspec.json.decode(msgspec.json.encode(receipt), type=Receipt) == receipt
    assert "0.8180" in printed(receipt)


def write_predictions(
    path: Path, images: list[str], probabilities: np.ndarray[tuple[int, int], np.dtype[np.float64]]
) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Image Index", *(f"prob_{label}" for label in LABELS)])
        writer.writerows([image, *row] for image, row in zip(images, probabilities.tolist(), strict=True))
    return path


def test_predictions_against_others_are_compared_in_pairs(phantoms: Path, tmp_path: Path) -> None:
    dataset = NihDataset.open(phantoms)
    images = [record.image for record in dataset]
    theirs = np.random.default_rng(3).random((IMAGES, len(LABELS)))
    reference = write_predictions(tmp_path / "theirs.csv", images, theirs)
    same = write_predictions(tmp_path / "same.csv", images[::-1], theirs[::-1])
    receipt = predictions_parity(same, phantoms, reference)
    files = "".join(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in (same, reference))
    assert receipt.data.sha256 == hashlib.sha256(files.encode()).hexdigest()
    assert receipt.passed
    assert receipt.reference == receipt.results[0].candidate
    comparison = receipt.results[1].comparison
    assert comparison is not None
    found = {finding.reason for finding in comparison.findings}
    assert found == {"identical scores", "no positives or no negatives"}
    worse = write_predictions(tmp_path / "worse.csv", images, 1 - theirs)
    assert not predictions_parity(worse, phantoms, reference).passed
    assert predictions_parity(worse, phantoms, reference, split="test").data.images == len(dataset.split("test"))


def test_predictions_that_cannot_be_used(phantoms: Path, tmp_path: Path) -> None:
    rows = np.full((1, len(LABELS)), 1.5)
    with pytest.raises(DatasetError, match=r"name 1 images that .* does not list, unknown.png first"):
        predictions_parity(write_predictions(tmp_path / "a.csv", ["unknown.png"], rows), phantoms)
    first, *_ = [record.image for record in NihDataset.open(phantoms).split("train_val")]
    with pytest.raises(DatasetError, match="expected the column Image Index to name images of the split"):
        predictions_parity(write_predictions(tmp_path / "c.csv", [first], rows), phantoms, split="test")
    with pytest.raises(DatasetError, match=f"{first} is there twice"):
        predictions_parity(write_predictions(tmp_path / "d.csv", [first, first], np.vstack([rows, rows])), phantoms)
    with pytest.raises(DatasetError, match=r"no probabilities; expected 0 to 1"):
        predictions_parity(write_predictions(tmp_path / "b.csv", [first], rows), phantoms)


# --- the real thing ------------------------------------------------------------------------------------------


def test_a_real_densenet_on_real_radiographs(chexnet_bundle: Bundle, nih: Path, tmp_path: Path) -> None:
    options = ParityOptions(
        limit=24, serve=False, candidates=(("openvino", "bf16"),), work=tmp_path, dicom=nih / "dicom"
    )
    receipt = parity(chexnet_bundle, nih, options)
    assert receipt.passed
    assert (receipt.data.images, receipt.data.patients) == (24, 17)
    assert receipt.preprocessing is not None
    assert receipt.preprocessing.identical == 24
    assert {(pair.pixels_difference, pair.input_difference) for pair in receipt.dicom} == {(0, 0)}
    agreed = receipt.results[1].agreement
    assert agreed is not None
    assert 1e-5 < agreed.mean_error < 0.01
