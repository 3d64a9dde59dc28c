"""A parity receipt as a page: verdicts, differences, curves, tables and the cases that moved most.

Owns what stands where and how numbers are said; every number is the receipt's.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from thoraxrt.benchmarks.auroc import INTERVAL_PATIENTS, FindingAuroc
from thoraxrt.benchmarks.localisation import ThresholdResult
from thoraxrt.benchmarks.measures import Errors, Share
from thoraxrt.benchmarks.paired import Comparison, Difference
from thoraxrt.benchmarks.parity_figures import differences_panel, errors_panel, reliability_panel, roc_panel
from thoraxrt.benchmarks.parity_gallery import VISIBLE, Case
from thoraxrt.benchmarks.published import REFERENCES, TABLE_4, TABLE_7, LocalisationReference, comparable
from thoraxrt.benchmarks.receipt import Data, Outcome, Receipt, Result
from thoraxrt.benchmarks.report import DASH, Banner, Cell, Drawing, State, Table, estimate, interval, number, render
from thoraxrt.export.agreement import CONCORDANCE, MEAN_ERROR, P99_ERROR, RANK_CORRELATION
from thoraxrt.export.nih import LABELS

__all__ = ["parity_report"]

_STATES: dict[str, State] = {"non-inferior": "pass", "inferior": "fail", "cannot tell": "open"}
_FEW = f"No interval where fewer than {INTERVAL_PATIENTS} patients have the finding, or have it not."
_SPLITS = {"test": "official test list", "train_val": "official train_val list", "all": "whole data entry file"}
_OUTCOMES: dict[Outcome, tuple[State, str]] = {
    "failed": ("fail", "fails"),
    "passed": ("pass", "passes"),
    "agrees": ("open", "nothing against it, but these images cannot tell whether AUROC lost"),
}


def parity_report(receipt: Receipt, cases: Sequence[Case] = ()) -> str:
    """The receipt as one HTML page; `cases` are of `parity_gallery.gallery`."""
    results = [result for result in receipt.results if result.aurocs or result.probability_errors]
    results = results or list(receipt.results[:1])
    names = [str(result.candidate) for result in results]
    return render(
        "parity.html",
        title=f"Parity of {receipt.network or 'published predictions'}",
        banners=_banners(receipt),
        machine=receipt.environment,
        receipt=receipt,
        names=names,
        reference=None if receipt.reference is None else str(receipt.reference),
        facts=_facts(receipt),
        split=_SPLITS[receipt.data.split],
        differences=_differences(results, receipt.margin),
        comparisons=[_comparison(result) for result in results if result.comparison],
        powers=[(str(result.candidate), _power(result.comparison)) for result in results if result.comparison],
        aurocs=_aurocs(results, names),
        published=_published(receipt.data),
        published_findings=_published_findings(),
        roc=_roc(results, names),
        operating=[_operating(result, results[0]) for result in results if result.operating],
        reliability=_reliability(results, names),
        scores=_scores(results, names),
        errors=_errors(results),
        error_table=_error_table(results),
        agreement=_agreement(results),
        localisation=[table for result in results if result.localisation for table in _localisation(result)],
        published_boxes=[_published_boxes(table) for table in (TABLE_4, TABLE_7)],
        boxes=[_boxes(result, receipt) for result in results if result.boxes],
        dicom=_dicom(receipt),
        unanswered=_unanswered(receipt),
        cases=cases,
        visible=VISIBLE,
    )


def _banners(receipt: Receipt) -> list[Banner]:
    """A banner for each candidate that was compared; what could not be shown is said, and is no pass by itself."""
    failures = [("Failed:", failure) for failure in receipt.failures]
    banners = [Banner(state="fail", subject="Nobody passes", reasons=failures)] if failures else []
    for result in receipt.results:
        verdict, outcome = result.verdict, receipt.outcome(result)
        if verdict is None or outcome is None:
            continue
        state, said = _OUTCOMES[outcome]
        if outcome == "agrees" and result.comparison:
            findings = result.comparison.findings
            said += f" in {sum(each.verdict != 'non-inferior' for each in findings)} of {len(findings)} findings"
        reasons = [
            (word, sentence)
            for word, sentences in (
                ("Failed:", verdict.failures),
                ("Shown:", verdict.shown),
                ("Open:", verdict.not_shown),
            )
            for sentence in sentences
        ]
        banners.append(Banner(state=state, subject=f"{result.candidate}: {said}", reasons=reasons))
    return banners or [
        Banner(
            state="open",
            subject="Nothing was compared",
            reasons=[("", "There is one set of answers, and no reference.")],
        )
    ]


def _facts(receipt: Receipt) -> list[tuple[str, str]]:
    data = receipt.data
    facts = [
        ("images", f"{data.images:,}"),
        ("patients", f"{data.patients:,}"),
        ("not at hand", f"{data.absent:,}"),
        ("unreadable", f"{len(data.unreadable):,}"),
        ("margin of AUROC", f"{receipt.margin:g}"),
    ]
    if receipt.bundle:
        facts.append(("bundle", receipt.bundle[:12]))
    return [*facts, ("chosen by", _chosen(data))]


def _chosen(data: Data) -> str:
    if data.sample is not None:
        return f"sample of {data.sample:,} images, by patient"
    return "all of them" if data.limit is None else f"the first {data.limit:,} images"


# --- AUROC -----------------------------------------------------------------------------------------------


def _differences(results: Sequence[Result], margin: float) -> Drawing:
    return Drawing(
        panels=[
            differences_panel(str(result.candidate), result.comparison.findings, margin, number)
            for number, result in enumerate(results)
            if result.comparison
        ],
        caption="Each finding's AUROC less the reference's on the same images, with its 95 % interval by patient. Good is "
        f"an interval wholly to the right of the dashed margin, {-margin:g}. Filled: non-inferior; crossed: inferior; "
        "hollow: these images cannot tell. An arrow stands where an interval goes on beyond the axis.",
    )


def _comparison(result: Result) -> Table:
    assert result.comparison is not None
    ours = {each.finding: each for each in result.aurocs}
    return Table(
        head=(
            "finding",
            "verdict",
            "difference (95 %, by patient)",
            "bootstrap",
            "DeLong",
            "p DeLong",
            "p non-inferior",
            "detectable loss",
            "positive patients",
            "why",
        ),
        rows=[_difference(each, ours[each.finding]) for each in result.comparison.findings],
        caption=f"{result.candidate}: paired differences of AUROC and what they show. p of non-inferiority is corrected "
        f"(Holm) over the {result.comparison.tested} findings tested. A detectable loss would have been called inferior with "
        f"{result.comparison.power:.0%} power, if the candidate disagrees with the reference no more than this one. {_FEW}",
    )


def _difference(each: Difference, ours: FindingAuroc) -> list[Cell]:
    value = each.difference
    return [
        Cell(text=each.finding),
        Cell(text=each.verdict, state=_STATES[each.verdict], css="text"),
        estimate(value.value if value else None, value.clustered if value else None, "+.4f"),
        interval(value.bootstrap if value else None, "+.4f"),
        interval(value.delong if value else None, "+.4f"),
        number(each.p_delong, ".2g"),
        number(each.p_non_inferior_holm, ".2g"),
        number(each.detectable, ".4f"),
        number(ours.positive_patients, ",d"),
        Cell(text=DASH if each.reason == "shown" else each.reason, css="text"),
    ]


def _power(comparison: Comparison) -> str:
    """What these images could have shown at all, in a sentence."""
    known = {each.finding: each.detectable for each in comparison.findings if each.detectable is not None}
    images = f"{comparison.images:,} images of {comparison.patients:,} patients"
    if not known:
        return (
            f"{images}: no finding was tested for which a smallest detectable loss can be computed; {comparison.enough_patients} "
            "patients with it and as many without it are needed, and answers that differ."
        )
    able = [finding for finding, loss in known.items() if loss <= 2 * comparison.margin]
    best, worst = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    return (
        f"{images} would have shown, with {comparison.power:.0%} power and if a candidate disagrees with the reference no more "
        f"than this one, a true loss of {known[best]:.4f} for {best} (the least) and of {known[worst]:.4f} for {worst} (the "
        f"most). Of one that loses nothing they would have shown that it does not lose {comparison.margin:g} for {len(able)} "
        f"of {len(comparison.findings)} findings."
    )


def _aurocs(results: Sequence[Result], names: Sequence[str]) -> Table | None:
    if not results[0].aurocs:
        return None
    rows = []
    for each in zip(*(result.aurocs for result in results), strict=True):
        values = [one.auroc for one in each]
        rows.append(
            [
                Cell(text=each[0].finding),
                number(each[0].positives, ",d"),
                number(each[0].negatives, ",d"),
                *(estimate(one.value if one else None, one.clustered if one else None) for one in values),
            ]
        )
    means = [_mean([one.auroc.value for one in result.aurocs if one.auroc]) for result in results]
    return Table(
        head=("finding", "positives", "negatives", *names),
        rows=rows,
        foot=[Cell(text="mean of those defined"), Cell(text=""), Cell(text=""), *(number(mean) for mean in means)],
        caption=f"AUROC with its 95 % interval by patient. {_FEW}",
    )


def _published(data: Data) -> Table:
    """Whose results there are, and whether these images are theirs."""
    rows = [
        [
            Cell(text=each.name),
            Cell(text=each.network, css="text"),
            number(each.mean),
            _comparable(comparable(each, data.split, data.images)),
            Cell(text=f"{each.split} split", css="text"),
            Cell(text=each.source, css="wrap"),
        ]
        for each in REFERENCES
    ]
    return Table(
        head=("published", "network", "mean AUROC", "comparable", "split", "source"),
        rows=rows,
        caption="Published results. Comparable only where both are of the whole official test list: another split has other "
        "images.",
    )


def _comparable(answer: bool) -> Cell:
    return Cell(text="comparable" if answer else "not comparable", state="pass" if answer else "open", css="text")


def _published_findings() -> Table:
    known = [each for each in REFERENCES if each.aurocs]
    return Table(
        head=("finding", *(f"{each.name} ({each.split} split)" for each in known)),
        rows=[[Cell(text=label), *(number(each.aurocs.get(label), ".4f") for each in known)] for label in LABELS],
        caption="Published AUROC by finding; see above for what may be compared.",
    )


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _roc(results: Sequence[Result], names: Sequence[str]) -> Drawing:
    return Drawing(
        panels=[
            roc_panel(dict(zip(names, each, strict=True)))
            for each in zip(*(result.aurocs for result in results), strict=True)
        ],
        caption="Sensitivity over 1 - specificity at every threshold. A candidate that is still the model lies on the broad "
        "grey line of the reference; the dotted diagonal is chance.",
    )


# --- operating points, reliability, errors ---------------------------------------------------------------


def _operating(result: Result, reference: Result) -> Table:
    """Sensitivity and specificity, and who changed side; the reference's own table has no changes."""
    changes = {each.finding: each for each in result.changes}
    theirs = {each.finding: each for each in reference.operating} if result is not reference else {}
    beside = ("reference's sensitivity", "reference's specificity") if theirs else ()
    moved = ("now reported: images (patients)", "no longer: images (patients)", "kappa") if changes else ()
    rows = []
    for each in result.operating:
        row = [Cell(text=each.finding), _share(each.sensitivity), _share(each.specificity)]
        if theirs:
            row += [_share(theirs[each.finding].sensitivity), _share(theirs[each.finding].specificity)]
        if changes:
            change = changes[each.finding]
            row += [
                _count(change.images_now_reported, change.patients_now_reported),
                _count(change.images_no_longer_reported, change.patients_no_longer_reported),
                number(change.kappa),
            ]
        rows.append(row)
    return Table(
        head=("finding", "sensitivity", "specificity", *beside, *moved),
        rows=rows,
        caption=f"{result.candidate} at the bundle's operating points, with Wilson's 95 % intervals, which take all images to be "
        "independent: too narrow where a patient has several.",
    )


def _share(share: Share) -> Cell:
    return estimate(share.count / share.of if share.of else None, share.interval)


def _count(images: int, patients: int) -> Cell:
    return Cell(text=f"{images:,} ({patients:,})", sort=images)


def _reliability(results: Sequence[Result], names: Sequence[str]) -> Drawing:
    return Drawing(
        panels=[
            reliability_panel(dict(zip(names, each, strict=True)))
            for each in zip(*(result.reliability for result in results), strict=True)
        ],
        caption="The share of images that have the finding, over the mean probability that they were given, in bins of equal "
        "mass. On the dotted diagonal a probability means what it says; a candidate should lie on the reference, "
        "wherever that lies.",
    )


def _scores(results: Sequence[Result], names: Sequence[str]) -> Table | None:
    if not results[0].reliability:
        return None
    return Table(
        head=("finding", *(f"{measure}, {name}" for name in names for measure in ("ECE", "Brier"))),
        rows=[
            [Cell(text=each[0].finding), *(number(value, ".4f") for one in each for value in (one.ece, one.brier))]
            for each in zip(*(result.reliability for result in results), strict=True)
        ],
        caption="Expected calibration error (15 bins of equal mass) and Brier score: 0 is best of both.",
    )


def _errors(results: Sequence[Result]) -> Drawing:
    kinds = (
        ("Probabilities", "absolute error of probability", [result.probability_errors for result in results]),
        ("Logits", "absolute error of logit", [result.logit_errors for result in results]),
    )
    histograms = [
        (title, unit, {number: each.histogram for number, each in enumerate(errors) if each})
        for title, unit, errors in kinds
    ]
    return Drawing(
        panels=[errors_panel(title, unit, counts) for title, unit, counts in histograms if counts],
        caption="How far answers are from the reference's, all findings and images together. The further left, the nearer.",
    )


def _error_table(results: Sequence[Result]) -> Table | None:
    rows = [
        [Cell(text=f"{result.candidate}, {of}"), *_errors_row(each)]
        for result in results
        for of, each in (("probabilities", result.probability_errors), ("logits", result.logit_errors))
        if each
    ]
    if not rows:
        return None
    return Table(
        head=("", "mean", "median", "p99", "largest", "rank correlation"),
        rows=rows,
        caption="Absolute errors, and Spearman's rank correlation with the reference.",
    )


def _errors_row(each: Errors) -> list[Cell]:
    values = (each.mean, each.p50, each.p99, each.max)
    return [*(number(value, ".3g") for value in values), number(each.rank_correlation, ".6f")]


def _agreement(results: Sequence[Result]) -> Table | None:
    rows = [
        [
            Cell(text=str(result.candidate)),
            number(result.agreement.mean_error, ".3g"),
            number(result.agreement.p99_error, ".3g"),
            number(result.agreement.rank_correlation, ".6f"),
            number(min(result.agreement.concordance.values(), default=None), ".6f"),
            Cell(text="met" if result.agreement.meets_bar else "not met", state=_met(result.agreement.meets_bar)),
        ]
        for result in results
        if result.agreement
    ]
    if not rows:
        return None
    return Table(
        head=("", "mean error", "p99 error", "rank correlation", "least concordance of a finding", "bar"),
        rows=rows,
        caption=f"The bar that an export holds INT8 to: mean error of probability at most {MEAN_ERROR:g}, p99 at most "
        f"{P99_ERROR:g}, rank correlation at least {RANK_CORRELATION:g}; and of each finding's logits Lin's concordance at "
        f"least {CONCORDANCE:g}.",
    )


def _met(met: bool) -> State:
    return "pass" if met else "fail"


# --- localisation, preprocessing, what was not answered ---------------------------------------------------


def _localisation(result: Result) -> list[Table]:
    """A table for each of the two overlaps: rows are findings, columns thresholds."""
    return [
        Table(
            head=("finding", "annotated", "detected", *(f"T = {each.threshold:g}" for each in results[0][1])),
            rows=[
                [
                    Cell(text=one.finding),
                    number(one.annotated, ",d"),
                    number(one.detected, ",d"),
                    *(_localised(each) for each in thresholds),
                ]
                for one, thresholds in results
            ],
            caption=f"{result.candidate}: accuracy (average false positives per annotated box) at T({overlap}), on "
            f"{result.localisation[0].images:,} images with boxes.",
        )
        for overlap, results in (
            ("IoBB", [(one, one.iobb) for one in result.localisation]),
            ("IoU", [(one, one.iou) for one in result.localisation]),
        )
    ]


def _localised(each: ThresholdResult) -> Cell:
    if each.accuracy is None:
        return number(None)
    return Cell(text=f"{each.accuracy:.3f} ({each.average_false_positives:.3f})", sort=each.accuracy)


def _published_boxes(table: LocalisationReference) -> Table:
    columns = zip(table.accuracy, table.average_false_positives, strict=True)  # by threshold
    by_threshold = [list(zip(accuracy, false, strict=True)) for accuracy, false in columns]
    return Table(
        head=("finding", *(f"T = {threshold:g}" for threshold in table.thresholds)),
        rows=[
            [
                Cell(text=finding),
                *(Cell(text=f"{each[row][0]:.3f} ({each[row][1]:.3f})", sort=each[row][0]) for each in by_threshold),
            ]
            for row, finding in enumerate(table.findings)
        ],
        caption=f"Published: {table.name}, {table.source}, at T({'IoBB' if table.overlap == 'iobb' else 'IoU'}). Comparable "
        "only on all 880 images with boxes.",
    )


def _boxes(result: Result, receipt: Receipt) -> Table:
    return Table(
        head=(
            "finding",
            "boxes",
            "reference's",
            "matched",
            "mean IoU",
            "peak distance, px",
            "unmatched",
            "reference's unmatched",
        ),
        rows=[
            [
                Cell(text=each.finding),
                number(each.boxes, ",d"),
                number(each.reference_boxes, ",d"),
                number(each.matched, ",d"),
                number(each.mean_iou),
                number(each.mean_peak_distance, ".1f"),
                number(each.unmatched, ".1%"),
                number(each.reference_unmatched, ".1%"),
            ]
            for each in result.boxes
        ],
        caption=f"{result.candidate}: boxes of reported findings against those of {receipt.boxes_reference}. Where both report "
        "the same, mean IoU near 1 says that the boxes are the same too.",
    )


def _dicom(receipt: Receipt) -> Table | None:
    if not receipt.dicom:
        return None
    return Table(
        head=("image", "DICOM", "largest difference of pixels", "of the network's input"),
        rows=[
            [
                Cell(text=each.image),
                Cell(text=each.dicom),
                number(each.pixels_difference, "d"),
                number(each.input_difference, "d"),
            ]
            for each in receipt.dicom
        ],
        caption="One radiograph as PNG and as DICOM, in gray levels of 0 to 255: 0 is the same.",
    )


def _unanswered(receipt: Receipt) -> Table | None:
    missed = [(str(result.candidate), each) for result in receipt.results for each in result.unanswered]
    rows = [
        [Cell(text=each.image), Cell(text=name, css="text"), Cell(text=each.error, css="wrap")] for name, each in missed
    ]
    rows += [
        [Cell(text=image), Cell(text="all", css="text"), Cell(text="unreadable", css="wrap")]
        for image in receipt.data.unreadable
    ]
    if not rows:
        return None
    return Table(head=("image", "by", "why"), rows=rows, caption="Left out of every comparison.")
