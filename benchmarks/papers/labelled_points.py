"""Points with their names beside them, for figures of accuracy against cost."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.transforms import Bbox

# Of Okabe and Ito's colours, which the colour-blind can tell apart.
KNOWN, MESSAGE, WARNING, OTHER = "black", "#0072B2", "#D55E00", "0.72"
FONT_SIZE = 7.5
DISTANCES = (5, 12, 20, 30, 42, 56, 72)  # of a label from its point, in points
ANGLES = (0, 180, 90, 270, 45, 135, 315, 225, 20, 160, 340, 200)


class Point(NamedTuple):
    """A method in a panel. Without a label it is a pale dot, without its error."""

    x: float
    y: float
    error: float
    label: str = ""
    colour: str = OTHER
    marker: str = "o"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)


def draw_points(axes, title: str, points: Iterable[Point]) -> None:
    for x, y, error, label, colour, marker in points:
        style = {"color": colour, "marker": marker, "lw": 1}
        if label:
            axes.errorbar(x, y, error or None, ms=5, zorder=3, **style)
        else:
            axes.errorbar(x, y, ms=4, mew=0, zorder=1, **style)
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def write_labels(axes, points: Sequence[Point]) -> list:
    """Writes each label at the nearest place to its point where it covers nothing.

    Call it when all panels are drawn and have their limits, as the labels are measured
    in pixels. Returns the labels.
    """
    axes.figure.canvas.figure.draw_without_rendering()  # of subfigures too
    taken = [box for point in points for box in boxes_of(axes, point)]
    labels = []
    for point in points:
        if point.label:
            labels.append(write_label(axes, point, taken))
            taken.append(labels[-1].get_window_extent().padded(1))
    return labels


def boxes_of(axes, point: Point) -> Iterator[Bbox]:
    """What a point covers, in pixels: its dot, and its error bar if it has one."""
    x, y = axes.transData.transform((point.x, point.y))
    yield Bbox.from_extents(x - 4, y - 4, x + 4, y + 4)
    if point.label:
        _, top = axes.transData.transform((point.x, point.y + point.error))
        yield Bbox.from_extents(x - 2, 2 * y - top, x + 2, top)


def write_label(axes, point: Point, taken: Sequence[Bbox]):
    def write(text, at, **style):
        """At a distance from the point, in points."""
        place = {"textcoords": "offset points", "ha": "center", "va": "center"}
        label = axes.annotate(text, (point.x, point.y), at, **place, **style)
        label.set_in_layout(False)
        return label

    label = write(point.label, (0, 0), color=point.colour, fontsize=FONT_SIZE)
    box, dots = label.get_window_extent(), axes.figure.dpi / 72

    def edge_and_middle(distance, angle):
        """Of the label there: its nearest edge and its middle, in points."""
        direction = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
        beyond = np.sign(np.where(abs(direction) > 0.3, direction, 0))
        edge = distance * direction
        return edge, edge + beyond * box.size / 2 / dots

    def is_free(distance, angle):
        there = box.translated(*dots * edge_and_middle(distance, angle)[1])
        inside = Bbox.intersection(there, axes.bbox)
        is_whole = inside is not None and np.allclose(inside.size, there.size)
        return is_whole and not there.padded(1).count_overlaps(taken)

    places = list(itertools.product(DISTANCES, ANGLES))
    distance, angle = next((place for place in places if is_free(*place)), places[0])
    edge, middle = edge_and_middle(distance, angle)
    label.set_position(middle)
    if distance > DISTANCES[1]:
        line = {"arrowstyle": "-", "color": "0.6", "lw": 0.5, "shrinkA": 0}
        write("", edge, arrowprops=line | {"shrinkB": 3})
    return label
