"""`thoraxrt.engine.decode`: every format gives the right pixels, or one clear ImageError."""

from __future__ import annotations

import math
import re
import struct
import subprocess
import sys
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from thoraxrt.engine import decode as module
from thoraxrt.engine.decode import DecodeLimits, Provenance, Radiograph, ThreadDecoder, decode, table_from_png16
from thoraxrt.engine.errors import ImageContentError, ImageError, ImageFormatError, ImageLimitError

Bytes = npt.NDArray[np.uint8]


def picture(height: int = 40, width: int = 48, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def file_from(array: npt.NDArray[Any], kind: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    image = Image.fromarray(array)
    out = BytesIO()
    (image if mode is None else image.convert(mode)).save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *extra: bytes, interlaced: bool = False) -> bytes:
    """A PNG from raw scanlines, each with its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + body


def scanlines(array: npt.NDArray[Any]) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in array)


def test_public_surface() -> None:
    assert set(module.__all__) == {
        "DecodeLimits", "Decoder", "Provenance", "Radiograph", "ThreadDecoder", "decode",
        "table_from_png16",
    }  # fmt: skip


def test_radiograph_is_sealed() -> None:
    r = decode(file_from(picture()))
    assert (r.width, r.height) == (48, 40)
    assert r.pixels.dtype == np.uint8
    assert r.pixels.flags.c_contiguous
    assert not r.pixels.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        r.pixels[0, 0] = 1


def test_from_pixels_copies() -> None:
    array = picture()[:, ::2]
    r = Radiograph.from_pixels(array)
    before = array.copy()
    array[:] = 0
    np.testing.assert_array_equal(r.pixels, before)
    assert r.source == Provenance(format="array", bits=8, photometric="gray")


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4)), np.zeros((4, 4, 1), np.uint8), np.zeros((0, 4), np.uint8), np.zeros((4, 4), np.uint16)]
)
def test_from_pixels_refuses(array: Any) -> None:
    with pytest.raises(ImageContentError, match="expected uint8"):
        Radiograph.from_pixels(array)


def test_radiograph_refuses_a_writable_array() -> None:
    with pytest.raises(ImageContentError, match="from_pixels"):
        Radiograph(values=picture(), source=Provenance(format="array", bits=8, photometric="gray"))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P"])
def test_png_of_every_mode_gives_the_gray_channel(mode: str) -> None:
    gray = picture()
    data = file_from(gray, mode=mode)
    r = decode(data)
    np.testing.assert_array_equal(r.pixels, gray)
    names = {"L": "gray", "LA": "gray+alpha", "RGB": "rgb", "RGBA": "rgba", "P": "palette"}
    assert r.source == Provenance(format="png", bits=8, photometric=names[mode])


WHOLE = ((0, 0, 1, 1),)
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


@pytest.mark.parametrize("passes", [WHOLE, ADAM7], ids=["plain", "interlaced"])
@pytest.mark.parametrize(("bits", "colour", "channels"), [(8, 0, 1), (8, 2, 3), (8, 6, 4), (16, 0, 1)])
def test_a_png_read_alone_is_what_pillow_reads(
    bits: int,
    colour: int,
    channels: int,
    passes: tuple[tuple[int, int, int, int], ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With every filter: what differs from the prediction is random, and the same in all channels, so that it is gray."""
    differences = np.random.default_rng(2).integers(0, 256, (37, 53, bits // 8), dtype=np.uint8).repeat(channels, 2)
    rows = b"".join(
        bytes([number % 5]) + row.tobytes()
        for x, y, dx, dy in passes
        for number, row in enumerate(differences[y::dy, x::dx])
    )
    data = png(53, 37, bits, colour, rows, interlaced=passes is ADAM7)
    read = decode(data, keep_stored=True)
    assert np.unique(read.values).size > 200
    monkeypatch.setattr(module, "PngImageFile", None)
    alone = decode(data, keep_stored=True, alone=True)
    np.testing.assert_array_equal(alone.values, read.values)
    assert (alone.source, alone.table is None) == (read.source, read.table is None)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_png_that_pillow_refuses_is_refused_alone(data: st.DataObject) -> None:
    """Its checksums are right, but not always what they are of: scanlines or their compressed form."""
    rows = bytearray(scanlines(picture()))
    for at in data.draw(st.lists(st.integers(0, 39), max_size=3)):
        rows[49 * at] = data.draw(st.integers(0, 6))  # 5 and 6 are no filters
    rows += bytes(data.draw(st.sampled_from([0, 0, 1, 100])))
    whole = zlib.compress(bytes(rows[: data.draw(st.none() | st.integers(0, len(rows)))]))
    idat = whole[: data.draw(st.none() | st.integers(0, len(whole)))]
    header = struct.pack(">IIBBBBB", 48, 40, 8, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", idat), chunk(b"IEND", b"")]
    file = b"\x89PNG\r\n\x1a\n" + b"".join(parts[: data.draw(st.integers(2, 3))])
    assert outcome(file, alone=True) == outcome(file)


def test_png_alpha_is_ignored() -> None:
    gray, alpha = picture(), picture(seed=1)
    np.testing.assert_array_equal(decode(file_from(np.dstack([gray, gray, gray, alpha]))).pixels, gray)
    np.testing.assert_array_equal(decode(file_from(np.dstack([gray, alpha]))).pixels, gray)


@pytest.mark.parametrize(("bits", "step"), [(1, 255), (2, 85), (4, 17)])
def test_png_of_few_bits(bits: int, step: int) -> None:
    levels = picture() % (1 << bits)
    packed = np.packbits(np.unpackbits(levels[..., None], axis=2)[:, :, 8 - bits :].reshape(40, -1), axis=1)
    r = decode(png(48, 40, bits, 0, scanlines(packed)))
    np.testing.assert_array_equal(r.pixels, levels * step)
    assert r.source.bits == bits


def test_png_16_bit_is_exact_for_every_value() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    r = decode(file_from(values))
    oracle = [math.floor(v * 255 / 65535 + 0.5) for v in range(65536)]
    assert r.pixels.ravel().tolist() == oracle == table_from_png16().tolist()
    assert r.source.bits == 16


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_png_16_bit_with_channels_is_refused(colour: int, channels: int) -> None:
    data = png(40, 40, 16, colour, scanlines(np.zeros((40, 40 * channels), ">u2")))
    with pytest.raises(ImageContentError, match="16 bits per channel"):
        decode(data)


def test_png_ancillary_chunks_are_neither_read_nor_warned_of(capfd: pytest.CaptureFixture[str]) -> None:
    gray = picture()
    extra = (
        chunk(b"iCCP", b"bad\0\0rubbish"),
        chunk(b"tEXt", b"\0" * 9),
        chunk(b"acTL", b"\0" * 8),
        chunk(b"tRNS", b""),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        np.testing.assert_array_equal(decode(png(48, 40, 8, 0, scanlines(gray), *extra)).pixels, gray)
    assert not caught
    assert capfd.readouterr() == ("", "")


def test_png_trailing_data_are_fine_and_truncation_is_not() -> None:
    data = file_from(picture())
    np.testing.assert_array_equal(decode(data + b"rubbish").pixels, picture())
    for size in (*range(8, 60), len(data) // 2, len(data) - 13, len(data) - 1):
        with pytest.raises(ImageFormatError):
            decode(data[:size])


def test_png_that_lost_a_chunk_is_refused() -> None:
    stream = zlib.compress(scanlines(picture()))
    head, tail = file_from(picture())[:33], chunk(b"IEND", b"")
    parts = [chunk(b"IDAT", stream[at : at + 500]) for at in range(0, len(stream), 500)]
    np.testing.assert_array_equal(decode(head + b"".join(parts) + tail).pixels, picture())
    for lost in range(len(parts) - 1):
        with pytest.raises(ImageFormatError):
            decode(head + b"".join(parts[:lost] + parts[lost + 1 :]) + tail)
    with pytest.raises(ImageFormatError):
        decode(head + tail)


def smooth() -> Bytes:
    y, x = np.mgrid[0:96, 0:128]
    return (y + x).astype(np.uint8)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_equals_pillow(mode: str, progressive: bool) -> None:
    data = file_from(smooth(), "JPEG", mode, quality=60, progressive=progressive)
    r = decode(data)
    np.testing.assert_array_equal(r.pixels, np.asarray(Image.open(BytesIO(data)).convert("L")))
    assert np.abs(r.pixels.astype(int) - smooth()).max() < 12
    assert r.source == Provenance(format="jpeg", bits=8, photometric="gray" if mode == "L" else "rgb")


def test_jpeg_metadata_are_not_read() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff rubbish"
    data = file_from(smooth(), "JPEG", "L", exif=exif, comment=b"Secret^Name", icc_profile=b"rubbish")
    np.testing.assert_array_equal(decode(data).pixels, decode(file_from(smooth(), "JPEG", "L")).pixels)


def test_truncated_jpeg_is_refused() -> None:
    data = file_from(smooth(), "JPEG", "L")
    for size in (3, 4, 20, 200, len(data) // 2, len(data) - 2, len(data) - 1):
        with pytest.raises(ImageFormatError, match="truncated"):
            decode(data[:size])


def test_cmyk_jpeg_is_refused() -> None:
    with pytest.raises(ImageContentError, match="4 channels"):
        decode(file_from(smooth(), "JPEG", "CMYK"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_colour_photograph_is_refused_and_a_marker_is_not(kind: str) -> None:
    gray = np.dstack([smooth()] * 3)
    marked = gray.copy()
    marked[:8, :8] = (255, 0, 0)  # 0.5% of the picture
    assert decode(file_from(marked, kind)).width == 128
    photo = gray.copy()
    photo[:48] = (200, 120, 60)
    with pytest.raises(ImageContentError, match="colour picture"):
        decode(file_from(photo, kind))


def test_a_colour_palette_is_refused() -> None:
    photo = np.full((40, 40, 3), (200, 120, 60), np.uint8)
    with pytest.raises(ImageContentError, match="colour picture"):
        decode(file_from(photo, mode="P"))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "the file is empty"),
        (b"%PDF-1.7 Secret", "a PDF document"),
        (b"GIF89a", "a GIF"),
        (b"II*\0", "a TIFF"),
        (b"\r\n <!DOCTYPE html>", "HTML"),
        (b"\x08\0\x05\0CS", "without its preamble"),
        (b"Secret" * 100, "neither PNG, JPEG nor DICOM"),
        (b"\x89PNG\r\n\x1a\n", "PNG file is truncated or corrupt"),
        (b"\xff\xd8\xff", "JPEG file is truncated or corrupt"),
        (bytes(128) + b"DICM", "transfer syntax is missing"),
    ],
)
def test_unknown_bytes_are_named_never_quoted(data: bytes, text: str) -> None:
    with pytest.raises(ImageFormatError, match=re.escape(text)) as caught:
        decode(data)
    assert "Secret" not in str(caught.value)


def test_limits_hold_before_decoding() -> None:
    bomb = png(60_000, 60_000, 8, 0, b"")  # no pixels behind the header
    for data in (bomb, png(5000, 100, 8, 0, b""), png(31, 31, 8, 0, b"")):
        with pytest.raises(ImageLimitError, match="pixels"):
            decode(data)
    jpeg = bytearray(file_from(smooth(), "JPEG", "L"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(ImageLimitError, match="65535 x 65535"):
        decode(bytes(jpeg))
    with pytest.raises(ImageLimitError, match="bytes"):
        decode(file_from(picture()), DecodeLimits(max_bytes=100))


@pytest.mark.parametrize("alone", [False, True])
def test_a_file_of_countless_parts_is_refused(alone: bool) -> None:
    whole = png(64, 64, 8, 0, scanlines(picture(64, 64)), *[chunk(b"tEXt", b"")] * 9_997)  # and IHDR, IDAT, IEND
    assert decode(whole, alone=alone).width == 64
    for data in (
        png(64, 64, 8, 0, scanlines(picture(64, 64)), *[chunk(b"IDAT", b"")] * 10_000),
        b"\xff\xd8" + b"\xff\xfe\0\x02" * 10_000 + file_from(smooth(), "JPEG", "L")[2:],
    ):
        with pytest.raises(
            ImageLimitError, match=r"has more than 10000 (chunks|segments); expected fewer: save it again"
        ):
            decode(data, alone=alone)


def test_large_pictures_do_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode(file_from(picture())).width == 48
    assert decode(file_from(smooth(), "JPEG", "L")).width == 128


@pytest.mark.parametrize("bad", [{"max_bytes": 0}, {"max_aspect": 0.5}, {"min_side": 0}, {"max_pixels": 100}])
def test_limits_are_validated(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="DecodeLimits"):
        DecodeLimits(**bad)


def test_png_path_does_not_import_pydicom() -> None:
    script = "import sys; from thoraxrt.engine.decode import decode; assert not {'pydicom', 'imagecodecs'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_real_pngs_equal_pillow(nih: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = sorted((nih / "images").glob("*.png"))
    colour = [f for f in files if f.read_bytes()[25] == 6]
    assert len(colour) >= 5
    for file in [*colour, *files[::20]]:
        with Image.open(file) as image:
            expected = np.asarray(image.convert("RGBA"))[..., 0]
        for alone in (False, True):
            np.testing.assert_array_equal(decode(file.read_bytes(), alone=alone).pixels, expected)
    assert capfd.readouterr() == ("", "")


FILES = {
    "png": file_from(picture()),
    "jpeg": file_from(smooth(), "JPEG", "RGB"),
}
SMALL = DecodeLimits(max_pixels=1_000_000)


def outcome(data: bytes, *, alone: bool = False) -> bytes | str:
    try:
        return decode(data, SMALL, alone=alone).values.tobytes()
    except ImageError as error:
        return str(error)


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=300),
    magic=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", bytes(128) + b"DICM"]),
)
def test_any_bytes_give_a_radiograph_or_an_image_error(data: bytes, magic: bytes) -> None:
    outcome(magic + data)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(FILES)), data=st.data())
def test_damaged_files_give_a_radiograph_or_an_image_error(name: str, data: st.DataObject) -> None:
    damaged = bytearray(FILES[name])
    for at in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.integers(0, len(damaged)) | st.none())
    outcome(bytes(damaged[:cut]))


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, len(FILES["png"]) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_png_is_never_another_picture(at: int, bit: int) -> None:
    damaged = bytearray(FILES["png"])
    damaged[at] ^= 1 << bit
    assert isinstance(outcome(bytes(damaged)), str)


def test_thread_decoder_gives_results_and_errors() -> None:
    with ThreadDecoder(workers=2) as decoder:
        good = [decoder.submit(data) for data in FILES.values()]
        bad = decoder.submit(b"")
        for future, data in zip(good, FILES.values(), strict=True):
            np.testing.assert_array_equal(future.result().pixels, decode(data).pixels)
        with pytest.raises(ImageFormatError, match="empty"):
            bad.result()
    with pytest.raises(RuntimeError):
        decoder.submit(b"")


def test_thread_decoder_takes_limits_and_a_sane_number_of_workers() -> None:
    with ThreadDecoder(limits=DecodeLimits(max_bytes=1)) as decoder, pytest.raises(ImageLimitError):
        decoder.submit(FILES["png"]).result()
    with pytest.raises(ValueError, match="workers"):
        ThreadDecoder(workers=0)


def test_16_bit_values_can_be_left_as_stored_for_a_gpu_to_look_up() -> None:
    values = np.arange(48 * 40, dtype=np.uint16).reshape(40, 48) * 34
    data = file_from(values)
    kept, looked_up = decode(data, keep_stored=True), decode(data)
    np.testing.assert_array_equal(kept.values, values)
    assert kept.table is not None
    np.testing.assert_array_equal(kept.table[kept.values], looked_up.values)
    np.testing.assert_array_equal(kept.pixels, looked_up.pixels)
    assert kept.source == looked_up.source
    assert looked_up.table is None
    assert not kept.pixels.flags.writeable
    with ThreadDecoder(1, keep_stored=True) as decoder:
        assert decoder.submit(data).result().values.dtype == np.uint16
    eight = decode(file_from(picture()), keep_stored=True)
    assert eight.table is None
    assert eight.values is eight.pixels
