"""A bundle appears whole or not at all: writers killed, stopped, out of space and at once, as real processes."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from thoraxrt.engine.bundle import MANIFEST, SIGNATURE, Bundle
from thoraxrt.engine.errors import BundleError, SignatureError
from thoraxrt.export.networks import ResNet
from thoraxrt.export.publish import publish, sign_bundle

Start = Callable[..., subprocess.Popen[str]]

# Forks a writer of the bundle at argv[2] over that at argv[1], kills it after each line that it executes in the modules
# that touch the disk, then at argv[3] random moments; prints how often the old and the new bundle was found.
KILLER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from thoraxrt.engine.bundle import Bundle
from thoraxrt.export import publish as module

out, new, moments = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
old = Path(str(out) + ".old")
shutil.copytree(out, old)
def files_of(path): return {file.name: file.read_bytes() for file in path.iterdir()}
def kill_at(line):
    count = 0
    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename not in (module.__file__, shutil.__file__):
            return None
        count += event == "line"
        if count == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
def write(before):
    child = os.fork()
    if not child:
        before()
        module.publish(files_of(new), out, replace=True)
        os._exit(0)
    return child
def judge():
    bundle = Bundle.open(out)
    bundle.verify()
    found = files_of(out)
    (verdict,) = [name for name, path in (("old", old), ("new", new)) if found == files_of(path)]
    verdicts[verdict] += 1
    if verdict == "new":
        module.publish(files_of(old), out, replace=True)
    assert files_of(out) == files_of(old)

verdicts, lines, status = {"old": 0, "new": 0}, 0, signal.SIGKILL
while status:
    lines += 1
    _, status = os.waitpid(write(lambda: kill_at(lines)), 0)
    judge()
def seconds():
    start = time.perf_counter()
    os.waitpid(write(lambda: None), 0)
    return time.perf_counter() - start
usual, killed = min(seconds() for _ in range(3)), 0  # a slow one would have most end before their moment
for _ in range(moments):
    child = write(lambda: None)
    time.sleep(random.uniform(0, 1.2 * usual))
    os.kill(child, signal.SIGKILL)
    killed += os.waitpid(child, 0)[1] == signal.SIGKILL
    judge()
module.publish(files_of(old), out, replace=True)
print(json.dumps({"lines": lines, "killed": killed, **verdicts}))
"""

# Publishes argv[2] at argv[1], waiting for a line on stdin before the second file.
WAITER = """
import sys
from pathlib import Path
from thoraxrt.export.publish import publish

class Slow(dict):
    def items(self):
        first, *others = super().items()
        yield first
        print("waiting", flush=True)
        sys.stdin.readline()
        yield from others

files = {file.name: file.read_bytes() for file in Path(sys.argv[2]).iterdir()}
publish(Slow(files), Path(sys.argv[1]), replace=sys.argv[3] == "replace")
"""

# Exports the checkpoint argv[1] over the bundle argv[2], in children that are killed at the moments argv[3:], in seconds.
EXPORTER = """
import os, signal, sys, time
from pathlib import Path
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.preprocess import Exact, PreprocessSpec
from thoraxrt.export.bundle import ExportOptions, export_bundle
from thoraxrt.export.source import Given

given = Given(preprocess=PreprocessSpec(resize=Exact(width=64, height=64)))
options = ExportOptions(precisions=("fp32",), given=given, replace=True)
out = Path(sys.argv[2])
def unfinished(): return list(out.parent.glob(".*.unfinished"))
for moment in sys.argv[3:]:
    child = os.fork()
    if not child:
        export_bundle(sys.argv[1], out, options)
        os._exit(0)
    deadline = time.monotonic() + float(moment)
    while time.monotonic() < deadline and not unfinished():
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    bundle = Bundle.open(out)
    bundle.verify()
    print(bundle.sha256, len(unfinished()), flush=True)
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def unfinished(folder: Path) -> list[Path]:
    return list(folder.glob(".*.unfinished"))


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python processes; none outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
        command, pipe = [sys.executable, "-c", code, *map(str, arguments)], subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        with process:  # closes its pipes and waits
            pass


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline()


def finish(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate("\n", timeout=60)
    assert process.returncode == 0, error
    return out


@pytest.fixture
def old(sample_bundle: Bundle, tmp_path: Path) -> Path:
    """A published bundle, alone in its folder."""
    publish(files_of(sample_bundle.path), tmp_path / "beside" / "x.bundle", replace=False)
    return tmp_path / "beside" / "x.bundle"


@pytest.fixture
def new(old: Path, tmp_path: Path) -> Path:
    """Another bundle, elsewhere: it holds one graph less."""
    files = files_of(old)
    manifest = json.loads(files[MANIFEST])
    del files["model.fp16.onnx"], manifest["files"]["model.fp16.onnx"], manifest["checks"]["fp16"]
    path = tmp_path / "elsewhere" / "new.bundle"
    publish({**files, MANIFEST: json.dumps(manifest).encode()}, path, replace=False)
    Bundle.open(path).verify()
    return path


def test_a_writer_killed_at_any_moment_leaves_the_old_or_the_new(start: Start, old: Path, new: Path) -> None:
    result = json.loads(finish(start(KILLER, old, new, "30")))
    assert result["lines"] > 50
    assert result["killed"] > 5
    assert min(result["old"], result["new"]) > 10
    assert unfinished(old.parent) == []  # the one that was not killed removed what the others left


def test_an_export_killed_at_any_moment_leaves_the_old_one(start: Start, old: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpoint = tmp_path / "tiny.safetensors"
    safetensors.torch.save_file(ResNet((1, 1), width=8, num_classes=14).state_dict(), checkpoint)
    before = Bundle.open(old).sha256
    moments = [f"{random.uniform(0, 1):.3f}", "60"]  # the last is killed as soon as it writes
    answers = [line.split() for line in finish(start(EXPORTER, checkpoint, old, *moments)).splitlines()]
    assert [sha256 for sha256, _ in answers] == [before] * 2
    assert [count for _, count in answers] == ["0", "1"]
    assert len(unfinished(old.parent)) == 1
    publish(files_of(old), old, replace=True)
    assert unfinished(old.parent) == []


def test_what_a_living_writer_holds_is_not_removed(start: Start, old: Path, new: Path) -> None:
    slow = start(WAITER, old, new, "replace")
    assert line_of(slow) == "waiting\n"
    others = files_of(old)
    publish({**others, "note.txt": b"the faster one"}, old, replace=True)
    assert len(unfinished(old.parent)) == 1
    assert (old / "note.txt").exists()
    finish(slow)
    assert files_of(old) == files_of(new)
    assert unfinished(old.parent) == []


def test_what_a_killed_writer_left_is_removed_and_nothing_else(start: Start, old: Path, new: Path) -> None:
    bystanders = [old.parent / name for name in (".x.bundle.settings", ".y.bundle.abcdefgh.unfinished", ".unfinished")]
    for folder in bystanders:
        folder.mkdir()
        (folder / "file").write_text("someone's")
    (old.parent / ".x.bundle.abcdefgh.unfinished").symlink_to(bystanders[0])
    slow = start(WAITER, old, new, "replace")
    assert line_of(slow) == "waiting\n"
    slow.kill()
    slow.communicate()
    (left,) = [path for path in old.parent.glob(".x.bundle.*.unfinished") if not path.is_symlink()]
    assert set(files_of(left)) < set(files_of(new))
    publish(files_of(new), old, replace=True)
    assert not left.exists()
    assert all((folder / "file").read_text() == "someone's" for folder in bystanders)


def test_two_at_once_do_not_mix(start: Start, old: Path, new: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from thoraxrt.export.publish import publish\n"
        "files = {file.name: file.read_bytes() for file in Path(sys.argv[2]).iterdir()}\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for _ in range(25): publish(files, Path(sys.argv[1]), replace=True)"
    )
    sources = [files_of(old), files_of(new)]
    shutil.copytree(old, new.parent / "old.bundle")
    writers = [start(code, old, source) for source in (new.parent / "old.bundle", new)]
    assert [line_of(writer) for writer in writers] == ["ready\n"] * 2
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        finish(writer)
    assert files_of(old) in sources
    Bundle.open(old).verify()
    assert [path.name for path in old.parent.iterdir()] == [old.name]


def test_the_slower_of_two_without_replace_is_refused(start: Start, new: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "x.bundle"
    slow = start(WAITER, out, new, "no")
    assert line_of(slow) == "waiting\n"
    publish({**files_of(new), "note.txt": b"the faster one"}, out, replace=False)
    _, error = slow.communicate("\n")
    assert "exists; give another place, or --replace" in error
    assert (out / "note.txt").exists()
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB; needs root."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("only root can mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_old_one(new: Path, small_disk: Path) -> None:
    out = small_disk / "x.bundle"
    with pytest.raises(BundleError, match="No space left on device"):
        publish({"large": bytes(5 << 20)}, out, replace=False)
    assert list(small_disk.iterdir()) == []
    publish(files_of(new), out, replace=False)
    with pytest.raises(BundleError, match=r"x\.bundle cannot be written: No space left on device; what was there is"):
        publish({**files_of(new), "large": bytes(4 << 20)}, out, replace=True)
    assert files_of(out) == files_of(new)
    assert list(small_disk.iterdir()) == [out]


def test_a_limit_on_file_size_leaves_the_old_one(start: Start, old: Path, new: Path) -> None:
    before = files_of(old)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    process = start(limit + WAITER, old, new, "replace")
    _, error = process.communicate("\n")
    assert process.returncode == 1
    assert "cannot be written: File too large; what was there is untouched" in error
    assert files_of(old) == before
    assert [path.name for path in old.parent.iterdir()] == [old.name]


def test_a_place_that_cannot_be_written(new: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "x.bundle", tmp_path / ("n" * 250)):
        with pytest.raises(
            BundleError, match=r"exists and is no bundle|Not a directory|File exists|File name too long"
        ):
            publish(files_of(new), out, replace=True)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_symbolic_link_is_written_through(old: Path, new: Path) -> None:
    link = new.parent / "current.bundle"
    link.symlink_to(old)
    publish(files_of(new), link, replace=True)
    assert link.is_symlink()
    assert files_of(old) == files_of(new)


def test_a_signature_joins_the_bundle_and_openssl_agrees(old: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    before = files_of(old)
    sign_bundle(Bundle.open(old), private)
    sign_bundle(Bundle.open(old), private)  # again: the new one takes the place of the old
    assert files_of(old) == {**before, SIGNATURE: (old / SIGNATURE).read_bytes()}
    assert Bundle.open(old, trusted=[public]).sha256 == Bundle.open(old).sha256
    files: list[str | Path] = ["-inkey", public, "-rawin", "-in", old / MANIFEST, "-sigfile", old / SIGNATURE]
    subprocess.run(["openssl", "pkeyutl", "-verify", "-pubin", *files], check=True, capture_output=True)


def test_what_is_damaged_is_not_signed(old: Path, new: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    with pytest.raises(SignatureError, match="holds no unencrypted private key"):
        sign_bundle(Bundle.open(old), public)
    opened = Bundle.open(old)
    (old / MANIFEST).chmod(0o644)
    (old / MANIFEST).write_bytes(files_of(new)[MANIFEST])
    with pytest.raises(BundleError, match="changed while it was read"):
        sign_bundle(opened, private)
    (old / "model.fp32.onnx").chmod(0o644)
    (old / "model.fp32.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match="is not the file that was exported"):
        sign_bundle(Bundle.open(old), private)
    assert set(files_of(old)) == {MANIFEST, "model.fp32.onnx", "model.fp16.onnx"}
