"""`thoraxrt score`: which images an archive has, who answers them, and what it came to.

Owns the input: a folder, a text list or a Parquet file. Knows neither how an image is answered nor how that is kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from thoraxrt.benchmarks.scores import Writer
from thoraxrt.benchmarks.scoring import Item, engine_answerer, engine_header, open_engine, score
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.engine import image_files, listed_images
from thoraxrt.engine.errors import DatasetError
from thoraxrt.export import Track, no_progress

__all__ = ["Summary", "items_in", "score_archive"]

_COLUMN = "path"
_EXPECTED = f"expected a path per line, in UTF-8, or a folder of radiographs, or a Parquet file with a column {_COLUMN}"


class Summary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the folder of scores holds by now, and what of it this run did.

    `images` rows, of which `failed` have an error; `scored` of them in this run, in `seconds`, which is `per_s` a second.
    """

    images: int
    failed: int
    scored: int
    seconds: float
    per_s: float


def score_archive(
    source: Path,
    out: Path,
    bundle: Bundle,
    *,
    ray: bool = False,
    backend: str | None = None,
    precision: str | None = None,
    device: str | None = None,
    batch: int = 1,
    track: Track = no_progress,
) -> Summary:
    """Score every image of `source` (see `items_in`) into the folder `out` (see `thoraxrt.benchmarks.scores.read`).

    What is there already is not scored again, so that a run which was ended or killed goes on where it stopped, and one
    over an archive that has grown scores what is new. An image that changed under its name is not scored again.

    The bundle answers on this machine, or with `ray` on a cluster (see `thoraxrt.benchmarks.ray_scoring`). `backend`,
    `precision`, `device` and `batch` are those of `Engine.open`.

    Raises DatasetError where the input cannot be read, RequestError where `out` has scores of something else or of other
    versions, and BackendError, which ends a run.
    """
    items = items_in(source)
    start = time.perf_counter()
    if ray:
        from thoraxrt.benchmarks.ray_scoring import ray_header, score_on_ray  # Ray, which not everyone installs

        with Writer(out, ray_header(bundle, backend, precision, device)) as writer:
            before = len(writer.done)
            score_on_ray(items, bundle, writer, device=device, batch=batch, track=track)
    else:
        with (
            open_engine(bundle, backend=backend, precision=precision, device=device, batch=batch) as engine,
            Writer(out, engine_header(engine)) as writer,
        ):
            before = len(writer.done)
            score(items, engine_answerer(engine), writer, track)
    seconds, scored = time.perf_counter() - start, len(writer.done) - before
    return Summary(
        images=len(writer.done), failed=writer.failed, scored=scored, seconds=seconds, per_s=scored / seconds
    )


def items_in(source: Path) -> Sequence[Item]:
    """The images of an archive, in order, each once.

    - a folder: its PNG, JPEG and DICOM files, also those in folders below, sorted; the path relative to the folder is
      the image's name, so that files of one name in two folders are two images
    - a Parquet file (`.parquet`): what its column `path` names; any other file: a text list, a path per line. The path as
      given is the image's name, and is looked for from the list's own folder; one that is listed again is one image

    Raises DatasetError where there is none, or `source` cannot be read.
    """
    if source.is_dir():
        names: Iterable[str] = (str(path.relative_to(source)) for path in image_files(source))
        folder = source
    else:
        names, folder = (
            (_column(source) if source.suffix == ".parquet" else listed_images(source, _EXPECTED)),
            source.parent,
        )
    items = _Items(list(dict.fromkeys(names)), folder)
    if not items:
        raise DatasetError(
            f"{source} names no image; expected a folder of PNG, JPEG or DICOM files, a text file that lists some, or a "
            f"Parquet file with a column {_COLUMN}"
        )
    return items


class _Items(Sequence[Item]):
    """Items made from names as they are asked for: 100,000 paths would take more memory than the images in flight."""

    def __init__(self, names: list[str], folder: Path) -> None:
        self._names, self._folder = names, folder

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        name = self._names[index]
        # A file's name may be no text, and a column of text takes none that is not.
        shown = os.fsencode(name).decode(errors="backslashreplace")
        return Item(index=index, image=shown, path=self._folder / name)


def _column(source: Path) -> list[str]:
    try:
        column = pq.ParquetFile(source).read([_COLUMN])[_COLUMN].drop_null()
        return [str(name) for name in column.cast(pa.string()).to_pylist()]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DatasetError(
            f"{source} cannot be read ({type(error).__name__}); expected a Parquet file with a column {_COLUMN} of paths"
        ) from error
