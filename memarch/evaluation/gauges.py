"""What sparse memories reported while they trained: read from a run's metrics.csv, as a table of the last values and a figure of all.

A gauge `blocks.1.ffn.usage` of layer `blocks.1.ffn` is the column train/blocks.1.ffn.usage; the gradient norm of a table the column grad_norm/TABLE.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from memarch.callbacks.table import read
from memarch.config import ConfigError
from memarch.evaluation.plots import COLUMN, STYLE, colours

ABOUT = {  # gauge -> what its panel says
    "usage": "rows of the table that were read (share)",
    "unevenness": "unevenness of use (nats; 0: all rows alike)",
    "top1": "largest weight of a token",
    "entropy": "entropy of a token's weights (nats)",
    "kept": "mean score that was kept",
    "ratio": "last singular value of the core over the first",
    "grad_norm": "gradient norm of the table",
}


class Course(NamedTuple):
    gauge: str
    layer: str
    steps: list[int]
    values: list[float]


def courses(file: Path) -> list[Course]:
    """In the order of ABOUT, and in a gauge in the order of the file."""
    columns, rows = read(file)
    if not columns:
        raise ConfigError(f"{file} does not exist or has no rows: name the folder of a training run (runs/NAME/TIME).")
    named = [(*name, column) for column in columns if (name := gauge_of(column))]
    found = []
    for gauge, layer, column in sorted(named, key=lambda entry: list(ABOUT).index(entry[0])):
        there = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
        if there:
            found.append(Course(gauge, layer, *map(list, zip(*there, strict=True))))  # type: ignore[arg-type]
    if not found:
        raise ConfigError(f"{file} has no gauges of a sparse memory: its model has none, or the run ended before its first row.")
    return found


def gauge_of(column: str) -> tuple[str, str] | None:
    """The gauge and the layer that a column of metrics.csv is about."""
    where, _, rest = column.partition("/")
    if where == "grad_norm" and "." in rest:
        return "grad_norm", rest.removesuffix(".table").removeprefix("backbone.")
    layer, _, gauge = rest.rpartition(".")
    return (gauge, layer) if where == "train" and layer and gauge in ABOUT else None


def draw(found: list[Course]) -> Figure:
    """A panel a gauge, a line a layer."""
    import matplotlib

    gauges, layers = (list(dict.fromkeys(getattr(course, field) for course in found)) for field in ("gauge", "layer"))
    tints = dict(zip(layers, colours(len(layers), ordered=len(layers) > 8), strict=True))
    down = math.ceil(len(gauges) / 2)
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(2 * COLUMN, 1.5 * down + 0.3), layout="constrained")
        panels = fig.subplots(down, 2, squeeze=False).flatten()
        for ax, gauge in zip(panels, gauges, strict=False):
            for course in found:
                if course.gauge == gauge:
                    ax.plot(course.steps, course.values, color=tints[course.layer], marker="o" if len(course.steps) == 1 else None)
            ax.set_title(ABOUT[gauge], fontsize=7, loc="left", pad=3)
            ax.grid(axis="y", linewidth=0.4, color="0.9")
            if gauge == "usage" or min(np.concatenate([c.values for c in found if c.gauge == gauge])) >= 0:
                ax.set_ylim(bottom=0)
        for ax in panels[len(gauges) :]:
            ax.set_visible(False)
        for ax in panels[max(0, len(gauges) - 2) : len(gauges)]:
            ax.set_xlabel("step")
        lines = [matplotlib.lines.Line2D([], [], color=tints[layer], label=layer) for layer in layers]
        fig.legend(handles=lines, loc="outside upper left", ncols=3, frameon=False, fontsize=7)
    return fig
