"""The page that every report is: one HTML file that needs nothing else, its figures as SVG, its radiographs as WebP.

Owns the page's shell, its colours and how a figure or a picture gets into it. Knows nothing of what is reported.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal

import matplotlib as mpl
import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from thoraxrt.benchmarks.auroc import Interval
from thoraxrt.benchmarks.environment import Environment as Machine

__all__ = [
    "DASH",
    "GRID",
    "INK",
    "MUTED",
    "SHADE",
    "Banner",
    "Cell",
    "Drawing",
    "Panel",
    "State",
    "Table",
    "environment_rows",
    "estimate",
    "interval",
    "lines",
    "number",
    "panel",
    "picture",
    "render",
    "series",
]

State = Literal["pass", "fail", "open"]
"""What a verdict says: shown to hold, shown not to, or neither shown."""

INK: Final = "#010101"
MUTED: Final = "#020202"
GRID: Final = "#030303"
SHADE: Final = "#040404"
SERIES: Final = tuple(f"#0{number}0505" for number in range(8))
"""Stand-ins that `panel` turns into the page's own colours, so that a figure is light or dark with its page.

`INK` and `MUTED` are text and lines, `GRID` fainter still, `SHADE` an area behind, `SERIES` what is compared: the
first is the reference. The colours are those of Okabe and Ito (2008), which colour-blind readers tell apart.
"""

DASHES: Final = ((), (5, 2), (6, 2, 1, 2), (1, 1.5), (5, 1, 1, 1, 1, 1), (3, 1), (9, 2), (2, 3))
"""The dashes of `SERIES` in line widths, drawn and left out: colour is never the only difference."""


def series(number: int) -> str:
    """The colour of what is compared, counted from 0, the reference; after eight they come again."""
    return SERIES[number % len(SERIES)]


def lines(number: int) -> Any:
    """The same one's line style, as matplotlib takes it."""
    dashes = DASHES[number % len(DASHES)]
    return (0, dashes) if dashes else "-"


DASH: Final = "\N{EN DASH}"
"""In the place of a value that is undefined."""

_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    SHADE: "shade",
    **{colour: f"series-{number}" for number, colour in enumerate(SERIES)},
}

_TEMPLATES = Environment(
    loader=PackageLoader("thoraxrt.benchmarks", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


_TEMPLATES.globals["dashes"] = DASHES


class Banner(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to what the report was made for: whether, of what, and why: a word or two each and what it heads."""

    state: State
    subject: str
    reasons: Sequence[tuple[str, str]]


class Panel(msgspec.Struct, frozen=True, kw_only=True):
    """A figure ready for the page: its SVG with what it shows for who cannot see it, and its title."""

    svg: Markup
    title: str


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """A table's cell: its text, the number that it sorts by where the text is not one, a verdict's colour and mark."""

    text: str
    sort: float | None = None
    state: State | None = None
    css: str = ""


def number(value: float | None, form: str = ".3f") -> Cell:
    """A number in a table, `form` as in `format`; a dash where it is None."""
    return Cell(text=DASH) if value is None else Cell(text=_said(value, form), sort=value)


def interval(span: Interval | None, form: str = ".3f") -> Cell:
    """An interval alone, sorted by its lower end; a dash where it is None."""
    if span is None:
        return number(None)
    return Cell(text=f"{_said(span.low, form)} to {_said(span.high, form)}", sort=span.low)


def estimate(value: float | None, span: Interval | None, form: str = ".3f") -> Cell:
    """A number with its 95 % interval, as far as there are any."""
    if value is None or span is None:
        return number(value, form)
    return Cell(text=f"{_said(value, form)} ({interval(span, form).text})", sort=value)


def _said(value: float, form: str) -> str:
    return format(value, form).replace("-", "\N{MINUS SIGN}")


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """Rows under a head, and a last one that is not sorted among them; the first cell of each names it.

    `caption` says what to see.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str
    foot: Sequence[Cell] = ()


class Drawing(msgspec.Struct, frozen=True, kw_only=True):
    """Panels side by side under one caption that says what to see in them."""

    panels: Sequence[Panel]
    caption: str


def render(template: str, *, title: str, banners: Sequence[Banner], machine: Machine, **parts: Any) -> str:
    """The page of `template` (a file of `benchmarks/templates`): the banners first, the environment last.

    Whatever is not already markup is escaped. The page forbids itself everything but its own style, its own
    script and the pictures inside it (a Content-Security-Policy), so it cannot fetch nor run anything else.
    """
    script = _TEMPLATES.get_template("page.js").render()
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _TEMPLATES.get_template(template).render(
        title=title,
        banners=banners,
        environment=environment_rows(machine),
        script=Markup(script),
        script_hash=allowed,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **parts,
    )


def panel(figure: Figure, title: str, alt: str) -> Panel:
    """The figure as an SVG with a transparent ground, its text as text, its colours the page's.

    `alt` is what the figure shows, in words.
    """
    _dress(figure)
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "path.simplify_threshold": 0.5}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Panel(svg=_inline(text.getvalue(), alt), title=title)


def _dress(figure: Figure) -> None:
    """Text of 8 to 9 points in ink, quiet spines, a faint grid behind."""
    for axes in figure.axes:
        axes.set_axisbelow(True)
        axes.grid(color=GRID, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(MUTED)
        axes.tick_params(which="both", colors=MUTED, labelcolor=INK, labelsize=8.5)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(color=INK, fontsize=9)
    for legend in figure.legends:
        legend.set_frame_on(False)
        for entry in legend.get_texts():
            entry.set(color=INK, fontsize=8.5)


def _inline(svg: str, alt: str) -> Markup:
    """matplotlib's SVG as a part of a page: no prologue, no identifiers that clash, no style that leaks out."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| version="1.1"', "", svg)
    svg = re.sub(r" font-family: [^;]*;", "", svg)  # the page's
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r"(\d+\.\d\d)\d+", r"\1", svg)
    svg = re.sub("|".join(_VARIABLES), lambda found: f"var(--{_VARIABLES[found[0]]})", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(alt)}"', 1))


def picture(image: Image.Image, width: int) -> str:
    """An RGB picture as a data URI, scaled to `width` pixels: WebP, which every current browser shows."""
    height = max(1, round(image.height * width / image.width))
    data = io.BytesIO()
    image.resize((width, height), Image.Resampling.LANCZOS).save(data, "WEBP", quality=72, method=6)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def environment_rows(machine: Machine) -> dict[str, str]:
    """What a run was measured on, as the page's last table names it; what the machine does not say is left out."""
    gpus = (f"{gpu.name}, driver {gpu.driver}" for gpu in machine.gpus)
    cpus = f"{machine.cpus} usable" + (f", {machine.cpu_quota:g} at a time" if machine.cpu_quota else "")
    rows = {
        "date": machine.date,
        "thoraxrt": machine.thoraxrt + (f", commit {machine.commit}" if machine.commit else ""),
        "processor": machine.cpu or machine.machine,
        "processors": cpus,
        "instruction sets": ", ".join(machine.isa),
        "clock": ", ".join(filter(None, (f"{machine.mhz:.0f} MHz" if machine.mhz else "", machine.governor))),
        "memory": f"{machine.memory_mib / 1024:.1f} GiB",
        "GPU": "; ".join(gpus),
        "load before": f"{machine.load_before:.2f}"
        + (f"; {machine.pressure_before:.0%} of the time some process waited" if machine.pressure_before else ""),
        "system": f"{machine.system}, {machine.machine}, Python {machine.python}",
        "threads": ", ".join(f"{name}={value}" for name, value in machine.threads.items()),
        "packages": ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
    }
    return {name: value for name, value in rows.items() if value}
