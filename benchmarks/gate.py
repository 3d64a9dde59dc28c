"""Whether a bench result is slower than another beyond noise: `compare`, for a person and for CI.

Owns the rule. Only what was timed in rounds beside a yardstick is compared, and only where the yardstick agrees. Still, a
shared machine has regimes that no yardstick shows: results of another hour may be of another one. The sure way is to
measure both in the same rounds, `thoraxrt.benchmarks.against`. Accuracy has a gate of its own, the parity check.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Final

import msgspec
import numpy as np
from rich.console import Console
from scipy.stats import norm

from thoraxrt.benchmarks.auroc import Interval
from thoraxrt.benchmarks.bench import BenchResult
from thoraxrt.benchmarks.rounds import MARGIN, Change, Rounds, change_table, verdict_from_interval
from thoraxrt.engine.errors import RequestError

__all__ = ["Comparison", "change", "compare", "print_comparison"]

_BUSIER: Final = 1.1
"""By how much the yardstick itself may differ. Beyond, the machine is another one: on 2 shared CPUs a DenseNet-121 took
41 ms beside a yardstick of 11.0, 57 beside 12.9, and an hour later 32 beside 11.8. No yardstick tried (products, copies,
convolutions) carries one such regime's times into another; within one, a product's are the steadiest (1.3 % between runs)."""

_FEWEST: Final = 8
"""Rounds: fewer give no 99 % interval worth the name."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every figure of our own that is in the last result and an earlier one, in the last one's order, and the peers'.

    `peers` are for who reads it: another runtime's slowdown is not ours. `missing` names the figures that only the last
    result has, or only earlier ones. `different` says in what the runs differ (versions, commit).
    """

    margin: float
    changes: tuple[Change, ...]
    peers: tuple[Change, ...]
    missing: tuple[str, ...]
    different: tuple[str, ...]

    @property
    def regressed(self) -> bool:
        """Whether any figure of our own is slower beyond the margin and beyond noise."""
        return any(change.verdict == "slower" for change in self.changes)


def compare(
    befores: Sequence[BenchResult], after: BenchResult, *, margin: float = MARGIN, anyway: bool = False
) -> Comparison:
    """What changed from one or more earlier results to the last, see `change`.

    The more earlier results there are, of hours that differ, the less a regime of the machine looks like a change.
    Raises RequestError without an earlier result; where they are of different bundles, backends, precisions, batches,
    images, figures, CPUs or GPUs, unless `anyway`; where no figure is in common, or where there are too few rounds.
    """
    if not befores:
        raise RequestError("no earlier result; expected one or more to compare with")
    odd = dict.fromkeys(chain.from_iterable(_differences(_subject(before), _subject(after)) for before in befores))
    if odd and not anyway:
        raise RequestError(
            f"these results are not of the same thing ({'; '.join(odd)}); compare them anyway, or not at all"
        )
    ours, peers = (_changes([own(before) for before in befores], own(after), margin) for own in (_own, _peers))
    if not ours:
        raise RequestError(
            "the results have no figure in common that was timed in rounds; run thoraxrt bench without --quick"
        )
    earlier = set().union(*(_own(before).keys() | _peers(before).keys() for before in befores))
    different = (_differences(_software(before), _software(after)) for before in befores)
    return Comparison(
        margin=margin,
        changes=ours,
        peers=peers,
        missing=tuple(sorted(earlier ^ (_own(after).keys() | _peers(after).keys()))),
        different=tuple(dict.fromkeys(chain.from_iterable(different))),
    )


def _changes(befores: Sequence[Mapping[str, Rounds]], after: Mapping[str, Rounds], margin: float) -> tuple[Change, ...]:
    """Of every figure that the last result and an earlier one have."""
    earlier = {name: [before[name] for before in befores if name in before] for name in after}
    return tuple(change(name, earlier[name], after[name], margin) for name in after if earlier[name])


def _own(result: BenchResult) -> dict[str, Rounds]:
    """Whole images, and the network alone as the engine ran it."""
    return result.turns | _alone(result, own=True)


def _peers(result: BenchResult) -> dict[str, Rounds]:
    return _alone(result, own=False)


def _alone(result: BenchResult, *, own: bool) -> dict[str, Rounds]:
    ran = f"{result.backend} {result.precision}"
    return {f"network alone, {p.name}": p.rounds for p in result.peers if p.rounds and (p.name == ran) == own}


def _subject(result: BenchResult) -> dict[str, object]:
    """What must be the same for a change of time to mean anything."""
    here = result.environment
    return {
        "bundle": result.bundle_sha256[:12],
        "backend": result.backend,
        "precision": result.precision,
        "batch": result.batch,
        "images": result.images,
        "their bytes": result.image_bytes,
        "figures": "; ".join(sorted(result.turns)) or None,
        "CPU": here.cpu,
        "CPUs": here.cpus,
        "CPU quota": here.cpu_quota,
        "GPUs": ", ".join(gpu.name for gpu in here.gpus) or None,
        "thread settings": here.threads or None,
    }


def _software(result: BenchResult) -> dict[str, object]:
    """What may have changed the time."""
    here = result.environment
    return {
        "commit": here.commit,
        "thoraxrt": here.thoraxrt,
        "python": here.python,
        "system": here.system,
        **here.versions,
    }


def _differences(before: Mapping[str, object], after: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(
        f"{name} {before.get(name)} and {after.get(name)}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    )


def change(figure: str, befores: Sequence[Rounds], after: Rounds, margin: float = MARGIN) -> Change:
    """Compare one figure's rounds with one or more earlier ones.

    Only those count whose yardstick's median is within 10 % of this one's; without any the verdict is "cannot tell". So
    it is unless all of them give the same one. Shown is that whose ratio is nearest to 1.

    The ratio is in yardsticks: the Hodges-Lehmann estimate over all pairs of rounds of two runs, on logarithms, its
    interval the one that the Mann-Whitney test inverts to (Hollander, Wolfe and Chicken, Nonparametric Statistical
    Methods, 3rd edition, section 4.3, large-sample form), at 99 %. Raises RequestError with fewer than 8 rounds, which
    give no such interval.
    """
    yard = statistics.median(after.yardstick_ms)
    alike = [b for b in befores if 1 / _BUSIER <= yard / statistics.median(b.yardstick_ms) <= _BUSIER]
    found = [_change(figure, before, after, margin) for before in alike or befores]
    nearest = min(found, key=lambda change: abs(math.log(change.ratio)))
    if alike and len({change.verdict for change in found}) == 1:
        return nearest
    return msgspec.structs.replace(nearest, verdict="cannot tell")


def _change(figure: str, before: Rounds, after: Rounds, margin: float) -> Change:
    ratios = np.sort(np.divide.outer(after.relative, before.relative).ravel())  # (rounds after x rounds before,)
    m, n = len(before.milliseconds), len(after.milliseconds)
    if min(m, n) < _FEWEST:
        raise RequestError(f"{figure}: {m} and {n} rounds; expected at least {_FEWEST} in both results")
    outside = int(m * n / 2 - norm.ppf(0.995) * math.sqrt(m * n * (m + n + 1) / 12)) - 1
    interval = Interval(low=float(ratios[outside]), high=float(ratios[-1 - outside]))
    return Change(
        figure=figure,
        before_ms=statistics.median(before.milliseconds),
        after_ms=statistics.median(after.milliseconds),
        ratio=float(np.median(ratios)),
        interval=interval,
        verdict=verdict_from_interval(interval, margin),
    )


def print_comparison(comparison: Comparison, console: Console) -> None:
    """The tables, what is missing, what else is different, and how far to trust it."""
    console.print(change_table(comparison.changes, f"slower or faster: beyond {comparison.margin:.0%}, in yardsticks"))
    if comparison.peers:
        console.print(change_table(comparison.peers, "other runtimes, not judged"))
    for heading, entries in (("not in both", comparison.missing), ("different", comparison.different)):
        if entries:
            console.print(f"{heading}: {'; '.join(entries)}", markup=False)
    console.print(
        "Results of another hour may be of another regime of the machine. The sure way is side by side: "
        "thoraxrt bench against PYTHON BUNDLE IMAGES",
        markup=False,
    )
