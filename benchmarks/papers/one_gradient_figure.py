"""The figure of docs/one-gradient.md: accuracy against gradients a step.

    python benchmarks/papers/one_gradient_figure.py benchmarks/results/cpu FIGURE.png

reads which_method.json and one_gradient.json of the directory. Where a method failed on
some seeds with the setting it chose, the figure has its second choice.
"""

import json
import pathlib
import sys

import numpy as np
from matplotlib.figure import Figure

from harness import Runs

TITLE = "With wrong labels, momentum-SAM gains for one gradient what SAM gains for two"
MESSAGE, KNOWN, OTHER = "tab:blue", "black", "0.6"  # colours
PANELS = {  # title -> file, task, % of wrong labels
    "digits, perceptron, 40 % wrong": ("which_method", "digits", 40),
    "MNIST, perceptron, 40 % wrong": ("which_method", "mnist", 40),
    "MNIST, convolutions, 40 % wrong": ("one_gradient", "mnist", 40),
    "CIFAR-10, convolutions, right labels: no gain": ("one_gradient", "cifar", 0),
}
LEAST_RANGE = 2  # in %, so that small differences look small
LEFT_OUT = ("msam_0.5",)  # between the two others
COLOURS = {name: KNOWN for name in ("sgd", "base", "sgd_twice", "sam")}
COLOURS |= {name: MESSAGE for name in ("msam_0", "msam_0.9")}
LABELS = {
    "base": "SGD",
    "sgd": "SGD",
    "sgd_twice": "SGD, twice the steps",
    "sgd_decay": "SGD, weight decay tuned",
    "base_decay": "SGD, weight decay tuned",
    "sam": "SAM",
    "msam_0": "msam, β = 0",
    "msam_0.9": "msam, β = 0.9",
    "late_sam_0.3": "SAM, last 30 %",
    "late_sam_0.5": "SAM, last 50 %",
    "sub_batch_4": "SAM, ascent of 1/16",
    "fsam": "F-SAM",
}


def steady(runs: Runs) -> Runs:
    """The tests, of a second choice where the first one failed on some seeds."""
    tests, second = (runs.of(on=on) for on in ("test", "second choice"))
    failed = second.values("method")
    return Runs([run for run in tests if run["method"] not in failed] + second)


def draw(axes, title: str, runs: Runs) -> None:
    """Mean and standard error of each method, with its name beside it."""
    points = []
    for name, group in runs.by("method").items():
        if name in LEFT_OUT:
            continue
        accuracy = group.column("test")
        error = np.std(accuracy, ddof=1) / len(accuracy) ** 0.5
        x, y = np.mean(group.column("gradients")), np.mean(accuracy)
        colour = COLOURS.get(name, OTHER)
        axes.errorbar(x, y, error, color=colour, marker="o", ms=4, lw=1)
        points.append((x, y, LABELS.get(name, name), colour))
    low, high = (edge(y for _, y, *_ in points) for edge in (min, max))
    middle, half = (low + high) / 2, 0.7 * max(high - low, LEAST_RANGE)
    axes.set_ylim(middle - half, middle + half)
    place_labels(axes, points, least=0.13 * half)
    axes.set_xlim(0.45, 2.75)
    axes.set_xticks([1, 1.5, 2])
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def place_labels(axes, points: list[tuple], least: float) -> None:
    """Beside each point; a label that would cover another one is moved up."""
    placed: list[tuple[float, bool, float]] = []
    for x, y, label, colour in sorted(points, key=lambda point: point[1]):
        is_left = colour == MESSAGE
        near = [b for a, left, b in placed if left == is_left and abs(a - x) < 0.45]
        height = max([y, *(b + least for b in near)])
        placed.append((x, is_left, height))
        axes.annotate(
            label,
            (x, y),
            (x - 0.06 if is_left else x + 0.06, height),
            color=colour,
            fontsize=7,
            ha="right" if is_left else "left",
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.85", "lw": 0.5, "shrinkB": 2},
        )


def main(directory: str | pathlib.Path, output: str | pathlib.Path) -> None:
    figure = Figure((9, 6.4), layout="constrained")
    figure.suptitle(TITLE, fontsize=11, x=0.02, ha="left", weight="bold")
    axes = figure.subplots(2, 2).flat
    for place, (title, (file, task, noise)) in zip(axes, PANELS.items(), strict=True):
        path = pathlib.Path(directory) / f"{file}.json"
        runs = Runs(json.loads(path.read_text(encoding="utf-8"))["runs"])
        draw(place, title, steady(runs.of(task=task, noise=noise)))
    figure.supxlabel("gradients, of those of SGD", fontsize=9)
    figure.supylabel("test accuracy in %, mean and standard error", fontsize=9)
    figure.savefig(output, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
