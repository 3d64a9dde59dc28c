"""`thoraxrt.engine.dicom`: stored values and their table, against a slow oracle and other encodings."""

from __future__ import annotations

import contextlib
import math
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from thoraxrt.engine.decode import DecodeLimits, decode
from thoraxrt.engine.dicom import _lut_module, _table_from_luts
from thoraxrt.engine.errors import ImageContentError, ImageError, ImageFormatError, ImageLimitError

Bytes = npt.NDArray[np.uint8]


def table_from_dicom(ds: Dataset) -> Bytes:
    return _table_from_luts(ds, _lut_module(ds))


def picture(height: int = 40, width: int = 48, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def file_from(array: npt.NDArray[Any], kind: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    image = Image.fromarray(array)
    out = BytesIO()
    (image if mode is None else image.convert(mode)).save(out, kind, **options)
    return out.getvalue()


def smooth() -> Bytes:
    y, x = np.mgrid[0:96, 0:128]
    return (y + x).astype(np.uint8)


def dataset(stored: npt.NDArray[Any] | None = None, **elements: Any) -> Dataset:
    """A one-frame DX image; `stored` holds the stored values as int8, uint8, int16 or uint16."""
    stored = picture() if stored is None else stored
    ds = Dataset()
    ds.Modality, ds.SamplesPerPixel, ds.PhotometricInterpretation = "DX", 1, "MONOCHROME2"
    ds.Rows, ds.Columns = stored.shape
    ds.BitsAllocated = ds.BitsStored = stored.itemsize * 8
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    ds.PatientName, ds.PatientID = "Secret^Name", "SECRET-ID"
    ds.PixelData = stored.tobytes() + b"\0" * (stored.nbytes % 2)
    for name, value in elements.items():
        if value is None:
            del ds[name]
        else:
            setattr(ds, name, value)
    if "HighBit" not in elements:
        ds.HighBit = ds.BitsStored - 1
    ds["PixelData"].VR = "OW" if ds.BitsAllocated > 8 else "OB"
    return ds


def dicom(ds: Dataset, syntax: UID = ExplicitVRLittleEndian) -> bytes:
    out = BytesIO()
    body = Dataset(ds)
    if syntax.is_encapsulated:
        body["PixelData"].is_undefined_length = True
    body.save_as(out, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    head = BytesIO()
    head.write(b"\0" * 128 + b"DICM")
    write_file_meta_info(head, _meta(syntax), enforce_standard=False)
    return head.getvalue() + out.getvalue()


def _meta(syntax: UID) -> Any:
    from pydicom.dataset import FileMetaDataset

    meta = FileMetaDataset()
    meta.FileMetaInformationGroupLength = 0
    meta.TransferSyntaxUID = syntax
    return meta


def lut(entries: list[int], first: int, depth: int) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries) % 65536, first, depth])
    item.add_new("LUTData", "US", entries)
    return item


def oracle(ds: Dataset, pattern: int) -> int:
    """One entry of the table, straight from PS3.3 C.11.1 and C.11.2, one value at a time."""
    bits, signed = int(ds.BitsStored), bool(ds.PixelRepresentation)

    def modality(value: int) -> float:
        if "ModalityLUTSequence" in ds:
            item = ds.ModalityLUTSequence[0]
            count, first, _ = item.LUTDescriptor
            return float(item.LUTData[min(max(value - first, 0), (count or 65536) - 1)])
        return value * float(ds.get("RescaleSlope", 1)) + float(ds.get("RescaleIntercept", 0))

    smallest, largest = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    value = pattern & ((1 << bits) - 1)
    if signed and value > largest:
        value -= 1 << bits
    x = modality(value)
    if "VOILUTSequence" in ds:
        item = ds.VOILUTSequence[0]
        count, first, depth = item.LUTDescriptor
        fraction = item.LUTData[min(max(round(x) - first, 0), (count or 65536) - 1)] / (2**depth - 1)
    elif "WindowCenter" in ds:
        c, w, function = float(ds.WindowCenter), float(ds.WindowWidth), ds.get("VOILUTFunction", "LINEAR")
        if function == "SIGMOID":
            fraction = 1 / (1 + math.exp(-4 * (x - c) / w))
        elif function == "LINEAR_EXACT":
            fraction = 0.0 if x <= c - w / 2 else 1.0 if x > c + w / 2 else (x - c) / w + 0.5
        elif x <= c - 0.5 - (w - 1) / 2:
            fraction = 0.0
        elif x > c - 0.5 + (w - 1) / 2:
            fraction = 1.0
        else:
            fraction = (x - (c - 0.5)) / (w - 1) + 0.5
    elif "ModalityLUTSequence" in ds:
        fraction = x / (2 ** ds.ModalityLUTSequence[0].LUTDescriptor[2] - 1)
    else:
        low, high = sorted((modality(smallest), modality(largest)))
        fraction = (x - low) / (high - low)
    level = math.floor(min(max(fraction, 0), 1) * 255 + 0.5)
    return 255 - level if ds.PhotometricInterpretation == "MONOCHROME1" else level


U8, I8, U16, I16 = (np.zeros((40, 40), dtype) for dtype in ("u1", "i1", "u2", "i2"))
VIEWS: dict[str, Dataset] = {
    "8 bit": dataset(U8),
    "8 bit signed": dataset(I8),
    "12 bit": dataset(U16, BitsStored=12),
    "12 bit signed": dataset(I16, BitsStored=12),
    "16 bit MONOCHROME1": dataset(U16, PhotometricInterpretation="MONOCHROME1"),
    "1 bit": dataset(U8, BitsStored=1),
    "window": dataset(U16, BitsStored=12, WindowCenter=2000, WindowWidth=1000),
    "window of width 1": dataset(U16, BitsStored=12, WindowCenter=2000, WindowWidth=1),
    "exact window": dataset(U16, BitsStored=12, WindowCenter=2000, WindowWidth=100.5, VOILUTFunction="LINEAR_EXACT"),
    "sigmoid MONOCHROME1": dataset(
        U16, BitsStored=14, WindowCenter=8000, WindowWidth=3000, VOILUTFunction="SIGMOID",
        PhotometricInterpretation="MONOCHROME1",
    ),
    "rescale": dataset(U16, BitsStored=12, RescaleSlope=2.5, RescaleIntercept=-1024),
    "negative slope": dataset(U16, BitsStored=12, RescaleSlope=-1, RescaleIntercept=4095),
    "negative slope, window": dataset(
        I16, BitsStored=12, RescaleSlope=-2, RescaleIntercept=10, WindowCenter=100, WindowWidth=900
    ),
    "VOI LUT, 12 bit": dataset(U16, BitsStored=12, VOILUTSequence=[lut(list(range(0, 4096, 2)), 500, 12)]),
    "VOI LUT, 8 bit, more than 256 entries": dataset(
        U16, BitsStored=12, VOILUTSequence=[lut([v // 16 for v in range(4096)], 0, 8)]
    ),
    "VOI LUT after rescale, with a window": dataset(
        U16, BitsStored=12, RescaleSlope=0.75, RescaleIntercept=3, WindowCenter=1, WindowWidth=2,
        VOILUTSequence=[lut([v * v // 64 for v in range(2000)], 10, 16)],
    ),
    "modality LUT": dataset(U16, BitsStored=10, ModalityLUTSequence=[lut([v * 60 for v in range(1024)], 0, 16)]),
    "modality LUT of 12 bits, window": dataset(
        U16, BitsStored=10, WindowCenter=1000, WindowWidth=800,
        ModalityLUTSequence=[lut([4095 - 4 * v for v in range(1024)], 0, 12)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
def test_table_equals_a_slow_oracle(name: str) -> None:
    ds = VIEWS[name]
    before = ds.to_json()
    table = table_from_dicom(ds)
    assert table.dtype == np.uint8
    assert table.shape == (65536,)
    assert ds.to_json() == before
    patterns = [*range(0, 65536, 37), *range(300), *range(1990, 2010), 4095, 4096, 32767, 32768, 65535]
    differ = {p: (int(table[p]), oracle(ds, p)) for p in patterns if table[p] != oracle(ds, p)}
    # The two order their float operations differently: an exact half may round either way.
    assert all(abs(a - b) == 1 for a, b in differ.values())
    assert len(differ) <= 5


def test_table_worked_by_hand() -> None:
    assert table_from_dicom(VIEWS["8 bit"])[:256].tolist() == list(range(256))
    signed = table_from_dicom(VIEWS["8 bit signed"])  # -128 is black, 127 white
    assert [signed[p] for p in (0x80, 0xFF80, 0xFFFF, 0, 127)] == [0, 0, 127, 128, 255]
    twelve = table_from_dicom(VIEWS["12 bit"])  # 2048 x 255 / 4095 = 127.53
    assert [twelve[p] for p in (0, 2047, 2048, 4095)] == [0, 127, 128, 255]
    window = table_from_dicom(VIEWS["window"])  # (x - 1999.5) / 999 + 0.5
    assert [window[p] for p in (0, 1500, 1501, 1999, 2000, 2498, 2499, 4095)] == [0, 0, 0, 127, 128, 255, 255, 255]
    sigmoid = table_from_dicom(VIEWS["sigmoid MONOCHROME1"])  # 255 x 0.5 rounds up to 128, then inverts
    assert sigmoid[8000] == 127
    assert table_from_dicom(VIEWS["negative slope"])[[0, 4095]].tolist() == [255, 0]
    inverted = table_from_dicom(VIEWS["16 bit MONOCHROME1"])
    assert inverted[[0, 65535]].tolist() == [255, 0]


def test_bits_above_bits_stored_make_no_difference() -> None:
    table = table_from_dicom(VIEWS["12 bit signed"])
    patterns = np.arange(4096)
    np.testing.assert_array_equal(table[patterns], table[patterns | 0xF000])
    assert [table[p] for p in (0x800, 0xF800, 0x7FF)] == [0, 0, 255]


@pytest.mark.parametrize(
    "elements",
    [
        {"WindowCenter": 100, "WindowWidth": 0},
        {"WindowCenter": 100, "WindowWidth": -5},
        {"WindowCenter": 100, "WindowWidth": 0.5},
        {"WindowCenter": 100},
        {"WindowWidth": 100},
        {"WindowCenter": 100, "WindowWidth": 5, "VOILUTFunction": "CUBIC"},
        {"RescaleSlope": 0, "RescaleIntercept": 1},
        {"VOILUTSequence": [lut([1, 2], 0, 32)]},
    ],
)
def test_malformed_views_are_refused(elements: dict[str, Any]) -> None:
    with pytest.raises(ImageContentError, match=r"expected .*: (repair|convert)"):
        decode(dicom(dataset(**elements)))


def test_first_of_several_windows() -> None:
    both = dataset(U16, BitsStored=12, WindowCenter=[2000, 5], WindowWidth=[1000, 6])
    np.testing.assert_array_equal(table_from_dicom(both), table_from_dicom(VIEWS["window"]))
    assert decode(dicom(both)).source.voi == "window 2000/1000"


def test_empty_window_is_no_window() -> None:
    assert decode(dicom(dataset(WindowCenter="", WindowWidth=""))).source.voi == "full range"


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("name", ["8 bit signed", "12 bit signed", "window", "VOI LUT, 12 bit", "modality LUT"])
def test_dicom_is_its_table_of_its_stored_values(syntax: UID, name: str) -> None:
    ds = Dataset(VIEWS[name])
    dtype = np.dtype(f"{'ui'[ds.PixelRepresentation]}{ds.BitsAllocated // 8}")
    values = np.random.default_rng(3).integers(0, 256, 40 * 40 * dtype.itemsize, dtype=np.uint8).view(dtype)
    big = dtype.newbyteorder(">") if syntax is ExplicitVRBigEndian else dtype
    ds.PixelData = values.astype(big).tobytes()
    r = decode(dicom(ds, syntax))
    expected = table_from_dicom(ds)[values.astype(np.int64) & 0xFFFF].reshape(40, 40)
    np.testing.assert_array_equal(r.pixels, expected)
    assert (r.source.format, r.source.transfer_syntax, r.source.bits) == ("dicom", str(syntax), ds.BitsStored)


@pytest.mark.parametrize(("rows", "columns"), [(33, 35), (32, 33)])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_odd_sizes(rows: int, columns: int, syntax: UID) -> None:
    values = picture(rows, columns)
    np.testing.assert_array_equal(decode(dicom(dataset(values), syntax)).pixels, values)


def encoded(values: Bytes, syntax: UID) -> bytes:
    """`values` as DICOM compressed with Pillow (JPEG 2000, JPEG) or pydicom (RLE)."""
    ds = dataset(values)
    if syntax == RLELossless:
        ds.file_meta = _meta(ExplicitVRLittleEndian)
        ds.compress(RLELossless, generate_instance_uid=False)
        del ds.file_meta
    else:
        codec = "JPEG2000" if syntax == JPEG2000Lossless else "JPEG"
        ds.PixelData = encapsulate([file_from(values, codec, **({"no_jp2": True} if codec == "JPEG2000" else {}))])
    return dicom(ds, syntax)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGBaseline8Bit])
def test_compressed_dicom(syntax: UID) -> None:
    values = smooth()
    pixels = decode(encoded(values, syntax)).pixels
    if syntax == JPEGBaseline8Bit:
        assert np.abs(pixels.astype(int) - values).max() < 12
    else:
        np.testing.assert_array_equal(pixels, values)


def compressed(values: npt.NDArray[Any], syntax: UID, bits: int, signed: int) -> bytes:
    """`values` as DICOM in a lossless transfer syntax; JPEG codestreams are unsigned, as DICOM's commonly are."""
    unsigned = values.view(f"u{values.itemsize}") & ((1 << bits) - 1)
    if syntax == JPEGLSLossless:
        stream = imagecodecs.jpegls_encode(unsigned)
    elif syntax == JPEG2000Lossless:
        stream = imagecodecs.jpeg2k_encode(values, level=0, reversible=True, codecformat="J2K")
    else:
        predictor = 1 if syntax == JPEGLosslessSV1 else 5
        stream = imagecodecs.jpeg8_encode(unsigned, lossless=True, predictor=predictor, bitspersample=bits)
    return dicom(dataset(values, BitsStored=bits, PixelData=encapsulate([bytes(stream)])), syntax)


DEPTHS = [(8, 0), (8, 1), (10, 0), (12, 0), (12, 1), (15, 0), (16, 0), (16, 1)]


@pytest.mark.parametrize("syntax", [JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless])
@pytest.mark.parametrize(("bits", "signed"), DEPTHS)
def test_lossless_compressions_are_one_image(syntax: UID, bits: int, signed: int) -> None:
    y, x = np.mgrid[0:64, 0:80]
    values = ((x * y * 7 + x) % (1 << bits) - (signed << (bits - 1))).astype(f"{'ui'[signed]}{1 if bits == 8 else 2}")
    plain = decode(dicom(dataset(values, BitsStored=bits))).pixels
    np.testing.assert_array_equal(decode(compressed(values, syntax, bits, signed)).pixels, plain)


def test_extended_jpeg_of_12_bits() -> None:
    values = smooth().astype(np.uint16) * 16
    stream = bytes(imagecodecs.jpeg8_encode(values, 95, bitspersample=12))
    ds = dataset(values, BitsStored=12, PixelData=encapsulate([stream]))
    plain = decode(dicom(dataset(values, BitsStored=12))).pixels
    assert np.abs(decode(dicom(ds, JPEGExtended12Bit)).pixels.astype(int) - plain).max() <= 2


@pytest.mark.parametrize("order", ["<", ">"])
def test_words_of_8_bit_values(order: str) -> None:
    values = picture(33, 35)  # an odd number of them
    ds = dataset(values)
    ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(f"{order}u2").tobytes()
    ds["PixelData"].VR = "OW"
    syntax = ExplicitVRLittleEndian if order == "<" else ExplicitVRBigEndian
    np.testing.assert_array_equal(decode(dicom(ds, syntax)).pixels, values)


@pytest.mark.parametrize("syntax", [JPEGLossless, JPEGLSLossless, JPEG2000Lossless, JPEGBaseline8Bit])
def test_an_incomplete_scan_is_refused_though_it_has_an_end(syntax: UID) -> None:
    values = picture(64, 80)
    data = encoded(values, syntax) if syntax == JPEGBaseline8Bit else compressed(values, syntax, 8, 0)
    ds = pydicom.dcmread(BytesIO(data))
    stream = get_frame(ds.PixelData, 0, number_of_frames=1)
    end = stream.rindex(b"\xff\xd9")
    for size in range(len(stream) // 2, end - 2, 97):
        ds.PixelData = encapsulate([stream[:size] + b"\xff\xd9"])
        with pytest.raises(ImageFormatError):
            decode(dicom(ds, syntax))


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless])
def test_a_codestream_of_another_transfer_syntax_is_refused(syntax: UID) -> None:
    with pytest.raises(ImageFormatError):
        decode(dicom(pydicom.dcmread(BytesIO(encoded(smooth(), JPEGBaseline8Bit))), syntax))


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGBaseline8Bit, ExplicitVRLittleEndian])
def test_truncated_dicom_is_refused(syntax: UID, capfd: pytest.CaptureFixture[str]) -> None:
    data = dicom(dataset(smooth())) if syntax == ExplicitVRLittleEndian else encoded(smooth(), syntax)
    for size in (140, 200, 300, len(data) // 2, len(data) - 12):
        with pytest.raises(ImageError):
            decode(data[:size])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGBaseline8Bit, ExplicitVRLittleEndian])
def test_header_and_pixel_data_must_agree(syntax: UID) -> None:
    data = dicom(dataset(smooth())) if syntax == ExplicitVRLittleEndian else encoded(smooth(), syntax)
    rows = data.index(b"\x28\0\x10\0US\x02\0") + 8
    with pytest.raises(ImageFormatError):
        decode(data[:rows] + struct.pack("<H", 97) + data[rows + 2 :])


@pytest.mark.parametrize(
    ("elements", "error", "text"),
    [
        ({"PixelData": None}, ImageFormatError, "no pixel data"),
        ({"NumberOfFrames": 2}, ImageContentError, "2 frames"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, ImageContentError, "in colour"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, ImageContentError, "in colour"),
        ({"Modality": "CT"}, ImageContentError, "modality is CT"),
        ({"Modality": None}, ImageContentError, "modality is missing"),
        ({"BitsAllocated": 32}, ImageContentError, "8 or 16 allocated"),
        ({"BitsStored": 17}, ImageContentError, "17 bits"),
        ({"HighBit": 5}, ImageContentError, "lowest"),
        ({"Rows": None}, ImageFormatError, "corrupt"),
    ],
)
def test_refused_dicom(elements: dict[str, Any], error: type[ImageError], text: str) -> None:
    ds = dataset()
    for name, value in elements.items():
        if value is None:
            del ds[name]
        else:
            setattr(ds, name, value)
    with pytest.raises(error, match=text) as caught:
        decode(dicom(ds))
    assert "ecret" not in str(caught.value)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("modality", ["CR", "DX", "RG"])
def test_modalities(modality: str) -> None:
    assert decode(dicom(dataset(Modality=modality))).width == 48


def test_deflated_dicom_is_refused_uninflated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zlib, "decompress", lambda *_: pytest.fail("inflated"))
    data = dicom(dataset(), ExplicitVRLittleEndian).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99", 1)
    meta = data.index(b"UI", 140)
    size = struct.pack("<H", len(DeflatedExplicitVRLittleEndian))
    with pytest.raises(ImageFormatError, match="deflated"):
        decode(data[: meta + 2] + size + data[meta + 4 :])


def test_limits_hold_before_decoding() -> None:
    with pytest.raises(ImageLimitError, match="65535 x 65535"):
        decode(dicom(dataset(Rows=65535, Columns=65535)))


def test_unknown_transfer_syntax_is_named() -> None:
    with pytest.raises(ImageFormatError, match=r"syntax is 1\.2\.840\.10008\.1\.2\.4\.201"):
        decode(_relabelled("1.2.840.10008.1.2.4.201"))


def _relabelled(uid: str) -> bytes:
    head = BytesIO()
    head.write(b"\0" * 128 + b"DICM")
    write_file_meta_info(head, _meta(UID(uid)), enforce_standard=False)
    data = dicom(dataset())
    return head.getvalue() + data[data.index(b"\x08\0\x60\0") :]


def test_odd_values_do_not_warn(capfd: pytest.CaptureFixture[str]) -> None:
    data = dicom(dataset(WindowCenter=1000, WindowWidth=2000))
    width = data.index(b"\x28\0\x51\x10DS") + 6
    (size,) = struct.unpack_from("<H", data, width)
    text = b"2000.000000000000000"
    odd = data[:width] + struct.pack("<H", len(text)) + text + data[width + 2 + size :]
    # a decimal string of 20 characters, where 16 are allowed
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode(odd)
        decode(dicom(dataset(PixelData=picture().tobytes() + b"\0" * 5000)))  # excess padding
    assert not caught
    assert capfd.readouterr() == ("", "")


def test_real_dicoms_of_one_image_are_one_image(nih: Path) -> None:
    chest = decode((nih / "images" / "00000002_000.png").read_bytes()).pixels
    film: Bytes | None = None
    files = sorted((nih / "dicom").glob("*.dcm"))
    assert len(files) >= 13
    for file in files:
        r = decode(file.read_bytes())
        if "00000002_000" in file.name:
            np.testing.assert_array_equal(r.pixels, chest)
        elif "mono1" in file.name:
            film = r.pixels if film is None else film
            np.testing.assert_array_equal(r.pixels, film)
            assert (r.source.voi, r.source.bits, r.source.photometric) == ("window 15000/30000", 15, "MONOCHROME1")


FILES = {
    "plain": dicom(dataset(VOILUTSequence=[lut(list(range(256)), 0, 8)])),
    "rle": encoded(smooth(), RLELossless),
    "jpeg": encoded(smooth(), JPEGBaseline8Bit),
    "j2k": encoded(smooth(), JPEG2000Lossless),
    "jpeg lossless": compressed(smooth(), JPEGLosslessSV1, 8, 0),
    "jpeg-ls": compressed(smooth(), JPEGLSLossless, 8, 0),
}


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(FILES)), data=st.data())
def test_damaged_files_give_a_radiograph_or_an_image_error(name: str, data: st.DataObject) -> None:
    damaged = bytearray(FILES[name])
    for at in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.integers(0, len(damaged)) | st.none())
    with contextlib.suppress(ImageError):
        decode(bytes(damaged[:cut]), DecodeLimits(max_pixels=1_000_000))
