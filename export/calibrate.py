"""Calibration: which radiographs, and what range of values each convolution's input takes on them.

Owns the three parts that calibration images are split into, the histograms and the four rules that
make a range of one. Streams: memory does not grow with the number of images, and an interrupted run
goes on where it was. Knows nothing of quantised graphs; `thoraxrt.export.quantise` does.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnxruntime.quantization.calibrate import HistogramCollector

from thoraxrt.engine.decode import decode
from thoraxrt.engine.engine import image_files, read_image
from thoraxrt.engine.errors import CheckpointError, DatasetError, ImageError
from thoraxrt.engine.preprocess import PreprocessSpec, network_input
from thoraxrt.export import Track, no_progress
from thoraxrt.export.nih import NihDataset, is_nih_layout

__all__ = [
    "METHODS",
    "Histogram",
    "Method",
    "Part",
    "Parts",
    "Sample",
    "channel_maxima",
    "histograms",
    "parts_from_path",
    "range_from_histogram",
]

_T = TypeVar("_T")

Method = Literal["minmax", "percentile", "entropy", "mse"]
METHODS: Final[tuple[Method, ...]] = ("minmax", "percentile", "entropy", "mse")

BINS: Final = 4096
LEVELS: Final = 127
"""Positive codes of a symmetric signed 8-bit quantiser, whose zero point is 0 and which leaves -128 unused."""

_PERCENTILE: Final = 99.999
_ENTROPY_BINS: Final = 256
_LARGEST: Final = {"calibrate": 300, "select": 100, "judge": 1000}
_SMALLEST_LIMIT: Final = 2.0**-100  # of a tensor that is always zero: any other's is larger
_SAVE_EVERY: Final = 16  # images


# --- which radiographs -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One radiograph's file, the sha256 of its bytes, and its findings, None where it is not labelled."""

    path: Path
    sha256: str
    labels: tuple[str, ...] | None


@dataclass(frozen=True)
class Part:
    """Radiographs that serve one purpose."""

    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def inputs(self, spec: PreprocessSpec) -> Iterator[npt.NDArray[np.uint8]]:
        """Each one's network input, uint8 `(1, S, S)`, decoded when it is asked for.

        Raises DatasetError where a file is no radiograph.
        """
        for sample in self.samples:
            try:
                yield network_input(decode(read_image(sample.path)).pixels, spec)
            except ImageError as error:
                raise DatasetError(f"calibration image {sample.path}: {error}; leave it out or mend it") from error

    def positive(self, labels: Sequence[str]) -> npt.NDArray[np.bool_] | None:
        """Which findings each one shows, bool `(N, C)` in the order of `labels`; None where any is unlabelled."""
        if any(sample.labels is None for sample in self.samples):
            return None
        return np.array([[label in (sample.labels or ()) for label in labels] for sample in self.samples], bool)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Ranges are computed on `calibrate`, layers chosen on `select`; `judge` is looked at once, at the end."""

    calibrate: Part
    select: Part
    judge: Part
    split: str
    """How the parts were made, in words."""


def parts_from_path(path: Path) -> Parts:
    """Split the radiographs of a folder or of a list into three parts.

    A folder in the NIH layout: its train_val images by patient, 60 % to calibrate and 40 % to
    select, and its test images to judge. Another folder, or a text file with an image's path per
    line (relative to the file): by a hash of the name, 50, 25 and 25 %. At most 300, 100 and 1000
    are taken. The order is that of hashes, so the same images always make the same parts, and no
    file's content is in two of them.

    Raises DatasetError where the folder or list cannot be read or leaves a part empty.
    """
    if path.is_dir() and is_nih_layout(path):
        parts, split = _nih_parts(path), "official: train_val by patient, 60 % and 40 %; test"
    else:
        parts, split = _plain_parts(path), "by a hash of the file name, 50, 25 and 25 %"
    seen: set[str] = set()
    chosen: dict[str, Part] = {}
    for name, candidates in parts.items():
        fresh = []
        for candidate, labels in itertools.islice(candidates, _LARGEST[name]):
            sha256 = hashlib.sha256(_bytes(candidate)).hexdigest()
            if sha256 not in seen:
                fresh.append(Sample(path=candidate, sha256=sha256, labels=labels))
            seen.add(sha256)
        chosen[name] = Part(tuple(fresh))
    if empty := [name for name, part in chosen.items() if not len(part)]:
        raise DatasetError(
            f"{path} leaves no image to {' and to '.join(empty)}: INT8 needs radiographs to compute ranges on, others to "
            "choose layers on and others to be judged on, some tens of each; name a folder with more"
        )
    return Parts(calibrate=chosen["calibrate"], select=chosen["select"], judge=chosen["judge"], split=split)


_Candidates = Iterable[tuple[Path, tuple[str, ...] | None]]


def _nih_parts(folder: Path) -> dict[str, _Candidates]:
    dataset = NihDataset.open(folder).present()
    patients: dict[int, list[tuple[Path, tuple[str, ...]]]] = {}
    for record in dataset.split("train_val"):
        assert record.path is not None  # present() holds it
        patients.setdefault(record.patient, []).append((record.path, record.labels))
    wanted = 0.6 * sum(map(len, patients.values()))
    calibrate: list[tuple[Path, tuple[str, ...]]] = []
    select: list[tuple[Path, tuple[str, ...]]] = []
    for patient in sorted(patients, key=lambda patient: _order(str(patient))):
        (calibrate if len(calibrate) < min(wanted, _LARGEST["calibrate"]) else select).extend(patients[patient])
    judge = [(record.path, record.labels) for record in dataset.split("test") if record.path is not None]
    return {"calibrate": calibrate, "select": select, "judge": sorted(judge, key=lambda item: _order(item[0].name))}


def _plain_parts(path: Path) -> dict[str, _Candidates]:
    if path.is_dir():
        files = image_files(path)
    else:
        names = (line.strip() for line in _bytes(path).decode("utf-8", "replace").splitlines())
        files = [path.parent / name for name in names if name]
    files.sort(key=lambda file: _order(file.name))
    first, second = len(files) // 2, len(files) * 3 // 4
    pairs = [(file, None) for file in files]
    return {"calibrate": pairs[:first], "select": pairs[first:second], "judge": pairs[second:]}


def _order(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be read ({error.strerror}); expected a folder of radiographs, in the NIH layout or not, or a "
            "text file that lists some: check --calibrate"
        ) from error


# --- what values they make -------------------------------------------------------------------------


@dataclass(frozen=True)
class Histogram:
    """How often a tensor's magnitudes fall into `BINS` equal bins over 0 to `limit`, and the largest one.

    `limit` is a power of two, so that a larger value doubles it by merging neighbours: the counts do
    not depend on the order in which images come, and binning is exact in float32.
    """

    counts: npt.NDArray[np.int64]  # (BINS,)
    limit: float
    largest: float

    @classmethod
    def of(cls, values: npt.NDArray[np.float32]) -> Histogram:
        """The histogram of one array. Raises CheckpointError where a value is not finite."""
        magnitudes = np.abs(values).ravel()
        largest = float(magnitudes.max(initial=0.0))
        if not np.isfinite(largest):
            raise CheckpointError(
                "the network gives values that are not finite on a calibration image; check --mean, --std and the weights"
            )
        limit = max(float(np.ldexp(1.0, np.frexp(largest)[1])), _SMALLEST_LIMIT)
        bins = (magnitudes * np.float32(BINS / limit)).astype(np.int32)
        return cls(np.bincount(bins, minlength=BINS), limit, largest)

    def merged(self, other: Histogram) -> Histogram:
        """Both arrays' histogram."""
        limit = max(self.limit, other.limit)
        return Histogram(
            self._counts_up_to(limit) + other._counts_up_to(limit), limit, max(self.largest, other.largest)
        )

    def _counts_up_to(self, limit: float) -> npt.NDArray[np.int64]:
        merged = min(int(limit / self.limit), BINS)  # neighbours per bin
        return np.pad(self.counts.reshape(-1, merged).sum(1), (0, BINS - BINS // merged))


def range_from_histogram(histogram: Histogram, method: Method) -> float:
    """The magnitude that 127 stands for; larger ones saturate.

    `minmax` takes the largest, `percentile` cuts off one value in 100,000, `mse` minimises the
    squared error of quantising, and `entropy` the Kullback-Leibler divergence (Migacz, 8-bit inference
    with TensorRT, GTC 2017; ONNX Runtime's implementation).
    """
    counts, width = histogram.counts, histogram.limit / BINS
    if not histogram.largest:
        return 1.0  # a tensor that is always zero: any range will do
    if method == "minmax":
        return histogram.largest
    if method == "percentile":
        last = int(np.searchsorted(np.cumsum(counts), counts.sum() * _PERCENTILE / 100))
        return min((last + 1) * width, histogram.largest)
    if method == "mse":
        values = (np.arange(BINS) + 0.5) * width  # (BINS,)
        candidates = histogram.largest * np.linspace(0.2, 1.0, 161)
        scales = candidates[:, np.newaxis] / LEVELS  # (161, 1)
        errors = np.minimum(np.rint(values / scales), LEVELS) * scales - values  # (161, BINS)
        return float(candidates[np.argmin((errors**2) @ counts)])
    half = counts.reshape(_ENTROPY_BINS, -1).sum(1)
    edges = np.linspace(-histogram.limit, histogram.limit, 2 * _ENTROPY_BINS + 1).astype(np.float32)
    both = np.concatenate([half[::-1], half])
    low, high = np.float32(-histogram.largest), np.float32(histogram.largest)
    collector = HistogramCollector("entropy", True, 2 * _ENTROPY_BINS, LEVELS + 1, None, "same")
    return float(collector.get_entropy_threshold((both, edges, low, high, high), LEVELS + 1)[1])


def channel_maxima(
    model: onnx.ModelProto, tensors: Sequence[str], part: Part, spec: PreprocessSpec, track: Track = no_progress
) -> dict[str, npt.NDArray[np.float32]]:
    """Each tensor's largest magnitude by channel, float32 `(C,)`, over a part's radiographs.

    `tensors` are float outputs `(N, C, h, w)` of nodes of `model`. Raises DatasetError.
    """
    session = single_threaded(_exposed(model, tensors))

    def largest(image: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.float32]]:
        return [np.abs(value).max((0, 2, 3)) for value in session.run(list(tensors), {"image": image[np.newaxis]})]

    total: list[npt.NDArray[np.float32]] = [np.zeros(1, np.float32)] * len(tensors)
    for one in track(parallel(largest, part.inputs(spec)), "Comparing channels", len(part)):
        total = [np.maximum(before, now) for before, now in zip(total, one, strict=True)]
    return dict(zip(tensors, total, strict=True))


def histograms(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    part: Part,
    spec: PreprocessSpec,
    state: Path,
    track: Track = no_progress,
) -> dict[str, Histogram]:
    """Each tensor's histogram over a part's radiographs.

    `tensors` are float outputs of nodes of `model`. What has been counted is kept in the file
    `state`, from which a run with the same arguments goes on. Raises DatasetError, CheckpointError.
    """
    graph = _exposed(model, tensors)
    key = hashlib.sha256(graph + "".join(sample.sha256 for sample in part.samples).encode()).hexdigest()
    done, total = _saved(state, key)
    session = single_threaded(graph)

    def count(image: npt.NDArray[np.uint8]) -> dict[str, Histogram]:
        values = session.run(list(tensors), {"image": image[np.newaxis]})
        return {name: Histogram.of(value) for name, value in zip(tensors, values, strict=True)}

    counts = parallel(count, Part(part.samples[done:]).inputs(spec))
    for number, counted in enumerate(track(counts, "Calibrating", len(part) - done), done + 1):
        for name, histogram in counted.items():
            total[name] = total[name].merged(histogram) if name in total else histogram
        if number % _SAVE_EVERY == 0:
            _save(state, key, number, total)
    _save(state, key, len(part), total)
    return total


def _exposed(model: onnx.ModelProto, tensors: Sequence[str]) -> bytes:
    """The serialised graph with these tensors among its outputs."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    known = {output.name for output in exposed.graph.output}
    exposed.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors if name not in known
    )
    return exposed.SerializeToString(deterministic=True)


def single_threaded(graph: bytes) -> onnxruntime.InferenceSession:
    """A session that computes on the calling thread: several images at a time, each the same on any machine."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def parallel(step: Callable[[npt.NDArray[np.uint8]], _T], images: Iterable[npt.NDArray[np.uint8]]) -> Iterator[_T]:
    """`step` of each image, in order, on a thread for each core and a few images ahead.

    ONNX Runtime and numpy let go of the interpreter's lock.
    """
    count = os.cpu_count() or 1
    with ThreadPoolExecutor(count) as pool:
        source = iter(images)
        pending = deque(pool.submit(step, image) for image in itertools.islice(source, 2 * count))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(step, image) for image in itertools.islice(source, 1))


def _saved(state: Path, key: str) -> tuple[int, dict[str, Histogram]]:
    """How many images an interrupted run has counted, and its counts; nothing where the state is of another run."""
    try:
        with np.load(io.BytesIO(state.read_bytes()), allow_pickle=False) as kept:
            if str(kept["key"]) != key:
                return 0, {}
            rows = zip(kept["names"], kept["counts"], kept["limits"], kept["largest"], strict=True)
            return int(kept["done"]), {
                str(name): Histogram(counts, float(limit), float(largest)) for name, counts, limit, largest in rows
            }
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return 0, {}  # none yet, or cut off while it was written: count again


def _save(state: Path, key: str, done: int, total: Mapping[str, Histogram]) -> None:
    made = state.with_suffix(f".{os.getpid()}.tmp")
    try:
        state.parent.mkdir(parents=True, exist_ok=True)
        with made.open("wb") as file:
            np.savez(
                file,
                key=np.array(key),
                done=np.array(done),
                names=np.array(list(total)),
                counts=np.stack([histogram.counts for histogram in total.values()]),
                limits=np.array([histogram.limit for histogram in total.values()]),
                largest=np.array([histogram.largest for histogram in total.values()]),
            )
        made.replace(state)
    except OSError as error:
        with contextlib.suppress(OSError):
            made.unlink()
        raise DatasetError(
            f"{state} cannot be written ({error.strerror}), where an interrupted calibration is kept; make room, or name "
            "another place with THORAXRT_CACHE"
        ) from error
