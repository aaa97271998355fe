"""Two trainings on sets that differ in one example: how far they drift apart.

    python benchmarks/papers/one_example.py

Section 5.2 and Figures 5 to 7 of Tan et al., "Stabilizing Sharpness-aware Minimization
Through A Simple Renormalization Strategy" (https://arxiv.org/abs/2401.07250): the same
network from the same start, trained with the same order of batches for 60 epochs on S,
and on S with one example replaced. Measured after each epoch are the distance of the
parameters, ‖w − w′‖ / √(‖w‖² + ‖w′‖²), and the generalisation error, test loss less
training loss. SGD without momentum; a constant learning rate (Figure 5), weight decay
(6), or a cosine decay (7).

The paper trains a network with two hidden layers of 500 on MNIST, and does not say its
learning rate, radius and batch size: here 0.1, 0.05 and 0.2, and 50. The default data
are scikit-learn's digits, with 1,000 for training; with --data, MNIST's test set, with
5,000 of its images for training.
"""

import functools
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console

from evidence import Parser, carry_out, compare_pairs, describe, make_table, progress
from loaders import DataError, load_digits, load_mnist_test, split
from training import MLP, PLAIN, make_trainer

NAME = "one_example"
WIDTHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = (500, 500, 10), 50, 0.1, 5e-4
DIGITS_TRAIN, MNIST_TRAIN = 1000, 5000
METHODS = {
    "SGD": (PLAIN, {}),
    "SAM, ρ = 0.05": ("sam", {"rho": 0.05}),
    "StableSAM, ρ = 0.05": ("stable_sam", {"rho": 0.05}),
    "SAM, ρ = 0.2": ("sam", {"rho": 0.2}),
    "StableSAM, ρ = 0.2": ("stable_sam", {"rho": 0.2}),
}
SCHEDULES = ["constant", "weight decay", "cosine"]
COLORS = {"SGD": "black", "SAM": "C1", "StableSAM": "C0"}
MEASURES = {
    "distance": "distance of the parameters",
    "generalisation_error": "test loss − training loss",
    "accuracy_gap_percent": "training − test accuracy (%)",
}


def make_base(schedule: str, steps: int):
    """The base optimizer for a learning rate."""

    def make(learning_rate):
        if schedule == "weight decay":
            decay = optax.add_decayed_weights(WEIGHT_DECAY)
            return optax.chain(decay, optax.sgd(learning_rate))
        if schedule == "cosine":
            learning_rate = optax.cosine_decay_schedule(learning_rate, steps)
        return optax.sgd(learning_rate)

    return make


def two_sets(images, labels, size: int, seed: int):
    """S, S with a random example replaced by one more, and the test images."""
    (x, y), one_more, test = split(images, labels, (size, 1), seed)
    replaced = np.random.default_rng(seed).integers(size)
    other_x, other_y = x.copy(), y.copy()
    other_x[replaced], other_y[replaced] = one_more[0][0], one_more[1][0]
    return (x, y), (other_x, other_y), test


@jax.jit
def distance(w, other):
    squares = optax.tree.norm(w, squared=True) + optax.tree.norm(other, squared=True)
    return optax.tree.norm(jax.tree.map(jnp.subtract, w, other)) / jnp.sqrt(squares)


def train_both(trainer, hyper, data, seed: int, epochs: int) -> dict[str, Any]:
    """The measures after each epoch; errors are those of the training on S."""
    first, second, test = data
    key = jax.random.key(seed)
    w = other = trainer.init(hyper, key, first[0])
    curves = {measure: [] for measure in MEASURES}
    test_accuracy = float("nan")
    for _ in range(epochs):
        w, _ = trainer.epoch(w, hyper, key, *first)
        other, _ = trainer.epoch(other, hyper, key, *second)
        loss, accuracy = trainer.evaluate(w, *first)
        test_loss, test_accuracy = trainer.evaluate(w, *test)
        measured = (test_loss - loss, accuracy - test_accuracy)
        measured = (distance(w.params, other.params), *measured)
        for curve, value in zip(curves.values(), measured, strict=True):
            curve.append(float(value))
    return {**curves, "test_accuracy_percent": float(test_accuracy)}


def run_all(args, console: Console, images, labels, size: int) -> list[dict]:
    steps = args.epochs * (size // BATCH_SIZE)

    @functools.cache  # the radius is no part of the program
    def trainer_of(schedule, method):
        base = make_base(schedule, steps)
        return make_trainer(MLP(WIDTHS), method, base, BATCH_SIZE)

    runs = []
    total = len(args.schedules) * len(args.methods) * args.seeds
    with progress(console, total) as advance:
        for schedule, name in itertools.product(args.schedules, args.methods):
            method, hyper = METHODS[name]
            hyper = {"learning_rate": LEARNING_RATE, **hyper}
            trainer = trainer_of(schedule, method)
            for seed in range(args.seeds):
                data = two_sets(images, labels, size, seed)
                measured = train_both(trainer, hyper, data, seed, args.epochs)
                run = {"schedule": schedule, "method": name, "seed": seed}
                runs.append({**run, **hyper, **measured})
                advance(
                    f"{schedule}, {name}, seed {seed}: {measured['distance'][-1]:.4f}"
                )
    return runs


def at_the_end(runs: list[dict], schedule: str, name: str, measure: str) -> list[float]:
    return [
        np.ravel(run[measure])[-1].item()
        for run in runs
        if (run["schedule"], run["method"]) == (schedule, name)
    ]


def print_results(runs: list[dict], args, console: Console) -> None:
    table = make_table(
        *("after the last epoch", "distance", "less SGD's", "test − training loss"),
        *("less SGD's", "test accuracy (%)"),
    )
    for schedule, name in itertools.product(args.schedules, args.methods):
        cells = []
        for measure in ("distance", "generalisation_error"):
            values = at_the_end(runs, schedule, name, measure)
            pairs = compare_pairs(values, at_the_end(runs, schedule, "SGD", measure))
            shown = (
                "" if name == "SGD" else f"{pairs.mean:+.4f} ± {pairs.half_width:.4f}"
            )
            cells += [describe(values, 4), shown]
        accuracy = at_the_end(runs, schedule, name, "test_accuracy_percent")
        table.add_row(f"{schedule}: {name}", *cells, describe(accuracy, 1))
    console.print(table)
    console.print("Differences: mean and 95 % interval over seeds.")
    for schedule, name in itertools.product(args.schedules, args.methods):
        sam = name.removeprefix("Stable")
        if sam != name and sam in args.methods:
            names = (name, sam)
            ends = (at_the_end(runs, schedule, n, "distance") for n in names)
            console.print(
                f"distance, {schedule}: {name} less SAM: {compare_pairs(*ends)}"
            )


def make_figure(runs: list[dict], args) -> Figure:
    """A row for each measure and a column for each schedule."""
    figure = Figure((9, 5.4), layout="constrained")
    shape = (2, len(args.schedules))
    panels = figure.subplots(*shape, sharex=True, sharey="row", squeeze=False)
    for row, measure in zip(panels, list(MEASURES)[:2], strict=True):
        for axes, schedule in zip(row, args.schedules, strict=True):
            for name in args.methods:
                curves = [
                    run[measure]
                    for run in runs
                    if (run["schedule"], run["method"]) == (schedule, name)
                ]
                mean = np.mean(curves, axis=0)
                style = ":" if "0.2" in name else "-"
                color = COLORS[name.split(",")[0]]
                axes.plot(range(1, len(mean) + 1), mean, style, color=color, label=name)
            axes.grid(alpha=0.3)
        row[0].set_ylabel(MEASURES[measure])
    for axes, schedule in zip(panels[0], args.schedules, strict=True):
        axes.set_title(schedule, fontsize="medium")
    for axes in panels[-1]:
        axes.set_xlabel("epoch")
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, fontsize="small")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    quick = {"seeds": 2, "epochs": 2, "schedules": ["constant"]}
    parser = Parser(__doc__, quick | {"methods": list(METHODS)[:2]})
    parser.data("directory with MNIST's test set (default: scikit-learn's digits)")
    parser.names("methods", list(METHODS), "what to compare with SGD, and that")
    parser.names("schedules", SCHEDULES, "of the learning rate, or with weight decay")
    parser.count("seeds", 5, "pairs of trainings of each method")
    parser.count("epochs", 60, "passes over the training images")
    args = parser.parse(argv)
    args.methods = list(dict.fromkeys(["SGD", *args.methods]))
    try:
        images, labels = load_mnist_test(args.data) if args.data else load_digits()
    except DataError as error:
        parser.error(str(error))
    size = MNIST_TRAIN if args.data else DIGITS_TRAIN
    run = functools.partial(run_all, images=images, labels=labels, size=size)
    return carry_out(NAME, args, run, print_results, make_figure)


if __name__ == "__main__":
    sys.exit(main())
