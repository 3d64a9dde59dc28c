"""`thoraxrt parity`: is it still the model that was validated? Every candidate on the same images, compared, judged.

Owns the order of the steps. Running, statistics, matching and the verdict are modules of their own, named as such.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.special import logit

from thoraxrt.benchmarks.auroc import Cohort
from thoraxrt.benchmarks.candidates import (
    FP32,
    Run,
    answered,
    engine_run,
    runnable,
    served,
    served_run,
    server_run,
    torch_run,
    work_key,
)
from thoraxrt.benchmarks.environment import environment
from thoraxrt.benchmarks.judging import Answers, Trial, broken, judged
from thoraxrt.benchmarks.localisation import BoxAgreement, Localisation, box_agreement, localisation
from thoraxrt.benchmarks.measures import changes, operating
from thoraxrt.benchmarks.paired import MARGIN
from thoraxrt.benchmarks.predictions import predictions_from_csv
from thoraxrt.benchmarks.preprocessing import dicom_pairs, preprocessing_parity
from thoraxrt.benchmarks.receipt import Candidate, Cohorts, Data, Receipt, Result, Unanswered
from thoraxrt.benchmarks.scores import Scores
from thoraxrt.benchmarks.scoring import Item
from thoraxrt.engine.bundle import Bundle, Manifest
from thoraxrt.engine.errors import BackendError, DatasetError, RequestError
from thoraxrt.engine.plans import cache_folder
from thoraxrt.engine.postprocess import Activation, Sigmoid, reported, thresholds
from thoraxrt.export import Track, no_progress
from thoraxrt.export.nih import LABELS, NihDataset, NihRecord
from thoraxrt.server.client import Client

__all__ = ["ParityOptions", "parity", "predictions_parity"]

_SEED: Final = 0

_NEAREST: Final = 1e-9
"""Probabilities of a file are taken to be no nearer to 0 and 1 than this where their logits are asked for."""


@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """What is compared, and on which images.

    `limit` takes the first images of the split that are at hand, `sample` whole patients at random (the same ones every
    time) until they have that many. `candidates` are backends and precisions; without them, all that run here.
    `checkpoint` is the original, which makes PyTorch the reference; `network` is `package.module:factory` where it is
    of no known network. `server` is asked too; without one, and unless `serve` is off, a server is started on
    loopback with what the manifest recommends, or else with the first candidate. `dicom` is a folder of
    DICOM files that are named as the images that they are also there as. `margin` is the loss of AUROC that matters.
    Answers are kept in `work`, and what is there is not asked again.

    Raises RequestError for numbers that make no sense. Example: `ParityOptions(sample=500, margin=0.01)`.
    """

    split: Cohorts = "test"
    limit: int | None = None
    sample: int | None = None
    candidates: tuple[tuple[str, str], ...] | None = None
    checkpoint: Path | None = None
    network: str | None = None
    serve: bool = True
    server: Client | None = None
    dicom: Path | None = None
    margin: float = MARGIN
    work: Path | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "sample"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RequestError(f"{name} is {value}: expected at least 1 image")
        if not 0 < self.margin < 1:
            raise RequestError(f"margin is {self.margin}: expected a loss of AUROC, 0 < margin < 1, such as {MARGIN}")


def parity(bundle: Bundle, folder: Path, options: ParityOptions | None = None, track: Track = no_progress) -> Receipt:
    """Compare every candidate with the reference on the images of a folder in the NIH layout.

    The reference is the original in PyTorch where there is a checkpoint, else FP32 on ONNX Runtime. A candidate whose
    runtime breaks has failed; where the reference's does, or a server cannot be asked, that is raised, and a further
    call goes on from there.

    Raises DatasetError where there is nothing to compare on, RequestError, CheckpointError, BackendError, ServerError.
    """
    options = options or ParityOptions()
    began = environment()
    dataset = NihDataset.open(folder)
    in_split = _split(dataset, options.split)
    records = _chosen(in_split.present().records, options)
    paths = {record.image: record.path for record in dataset if record.path is not None}
    preprocess = bundle.manifest.preprocess
    if not records:
        raise DatasetError(
            f"{folder} holds no image of its split {options.split}; expected PNG files in images/, or --split all for "
            "whatever there is"
        )
    dicom = dicom_pairs(options.dicom, paths, preprocess) if options.dicom else ()
    items = _items(records, _boxed(dataset, bundle.manifest))
    runs, checkpoint = _runs(bundle, options, located=any(item.located for item in items))
    work, key = options.work or cache_folder() / "parity", work_key(items, began)
    found, failed = {}, {}
    for run in runs:
        try:
            found[run.candidate] = answered(run, bundle, items, work, key, track)
        except BackendError as error:
            if run is runs[0]:
                raise
            failed[run.candidate] = broken(run.candidate, f"its runtime broke: {error}")
    everyone = _Everyone(manifest=bundle.manifest, records=records, items=items, found=found, margin=options.margin)
    reference = everyone.reference
    trial = reference.trial
    results = {candidate: everyone.result(candidate) for candidate in found} | failed
    server = runs[-1].server_version
    return Receipt(
        bundle=bundle.sha256,
        network=bundle.manifest.network.name,
        checkpoint=checkpoint,
        data=Data(
            folder=folder.resolve().name,
            split=options.split,
            limit=options.limit,
            sample=options.sample,
            images=len(trial.images),
            patients=len(np.unique(trial.cohort.patients)),
            absent=len(in_split) - len(in_split.present()),
            unreadable=everyone.unreadable,
            sha256=everyone.sha256,
            annotated=trial.cohort.labels,
            unannotated=tuple(label for label in trial.labels if label not in trial.cohort.labels),
        ),
        margin=options.margin,
        reference=reference.candidate,
        boxes_reference=everyone.boxes_reference,
        preprocessing=preprocessing_parity([paths[image] for image in trial.images], preprocess, track),
        dicom=dicom,
        results=tuple(results[run.candidate] for run in runs),
        environment=msgspec.structs.replace(
            began, versions=began.versions | ({"thoraxrt of the server": server} if server else {})
        ),
    )


def predictions_parity(
    predictions: Path,
    folder: Path,
    against: Path | None = None,
    *,
    split: Cohorts = "all",
    margin: float = MARGIN,
) -> Receipt:
    """The same for a file of published predictions, and where there is one `against` which to compare it.

    The files are CSV, see `predictions_from_csv`; `folder` is in the NIH layout and needs no images. What is compared
    are the images of the split that every file has. `Data.sha256` is then that of lines of a file's name and sha256.

    Raises DatasetError where a file cannot be used, names images that the data set has not, or has none of the split.
    """
    began = environment()
    dataset = NihDataset.open(folder)
    in_split = _split(dataset, split)
    files = [path for path in (against, predictions) if path is not None]
    found = [predictions_from_csv(path, LABELS) for path in files]
    known = {record.image for record in dataset}
    for path, rows in zip(files, found, strict=True):
        if unknown := [image for image in rows if image not in known]:
            raise DatasetError(
                f"predictions {path} name {len(unknown)} images that {folder} does not list, {unknown[0]} first; expected "
                "predictions of this data set: take its data entry file, or only the rows of its images"
            )
    records = [record for record in in_split if all(record.image in rows for rows in found)]
    if not records:
        raise DatasetError(
            f"no image of {folder} ({split}) is in {' and '.join(map(str, files))}; expected the column Image Index to "
            "name images of the split"
        )
    trial = _trial(records, LABELS, Sigmoid(), margin)
    answers = [
        _file_answers(trial, path, np.array([rows[image] for image in trial.images]))
        for path, rows in zip(files, found, strict=True)
    ]
    reference = answers[0] if against else None
    return Receipt(
        bundle=None,
        network=None,
        checkpoint=None,
        data=Data(
            folder=folder.resolve().name,
            split=split,
            limit=None,
            sample=None,
            images=len(records),
            patients=len(np.unique(trial.cohort.patients)),
            absent=len(in_split) - len(records),
            unreadable=(),
            sha256=_sha256((path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files),
            annotated=LABELS,
            unannotated=(),
        ),
        margin=margin,
        reference=reference.candidate if reference else None,
        boxes_reference=None,
        preprocessing=None,
        dicom=(),
        results=tuple(judged(each, reference) for each in answers),
        environment=began,
    )


# --- which images, and who answers them --------------------------------------------------------------------


def _split(dataset: NihDataset, split: Cohorts) -> NihDataset:
    """Raises DatasetError where an image is listed twice: a name stands for one image, its labels and its answers."""
    chosen = dataset if split == "all" else dataset.split(split)
    if twice := [image for image, rows in Counter(record.image for record in chosen).items() if rows > 1]:
        raise DatasetError(
            f"{dataset.folder} lists {len(twice)} images more than once, {twice[0]} first; expected a row each: remove "
            "the others from the data entry file"
        )
    return chosen


def _chosen(records: Sequence[NihRecord], options: ParityOptions) -> list[NihRecord]:
    if options.sample is not None:
        images = Counter(record.patient for record in records)
        drawn: set[int] = set()
        left = options.sample
        for patient in np.random.default_rng(_SEED).permutation(sorted(images)).tolist():
            if left > 0:
                drawn.add(patient)
                left -= images[patient]
        records = [record for record in records if record.patient in drawn]
    return list(records[: options.limit])


def _boxed(dataset: NihDataset, manifest: Manifest) -> tuple[str, ...]:
    """The findings that have annotated boxes in the data set."""
    annotated = {box.finding for record in dataset for box in record.boxes}
    return tuple(label for label in manifest.labels if label in annotated)


def _items(records: Sequence[NihRecord], boxed: tuple[str, ...]) -> list[Item]:
    """In order; on an image with boxes every finding that has some is looked for, as Wang et al. did."""
    return [
        Item(index=index, image=record.image, path=record.path, located=boxed if record.boxes else ())
        for index, record in enumerate(records)
        if record.path is not None  # they are at hand
    ]


def _runs(bundle: Bundle, options: ParityOptions, located: bool) -> tuple[list[Run], str | None]:
    """The reference first; and the checkpoint's sha256 where there is one."""
    candidates = runnable(bundle, options.candidates)
    checkpoint = None
    if options.checkpoint is not None:
        reference, checkpoint = torch_run(bundle.manifest, options.checkpoint, options.network)
    else:
        (oracle,) = runnable(bundle, [(FP32.backend, FP32.precision)])
        reference = engine_run(bundle, oracle, located)
    others = [engine_run(bundle, each, located) for each in candidates if each != reference.candidate]
    if options.server is not None:
        others.append(server_run(bundle, options.server, located))
    elif options.serve:
        others.append(served_run(bundle, served(bundle, candidates), located))
    return [reference, *others], checkpoint


# --- their answers, side by side -----------------------------------------------------------------------------


def _sha256(files: Iterable[tuple[str, str | None]]) -> str:
    """Of files by name and sha256, see `Data`."""
    return hashlib.sha256("".join(sorted(f"{name} {sha256}\n" for name, sha256 in files)).encode()).hexdigest()


def _trial(records: Sequence[NihRecord], labels: tuple[str, ...], activation: Activation, margin: float) -> Trial:
    annotated = tuple(label for label in labels if label in LABELS)
    positive = [[label in record.labels for label in annotated] for record in records]
    return Trial(
        images=tuple(record.image for record in records),
        labels=labels,
        activation=activation,
        cohort=Cohort(
            labels=annotated,
            positive=np.array(positive, np.bool_).reshape(len(records), len(annotated)),
            patients=np.array([record.patient for record in records]),
        ),
        margin=margin,
    )


def _file_answers(trial: Trial, path: Path, probabilities: npt.NDArray[np.float64]) -> Answers:
    """Of `probabilities` `(N, 14)`."""
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise DatasetError(f"predictions {path} hold values that are no probabilities; expected 0 to 1 in every column")
    return Answers(
        trial=trial,
        candidate=Candidate(backend=path.name, precision="", through="file"),
        logits=logit(probabilities.clip(_NEAREST, 1 - _NEAREST)).astype(np.float32),
        probabilities=probabilities,
        ranked=probabilities,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Everyone:
    """What each candidate that ran said of each image, the reference first.

    A candidate is compared on the images that it and the reference answered: what it did not answer fails it, and takes
    nothing from what the others show.
    """

    manifest: Manifest
    records: Sequence[NihRecord]
    items: Sequence[Item]
    found: dict[Candidate, Scores]
    margin: float

    def _rows(self, *candidates: Candidate) -> list[int]:
        """The images that all of these answered."""
        each = zip(*(self.found[candidate].errors for candidate in candidates), strict=True)
        return [row for row, errors in enumerate(each) if all(error is None for error in errors)]

    @cached_property
    def _anyone(self) -> list[bool]:
        """Whether an image was answered by somebody: `(images,)`."""
        return [None in errors for errors in zip(*(scores.errors for scores in self.found.values()), strict=True)]

    @cached_property
    def reference(self) -> Answers:
        """Its answers. Raises DatasetError where there are none."""
        candidate, scores = next(iter(self.found.items()))
        if not (rows := self._rows(candidate)):
            raise DatasetError(
                f"none of {len(self.records)} images was answered by the reference, {candidate} ({scores.errors[0]}); "
                "expected readable PNG files"
            )
        return self._answers(candidate, rows)

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Images that nobody answered."""
        return tuple(record.image for record, anyone in zip(self.records, self._anyone, strict=True) if not anyone)

    @property
    def sha256(self) -> str:
        """Of the images that the reference answered, see `Data`."""
        scores = self.found[self.reference.candidate]
        return _sha256((scores.images[row], scores.sha256[row]) for row in self._rows(self.reference.candidate))

    @property
    def boxes_reference(self) -> Candidate | None:
        """See `Receipt`: PyTorch gives no boxes, and without it FP32 is the reference."""
        return FP32 if FP32 in self.found else None

    def _answers(self, candidate: Candidate, rows: list[int], trial: Trial | None = None) -> Answers:
        """What one candidate said of these images; without a `trial`, in one of their own."""
        scores, manifest = self.found[candidate], self.manifest
        logits = scores.logits[rows]  # (N, C)
        return Answers(
            trial=trial
            or _trial([self.records[row] for row in rows], manifest.labels, manifest.activation, self.margin),
            candidate=candidate,
            logits=logits,
            probabilities=scores.probabilities[rows],
            ranked=manifest.activation.log_odds(logits),
            unanswered=tuple(
                Unanswered(image=image, error=error)
                for image, error, anyone in zip(scores.images, scores.errors, self._anyone, strict=True)
                if error is not None and anyone
            ),
        )

    def result(self, candidate: Candidate) -> Result:
        """What `judged` says, and what needs operating points or boxes."""
        answers = reference = self.reference
        rows = self._rows(reference.candidate, candidate)
        if not rows:
            return broken(
                candidate, f"it answered none of the images: {next(filter(None, self.found[candidate].errors))}"
            )
        if candidate != reference.candidate:
            if len(rows) < len(reference.trial.images):
                reference = self._answers(reference.candidate, rows)
            answers = self._answers(candidate, rows, reference.trial)
        trial, manifest = answers.trial, self.manifest
        cuts = thresholds(manifest.operating_points, manifest.activation)
        ours, theirs = (reported(each.logits, cuts, manifest.activation) for each in (answers, reference))  # (N, C)
        compared = answers is not reference
        return msgspec.structs.replace(
            judged(answers, reference),
            operating=operating(trial.cohort.labels, trial.cohort.positive, ours[:, trial.columns]),
            changes=changes(trial.labels, ours, theirs, trial.cohort.patients) if compared else (),
            localisation=self._localisation(candidate, rows),
            boxes=self._box_agreement(candidate, rows),
        )

    def _localisation(self, candidate: Candidate, rows: Sequence[int]) -> tuple[Localisation, ...]:
        """On the images with boxes, of the findings that some of them are annotated with."""
        rows = [row for row in rows if self.items[row].located]
        if candidate.through == "torch" or not rows:
            return ()
        annotated = {box.finding for row in rows for box in self.records[row].boxes}
        findings = [label for label in self.manifest.labels if label in annotated]
        scores = self.found[candidate]
        return localisation([self.records[row].boxes for row in rows], [scores.located(row) for row in rows], findings)

    def _box_agreement(self, candidate: Candidate, rows: Sequence[int]) -> tuple[BoxAgreement, ...]:
        if candidate.through == "torch" or self.boxes_reference in (None, candidate):
            return ()
        theirs = self.found[FP32]
        rows = [row for row in rows if theirs.errors[row] is None]
        ours = self.found[candidate]
        return box_agreement(
            [ours.boxes(row) for row in rows], [theirs.boxes(row) for row in rows], self.manifest.labels
        )
