"""`thoraxrt score`: what an archive names, and that a run can be killed and repeated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.server.conftest import encoded, tiny_graph, write_bundle
from thoraxrt.benchmarks.archive import items_in, score_archive
from thoraxrt.benchmarks.scores import read
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.engine import Engine
from thoraxrt.engine.errors import DatasetError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "tiny.bundle", tiny_graph())


def archive(folder: Path, count: int) -> Path:
    for index in range(count):
        below = folder / f"images_{index % 2:03d}"
        below.mkdir(parents=True, exist_ok=True)
        (below / f"{index // 2}.png").write_bytes(encoded(index))
    return folder


def named(source: Path) -> list[tuple[int, str, Path]]:
    return [(item.index, item.image, item.path) for item in items_in(source)]


def test_a_folders_images_have_the_name_of_their_path_below_it(tmp_path: Path) -> None:
    for name in ("b/1.png", "a/1.png", "a/deep/er/2.DCM", "c.jpeg", "a/notes.txt", ".a.png.part"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = ["a/1.png", "a/deep/er/2.DCM", "b/1.png", "c.jpeg"]
    assert named(tmp_path) == [(at, name, tmp_path / name) for at, name in enumerate(names)]
    assert [item.image for item in items_in(tmp_path)[1:3]] == names[1:3]


def test_a_list_names_paths_from_its_own_folder_each_once(tmp_path: Path) -> None:
    source = tmp_path / "list.txt"
    source.write_text("\ufeffb.png\r\n\n a/c.png \n/far/d.dcm\nb.png\n", encoding="utf-8")
    assert named(source) == [
        (0, "b.png", tmp_path / "b.png"),
        (1, "a/c.png", tmp_path / "a" / "c.png"),
        (2, "/far/d.dcm", Path("/far/d.dcm")),
    ]


def test_a_parquet_file_names_paths_in_a_column(tmp_path: Path) -> None:
    source = tmp_path / "list.parquet"
    paths = pa.array(["b.png", None, "/far/d.dcm", "b.png"]).dictionary_encode()
    pq.write_table(pa.table({"patient": [1, 2, 3, 4], "path": paths}), source)
    assert named(source) == [(0, "b.png", tmp_path / "b.png"), (1, "/far/d.dcm", Path("/far/d.dcm"))]


def test_a_file_name_that_is_no_text_is_shown_as_text(tmp_path: Path, bundle: Bundle) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(encoded())
    assert named(tmp_path) == [(0, "caf\\xe9.png", tmp_path / name)]
    score_archive(tmp_path, tmp_path / "scores", bundle, backend="onnxruntime")
    assert (read(tmp_path / "scores").images, read(tmp_path / "scores").errors) == (("caf\\xe9.png",), (None,))


def test_what_names_no_image_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n\n")
    pq.write_table(pa.table({"file": ["a.png"]}), tmp_path / "other.parquet")
    (tmp_path / "no.parquet").write_bytes(b"no")
    (tmp_path / "no.txt").write_bytes(b"\xff\xfe")
    for name, expected in {
        "empty": "names no image; expected a folder of PNG",
        "empty.txt": "names no image",
        "other.parquet": "expected a Parquet file with a column path",
        "no.parquet": r"cannot be read \(ArrowInvalid\)",
        "no.txt": "is no text; expected a path per line",
        "missing": r"missing cannot be read \(No such file or directory\)",
    }.items():
        with pytest.raises(DatasetError, match=expected):
            items_in(tmp_path / name)


def test_an_archive_that_has_grown_is_scored_where_it_is_new(tmp_path: Path, bundle: Bundle) -> None:
    source, out = archive(tmp_path / "archive", 6), tmp_path / "scores"
    (source / "broken.png").write_bytes(b"no image")
    first = score_archive(source, out, bundle, backend="onnxruntime", batch=2)
    assert (first.images, first.failed, first.scored) == (7, 1, 7)
    assert first.per_s == pytest.approx(first.scored / first.seconds)
    archive(source, 8)
    second = score_archive(source, out, bundle, backend="onnxruntime", batch=4)
    assert (second.images, second.failed, second.scored) == (9, 1, 2)
    found = read(out)
    assert set(found.images) == {item.image for item in items_in(source)}
    with Engine.open(bundle, backend="onnxruntime") as engine:
        for at, image in enumerate(found.images):
            if found.errors[at] is None:
                answer = engine.predict_one(source / image)
                assert found.logits[at].tolist() == [finding.logit for finding in answer.findings]
                assert found.boxes(at) == answer.boxes


RUN = """
import sys
from pathlib import Path
from thoraxrt.benchmarks import scores
from thoraxrt.benchmarks.archive import score_archive
from thoraxrt.engine.bundle import Bundle

scores.PART_ROWS = 4
print(score_archive(Path(sys.argv[1]), Path(sys.argv[2]), Bundle.open(sys.argv[3]), backend="onnxruntime").scored)
"""


def test_a_run_that_was_killed_is_gone_on_with(tmp_path: Path, bundle: Bundle) -> None:
    source, out = archive(tmp_path / "archive", 60), tmp_path / "scores"
    command = [sys.executable, "-c", RUN, source, out, bundle.path]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
        while not list(out.glob("part-*")):
            assert run.poll() is None
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
    there = read(out)
    assert 4 <= len(there) < 60
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(again.stdout) == 60 - len(there)
    found = read(out)
    assert found.images == tuple(item.image for item in items_in(source))
    assert found.images[: len(there)] == there.images
