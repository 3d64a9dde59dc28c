"""The commands that measure, as a user meets them: what they print and write, and with what status they end."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from thoraxrt.benchmarks.bench import read_result
from thoraxrt.benchmarks.receipt import Receipt
from thoraxrt.benchmarks.scores import read
from thoraxrt.cli import main
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.errors import BackendError
from thoraxrt.engine.trust import verify
from thoraxrt.export.nih import LABELS, NihDataset
from thoraxrt.export.phantoms import write_phantoms

IMAGES = 6


class Said(NamedTuple):
    """What a command printed."""

    out: str
    err: str


Run = Callable[..., Said]


@pytest.fixture
def thoraxrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process, which has imported by then what takes seconds in one of its own."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object, status: int = 0) -> Said:
        monkeypatch.setattr(sys, "argv", ["thoraxrt", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = Said(*capsys.readouterr())
        assert (ended.value.code or 0) == status, said
        if status == 2:
            (line,) = said.err.splitlines()
            assert line.startswith("thoraxrt: error: ")
            assert not said.out
        return said

    return run


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, IMAGES, seed=17)
    return folder


def test_dataset_says_what_is_there(thoraxrt: Run, phantoms: Path) -> None:
    assert "Pneumothorax" in thoraxrt("dataset", phantoms).out
    described = json.loads(thoraxrt("dataset", phantoms, "--no-decode", "--json").out)
    assert sum(split["images"] for split in described["splits"]) == IMAGES


def quick(bundle: Bundle, data: Path, work: Path) -> tuple[object, ...]:
    """One candidate on all images, without a server."""
    only = ("--split", "all", "--candidates", "openvino:fp32", "--no-served")
    return ("parity", bundle.path, "--data", data, *only, "--work", work)


def test_parity_shows_and_writes_what_it_found(
    thoraxrt: Run, sample_bundle: Bundle, phantoms: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    bundle = Bundle.open(shutil.copytree(sample_bundle.path, tmp_path / "copy.bundle"))
    page, file = tmp_path / "parity.html", tmp_path / "parity.json"
    written = ("--json", file, "--html", page, "--write", "--sign", private)
    said = thoraxrt(*quick(bundle, phantoms, tmp_path / "work"), *written)
    assert "openvino fp32" in said.out
    receipt = msgspec.json.decode(file.read_bytes(), type=Receipt)
    assert receipt.data.images == IMAGES
    assert "openvino fp32" in page.read_text(encoding="utf-8")
    assert (bundle.path / "parity.json").read_bytes() == file.read_bytes()
    verify(file.read_bytes(), (bundle.path / "parity.sig").read_bytes(), [public])


def test_what_parity_cannot_write_is_refused_before_anything_is_answered(
    thoraxrt: Run, sample_bundle: Bundle, phantoms: Path, tmp_path: Path
) -> None:
    (tmp_path / "no.pem").write_text("no key")
    command = quick(sample_bundle, phantoms, tmp_path / "work")
    for options, expected in (
        (("--json", tmp_path / "missing" / "parity.json"), "parity.json cannot be written"),
        (("--html", tmp_path), "cannot be written; expected a file in a folder that is there"),
        (("--write", "--sign", tmp_path / "no.pem"), "no.pem holds no unencrypted private key"),
        (("--dicom", tmp_path), "holds no DICOM file"),
        (("--sign", tmp_path / "no.pem"), "--sign goes with it"),
        (("--token-file", tmp_path / "token"), "of the connection to a server: add --server, or leave them out"),
    ):
        assert expected in thoraxrt(*command, *options, status=2).err
    assert not (tmp_path / "work").exists()


def test_a_report_that_cannot_be_made_takes_neither_table_nor_receipt_along(
    thoraxrt: Run, sample_bundle: Bundle, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise BackendError("no device is left")

    monkeypatch.setattr("thoraxrt.benchmarks.parity_gallery.gallery", broken)
    bundle = Bundle.open(shutil.copytree(sample_bundle.path, tmp_path / "copy.bundle"))
    written = ("--json", tmp_path / "parity.json", "--html", tmp_path / "parity.html", "--write")
    monkeypatch.setattr(
        sys, "argv", ["thoraxrt", *map(str, quick(bundle, phantoms, tmp_path / "work")), *map(str, written)]
    )
    with pytest.raises(SystemExit, match="2"):
        main()
    assert (tmp_path / "parity.json").read_bytes() == (bundle.path / "parity.json").read_bytes()


def predictions(folder: Path, data: Path, name: str) -> Path:
    file = folder / name
    with file.open("w", newline="") as written:
        writer = csv.writer(written)
        writer.writerow(["Image Index", *(f"prob_{label}" for label in LABELS)])
        for number, record in enumerate(NihDataset.open(data)):
            writer.writerow([record.image, *((number + place) % 10 / 10 for place in range(len(LABELS)))])
    return file


def test_published_predictions_need_no_bundle(thoraxrt: Run, phantoms: Path, tmp_path: Path) -> None:
    ours, theirs = (predictions(tmp_path, phantoms, name) for name in ("ours.csv", "theirs.csv"))
    file, page = tmp_path / "parity.json", tmp_path / "parity.html"
    command = ("parity", "--predictions", ours, "--data", phantoms)
    said = thoraxrt(*command, "--against", theirs, "--json", file, "--html", page)
    assert "ours.csv" in said.out
    assert msgspec.json.decode(file.read_bytes(), type=Receipt).data.images == IMAGES
    assert "theirs.csv" in page.read_text(encoding="utf-8")
    for senseless in (("--limit", 3), ("--sample", 3), ("--server", "localhost:1"), ("--dicom", tmp_path)):
        assert f"{senseless[0]}: expected with a bundle alone" in thoraxrt(*command, *senseless, status=2).err
    assert "expected a bundle, or --predictions" in thoraxrt("parity", "--data", phantoms, status=2).err


def test_the_published_aurocs_are_in_the_file(thoraxrt: Run, nih: Path, tmp_path: Path) -> None:
    """What issue 6 asks for, in its words."""
    file = nih / "predictions" / "densenet121_reproduce-chexnet.csv"
    thoraxrt("parity", "--predictions", file, "--data", nih, "--json", tmp_path / "out.json")
    (result,) = msgspec.json.decode((tmp_path / "out.json").read_bytes(), type=Receipt).results
    with file.with_name("densenet121_reproduce-chexnet_auroc.csv").open(newline="") as published:
        expected = {line["label"]: float(line["auc"]) for line in csv.DictReader(published)}
    found = {each.finding: each.auroc.value for each in result.aurocs if each.auroc}
    assert found == pytest.approx(expected, abs=1e-9)


def test_score_keeps_every_image_and_goes_on(
    thoraxrt: Run, sample_bundle: Bundle, phantoms: Path, tmp_path: Path
) -> None:
    source, out = Path(shutil.copytree(phantoms / "images", tmp_path / "archive")), tmp_path / "scores"
    command = ("score", sample_bundle.path, source, "--out", out, "--backend", "onnxruntime")
    assert f"{IMAGES} images in {out}, 0 of them failed; {IMAGES} scored now" in thoraxrt(*command).out
    (source / "broken.png").write_bytes(b"no image")
    assert f"{IMAGES + 1} images in {out}, 1 of them failed; 1 scored now" in thoraxrt(*command, status=1).out
    assert len(read(out)) == IMAGES + 1
    assert "--engine nonsense: expected local or ray" in thoraxrt(*command, "--engine", "nonsense", status=2).err


def test_bench_compare_ends_with_1_where_something_is_slower(thoraxrt: Run, tmp_path: Path) -> None:
    *_, before = sorted((Path(__file__).resolve().parents[1] / "benchmarks" / "results").glob("bench-2*.json"))
    assert "same" in thoraxrt("bench", "compare", before, before).out
    result = read_result(before)
    slower = {
        name: msgspec.structs.replace(rounds, milliseconds=[1.2 * each for each in rounds.milliseconds])
        for name, rounds in result.turns.items()
    }
    after = tmp_path / "after.json"
    after.write_bytes(msgspec.json.encode(msgspec.structs.replace(result, turns=slower)))
    assert "slower" in thoraxrt("bench", "compare", before, after, status=1).out
    assert "none.json is no result" in thoraxrt("bench", "compare", before, tmp_path / "none.json", status=2).err


def test_a_quick_bench_takes_no_option_that_it_has_no_use_for(thoraxrt: Run, tmp_path: Path) -> None:
    for senseless in (("--seconds", 1), ("--batch", 2), ("--checkpoint", tmp_path / "a.pth")):
        said = thoraxrt("bench", "nowhere.bundle", tmp_path, "--quick", *senseless, status=2)
        assert "leave out --seconds, --batch and --checkpoint" in said.err
