"""Published predictions: what is no such file is said to be none."""

from __future__ import annotations

from pathlib import Path

import pytest

from thoraxrt.benchmarks.predictions import predictions_from_csv
from thoraxrt.engine.errors import DatasetError


@pytest.mark.parametrize("content", ["", "Image Index\n1.png\n", "Image Index,prob_Mass\n1.png,high\n"])
def test_senseless_predictions(content: str, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(content)
    if content:
        with pytest.raises(DatasetError, match="prob_"):
            predictions_from_csv(tmp_path / "p.csv", ["Mass"])
    with pytest.raises(DatasetError, match="cannot be read"):
        predictions_from_csv(tmp_path / "none.csv", ["Mass"])


def test_excels_byte_order_mark_belongs_to_no_column(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("Image Index,prob_Mass\n1.png,0.25\n", encoding="utf-8-sig")
    assert predictions_from_csv(tmp_path / "p.csv", ["Mass"]) == {"1.png": [0.25]}
