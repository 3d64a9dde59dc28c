"""Operating points: from a file, or chosen on a labelled folder by Youden's J."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_curve

from thoraxrt.engine.engine import read_radiograph
from thoraxrt.engine.errors import DatasetError
from thoraxrt.engine.postprocess import Activation, OperatingPoint, logistic
from thoraxrt.engine.preprocess import PreprocessSpec, network_input
from thoraxrt.export import Track, no_progress
from thoraxrt.export.graph import session_from_graph
from thoraxrt.export.nih import NihDataset

__all__ = ["operating_points_from_file", "operating_points_from_folder", "youden"]


def operating_points_from_file(path: Path, labels: Sequence[str]) -> tuple[OperatingPoint, ...]:
    """Read a JSON object of probabilities by finding; findings it leaves out keep 0.5, marked default.

    Raises DatasetError where the file is unreadable, names an unknown finding or leaves 0..1.
    """
    try:
        chosen = msgspec.json.decode(path.read_bytes(), type=dict[str, float])
        if unknown := sorted(set(chosen) - set(labels)):
            raise ValueError(f"unknown finding {', '.join(unknown)}; expected {', '.join(labels)}")
        return tuple(
            OperatingPoint(finding=label, probability=chosen[label], method="file", data=path.name)
            if label in chosen
            else OperatingPoint(finding=label)
            for label in labels
        )
    except OSError as error:
        raise DatasetError(f"operating points {path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise DatasetError(f'operating points {path}: {error}; expected JSON such as {{"{labels[0]}": 0.3}}') from error


def operating_points_from_folder(
    folder: Path,
    graph: bytes,
    labels: Sequence[str],
    spec: PreprocessSpec,
    activation: Activation,
    track: Track = no_progress,
) -> tuple[OperatingPoint, ...]:
    """Choose each finding's operating point on the train_val images present in an NIH-layout folder.

    The test images are never looked at. A finding that the data set does not label, or that all or
    none of its images show, keeps 0.5, marked default. Raises DatasetError, ImageError.
    """
    dataset = NihDataset.open(folder).split("train_val").present()
    paths = [record.path for record in dataset if record.path is not None]
    if not paths:
        raise DatasetError(f"{folder} has no train_val image to choose operating points on")
    session = session_from_graph(graph)
    logits = np.concatenate(
        [
            session.run(["logits"], {"image": network_input(read_radiograph(path).pixels, spec)[np.newaxis]})[0]
            for path in track(paths, "Choosing operating points", len(paths))
        ]
    )  # (N, C)
    log_odds = activation.log_odds(logits)
    data = f"{len(paths)} train_val images of {folder.name}"
    return tuple(
        youden(
            label,
            log_odds[:, column],
            np.array([label in record.labels for record in dataset]),
            data,
            partial(activation.probability, index=column),
        )
        for column, label in enumerate(labels)
    )


def youden(
    finding: str,
    log_odds: npt.NDArray[np.floating],
    positive: npt.NDArray[np.bool_],
    data: str,
    probability: Callable[[float], float] = logistic,
) -> OperatingPoint:
    """The operating point that maximises sensitivity + specificity - 1 (Youden, Cancer 3:32, 1950).

    `log_odds` float `(N,)` as the activation makes them of the logits (for sigmoid the logits
    themselves), `positive` bool `(N,)`; `probability` is the activation's for this finding. The
    threshold lies midway between the lowest value above it and the highest below, so that
    rounding does not move an image across.
    Of equal maxima the one with the highest sensitivity is taken. Without both positives and
    negatives, where nothing beats chance, or where the threshold's probability rounds to 0 or 1 (a
    softmax that is certain), the answer is 0.5, marked default.
    """
    if positive.all() or not positive.any():
        return OperatingPoint(finding=finding)
    false_rate, true_rate, thresholds = roc_curve(positive, log_odds, drop_intermediate=False)
    gain = true_rate - false_rate
    if not gain.max() > 0:  # no threshold is better than chance
        return OperatingPoint(finding=finding)
    best = int(np.flatnonzero(gain == gain.max())[-1])
    lowest = float(thresholds[best])
    below = log_odds[log_odds < lowest]
    threshold = (lowest + float(below.max())) / 2 if below.size else lowest - 1.0
    if not 0.0 < (chosen := probability(threshold)) < 1.0:
        return OperatingPoint(finding=finding)
    return OperatingPoint(
        finding=finding,
        probability=chosen,
        method="youden",
        data=data,
        sensitivity=float(true_rate[best]),
        specificity=float(1.0 - false_rate[best]),
    )
