"""Bytes to a radiograph: PNG, JPEG and DICOM files to uint8 `(H, W)` pixels and their provenance.

Owns the limits, the table from stored values to 8 bits, and the translation of every library's
errors into `ImageError`. Knows neither networks nor geometry, and keeps no patient data.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from thoraxrt.engine.errors import ImageContentError, ImageError, ImageFormatError, ImageLimitError

if TYPE_CHECKING:  # pydicom takes 0.2 s to import: only the DICOM path pays for it
    from pydicom import Dataset

__all__ = [
    "DecodeLimits",
    "Decoder",
    "Provenance",
    "Radiograph",
    "ThreadDecoder",
    "decode",
    "table_from_dicom",
    "table_from_png16",
]

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Radiograph:
    """One radiograph, ready for the network's geometry.

    `pixels` is uint8 `(H, W)`, row 0 at the top, 0 black to 255 white (bone is bright),
    C-contiguous and read-only.

    Raises ImageContentError where `pixels` is anything else.
    """

    pixels: Pixels
    source: Provenance

    def __post_init__(self) -> None:
        pixels = self.pixels
        if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.size == 0:
            raise ImageContentError(
                f"the array is {pixels.dtype} with shape {pixels.shape}; expected uint8 (height, width): "
                "map the values to 0..255 and drop the channel axis"
            )
        if not pixels.flags.c_contiguous or pixels.flags.writeable:
            raise ImageContentError("the array is strided or writable; use Radiograph.from_pixels, which copies it")

    @classmethod
    def from_pixels(cls, array: Pixels) -> Radiograph:
        """A radiograph from an array that the caller decoded; the array is copied.

        `array` is uint8 `(H, W)`, row 0 at the top, 0 black to 255 white.
        Raises ImageContentError for any other dtype or shape.
        """
        pixels = np.array(array, order="C")
        pixels.flags.writeable = False
        return cls(pixels=pixels, source=Provenance(format="array", bits=8, photometric="gray"))

    @property
    def width(self) -> int:
        """Pixels in a row."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """Rows."""
        return int(self.pixels.shape[0])


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


def decode(data: bytes, limits: DecodeLimits = _DEFAULT_LIMITS) -> Radiograph:
    """The radiograph in one PNG, JPEG or DICOM file.

    `data` is the whole file; its first bytes decide the format. See `Radiograph` for the result.

    Raises ImageFormatError (not an image we read, truncated, corrupt), ImageLimitError (too large,
    or a shape that no radiograph has) or ImageContentError (not one grayscale radiograph), and
    nothing else.
    """
    limits.check_bytes(len(data))
    if data.startswith(_PNG_SIGNATURE):
        with _translated("PNG"):
            return _radiograph_from_png(data, limits)
    if data.startswith(b"\xff\xd8\xff"):
        with _translated("JPEG"):
            return _radiograph_from_jpeg(data, limits)
    if data[128:132] == b"DICM":
        with _translated("DICOM"):
            return _radiograph_from_dicom(data, limits)
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

    PNG and JPEG scale with the threads: Pillow decodes them without the interpreter's lock.
    Compressed DICOM does not (measured: GDCM, JPEG 2000 and RLE hold the lock).

    `workers` is the number of threads, by default the CPUs this process may use.
    Raises ValueError where `workers` is below 1; `submit` after `close` raises RuntimeError.

    Example: `with ThreadDecoder() as decoder: radiograph = decoder.submit(data).result()`.
    """

    def __init__(self, workers: int | None = None, limits: DecodeLimits = _DEFAULT_LIMITS) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"ThreadDecoder workers is {workers}; expected at least 1, or None for one per CPU")
        self._limits = limits
        self._pool = ThreadPoolExecutor(workers or _usable_cpus(), thread_name_prefix="decode")

    def submit(self, data: bytes) -> Future[Radiograph]:
        """Start decoding one file; the future gives what `decode` returns or raises."""
        return self._pool.submit(decode, data, self._limits)

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


# --- what the bytes are, and errors -------------------------------------------------------------

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


def _corrupt(what: str) -> ImageFormatError:
    return ImageFormatError(f"{what}; expected an intact file: fetch or export it again")


@contextmanager
def _translated(kind: str) -> Iterator[None]:
    """Turn whatever a library raises into an ImageError; its text may hold patient data, so drop it."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError:
        raise ImageLimitError(f"not enough memory for this {kind} file; expected less: downscale it") from None
    except Exception as error:
        raise _corrupt(f"the {kind} file is truncated or corrupt ({type(error).__name__})") from None


def _sealed(pixels: Pixels, source: Provenance) -> Radiograph:
    pixels = np.ascontiguousarray(pixels)
    if not pixels.flags.owndata and pixels.flags.writeable:
        pixels = pixels.copy()
    pixels.flags.writeable = False
    return Radiograph(pixels=pixels, source=source)


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


# --- PNG ----------------------------------------------------------------------------------------

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_COLOURS = {0: "gray", 2: "rgb", 3: "palette", 4: "gray+alpha", 6: "rgba"}


def _radiograph_from_png(data: bytes, limits: DecodeLimits) -> Radiograph:
    chunks = list(_png_chunks(data))
    kind, header = chunks[0]
    if kind != b"IHDR":
        raise _corrupt("the PNG file does not begin with its header")
    width, height, bits, colour = struct.unpack(">IIBB", header[:10])
    limits.check_size(width, height)
    photometric = _PNG_COLOURS[colour]
    if bits == 16 and photometric != "gray":
        raise ImageContentError(
            f"the PNG has 16 bits per channel and is {photometric}; expected 16-bit gray, or 8 bits per channel: "
            "save it as gray"
        )
    with PngImageFile(BytesIO(_png_from_chunks(chunks))) as image:  # not Image.open: it warns of large pictures
        pixels = _png_pixels(image, bits)
    return _sealed(pixels, Provenance(format="png", bits=bits, photometric=photometric))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Each chunk's type and content up to IEND, its CRC verified: Pillow does not verify IDAT's.

    Source: PNG specification (third edition), sections 5.3 and 5.5.
    """
    view, position, kind = memoryview(data), len(_PNG_SIGNATURE), b""
    while kind != b"IEND":
        (length,) = struct.unpack_from(">I", data, position)
        body = view[position + 4 : position + 8 + length]  # type and content
        (crc,) = struct.unpack_from(">I", data, position + 8 + length)
        if zlib.crc32(body) != crc:
            raise _corrupt("the PNG file is corrupt (a checksum does not match)")
        kind = bytes(body[:4])
        yield kind, body[4:]
        position += 12 + length


def _png_from_chunks(chunks: list[tuple[bytes, memoryview]]) -> bytes:
    """The file without its ancillary chunks (text, ICC profile, animation): Pillow need not read them."""
    kept: list[bytes | memoryview] = [_PNG_SIGNATURE]
    for kind, content in chunks:
        if not kind[0] & 0x20:  # bit 5 of the first letter: ancillary
            kept += [
                struct.pack(">I", len(content)),
                kind,
                content,
                struct.pack(">I", zlib.crc32(content, zlib.crc32(kind))),
            ]
    return b"".join(kept)


def _png_pixels(image: Image.Image, bits: int) -> Pixels:
    if bits == 16:
        return np.take(table_from_png16(), np.asarray(image))
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


# --- JPEG ---------------------------------------------------------------------------------------

_SOS = 0xDA
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}  # 0xF7: JPEG-LS
_SEGMENTS = frozenset(range(0xC0, 0xD0)) | frozenset(range(0xDA, 0xFF))  # what may stand before a scan
_METADATA = frozenset(range(0xE1, 0xF0)) - {0xEE} | {0xFE}  # APPn and COM; APP0 and APP14 say the colour space


def _radiograph_from_jpeg(data: bytes, limits: DecodeLimits) -> Radiograph:
    frame = _frame_from_jpeg(data)
    limits.check_size(frame.width, frame.height)
    if frame.components not in (1, 3):
        raise ImageContentError(f"the JPEG has {frame.components} channels (CMYK, say); expected gray: save it as gray")
    with JpegImageFile(BytesIO(_jpeg_without_metadata(data))) as image:  # not Image.open: it reads EXIF, and warns
        pixels = _gray(image)
    photometric = "gray" if frame.components == 1 else "rgb"
    return _sealed(pixels, Provenance(format="jpeg", bits=frame.bits, photometric=photometric))


@dataclass(frozen=True, slots=True)
class _Frame:
    """What a JPEG, JPEG-LS or JPEG 2000 codestream says of itself, before it is decoded."""

    width: int
    height: int
    bits: int
    components: int
    marker: int  # which kind of JPEG (SOFn); SIZ for JPEG 2000


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """`(marker, start, end)` of each segment up to the first scan's header (ITU-T T.81, B.1.1)."""
    position, marker = 2, 0
    while marker != _SOS:
        while data[position + 1] == 0xFF:  # fill bytes
            position += 1
        start, marker = position, data[position + 1]
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if data[start] != 0xFF or marker not in _SEGMENTS or position < start + 4 or position > len(data):
            raise _corrupt("the JPEG data are truncated or corrupt (a segment does not fit)")
        yield marker, start, position


def _frame_from_jpeg(data: bytes) -> _Frame:
    """The frame header of a JPEG or JPEG-LS stream that also has an end (ITU-T T.81, B.2.2)."""
    frames = []
    scan = 0
    for marker, start, end in _jpeg_segments(data):
        if marker in _SOF:
            frames.append((marker, *struct.unpack_from(">BHHB", data, start + 4)))
        scan = end
    if data.rfind(b"\xff\xd9") < scan:
        raise _corrupt("the JPEG data are truncated (no end of image)")
    ((marker, bits, height, width, components),) = frames
    return _Frame(width=width, height=height, bits=bits, components=components, marker=marker)


def _jpeg_without_metadata(data: bytes) -> bytes:
    """The file without EXIF, ICC profile and comments: Pillow need not read them."""
    kept, end = [data[:2]], 2
    for marker, start, end in _jpeg_segments(data):
        if marker not in _METADATA:
            kept.append(data[start:end])
    return b"".join([*kept, data[end:]])


# --- DICOM --------------------------------------------------------------------------------------

# Transfer syntaxes and the pydicom plugin that decodes each, named so that another plugin which
# happens to be installed cannot change a pixel. None: not compressed, pydicom itself.
_SYNTAXES: dict[str, str | None] = {
    "1.2.840.10008.1.2": None,  # Implicit VR Little Endian
    "1.2.840.10008.1.2.1": None,  # Explicit VR Little Endian
    "1.2.840.10008.1.2.2": None,  # Explicit VR Big Endian
    "1.2.840.10008.1.2.5": "pydicom",  # RLE Lossless
    "1.2.840.10008.1.2.4.50": "pillow",  # JPEG Baseline
    "1.2.840.10008.1.2.4.51": "pillow",  # JPEG Extended, 8 bits only
    "1.2.840.10008.1.2.4.57": "gdcm",  # JPEG Lossless, process 14
    "1.2.840.10008.1.2.4.70": "gdcm",  # JPEG Lossless, first-order prediction
    "1.2.840.10008.1.2.4.80": "gdcm",  # JPEG-LS Lossless
    "1.2.840.10008.1.2.4.81": "gdcm",  # JPEG-LS Near-Lossless
    "1.2.840.10008.1.2.4.90": "pillow",  # JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.91": "pillow",  # JPEG 2000
}
# The frame markers a transfer syntax allows (PS3.5, 8.2). GDCM ends the process on some that do not fit.
_PROCESSES = {
    "1.2.840.10008.1.2.4.50": (0xC0,),
    "1.2.840.10008.1.2.4.51": (0xC0, 0xC1),
    "1.2.840.10008.1.2.4.57": (0xC3,),
    "1.2.840.10008.1.2.4.70": (0xC3,),
    "1.2.840.10008.1.2.4.80": (0xF7,),
    "1.2.840.10008.1.2.4.81": (0xF7,),
    "1.2.840.10008.1.2.4.90": (0x51,),
    "1.2.840.10008.1.2.4.91": (0x51,),
}
_DEFLATED = "1.2.840.10008.1.2.1.99"
_JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
_MODALITIES = ("CR", "DX", "RG")  # RG: digitised film
_WINDOW_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")

# The only elements ever read: nothing of the patient, the study or the institution.
_ELEMENTS = (
    "Modality",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "RescaleIntercept",
    "RescaleSlope",
    "ModalityLUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "VOILUTSequence",
    "PixelData",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """The Image Pixel module of one grayscale frame (PS3.3 C.7.6.3), validated."""

    syntax: str
    rows: int
    columns: int
    allocated: int
    stored: int
    signed: bool
    photometric: str


def _radiograph_from_dicom(data: bytes, limits: DecodeLimits) -> Radiograph:
    _silence_libraries()
    dataset, syntax = _dataset_from_bytes(data)
    _check_content(dataset)
    layout = _layout_from_dataset(dataset, syntax)
    limits.check_size(layout.columns, layout.rows)
    table, voi = table_from_dicom(dataset), _voi_name(dataset)
    stored = _stored_values(dataset, layout)
    source = Provenance(
        format="dicom", bits=layout.stored, photometric=layout.photometric, transfer_syntax=syntax, voi=voi
    )
    return _sealed(table[stored], source)


_PYDICOM_WARNINGS = r"pydicom(\.|$)"


def _silence_libraries() -> None:
    """Keep pydicom and GDCM from writing to stderr about a file that we accept or refuse ourselves.

    `warnings.catch_warnings` is not thread-safe, so one filter for pydicom's modules is added and
    stays; pydicom logs the same messages to its own logger.
    """
    _silence_gdcm()
    if not any(f[0] == "ignore" and getattr(f[3], "pattern", f[3]) == _PYDICOM_WARNINGS for f in warnings.filters):
        warnings.filterwarnings("ignore", module=_PYDICOM_WARNINGS)


@cache
def _silence_gdcm() -> None:
    import gdcm

    gdcm.Trace.WarningOff()
    gdcm.Trace.ErrorOff()
    gdcm.Trace.DebugOff()


def _dataset_from_bytes(data: bytes) -> tuple[Dataset, str]:
    """The elements we use and the transfer syntax UID; refuses what would have to be inflated first.

    Not `pydicom.dcmread`: it inflates a deflated file, whatever its size, before anything can be asked.
    """
    from pydicom.datadict import tag_for_keyword
    from pydicom.filereader import read_dataset
    from pydicom.tag import BaseTag
    from pydicom.uid import UID

    file = BytesIO(data)
    file.seek(132)  # the preamble and 'DICM' (PS3.10, section 7.1)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    syntax = _check_syntax(meta)
    uid = UID(syntax)
    tags = [BaseTag(tag) for tag in map(tag_for_keyword, _ELEMENTS) if tag is not None]
    dataset = read_dataset(file, uid.is_implicit_VR, uid.is_little_endian, specific_tags=list(tags))
    return dataset, syntax


def _check_syntax(meta: Dataset) -> str:
    syntax = str(meta.get("TransferSyntaxUID", ""))
    if syntax == _DEFLATED:
        raise ImageFormatError(
            "the DICOM file is deflated, which hides its size; expected another transfer syntax: "
            "convert it to Explicit VR Little Endian"
        )
    if syntax not in _SYNTAXES:
        shown = syntax if syntax.replace(".", "").isdecimal() and len(syntax) <= 64 else "missing or unreadable"
        raise ImageFormatError(
            f"the DICOM transfer syntax is {shown}; expected uncompressed, RLE, JPEG, JPEG-LS or JPEG 2000: "
            "convert it to Explicit VR Little Endian"
        )
    return syntax


def _check_content(dataset: Dataset) -> None:
    """Refuse what is no single grayscale radiograph."""
    modality = str(dataset.get("Modality") or "")
    if modality not in _MODALITIES:
        shown = (
            modality if modality.isalpha() and modality.isascii() and len(modality) <= 8 else "missing or unreadable"
        )
        raise ImageContentError(
            f"the DICOM modality is {shown}; expected {', '.join(_MODALITIES)}: send a projection radiograph"
        )
    if not dataset.get("PixelData"):
        raise ImageFormatError(
            "the DICOM file has no pixel data, or they are cut off; expected one image: fetch or export it again"
        )
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise ImageContentError(f"the DICOM file has {frames} frames; expected one: send a single radiograph")
    samples = int(dataset.get("SamplesPerPixel") or 1)
    if samples != 1 or dataset.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        raise ImageContentError(
            f"the DICOM image is in colour ({samples} samples per pixel); expected MONOCHROME1 or MONOCHROME2: "
            "send the X-ray itself"
        )


def _layout_from_dataset(dataset: Dataset, syntax: str) -> _Layout:
    rows, columns, allocated = (int(dataset[name].value) for name in ("Rows", "Columns", "BitsAllocated"))
    stored, signed = _depth(dataset)
    if allocated not in (8, 16) or stored > allocated or int(dataset.get("HighBit", stored - 1)) != stored - 1:
        raise ImageContentError(
            f"the DICOM image stores {stored} of {allocated} bits; expected 8 or 16 allocated, "
            "the stored ones lowest: convert it"
        )
    return _Layout(
        syntax=syntax,
        rows=rows,
        columns=columns,
        allocated=allocated,
        stored=stored,
        signed=signed,
        photometric=str(dataset.PhotometricInterpretation),
    )


def _depth(dataset: Dataset) -> tuple[int, bool]:
    """Bits Stored, and whether the values are signed (PS3.3 C.7.6.3.1)."""
    bits, representation = int(dataset.BitsStored), int(dataset.get("PixelRepresentation") or 0)
    if not 1 <= bits <= 16 or representation not in (0, 1):
        raise ImageContentError(f"the DICOM image stores {bits} bits; expected 1 to 16, signed or unsigned: convert it")
    return bits, representation == 1


def _stored_values(dataset: Dataset, layout: _Layout) -> npt.NDArray[np.uint16]:
    """The stored values' bit patterns, uint16 `(H, W)`; signed ones in two's complement.

    What stands above Bits Stored (overlays, garbage) is ignored by the table.
    """
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    element = dataset["PixelData"]
    plugin = _SYNTAXES[layout.syntax]
    data = _checked_frame(element.value, layout) if plugin in ("gdcm", "pillow") else element.value
    if plugin is None:
        expected = layout.rows * layout.columns * layout.allocated // 8
        data = data[: expected + expected % 2]  # what follows is padding
    options: dict[str, Any] = {
        "rows": layout.rows,
        "columns": layout.columns,
        "number_of_frames": 1,
        "samples_per_pixel": 1,
        "bits_allocated": layout.allocated,
        "bits_stored": layout.allocated,  # the table masks the rest; fewer than 8 would abort in GDCM
        "pixel_representation": int(layout.signed),
        "photometric_interpretation": layout.photometric,
        "pixel_keyword": "PixelData",
        "pixel_vr": element.VR,
    }
    values, _ = get_decoder(UID(layout.syntax)).as_array(
        data, index=0, raw=True, decoding_plugin=plugin or "", **options
    )
    return values.astype(np.int16 if layout.signed else np.uint16).view(np.uint16)  # (H, W)


def _checked_frame(encapsulated: bytes, layout: _Layout) -> bytes:
    """The pixel data, once the codestream in them has said that it is the image in the header.

    A codec allocates by the one and decodes the other, so they must agree before it starts.
    """
    from pydicom.encaps import get_frame

    stream = get_frame(encapsulated, 0, number_of_frames=1)
    frame = _frame_from_j2k(stream) if layout.syntax in _JPEG_2000 else _frame_from_jpeg(stream)
    if (frame.width, frame.height, frame.components) != (layout.columns, layout.rows, 1):
        raise _corrupt(
            f"the DICOM header says {layout.columns} x {layout.rows} pixels in 1 channel, "
            f"its pixel data {frame.width} x {frame.height} in {frame.components}"
        )
    if frame.marker not in _PROCESSES[layout.syntax]:
        raise _corrupt("the DICOM pixel data are compressed in another way than the transfer syntax says")
    if frame.bits > layout.allocated:
        raise _corrupt(f"the DICOM header allocates {layout.allocated} bits, its pixel data have {frame.bits}")
    return encapsulated


def _frame_from_j2k(stream: bytes) -> _Frame:
    """The SIZ segment of a JPEG 2000 codestream that also has an end (ITU-T T.800, A.5.1)."""
    if not stream.startswith(b"\xff\x4f\xff\x51") or b"\xff\xd9" not in stream[-4:]:
        raise _corrupt("the JPEG 2000 data are truncated or corrupt (no start or no end)")
    right, bottom, left, top = struct.unpack_from(">4I", stream, 8)
    components, depth = struct.unpack_from(">HB", stream, 40)
    return _Frame(width=right - left, height=bottom - top, bits=(depth & 0x7F) + 1, components=components, marker=0x51)


# --- stored values to 8 bits --------------------------------------------------------------------


def table_from_dicom(dataset: Dataset) -> Pixels:
    """The table from a DICOM image's stored values to 8 bits, uint8 `(65536,)`, read-only.

    Indexed by the uint16 bit pattern of the stored value (two's complement where Pixel
    Representation is 1); bits above Bits Stored make no difference. 0 is black, 255 white.

    Steps: Modality LUT or rescale (PS3.3 C.11.1), then VOI LUT or the first window (PS3.3 C.11.2;
    LINEAR, LINEAR_EXACT or SIGMOID), both pydicom's; then linear to 0..255, round half up; last,
    MONOCHROME1 is inverted (PS3.3 C.7.6.3.1.2). A VOI LUT Sequence goes before a window. Without
    either, the full stored range is used, which is the identity for 8 unsigned bits.

    `dataset` is not changed. Raises ImageContentError for a window, slope or LUT that makes no
    sense, ImageFormatError for elements that cannot be read.
    """
    with _translated("DICOM"), np.errstate(all="ignore"):
        return _table_from_dicom(dataset)


def _table_from_dicom(dataset: Dataset) -> Pixels:
    from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

    bits, signed = _depth(dataset)
    module = _lut_module(dataset)
    stored = np.arange(1 << bits, dtype=np.int32)  # (2**bits,)
    if signed:
        stored[1 << (bits - 1) :] -= 1 << bits
    modality = apply_modality_lut(stored, module)
    if "VOILUTSequence" in module:
        modality = np.rint(modality).astype(np.int32)  # a LUT has integer inputs
    shown = apply_voi_lut(modality, module)
    low, high = _output_range(dataset, module, modality)
    levels = np.floor(np.clip((shown - low) * 255.0 / (high - low), 0, 255) + 0.5).astype(np.uint8)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        levels = 255 - levels
    table: Pixels = np.tile(levels, 65536 >> bits)
    table.flags.writeable = False
    return table


def _output_range(dataset: Dataset, module: Dataset, modality: npt.NDArray[np.generic]) -> tuple[float, float]:
    """The values that become 0 and 255: those of the last step's whole output range."""
    if "VOILUTSequence" in module:  # unsigned, of the depth in the descriptor (PS3.3 C.11.2.1.1)
        return 0.0, _lut_maximum(dataset.VOILUTSequence[0])
    if "ModalityLUTSequence" in module:  # likewise (PS3.3 C.11.1.1.1); a window's output goes by the module's depth
        return 0.0, _lut_maximum((module if "WindowCenter" in module else dataset).ModalityLUTSequence[0])
    bits, signed = _depth(dataset)
    ends = modality[[1 << (bits - 1), (1 << (bits - 1)) - 1]] if signed else modality[[0, -1]]
    low, high = float(ends[0]), float(ends[1])
    if "WindowCenter" in module:  # pydicom's window runs from the first to the second, even if slope < 0
        return low, high
    return min(low, high), max(low, high)


def _lut_module(dataset: Dataset) -> Dataset:
    """The Modality LUT and VOI LUT modules of `dataset`, validated, with the first view only."""
    from pydicom import Dataset

    module = Dataset()
    implicit, little = dataset.original_encoding
    module.set_original_encoding(implicit, little)
    for name in ("BitsStored", "PixelRepresentation", "PhotometricInterpretation"):
        setattr(module, name, dataset.get(name, 0))
    for sequence in ("ModalityLUTSequence", "VOILUTSequence"):
        if dataset.get(sequence):
            setattr(module, sequence, [_lut_item(dataset[sequence].value[0])])
    if "ModalityLUTSequence" not in module:
        _copy_rescale(dataset, module)
    if "VOILUTSequence" not in module:
        _copy_window(dataset, module)
    return module


def _lut_item(item: Dataset) -> Dataset:
    """A LUT whose depth reads 16: pydicom 3.0 indexes an 8-bit VOI LUT modulo 256, and knows no 12-bit Modality LUT."""
    from copy import deepcopy

    entries, first, depth = (int(value) for value in item.LUTDescriptor)
    if not 8 <= depth <= 16:
        raise ImageContentError(f"a DICOM lookup table has {depth} bits per entry; expected 8 to 16: convert the image")
    copied = deepcopy(item)
    copied.LUTDescriptor = [entries, first, 16]
    return copied


def _lut_maximum(item: Dataset) -> float:
    return float(2 ** int(item.LUTDescriptor[2]) - 1)


def _copy_rescale(dataset: Dataset, module: Dataset) -> None:
    slope, intercept = _number(dataset, "RescaleSlope"), _number(dataset, "RescaleIntercept")
    if slope is None and intercept is None:
        return
    if slope == 0:
        raise ImageContentError("the DICOM rescale slope is 0; expected another value: repair the file's header")
    module.RescaleSlope = 1.0 if slope is None else slope
    module.RescaleIntercept = 0.0 if intercept is None else intercept


def _copy_window(dataset: Dataset, module: Dataset) -> None:
    centre, width = _number(dataset, "WindowCenter"), _number(dataset, "WindowWidth")
    if centre is None and width is None:
        return
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    if function not in _WINDOW_FUNCTIONS:
        raise ImageContentError(
            f"the DICOM VOI LUT function is unknown; expected {', '.join(_WINDOW_FUNCTIONS)}: repair the file's header"
        )
    if centre is None or width is None or not (width >= 1 if function == "LINEAR" else width > 0):
        raise ImageContentError(
            f"the DICOM window has centre {centre} and width {width}; expected two numbers and a positive width "
            "(PS3.3 C.11.2.1.2): repair the file's header"
        )
    module.WindowCenter, module.WindowWidth, module.VOILUTFunction = centre, width, function


def _number(dataset: Dataset, keyword: str) -> float | None:
    """The first value of a decimal string element, or None where it is absent or empty."""
    value = dataset.get(keyword)
    if value is None or value == "" or (not isinstance(value, float | int) and len(value) == 0):
        return None
    number = float(value if isinstance(value, float | int | str) else value[0])
    if not np.isfinite(number):
        raise ImageContentError(f"the DICOM element {keyword} is not a finite number: repair the file's header")
    return number


def _voi_name(dataset: Dataset) -> str:
    module = _lut_module(dataset)
    if "VOILUTSequence" in module:
        return "VOI LUT"
    if "WindowCenter" not in module:
        return "full range"
    name = f"window {float(module.WindowCenter):g}/{float(module.WindowWidth):g}"
    return name if module.VOILUTFunction == "LINEAR" else f"{name} {module.VOILUTFunction}"
