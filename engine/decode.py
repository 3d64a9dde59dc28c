"""Bytes to a radiograph: PNG, JPEG and DICOM files to uint8 `(H, W)` pixels and their provenance.

Owns the limits, and the translation of every library's errors into `ImageError`. What is special
to DICOM stands in `thoraxrt.engine.dicom`. Knows neither networks nor geometry.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from io import BytesIO
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from thoraxrt.engine.errors import ImageContentError, ImageError, ImageFormatError, ImageLimitError
from thoraxrt.engine.profile import Profile, span

__all__ = [
    "DecodeLimits",
    "Decoder",
    "Provenance",
    "Radiograph",
    "ThreadDecoder",
    "decode",
    "table_from_png16",
]

_T = TypeVar("_T")

Pixels = npt.NDArray[np.uint8]

# A pixel is coloured where its channels differ by more than 32 of 255 levels: the chroma noise of
# a gray JPEG stays below 10. A photograph has more than 1% of such pixels; a coloured side marker,
# ruler or annotation box on a radiograph has fewer.
_COLOUR_SPREAD = 32
_COLOUR_SHARE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a radiograph's pixels came from; technical facts only, never a patient's.

    `bits` is the depth of the stored values (1 to 16). `photometric` is DICOM's Photometric
    Interpretation, or `gray`, `gray+alpha`, `rgb`, `rgba`, `palette` for other formats. `voi` says
    how stored values became 8 bits: `full range`, `window CENTER/WIDTH`, a window with its
    function (`window 2048/4096 SIGMOID`), or `VOI LUT`.
    """

    format: Literal["png", "jpeg", "dicom", "array"]
    bits: int
    photometric: str
    transfer_syntax: str | None = None
    voi: str = "full range"


@dataclass(frozen=True, kw_only=True, eq=False)
class Radiograph:
    """One radiograph, ready for the network's geometry.

    `values` is `(H, W)`, row 0 at the top, C-contiguous and read-only: uint8, 0 black to 255 white
    (bone is bright), or uint16 values as stored, with `table`, uint8 `(65536,)`, that maps them so.

    Raises ImageContentError where `values` is anything else.
    """

    values: npt.NDArray[np.uint8 | np.uint16]
    source: Provenance
    table: Pixels | None = None

    def __post_init__(self) -> None:
        values = self.values
        expected = np.uint8 if self.table is None else np.uint16
        if values.dtype != expected or values.ndim != 2 or values.size == 0:
            raise ImageContentError(
                f"the array is {values.dtype} with shape {values.shape}; expected {np.dtype(expected)} (height, width): "
                "map the values to 0..255 and drop the channel axis"
            )
        if not values.flags.c_contiguous or values.flags.writeable:
            raise ImageContentError("the array is strided or writable; use Radiograph.from_pixels, which copies it")

    @classmethod
    def from_pixels(cls, array: Pixels) -> Radiograph:
        """A radiograph from an array that the caller decoded; the array is copied.

        `array` is uint8 `(H, W)`, row 0 at the top, 0 black to 255 white.
        Raises ImageContentError for any other dtype or shape.
        """
        pixels = np.array(array, order="C")
        pixels.flags.writeable = False
        return cls(values=pixels, source=Provenance(format="array", bits=8, photometric="gray"))

    @cached_property
    def pixels(self) -> Pixels:
        """uint8 `(H, W)`, 0 black to 255 white, read-only."""
        if self.table is None:
            return self.values  # type: ignore[return-value]  # __post_init__ holds it
        pixels: Pixels = np.take(self.table, self.values)
        pixels.flags.writeable = False
        return pixels

    @property
    def width(self) -> int:
        """Pixels in a row."""
        return int(self.values.shape[1])

    @property
    def height(self) -> int:
        """Rows."""
        return int(self.values.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLimits:
    """What is refused before a single pixel is decoded.

    `max_bytes` of the file, `max_pixels` of the picture, `max_aspect` the longer side over the
    shorter, `min_side` the shorter side in pixels.

    Example: `DecodeLimits(max_pixels=20_000_000)`. Raises ValueError where a limit makes no sense.
    """

    max_bytes: int = 64 * 1024 * 1024
    max_pixels: int = 50_000_000
    max_aspect: float = 8.0
    min_side: int = 32

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "max_aspect", "min_side"):
            value = getattr(self, name)
            if not value >= 1:
                raise ValueError(f"DecodeLimits {name} is {value}; expected at least 1")
        if self.min_side * self.min_side > self.max_pixels:
            raise ValueError(f"DecodeLimits min_side {self.min_side} leaves no picture of {self.max_pixels} pixels")

    def check_bytes(self, count: int) -> None:
        """Raise ImageLimitError where a file of `count` bytes is too large."""
        if count > self.max_bytes:
            raise ImageLimitError(f"the file has {count} bytes; expected at most {self.max_bytes}: send one radiograph")

    def check_size(self, width: int, height: int) -> None:
        """Raise ImageLimitError where a picture of `width` x `height` pixels is no radiograph's."""
        shorter, longer = sorted((width, height))
        if width * height > self.max_pixels:
            raise ImageLimitError(
                f"the image is {width} x {height} pixels; expected at most {self.max_pixels} pixels: downscale it"
            )
        if shorter < self.min_side:
            raise ImageLimitError(
                f"the image is {width} x {height} pixels; expected at least {self.min_side} on each side: "
                "send the original, not a thumbnail"
            )
        if longer > self.max_aspect * shorter:
            raise ImageLimitError(
                f"the image is {width} x {height} pixels, a sliver; expected sides within {self.max_aspect:g} to 1: "
                "send the whole radiograph"
            )


_DEFAULT_LIMITS = DecodeLimits()


def decode(
    data: bytes, limits: DecodeLimits = _DEFAULT_LIMITS, *, keep_stored: bool = False, alone: bool = False
) -> Radiograph:
    """The radiograph in one PNG, JPEG or DICOM file.

    `data` is the whole file; its first bytes decide the format. See `Radiograph` for the result, which
    has 8 bits unless `keep_stored` leaves 16-bit values as they are, for a GPU to look up. In a process that has
    nothing else to do, `alone` gives the same in a third of the time for a PNG: its reader keeps the interpreter's lock. It
    leaves out zlib's own checksum, of what the checksums of PNG, which always are verified, cover already.

    Raises ImageFormatError (not an image we read, truncated, corrupt), ImageLimitError (too large,
    or a shape that no radiograph has) or ImageContentError (not one grayscale radiograph), and
    nothing else.
    """
    radiograph = _stored_radiograph(data, limits, alone)
    if keep_stored or radiograph.table is None:
        return radiograph
    return Radiograph(values=radiograph.pixels, source=radiograph.source)


def _stored_radiograph(data: bytes, limits: DecodeLimits, alone: bool) -> Radiograph:
    limits.check_bytes(len(data))
    if data.startswith(_PNG_SIGNATURE):
        with translated("PNG"):
            return _radiograph_from_png(data, limits, alone)
    if data.startswith(b"\xff\xd8\xff"):
        with translated("JPEG"):
            return _radiograph_from_jpeg(data, limits)
    if data[128:132] == b"DICM":
        from thoraxrt.engine.dicom import radiograph_from_dicom  # pydicom takes 0.2 s to import

        with translated("DICOM"):
            return radiograph_from_dicom(data, limits)
    raise ImageFormatError(_unrecognised(data))


class Decoder(Protocol):
    """The seam between file bytes and radiographs: threads here, processes in the server."""

    def submit(self, data: bytes) -> Future[Radiograph]:
        """Start decoding one file; the future gives what `decode` returns or raises."""
        ...

    def close(self) -> None:
        """Finish what runs, cancel what waits, and release the workers."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ThreadDecoder:
    """A `Decoder` on threads of this process.

    Every format scales with the threads: Pillow and imagecodecs decode without the interpreter's lock.

    `workers` is the number of threads, by default the CPUs this process may use; for `keep_stored` see `decode`.
    Raises ValueError where `workers` is below 1; `submit` after `close` raises RuntimeError.

    Example: `with ThreadDecoder() as decoder: radiograph = decoder.submit(data).result()`.
    """

    def __init__(
        self,
        workers: int | None = None,
        limits: DecodeLimits = _DEFAULT_LIMITS,
        *,
        keep_stored: bool = False,
        profile: Profile | None = None,
    ) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"ThreadDecoder workers is {workers}; expected at least 1, or None for one per CPU")
        self._limits = limits
        self._keep_stored = keep_stored
        self._profile = profile
        self.workers = workers or _usable_cpus()
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")

    def submit(self, data: bytes) -> Future[Radiograph]:
        """Start decoding one file; the future gives what `decode` returns or raises."""
        return self._pool.submit(self._decode, data)

    def _decode(self, data: bytes) -> Radiograph:
        with span(self._profile, threading.current_thread().name, "decode", images=1):
            return decode(data, self._limits, keep_stored=self._keep_stored)

    def close(self) -> None:
        """Finish what runs, cancel what waits, and end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _usable_cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


_MAGICS = {
    b"%PDF": "a PDF document",
    b"GIF8": "a GIF",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"BM": "a BMP",
    b"RIFF": "a RIFF file (WebP, say)",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 file",
    b"\xff\x4f\xff\x51": "a JPEG 2000 codestream",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"<": "HTML, XML or SVG text",
    b"{": "JSON text",
    b"version https://git-lfs": "a Git LFS pointer",
}
_BARE_DICOM = (b"\x02\0\0\0", b"\x02\0\x01\0", b"\x02\0\x10\0", b"\x08\0\0\0", b"\x08\0\x05\0", b"\x08\0\x08\0")


def _unrecognised(data: bytes) -> str:
    """Why bytes without the magic of PNG, JPEG or DICOM are refused; never quotes them."""
    if not data:
        return "the file is empty; expected a PNG, JPEG or DICOM file"
    if data.startswith(_BARE_DICOM):
        return (
            "the file looks like DICOM without its preamble; expected 'DICM' at byte 128: "
            "save it in the DICOM file format (PS3.10), with gdcmconv for example"
        )
    for magic, name in _MAGICS.items():
        if data[:64].lstrip(b" \r\n\t\xef\xbb\xbf").startswith(magic) or data.startswith(magic):
            return f"the file is {name}; expected PNG, JPEG or DICOM: export the radiograph in one of these"
    return "the file is neither PNG, JPEG nor DICOM: export the radiograph in one of these"


def corrupt(what: str) -> ImageFormatError:
    return ImageFormatError(f"{what}; expected an intact file: fetch or export it again")


@contextmanager
def translated(kind: str) -> Iterator[None]:
    """Turn whatever a library raises into an ImageError; its text may hold patient data, so drop it."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError:
        raise ImageLimitError(f"not enough memory for this {kind} file; expected less: downscale it") from None
    except Exception as error:
        raise corrupt(f"the {kind} file is truncated or corrupt ({type(error).__name__})") from None


def sealed(values: npt.NDArray[np.uint8 | np.uint16], source: Provenance, table: Pixels | None = None) -> Radiograph:
    values = np.ascontiguousarray(values)
    if not values.flags.owndata and values.flags.writeable:
        values = values.copy()
    values.flags.writeable = False
    return Radiograph(values=values, source=source, table=table)


def _gray(image: Image.Image) -> Pixels:
    """`(H, W)` uint8 from an L, RGB or RGBA image; alpha is ignored, as in the training pipelines.

    Pillow's weights sum to 65,536, so that R = G = B gives exactly that value.
    """
    if image.mode == "L":
        return np.asarray(image)
    _refuse_colour(np.asarray(image))  # (H, W, 3 or 4)
    return np.asarray(image.convert("L"))


def _refuse_colour(channels: Pixels) -> None:
    red, green, blue = channels[..., 0], channels[..., 1], channels[..., 2]
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    coloured = np.count_nonzero(spread > _COLOUR_SPREAD)
    if coloured > _COLOUR_SHARE * spread.size:
        raise ImageContentError(
            "the image is a colour picture; expected a grayscale radiograph: send the X-ray itself, not a photograph"
        )


_PARTS: Final = 10_000
"""Of a file at most: 64 MiB in chunks of 8 KiB, as libpng writes them, are 8,192. Each costs 400 bytes, if empty."""


def _few(parts: Iterator[_T], kind: str, what: str) -> Iterator[_T]:
    """The parts, while there are not too many of them. Raises ImageLimitError."""
    for number, part in enumerate(parts):
        if number == _PARTS:
            raise ImageLimitError(f"the {kind} file has more than {_PARTS} {what}; expected fewer: save it again")
        yield part


_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_COLOURS = {0: "gray", 2: "rgb", 3: "palette", 4: "gray+alpha", 6: "rgba"}


def _radiograph_from_png(data: bytes, limits: DecodeLimits, alone: bool) -> Radiograph:
    chunks = list(_few(_png_chunks(data), "PNG", "chunks"))
    kind, header = chunks[0]
    if kind != b"IHDR":
        raise corrupt("the PNG file does not begin with its header")
    width, height, bits, colour = struct.unpack_from(">IIBB", header[:-4], 8)
    limits.check_size(width, height)
    photometric = _PNG_COLOURS[colour]
    if bits == 16 and photometric != "gray":
        raise ImageContentError(
            f"the PNG has 16 bits per channel and is {photometric}; expected 16-bit gray, or 8 bits per channel: "
            "save it as gray"
        )
    # Without its ancillary chunks (text, ICC profile, animation): nobody need read them.
    file = b"".join([_PNG_SIGNATURE, *(chunk for kind, chunk in chunks if not kind[0] & 0x20)])
    values = _read_alone(file, height, width, bits, photometric) if alone else None
    if values is None:
        with PngImageFile(BytesIO(file)) as image:  # not Image.open: it warns of large pictures
            values = np.asarray(image) if bits == 16 else _png_pixels(image)
    source = Provenance(format="png", bits=bits, photometric=photometric)
    return sealed(values, source, table_from_png16() if bits == 16 else None)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Each chunk up to IEND, after its type, its CRC verified: Pillow does not verify IDAT's.

    Source: PNG specification (third edition), sections 5.3 and 5.5.
    """
    view, position, kind = memoryview(data), len(_PNG_SIGNATURE), b""
    while kind != b"IEND":
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        (crc,) = struct.unpack_from(">I", data, end)
        if zlib.crc32(view[position + 4 : end]) != crc:
            raise corrupt("the PNG file is corrupt (a checksum does not match)")
        kind = bytes(view[position + 4 : position + 8])
        yield kind, view[position : end + 4]
        position = end + 4


_KORNIA: Final = {"gray": ("mono", 1), "rgb": ("rgb", 3), "rgba": ("rgba", 4)}
"""Its word for what a PNG has, and the number of channels."""

_KORNIA_BYTES: Final = 4 * 1024 * 1024
"""More than it takes beside the pixels: 0.5 to 1.4 MiB for 4000 x 4000 of them."""


def _read_alone(
    file: bytes, height: int, width: int, bits: int, photometric: str
) -> npt.NDArray[np.uint8 | np.uint16] | None:
    """What `_radiograph_from_png` reads, three times as fast; None where that is Pillow's to read, or to refuse."""
    if photometric not in _KORNIA or bits < 8:
        return None
    import kornia_rs  # which only a process that decodes and does nothing else has use for

    mode, channels = _KORNIA[photometric]
    np.empty(height * width * channels * bits // 8 + _KORNIA_BYTES, np.uint8)  # MemoryError: Rust would end the process
    read = kornia_rs.io.decode_image_png_u16 if bits == 16 else kornia_rs.io.decode_image_png_u8
    try:
        pixels: npt.NDArray[Any] = read(file, (height, width), mode)
    except Exception:  # it has one type for all that can be wrong
        return None
    pixels.flags.writeable = False
    return pixels[..., 0] if channels == 1 else _gray(Image.fromarray(pixels))


def _png_pixels(image: Image.Image) -> Pixels:
    if image.mode == "LA":
        return np.asarray(image.getchannel(0))
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    return _gray(image.convert("RGB") if image.mode == "P" else image)


@cache
def table_from_png16() -> Pixels:
    """The table from 16-bit PNG values to 8 bits: `(v + 128) // 257`, uint8 `(65536,)`.

    It is v x 255 / 65535 rounded to nearest, exactly (PNG specification, section 13.12: sample
    depth rescaling). Read-only, indexed by the value.
    """
    table = ((np.arange(65536, dtype=np.uint32) + 128) // 257).astype(np.uint8)
    table.flags.writeable = False
    return table


_SOS = 0xDA
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}  # 0xF7: JPEG-LS
_SEGMENTS = frozenset(range(0xC0, 0xD0)) | frozenset(range(0xDA, 0xFF))  # what may stand before a scan
_METADATA = frozenset(range(0xE1, 0xF0)) - {0xEE} | {0xFE}  # APPn and COM; APP0 and APP14 say the colour space


def _radiograph_from_jpeg(data: bytes, limits: DecodeLimits) -> Radiograph:
    frame = frame_from_jpeg(data)
    limits.check_size(frame.width, frame.height)
    if frame.components not in (1, 3):
        raise ImageContentError(f"the JPEG has {frame.components} channels (CMYK, say); expected gray: save it as gray")
    with JpegImageFile(BytesIO(_jpeg_without_metadata(data))) as image:  # not Image.open: it reads EXIF, and warns
        pixels = _gray(image)
    photometric = "gray" if frame.components == 1 else "rgb"
    return sealed(pixels, Provenance(format="jpeg", bits=frame.bits, photometric=photometric))


@dataclass(frozen=True, slots=True)
class Frame:
    """What a JPEG, JPEG-LS or JPEG 2000 codestream says of itself, before it is decoded."""

    width: int
    height: int
    bits: int
    components: int
    marker: int  # which kind of JPEG (SOFn); SIZ for JPEG 2000
    scan: int = 0  # where the first scan's data begin


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """`(marker, start, end)` of each segment up to the first scan's header (ITU-T T.81, B.1.1)."""
    position, marker = 2, 0
    while marker != _SOS:
        while data[position + 1] == 0xFF:  # fill bytes
            position += 1
        start, marker = position, data[position + 1]
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if data[start] != 0xFF or marker not in _SEGMENTS or position < start + 4 or position > len(data):
            raise corrupt("the JPEG data are truncated or corrupt (a segment does not fit)")
        yield marker, start, position


def frame_from_jpeg(data: bytes) -> Frame:
    """The frame header of a JPEG or JPEG-LS stream that also has an end (ITU-T T.81, B.2.2)."""
    frames = []
    scan = 0
    for marker, start, end in _few(_jpeg_segments(data), "JPEG", "segments"):
        if marker in _SOF:
            frames.append((marker, *struct.unpack_from(">BHHB", data, start + 4)))
        scan = end
    if data.rfind(b"\xff\xd9") < scan:
        raise corrupt("the JPEG data are truncated (no end of image)")
    ((marker, bits, height, width, components),) = frames
    return Frame(width=width, height=height, bits=bits, components=components, marker=marker, scan=scan)


def _jpeg_without_metadata(data: bytes) -> bytes:
    """The file without EXIF, ICC profile and comments: Pillow need not read them."""
    kept, end = [data[:2]], 2
    for marker, start, end in _jpeg_segments(data):
        if marker not in _METADATA:
            kept.append(data[start:end])
    return b"".join([*kept, data[end:]])
