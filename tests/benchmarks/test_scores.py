"""Scores survive what happens to a writer, and are what any Parquet reader says they are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thoraxrt.benchmarks import scores
from thoraxrt.benchmarks.scores import PART_ROWS, Header, Row, Writer, read, table_from_rows
from thoraxrt.engine.boxes import Box, Peak
from thoraxrt.engine.errors import DatasetError, RequestError

HEADER = Header(
    labels=("Effusion", "Nodule", "Mass"),
    bundle_sha256="ab" * 32,
    backend="openvino",
    precision="fp16",
    through="engine",
)


def box(finding: str, rng: np.random.Generator) -> Box:
    x, y, width, height, score, peak_x, peak_y = rng.random(7).tolist()
    return Box(finding=finding, x=x, y=y, width=width, height=height, score=score, peak=Peak(x=peak_x, y=peak_y))


def row(index: int) -> Row:
    """A third have an error; a file of every fifth could be read, of the others not."""
    rng = np.random.default_rng(index)
    name = f"images_{index % 3:03d}/{index}.png"
    if index % 3 == 0:
        return Row(index=index, image=name, sha256="cd" * 32 if index % 5 == 0 else None, error=f"no image {index}")
    return Row(
        index=index,
        image=name,
        sha256=f"{index:064x}",
        width=int(rng.integers(1, 4096)),
        height=int(rng.integers(1, 4096)),
        logits=rng.normal(size=3).astype(np.float32),
        probabilities=rng.random(3),
        boxes=[box(finding, rng) for finding in HEADER.labels[: index % 4]],
        located=[box("Mass", rng)] * (index % 2),
    )


def write(folder: Path, rows: Sequence[Row], header: Header = HEADER) -> None:
    with Writer(folder, header) as writer:
        writer.write(rows)


def test_what_was_written_is_read_in_the_order_of_the_input(tmp_path: Path) -> None:
    rows = [row(index) for index in range(2 * PART_ROWS + 10)]
    write(tmp_path, [rows[at] for at in np.random.default_rng(0).permutation(len(rows))])
    found = read(tmp_path)
    assert found.header == HEADER
    assert len(found) == len(rows)
    assert found.images == tuple(row.image for row in rows)
    assert found.sha256 == tuple(row.sha256 for row in rows)
    assert found.errors == tuple(row.error for row in rows)
    assert found.logits.dtype == np.float32
    assert found.probabilities.dtype == np.float64
    for at, expected in enumerate(rows):
        assert found.boxes(at) == tuple(expected.boxes)
        assert found.located(at) == tuple(expected.located)
        assert (found.width[at], found.height[at]) == (expected.width or 0, expected.height or 0)
        if expected.logits is None or expected.probabilities is None:
            assert np.isnan(found.logits[at]).all()
            assert np.isnan(found.probabilities[at]).all()
        else:
            np.testing.assert_array_equal(found.logits[at], expected.logits)
            np.testing.assert_array_equal(found.probabilities[at], expected.probabilities)


def test_the_folder_is_what_its_description_says_to_a_reader_that_knows_nothing_of_us(tmp_path: Path) -> None:
    rows = [row(index) for index in range(PART_ROWS + 4)]
    write(tmp_path, rows)
    assert sorted(path.name for path in tmp_path.glob("*.parquet")) == ["part-000000.parquet", "part-000001.parquet"]
    table = pq.read_table(tmp_path)
    assert table.num_rows == len(rows)
    assert json.loads(table.schema.metadata[b"thoraxrt"]) == json.loads(msgspec.json.encode(HEADER))
    documented = [line.strip() for line in (read.__doc__ or "").splitlines() if line.strip().startswith("- `")]
    assert ", ".join(line.partition(":")[0][2:] for line in documented).replace("`", "").split(", ") == (
        table.column_names
    )
    answered = table.to_pylist()[1]
    assert answered["probabilities"] == pytest.approx(rows[1].probabilities)
    assert answered["boxes"] == msgspec.to_builtins(list(rows[1].boxes))


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
from thoraxrt.benchmarks import scores
from tests.benchmarks.test_scores import HEADER

folder, rows = Path(sys.argv[1]), 120
scores.PART_ROWS = 4

def write():
    with scores.Writer(folder, HEADER) as writer:
        for index in range(rows):
            if f"{index}.png" not in writer.done:
                logits = np.full(3, index, np.float32)
                row = scores.Row(index=index, image=f"{index}.png", sha256="0" * 64, width=1, height=1,
                                 logits=logits, probabilities=logits / rows)
                writer.write([row])

scores.table_from_rows([], HEADER)  # pyarrow imports pandas then, where it is: here once, not in every child
random.seed(7)
killed = progress = 0
while True:
    child = os.fork()
    if not child:
        write()
        os._exit(0)
    time.sleep(random.uniform(0, 0.05 + 0.01 * killed))  # longer, else a slow machine never gets anywhere
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] == 0:
        break
    killed += 1
    if list(folder.glob("part-*")):
        found = scores.read(folder)  # raises where a part is not whole, or an image is there twice
        assert len(found) >= progress, "a row is lost"
        progress = len(found)
print(killed)
"""


def test_a_writer_killed_at_random_moments_loses_nothing_and_writes_nothing_twice(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1
    found = read(tmp_path)
    assert found.images == tuple(f"{index}.png" for index in range(120))
    np.testing.assert_array_equal(found.logits[:, 0], np.arange(120))
    assert not list(tmp_path.glob("*.unfinished"))


def test_what_a_killed_writer_left_unfinished_is_removed(tmp_path: Path) -> None:
    write(tmp_path, [row(1)])
    left = tmp_path / ".part-000001.parquet.unfinished"
    left.write_bytes(b"PAR1")
    assert read(tmp_path).images == (row(1).image,)
    with Writer(tmp_path, HEADER) as writer:
        assert not left.exists()
        assert writer.done == {row(1).image}


def test_an_exception_keeps_what_was_written_before_it(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Row]:
        yield row(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Writer(tmp_path, HEADER) as writer:
        writer.write(interrupted())
    assert read(tmp_path).images == (row(1).image,)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"labels": ("Effusion",)}, "its labels is Effusion, Nodule, Mass, expected Effusion;"),
        ({"bundle_sha256": "ef" * 32}, "its bundle_sha256 is abab"),
        ({"precision": "int8"}, "its precision is fp16, expected int8;.* take another folder"),
        ({"through": "server"}, "its through is engine, expected server"),
        ({"versions": {"numpy": "3.0", "openvino": "2"}}, "its versions is not known, expected numpy 3.0, openvino 2;"),
    ],
)
def test_scores_of_something_else_are_not_added_to(tmp_path: Path, other: dict[str, object], expected: str) -> None:
    write(tmp_path, [row(1)])
    with pytest.raises(RequestError, match=expected):
        Writer(tmp_path, msgspec.structs.replace(HEADER, **other))
    with Writer(tmp_path, HEADER):  # the refused writer holds no lock
        pass


def test_parts_of_two_headers_are_not_read_as_one(tmp_path: Path) -> None:
    write(tmp_path, [row(1)])
    write(tmp_path / "other", [row(2)], msgspec.structs.replace(HEADER, precision="fp32"))
    (tmp_path / "other" / "part-000000.parquet").rename(tmp_path / "part-000001.parquet")
    with pytest.raises(RequestError, match=r"part-000001.parquet: its precision is fp32, expected fp16"):
        read(tmp_path)


def test_a_second_writer_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    with Writer(tmp_path, HEADER), pytest.raises(RequestError, match="another process writes to"):
        Writer(tmp_path, HEADER)
    Writer(tmp_path, HEADER).close()


def test_a_file_that_could_not_be_read_is_tried_again(tmp_path: Path) -> None:
    rows = [row(index) for index in range(12)]
    write(tmp_path, rows)
    with Writer(tmp_path, HEADER) as writer:
        assert writer.done == {row.image for row in rows if row.sha256}
        assert writer.failed == 1  # row 0, whose bytes are no image
        writer.write([replace(rows[3], sha256="0" * 64, error="no image")])
        assert writer.failed == 2
    assert read(tmp_path).images == tuple(row.image for row in rows if row.sha256 or row.index == 3)
    assert read(tmp_path).errors[:4] == ("no image 0", None, None, "no image")


def test_a_table_of_another_process_is_a_part_without_what_is_there(tmp_path: Path) -> None:
    rows = [row(index) for index in (1, 2, 4, 5)]
    with Writer(tmp_path, HEADER) as writer:
        writer.write_table(table_from_rows(rows[1:], HEADER))
        writer.write_table(table_from_rows(rows[:2], HEADER))
        writer.write_table(table_from_rows(rows[:2], HEADER))
        assert writer.done == {row.image for row in rows}
    assert read(tmp_path).images == tuple(row.image for row in rows)
    assert len(list(tmp_path.glob("part-*"))) == 2


def test_an_image_that_is_there_twice_is_said(tmp_path: Path) -> None:
    write(tmp_path, [row(1), row(2)])
    (tmp_path / "part-000007.parquet").write_bytes((tmp_path / "part-000000.parquet").read_bytes())
    with pytest.raises(DatasetError, match=r"holds images_001/1.png twice; expected each image once"):
        read(tmp_path)


def test_what_is_no_part_is_said(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no scores; expected part-"):
        read(tmp_path)
    pq.write_table(pa.table({"image": ["a"], "sha256": ["0"], "error": ["b"]}), tmp_path / "part-000000.parquet")
    for use in (read, lambda folder: Writer(folder, HEADER)):
        with pytest.raises(DatasetError, match="is not a part of scores of this version"):
            use(tmp_path)
    (tmp_path / "part-000000.parquet").write_bytes(b"PAR1 and nothing else")
    for use in (read, lambda folder: Writer(folder, HEADER)):
        with pytest.raises(DatasetError, match=r"part-000000.parquet cannot be read \(ArrowInvalid\)"):
            use(tmp_path)


def test_a_part_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "PART_ROWS", 3)
    write(tmp_path, [row(index) for index in range(1, 9)])
    sizes = [pq.read_metadata(part).num_rows for part in sorted(tmp_path.glob("part-*"))]
    assert sizes == [3, 3, 2]
