"""The figure of docs/one-gradient.md: accuracy against what a training costs.

    python benchmarks/papers/one_gradient_figure.py benchmarks/results/cpu FIGURE.png

reads which_method.json and one_gradient.json of the directory. The cost is time for the
perceptrons, which were timed in turns, and else the number of gradients. Where a method
failed on some seeds with the setting it chose, the figure has its second choice. A
panel whose runs are not there is left out.
"""

import json
import pathlib
import sys

import numpy as np
from matplotlib.figure import Figure

from harness import Runs
from labelled_points import (
    KNOWN,
    MESSAGE,
    Point,
    draw_points,
    mean_and_error,
    write_labels,
)
from which_method import relative_time

TITLE = "With wrong labels, momentum-SAM gains for one gradient what SAM gains for two"
ALSO = "0.45"  # the colour of the other methods
ROWS = {  # file -> what x is, and the panels: title -> task, % of wrong labels
    "which_method": (
        "time of a training, of that of SGD",
        {
            "digits, perceptron, 40 % wrong": ("digits", 40),
            "MNIST, perceptron, 40 % wrong": ("mnist", 40),
        },
    ),
    "one_gradient": (
        "gradients of a training, of those of SGD (the machine was too busy for times)",
        {
            "MNIST, convolutions, 40 % wrong": ("mnist", 40),
            "CIFAR-10, convolutions, right labels": ("cifar", 0),
            "CIFAR-10, convolutions, 40 % wrong": ("cifar", 40),
        },
    ),
}
LEAST_RANGE = 2  # in %, so that small differences look small
COLOURS = {name: KNOWN for name in ("sgd", "base", "sgd_twice", "base_twice", "sam")}
COLOURS |= {name: MESSAGE for name in ("msam_0", "msam_0.9")}
LABELS = {
    "base": "SGD",
    "sgd": "SGD",
    "sgd_twice": "SGD, twice the steps",
    "base_twice": "SGD, twice the steps",
    "sgd_decay": "SGD, weight decay tuned",
    "base_decay": "SGD, weight decay tuned",
    "sam": "SAM",
    "msam_0": "msam, β = 0",
    "msam_0.9": "msam, β = 0.9",
    "late_sam_0.3": "SAM, last 30 %",
    "late_sam_0.5": "SAM, last 50 %",
    "sub_batch_4": "SAM, ascent of 1/16",
    "sub_batch_16th": "SAM, ascent of 1/16",
    "fsam": "F-SAM",
}


def steady(runs: Runs) -> Runs:
    """The tests, of a second choice where the first one failed on some seeds."""
    tests, second = (runs.of(on=on) for on in ("test", "second choice"))
    failed = second.values("method")
    return Runs([run for run in tests if run["method"] not in failed] + second)


def points_of(runs: Runs, file: str, task: str, noise: int) -> list[Point]:
    found = []
    for name, group in steady(runs.of(task=task, noise=noise)).by("method").items():
        if name in LABELS:
            x = np.mean(group.column("gradients"))
            if file == "which_method":
                x = relative_time(runs, name, task)
            y = mean_and_error(group.column("test"))
            found.append(Point(x, *y, LABELS[name], COLOURS.get(name, ALSO)))
    # What the figure is about has its label nearest.
    return sorted(found, key=lambda point: (MESSAGE, KNOWN, ALSO).index(point.colour))


def draw(directory: str | pathlib.Path) -> tuple[Figure, list]:
    """The figure, and the labels of each panel."""
    figure = Figure((9, 6.8), layout="constrained")
    figure.suptitle(TITLE, fontsize=11, x=0.02, ha="left", weight="bold")
    figure.supylabel("test accuracy in %, mean and standard error", fontsize=9)
    rows, panels = figure.subfigures(len(ROWS), 1), []
    for row, (file, (label, titles)) in zip(rows, ROWS.items(), strict=True):
        text = (pathlib.Path(directory) / f"{file}.json").read_text(encoding="utf-8")
        runs = Runs(json.loads(text)["runs"])
        found = {title: points_of(runs, file, *case) for title, case in titles.items()}
        found = {title: points for title, points in found.items() if points}
        places = row.subplots(1, len(found), squeeze=False).flat
        for axes, (title, points) in zip(places, found.items(), strict=True):
            draw_points(axes, title, points)
            axes.set_xlim(0.6, 2.7)
            axes.set_xticks([1, 1.5, 2])
            low, high = (edge(point.y for point in points) for edge in (min, max))
            middle, half = (low + high) / 2, 0.75 * max(high - low, LEAST_RANGE)
            axes.set_ylim(middle - half, middle + half)
            panels.append((axes, points))
        row.supxlabel(label, fontsize=9)
    return figure, [write_labels(*panel) for panel in panels]


def main(directory: str | pathlib.Path, output: str | pathlib.Path) -> None:
    draw(directory)[0].savefig(output, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
