"""The plot of a comparison: accuracy against a cost, the Pareto front marked, every model named beside its point."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from hadaptive_q.report.comparison import ComparedModel, Cost, front
from hadaptive_q.report.plots import FLOAT_COLOR, GRID, INT8_COLOR, blank, svg

Point = tuple[float, float]
POINT = 5.0  # half a marker with its rim
_ANGLES = 16
# Beside the point in points, the best place first.
_PLACES = [
    (distance * math.cos(angle), distance * math.sin(angle))
    for distance in (9.0, 16.0, 26.0, 38.0, 52.0, 68.0)  # beyond the first, a line leads to the point
    for angle in (2 * math.pi / _ANGLES * step for step in (0, 8, 2, -2, 6, -6, 4, -4, 1, -1, 7, -7, 3, -3, 5, -5))
]


def front_plot(models: Sequence[ComparedModel], cost: Cost, label: str) -> str:
    """Return one `<svg>`: top-1 of the files with its standard error over `cost`, in millions of what `label` says."""
    figure = blank(3.8)
    axis = figure.subplots()
    points = [(cost(m) / 1e6, m.accuracy.pte_top1) for m in models]
    best = front(models, cost)
    steps = [points[models.index(m)] for m in best]
    xs, ys = zip(*points, strict=True)
    errors = [math.sqrt(y * (100 - y) / m.accuracy.samples) for y, m in zip(ys, models, strict=True)]
    axis.errorbar(xs, ys, errors, fmt="none", ecolor=GRID, elinewidth=1.5, zorder=1)
    axis.plot(*zip(*steps, strict=True), color=INT8_COLOR, linewidth=0.9, zorder=2)
    colors = [INT8_COLOR if m in best else FLOAT_COLOR for m in models]
    axis.scatter(xs, ys, s=42, color=colors, edgecolor="white", linewidth=0.8, zorder=3)
    axis.set_xlabel(label)
    axis.set_ylabel("top-1 of the file, %")
    axis.set_title("Blue: the Pareto front; bars: standard errors", fontsize=10, loc="left")
    axis.margins(x=0.14, y=0.14)
    axis.grid(color=GRID, linewidth=0.6, alpha=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # names are placed on the axes as they lie now
    bars = [((x, y - error), (x, y + error)) for x, y, error in zip(xs, ys, errors, strict=True)]
    place_names(axis, points, [m.name for m in models], [*bars, *pairwise(steps)])
    return svg(figure)


def place_names(
    axis: Axes, points: Sequence[Point], names: Sequence[str], lines: Sequence[tuple[Point, Point]]
) -> list[Annotation]:
    """Write each name beside its point, off all other names and points and, where there is room, off `lines`."""
    pixel = axis.figure.dpi / 72
    at = axis.transData.transform(points)
    markers = [Bbox.from_extents(*(p - POINT * pixel), *(p + POINT * pixel)) for p in at]
    thin = [box for line in lines for box in _pieces(*axis.transData.transform(line))]
    frame = axis.get_window_extent()
    placed: list[Annotation] = []
    # From above to below: where points crowd, names step aside in the order in which they are read.
    for index in sorted(range(len(points)), key=lambda i: -at[i][1]):
        note = axis.annotate(names[index], points[index], (0, 0), textcoords="offset points", fontsize=8, zorder=4)
        box = note.get_window_extent()
        corners = [_corner(place, box.width / pixel, box.height / pixel) for place in _PLACES]
        boxes = [box.translated(x * pixel, y * pixel).padded(pixel) for x, y in corners]
        taken = [*(other.get_window_extent() for other in placed), *markers]
        bad = [(b.count_overlaps(taken) + _leaves(frame, b), b.count_overlaps(thin), i) for i, b in enumerate(boxes)]
        *_, chosen = min(bad)  # the nearest of the equally good
        note.set_position(corners[chosen])
        if chosen >= _ANGLES:
            tail = {"arrowstyle": "-", "color": FLOAT_COLOR, "linewidth": 0.6, "shrinkA": 0, "shrinkB": POINT}
            axis.annotate("", points[index], _PLACES[chosen], textcoords="offset points", arrowprops=tail)
        placed.append(note)
    return placed


def _corner(place: Point, width: float, height: float) -> Point:
    """Return where a text begins whose side that faces the point, or the middle of it, is at `place`."""
    x, y = place
    across = 0.5 if abs(x) < abs(y) / 2 else float(x < 0)
    along = 0.5 if abs(y) < abs(x) / 2 else float(y < 0)
    return x - across * width, y - along * height


def _leaves(frame: Bbox, box: Bbox) -> bool:
    return bool(box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1)


def _pieces(start: NDArray[np.float64], end: NDArray[np.float64]) -> Iterator[Bbox]:
    """Yield small boxes along the line between two pixels."""
    for share in np.linspace(0, 1, max(2, int(abs(end - start).max() / 3))):
        x, y = start + share * (end - start)
        yield Bbox.from_extents(x - 1, y - 1, x + 1, y + 1)
