"""The pages: whole, closed to the world, safe from what data says, and the same in a real browser."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from thoraxrt.benchmarks.auroc import Cohort, Interval, finding_aurocs
from thoraxrt.benchmarks.bench import BenchResult, Curve, Memory, Point, Stage
from thoraxrt.benchmarks.bench_report import bench_report
from thoraxrt.benchmarks.environment import environment
from thoraxrt.benchmarks.localisation import box_agreement, localisation
from thoraxrt.benchmarks.measures import changes, errors, operating, reliability
from thoraxrt.benchmarks.paired import compare
from thoraxrt.benchmarks.parity_gallery import gallery
from thoraxrt.benchmarks.parity_report import parity_report
from thoraxrt.benchmarks.parity_table import render
from thoraxrt.benchmarks.peers import Peer
from thoraxrt.benchmarks.receipt import (
    Candidate,
    Data,
    DicomPair,
    Moved,
    Preprocessing,
    Receipt,
    Result,
    Unanswered,
    Verdict,
)
from thoraxrt.benchmarks.roofline import Peak, Peaks, Work, floor
from thoraxrt.benchmarks.scenarios import ScenarioResult, latencies_from_ms
from thoraxrt.engine.bundle import Bundle
from thoraxrt.export.nih import NihBox, NihDataset
from thoraxrt.export.phantoms import write_phantoms

HOSTILE = "<script>alert('x')</script>"
REFERENCE = Candidate(backend="onnxruntime", precision="fp32", through="engine")
FP16 = Candidate(backend="openvino", precision="fp16", through="server")
EVIL = Candidate(backend=HOSTILE, precision="int8", through="engine")


class Page(HTMLParser):
    """What a page holds: its title, what it refers to, and whether every element that opens also closes."""

    _VOID = frozenset({"meta", "img", "br", "path", "use", "line"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [(tag, v or "") for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data")]
        if tag not in self._VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self._VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def receipt(
    findings: tuple[str, ...], images: int, candidates: tuple[Candidate, ...] = (REFERENCE, FP16), seed: int = 0
) -> Receipt:
    """A receipt of the statistics' own numbers on random answers; the first candidate is the reference."""
    rng = np.random.default_rng(seed)
    positive = rng.random((images, len(findings))) < 0.4
    cohort = Cohort(labels=findings, positive=positive, patients=np.arange(images), resamples=50)
    logits = rng.normal(positive.astype(np.float64), 1.0)  # (N, C)
    rankings, reported, results = [], [], []
    box = NihBox(finding=findings[0], x=0, y=0, width=9, height=9)
    for number, candidate in enumerate(candidates):
        own = logits + 0.1 * number * rng.normal(size=logits.shape)
        probabilities = 1 / (1 + np.exp(-own))
        rankings.append(cohort.ranking(own))
        reported.append(probabilities > 0.5)
        result = Result(
            candidate=candidate,
            aurocs=finding_aurocs(rankings[-1]),
            operating=operating(findings, positive, reported[-1]),
            reliability=reliability(findings, positive, probabilities),
            localisation=localisation([(box,)], [()], findings[:1]),
        )
        if number:
            result = msgspec.structs.replace(
                result,
                comparison=compare(rankings[-1], rankings[0]),
                changes=changes(findings, reported[-1], reported[0], cohort.patients),
                probability_errors=errors(probabilities, 1 / (1 + np.exp(-logits))),
                logit_errors=errors(own, logits),
                boxes=box_agreement([()], [()], findings),
                unanswered=(Unanswered(image=f"{HOSTILE}.png", error=HOSTILE),),
                verdict=Verdict(passed=number != 2, failures=(HOSTILE,) if number == 2 else (), shown=(), not_shown=()),
            )
        results.append(result)
    return Receipt(
        bundle="ab" * 32,
        network="densenet121",
        checkpoint=None,
        data=Data(
            folder=HOSTILE, split="test", limit=None, sample=None, images=images, patients=images, absent=0,
            unreadable=(), sha256=None, annotated=findings, unannotated=(),
        ),
        margin=0.005,
        reference=candidates[0] if len(candidates) > 1 else None,
        boxes_reference=candidates[0],
        preprocessing=None,
        dicom=(),
        results=tuple(results),
        environment=environment(),
    )  # fmt: skip


def check_closed(page: Page) -> None:
    """It takes nothing from anywhere: pictures are in it, parts of drawings too, and only citations lead away."""
    for tag, reference in page.references:
        assert reference.startswith(("data:image/webp;base64,", "#")) or (
            tag == "a" and reference.startswith("https://arxiv.org/abs/")
        ), (tag, reference[:80])
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(page.tags)


def test_a_parity_page_is_whole_and_closed_and_names_everything() -> None:
    html = parity_report(receipt(("Mass", "Hernia"), 60, (REFERENCE, FP16, EVIL)))
    page = Page(html)
    check_closed(page)
    text = " ".join(page.text)
    for name in ("Mass", "Hernia", str(REFERENCE), str(FP16), str(EVIL)):
        assert name in text
    assert text.index(f"{EVIL}: fails") < text.index("Difference of AUROC") < text.index("processor")
    assert page.tags.count("svg") >= 2 + 2 + 2 + 2  # differences, ROC, reliability, errors
    assert "://" not in re.sub(r'href="https://arxiv.org/abs/[\d.]+"', "", html)


def test_what_data_says_is_never_markup() -> None:
    html = parity_report(receipt((HOSTILE, "Mass"), 60, (REFERENCE, FP16, EVIL)))
    assert HOSTILE not in html
    page = Page(html)
    assert page.tags.count("script") == 1  # the page's own
    assert HOSTILE in " ".join(page.text)  # said, as text


@pytest.mark.parametrize(("images", "candidates"), [(1, (REFERENCE, FP16)), (1, (REFERENCE,)), (40, (REFERENCE,))])
def test_what_is_undefined_is_drawn_as_that(images: int, candidates: tuple[Candidate, ...]) -> None:
    """One image: no AUROC, no boxes; one candidate: nothing to compare with."""
    text = " ".join(Page(parity_report(receipt(("Mass",), images, candidates))).text)
    assert ("undefined" in text) == (images == 1)
    assert ("Nothing was compared" in text) == (len(candidates) == 1)


def said(given: Receipt) -> tuple[str, bool, str]:
    """The page, whether the exit status is 0, and the table."""
    console = Console(file=io.StringIO(), width=200)
    for part in render(given):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return parity_report(given), given.passed, console.file.getvalue()


@pytest.mark.parametrize(("shown", "outcome"), [(0, "agrees"), (1, "agrees"), (2, "passed")])
def test_what_is_not_shown_of_every_finding_is_no_pass_anywhere(shown: int, outcome: str) -> None:
    """The images can tell of none, of one or of both findings."""
    given = receipt(("Mass", "Hernia"), 60)
    first, second = given.results
    assert second.comparison is not None
    findings = [
        msgspec.structs.replace(each, verdict="non-inferior" if number < shown else "cannot tell")
        for number, each in enumerate(second.comparison.findings)
    ]
    comparison = msgspec.structs.replace(second.comparison, findings=tuple(findings))
    results = (first, msgspec.structs.replace(second, comparison=comparison))
    given = msgspec.structs.replace(given, results=results)
    page, status, table = said(given)
    assert given.outcome(results[1]) == outcome
    assert status  # nothing failed
    assert re.search(rf"{FP16} .* {outcome} ", table)
    assert ('class="verdict pass"' in page) == (f"{FP16}: passes" in page) == (outcome == "passed")
    words = f"{FP16}: nothing against it, but these images cannot tell whether AUROC lost in {2 - shown} of 2 findings"
    assert (words in page) == (outcome == "agrees")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (
            {"preprocessing": Preprocessing(images=9, identical=8, max_difference=1, different=("a.png",))},
            "network inputs are not those of training: 1 of 9",
        ),
        (
            {"dicom": (DicomPair(image="a.png", dicom="a.dcm", pixels_difference=3, input_difference=2),)},
            "network inputs of 1 of 1 DICOM files are not those",
        ),
    ],
)
def test_another_network_input_fails_everybody_everywhere(changed: dict[str, object], why: str) -> None:
    page, status, table = said(msgspec.structs.replace(receipt(("Mass",), 60), **changed))
    assert not status
    assert 'class="verdict pass"' not in page
    assert why in page
    assert f"{FP16}: fails" in page
    assert why in table
    assert re.search(rf"{FP16} .* FAILED ", table)


def test_too_few_patients_have_no_interval() -> None:
    page = parity_report(receipt(("Mass",), 20))  # 40 % of them, so 8, have it
    assert "+0." in page or "-0." in page
    assert not re.search(r"[+-]0\.\d+ to", page)


def test_a_runtime_that_broke_is_in_the_banners_alone() -> None:
    whole = receipt(("Mass",), 60, (REFERENCE, FP16, EVIL))
    reason = "the runtime broke"
    broken = Result(candidate=FP16, verdict=Verdict(passed=False, failures=(reason,), shown=(), not_shown=()))
    text = " ".join(
        Page(parity_report(msgspec.structs.replace(whole, results=(whole.results[0], broken, whole.results[2])))).text
    )
    assert text.count(reason) == 1
    assert text.count(str(FP16)) == 1


def test_the_gallery_shows_what_moved_and_passes_over_what_did_not(sample_bundle: Bundle, tmp_path: Path) -> None:
    write_phantoms(tmp_path, 3, seed=5)
    records = {record.image: record for record in NihDataset.open(tmp_path)}
    finding = sample_bundle.manifest.labels[0]
    fp32 = Candidate(backend="onnxruntime", precision="fp32", through="engine")
    torch = Candidate(backend="pytorch", precision="fp32", through="torch")
    names = [*records, "absent.png"]
    moved = [
        Moved(image=n, finding=finding, probability=0.5 + i * 0.1, reference=0.5, positive=None)
        for i, n in enumerate(names)
    ]
    base = receipt(("Mass",), 1, (torch, fp32))
    results = (base.results[0], msgspec.structs.replace(base.results[1], moved=tuple(moved)))
    base = msgspec.structs.replace(base, results=results, boxes_reference=fp32)
    cases = gallery(base, sample_bundle, records)
    assert [case.image for case in cases] == names[1:3]  # the first did not move, the last is not at hand
    assert cases[0].reference.drawn_by == str(fp32)
    assert cases[0].candidate.drawn_by is None
    page = Page(parity_report(base, cases))
    check_closed(page)
    assert page.tags.count("img") == 3 * len(cases)


# --- bench -----------------------------------------------------------------------------------------------


def bench_result() -> BenchResult:
    rng = np.random.default_rng(0)

    def scenario(name: str, valid: bool, count: int) -> ScenarioResult:
        return ScenarioResult(
            scenario=name, target="engine", input="encoded", verdict="VALID" if valid else "INVALID",  # type: ignore[arg-type]
            reasons=() if valid else (HOSTILE,), early_stopping="", queries=count, images=count, per_query=1, warm_up=1,
            seconds=1.0, images_per_s=30.0, offered_per_s=None, percent=90.0, bound_ms=None,
            latency=latencies_from_ms(rng.lognormal(3, 0.1, count)), errors={}, joules_per_image=None,
        )  # fmt: skip

    work = Work(
        operations={"fp32": 10**9}, weight_bytes=10**6, image_bytes=10**5, activation_bytes=10**6, not_counted={}
    )
    peaks = Peaks(arithmetic={"fp32": Peak(operations_per_s=1e11, by="numpy")}, bytes_per_s=1e10)
    points = tuple(
        Point(load=load, images_per_s=20.0 * load, latency=latencies_from_ms(rng.lognormal(3, 0.1, 30)), errors={})
        for load in (1.0, 4.0)
    )
    return BenchResult(
        environment=environment(), network="densenet121", bundle_sha256="ab" * 32, backend="openvino", precision="fp32",
        batch=4, images=2, image_bytes=10**6, loadgen="6.0", seconds=3.0, quick=True,
        scenarios=(scenario("SingleStream", True, 200), scenario("Offline", False, 1)),
        curves=(
            Curve(over="batch", arrivals=None, target="engine", input="network", points=points),
            Curve(over="offered load", arrivals="poisson", target="grpc", input="encoded", points=points),
        ),
        stages=(Stage(target="engine", stage="network", mean_ms=20.0, p50_ms=None, p99_ms=None, source="profile"),),
        memory=(Memory(target="engine", peak_rss_bytes=10**8, gpu_bytes=None),),
        work=work, peaks=peaks, floors=(floor(work, peaks, 1), floor(work, peaks, 4)), no_floor=None,
        turns={},
        peers=(
            Peer(name="openvino fp32", batch=4, reason=None, agreement=None, rounds=None, speed_up=1.5,
                 interval=Interval(low=1.4, high=1.6)),
            Peer(name="torch.compile", batch=4, reason=HOSTILE, agreement=None, rounds=None, speed_up=None, interval=None),
        ),
    )  # fmt: skip


def test_a_bench_page_is_whole_and_closed_and_says_invalid() -> None:
    html = bench_report(bench_result())
    page = Page(html)
    check_closed(page)
    text = " ".join(page.text)
    for name in ("SingleStream: VALID", "Offline: 1 of 1 runs INVALID", "openvino fp32", "batch 4", "Roofline"):
        assert name in text
    assert HOSTILE not in html
    assert HOSTILE in text
    share = 1e9 / 1e11 * 20.0  # the floor of compute against 20 images a second at batch 1
    assert f"{share:.0%}" in text


def test_a_bench_page_of_nothing_measured_is_a_page() -> None:
    bare = msgspec.structs.replace(
        bench_result(), scenarios=(), curves=(), stages=(), memory=(), peaks=None, floors=(), no_floor=HOSTILE, peers=()
    )
    text = " ".join(Page(bench_report(bare)).text)
    assert "No scenario was run" in text
    assert HOSTILE in text


# --- a real browser --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parity", "bench"])
def test_a_browser_opens_it_and_runs_its_script_without_a_complaint(kind: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    file = tmp_path / "report.html"
    file.write_text(
        parity_report(receipt(("Mass", "Hernia"), 60)) if kind == "parity" else bench_report(bench_result())
    )
    command = (browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
    options = ("--enable-logging=stderr", "--dump-dom", file.as_uri())
    ran = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in ran.stderr, ran.stderr
    title = "Parity of densenet121" if kind == "parity" else "Speed of densenet121, openvino fp32"
    assert f"<title>{title}</title>" in ran.stdout
    assert re.search(r"<th scope=\"col\"[^>]*><button>", ran.stdout)  # so the script ran, and its policy let it
