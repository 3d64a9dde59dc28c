"""Calibration: which radiographs, and what range of values each convolution's input takes on them.

Owns the three parts that calibration images are split into, the histograms and the four rules that
make a range of one. Streams: memory does not grow with the number of images, and an interrupted run
goes on where it was. Knows nothing of quantised graphs; `thoraxrt.export.quantise` does.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnxruntime.quantization.calibrate import HistogramCollector

from thoraxrt.engine.bundle import MANIFEST
from thoraxrt.engine.engine import image_files, listed_images, read_radiograph
from thoraxrt.engine.errors import CheckpointError, DatasetError
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
_FEWEST: Final = 8
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

        Raises ImageError where a file is no radiograph.
        """
        for sample in self.samples:
            yield network_input(read_radiograph(sample.path).pixels, spec)

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
    line (relative to the file): 50, 25 and 25 %, keeping together what NIH's file names give to one
    patient. Of each part at most 300, 100 and 1000 are taken. The order is that of names' hashes, so
    that the same images always make the same parts, and no file's content is in two of them.

    Raises DatasetError where the folder or list cannot be read or leaves a part fewer than 8 images.
    """
    if (path / MANIFEST).exists():
        raise DatasetError(
            f"{path} is a bundle, and holds no radiographs; to take its ranges name {path / 'ranges.json'}"
        )
    if path.is_dir() and is_nih_layout(path):
        parts, split = _nih_parts(path), "NIH's lists: train_val by patient, 60 % and 40 %; test"
    else:
        parts, split = (
            _plain_parts(path),
            "by file name, images that NIH's names give to one patient together, 50, 25 and 25 %",
        )
    seen: set[str] = set()
    chosen: dict[str, Part] = {}
    for name, candidates in parts.items():
        fresh = []
        for candidate, labels in candidates[: _LARGEST[name]]:
            sha256 = hashlib.sha256(_image_bytes(candidate, path)).hexdigest()
            if sha256 not in seen:
                fresh.append(Sample(path=candidate, sha256=sha256, labels=labels))
            seen.add(sha256)
        chosen[name] = Part(tuple(fresh))
    if few := [f"{len(part)} to {name}" for name, part in chosen.items() if len(part) < _FEWEST]:
        raise DatasetError(
            f"{path} leaves {' and '.join(few)}: INT8 needs radiographs to compute ranges on, others to choose layers on "
            f"and others to be judged on, at least {_FEWEST} and better some tens of each; name a folder with more"
        )
    return Parts(calibrate=chosen["calibrate"], select=chosen["select"], judge=chosen["judge"], split=split)


_Candidate = tuple[Path, tuple[str, ...] | None]


def _nih_parts(folder: Path) -> dict[str, list[_Candidate]]:
    dataset = NihDataset.open(folder).present()
    records: dict[str, list[_Candidate]] = {"train_val": [], "test": []}
    for record in dataset:
        assert record.path is not None  # present() holds it
        records[record.split].append((record.path, record.labels))
    calibrate, select = _split(records["train_val"], min(0.6 * len(records["train_val"]), _LARGEST["calibrate"]))
    (judge,) = _split(records["test"])
    return {"calibrate": calibrate, "select": select, "judge": judge}


def _plain_parts(path: Path) -> dict[str, list[_Candidate]]:
    files = image_files(path) if path.is_dir() else _listed(path)
    first, second = min(0.5 * len(files), _LARGEST["calibrate"]), 0.75 * len(files)
    calibrate, select, judge = _split([(file, None) for file in files], first, second)
    return {"calibrate": calibrate, "select": select, "judge": judge}


def _split(candidates: list[_Candidate], *ends: float) -> list[list[_Candidate]]:
    """The candidates in parts, each of which ends with the patient who reaches this many of all, the last with all."""
    patients: dict[str, list[_Candidate]] = {}
    for candidate in candidates:
        nih = re.match(r"\d{8}(?=_\d{3}\.)", candidate[0].name)
        patients.setdefault(nih[0] if nih else candidate[0].name, []).append(candidate)
    parts: list[list[_Candidate]] = [[] for _ in range(len(ends) + 1)]
    taken = 0
    for patient in sorted(patients, key=lambda name: hashlib.sha256(os.fsencode(name)).hexdigest()):
        parts[sum(taken >= end for end in ends)] += patients[patient]
        taken += len(patients[patient])
    return parts


def _listed(path: Path) -> list[Path]:
    """The images that a text file names."""
    expected = (
        "expected a folder of radiographs, in the NIH layout or not, or a text file that lists some: check --calibrate"
    )
    return [path.parent / name for name in listed_images(path, expected)]


def _image_bytes(image: Path, named_by: Path) -> bytes:
    try:
        return image.read_bytes()
    except OSError as error:
        raise DatasetError(
            f"calibration image {image}, named by {named_by}, cannot be read ({error.strerror}); restore it or leave it out"
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
        above = float(np.ldexp(1.0, np.frexp(largest)[1])) if largest else 0.0
        limit = max(above, _SMALLEST_LIMIT)
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
    unfinished: Path,
    track: Track = no_progress,
) -> dict[str, Histogram]:
    """Each tensor's histogram over a part's radiographs.

    `tensors` are float outputs of nodes of `model`. Until all are counted, what has been counted is kept
    in a file of the folder `unfinished`, from which a run with the same arguments goes on. Raises
    DatasetError, CheckpointError.
    """
    graph = _exposed(model, tensors)
    arguments = (graph, msgspec.json.encode(spec), *(sample.sha256.encode() for sample in part.samples))
    state = unfinished / hashlib.sha256(b"".join(arguments)).hexdigest()
    done, total = _saved(state)
    session = single_threaded(graph)

    def count(image: npt.NDArray[np.uint8]) -> dict[str, Histogram]:
        values = session.run(list(tensors), {"image": image[np.newaxis]})
        return {name: Histogram.of(value) for name, value in zip(tensors, values, strict=True)}

    counts = parallel(count, Part(part.samples[done:]).inputs(spec))
    for number, counted in enumerate(track(counts, "Calibrating", len(part) - done), done + 1):
        for name, histogram in counted.items():
            total[name] = total[name].merged(histogram) if name in total else histogram
        if number % _SAVE_EVERY == 0:
            _save(state, number, total)
    with contextlib.suppress(OSError):  # there may be none, or no folder for any
        state.unlink()
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
    """A session that computes on the calling thread: its answer does not depend on how many cores there are."""
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


class _State(msgspec.Struct):
    """What an interrupted run had counted after `done` images, by tensor."""

    done: int
    counts: dict[str, bytes]
    limits: dict[str, float]
    largest: dict[str, float]


def _saved(state: Path) -> tuple[int, dict[str, Histogram]]:
    """How many images an interrupted run has counted, and its counts; nothing where there is none or it is damaged."""
    try:
        data = state.read_bytes()
    except OSError:
        return 0, {}
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        return 0, {}
    saved = msgspec.msgpack.decode(data[32:], type=_State)
    return saved.done, {
        name: Histogram(np.frombuffer(counts, np.int64), saved.limits[name], saved.largest[name])
        for name, counts in saved.counts.items()
    }


def _save(state: Path, done: int, total: Mapping[str, Histogram]) -> None:
    data = msgspec.msgpack.encode(
        _State(
            done,
            {name: histogram.counts.astype(np.int64).tobytes() for name, histogram in total.items()},
            {name: histogram.limit for name, histogram in total.items()},
            {name: histogram.largest for name, histogram in total.items()},
        )
    )
    made = state.with_suffix(f".{os.getpid()}")
    try:
        state.parent.mkdir(parents=True, exist_ok=True)
        made.write_bytes(hashlib.sha256(data).digest() + data)
        made.replace(state)
    except OSError as error:
        with contextlib.suppress(OSError):
            made.unlink()
        raise DatasetError(
            f"{state} cannot be written ({error.strerror}), where an interrupted calibration is kept; make room, or name "
            "another place with THORAXRT_CACHE"
        ) from error
