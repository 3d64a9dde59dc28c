"""One pass over images: what an engine and a server say is what is kept, and no image stops the others."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from tests.server.conftest import LABELS, encoded, tiny_graph, write_bundle
from thoraxrt import __version__
from thoraxrt.benchmarks.scores import PART_ROWS, Header, Scores, Writer, read
from thoraxrt.benchmarks.scoring import (
    Answer,
    EncodedImage,
    Item,
    answered_rows,
    engine_answerer,
    engine_header,
    open_engine,
    score,
    server_answerer,
    versions,
)
from thoraxrt.engine.bundle import MANIFEST, Bundle
from thoraxrt.engine.engine import Engine, Prediction
from thoraxrt.engine.errors import BackendError, ImageFormatError, ServerError, ThoraxrtError
from thoraxrt.engine.postprocess import Activation, Sigmoid, SigmoidOpNorm, Softmax
from thoraxrt.server.client import Client
from thoraxrt.server.serve import running_server

HEADER = Header(labels=LABELS, bundle_sha256="0" * 64, backend="none", precision="fp32", through="engine")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "tiny.bundle", tiny_graph())


def items_of(folder: Path, files: dict[str, bytes | None], located: tuple[str, ...] = ()) -> list[Item]:
    """Items for files with these contents, None for one that is not there."""
    for name, data in files.items():
        if data is not None:
            (folder / name).write_bytes(data)
    return [Item(index=at, image=name, path=folder / name, located=located) for at, name in enumerate(files)]


def some(count: int) -> dict[str, bytes | None]:
    return {f"{index}.png": encoded(index) for index in range(count)}


MIXED: dict[str, bytes | None] = {
    "missing first.png": None,
    **some(3),
    "missing.png": None,
    "text.png": b"no image",
    "empty.png": b"",
    "last.png": encoded(9),
    "missing last.png": None,
}


def scored(items: Sequence[Item], engine: Engine, folder: Path) -> Scores:
    with Writer(folder, engine_header(engine)) as writer:
        score(items, engine_answerer(engine, located=True), writer)
    return read(folder)


def test_what_the_engine_says_is_what_is_kept(bundle: Bundle, tmp_path: Path) -> None:
    items = items_of(tmp_path, MIXED, located=("Mass", "Effusion"))
    with open_engine(bundle, backend="onnxruntime", batch=2) as engine:
        found = scored(items, engine, tmp_path / "scores")
        expected = list(engine.predict([item.path for item in items]))
    assert found.header == Header(
        labels=LABELS,
        bundle_sha256=bundle.sha256,
        backend="onnxruntime",
        precision="fp32",
        through="engine",
        versions=versions("onnxruntime"),
    )
    assert found.header.versions["thoraxrt"] == __version__
    assert any(name.startswith("onnxruntime") for name in found.header.versions)
    assert "openvino" not in found.header.versions
    assert found.images == tuple(MIXED)
    assert found.sha256 == tuple(None if data is None else hashlib.sha256(data).hexdigest() for data in MIXED.values())
    for at, answer in enumerate(expected):
        if isinstance(answer, Prediction):
            assert found.errors[at] is None
            assert (found.width[at], found.height[at]) == (answer.width, answer.height)
            assert found.logits[at].tolist() == [finding.logit for finding in answer.findings]
            assert found.probabilities[at].tolist() == [finding.probability for finding in answer.findings]
            assert found.boxes(at) == answer.boxes
        else:
            assert found.errors[at] == str(answer)
    assert sum(error is None for error in found.errors) == 4
    assert any(found.boxes(at) for at in range(len(found)))


@pytest.mark.parametrize(
    ("activation", "point"),
    [(Sigmoid(), 1 - 1e-12), (Softmax(), 0.3), (SigmoidOpNorm(thresholds=(0.1, 0.5, 0.3)), 1 - 1e-12)],
)
def test_boxes_that_are_asked_for_are_those_of_a_reported_finding(
    activation: Activation, point: float, tmp_path: Path
) -> None:
    """Where a finding is reported, its boxes are there twice, by two ways; where it is not, only where asked for."""
    changed = write_bundle(tmp_path / "other.bundle", tiny_graph())
    *points, last = changed.manifest.operating_points
    manifest = msgspec.structs.replace(
        changed.manifest,
        activation=activation,
        operating_points=(*points, msgspec.structs.replace(last, probability=point)),
    )
    (changed.path / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    items = items_of(tmp_path, some(6), located=LABELS)
    with open_engine(Bundle.open(changed.path), backend="onnxruntime") as engine:
        found = scored(items, engine, tmp_path / "scores")
        answers = [answer for answer in engine.predict([item.path for item in items]) if isinstance(answer, Prediction)]
    reported = 0
    for at, answer in enumerate(answers):
        for finding in answer.findings:
            boxes = [box for box in found.boxes(at) if box.finding == finding.finding]
            located = [box for box in found.located(at) if box.finding == finding.finding]
            assert located, "no CAM of a picture with patches is flat"
            assert boxes == (located if finding.reported else [])
            reported += finding.reported
    assert 0 < reported < 6 * len(LABELS)


def test_a_server_gives_the_engines_scores(bundle: Bundle, tmp_path: Path) -> None:
    items = items_of(tmp_path, MIXED, located=("Nodule",))
    with open_engine(bundle, backend="onnxruntime") as engine:
        ours = scored(items, engine, tmp_path / "ours")
        with running_server(engine) as port, Client(f"127.0.0.1:{port}") as client:
            model = client.model()
            with Writer(tmp_path / "theirs", msgspec.structs.replace(ours.header, through="server")) as writer:
                score(items, server_answerer(client, model, located=True), writer)
            theirs = read(tmp_path / "theirs")
            other = msgspec.structs.replace(model, manifest_sha256="ab" * 32)
            with pytest.raises(ServerError, match=r"answers with bundle .* by now, expected bundle abababababab on"):
                list(answered_rows(items, server_answerer(client, other)))
    assert theirs.images == ours.images
    assert theirs.sha256 == ours.sha256
    assert theirs.errors == ours.errors
    np.testing.assert_array_equal(theirs.logits, ours.logits)
    np.testing.assert_array_equal(theirs.probabilities, ours.probabilities)
    for at in range(len(ours)):
        assert theirs.boxes(at) == ours.boxes(at)
        assert theirs.located(at) == ours.located(at)


def test_an_answer_that_is_not_finite_is_the_images_error(tmp_path: Path) -> None:
    faulty = write_bundle(tmp_path / "faulty.bundle", tiny_graph(faulty=True))
    items = items_of(tmp_path, some(2))
    with open_engine(faulty, backend="onnxruntime") as engine:
        rows = list(answered_rows(items, engine_answerer(engine)))
    assert [str(row.error).partition(" for")[0] for row in rows] == [
        "onnxruntime fp32 gave values that are not finite"
    ] * 2


def fake(limit: float = np.inf, ahead: int = 4) -> Callable[[Iterable[EncodedImage]], Iterator[Answer | ThoraxrtError]]:
    """Answers with how many bytes an image has, `ahead` images behind; breaks at an image of `limit` bytes."""

    def answers(images: Iterable[EncodedImage]) -> Iterator[Answer | ThoraxrtError]:
        waiting: list[int] = []
        for image in images:
            waiting.append(len(image.data))
            if len(waiting) > ahead:
                yield answer(waiting.pop(0))
        yield from map(answer, waiting)

    def answer(size: int) -> Answer | ThoraxrtError:
        if size >= limit:
            return BackendError("the runtime broke")
        if size % 5 == 4:
            return ImageFormatError("not an image")
        logits = np.full(len(LABELS), size, np.float32)
        return Answer(
            width=size, height=1, logits=logits, probabilities=logits.astype(np.float64), boxes=(), located=()
        )

    return answers


def test_after_an_engine_has_failed_the_next_run_goes_on_from_there(tmp_path: Path) -> None:
    items = items_of(tmp_path, {f"{size}.png": b"x" * size for size in range(1, 30)})
    with pytest.raises(BackendError, match="the runtime broke"), Writer(tmp_path / "scores", HEADER) as writer:
        score(items, fake(limit=20), writer)
    assert read(tmp_path / "scores").images == tuple(f"{size}.png" for size in range(1, 20))
    drawn: list[int] = []

    def watched(images: Iterable[EncodedImage]) -> Iterator[Answer | ThoraxrtError]:
        return fake()(drawn.append(len(image.data)) or image for image in images)  # type: ignore[func-returns-value]

    seen: list[tuple[str, int]] = []

    def track(rows: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        seen.append((description, total))
        return rows

    with Writer(tmp_path / "scores", HEADER) as writer:
        score(items, watched, writer, track)
        assert writer.failed == 6
    assert drawn == list(range(20, 30))
    assert seen == [("Scoring", 10)]
    assert read(tmp_path / "scores").images == tuple(item.image for item in items)


def test_a_name_that_comes_twice_is_scored_once(tmp_path: Path) -> None:
    first, second = items_of(tmp_path, {"a.png": b"xx", "b.png": b"xxx"})
    again = Item(index=2, image="a.png", path=second.path)
    rows = list(answered_rows([first, second, again], fake()))
    assert [(row.image, row.width) for row in rows] == [("a.png", 2), ("b.png", 3)]


def test_an_answerer_that_leaves_an_image_out_is_refused(tmp_path: Path) -> None:
    items = items_of(tmp_path, {"a.png": b"x", "b.png": b"x"})
    with pytest.raises(ValueError, match="fewer answers than it was given images"):
        list(answered_rows(items, lambda images: list(fake()(images))[:1]))


class Archive(Sequence[Item]):
    """Many images that are one file, made as they are asked for."""

    def __init__(self, path: Path, count: int) -> None:
        self._path, self._count = path, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if index >= self._count:
            raise IndexError(index)
        return Item(index=index, image=f"{index:08d}.png", path=self._path)


def test_memory_does_not_grow_with_the_archive(tmp_path: Path) -> None:
    """What is kept of an image is its name; a row that were kept would be some 600 bytes more, and its file 2,000."""
    (tmp_path / "a.png").write_bytes(b"x" * 2_000)
    count = 60 * PART_ROWS
    with Writer(tmp_path / "scores", HEADER) as writer:
        tracemalloc.start()
        try:
            score(Archive(tmp_path / "a.png", count), fake(), writer)
            kept, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert pa.total_allocated_bytes() < 5e6
    assert len(read(tmp_path / "scores")) == count
    assert kept / count < 300
    assert peak - kept < 5e6
