"""Accuracy against labels: AUROC per finding.

Owns the joining of predictions with a data set; the metrics' arithmetic is scikit-learn's where it has any.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

from thoraxrt.engine.errors import DatasetError

__all__ = ["auroc_per_finding", "predictions_from_csv"]


def auroc_per_finding(
    positive: npt.NDArray[np.uint8], scores: npt.NDArray[np.floating], findings: Sequence[str]
) -> dict[str, float | None]:
    """The area under the ROC curve of each finding, None where it has no positives or no negatives.

    `positive` is `(N, C)`, 1 where the image is labelled with the finding; `scores` `(N, C)`,
    logits or probabilities; both in the order of `findings`.
    """
    return {
        finding: float(roc_auc_score(truth, score)) if 0 < truth.sum() < len(truth) else None
        for finding, truth, score in zip(findings, positive.T, scores.T, strict=True)
    }


def predictions_from_csv(path: Path, findings: Sequence[str]) -> Mapping[str, npt.NDArray[np.float64]]:
    """Read published predictions: `Image Index` and one `prob_<finding>` column per finding.

    Returns each image's probabilities float64 `(C,)`, in the order of `findings`. Raises
    DatasetError where the file cannot be read or a column or number is missing.
    """
    try:
        with path.open(newline="") as file:
            return {
                row["Image Index"]: np.array([float(row[f"prob_{finding}"]) for finding in findings])
                for row in csv.DictReader(file)
            }
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise DatasetError(
            f"predictions {path} cannot be read ({type(error).__name__}: {error}); expected a CSV with the columns "
            "'Image Index' and 'prob_<finding>'"
        ) from error
