"""`thoraxrt bench`: every target answers, nothing is dropped in silence, and the result is kept whole."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from io import BytesIO, StringIO
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from thoraxrt.benchmarks import bench as module
from thoraxrt.benchmarks.bench import (
    BenchOptions,
    BenchResult,
    batch_curve,
    bench,
    load_curve,
    print_result,
    read_result,
)
from thoraxrt.benchmarks.bench_report import bench_report
from thoraxrt.benchmarks.scenarios import LoadOptions, latencies_from_ms, run_scenario
from thoraxrt.benchmarks.served import Served
from thoraxrt.benchmarks.serving_load import Load, due_times
from thoraxrt.benchmarks.targets import INPUTS, Clients, EngineTarget, Input, TargetName, inputs
from thoraxrt.cli import app
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.decode import decode
from thoraxrt.engine.engine import Engine
from thoraxrt.engine.errors import ImageError, RequestError
from thoraxrt.engine.execute import NetworkInput
from thoraxrt.export.phantoms import phantom
from thoraxrt.server.models import EngineOptions

pytest.importorskip("mlperf_loadgen")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the server decodes in processes")

BRIEF = LoadOptions(seconds=0.1, longest_s=0.1, per_query=2)
RAN = EngineOptions(backend="onnxruntime", precision="fp32")
T = TypeVar("T")


def _png(index: int) -> bytes:
    file = BytesIO()
    Image.fromarray(phantom(7, index).pixels[::4, ::4]).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    return [_png(index) for index in range(3)]


@pytest.fixture(scope="module")
def engine(sample_bundle: Bundle) -> Iterator[Engine]:
    with Engine.open(sample_bundle, backend="onnxruntime", precision="fp32", batch=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(sample_bundle: Bundle) -> Iterator[Served]:
    with Served(sample_bundle.path, RAN) as server:
        yield server


@pytest.fixture(scope="module")
def result(sample_bundle: Bundle, files: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    folder = tmp_path_factory.mktemp("images")
    images = [folder / f"{index}.png" for index in range(len(files))]
    for image, data in zip(images, files, strict=True):
        image.write_bytes(data)
    drawn: list[tuple[str, int, int]] = []

    def track(items: Iterable[T], description: str, total: int) -> Iterable[T]:
        kept = list(items)
        drawn.append((description, total, len(kept)))
        return kept

    options = BenchOptions(load=BRIEF, batch=4, batches=(1, 4), shares=(0.5,), peers=False, quick=True)
    found = bench(sample_bundle.path, images, backend="onnxruntime", precision="fp32", options=options, track=track)
    assert drawn == [("Measuring", drawn[0][1], drawn[0][1])]
    return found


def test_every_target_is_measured_in_every_scenario(result: BenchResult, sample_bundle: Bundle) -> None:
    assert (result.bundle_sha256, result.backend, result.precision) == (sample_bundle.sha256, "onnxruntime", "fp32")
    assert (result.images, result.quick, result.loadgen[0]) == (3, True, "6")
    runs = [(run.target, run.input, run.scenario) for run in result.scenarios]
    scenarios = ("SingleStream", "MultiStream", "Server", "Offline")
    assert [run for run in runs if run[1] == "encoded"] == [
        (target, "encoded", scenario) for target in ("engine", "grpc", "oip") for scenario in scenarios
    ]
    assert [run for run in runs if run[1] != "encoded"] == [
        ("engine", "decoded", "SingleStream"),
        ("engine", "network", "SingleStream"),
        ("oip", "network", "SingleStream"),
    ]
    for run in result.scenarios:
        assert run.errors == {}
        assert run.latency is not None
        assert run.images > 0
        assert run.warm_up > 0
        assert (run.verdict == "VALID") == (not run.reasons)


def test_the_curves_have_every_point_and_their_name(result: BenchResult) -> None:
    by_batch, by_load = result.curves
    assert (by_batch.over, by_batch.arrivals, [point.load for point in by_batch.points]) == ("batch", None, [1, 4])
    assert (by_load.over, by_load.arrivals, len(by_load.points)) == ("offered load", "poisson", 1)
    for point in (*by_batch.points, *by_load.points):
        assert point.errors == {}
        assert point.latency is not None
        assert point.latency.at(50) is not None
        assert point.images_per_s > 0
    assert by_load.points[0].latency is not None
    assert by_load.points[0].latency.at(90) is not None


def test_the_stages_add_up_to_the_time_of_an_image(result: BenchResult) -> None:
    engine = [stage for stage in result.stages if stage.target == "engine"]
    assert [stage.stage for stage in engine] == [
        "decode", "geometry", "network", "boxes", "findings", "handing over"
    ]  # fmt: skip
    assert [stage.source for stage in engine] == ["profile"] * 5 + ["difference"]
    assert {stage.p99_ms for stage in engine} == {None}  # a moment gives none
    assert None not in {stage.p50_ms for stage in engine[:-1]}
    served = [(stage.stage, stage.source) for stage in result.stages if stage.target == "grpc"]
    assert served == [*((stage, "server") for stage in ("queue", "decode", "network", "write")), ("wire", "difference")]
    assert all(stage.mean_ms > 0 for stage in result.stages if stage.stage not in ("handing over", "wire", "write"))


def test_memory_is_that_of_the_process_which_runs_the_network(result: BenchResult) -> None:
    assert [memory.target for memory in result.memory] == ["engine", "grpc", "oip"]
    assert all(memory.peak_rss_bytes > 50 * 2**20 for memory in result.memory)
    assert {memory.gpu_bytes for memory in result.memory} == {None}


def test_the_floor_stands_beside_it(result: BenchResult) -> None:
    assert [floor.batch for floor in result.floors] == [1, 4]
    assert result.no_floor is None
    assert result.work.operations["fp32"] > 0


def test_a_result_is_read_as_it_was_written(result: BenchResult, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_bytes(msgspec.json.encode(result))
    assert read_result(file) == result
    file.write_bytes(b'{"version": 2}')
    with pytest.raises(RequestError, match=r"bench\.json is no result"):
        read_result(file)


def test_the_tables_show_every_run_and_why_it_is_invalid(result: BenchResult) -> None:
    file = StringIO()
    print_result(result, Console(width=200, file=file))
    text = " ".join(file.getvalue().split())  # long reasons are wrapped
    assert text.count("Offline") >= 3
    assert all(" ".join(reason.split()) in text for run in result.scenarios for reason in run.reasons)
    assert "poisson arrivals" in text
    assert "peak memory" in text


def test_a_table_shows_the_rule_and_no_percentile_that_so_few_queries_cannot_give(result: BenchResult) -> None:
    """64 queries, as the scenario asks for: what LoadGen calls its estimate of p90 is the highest of them."""
    ms = latencies_from_ms([*range(100, 163), 98765])
    server = next(run for run in result.scenarios if run.scenario == "Server")
    shown = [
        msgspec.structs.replace(result.scenarios[0], scenario="SingleStream", percent=90.0, bound_ms=None, latency=ms),
        msgspec.structs.replace(server, latency=ms, offered_per_s=12.5),
    ]
    file = StringIO()
    print_result(msgspec.structs.replace(result, scenarios=tuple(shown), curves=()), Console(width=200, file=file))
    single, served, *_ = (line for line in file.getvalue().splitlines() if "SingleStream" in line or "Server " in line)
    text = " ".join(file.getvalue().split())
    assert "157.0 (152.0 to 162.0)" in single
    assert "p95 <= 1000 ms" in served
    assert "12.5" in served
    assert "98765" not in text
    assert "p99 in MultiStream and Server" in text  # the rule
    page = bench_report(msgspec.structs.replace(result, scenarios=tuple(shown), curves=()))
    assert page.count("157.00 (152.00 to 162.00)") == 3  # what is judged, and both rows of percentiles
    assert "12.5/s offered" in page
    assert "CPU packages, J/image" in page  # of a GPU nothing is counted
    assert "pixels to boxes, ms/image" in page  # what the share of the floor is of
    assert "98765" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)


@pytest.mark.parametrize("kind", INPUTS["engine"])
def test_each_input_gets_the_same_answers(engine: Engine, files: list[bytes], kind: Input) -> None:
    expected = [[f.logit for f in engine.predict_one(data).findings] for data in files]
    given = inputs(files, kind, engine.manifest)
    assert [[f.logit for f in engine.predict_one(image).findings] for image in given] == expected


def test_what_precedes_an_input_is_done(engine: Engine, files: list[bytes]) -> None:
    (decoded,) = inputs(files[:1], "decoded", engine.manifest)
    np.testing.assert_array_equal(decoded.pixels, decode(files[0]).pixels)  # type: ignore[union-attr]
    (network,) = inputs(files[:1], "network", engine.manifest)
    assert isinstance(network, NetworkInput)
    assert network.array.shape == (224, 224)
    with pytest.raises(ImageError):
        inputs([b"nothing"], "decoded", engine.manifest)


def test_an_engine_answers_what_is_asked_while_it_is_busy_and_when_it_is_closed(
    engine: Engine, files: list[bytes]
) -> None:
    answers: list[tuple[int, int, Exception | None]] = []
    with EngineTarget(engine, [*files, b"no image"], "encoded") as target:
        for query, numbers in enumerate(([0], [1, 2, 0, 1, 2], [3], [0])):
            target.submit(numbers, lambda place, error, query=query: answers.append((query, place, error)))
    assert [(query, place) for query, place, _ in answers] == [
        (0, 0),
        *((1, place) for place in range(5)),
        (2, 0),
        (3, 0),
    ]
    assert [type(error).__name__ for _, _, error in answers if error] == ["ImageFormatError"]
    with Engine.open(engine.bundle, backend="onnxruntime") as closed:
        pass
    with EngineTarget(closed, files, "encoded") as target:
        target.submit([0, 1], lambda place, error: answers.append((9, place, error)))
    assert [str(error) for query, _, error in answers if query == 9] == ["the engine is closed; open it again"] * 2


@pytest.mark.parametrize(("name", "kind"), [("grpc", "encoded"), ("oip", "encoded")])
def test_an_error_of_a_server_fails_the_scenario(
    server: Served, files: list[bytes], name: TargetName, kind: Input
) -> None:
    with Clients(server.address, 14) as clients, clients.target(name, kind, [files[0], b"no image"]) as target:
        found = run_scenario(target, "SingleStream", BRIEF)
    assert found.verdict == "INVALID"
    assert found.errors == {"ImageFormatError": 1}
    assert found.latency is None


def test_a_server_of_another_model_is_noticed(server: Served, files: list[bytes]) -> None:
    with Clients(server.address, 13) as clients, clients.target("oip", "encoded", files) as target:
        found = run_scenario(target, "SingleStream", BRIEF)
    assert "expected [1, 13]" in found.reasons[0]


def test_a_protocol_that_does_not_take_an_input_says_so(server: Served) -> None:
    with Clients(server.address, 14) as clients, pytest.raises(RequestError, match="grpc with decoded input"):
        clients.target("grpc", "decoded", [])


def test_errors_are_counted_in_the_curves(engine: Engine, server: Served, files: list[bytes]) -> None:
    with Load() as load:
        (point,) = load_curve(load, server.address, [*files, b"no image"], (0.5,), 0.2).points
    assert point.latency is not None
    assert point.errors["INVALID_ARGUMENT"] == (point.latency.count + point.errors["INVALID_ARGUMENT"]) // 4
    with pytest.raises(ImageError):
        batch_curve(engine, [b"no image"], (1,), 0.1)


def test_arrivals_are_even_or_independent_and_as_many_as_offered() -> None:
    assert due_times("even", 4.0, 1.1) == [0.25, 0.5, 0.75, 1.0]
    gaps = np.diff([0.0, *due_times("poisson", 100.0, 50.0)])
    assert 1 / gaps.mean() == pytest.approx(100, rel=0.1)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # of an exponential distribution


def test_options_that_make_no_sense_are_refused(sample_bundle: Bundle) -> None:
    for wrong in ({"targets": ("http",)}, {"scenarios": ("Online",)}, {"batches": (0,)}):
        with pytest.raises(RequestError, match="expected"):
            BenchOptions(**wrong)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="no images"):
        bench(sample_bundle.path, [])


def test_an_image_that_is_none_is_named_before_anything_is_measured(
    sample_bundle: Bundle, files: list[bytes], tmp_path: Path
) -> None:
    for name, data in (("a.png", files[0]), ("b.png", b"nothing")):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageError, match=r"b\.png: "):
        bench(sample_bundle.path, sorted(tmp_path.iterdir()))


def test_the_command_measures_writes_and_says_where_an_answer_failed(
    result: BenchResult, sample_bundle: Bundle, files: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, written = tmp_path / "a.png", tmp_path / "bench.json"
    image.write_bytes(files[0])
    said = ["bench", str(sample_bundle.path), str(tmp_path), "--backend", "onnxruntime", "--json", str(written)]
    run = CliRunner().invoke(app, [*said, "--quick", "--targets", "engine"])
    assert run.exit_code == 0, run.output
    assert {scenario.target for scenario in read_result(written).scenarios} == {"engine"}
    first, *others = result.scenarios
    failed = msgspec.structs.replace(first, errors={"ImageFormatError": 1})
    monkeypatch.setattr(module, "bench", lambda *_, **__: msgspec.structs.replace(result, scenarios=(failed, *others)))
    assert CliRunner().invoke(app, [*said, "--quick"]).exit_code == 1
