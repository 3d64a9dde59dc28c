"""One answer per image, as Parquet: the columns, the writer that can be killed, the reader.

Knows nothing of engines, servers or data sets. What is written here, any Parquet reader opens.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from thoraxrt.engine.boxes import Box
from thoraxrt.engine.errors import DatasetError, RequestError

__all__ = ["PART_ROWS", "Header", "Row", "Scores", "Writer", "read", "table_from_rows"]

PART_ROWS: Final = 256
"""Rows of a part: what is in memory, and what a killed writer loses, at most."""

_HEADER: Final = b"thoraxrt"
_LOCK: Final = ".lock"
_UNFINISHED: Final = ".unfinished"


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What answered every image of a folder: JSON under `thoraxrt` in the metadata of each part.

    `labels` name the columns of logits and probabilities. `bundle_sha256` is the manifest's; `backend` and
    `precision` are what was executed, `through` is "engine" or "server", or what else gave the answers. `versions` are
    of the packages that the numbers hang on too, by name.
    """

    labels: tuple[str, ...]
    bundle_sha256: str
    backend: str
    precision: str
    through: str
    versions: dict[str, str] = {}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Row:
    """One image of C labels; see `read` for the columns. Where there is an `error`, there is no answer."""

    index: int
    image: str
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    logits: npt.NDArray[np.float32] | None = None  # (C,)
    probabilities: npt.NDArray[np.float64] | None = None  # (C,)
    boxes: Sequence[Box] = ()
    located: Sequence[Box] = ()
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scores:
    """A folder of N images and C labels, in the order of the input; see `read` for what the columns mean.

    `width` and `height` are 0, and `logits` and `probabilities` NaN, where an image has an error.
    """

    header: Header
    images: tuple[str, ...]
    sha256: tuple[str | None, ...]
    width: npt.NDArray[np.int32]  # (N,)
    height: npt.NDArray[np.int32]  # (N,)
    logits: npt.NDArray[np.float32]  # (N, C)
    probabilities: npt.NDArray[np.float64]  # (N, C)
    errors: tuple[str | None, ...]
    _boxes: pa.ListArray
    _located: pa.ListArray

    def __len__(self) -> int:
        return len(self.images)

    def boxes(self, row: int) -> tuple[Box, ...]:
        """The boxes of the reported findings of one image, best first."""
        return msgspec.convert(self._boxes[row].as_py(), tuple[Box, ...])

    def located(self, row: int) -> tuple[Box, ...]:
        """The boxes of the findings that were asked for, whatever their thresholds, each finding's best first."""
        return msgspec.convert(self._located[row].as_py(), tuple[Box, ...])


class Writer:
    """Appends to a folder in parts of `PART_ROWS` rows; each appears whole or not at all.

    A writer that is killed at any moment leaves whole parts; the next one goes on after them: `done` has the names that
    are there, `failed` says how many of them have an error. Rows without a `sha256`, whose files could not be read, are
    taken out when a writer opens, so that they are tried again. One process at a time writes to a folder.

    Raises RequestError where the folder's header is another one, or another process writes to it, DatasetError where a
    part cannot be read; OSError, from any method, where the folder cannot be written.

    Example:
        with Writer(Path("scores"), header) as writer:
            writer.write(row for row in rows if row.image not in writer.done)
    """

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder, self.header = folder, header
        self.done: set[str] = set()
        self.failed = 0
        self._rows: list[Row] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder)
        try:
            for left in folder.glob(f".*{_UNFINISHED}"):
                left.unlink()
            parts = _parts(folder)
            self._next = 1 + max((int(part.stem.removeprefix("part-")) for part in parts), default=-1)
            for part in parts:
                self._resume(part)
        except BaseException:
            os.close(self._lock)
            raise

    def _resume(self, part: Path) -> None:
        """Note what a part holds, and take out the images whose files could not be read: perhaps they now can."""
        table = _table(part, ["image", "sha256", "error"])
        _check_same(part, _header(part, table.schema.metadata), self.header)
        if table["sha256"].null_count:
            table = _table(part)
            table = table.filter(table["sha256"].is_valid())
            self._put(part, table)
        self._note(table)

    def _note(self, table: pa.Table) -> None:
        self.done.update(table["image"].to_pylist())
        self.failed += len(table) - table["error"].null_count

    def write(self, rows: Iterable[Row]) -> None:
        """Take rows, of images that are not `done`; they are on disk when a part is full, or the writer closes."""
        for row in rows:
            self._rows.append(row)
            self.done.add(row.image)
            self.failed += row.error is not None
            if len(self._rows) >= PART_ROWS:
                self._flush()

    def write_table(self, table: pa.Table) -> None:
        """Write a part of its own, what `table_from_rows` gave in another process; rows that are `done` are left out."""
        fresh = [image not in self.done for image in table["image"].to_pylist()]
        table = table.select(_schema(self.header).names).cast(_schema(self.header)).filter(pa.array(fresh, pa.bool_()))
        if len(table):
            self._write_part(table)
            self._note(table)

    def _flush(self) -> None:
        if self._rows:
            self._write_part(table_from_rows(self._rows, self.header))
            self._rows.clear()

    def _write_part(self, table: pa.Table) -> None:
        self._put(self.folder / f"part-{self._next:06d}.parquet", table)
        self._next += 1

    def _put(self, part: Path, table: pa.Table) -> None:
        """Let a part appear under its name, instead of one that is there."""
        made = part.with_name(f".{part.name}{_UNFINISHED}")
        with made.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        made.rename(part)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # else a machine that loses power forgets the name
        finally:
            os.close(folder)

    def close(self) -> None:
        """Write what is left, and let others write; closing twice is harmless."""
        if self._lock < 0:
            return
        try:
            self._flush()
        finally:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read(folder: Path) -> Scores:
    """The scores of a folder, in the order of the input: what is there, also while a writer adds to it.

    Any Parquet reader opens the folder's `part-*.parquet`, one row per image, with these columns:

    - `index`: int64, the image's place in the input of the run that scored it, from 0: the order of the rows
    - `image`: string, its name: the path relative to the folder that was scored, or as a list names it
    - `sha256`: string, 64 hex digits, of the file's bytes; null where they could not be read: the next run tries again
    - `width`, `height`: int32, pixels of the original image; null where it has an error
    - `logits`: list of float32, one per label of the header, in its order; null where it has an error
    - `probabilities`: the same in float64, in 0..1
    - `boxes`: list of {finding, x, y, width, height, score, peak {x, y}}, float64, in pixels of the original image with
      the origin at its top left, scores in 0..1: those of the reported findings, best first
    - `located`: the same for findings that were asked for whatever their threshold, by the parity check
    - `error`: string, why the image has no answer; null where it has one

    and a `Header` as JSON under the key `thoraxrt` of the file's metadata. With DuckDB:
    `SELECT image, probabilities[1] FROM 'scores/*.parquet' WHERE error IS NULL ORDER BY index`.

    Raises DatasetError where the folder holds no scores, parts of different headers, or an image twice.
    """
    parts = _parts(folder)
    if not parts:
        raise DatasetError(f"{folder} holds no scores; expected part-*.parquet, as `thoraxrt score` writes them")
    tables = [_table(part) for part in parts]
    header = _header(parts[0], tables[0].schema.metadata)
    for part, table in zip(parts, tables, strict=True):
        _check_same(part, _header(part, table.schema.metadata), header)
    merged = pa.concat_tables(table.select(_schema(header).names).cast(_schema(header)) for table in tables)
    order = np.argsort(merged["index"].to_numpy(), kind="stable")
    columns = {name: merged[name].take(pa.array(order)).combine_chunks() for name in merged.column_names}
    images = tuple(columns["image"].to_pylist())
    if len(set(images)) < len(images):
        ((twice, _),) = Counter(images).most_common(1)
        raise DatasetError(f"{folder} holds {twice} twice; expected each image once: was a part copied into it?")
    return Scores(
        header=header,
        images=images,
        sha256=tuple(columns["sha256"].to_pylist()),
        width=columns["width"].fill_null(0).to_numpy(),
        height=columns["height"].fill_null(0).to_numpy(),
        logits=_matrix(columns["logits"]),
        probabilities=_matrix(columns["probabilities"]),
        errors=tuple(columns["error"].to_pylist()),
        _boxes=columns["boxes"],
        _located=columns["located"],
    )


def table_from_rows(rows: Sequence[Row], header: Header) -> pa.Table:
    """The rows as a part holds them."""
    schema = _schema(header)
    columns = {name: [getattr(row, name) for row in rows] for name in schema.names}
    for name in ("boxes", "located"):
        columns[name] = [msgspec.to_builtins(list(boxes)) for boxes in columns[name]]
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def _schema(header: Header) -> pa.Schema:
    point = [("x", pa.float64()), ("y", pa.float64())]
    sides = [(name, pa.float64()) for name in ("width", "height", "score")]
    boxes = pa.list_(pa.struct([("finding", pa.string()), *point, *sides, ("peak", pa.struct(point))]))
    count = len(header.labels)
    return pa.schema(
        [
            ("index", pa.int64()),
            ("image", pa.string()),
            ("sha256", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("logits", pa.list_(pa.float32(), count)),
            ("probabilities", pa.list_(pa.float64(), count)),
            ("boxes", boxes),
            ("located", boxes),
            ("error", pa.string()),
        ],
        metadata={_HEADER: msgspec.json.encode(header)},
    )


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-" + "[0-9]" * 6 + ".parquet"))


def _table(part: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.ParquetFile(part).read(columns)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"{part} cannot be read ({type(error).__name__}); expected a part as `thoraxrt score` writes it: remove it, "
            "and its images are scored again"
        ) from error


def _header(part: Path, metadata: Mapping[bytes, bytes] | None) -> Header:
    try:
        return msgspec.json.decode((metadata or {}).get(_HEADER, b""), type=Header)
    except msgspec.MsgspecError as error:
        raise DatasetError(
            f"{part} is not a part of scores of this version ({error}); expected what `thoraxrt score` writes: "
            "take another folder"
        ) from error


def _check_same(part: Path, found: Header, expected: Header) -> None:
    for name, ours in msgspec.structs.asdict(expected).items():
        if (theirs := getattr(found, name)) != ours:
            raise RequestError(
                f"{part}: its {name} is {_shown(theirs)}, expected {_shown(ours)}; the scores of one folder come from one "
                "bundle, backend and precision, and the same versions: take another folder"
            )


def _shown(value: str | tuple[str, ...] | dict[str, str]) -> str:
    if isinstance(value, dict):
        value = tuple(map(" ".join, value.items())) or "not known"
    return value if isinstance(value, str) else ", ".join(value)


def _matrix(column: pa.FixedSizeListArray) -> npt.NDArray[Any]:
    """Fixed-size lists `(N,)` of C values as `(N, C)`, NaN where a list is null."""
    shape = (len(column), column.type.list_size)
    values: npt.NDArray[Any] = column.values.to_numpy(zero_copy_only=False).reshape(shape).copy()
    values[column.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return values


def _locked(folder: Path) -> int:
    """A descriptor that holds the folder's lock as long as it is open, in this process alone."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RequestError(f"another process writes to {folder}; wait for it, or take another folder") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
            os.close(descriptor)
            raise
    return descriptor
