"""The audit log on real files: what is acknowledged is there, what is changed shows, and it comes back by itself."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thoraxrt.engine.boxes import Box, Peak
from thoraxrt.engine.engine import Prediction
from thoraxrt.engine.errors import AuditError, ConfigError, ImageFormatError
from thoraxrt.engine.postprocess import Finding
from thoraxrt.server.audit import AuditLog, AuditOptions, _Chain, _lines, verify
from thoraxrt.server.principal import Principal, current_principal
from thoraxrt.server.telemetry import NullTelemetry

PREDICTION = Prediction(
    width=10,
    height=20,
    precision="bf16",
    backend="openvino",
    findings=(
        Finding(finding="Effusion", probability=0.75, logit=1.1, reported=True),
        Finding(finding="Nodule", probability=0.125, logit=-1.9, reported=False),
    ),
    boxes=(Box(finding="Effusion", x=1.0, y=2.0, width=3.0, height=4.0, score=0.5, peak=Peak(x=2.0, y=3.0)),),
)


class Counted(NullTelemetry):
    def __init__(self) -> None:
        self.failed = 0

    def audit_failed(self) -> None:
        self.failed += 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def record(audit: AuditLog, count: int = 1, outcome: Prediction | ImageFormatError | str = PREDICTION) -> None:
    async def all_at_once() -> None:
        await asyncio.gather(*(audit.record("Predict", outcome) for _ in range(count)))

    asyncio.run(all_at_once())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines() if line]


def files(path: Path) -> list[Path]:
    return [*sorted(path.parent.glob(f"{path.name}.0*")), path]


def test_a_line_says_who_what_and_what_was_found(path: Path) -> None:
    async def call() -> None:
        current_principal.set(Principal("pacs", frozenset({"predict"}), "token"))
        digest = await asyncio.wrap_future(audit.hashed(b"image"))
        where = {"model_sha256": "a" * 64, "input_sha256": digest, "peer": "ipv4:192.0.2.1:50000"}
        await audit.record("Predict", PREDICTION, **where)
        await audit.record("Predict", ImageFormatError("patient J. Doe is no image"), **where)

    with AuditLog(AuditOptions(path=path, peer=True)) as audit:
        asyncio.run(call())
    started, found, failed = lines(path)
    assert started["event"] == "started"
    common = {
        "who": "pacs",
        "via": "token",
        "peer": "ipv4:192.0.2.1",
        "method": "Predict",
        "model": "a" * 64,
        "input": hashlib.sha256(b"image").hexdigest(),
    }
    chain = {name: found.pop(name) for name in ("n", "time", "prev")}
    assert chain["n"] == 2
    assert chain["time"].endswith("Z")
    assert chain["prev"] == hashlib.sha256(path.read_bytes().splitlines()[0]).hexdigest()
    assert found == common | {
        "backend": "openvino",
        "precision": "bf16",
        "findings": [
            {"finding": "Effusion", "probability": 0.75, "reported": True},
            {"finding": "Nodule", "probability": 0.125, "reported": False},
        ],
        "boxes": 1,
    }
    assert failed.items() >= (common | {"error": "ImageFormatError"}).items()
    assert b"Doe" not in path.read_bytes()
    assert path.stat().st_mode & 0o007 == 0


def test_a_line_says_who_loaded_a_model(path: Path) -> None:
    async def call() -> None:
        current_principal.set(Principal("ops", frozenset({"admin"}), "oidc"))
        await audit.record("RepositoryModelLoad", None, name="chexnet")
        await audit.record("RepositoryModelUnload", "ModelNotFoundError", name="chexnet")

    with AuditLog(AuditOptions(path=path)) as audit:
        asyncio.run(call())
    chain = {"n", "time", "prev"}
    loaded, failed = ({key: line[key] for key in line.keys() - chain} for line in lines(path)[1:])
    assert loaded == {"who": "ops", "via": "oidc", "method": "RepositoryModelLoad", "name": "chexnet"}
    assert failed == loaded | {"method": "RepositoryModelUnload", "error": "ModelNotFoundError"}
    assert verify(path).last == 3


def test_no_address_unless_asked_for(path: Path) -> None:
    with AuditLog(AuditOptions(path=path)) as audit:
        asyncio.run(audit.record("Predict", PREDICTION, peer="ipv4:192.0.2.1:50000"))
    assert b"192.0.2.1" not in path.read_bytes()


@pytest.mark.parametrize("sync_ms", [0.0, 5.0])
def test_many_at_once_make_one_chain_through_restarts_and_rotations(path: Path, sync_ms: float) -> None:
    options = AuditOptions(path=path, sync_ms=sync_ms, max_bytes=20_000)
    for _ in range(3):
        with AuditLog(options) as audit:
            record(audit, 100)
    assert len(files(path)) > 3
    result = verify(path)
    assert (result.first, result.last, result.recovered, result.unfinished) == (1, 303, 0, 0)
    assert max(file.stat().st_size for file in files(path)) < 20_000 + 600
    assert verify(path, noted=result.head) == result


def test_lines_that_a_change_of_files_cannot_sync_are_not_acknowledged(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def fail_for_files(fd: int) -> None:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(fd)

    chain = _Chain(AuditOptions(path=path, max_bytes=1))
    chain.open()
    chain.append(b'"method":"Predict"')
    monkeypatch.setattr(os, "fsync", fail_for_files)
    with pytest.raises(OSError, match="Input/output error"):
        chain.append(b'"method":"Predict"')
    monkeypatch.undo()
    chain.close()
    assert verify(path).last == 1


@pytest.mark.parametrize("changes", [1, 2])
def test_a_log_whose_files_change_while_it_is_checked_is_whole(path: Path, changes: int) -> None:
    with AuditLog(AuditOptions(path=path, max_bytes=1_000)) as audit:
        record(audit, 10)
        reading = _lines(path)
        before = [next(reading)]
        for _ in range(changes):
            count = len(files(path))
            while len(files(path)) == count:
                record(audit)
        before += reading
    numbers = [json.loads(line)["n"] for _, line in before]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 11


def test_the_oldest_files_go_and_the_rest_still_verifies(path: Path) -> None:
    with AuditLog(AuditOptions(path=path, max_bytes=2_000, keep=2)) as audit:
        record(audit, 100)
    assert len(files(path)) == 3
    result = verify(path)
    assert result.first > 80
    assert result.last == 101


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The lines of a log with a crash in it."""
    path = tmp_path_factory.mktemp("genuine") / "audit.jsonl"
    for _ in range(2):
        with AuditLog(AuditOptions(path=path)) as audit:
            record(audit, 4)
        with path.open("ab") as file:
            file.write(b'{"n":torn')
    with AuditLog(AuditOptions(path=path)) as audit:
        record(audit, 4)
    return path.read_bytes().splitlines(keepends=True)


@given(data=st.data())
def test_every_single_change_shows(genuine: list[bytes], tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    index = data.draw(st.integers(0, len(genuine) - 2))  # the last line: see the next test
    line = genuine[index]
    change = data.draw(st.sampled_from(("edit", "remove", "repeat", "swap", "insert")))
    changed = list(genuine)
    if change == "edit":
        at = data.draw(st.integers(0, len(line) - 2))
        changed[index] = line[:at] + bytes([line[at] ^ data.draw(st.integers(1, 255))]) + line[at + 1 :]
    elif change == "remove":
        del changed[index]
    elif change == "repeat":
        changed.insert(index, line)
    elif change == "swap":
        changed[index], changed[index + 1] = changed[index + 1], line
    else:
        changed.insert(index + 1, data.draw(st.binary(max_size=20)) + b"\n")
    path = tmp_path_factory.getbasetemp() / "changed.jsonl"
    path.write_bytes(b"".join(changed))
    first_went = change == "remove" and index == 0  # as rotation does; n says so
    if first_went:
        assert verify(path).first == 2
    else:
        with pytest.raises(AuditError):
            verify(path)


def test_a_log_cut_short_shows_by_a_noted_hash(path: Path, genuine: list[bytes]) -> None:
    path.write_bytes(b"".join(genuine))
    noted = verify(path).head
    for tail in (b"", genuine[-1].replace(b"0.75", b"0.25")):
        path.write_bytes(b"".join(genuine[:-1]) + tail)
        verify(path)
        with pytest.raises(AuditError, match="has no line of hash"):
            verify(path, noted=noted)


def test_wherever_a_crash_cut_the_file_the_next_start_closes_it_off(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    with AuditLog(AuditOptions(path=whole)) as audit:
        record(audit, 2)
    data = whole.read_bytes()
    ends = [index + 1 for index, byte in enumerate(data) if byte == 10]
    path = tmp_path / "audit.jsonl"
    for cut in [*range(ends[1], ends[2] + 1, 7), ends[2] - 2, ends[2] - 1, 3, ends[0] - 1]:
        path.write_bytes(data[:cut])
        with AuditLog(AuditOptions(path=path)):
            pass
        partial = cut not in (*ends, *(end - 1 for end in ends))  # a line that lacks its newline only is whole
        assert verify(path).recovered == partial, cut
        with path.open("r+b") as file:  # and that line may be cut, too
            file.truncate(path.stat().st_size - 30)
        with AuditLog(AuditOptions(path=path)) as audit:
            record(audit)
        assert lines_that_parse(path)[-1]["method"] == "Predict"
        verify(path)


def lines_that_parse(path: Path) -> list[dict[str, Any]]:
    parsed = []
    for line in path.read_bytes().splitlines():
        try:
            parsed.append(json.loads(line))
        except ValueError:
            continue  # what a crash left
    return parsed


def test_zeros_that_a_power_cut_left_are_closed_off(path: Path) -> None:
    with AuditLog(AuditOptions(path=path)):
        pass
    with path.open("ab") as file:
        file.write(bytes(4096))
    assert verify(path).unfinished == 4096
    with AuditLog(AuditOptions(path=path)):
        pass
    assert verify(path)[3:] == (1, 0)


def test_killed_between_two_files(path: Path) -> None:
    with AuditLog(AuditOptions(path=path)) as audit:
        record(audit, 3)
    path.rename(f"{path}.{4:012d}")
    with AuditLog(AuditOptions(path=path)) as audit:
        record(audit)
    assert verify(path).last == 6


CHILD = """
import asyncio, sys
from pathlib import Path
from thoraxrt.server.audit import AuditLog, AuditOptions

async def client(audit, name):
    for number in range(1_000_000):
        await audit.record(f"{name}/{number}", "none")
        print(f"{name}/{number}", flush=True)  # acknowledged

async def main():
    with AuditLog(AuditOptions(path=Path(sys.argv[1]), sync_ms=float(sys.argv[2]), max_bytes=20_000)) as audit:
        await asyncio.gather(*(client(audit, name) for name in "abcd"))

asyncio.run(main())
"""


@pytest.mark.parametrize("sync_ms", ["0", "50"])
def test_kill_loses_nothing_that_was_acknowledged(path: Path, sync_ms: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, path, sync_ms], stdout=subprocess.PIPE)
    assert child.stdout is not None
    acknowledged = [child.stdout.readline() for _ in range(200)]
    child.send_signal(signal.SIGKILL)
    acknowledged += child.stdout.read().splitlines(keepends=True)
    child.stdout.close()
    child.wait()
    with AuditLog(AuditOptions(path=path)):
        pass
    written = {line.get("method") for file in files(path) for line in lines_that_parse(file)}
    said = {line.decode().strip() for line in acknowledged if line.endswith(b"\n")}
    assert len(said) >= 200
    assert said <= written
    assert verify(path).first == 1


@pytest.fixture
def full_disk(path: Path) -> Iterator[tuple[Any, Any]]:
    """Functions that let this process's files grow no further than the log has, and again: EFBIG, as with a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(spare: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + spare, hard))

    def free() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    yield fill, free
    free()


def wait_until_written(audit: AuditLog) -> None:
    for _ in range(50):
        try:
            audit.check()
        except AuditError:
            time.sleep(0.1)
        else:
            return
    pytest.fail("the log did not recover")


@pytest.mark.parametrize("spare", [0, 100])
def test_a_full_disk_refuses_answers_and_ends_by_itself(path: Path, full_disk: Any, spare: int) -> None:
    fill, free = full_disk
    telemetry = Counted()
    with AuditLog(AuditOptions(path=path), telemetry) as audit:
        record(audit, 3)
        fill(spare)
        with pytest.raises(AuditError, match="there is no answer"):
            record(audit)
        with pytest.raises(AuditError, match="goes on by itself"):
            audit.check()
        free()
        wait_until_written(audit)  # without another call
        record(audit, 2)
    assert telemetry.failed == 1
    assert verify(path).recovered == (spare > 0)
    assert [line["event"] for line in lines_that_parse(path) if "event" in line][-1] == "resumed"


def test_a_full_disk_may_serve_and_says_how_much_is_missing(path: Path, full_disk: Any) -> None:
    fill, free = full_disk
    telemetry = Counted()
    with AuditLog(AuditOptions(path=path, on_failure="serve"), telemetry) as audit:
        fill(50)
        record(audit, 3)
        audit.check()
        free()
        record(audit)
    assert telemetry.failed == 3
    assert verify(path).recovered == 1
    resumed = next(line for line in lines_that_parse(path) if line.get("event") == "resumed")
    assert resumed["unrecorded"] == 3


def test_a_full_file_system(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting needs privileges")
    try:
        path = disk / "audit.jsonl"
        with AuditLog(AuditOptions(path=path)) as audit:
            (disk / "ballast").write_bytes(bytes(32 * 1024))
            with pytest.raises(AuditError, match="No space left"):
                record(audit, 200)
            (disk / "ballast").unlink()
            wait_until_written(audit)
            record(audit)
        verify(path)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_another_file_in_its_place_is_left_alone(path: Path) -> None:
    path.write_text("root:x:0:0:\n")
    with pytest.raises(ConfigError, match="is no audit log"):
        AuditLog(AuditOptions(path=path))
    assert path.read_text() == "root:x:0:0:\n"


def test_one_log_has_one_writer(path: Path) -> None:
    with AuditLog(AuditOptions(path=path)), pytest.raises(ConfigError, match="another server"):
        AuditLog(AuditOptions(path=path))
    with AuditLog(AuditOptions(path=path)):
        pass


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        AuditLog(AuditOptions(path=tmp_path / "missing" / "audit.jsonl"))
    with pytest.raises(ConfigError, match="holds no line"):
        verify(tmp_path / "audit.jsonl")


def test_a_name_that_is_no_text_fails_its_own_record_only(path: Path) -> None:
    with AuditLog(AuditOptions(path=path)) as audit:
        with pytest.raises(UnicodeEncodeError):
            record(audit, outcome="\ud800")
        record(audit, outcome="line\nbreak")
    assert lines(path)[-1]["error"] == "line\nbreak"
    verify(path)


def test_closing_leaves_no_descriptor(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        audit = AuditLog(AuditOptions(path=path, sync_ms=1.0))
        audit.close()
        audit.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(AuditError, match="closed"):
        record(audit)


def test_an_event_loop_is_not_held_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the disk is."""
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (time.sleep(0.2), sync(fd)))

    async def longest_turn() -> float:
        async def turn() -> None:
            nonlocal longest
            while True:
                began = time.perf_counter()
                await asyncio.sleep(0)
                longest = max(longest, time.perf_counter() - began)

        longest, turning = 0.0, asyncio.create_task(turn())
        await asyncio.gather(*(audit.record("Predict", PREDICTION) for _ in range(10)))
        turning.cancel()
        return longest

    with AuditLog(AuditOptions(path=path)) as audit:
        assert asyncio.run(longest_turn()) < 0.1


@pytest.mark.parametrize(
    ("values", "message"),
    [({"max_bytes": 0}, "max_bytes is 0"), ({"keep": 0}, "keep is 0"), ({"sync_ms": -1.0}, "sync_ms is -1")],
)
def test_options_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AuditOptions(path=Path("audit.jsonl"), **values)
