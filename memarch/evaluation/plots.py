"""Figures that can go into a paper as they are: column width, readable there, safe for colour-blind readers, lines named where they end.

Ordered things (lengths, pairs) take steps of one dark-to-light scale, unordered ones (variants) Okabe and Ito's colours; a mark says the same as
a colour. A figure is a function of numbers: no model is looked at here.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from memarch.config import ConfigError
from memarch.evaluation.fidelity import FORMS
from memarch.evaluation.table import Row, Table

COLUMN = 3.4  # inches
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: Any = {
    "font.size": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,  # letters stay letters
    "axes.axisbelow": True,
}
UNITS = {
    "length": "sequence length (tokens)",
    "age": "age of the pair (tokens)",
    "gap": "distance back to the fact (tokens)",
    "position": "position in the document (tokens)",
    "depth": "depth of the needle (share of the text before it)",
    "distance": "distance (tokens)",
    "block": "from block",
    "apart": "blocks apart",
    "pairs": "pairs",
    "copies": "tokens to copy",
    "accuracy": "accuracy",
    **{name: f"ECLMF, {form}" for name, form in FORMS.items()},
    "bits_per_byte": "bits per byte",
    "bits_per_token": "bits per token",
    "nmse": "squared error / variance",
    "val/accuracy": "validation accuracy",
    "val/loss": "validation loss (nats per token)",
    "val/bits": "validation bits per token",
    "optim.lr": "learning rate",
    "state": "state of one sequence (KiB)",
    "parameters": "parameters",
}


class Line(NamedTuple):
    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float | None]
    dots: Sequence[tuple[float, float]] = ()  # single runs, drawn faintly


@contextmanager
def figure(height: float, panels: int = 1, width: float = COLUMN) -> Iterator[tuple[Figure, list[Axes]]]:
    """No pyplot: nothing global changes, and no window system is asked for."""
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(width, height), layout="constrained")
        yield fig, list(np.atleast_1d(fig.subplots(panels)))


def save(fig: Figure, file: Path, pdf: bool = False) -> list[Path]:
    files = [file.with_suffix(".png")] + ([file.with_suffix(".pdf")] if pdf else [])
    for path in files:
        fig.savefig(path, dpi=200, bbox_inches="tight", pad_inches=0.02)
    return files


def colours(n: int, ordered: bool) -> list[Any]:
    """An ordered scale runs without the pale end that paper swallows."""
    if ordered and n > 1:
        return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0.05, 0.82, n)]
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def draw_lines(ax: Axes, lines: Sequence[Line], x: str, y: str, *, ordered: bool = False, log: bool = True) -> None:
    """Lines with error bars, each named at its right end. Where lines with single runs have places in common they stand a little beside each
    other, or bars would hide bars."""
    share = y.endswith("accuracy")
    places = [v for line in lines for v in line.x]
    beside = any(line.dots for line in lines) and len(set(places)) < len(places)
    for i, (line, colour, mark) in enumerate(zip(lines, colours(len(lines), ordered), MARKS * len(lines), strict=False)):
        aside = 2.5 * (i - (len(lines) - 1) / 2) if beside else 0.0  # points
        place = ax.transData + ScaledTranslation(aside / 72, 0, ax.figure.dpi_scale_trans)
        below = [0.0 if e is None else min(e, v) if share else e for e, v in zip(line.error, line.y, strict=True)]  # a share ends at 0 and 1
        above = [0.0 if e is None else min(e, 1 - v) if share else e for e, v in zip(line.error, line.y, strict=True)]
        ax.errorbar(line.x, line.y, [below, above], color=colour, marker=mark, elinewidth=0.8, label=line.label, clip_on=False, zorder=3, transform=place)
        if line.dots:
            across, up = zip(*line.dots, strict=True)
            ax.scatter(across, up, s=6, color=colour, alpha=0.35, linewidths=0, zorder=2, clip_on=False, transform=place)
    if log:
        ax.set_xscale("log", base=2)
    ax.set_xlim(*around([v for line in lines for v in line.x], log))  # by hand: what is moved aside does not count for matplotlib
    ends = [v + sign * (e or 0.0) for line in lines for v, e in zip(line.y, line.error, strict=True) for sign in (-1, 1)]
    ax.set_ylim(*((0, 1) if share else around([*ends, *(v for line in lines for _, v in line.dots)])))
    ticks(ax, sorted({v for line in lines for v in line.x}), log)
    ax.set_xlabel(UNITS.get(x, x))
    ax.set_ylabel(UNITS.get(y, y))
    ax.grid(axis="y", linewidth=0.4, color="0.9")
    name_ends(ax, lines, colours(len(lines), ordered), 6 + 1.25 * (len(lines) - 1) * beside)


def around(values: Sequence[float], log: bool = False) -> tuple[float, float]:
    """Limits with a twentieth of the span on both sides."""
    low, high = (math.log2(v) if log else v for v in (min(values), max(values)))
    pad = 0.05 * (high - low) or 0.5
    return (2 ** (low - pad), 2 ** (high + pad)) if log else (low - pad, high + pad)


def ticks(ax: Axes, at: Sequence[float], log: bool = False) -> None:
    """Ticks where there are numbers; when they or their digits are many, every second or third of them, or powers of two."""
    if log and len(at) > 9:
        at = [2.0**i for i in range(math.ceil(math.log2(min(at))), math.floor(math.log2(max(at))) + 1)]
    digits = max(len(f"{v:g}") for v in at)
    at = list(at)[:: 1 + (len(at) - 1) // min(9, 36 // digits)]
    ax.xaxis.set_major_locator(FixedLocator(at))
    ax.set_xticks(at, [f"{v:g}" for v in at])
    ax.xaxis.set_minor_locator(NullLocator())


def name_ends(ax: Axes, lines: Sequence[Line], tints: Sequence[Any], off: float = 6.0) -> None:
    """Names to the right of where lines end, pushed apart where lines end close together."""
    low, high = ax.get_ylim()
    inches = ax.get_window_extent().height / ax.figure.dpi if ax.figure else 1.5
    step = (high - low) * 0.14 / max(inches, 0.5)  # one line of 7-point text
    right = max(v for line in lines for v in line.x)
    order = sorted(range(len(lines)), key=lambda i: (round(lines[i].y[-1] / (high - low), 2), -i))  # where lines meet, names go in the lines' order
    places: list[float] = []
    for i in order:
        places.append(max(lines[i].y[-1], places[-1] + step if places else low + step / 2))
    if places and places[-1] > high:  # down again, as far as the top asks for
        places[-1] = high
        for k in range(len(places) - 2, -1, -1):
            places[k] = min(places[k], places[k + 1] - step)
    for i, place in zip(order, places, strict=True):
        ax.annotate(lines[i].label, (right, place), xytext=(off, 0), textcoords="offset points", va="center", fontsize=7, color=tints[i], annotation_clip=False)


def note(ax: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **how: Any) -> None:
    """Small text at (share of the width, value), moved by points."""
    ax.annotate(text, at, xycoords=("axes fraction", "data"), xytext=offset, textcoords="offset points", fontsize=7, **how)


# ------------------------------------------------------------------------------------------------ tables


def lines_of(rows: Sequence[Row], x: str, y: str, group: str, unit: str = "") -> list[Line]:
    """One line per value of `group`; the unit is said once, with the first."""
    found = []
    for value in sorted({row[group] for row in rows}):
        here = sorted((row for row in rows if row[group] == value), key=lambda row: row[x])
        found.append(Line(str(value), [row[x] for row in here], [row[y] for row in here], [row["error"] for row in here]))
    return [found[0]._replace(label=f"{found[0].label} {unit}".strip()), *found[1:]] if found else []


def recall(table: Table) -> Figure:
    """Above: over length, a line per load. Below: the longest length by how far back the answer stands, where a window shows its edge."""
    x, group = table.axes
    longest = max(row[x] for row in table.rows)
    gaps = [{**row, "gap": row["gap"] * 2**0.5} for row in table.parts["gap"] if row[x] == longest]  # the middle of its octave
    with figure(3.9, panels=2) as (fig, (top, bottom)):
        draw_lines(top, lines_of(table.rows, x, table.metric, group, group), x, table.metric, ordered=True)
        draw_lines(bottom, lines_of(gaps, "gap", table.metric, group, group), "gap", table.metric, ordered=True)
        ticks(bottom, sorted({row[edge] for row in table.parts["gap"] if row[x] == longest for edge in ("gap", "below")}))
        bottom.set_xlabel(f"{UNITS['gap']}, at length {longest}")
    return fig


def heat(table: Table) -> Figure:
    """Two axes as a map, the number in each cell."""
    x, y = table.axes
    columns, rows = sorted({row[x] for row in table.rows}), sorted({row[y] for row in table.rows})
    values = np.full((len(rows), len(columns)), np.nan)
    for row in table.rows:
        values[rows.index(row[y]), columns.index(row[x])] = row[table.metric]
    with figure(0.9 + 0.26 * len(rows)) as (fig, (ax,)):
        image = ax.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value < 0.55 else "black")
        ax.set_xticks(range(len(columns)), [f"{v:g}" for v in columns])
        ax.set_yticks(range(len(rows)), [f"{v:g}" for v in rows])
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)
        ax.set_xlabel(UNITS.get(x, x))
        ax.set_ylabel("depth (share of text before)" if y == "depth" else UNITS.get(y, y))
        bar = fig.colorbar(image, ax=ax, shrink=0.9, pad=0.02, aspect=15)
        bar.set_label(table.metric)
        bar.outline.set_visible(False)  # type: ignore[operator]
    return fig


def position(table: Table) -> Figure:
    """What a token costs by how much of its document the model has read."""
    rows = table.parts["position"]
    middle = [(row["position"] * (row["below"] - 1)) ** 0.5 for row in rows]
    mean = table.rows[0][table.metric]
    with figure(2.2) as (fig, (ax,)):
        line = Line("", middle, [row[table.metric] for row in rows], [row["error"] for row in rows])
        draw_lines(ax, [line], "position", table.metric)
        ticks(ax, [row["position"] for row in rows])
        ax.axhline(mean, color="0.5", linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
        note(ax, f"mean {mean:.3f}", (1, mean), (4, 0), va="center", color="0.35")
    return fig


def ages(table: Table) -> Figure:
    """Accuracy by how long ago a pair was stored."""
    rows = [{**row, "age": row["age"] * 2**0.5} for row in table.rows]  # the middle of its octave
    with figure(2.2) as (fig, (ax,)):
        line = Line("", *([row[name] for row in rows] for name in ("age", table.metric, "error")))
        draw_lines(ax, [line], "age", table.metric)
        ticks(ax, sorted({edge for row in table.rows for edge in (row["age"], 2 * row["age"])}))
    return fig


def bars(table: Table) -> Figure:
    """Cells below each other."""
    return strip([{**table.settings(row), "value": row[table.metric]} for row in table.rows], table.axes, table.metric)


def fidelity(table: Table) -> Figure:
    """ETMF over distance; below it ECLMF over blocks, as published and held out with |Y| as its unit."""
    forms = {"x_in_sample": "in-sample, over |X| (published)", "y_held_out": "held-out, over |Y|"}
    blocks = [{**row, "error": None} for row in table.parts.get("blocks", ())]

    def named(rows: Sequence[Row], x: str, y: str, group: str) -> list[Line]:
        return [line._replace(label=f"{line.label} apart" if group == "apart" else f"{group} {line.label}") for line in lines_of(rows, x, y, group)]

    with figure(4.6 if blocks else 1.8, panels=3 if blocks else 1) as (fig, (top, *below)):
        draw_lines(top, named(table.rows, "distance", table.metric, "offset"), "distance", table.metric, log=False)
        for ax, (form, title) in zip(below, forms.items(), strict=False):
            draw_lines(ax, named(blocks, "block", form, "apart"), "block", "ECLMF", ordered=True, log=False)
            ax.set_title(title, fontsize=7, loc="left", pad=3)
        for ax in below[:-1]:
            ax.set_xlabel("")
    return fig


FIGURES = {
    "mqar": recall,
    "copy": recall,
    "selective_copy": recall,
    "needle": heat,
    "age": ages,
    "facts": bars,
    "inertial": bars,
    "text": position,
    "fidelity": fidelity,
}


def draw(table: Table) -> Figure:
    if table.task not in FIGURES:
        raise ConfigError(f"no figure is known for {table.task!r}; there is one for {', '.join(FIGURES)}.")
    return FIGURES[table.task](table)


# ------------------------------------------------------------------------------------------------ comparisons


def compare(points: Sequence[Row], *, metric: str, x: str | None = None, group: str | None = None) -> Figure:
    """Runs against each other. A point is one run (or one cell of it): its place in every dimension, and its `value`.

    Along x runs a dimension of numbers; each value of `group` is a line; every combination of the other dimensions is a panel. Without a
    dimension of numbers, groups stand below each other. What is drawn is the mean over seeds with its standard deviation, and every run."""
    dims = [name for name in points[0] if name != "value"]
    numbers = [name for name in dims if all(isinstance(point[name], int | float) for point in points)]
    x = x if x in dims and x in numbers else next((name for name in reversed(numbers) if name != group), None)
    group = group if group in dims and group != x else next((name for name in dims if name != x), None)
    rest = [name for name in dims if name not in (x, group)]
    panels = list(dict.fromkeys(tuple(point[name] for name in rest) for point in points))
    if x is None:
        return strip(points, dims, metric)
    with figure(0.5 + 1.7 * len(panels), panels=len(panels)) as (fig, axes):
        for ax, place in zip(axes, panels, strict=True):
            here = [point for point in points if tuple(point[name] for name in rest) == place]
            values = list(dict.fromkeys(point[group] for point in here)) if group else [None]
            lines = [mean_line(str(value) if group else "", [p for p in here if group is None or p[group] == value], x) for value in values]
            ordered = group in numbers
            span = [point[x] for point in here]
            draw_lines(ax, lines, x, metric, ordered=ordered, log=min(span) > 0 and max(span) >= 4 * min(span))
            if rest:
                where = ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in zip(rest, place, strict=True))
                ax.set_title(where, fontsize=7, loc="left", pad=3)
            if ax is not axes[-1]:
                ax.set_xlabel("")
    return fig


def mean_line(name: str, points: Sequence[Row], x: str) -> Line:
    at = sorted({point[x] for point in points})
    values = [[point["value"] for point in points if point[x] == v] for v in at]
    errors = [float(np.std(v, ddof=1)) if len(v) > 1 else None for v in values]
    dots = [(v, y) for v, ys in zip(at, values, strict=True) if len(ys) > 1 for y in ys]
    return Line(name, at, [float(np.mean(v)) for v in values], errors, dots)


def strip(points: Sequence[Row], dims: Sequence[str], metric: str) -> Figure:
    """Groups below each other: every run a dot, the mean a bar."""
    names = list(dict.fromkeys(tuple(str(point[name]) for name in dims) for point in points)) or [("",)]
    with figure(0.55 + 0.25 * len(names)) as (fig, (ax,)):
        for i, name in enumerate(names):
            values = [point["value"] for point in points if tuple(str(point[d]) for d in dims) == name]
            ax.scatter(values, [i] * len(values), s=12, color=COLOURS[0], alpha=0.5, linewidths=0, zorder=3)
            ax.plot([float(np.mean(values))] * 2, [i - 0.25, i + 0.25], color=COLOURS[0], linewidth=1.6, zorder=4)
            note(ax, f"{np.mean(values):.3f}", (1, i), (4, 0), va="center")
        ax.set_yticks(range(len(names)), [", ".join(name) for name in names])
        ax.invert_yaxis()
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.grid(axis="x", linewidth=0.4, color="0.9")
        ax.set_xlabel(UNITS.get(metric, metric))
    return fig
