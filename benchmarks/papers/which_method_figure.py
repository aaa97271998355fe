"""The figure of docs/evidence/which-method.md: accuracy against time, for all methods.

    python benchmarks/papers/which_method_figure.py benchmarks/results/cpu FIGURE.png

reads which_method.json of the directory. What matters has its name beside it, and all
other methods are grey.
"""

import json
import math
import pathlib
import sys

from matplotlib.figure import Figure

from harness import Runs
from labelled_points import (
    KNOWN,
    MESSAGE,
    OTHER,
    WARNING,
    Point,
    draw_points,
    mean_and_error,
    write_labels,
)
from training import PLAIN
from which_method import ENTRIES, relative_time

TITLE = "With wrong labels, momentum-SAM gains what SAM gains, in less time"
TITLES = {
    ("digits", 0): "digits, right labels: little to gain",
    ("digits", 40): "digits, 40 % wrong labels",
    ("mnist", 0): "MNIST, right labels: little to gain",
    ("mnist", 40): "MNIST, 40 % wrong labels",
}
NAMES = {
    "sgd": "SGD",
    "sgd_twice": "SGD, twice the steps",
    "sgd_decay": "SGD, weight decay tuned",
    "sam": "SAM",
    "msam_0.9": "momentum-SAM",
}
PALE = ("msam_0", "msam_0.5")  # hardly differ from msam_0.9
ORDER = (KNOWN, WARNING, MESSAGE, OTHER)  # whose label is nearest
TICKS = [1, 1.5, 2, 3, 5, 8]
ROOM = 0.12  # of the range that the methods span, above and below
GAIN = 0.2  # in %, by which a slower method has to be better to have its name
BROKEN = 0.7  # in %: who is this far below the worse of SGD and SAM has failed


def fastest(times: dict[str, float], means: dict[str, float]) -> set[str]:
    """The methods that are better than all faster ones."""
    best, found = -math.inf, set()
    for name in sorted(times, key=lambda name: times[name]):
        if means[name] > best + GAIN and name not in PALE:
            best = means[name]
            found.add(name)
    return found


def points_of(groups: dict[str, Runs], times: dict[str, float]) -> list[Point]:
    """A point for each method; one that failed is at the lower edge, with its mean."""
    found = {
        name: mean_and_error(group.column("test")) for name, group in groups.items()
    }
    means = {name: mean for name, (mean, _) in found.items()}
    floor = min(means["sgd"], means["sgd_twice"], means["sam"]) - BROKEN
    best = fastest(times, means)
    points = []
    for name, (mean, error) in found.items():
        if mean < floor:
            label = f"{name}: {mean:.0f} %"
            points.append(Point(times[name], floor, 0, label, WARNING, "v"))
        elif name in best or name in NAMES:
            is_sgd = ENTRIES[name].method == PLAIN
            colour = KNOWN if is_sgd or name == "sam" else MESSAGE
            label = NAMES.get(name, name)
            points.append(Point(times[name], mean, error, label, colour))
        else:
            points.append(Point(times[name], mean, error, colour=OTHER))
    return sorted(points, key=lambda point: ORDER.index(point.colour))


def draw(runs: Runs) -> tuple[Figure, list]:
    """The figure, and the labels of each panel."""
    figure = Figure((9, 7), layout="constrained")
    figure.suptitle(TITLE, fontsize=11, x=0.02, ha="left", weight="bold")
    panels = []
    for axes, (task, noise) in zip(figure.subplots(2, 2).flat, TITLES, strict=True):
        groups = runs.of(on="test", task=task, noise=noise).by("method")
        times = {name: relative_time(runs, name, task) for name in groups}
        points = points_of(groups, times)
        draw_points(axes, TITLES[task, noise], points)
        heights = [point.y for point in points]
        room = ROOM * (max(heights) - min(heights))
        axes.set_ylim(min(heights) - room, max(heights) + room)
        axes.set_xscale("log")
        axes.set_xticks(TICKS, TICKS)
        axes.set_xlim(0.6, 1.4 * max(times.values()))
        axes.minorticks_off()
        panels.append((axes, points))
    figure.supxlabel(
        "time of a training, of that of SGD (grey: all other methods)", fontsize=9
    )
    figure.supylabel("test accuracy in %, mean and standard error", fontsize=9)
    return figure, [write_labels(*panel) for panel in panels]


def main(directory: str | pathlib.Path, output: str | pathlib.Path) -> None:
    path = pathlib.Path(directory) / "which_method.json"
    runs = Runs(json.loads(path.read_text(encoding="utf-8"))["runs"])
    draw(runs)[0].savefig(output, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
