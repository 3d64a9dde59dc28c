"""The command line as a user meets it: help, the JSON shape, exit statuses, one-line errors."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from thoraxrt.cli.predict import _overlay_paths
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.engine import Engine
from thoraxrt.export.phantoms import phantom

COMMANDS = ("export", "compile", "sign", "recommend", "export-triton", "predict", "serve", "info", "phantoms", "demo")


def thoraxrt(*arguments: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "thoraxrt.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("radiographs")
    paths = [folder / f"{index}.png" for index in range(2)]
    for index, path in enumerate(paths):
        Image.fromarray(phantom(5, index).pixels).save(path)
    return paths


def test_help_teaches_every_command() -> None:
    text = thoraxrt("--help").stdout
    assert all(command in text for command in COMMANDS)
    for command in COMMANDS:
        assert len(thoraxrt(command, "--help").stdout) > 300


def test_help_imports_no_runtime() -> None:
    code = (
        "import sys, thoraxrt.cli\n"
        "heavy = {'numpy', 'torch', 'cv2', 'onnxruntime', 'openvino', 'grpc', 'pydicom', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_json_lines_are_the_public_shape(sample_bundle: Bundle, images: list[Path]) -> None:
    lines = thoraxrt("predict", sample_bundle.path, *images, "--json", "--backend", "onnxruntime").stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    assert [answer["image"] for answer in answers] == [str(path) for path in images]
    for answer in answers:
        assert list(answer) == ["image", "width", "height", "precision", "backend", "findings", "boxes"]
        assert (answer["width"], answer["height"]) == (1024, 1024)
        assert (answer["precision"], answer["backend"]) == ("fp32", "onnxruntime")
        assert [finding["finding"] for finding in answer["findings"]] == list(sample_bundle.manifest.labels)
        assert all(list(f) == ["finding", "probability", "logit", "reported"] for f in answer["findings"])
        for box in answer["boxes"]:
            assert list(box) == ["finding", "x", "y", "width", "height", "score", "peak"]
            assert list(box["peak"]) == ["x", "y"]
    assert any(answer["boxes"] for answer in answers)
    with Engine.open(sample_bundle, backend="onnxruntime") as engine:  # and unrounded
        assert answers[0] == {
            "image": str(images[0]),
            **json.loads(json.dumps(engine.predict_one(images[0]).to_dict())),
        }


def test_a_progress_bar_leaves_the_answers_to_their_file(sample_bundle: Bundle, images: list[Path]) -> None:
    """`predict --json > answers.jsonl`, at a terminal."""
    terminal, bar = pty.openpty()
    command = [sys.executable, "-m", "thoraxrt.cli", "predict", str(sample_bundle.path), str(images[0]), "--json"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=bar, check=True)
    os.close(bar)
    assert json.loads(result.stdout)["image"] == str(images[0])
    assert b"Predicting" in os.read(terminal, 10_000)
    os.close(terminal)


def test_one_bad_image_gives_its_error_and_status_1(sample_bundle: Bundle, images: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(images[0].read_bytes()[:5000])
    result = thoraxrt("predict", sample_bundle.path, images[0], bad, images[1], "--json", status=1)
    first, error, last = (json.loads(line) for line in result.stdout.splitlines())
    assert "findings" in first
    assert "findings" in last
    assert list(error) == ["image", "error"]
    assert error["image"] == str(bad)


def test_a_folder_stands_for_its_images_and_overlays_are_written(
    sample_bundle: Bundle, images: list[Path], tmp_path: Path
) -> None:
    result = thoraxrt("predict", sample_bundle.path, images[0].parent, "--overlay", tmp_path / "pictures")
    assert "executed by openvino fp32" in result.stdout
    for path in images:
        with Image.open(tmp_path / "pictures" / f"{path.stem}.overlay.png") as picture:
            assert picture.size == (1024, 1024)


def test_file_names_are_shown_as_they_are_and_overlays_never_overwrite(
    sample_bundle: Bundle, images: list[Path], tmp_path: Path
) -> None:
    folders = [tmp_path / "[red]a", tmp_path / "b"]
    for folder, image in zip(folders, images, strict=True):
        folder.mkdir()
        (folder / "[bold]x.png").write_bytes(image.read_bytes())
        (folder / "[nonsense].png").write_bytes(b"not an image")
    result = thoraxrt("predict", sample_bundle.path, *folders, "--overlay", tmp_path / "out", status=1)
    assert "[bold]x.png" in result.stdout
    assert "[nonsense].png" in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"[bold]x.overlay.png", "[bold]x-2.overlay.png"}


def test_a_place_that_cannot_be_written_is_one_line_and_status_2(
    sample_bundle: Bundle, images: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    result = thoraxrt("predict", sample_bundle.path, images[0], "--overlay", tmp_path / "file", status=2)
    (line,) = result.stderr.splitlines()
    assert "File exists" in line


def test_no_two_images_share_an_overlay() -> None:
    images = [f"{folder}/{name}.png" for folder in "xy" for name in ("a", "a-2", "b", "a-2-2")]
    paths = list(_overlay_paths(Path("out"), [*images, "a-3.png", "z/a.png"]))
    assert len(set(paths)) == len(paths) == 10
    assert [path.name for path in paths if path][:2] == ["a.overlay.png", "a-2.overlay.png"]


def test_answers_that_are_kept_are_of_one_model(sample_bundle: Bundle, images: list[Path], tmp_path: Path) -> None:
    other = shutil.copytree(sample_bundle.path, tmp_path / "other.bundle")
    manifest = other / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_text(manifest.read_text() + "\n")
    kept, printed = tmp_path / "answers.jsonl", tmp_path / "printed.jsonl"
    said = thoraxrt("predict", sample_bundle.path, images[0], "--out", kept, "--json")
    printed.write_text(said.stdout)
    (line,) = kept.read_text().splitlines()
    answer = json.loads(line)
    assert answer.pop("manifest_sha256") == sample_bundle.sha256
    assert answer == json.loads(said.stdout)
    refused = thoraxrt("predict", other, *images, "--out", kept, status=2)
    assert f"answers of the model with the manifest_sha256 {sample_bundle.sha256[:12]}..." in refused.stderr
    assert kept.read_text() == f"{line}\n"
    thoraxrt("predict", sample_bundle.path, *images, "--out", kept)
    assert kept.read_text().startswith(f"{line}\n")
    assert kept.read_text().count("\n") == 2
    refused = thoraxrt("predict", sample_bundle.path, *images, "--out", printed, status=2)
    assert "line 1: expected an answer that --out has kept; name a new file" in refused.stderr
    assert printed.read_text() == said.stdout


def test_info_says_what_is_there_and_what_runs(sample_bundle: Bundle) -> None:
    text = thoraxrt("info", sample_bundle.path).stdout
    assert sample_bundle.sha256 in text.replace("\n", "")
    facts = json.loads(thoraxrt("info", sample_bundle.path, "--json").stdout)
    assert facts["manifest"]["labels"] == list(sample_bundle.manifest.labels)
    assert facts["backends"]["onnxruntime"]["fp32"] is None
    assert "model.int8.onnx" in facts["backends"]["onnxruntime"]["int8"]


def test_signing_and_requiring_it(
    sample_bundle: Bundle, images: list[Path], keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    bundle = tmp_path / "copy.bundle"
    shutil.copytree(sample_bundle.path, bundle)
    for command in (("predict", bundle, images[0]), ("serve", bundle), ("info", bundle), ("compile", bundle)):
        error = thoraxrt(*command, "--require-signature", public, status=2).stderr
        assert "manifest.sig cannot be read" in error
    thoraxrt("sign", bundle, "--key", private)
    thoraxrt("predict", bundle, images[0], "--require-signature", public.parent / "public.pem")
    thoraxrt("info", bundle, "--require-signature", public)
    with (bundle / "manifest.sig").open("r+b") as file:
        os.fchmod(file.fileno(), 0o644)
        (first,) = file.read(1)
        file.seek(0)
        file.write(bytes([first ^ 1]))
    assert (
        "no trusted signature in manifest.sig"
        in thoraxrt("info", bundle, "--require-signature", public, status=2).stderr
    )


def test_a_triton_model(sample_bundle: Bundle, tmp_path: Path) -> None:
    thoraxrt("export-triton", sample_bundle.path, tmp_path, "--precision", "fp16", "--batch", "4")
    assert "max_batch_size: 4" in (tmp_path / "sample" / "config.pbtxt").read_text()


def test_a_reload_does_not_end_a_server_that_still_starts(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from thoraxrt.cli import main\n"
        "class Reload:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'thoraxrt.server.config':\n"
        "            os.kill(os.getpid(), signal.SIGHUP)\n"
        "sys.meta_path.insert(0, Reload())\n"
        "sys.argv = ['thoraxrt', 'serve', 'nowhere.bundle']\n"
        "main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (result.returncode, "nowhere.bundle" in result.stderr) == (2, True), "it came to open the bundle"


@pytest.mark.parametrize(
    "arguments",
    [
        ("info", "nowhere.bundle"),
        ("predict", "nowhere.bundle", "a.png"),
        ("predict", "nowhere.bundle"),
        ("predict", "--server", "localhost:1", "a.png", "--backend", "openvino"),
        ("serve", "nowhere.bundle"),
        ("predict", "--server", "localhost:1", "a.png", "--require-signature", "public.pem"),
        ("sign", "nowhere.bundle", "--key", "private.pem"),
        ("export-triton", "nowhere.bundle", "models"),
        ("export-triton", "nowhere.bundle", "models", "--plan", "nowhere"),
        ("export", "nowhere.pth", "--out", "x.bundle"),
        ("export", "nowhere.pth", "--out", "x.bundle", "--resize", "bigger"),
        ("export", "nowhere.pth", "--out", "x.bundle", "--mean", "a,b"),
        ("export", "nowhere.pth", "--out", "x.bundle", "--precision", "fp8"),
        ("export", "nowhere.pth", "--out", "x.bundle", "--crop", "999"),
        ("export", "nowhere.pth", "--out", "x.bundle", "--input-size", "320", "--crop", "224"),
        ("export", "nowhere.pth", "--out", "x.bundle", "--mean", "0.5"),
        ("export", "nowhere.pth", "--out", "x.bundle", "--activation", "tanh"),
        ("export", "nowhere.pth", "--out", "x.bundle", "--trained-with", "guesswork"),
        ("export", "nowhere.pth", "--out", "x.bundle", "--network", "no colon"),
        ("export", "nowhere.pth", "--out", "x.bundle", "--precision", "fp32,int8"),
        ("export", "nowhere.pth", "--out", "x.bundle", "--calibration-method", "median"),
        ("export", "nowhere.pth", "--out", "x.bundle", "--target", "sm1"),
        ("export", "nowhere.onnx", "--out", "x.bundle"),
    ],
)
def test_usage_bundle_and_checkpoint_errors_are_one_line_and_status_2(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = thoraxrt(*arguments, status=2)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("thoraxrt: error: ")


def test_an_unknown_option_is_status_2() -> None:
    assert "No such option" in thoraxrt("info", "--frobnicate", status=2).stderr


def test_a_missing_extra_is_one_line_that_names_it(tmp_path: Path) -> None:
    code = "import sys; sys.modules['onnx'] = None; sys.argv = ['thoraxrt', 'export', 'a.pth', '--out', 'a.bundle']; "
    code += "from thoraxrt.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "onnx is not installed" in line
    assert "pip install 'thoraxrt[cpu,export,bench]'" in line


def test_a_profile_is_a_table_beside_the_answers_and_a_trace(
    sample_bundle: Bundle, images: list[Path], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.json"
    result = thoraxrt("predict", sample_bundle.path, *images, "--json", "--device", "cpu", "--profile", trace)
    assert len([json.loads(line) for line in result.stdout.splitlines()]) == len(images)
    for stage in ("decode", "geometry", "network", "boxes", "findings"):
        assert stage in result.stderr
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event["name"] == "network" for event in events if event["ph"] == "X") == len(images)
