"""A real Ray cluster on this machine, with a worker killed on the way: the same rows as without Ray, each once.

Ray runs in a process of its own, which its warnings, threads and environment do not leave.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from thoraxrt import __version__
from thoraxrt.benchmarks.archive import items_in, score_archive
from thoraxrt.benchmarks.scores import read
from thoraxrt.engine.bundle import Bundle
from thoraxrt.export.phantoms import phantom

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'ray[data]'"),
    pytest.mark.skipif(sys.platform != "linux", reason="finds the worker to kill in /proc"),
]

IMAGES = 24

RUN = """
import functools, json, os, signal, sys
from pathlib import Path

from thoraxrt.benchmarks import ray_scoring
from thoraxrt.benchmarks.archive import score_archive
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.errors import BackendUnavailableError, BundleError, RequestError
import numpy
import ray
from ray._common.usage import usage_lib
from ray._private.authentication.authentication_utils import is_token_auth_enabled

images, out, bundle, faulty, other = map(Path, sys.argv[1:])
ray.init = functools.partial(ray.init, num_cpus=2)  # not as many idle workers as this machine has CPUs
killed, rows = [], 0

def parents(pid):
    while pid > 1:
        yield pid
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

def workers():
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes()
                if title.startswith(b"ray::") and b"_Scorer" in title and os.getpid() in parents(int(entry.name)):
                    yield int(entry.name)
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended

def kill_one(items, description, total):
    global rows
    for rows, item in enumerate(items, 1):
        if rows == 1:
            killed.extend(workers())
            os.kill(killed[0], signal.SIGKILL)
        yield item

def refusal(kind, bundle, **options):
    try:
        score_archive(images, other, Bundle.open(bundle), ray=True, **options)
    except kind as error:
        return str(error)

with ray_scoring._cluster():
    summary = score_archive(images, out, Bundle.open(bundle), ray=True, track=kill_one)
    again = score_archive(images, out, Bundle.open(bundle), ray=True)
    on_gpu = dict(backend="tensorrt", precision="fp16", device="cuda")
    refusals = [
        refusal(BundleError, faulty, backend="onnxruntime"),
        refusal(BackendUnavailableError, bundle, **on_gpu),
        refusal(RequestError, bundle, device="cuda:1"),
    ]
    ray_scoring.versions = lambda backend: {"thoraxrt": "0.0", "numpy": numpy.__version__}  # here, not in the workers
    refusals.append(refusal(BackendUnavailableError, bundle, backend="onnxruntime"))
    print(json.dumps({
        "killed": len(killed), "scored": summary.scored, "failed": summary.failed, "rows": rows, "again": again.scored,
        "refusals": refusals, "usage": usage_lib.usage_stats_enabled(), "auth": is_token_auth_enabled(),
    }), flush=True)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms in folders below, and a file that is none."""
    folder = tmp_path_factory.mktemp("archive")
    for index in range(IMAGES):
        below = folder / f"images_{index % 3:03d}"
        below.mkdir(exist_ok=True)
        pixels = np.roll(phantom(5, index % 8).pixels, 16 * index, axis=1)
        assert cv2.imwrite(str(below / f"{index // 3}.png"), pixels)
    (folder / "images_001" / "broken.png").write_bytes(b"no image")
    return folder


def test_a_killed_worker_loses_nothing_and_doubles_nothing(images: Path, sample_bundle: Bundle, tmp_path: Path) -> None:
    faulty = Bundle.open(shutil.copytree(sample_bundle.path, tmp_path / "faulty.bundle"))
    (faulty.path / "model.fp32.onnx").write_bytes(b"another network")
    score_archive(images, tmp_path / "local", sample_bundle, batch=4)
    arguments = [images, tmp_path / "ray", sample_bundle.path, faulty.path, tmp_path / "other"]
    run = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:thoraxrt", "-c", RUN, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    # Not its status, for a thread of Ray's may end the process while Ray shuts down; nor a line, for Ray writes into them.
    begin = run.stdout.find('{"killed"')
    assert begin >= 0, run.stderr
    said, _ = json.JSONDecoder().raw_decode(run.stdout, begin)
    assert said["killed"] >= 1
    assert said["rows"] == said["scored"] == IMAGES + 1
    assert said["failed"] == 1
    assert said["again"] == 0
    assert "model.fp32.onnx is not the file that was exported" in said["refusals"][0], "the engine's own words"
    assert "the Ray cluster has no machine with a GPU" in said["refusals"][1]
    assert "the device is 'cuda:1'; expected cpu or cuda" in said["refusals"][2]
    assert f"has thoraxrt {__version__}, which is not what this run began with" in said["refusals"][3]
    assert said["usage"] is False
    assert said["auth"] is True  # else whoever reaches the ports runs what they like here
    local, ray = read(tmp_path / "local"), read(tmp_path / "ray")
    assert ray.header == local.header
    assert ray.images == local.images == tuple(item.image for item in items_in(images))
    assert ray.sha256 == local.sha256
    assert ray.errors == local.errors
    np.testing.assert_array_equal(ray.logits, local.logits)
    np.testing.assert_array_equal(ray.probabilities, local.probabilities)
    for at in range(len(local)):
        assert ray.boxes(at) == local.boxes(at)
    assert any(ray.boxes(at) for at in range(len(ray)))
    assert len(list((tmp_path / "ray").glob("part-*"))) > 3, "the blocks come back one by one"
