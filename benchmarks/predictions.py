"""Published predictions: a CSV of one probability per image and finding."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from thoraxrt.engine.errors import DatasetError

__all__ = ["predictions_from_csv"]


def predictions_from_csv(path: Path, findings: Sequence[str]) -> Mapping[str, npt.NDArray[np.float64]]:
    """Read published predictions: `Image Index` and one `prob_<finding>` column per finding.

    Returns each image's probabilities float64 `(C,)`, in the order of `findings`. Raises
    DatasetError where the file cannot be read, a column or number is missing, or an image is there twice.
    """
    found: dict[str, npt.NDArray[np.float64]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                if (image := row["Image Index"]) in found:
                    raise ValueError(f"{image} is there twice")
                found[image] = np.array([float(row[f"prob_{finding}"]) for finding in findings])
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise DatasetError(
            f"predictions {path} cannot be read ({type(error).__name__}: {error}); expected a CSV with the columns "
            "'Image Index' and 'prob_<finding>', a row for each image"
        ) from error
    return found
