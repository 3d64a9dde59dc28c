from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.engine import Engine
from thoraxrt.engine.errors import RequestError
from thoraxrt.engine.profile import Profile, span
from thoraxrt.export.phantoms import phantom


def test_stages_come_in_the_order_they_began_and_a_pools_threads_count_together() -> None:
    profile = Profile()
    profile.record("network", "network", 2.0, 0.5)
    profile.record("decode_1", "decode", 1.0, 0.002)
    profile.record("decode_0", "decode", 1.5, 0.004)
    decode, network = profile.stages()
    assert (decode.lane, decode.stage, decode.spans) == ("decode", "decode", 2)
    assert decode.seconds == pytest.approx(0.006)
    assert decode.p50_ms == pytest.approx(3.0)
    assert decode.p99_ms == pytest.approx(2 + 0.99 * 2)
    assert (network.seconds, network.p50_ms) == (0.5, 500.0)


def test_a_span_is_recorded_from_any_thread_and_also_where_its_block_raises() -> None:
    profile = Profile()

    def fails() -> None:
        with profile.span("lane", "fails"):
            time.sleep(0.01)
            raise KeyError

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(fails) for _ in range(40)]
    assert all(isinstance(future.exception(), KeyError) for future in futures)
    (stage,) = profile.stages()
    assert stage.spans == 40
    assert stage.seconds >= 40 * 0.01


def test_without_a_profile_a_span_is_nothing() -> None:
    with span(None, "lane", "stage"):
        pass


def test_the_trace_is_what_perfetto_reads(tmp_path: Path) -> None:
    profile = Profile()
    profile.record("decode_0", "decode", 10.0, 0.25, images=1)
    profile.record("network", "network", 10.5, 0.125, images=4)
    profile.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["args"] for event in events if event["ph"] == "M"] == [{"name": "decode_0"}, {"name": "network"}]
    spans = [event for event in events if event["ph"] == "X"]
    assert [(e["name"], e["ts"], e["dur"], e["args"]) for e in spans] == [
        ("decode", 0.0, 250_000.0, {"images": 1}),
        ("network", 500_000.0, 125_000.0, {"images": 4}),
    ]
    assert len({event["tid"] for event in spans}) == 2
    with pytest.raises(RequestError, match=r"the trace cannot be written to .*: No such file or directory"):
        profile.write(tmp_path / "nowhere" / "trace.json")


def test_an_engine_records_every_stage(sample_bundle: Bundle, tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "a.png"
    Image.fromarray(phantom(5, 0).pixels).save(path)
    profile = Profile()
    with Engine.open(sample_bundle, batch=2, profile=profile) as engine:
        start = time.perf_counter()
        answers = list(engine.predict([path] * 4))
        wall = time.perf_counter() - start
    assert len(answers) == 4
    stages = {stage.stage: stage for stage in profile.stages()}
    assert {name: stage.spans for name, stage in stages.items()} == {
        "decode": 4,
        "geometry": 2,
        "network": 2,
        "boxes": 2,
        "findings": 2,
    }
    serial = sum(stage.seconds for name, stage in stages.items() if name != "decode")
    assert 0 < serial <= wall
