"""A parity receipt for the terminal: what passed, the findings, what is published, and what was and was not shown.

Owns the layout; every number is the receipt's.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Final

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from thoraxrt.benchmarks.auroc import INTERVAL_PATIENTS, Estimate
from thoraxrt.benchmarks.paired import Difference, Verdict
from thoraxrt.benchmarks.published import REFERENCES, comparable
from thoraxrt.benchmarks.receipt import Outcome, Receipt, Result

__all__ = ["render"]

_MARKS: Final[dict[Verdict, str]] = {"non-inferior": "[green]=[/]", "inferior": "[red]![/]", "cannot tell": "[dim]?[/]"}
_OUTCOMES: Final[dict[Outcome | None, str]] = {
    None: "",
    "passed": "[green]passed[/]",
    "agrees": "[yellow]agrees[/]",
    "failed": "[red]FAILED[/]",
}


def render(receipt: Receipt) -> list[RenderableType]:
    """Tables and sentences, in the order in which they are read."""
    tables = [_candidates(receipt), _findings(receipt), *_localisation(receipt), _published(receipt)]
    for table in tables:
        for column in table.columns:
            column.overflow = "fold"  # no digit is left out where the terminal is narrow
    return [*tables, "\n".join(_sentences(receipt))]


def _candidates(receipt: Receipt) -> Table:
    data = receipt.data
    table = Table(
        *("what answered", "mean AUROC", "most lost", "= ! ?", "mean error", "99 %", "rank corr.", "least concordance"),
        *("changed side", ""),
        title=f"{escape(receipt.network or 'published predictions')}: {data.images} images of {data.patients} patients "
        f"({escape(data.folder)}, {data.split})",
        caption=f"= no loss of {receipt.margin:g} AUROC or more, ! worse than that allows, ? these images cannot tell; "
        f"compared with {escape(str(receipt.reference or 'nothing'))}; passed: every finding =, agrees: answers agree, but "
        "of a ? nobody knows",
    )
    for result in receipt.results:
        table.add_row(escape(str(result.candidate)), *_cells(result), _OUTCOMES[receipt.outcome(result)])
    return table


def _cells(result: Result) -> Iterator[str]:
    areas = [finding.auroc.value for finding in result.aurocs if finding.auroc]
    yield f"{fmean(areas):.4f}" if areas else ""
    findings = result.comparison.findings if result.comparison else ()
    yield min((f"{f.difference.value:+.4f}" for f in findings if f.difference), key=float, default="")
    verdicts = [finding.verdict for finding in findings]
    yield " ".join(str(verdicts.count(verdict)) for verdict in _MARKS) if findings else ""
    agreed = result.agreement
    yield f"{agreed.mean_error:.2g}" if agreed else ""
    yield f"{agreed.p99_error:.2g}" if agreed else ""
    yield f"{agreed.rank_correlation:.5f}" if agreed else ""
    yield min((f"{each:.5f}" for each in agreed.concordance.values()), key=float, default="") if agreed else ""
    moved = sum(change.images_now_reported + change.images_no_longer_reported for change in result.changes)
    yield str(moved) if result.changes else ""


def _findings(receipt: Receipt) -> Table:
    """The reference's AUROC of each finding, and each candidate's difference."""
    first, *others = receipt.results
    others = [result for result in others if result.comparison]
    table = Table(
        *("finding", "positive", escape(str(first.candidate)), *(escape(str(result.candidate)) for result in others)),
        title="AUROC and 95 % interval" + (", and what the others add to it" if others else ""),
        caption=f"no interval where fewer than {INTERVAL_PATIENTS} patients have the finding, or have it not",
    )
    for row, finding in enumerate(first.aurocs):
        differences = [result.comparison.findings[row] for result in others if result.comparison]
        estimate = _estimate(finding.auroc) if finding.auroc else "[dim]undefined[/]"
        table.add_row(finding.finding, str(finding.positives), estimate, *map(_difference, differences))
    return table


def _estimate(estimate: Estimate) -> str:
    """With the interval that takes patients to be independent."""
    interval = estimate.clustered or estimate.bootstrap
    return f"{estimate.value:.4f}" + (f" ({interval.low:.3f}-{interval.high:.3f})" if interval else "")


def _difference(difference: Difference) -> str:
    value = f"{difference.difference.value:+.4f}" if difference.difference else ""
    return f"{value} {_MARKS[difference.verdict]}"


def _localisation(receipt: Receipt) -> Iterator[Table]:
    """The first candidate's that has boxes; T(IoBB) as in Table 4 of arXiv 1705.02315."""
    for result in receipt.results:
        if result.localisation:
            thresholds = [f"T(IoBB) = {each.threshold:g}" for each in result.localisation[0].iobb]
            table = Table(
                *("finding", "boxes", *thresholds),
                title=f"Localisation of {escape(str(result.candidate))}: accuracy, and false positives per annotated box",
            )
            for finding in result.localisation:
                cells = (
                    "" if each.accuracy is None else f"{each.accuracy:.2f}, {each.average_false_positives:.2f}"
                    for each in finding.iobb
                )
                table.add_row(finding.finding, str(finding.annotated), *cells)
            yield table
            return


def _published(receipt: Receipt) -> Table:
    table = Table("published", "split", "mean AUROC", "comparable with these", title="What others have published")
    for reference in REFERENCES:
        beside = comparable(reference, receipt.data.split, receipt.data.images)
        table.add_row(
            escape(f"{reference.name} ({reference.network})"),
            reference.split,
            f"{reference.mean:.4f}",
            "yes" if beside else "[dim]no[/]",
        )
    return table


def _sentences(receipt: Receipt) -> Iterator[str]:
    data, given = receipt.data, receipt.preprocessing
    yield from (f"[red]nobody passes[/]: {escape(failure)}" for failure in receipt.failures)
    if given is not None:
        yield f"network inputs: {given.identical} of {given.images} are Pillow's in every bit"
    if receipt.dicom:
        same = sum(not pair.input_difference for pair in receipt.dicom)
        yield f"DICOM: the network inputs of {same} of {len(receipt.dicom)} files are those of their PNG files"
    if data.unreadable:
        yield escape(f"{len(data.unreadable)} images were answered by nobody, {data.unreadable[0]} first")
    untold: dict[str, list[str]] = {}
    for result in receipt.results:
        if result.verdict is not None:
            name = escape(str(result.candidate))
            yield from (f"[red]{name} failed[/]: {escape(failure)}" for failure in result.verdict.failures)
            for fact in result.verdict.not_shown:
                untold.setdefault(fact, []).append(name)
    for fact, names in untold.items():
        yield f"not shown for {', '.join(names)}: {escape(fact)}"
