"""`thoraxrt top` against a real endpoint: what it computes, what it shows, and a server that comes and goes."""

from __future__ import annotations

import io
import math
import os
import pty
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from rich.console import Console

from thoraxrt.engine.errors import ServerError
from thoraxrt.engine.execute import DeviceMemory
from thoraxrt.server.telemetry import MetricsEndpoint, Telemetry
from thoraxrt.server.top import Scrape, quantile, screen, top, window

PREDICT = "/thoraxrt.v1.PredictionService/Predict"


def scraped(telemetry: Telemetry, at: float) -> Scrape:
    return Scrape.from_text(generate_latest(telemetry.registry).decode(), at)


def rendered(new: Scrape, old: Scrape | None = None) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(screen(window(new, old)))
    return console.file.getvalue()


def row(text: str, start: str) -> list[str]:
    (found,) = [line.split() for line in text.splitlines() if line.startswith(start)]
    return found


@pytest.fixture
def busy() -> Telemetry:
    """A server that has answered and refused."""
    telemetry = Telemetry()
    telemetry.loaded("chexnet", "2", sha256="ab12cd34ef", backend="openvino", precision="bf16")
    for _ in range(100):
        telemetry.stage("chexnet", "network", 0.02)
        telemetry.stage("chexnet", "decode", 0.005)
        telemetry.begun(PREDICT)
        telemetry.answered(PREDICT, "OK", 0.03)
    for size in (1, 1, 1, 8):
        telemetry.batch("chexnet", size)
    telemetry.queue("chexnet", 5)
    telemetry.refused("chexnet", "deadline")
    telemetry.gpu_memory(lambda: [DeviceMemory(gpu="0", used=3 * 2**30, total=8 * 2**30)])
    return telemetry


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50), st.floats(0.01, 1.0))
def test_a_quantile_lies_in_the_bucket_of_the_observation(values, share):
    bounds = [0.1, 1.0, 3.0, 10.0, 30.0, math.inf]
    counts = {bound: float(sum(value <= bound for value in values)) for bound in bounds}
    true = sorted(values)[math.ceil(share * len(values) - 1e-9) - 1]
    upper = next(bound for bound in bounds if true <= bound)
    lower = max((bound for bound in bounds if bound < upper), default=0.0)
    found = quantile(counts, share)
    assert lower <= found <= min(upper, 30.0) or found == pytest.approx(lower)


def test_a_quantile_of_even_buckets_is_exact():
    rng = random.Random(3)
    values = [rng.uniform(0, 10) for _ in range(20_000)]
    counts = {bound: float(sum(v <= bound for v in values)) for bound in (1.0, 2.0, 3.0, 5.0, 7.0, 10.0, math.inf)}
    assert quantile(counts, 0.5) == pytest.approx(5.0, abs=0.1)
    assert quantile(counts, 0.99) == pytest.approx(9.9, abs=0.1)


def test_without_observations_there_is_no_quantile():
    assert math.isnan(quantile({}, 0.5))
    assert math.isnan(quantile({1.0: 0.0, math.inf: 0.0}, 0.5))


def test_rates_and_latencies_are_those_of_the_window(busy):
    old = scraped(busy, 1000.0)
    for _ in range(10):
        busy.stage("chexnet", "network", 0.2)
        busy.begun(PREDICT)
        busy.answered(PREDICT, "RESOURCE_EXHAUSTED", 0.001)
    busy.batch("chexnet", 4)
    busy.refused("chexnet", "images")
    text = rendered(scraped(busy, 1002.0), old)
    assert "5.0 calls/s   2.0 images/s   0.5 refused/s   in the last 2.0 s" in text
    network, decode = row(text, "network"), row(text, "decode")
    assert network[1] == "5.0"
    assert 150 <= float(network[2]) <= 200
    assert decode[1:4] == ["0.0", "-", "-"]
    assert row(text, "Predict")[-2:] == ["RESOURCE_EXHAUSTED", "10"]
    assert row(text, "chexnet  2") == ["chexnet", "2", "openvino", "bf16", "ab12cd34", "5", "images", "1"]
    assert row(text, "chexnet       4")[1:3] == ["4", "1"]


def test_the_first_screen_is_since_the_start(busy):
    scrape = scraped(busy, time.time())
    text = rendered(scrape)
    assert "since its start" in text
    assert "GPU 0 3.00 GiB of 8.00 GiB" in text
    assert row(text, "Predict")[-2:] == ["OK", "100"]
    assert "75%" in text
    assert "7-8" in text


def test_a_restarted_server_counts_from_its_start(busy):
    before, after = scraped(busy, 1000.0), Telemetry()
    after.batch("chexnet", 2)
    new = scraped(after, 1002.0)
    ((labels, start),) = new.samples["process_start_time_seconds"]
    new.samples["process_start_time_seconds"] = [(labels, start + 500.0)]  # as another process's
    text = rendered(new, before)
    assert "since its start" in text
    assert "-" not in row(text, "thoraxrt")[3]  # no negative rate


def test_a_server_that_has_done_nothing_is_shown():
    text = rendered(scraped(Telemetry(), time.time()))
    assert "no image yet" in text


def test_a_models_name_is_no_markup():
    telemetry = Telemetry()
    telemetry.queue("[/red]", 1)
    assert "[/red]" in rendered(scraped(telemetry, time.time()))


@pytest.mark.parametrize("once", [True, False])
def test_once_or_into_a_pipe_it_prints_one_table_and_returns(busy, once):
    code = "import sys; from thoraxrt.server.top import top; top(sys.argv[1], once=sys.argv[2] == 'True')"
    with MetricsEndpoint(busy, "127.0.0.1", 0) as endpoint:
        command = [sys.executable, "-c", code, f"127.0.0.1:{endpoint.port}", str(once)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    assert "network" in said
    assert "\x1b" not in said


def test_where_nothing_listens_it_says_so():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(
            ServerError, match=rf"no metrics at {url}/metrics: Connection refused; expected the address"
        ):
            top(url, once=True)


@pytest.fixture(params=[b"<html>hello</html>", b"up 1\n", b"\xff\xfe"])
def another(request: pytest.FixtureRequest) -> Iterator[int]:
    """A server that is not ours: its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(request.param)

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_what_is_not_thoraxrt_is_named(another):
    with pytest.raises(ServerError, match=r"no metrics at|not thoraxrt"):
        top(f"127.0.0.1:{another}", once=True)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x"])
def test_only_http_is_asked(url):
    with pytest.raises(ServerError, match="expected http://HOST:PORT"):
        top(url, once=True)


def test_on_a_terminal_it_waits_for_the_server_and_shows_it_until_interrupted(busy):
    with MetricsEndpoint(busy, "127.0.0.1", 0) as endpoint:
        port = endpoint.port
    code = f"from thoraxrt.server.top import top; top('127.0.0.1:{port}', interval_s=0.2)"
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "110", "LINES": "40"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    )
    os.close(slave)

    def read_until(words: str) -> str:
        said, end = "", time.monotonic() + 15
        while words not in said:
            assert time.monotonic() < end, said
            said += os.read(master, 65536).decode(errors="replace")
        return said

    try:
        read_until("waiting for it")
        with MetricsEndpoint(busy, "127.0.0.1", port):
            read_until("openvino bf16")
        read_until("waiting for it")
        process.send_signal(2)
        read_until("\x1b[?1049l")  # the terminal has its screen back
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
