"""DICOM files to radiographs: the stored values, and the table that makes them 8 bits.

Owns what is DICOM's own: transfer syntaxes, the Image Pixel module, Modality and VOI LUTs. pydicom
parses, imagecodecs decompresses. Reads nothing of the patient, the study or the institution.
"""

from __future__ import annotations

import re
import struct
import warnings
from copy import deepcopy
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.tag import BaseTag
from pydicom.uid import UID

from thoraxrt.engine.decode import (
    DecodeLimits,
    Frame,
    Pixels,
    Provenance,
    Radiograph,
    corrupt,
    frame_from_jpeg,
    sealed,
)
from thoraxrt.engine.errors import ImageContentError, ImageFormatError

__all__ = ["radiograph_from_dicom"]

# The frame markers that each compressed transfer syntax allows (PS3.5, 8.2).
_MARKERS = {
    "1.2.840.10008.1.2.4.50": (0xC0,),  # JPEG Baseline
    "1.2.840.10008.1.2.4.51": (0xC0, 0xC1),  # JPEG Extended, 8 or 12 bits
    "1.2.840.10008.1.2.4.57": (0xC3,),  # JPEG Lossless, process 14
    "1.2.840.10008.1.2.4.70": (0xC3,),  # JPEG Lossless, first-order prediction
    "1.2.840.10008.1.2.4.80": (0xF7,),  # JPEG-LS Lossless
    "1.2.840.10008.1.2.4.81": (0xF7,),  # JPEG-LS Near-Lossless
    "1.2.840.10008.1.2.4.90": (0x51,),  # JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.91": (0x51,),  # JPEG 2000
}
_RLE = "1.2.840.10008.1.2.5"
_BIG_ENDIAN = "1.2.840.10008.1.2.2"
_UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", _BIG_ENDIAN)
_DEFLATED = "1.2.840.10008.1.2.1.99"
_MODALITIES = ("CR", "DX", "RG")  # RG: digitised film
_WINDOW_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")

_ELEMENTS = (  # the only ones ever read
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
_TAGS = [BaseTag(tag) for tag in map(tag_for_keyword, _ELEMENTS) if tag is not None]


def radiograph_from_dicom(data: bytes, limits: DecodeLimits) -> Radiograph:
    """The radiograph in one DICOM file; `thoraxrt.engine.decode.decode` calls it and translates errors.

    Raises ImageFormatError, ImageLimitError, ImageContentError, or whatever pydicom and imagecodecs
    raise for a damaged file.
    """
    _silence_pydicom()
    dataset, syntax = _dataset_from_bytes(data)
    _check_content(dataset)
    image = _image_from_dataset(dataset)
    limits.check_size(image.columns, image.rows)
    module = _lut_module(dataset)
    table = _table_from_luts(dataset, module)
    stored = _stored_values(dataset, image, syntax)  # (H, W)
    source = Provenance(
        format="dicom",
        bits=image.stored,
        photometric=str(dataset.PhotometricInterpretation),
        transfer_syntax=syntax,
        voi=_voi_name(module),
    )
    if stored.dtype == np.uint8:
        return sealed(np.take(table, stored), source)
    return sealed(stored, source, table)


_PYDICOM = r"pydicom(\.|$)"


def _silence_pydicom() -> None:
    """Keep pydicom from warning of a file that we accept or refuse ourselves.

    `warnings.catch_warnings` is not thread-safe, so one filter is added and stays.
    """
    if not any(f[0] == "ignore" and getattr(f[3], "pattern", f[3]) == _PYDICOM for f in warnings.filters):
        warnings.filterwarnings("ignore", module=_PYDICOM)


def _dataset_from_bytes(data: bytes) -> tuple[Dataset, str]:
    """The elements we use and the transfer syntax UID; refuses what would have to be inflated first.

    Not `pydicom.dcmread`: it inflates a deflated file, whatever its size, before anything can be asked.
    """
    file = BytesIO(data)
    file.seek(132)  # the preamble and 'DICM' (PS3.10, section 7.1)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    syntax = str(meta.get("TransferSyntaxUID", ""))
    _check_syntax(syntax)
    uid = UID(syntax)
    return read_dataset(file, uid.is_implicit_VR, uid.is_little_endian, specific_tags=list(_TAGS)), syntax


def _check_syntax(syntax: str) -> None:
    if syntax == _DEFLATED:
        raise ImageFormatError(
            "the DICOM file is deflated, which hides its size; expected another transfer syntax: "
            "convert it to Explicit VR Little Endian"
        )
    if syntax not in (*_UNCOMPRESSED, _RLE, *_MARKERS):
        shown = syntax if syntax.replace(".", "").isdecimal() and len(syntax) <= 64 else "missing or unreadable"
        raise ImageFormatError(
            f"the DICOM transfer syntax is {shown}; expected uncompressed, RLE, JPEG, JPEG-LS or JPEG 2000: "
            "convert it to Explicit VR Little Endian"
        )


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


@dataclass(frozen=True, slots=True)
class _Image:
    """The Image Pixel module of one grayscale frame (PS3.3 C.7.6.3), validated."""

    rows: int
    columns: int
    allocated: int  # 8 or 16
    stored: int


def _image_from_dataset(dataset: Dataset) -> _Image:
    rows, columns, allocated = (int(dataset[name].value) for name in ("Rows", "Columns", "BitsAllocated"))
    stored, _ = _depth(dataset)
    if allocated not in (8, 16) or stored > allocated or int(dataset.get("HighBit", stored - 1)) != stored - 1:
        raise ImageContentError(
            f"the DICOM image stores {stored} of {allocated} bits; expected 8 or 16 allocated, "
            "the stored ones lowest: convert it"
        )
    return _Image(rows, columns, allocated, stored)


def _depth(dataset: Dataset) -> tuple[int, bool]:
    """Bits Stored, and whether the values are signed (PS3.3 C.7.6.3.1)."""
    bits, representation = int(dataset.BitsStored), int(dataset.get("PixelRepresentation") or 0)
    if not 1 <= bits <= 16 or representation not in (0, 1):
        raise ImageContentError(f"the DICOM image stores {bits} bits; expected 1 to 16, signed or unsigned: convert it")
    return bits, representation == 1


def _stored_values(dataset: Dataset, image: _Image, syntax: str) -> npt.NDArray[np.unsignedinteger[Any]]:
    """The stored values' bit patterns, uint8 or uint16 `(H, W)`; signed ones in two's complement.

    What stands above Bits Stored (overlays, garbage, a sign) is ignored by the table.
    """
    element = dataset["PixelData"]
    if syntax in _UNCOMPRESSED:
        values = _values_from_bytes(element.value, image, ">" if syntax == _BIG_ENDIAN else "<", element.VR)
    else:
        values = _values_from_frame(get_frame(element.value, 0, number_of_frames=1), image, syntax)
    if values.shape != (image.rows, image.columns):
        raise corrupt("the DICOM pixel data are of another size than their header says")
    if values.dtype.kind == "i":  # signed JPEG 2000
        values = values.astype(np.int16).view(np.uint16)
    return values


def _values_from_bytes(data: bytes, image: _Image, order: str, vr: str) -> npt.NDArray[Any]:
    """Uncompressed values; OW is a string of 16-bit words even where a value has 8 bits (PS3.5, 8.1.1 and 8.2)."""
    unit = 2 if vr == "OW" or image.allocated == 16 else 1
    count = image.rows * image.columns
    size = count * image.allocated // 8
    words = np.frombuffer(data[: size + size % unit], f"{order}u{unit}").astype(f"<u{unit}", copy=False)
    return words.view(f"<u{image.allocated // 8}")[:count].reshape(image.rows, image.columns)


def _values_from_frame(stream: bytes, image: _Image, syntax: str) -> npt.NDArray[Any]:
    """Decompressed values, once the codestream has said that it is the image in the DICOM header.

    A codec allocates by the codestream's own header, so the two must agree before it starts.
    """
    if syntax == _RLE:
        dtype = np.dtype(f"<u{image.allocated // 8}")
        decoded = imagecodecs.dicomrle_decode(stream, dtype, out=image.rows * image.columns * dtype.itemsize)
        return np.frombuffer(decoded, dtype).reshape(image.rows, image.columns)
    is_jpeg_2000 = _MARKERS[syntax] == (0x51,)
    frame = _frame_from_j2k(stream) if is_jpeg_2000 else frame_from_jpeg(stream)
    if (frame.width, frame.height, frame.components) != (image.columns, image.rows, 1):
        raise corrupt(
            f"the DICOM header says {image.columns} x {image.rows} pixels in 1 channel, "
            f"its pixel data {frame.width} x {frame.height} in {frame.components}"
        )
    if frame.marker not in _MARKERS[syntax]:
        raise corrupt("the DICOM pixel data are compressed in another way than the transfer syntax says")
    if frame.bits > image.allocated:
        raise corrupt(f"the DICOM header allocates {image.allocated} bits, its pixel data have {frame.bits}")
    if is_jpeg_2000:
        return imagecodecs.jpeg2k_decode(stream, numthreads=1)
    if frame.marker == 0xF7:
        return imagecodecs.jpegls_decode(stream)
    return _values_from_jpeg(stream, frame)


def _frame_from_j2k(stream: bytes) -> Frame:
    """The SIZ segment of a JPEG 2000 codestream that also has an end (ITU-T T.800, A.5.1)."""
    if not stream.startswith(b"\xff\x4f\xff\x51") or b"\xff\xd9" not in stream[-4:]:
        raise corrupt("the JPEG 2000 data are truncated or corrupt (no start or no end)")
    right, bottom, left, top = struct.unpack_from(">4I", stream, 8)
    components, depth = struct.unpack_from(">HB", stream, 40)
    return Frame(width=right - left, height=bottom - top, bits=(depth & 0x7F) + 1, components=components, marker=0x51)


_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # stuffed zeros, fill and restarts belong to a scan


def _values_from_jpeg(stream: bytes, frame: Frame) -> npt.NDArray[Any]:
    """Baseline, extended or lossless JPEG of one component, which has one scan.

    libjpeg completes a scan that lacks data in silence. One that is whole does not care what
    follows it, so a second decode with more data must give the same picture.
    """
    end = _MARKER.search(stream, frame.scan)
    if end is None or end[0] != b"\xff\xd9":
        raise corrupt("the JPEG data are truncated or corrupt (a scan does not end)")
    head = stream[: end.start()]
    values = imagecodecs.jpeg8_decode(head + b"\xff\xd9")
    if not np.array_equal(values, imagecodecs.jpeg8_decode(head + b"\x55\xaa" * 64 + b"\xff\xd9")):
        raise corrupt("the JPEG data are truncated or corrupt (a scan is incomplete)")
    return values


def _table_from_luts(dataset: Dataset, module: Dataset) -> Pixels:
    """The table from a DICOM image's stored values to 8 bits, uint8 `(65536,)`, read-only; `module` from `_lut_module`.

    Indexed by the uint16 bit pattern of the stored value (two's complement where Pixel
    Representation is 1); bits above Bits Stored make no difference. 0 is black, 255 white.

    Steps: Modality LUT or rescale (PS3.3 C.11.1), then VOI LUT or the first window (PS3.3 C.11.2;
    LINEAR, LINEAR_EXACT or SIGMOID), both pydicom's; then linear to 0..255, round half up; last,
    MONOCHROME1 is inverted (PS3.3 C.7.6.3.1.2). A VOI LUT Sequence goes before a window. Without
    either, the full stored range is used, which is the identity for 8 unsigned bits.

    `dataset` is not changed. Raises ImageContentError for a window, slope or LUT that makes no sense.
    """
    bits, signed = _depth(dataset)
    stored = np.arange(1 << bits, dtype=np.int32)  # (2**bits,)
    if signed:
        stored[1 << (bits - 1) :] -= 1 << bits
    with np.errstate(all="ignore"):
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


def _lut_maximum(item: Dataset) -> float:
    return float(2 ** int(item.LUTDescriptor[2]) - 1)


def _lut_module(dataset: Dataset) -> Dataset:
    """The Modality LUT and VOI LUT modules of `dataset`, validated, with the first view only."""
    module = Dataset()
    module.set_original_encoding(*dataset.original_encoding)
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
    entries, first, depth = (int(value) for value in item.LUTDescriptor)
    if not 8 <= depth <= 16:
        raise ImageContentError(f"a DICOM lookup table has {depth} bits per entry; expected 8 to 16: convert the image")
    copied = deepcopy(item)
    copied.LUTDescriptor = [entries, first, 16]
    return copied


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


def _voi_name(module: Dataset) -> str:
    if "VOILUTSequence" in module:
        return "VOI LUT"
    if "WindowCenter" not in module:
        return "full range"
    name = f"window {float(module.WindowCenter):g}/{float(module.WindowWidth):g}"
    return name if module.VOILUTFunction == "LINEAR" else f"{name} {module.VOILUTFunction}"
