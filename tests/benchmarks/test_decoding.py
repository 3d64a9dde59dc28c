"""`thoraxrt.benchmarks.decoding`: its figures belong together, and what cannot be decoded is left out."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from thoraxrt.benchmarks import decoding
from thoraxrt.benchmarks.decoding import compare_decoders


def png() -> bytes:
    out = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def test_compare_decoders() -> None:
    result = compare_decoders("small", [png()] * 3, workers=1, rounds=2)
    assert (result["kind"], result["files"], result["bytes"]) == ("small", 3, len(png()))
    assert result["ceiling_per_s"] == pytest.approx(1000 / result["direct_ms"])
    assert all(result[name] > 0 for name, _, _ in decoding._ROWS if name != "added_ms")


def test_a_folder_gives_one_line_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, data in (("a.png", png()), ("b.png", png()[:-9]), ("c.dcm", b"")):
        (tmp_path / name).write_bytes(data)
    decoding.main(tmp_path, workers=1)
    said = json.loads(capsys.readouterr().out)
    (result,) = said["results"]
    assert (said["scenario"], said["workers"], result["files"]) == ("decoding", 1, 1)
    assert said["start_ms"] > 0
    (tmp_path / "a.png").unlink()
    with pytest.raises(typer.BadParameter, match="no radiographs"):
        decoding.main(tmp_path)


def test_a_phantom_is_a_file_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_PHANTOMS", 1)
    png_file, dicom_file = (decoding.decode(files[0], keep_stored=True) for files in decoding._files(None).values())
    assert (png_file.width, png_file.source.format) == (1024, "png")
    assert (dicom_file.width, dicom_file.source.format, dicom_file.source.bits) == (2048, "dicom", 12)
    np.testing.assert_array_equal(dicom_file.values[::2, ::2] >> 4, png_file.values)
