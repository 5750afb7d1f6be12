"""The plot of a comparison: names lie on nothing, however the points crowd."""

from __future__ import annotations

from itertools import combinations

import pytest
from matplotlib.figure import Figure

from hadaptive_q.report.front_plot import place_names

CROWD = {
    "far apart": [(0.0, 0.0), (1.0, 1.0), (2.0, 0.5)],
    "a heap": [(1 + 0.01 * i, 97 + 0.02 * (i % 3)) for i in range(8)] + [(0.0, 90.0), (3.0, 99.0)],
    "the same point": [(1.0, 97.0)] * 6,
    "a column": [(1.0, 97 + 0.01 * i) for i in range(8)] + [(5.0, 98.0)],
    "in the corners": [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)],
}


@pytest.mark.parametrize("points", CROWD.values(), ids=CROWD)
def test_names_lie_on_nothing(points: list[tuple[float, float]]) -> None:
    figure = Figure(figsize=(9, 3.8))
    axis = figure.subplots()
    axis.scatter(*zip(*points, strict=True), s=42)
    axis.margins(x=0.14, y=0.14)
    figure.draw_without_rendering()
    labels = [f"mobilenet_v3_small_{i}" for i in range(len(points))]
    notes = place_names(axis, points, labels, [])
    assert sorted(note.get_text() for note in notes) == sorted(labels)
    boxes, frame = [note.get_window_extent() for note in notes], axis.get_window_extent()
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    for box in boxes:
        assert not any(box.contains(*at) for at in axis.transData.transform(points))
        assert frame.x0 <= box.x0 <= box.x1 <= frame.x1
        assert frame.y0 <= box.y0 <= box.y1 <= frame.y1


def test_a_name_leaves_a_line_alone_where_there_is_room() -> None:
    figure = Figure(figsize=(9, 3.8))
    axis = figure.subplots()
    axis.plot([0, 1, 2], [1, 1, 1])
    figure.draw_without_rendering()
    (note,) = place_names(axis, [(1.0, 1.0)], ["in the middle of a line"], [((0.0, 1.0), (2.0, 1.0))])
    (_, y) = axis.transData.transform((1.0, 1.0))
    box = note.get_window_extent()
    assert not box.y0 <= y <= box.y1
