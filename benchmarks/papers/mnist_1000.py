"""SGD, SAM, Adam and others on 1,000 images of MNIST: losses and generalisation gap.

    python benchmarks/papers/mnist_1000.py --data DIRECTORY

Section 2.3.2 of Liu, Chen and Shi, "Sharpness-Aware Minimization for Efficiently
Improving Generalization: A Review": a network of widths 784, 500, 300, 10, batches of
10, and 15,000 gradients for every method, so 150 epochs of SGD and Adam, and 75 of SAM.
The review does not say its learning rates and radius. Here, each method chooses among
six settings by its loss on validation images, and then runs on new seeds. Beside them
run SGD, SAM and Adam with usual settings: learning rates 0.1 and 0.001, ρ = 0.05.

All images come from MNIST's test set, of which DIRECTORY has the files. 8,000 of them
are for the test. The other 2,000 are divided anew for each seed: 1,000 to train on, and
1,000 for validation.
"""

import itertools
import sys
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console

from evidence import Parser, carry_out, compare_pairs, describe, make_table, progress
from loaders import DataError, load_mnist_test, split
from training import MLP, PLAIN, Trainer, gradients_per_step, make_trainer

NAME = "mnist_1000"
WIDTHS, BATCH_SIZE = (500, 300, 10), 10
TRAIN, VALIDATION = 1000, 1000
TUNING_SEED = 1000  # the first of those for the choice of the settings

SGD_RATES = [0.001, 0.002, 0.003, 0.01, 0.03, 0.1]
ADAM_RATES = [1e-5, 3e-5, 5e-5, 1e-4, 3e-4, 1e-3]
RHOS = [0.05, 0.15, 0.5]


class Method(NamedTuple):
    """A method of the library on a base optimizer, and the settings to choose from."""

    name: str
    base: str
    rates: list[float]
    rhos: list[float]  # empty for the base optimizer alone

    def settings(self) -> list[dict[str, float]]:
        if not self.rhos:
            return [{"learning_rate": rate} for rate in self.rates]
        pairs = itertools.product(self.rates, self.rhos)
        return [{"learning_rate": rate, "rho": rho} for rate, rho in pairs]


def on_sgd(name: str) -> Method:
    return Method(name, "sgd", [0.003, 0.01], RHOS)


METHODS = {
    "SGD": Method(PLAIN, "sgd", SGD_RATES, []),
    "SAM": on_sgd("sam"),
    "F-SAM": on_sgd("fsam"),
    "GSAM": on_sgd("gsam"),
    "StableSAM": on_sgd("stable_sam"),
    "Adam": Method(PLAIN, "adam", ADAM_RATES, []),
    "Adam + SAM": Method("sam", "adam", [3e-5, 1e-4], RHOS),
    # What one would try first, and with SGD and SAM at one learning rate.
    "SGD, usual": Method(PLAIN, "sgd", [0.1], []),
    "SAM, usual": Method("sam", "sgd", [0.1], [0.05]),
    "Adam, usual": Method(PLAIN, "adam", [1e-3], []),
}


@cache  # settings are no part of the program
def trainer_of(name: str, base: str) -> Trainer:
    make_base = {"sgd": optax.sgd, "adam": optax.adam}[base]
    return make_trainer(MLP(WIDTHS), name, make_base, BATCH_SIZE)


def gradients_per_epoch(method: Method) -> int:
    return TRAIN // BATCH_SIZE * gradients_per_step(method.name)


def train_once(data, budget: int, name: str, setting: dict, seed: int, part: str):
    """One training of `budget` gradients, with its losses and gap on `part` of data."""
    method = METHODS[name]
    trainer = trainer_of(method.name, method.base)
    images, labels = data
    train, validation, test = split(images, labels, (TRAIN, VALIDATION), seed)
    examples = {"validation": validation, "test": test}[part]
    key = jax.random.key(seed)
    state = trainer.init(setting, key, train[0])
    epochs = budget // gradients_per_epoch(method)
    every = max(1, epochs // 10) if part == "test" else epochs
    curve = []
    for epoch in range(1, epochs + 1):
        state, _ = trainer.epoch(state, setting, key, *train)
        if epoch % every == 0 or epoch == epochs:
            train_loss, _ = trainer.evaluate(state, *train)
            loss, accuracy = trainer.evaluate(state, *examples)
            point = (train_loss, loss, loss - train_loss, accuracy)
            curve.append([epoch * gradients_per_epoch(method), *map(float, point)])
    columns = ("gradients", "train_loss", "loss", "gap", "accuracy_percent")
    curve = dict(zip(columns, zip(*curve, strict=True), strict=True))
    final = {column: values[-1] for column, values in curve.items()}
    run = {"method": name, "rho": None, **setting, "seed": seed, "on": part}
    return {**run, **final, "curve": curve}


def setting_of(run: dict) -> dict[str, float]:
    """Without a rho where there is none."""
    keys = ("learning_rate", "rho")
    return {key: run[key] for key in keys if run[key] is not None}


def mean_loss(runs: list[dict], setting: dict) -> float:
    losses = [run["loss"] for run in runs if setting_of(run) == setting]
    # Infinite where a training has diverged; nothing to compare where none was made.
    return float(np.nan_to_num(np.mean(losses), nan=np.inf)) if losses else 0.0


def run_all(args, console: Console, data) -> list[dict]:
    run = partial(train_once, data, args.gradients)
    tuning_seeds = range(TUNING_SEED, TUNING_SEED + args.tuning_seeds)
    settings = {
        name: METHODS[name].settings()[: args.settings] for name in args.methods
    }
    tried = {name: s if len(s) > 1 else [] for name, s in settings.items()}
    total = sum(map(len, tried.values())) * args.tuning_seeds
    runs = []
    with progress(console, total + len(settings) * args.seeds) as advance:
        for name in args.methods:
            tuning = []
            for setting, seed in itertools.product(tried[name], tuning_seeds):
                tuning.append(run(name, setting, seed, "validation"))
                loss = tuning[-1]["loss"]
                advance(f"{name}, {setting}: validation loss {loss:.3f}")
            best = min(settings[name], key=lambda setting: mean_loss(tuning, setting))
            runs += tuning
            for seed in range(args.seeds):
                runs.append(run(name, best, seed, "test"))
                loss = runs[-1]["loss"]
                advance(f"{name}, {best}, seed {seed}: test loss {loss:.3f}")
    return runs


def column(runs: list[dict], name: str, key: str) -> list[Any]:
    """Of the tests of a method, one per seed."""
    return [run[key] for run in runs if run["method"] == name and run["on"] == "test"]


def counterpart(name: str) -> str:
    """What a method is compared with."""
    return "SGD, usual" if name.endswith("usual") else "SGD"


def print_results(runs: list[dict], args, console: Console) -> None:
    headings = ("method", "learning rate", "rho", "train loss", "test loss")
    headings += ("lowest", "gap", "gap / SGD's", "accuracy (%)")
    table = make_table(*headings)
    for name in args.methods:
        losses, gaps = column(runs, name, "loss"), column(runs, name, "gap")
        sgd = counterpart(name)
        table.add_row(
            name,
            f"{column(runs, name, 'learning_rate')[0]:g}",
            f"{column(runs, name, 'rho')[0] or ''}",
            describe(column(runs, name, "train_loss"), 3),
            describe(losses, 3),
            f"{min(losses):.3f}",
            describe(gaps, 3),
            describe(np.divide(gaps, column(runs, sgd, "gap")), 2),
            describe(column(runs, name, "accuracy_percent"), 1),
        )
    console.print(table)
    for name in args.methods:
        sgd = counterpart(name)
        for key in ("loss", "gap", "accuracy_percent"):
            pairs = compare_pairs(column(runs, name, key), column(runs, sgd, key))
            if name != sgd:
                console.print(f"{key} of {name} less that of {sgd}: {pairs}")


def make_figure(runs: list[dict], args) -> Figure:
    figure = Figure((9, 3.2), layout="constrained")
    titles = {"train_loss": "training loss", "loss": "test loss", "gap": "gap"}
    for axes, (key, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for i, name in enumerate(args.methods):
            curves = column(runs, name, "curve")
            mean = np.mean([curve[key] for curve in curves], axis=0)
            style = "--" if name.endswith("usual") else "-"
            axes.plot(
                curves[0]["gradients"], mean, style, color=f"C{i}", label=name, lw=1.2
            )
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("gradient computations")
        axes.grid(alpha=0.3)
        if key == "train_loss":
            axes.set_yscale("log")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    quick = {"seeds": 1, "tuning_seeds": 1, "gradients": 200}
    quick |= {"settings": 2, "methods": ["SGD", "SAM"]}
    parser = Parser(__doc__, quick)
    parser.data("directory with the files of MNIST (required)")
    parser.names("methods", list(METHODS), "which to train")
    parser.count("seeds", 5, "trainings of each method, with the setting it chose")
    parser.count("tuning-seeds", 1, "trainings of each setting, for the choice")
    parser.count("settings", 6, "settings to choose from, at most")
    parser.count("gradients", 15000, "gradient computations of each training")
    args = parser.parse(argv)
    args.methods = list(dict.fromkeys([*map(counterpart, args.methods), *args.methods]))
    needed = max(gradients_per_epoch(METHODS[name]) for name in args.methods)
    if args.gradients < needed:
        parser.error(f"argument --gradients: one epoch takes {needed}")
    if args.data is None:
        parser.error("argument --data: a directory with the files of MNIST is needed")
    try:
        data = load_mnist_test(args.data)
    except DataError as error:
        parser.error(str(error))
    run = partial(run_all, data=data)
    return carry_out(NAME, args, run, print_results, make_figure)


if __name__ == "__main__":
    sys.exit(main())
