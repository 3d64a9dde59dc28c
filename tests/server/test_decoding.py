"""`thoraxrt.server.decoding`: what threads give, at the price of one image where a worker fails."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from textwrap import dedent
from typing import Any, TypeVar

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import write_file_meta_info
from pydicom.pixels.encoders import RLELosslessEncoder
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from thoraxrt.engine.decode import DecodeLimits, Radiograph, decode
from thoraxrt.engine.errors import (
    BackendUnavailableError,
    ImageContentError,
    ImageError,
    ImageFormatError,
    ImageLimitError,
    ThoraxrtError,
)
from thoraxrt.server import decoding as module
from thoraxrt.server.decoding import ProcessDecoder, WorkerLimits

Condition = TypeVar("Condition")

WAIT = 60.0  # seconds for what must happen, so that a failure is no hang


def file_from(array: npt.NDArray[Any], kind: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    image, out = Image.fromarray(array), BytesIO()
    (image if mode is None else image.convert(mode)).save(out, kind, **options)
    return out.getvalue()


def dicom(values: npt.NDArray[Any], syntax: UID = ExplicitVRLittleEndian, **elements: Any) -> bytes:
    """A DX image of uint8 or uint16 values, the latter with 12 bits stored."""
    bits = 8 if values.itemsize == 1 else 12
    streams: dict[UID, Callable[[], bytes]] = {
        RLELossless: lambda: RLELosslessEncoder.encode(
            values,
            rows=values.shape[0],
            columns=values.shape[1],
            samples_per_pixel=1,
            number_of_frames=1,
            bits_allocated=8 * values.itemsize,
            bits_stored=bits,
            pixel_representation=0,
            photometric_interpretation="MONOCHROME2",
        ),
        JPEGBaseline8Bit: lambda: file_from((values >> (bits - 8)).astype(np.uint8), "JPEG"),
        JPEGLosslessSV1: lambda: imagecodecs.jpeg8_encode(values, lossless=True, predictor=1, bitspersample=bits),
        JPEGLSLossless: lambda: imagecodecs.jpegls_encode(values),
        JPEG2000Lossless: lambda: imagecodecs.jpeg2k_encode(values, level=0, reversible=True, codecformat="J2K"),
    }
    ds = Dataset()
    ds.Modality, ds.SamplesPerPixel, ds.PhotometricInterpretation = "DX", 1, "MONOCHROME2"
    ds.Rows, ds.Columns = values.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8 * values.itemsize, bits, bits - 1, 0
    ds.WindowCenter, ds.WindowWidth = 1 << (bits - 1), 1 << bits
    for name, value in elements.items():
        setattr(ds, name, value)
    big = values.astype(values.dtype.newbyteorder(">")) if syntax == ExplicitVRBigEndian else values
    ds.PixelData = encapsulate([bytes(streams[syntax]())]) if syntax in streams else big.tobytes()
    ds["PixelData"].VR = "OB" if values.itemsize == 1 or syntax in streams else "OW"
    ds["PixelData"].is_undefined_length = syntax in streams
    body, head = BytesIO(), BytesIO(bytes(128) + b"DICM")
    ds.save_as(body, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    meta = FileMetaDataset()
    meta.FileMetaInformationGroupLength, meta.TransferSyntaxUID = 0, syntax
    head.seek(132)
    write_file_meta_info(head, meta, enforce_standard=False)
    return head.getvalue() + body.getvalue()


GRAY = np.random.default_rng(0).integers(0, 256, (40, 48), dtype=np.uint8)
SMOOTH = (np.arange(96)[:, None] + np.arange(128)).astype(np.uint8)
DEEP = SMOOTH.astype(np.uint16) * 16
SYNTAXES = (
    ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, JPEGLosslessSV1, JPEGLSLossless,
    JPEG2000Lossless,
)  # fmt: skip
LUT = Dataset()
LUT.add_new("LUTDescriptor", "US", [4096, 0, 12])
LUT.add_new("LUTData", "US", [4095 - v for v in range(4096)])
FILES = {
    **{f"png {mode}": file_from(GRAY, mode=mode) for mode in ("L", "LA", "RGB", "RGBA", "P", "1")},
    "png 16 bit": file_from(DEEP * 16),
    "jpeg": file_from(SMOOTH, "JPEG", "RGB"),
    **{f"dicom 8 bit {syntax.name}": dicom(SMOOTH, syntax) for syntax in (*SYNTAXES, JPEGBaseline8Bit)},
    **{f"dicom 12 bit {syntax.name}": dicom(DEEP, syntax) for syntax in SYNTAXES},
    "dicom sigmoid MONOCHROME1": dicom(DEEP, VOILUTFunction="SIGMOID", PhotometricInterpretation="MONOCHROME1"),
    "dicom VOI LUT": dicom(DEEP, VOILUTSequence=[LUT]),
    "dicom modality LUT": dicom(DEEP, ModalityLUTSequence=[LUT]),
}
PNG = FILES["png L"]


def children() -> set[int]:
    """The processes that this one started and has not waited for, dead ones too."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        if int(fields[1]) == os.getpid():
            found.add(int(file.parent.name))
    return found


def descriptors() -> dict[str, str]:
    links = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            links[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own
            continue
    return links


@pytest.fixture(scope="module")
def shared() -> Iterator[ProcessDecoder]:
    """A decoder for the tests that do its workers no harm: both are there, and their pipes closed, as once they are ready."""
    processes, open_before = children(), descriptors()
    with ProcessDecoder(2) as decoder:
        until(lambda: len(children() - processes) == 2)
        until(lambda: not any("pipe:" in link for fd, link in descriptors().items() if fd not in open_before))
        yield decoder


@pytest.fixture
def others() -> Iterator[set[int]]:
    """The processes before the test; after it, there are no other processes, descriptors, threads or shared memories."""
    gc.collect()  # what earlier tests have left is not closed meanwhile
    before, open_before, threads = children(), descriptors(), threading.active_count()
    yield before
    assert children() == before
    assert descriptors() == open_before
    assert threading.active_count() == threads


def only_worker(others: set[int]) -> int:
    (pid,) = children() - others
    return pid


def until(condition: Callable[[], Condition]) -> Condition:
    end = time.monotonic() + WAIT
    while not (met := condition()):
        assert time.monotonic() < end
        time.sleep(0.005)
    return met


Outcome = tuple[str, str] | tuple[Any, ...]


def outcome(result: Callable[[], Radiograph]) -> Outcome:
    """All that a radiograph says, or an error's type and message."""
    try:
        radiograph = result()
    except ThoraxrtError as error:
        return type(error).__name__, str(error)
    values, table = radiograph.values, radiograph.table
    assert values.flags.c_contiguous
    assert not values.flags.writeable
    assert table is None or not table.flags.writeable
    content = values.tobytes(), values.shape, values.dtype.str, None if table is None else table.tobytes()
    return (*content, radiograph.source)


def outcomes(decoder: ProcessDecoder, files: Sequence[bytes]) -> list[Outcome]:
    futures = [decoder.submit(data) for data in files]
    return [outcome(lambda future=future: future.result(WAIT)) for future in futures]  # type: ignore[misc]


def test_public_surface() -> None:
    assert set(module.__all__) == {"ProcessDecoder", "WorkerLimits"}


# What it gives


@pytest.mark.parametrize("keep_stored", [False, True])
def test_every_format_is_as_decoded_in_this_process(keep_stored: bool, others: set[int]) -> None:
    with ProcessDecoder(1, keep_stored=keep_stored) as decoder:
        for name, got in zip(FILES, outcomes(decoder, list(FILES.values())), strict=True):
            expected = outcome(lambda data=FILES[name]: decode(data, keep_stored=keep_stored))  # type: ignore[misc]
            assert len(expected) == 5, name
            assert got == expected, name
    assert any(decode(data, keep_stored=True).table is not None for data in FILES.values())


def test_real_files_are_as_decoded_in_this_process(shared: ProcessDecoder, nih: Path, nih_images: list[Path]) -> None:
    files = [*nih_images[::10], *sorted((nih / "dicom").glob("*.dcm"))]
    assert len(files) > 30
    data = [file.read_bytes() for file in files]
    for file, content, got in zip(files, data, outcomes(shared, data), strict=True):
        assert got == outcome(lambda content=content: decode(content)), file.name  # type: ignore[misc]


ERRORS = {
    "": (b"", ImageFormatError),
    "truncated": (PNG[:-20], ImageFormatError),
    "text": (b"%PDF-1.7", ImageFormatError),
    "bomb": (PNG[:16] + b"\0\0\xff\xff" * 2 + PNG[24:], ImageFormatError),
    "sliver": (file_from(np.zeros((40, 400), np.uint8)), ImageLimitError),
    "photograph": (file_from(np.full((40, 40, 3), (200, 90, 10), np.uint8)), ImageContentError),
    "CT": (dicom(DEEP, Modality="CT"), ImageContentError),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_keeps_its_type_and_message(shared: ProcessDecoder, name: str) -> None:
    data, kind = ERRORS[name]
    with pytest.raises(kind) as expected:
        decode(data)
    with pytest.raises(kind) as caught:
        shared.submit(data).result(WAIT)
    assert type(caught.value) is type(expected.value)
    assert str(caught.value) == str(expected.value)


def test_limits_hold_in_the_worker_and_before_it(others: set[int]) -> None:
    with ProcessDecoder(1, DecodeLimits(max_bytes=len(PNG), max_pixels=2000)) as decoder:
        os.kill(only_worker(others), signal.SIGSTOP)
        with pytest.raises(ImageLimitError, match=f"has {len(PNG) + 1} bytes"):
            decoder.submit(PNG + b"\0").result(0)  # although no worker runs
        os.kill(only_worker(others), signal.SIGCONT)
        assert decoder.submit(PNG).result(WAIT).width == 48
        with pytest.raises(ImageLimitError, match="pixels"):
            decoder.submit(file_from(np.zeros((40, 60), np.uint8))).result(WAIT)


def test_mutated_files_are_as_decoded_in_this_process(shared: ProcessDecoder) -> None:
    before, rng = children(), random.Random(5)
    files = []
    for _ in range(2000):
        damaged = bytearray(rng.choice(list(FILES.values())))
        for _ in range(rng.randrange(1, 5)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        files.append(bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])]))
    got = outcomes(shared, files)
    expected = [outcome(lambda data=data: decode(data)) for data in files]  # type: ignore[misc]
    assert got == expected
    assert len({str(one[1]) for one in got if len(one) == 2}) > 20  # and they were refused for many reasons
    assert children() == before


# What a worker's end costs


def test_a_worker_killed_over_an_image_costs_this_image(others: set[int], caplog: pytest.LogCaptureFixture) -> None:
    replaced: list[None] = []
    with ProcessDecoder(1, on_replaced=lambda: replaced.append(None)) as decoder:
        first = only_worker(others)
        os.kill(first, signal.SIGSTOP)
        lost, waiting = decoder.submit(PNG), decoder.submit(PNG)
        until(lost.running)
        assert not waiting.running()  # one image at a worker
        os.kill(first, signal.SIGKILL)
        with pytest.raises(ImageFormatError, match=r"ended its process \(Killed\); expected an intact file"):
            lost.result(WAIT)
        np.testing.assert_array_equal(waiting.result(WAIT).values, GRAY)
        assert only_worker(others) != first
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert len(replaced) == 1


def test_a_worker_killed_idle_costs_nothing(others: set[int]) -> None:
    with ProcessDecoder(1) as decoder:
        os.kill(first := only_worker(others), signal.SIGKILL)
        until(lambda: Path(f"/proc/{first}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        np.testing.assert_array_equal(decoder.submit(PNG).result(WAIT).values, GRAY)


def test_all_workers_killed_idle_cost_nothing(others: set[int]) -> None:
    slow = file_from(np.zeros((4000, 4000), np.uint8), mode="P")
    with ProcessDecoder(2) as decoder:
        decoding = [decoder.submit(slow) for _ in range(8)]
        until(lambda: sum(future.running() for future in decoding) == 2)  # so both workers are ready
        assert all(future.result(WAIT).width == 4000 for future in decoding)
        for pid in children() - others:
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        np.testing.assert_array_equal(decoder.submit(PNG).result(WAIT).values, GRAY)


def test_a_worker_that_hangs_costs_this_image(others: set[int]) -> None:
    with ProcessDecoder(1, worker_limits=WorkerLimits(seconds=0.3)) as decoder:
        os.kill(first := only_worker(others), signal.SIGSTOP)
        hung = decoder.submit(PNG)
        with pytest.raises(ImageLimitError, match=r"not decoded within 0\.3 s; expected less"):
            hung.result(WAIT)
        until(lambda: children() - others - {first})
        assert outcomes(decoder, [PNG])[0] == outcome(lambda: decode(PNG))


def test_a_worker_that_uses_too_much_memory_costs_this_image(others: set[int]) -> None:
    with ProcessDecoder(1, worker_limits=WorkerLimits(memory_bytes=16 * 1024 * 1024)) as decoder:
        first = only_worker(others)
        with pytest.raises(ImageLimitError, match="not enough memory"):
            decoder.submit(file_from(np.zeros((6000, 6000), np.uint8))).result(WAIT)
        np.testing.assert_array_equal(decoder.submit(PNG).result(WAIT).values, GRAY)
        assert only_worker(others) == first


def test_what_a_large_image_took_of_shared_memory_is_given_back(others: set[int]) -> None:
    before = descriptors()
    with ProcessDecoder(1) as decoder:
        memory, _ = (int(fd) for fd, link in descriptors().items() if fd not in before and "memfd" in link)
        assert decoder.submit(file_from(np.zeros((5000, 5000), np.uint8))).result(WAIT).height == 5000
        assert decoder.submit(PNG).result(WAIT).height == 40
        assert os.fstat(memory).st_blocks * 512 < 1_000_000


def test_workers_killed_under_load_leave_every_future_resolved_once(others: set[int]) -> None:
    rng = random.Random(11)
    large = file_from(np.random.default_rng(1).integers(0, 256, (500, 500), dtype=np.uint8))
    expected = outcome(lambda: decode(large))
    with ProcessDecoder(2) as decoder:
        submissions = Submissions(decoder)
        for _ in range(10):
            submissions.add(60, large)
            time.sleep(rng.uniform(0, 0.1))
            with suppress(ProcessLookupError):  # dead from the kill before, and waited for just now
                os.kill(rng.choice(until(lambda: confined(others))), signal.SIGKILL)
        got = submissions.outcomes()
        assert outcomes(decoder, [large]) == [expected]
    assert submissions.counts == [1] * 600
    assert got.count(expected) >= 590
    assert {one[0] for one in got if one != expected} <= {"ImageFormatError"}


def confined(others: set[int]) -> list[int]:
    """The workers that are past their start."""
    found = []
    for pid in children() - others:
        with suppress(FileNotFoundError, ProcessLookupError):
            if "Max open files            0 " in Path(f"/proc/{pid}/limits").read_text():
                found.append(pid)
    return found


class Submissions:
    """Futures, and how often each was resolved."""

    def __init__(self, decoder: ProcessDecoder) -> None:
        self.decoder = decoder
        self.futures: list[Future[Radiograph]] = []
        self.counts: list[int] = []

    def add(self, times: int, data: bytes) -> None:
        for _ in range(times):
            self.counts.append(0)
            self.futures.append(self.decoder.submit(data))
            self.futures[-1].add_done_callback(partial(self._count, len(self.futures) - 1))

    def _count(self, index: int, _: Future[Radiograph]) -> None:
        self.counts[index] += 1

    def outcomes(self) -> list[Outcome]:
        return [outcome(lambda future=future: future.result(WAIT)) for future in self.futures]  # type: ignore[misc]


def test_cancelled_files_are_not_decoded(others: set[int]) -> None:
    with ProcessDecoder(1) as decoder:
        os.kill(worker := only_worker(others), signal.SIGSTOP)
        first, second, third = (decoder.submit(PNG) for _ in range(3))
        until(first.running)
        assert second.cancel()
        os.kill(worker, signal.SIGCONT)
        assert first.result(WAIT).width == third.result(WAIT).width == 48
        assert second.cancelled()


def test_a_file_that_was_cancelled_is_kept_by_nobody(others: set[int]) -> None:
    data = bytes(1000)
    alone = sys.getrefcount(data)
    with ProcessDecoder(1) as decoder:
        os.kill(worker := only_worker(others), signal.SIGSTOP)
        until(decoder.submit(PNG).running)  # another model's, which takes long
        waiting = [decoder.submit(data) for _ in range(50)]
        assert sys.getrefcount(data) == alone + 50
        assert all(future.cancel() for future in waiting)
        assert sys.getrefcount(data) == alone
        os.kill(worker, signal.SIGCONT)


def test_a_file_that_hangs_is_given_up_once_nobody_waits_for_it(others: set[int]) -> None:
    with ProcessDecoder(1) as decoder:
        os.kill(only_worker(others), signal.SIGSTOP)
        hung, next_one = decoder.submit(PNG), decoder.submit(PNG)
        until(hung.running)
        assert not hung.cancel()
        assert next_one.result(WAIT).width == 48
        with pytest.raises(ImageFormatError, match="nobody waits for it any more"):
            hung.result(0)


def test_close_finishes_what_runs_and_cancels_what_waits(others: set[int]) -> None:
    decoder = ProcessDecoder(1)
    os.kill(worker := only_worker(others), signal.SIGSTOP)
    running, waiting = decoder.submit(PNG), decoder.submit(PNG)
    until(running.running)
    closing = threading.Thread(target=decoder.close)
    closing.start()
    with pytest.raises(CancelledError):
        waiting.result(WAIT)
    os.kill(worker, signal.SIGCONT)
    closing.join(WAIT)
    assert running.result(0).width == 48
    decoder.close()
    with pytest.raises(RuntimeError, match="closed"):
        decoder.submit(PNG)


def test_workers_end_with_a_server_that_is_killed() -> None:
    script = """
        import os, signal, sys
        from thoraxrt.server.decoding import ProcessDecoder
        decoder = ProcessDecoder(2)
        print(*open(f"/proc/self/task/{os.getpid()}/children").read().split(), flush=True)
        threads = os.listdir("/proc/self/task")
        print(*" ".join(open(f"/proc/self/task/{thread}/children").read() for thread in threads).split(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", dedent(script)], stdout=subprocess.PIPE, text=True)
    pids = {int(pid) for pid in done.stdout.split()}
    assert len(pids) == 2
    until(lambda: not any(running(pid) for pid in pids))


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# What a worker may do


def test_workers_are_confined(others: set[int]) -> None:
    with ProcessDecoder(1, worker_limits=WorkerLimits(memory_bytes=512 * 1024 * 1024)) as decoder:
        pid = only_worker(others)
        for number in (signal.SIGINT, signal.SIGTERM):  # the terminal's, the service manager's
            os.kill(pid, number)
        assert decoder.submit(PNG).result(WAIT).width == 48
        limits = {
            line[:26].strip(): line[26:].split()[:2] for line in Path(f"/proc/{pid}/limits").read_text().splitlines()
        }
        for name in ("Max core file size", "Max file size", "Max processes", "Max open files"):
            assert limits[name] == ["0", "0"], name
        assert 512 * 1024 * 1024 < int(limits["Max address space"][1]) < 2048 * 1024 * 1024
        assert 10 <= int(limits["Max cpu time"][0]) <= 15
        assert "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text()


def test_what_a_confined_process_cannot_do(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    script = """
        import ctypes, errno, os, socket, sys
        from thoraxrt.server.decoding import WorkerLimits, _confine
        old = os.open(sys.argv[1], os.O_RDWR)
        _confine(WorkerLimits(memory_bytes=64 * 1024 * 1024))
        def refused(act):
            try:
                act()
            except OSError as error:
                return error.errno
        assert refused(lambda: open(sys.argv[1])) == errno.EMFILE
        assert refused(lambda: socket.socket()) == errno.EMFILE
        assert refused(lambda: os.write(old, b"new")) == errno.EFBIG
        os.close(0)
        assert refused(lambda: os.open(sys.argv[1], os.O_RDONLY)) == errno.EMFILE
        assert ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) == 0  # PR_GET_DUMPABLE
        try:
            bytes(100 * 1024 * 1024)
        except MemoryError:
            print("confined")
    """
    done = subprocess.run(
        [sys.executable, "-c", dedent(script), tmp_path / "old"],
        stdin=subprocess.PIPE, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("confined\n", "")


def test_a_worker_gets_nothing_of_the_server(others: set[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THORAXRT_TOKEN", "secret")
    said = tmp_path / "said"
    report = f"""
        seen = sorted(os.environ), os.listdir("/proc/self/fd")
        open({str(said)!r}, "w").write(repr(seen))
    """
    inherited = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(inherited, True)
    try:
        ProcessDecoder(1, _command=fake(ANSWER, report)).close()
    finally:
        os.close(inherited)
    names, fds = eval(said.read_text())
    tuning = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
    assert set(names) <= {"PYTHONPATH", "LD_LIBRARY_PATH", "LC_CTYPE", *tuning}
    assert len(fds) == 5  # its socket, output, errors and shared memory; and the listing's


def test_a_worker_imports_what_decoding_needs_only() -> None:
    script = """
        import sys
        from thoraxrt.server import decoding
        decoding._import_all()
        assert "pydicom" in sys.modules
        ours = {name for name in sys.modules if name.startswith("thoraxrt.")}
        engine = {f"thoraxrt.engine{part}" for part in ("", ".decode", ".dicom", ".errors", ".profile")}
        assert ours == engine | {"thoraxrt.server", "thoraxrt.server.decoding"}, ours
        assert not {"grpc", "cv2", "openvino", "onnxruntime", "cryptography"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", dedent(script)], check=True)


# Workers that are not ours, or no longer


def fake(on_request: str, at_start: str = "") -> list[str]:
    """A program that speaks a worker's protocol, but for `on_request`, which runs with a request's `number`."""
    script = """
        import json, os, socket, struct, sys
        server, memory = socket.socket(fileno=0), int(sys.argv[1])

        def say(**said):
            server.send(json.dumps(said).encode())

        def decoded(number, **other):
            picture = dict(height=40, width=48, table=False, format="png", bits=8, photometric="gray")
            say(**{**picture, "type": "decoded", "number": number, "transfer_syntax": None, "voi": "full range", **other})

        def refused(number, **other):
            say(**{"type": "refused", "number": number, "error": "ImageContentError", "message": "no", **other})

    """
    loop = """
        server.send(b"ready")
        while request := server.recv(16):
            number, length = struct.unpack("<QQ", request)
    """
    indented = "\n".join(" " * 4 + line for line in dedent(on_request).strip().splitlines())
    return [sys.executable, "-I", "-S", "-c", dedent(script) + dedent(at_start) + dedent(loop) + indented]


ANSWER = "refused(number)"


def test_a_fake_that_keeps_to_the_protocol_is_believed(others: set[int]) -> None:
    with ProcessDecoder(1, _command=fake("decoded(number)")) as decoder:
        assert decoder.submit(PNG).result(WAIT).values.tobytes()[: len(PNG)] == PNG[: 40 * 48]
    with ProcessDecoder(1, _command=fake(ANSWER)) as decoder, pytest.raises(ImageContentError, match=r"^no$"):
        decoder.submit(PNG).result(WAIT)


HOSTILE = {
    "garbage": "server.send(os.urandom(300))",
    "no UTF-8": r"""server.send(b'{"type":"refused","number":1,"error":"ImageContentError","message":"\xff"}')""",
    "nested": "server.send(b'[' * 8000)",
    "a large packet": "refused(number, message='x' * 100_000)",
    "nothing": "server.send(b'')",
    "ready once more": "server.send(b'ready')",
    "another number": "decoded(number + 1)",
    "a fraction": "decoded(number + 0.5)",
    "no rows": "decoded(number, height=0)",
    "negative": "decoded(number, height=-40)",
    "too many pixels": "decoded(number, height=100_000, width=100_000)",
    "more than an integer holds": "decoded(number, height=1 << 70)",
    "a table": "decoded(number, table=True)",
    "another format": "decoded(number, format='array')",
    "bits": "decoded(number, bits=17)",
    "a name": "decoded(number, voi='Secret^Name')",
    "a long name": "decoded(number, photometric='x' * 17)",
    "no syntax": "decoded(number, transfer_syntax='1.2\\n')",
    "another field": "decoded(number, pixels='')",
    "no error of an image": "refused(number, error='BackendError')",
    "no error": "refused(number, error='SystemExit')",
    "lines": "refused(number, message='one\\ntwo')",
    "no message": "refused(number, message='')",
    "a shrunken memory": "os.ftruncate(memory, 100); decoded(number)",
    "an exit": "os._exit(0)",
    "a failure": "raise SystemExit(3)",
    "a crash": "os.abort()",
    "a signal without a name": "os.kill(os.getpid(), 40)",
    "a closed socket": "server.close(); import time; time.sleep(60)",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_worker_gives_clear_errors(name: str, others: set[int]) -> None:
    with ProcessDecoder(1, _command=fake(HOSTILE[name])) as decoder:
        for future in [decoder.submit(PNG) for _ in range(2)]:
            with pytest.raises(
                ImageFormatError, match=r"^decoding the file ended its process \(.+\); expected"
            ) as caught:
                future.result(WAIT)
            assert "Secret" not in str(caught.value)


@pytest.mark.parametrize("change", ["os.ftruncate(memory, 100)", "os.ftruncate(memory, 1 << 40)"])
def test_a_worker_cannot_change_the_size_of_what_the_server_reads(change: str, others: set[int]) -> None:
    tried = f"""
        try:
            {change}
        except PermissionError:
            decoded(number)
    """
    with ProcessDecoder(1, _command=fake(tried)) as decoder:
        assert decoder.submit(PNG).result(WAIT).values.tobytes()[: len(PNG)] == PNG[: 40 * 48]


def test_an_answer_that_nobody_asked_for_answers_nothing(others: set[int]) -> None:
    with ProcessDecoder(1, _command=fake("decoded(number); decoded(number)")) as decoder:
        assert decoder.submit(PNG).result(WAIT).width == 48
        with pytest.raises(ImageFormatError, match="it gave no radiograph"):
            decoder.submit(PNG).result(WAIT)
        assert decoder.submit(PNG).result(WAIT).width == 48


def test_a_worker_over_its_cpu_time_costs_this_image(others: set[int]) -> None:
    command = fake("os.kill(os.getpid(), 24)")  # SIGXCPU
    with (
        ProcessDecoder(1, _command=command) as decoder,
        pytest.raises(ImageLimitError, match="not decoded within 10 s"),
    ):
        decoder.submit(PNG).result(WAIT)


def test_hundreds_of_deaths_under_load_leave_nothing_behind(others: set[int]) -> None:
    command = fake("os.kill(os.getpid(), 9) if number == 2 else refused(number)")
    with ProcessDecoder(2, _command=command) as decoder:
        submissions = Submissions(decoder)
        submissions.add(400, PNG)
        got = submissions.outcomes()
    assert submissions.counts == [1] * 400
    refused = got.count(("ImageContentError", "no"))
    killed = sum(one[0] == "ImageFormatError" and "Killed" in one[1] for one in got)
    assert refused + killed == 400
    assert 199 <= killed <= 200


BROKEN = {
    "no such program": (["/nowhere/python"], "No such file"),
    "a failure": ([sys.executable, "-I", "-S", "-c", "import nowhere"], "No module named 'nowhere'"),
    "an exit": ([sys.executable, "-I", "-S", "-c", ""], "status 0"),
    "garbage": (fake("", "server.send(os.urandom(9))"), "status -9"),
    "silence": ([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"], "it is not ready"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_workers_that_never_start_are_named(name: str, others: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    command, reason = BROKEN[name]
    monkeypatch.setattr(module, "_START_S", 0.5)
    with pytest.raises(BackendUnavailableError, match=rf"cannot be started \(.*{reason}.*\); expected one within"):
        ProcessDecoder(2, _command=command)


def test_while_no_worker_starts_files_get_an_error_and_then_they_are_decoded(others: set[int], tmp_path: Path) -> None:
    program, away = tmp_path / "worker.py", tmp_path / "away.py"
    program.write_text(fake(ANSWER)[-1])
    with ProcessDecoder(2, _command=[sys.executable, "-I", "-S", str(program)]) as decoder:
        program.rename(away)
        for pid in children() - others:
            os.kill(pid, signal.SIGKILL)
        until(lambda: isinstance(decoder.submit(PNG).exception(WAIT), BackendUnavailableError))
        with pytest.raises(BackendUnavailableError, match="No such file"):
            decoder.submit(PNG).result(WAIT)
        away.rename(program)
        until(lambda: isinstance(decoder.submit(PNG).exception(WAIT), ImageContentError))


def test_closing_does_not_wait_for_a_worker_to_start_again(others: set[int], tmp_path: Path) -> None:
    program = tmp_path / "worker.py"
    program.write_text(fake(ANSWER)[-1])
    decoder = ProcessDecoder(1, _command=[sys.executable, "-I", "-S", str(program)])
    program.unlink()
    os.kill(only_worker(others), signal.SIGKILL)
    until(lambda: isinstance(decoder.submit(PNG).exception(WAIT), BackendUnavailableError))
    decoder.close()


@pytest.mark.parametrize("bad", [{"seconds": 0}, {"seconds": float("nan")}, {"memory_bytes": 1000}])
def test_limits_are_validated(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="WorkerLimits"):
        WorkerLimits(**bad)
    with pytest.raises(ValueError, match="workers"):
        ProcessDecoder(0)


def test_there_are_as_many_workers_as_cpus(others: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus in (1, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cpus=cpus: set(range(cpus)))
        with ProcessDecoder(_command=fake(ANSWER)) as decoder:
            assert decoder.workers == cpus
            assert isinstance(decoder.submit(PNG).exception(WAIT), ImageError)
