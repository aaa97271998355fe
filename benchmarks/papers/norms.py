"""The gradient at w and that at w + ε along a training with SAM: norms and alignment.

    python benchmarks/papers/norms.py

Figures 1 and 3 of Tan et al., "Stabilizing Sharpness-aware Minimization Through A
Simple Renormalization Strategy" (https://arxiv.org/abs/2401.07250), with its radii
0.01, 0.05 and 0.2: the ratio ‖g‖/‖gᵃ‖, and whether ⟨gᵃ, g⟩ is larger than ‖g‖². The
paper trains a ResNet-18 on CIFAR-100 for 200 epochs; here it is a multilayer perceptron
and a small LeNet on scikit-learn's digits, with the paper's other settings but the
smoothing of labels: batches of 128, momentum 0.9, weight decay 5e-4, learning rate 0.1
with a cosine decay.
"""

import itertools
import math
import sys
from collections.abc import Sequence

import jax
import numpy as np
from flax import linen as nn
from matplotlib.figure import Figure
from rich.console import Console

from evidence import Parser, carry_out, describe, make_table, of, progress
from loaders import load_digits, split
from training import MLP, decayed_sgd, make_trainer

NAME = "norms"
RHOS = [0.01, 0.05, 0.2]
TRAIN, BATCH_SIZE, LEARNING_RATE = 1000, 128, 0.1
# Which epochs a mean is over, as shares of all.
STAGES = {"first tenth": (0, 0.1), "middle": (0.45, 0.55), "last tenth": (0.9, 1)}
TITLES = {
    "ratio": "‖g‖ / ‖gᵃ‖",
    "product_over_square": "⟨gᵃ, g⟩ / ‖g‖²",
    "larger_percent": "steps with ⟨gᵃ, g⟩ > ‖g‖² (%)",
}


class LeNet(nn.Module):
    """Two convolutions and three dense layers, for small square images as rows."""

    @nn.compact
    def __call__(self, x):
        side = math.isqrt(x.shape[-1])
        x = x.reshape(-1, side, side, 1)
        for features in (6, 16):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return MLP((120, 84, 10))(x.reshape(len(x), -1))


NETWORKS = {"MLP": MLP((256, 256, 10)), "LeNet": LeNet()}


def run_all(args, console: Console) -> list[dict]:
    steps = args.epochs * (TRAIN // BATCH_SIZE)
    base = decayed_sgd(steps)
    trainers = {
        name: make_trainer(NETWORKS[name], "sam", base, BATCH_SIZE)
        for name in args.networks
    }
    cases = list(itertools.product(trainers, RHOS, range(args.seeds)))
    runs = []
    with progress(console, len(cases)) as advance:
        for name, rho, seed in cases:
            trainer = trainers[name]
            train, test = split(*load_digits(), (TRAIN,), seed)
            key, hyper = jax.random.key(seed), {"learning_rate": LEARNING_RATE}
            hyper["rho"] = rho
            state = trainer.init(hyper, key, train[0])
            reports = []
            for _ in range(args.epochs):
                state, (_, report) = trainer.epoch(state, hyper, key, *train)
                reports.append(report)
            accuracy = float(trainer.evaluate(state, *test)[1])
            run = {"network": name, "rho": rho, "seed": seed}
            runs.append(run | {"accuracy_percent": accuracy} | summarize(reports))
            advance(f"{name}, ρ = {rho:g}, seed {seed}: test accuracy {accuracy:.1f} %")
    return runs


def summarize(reports: list) -> dict[str, list[float]]:
    """Means over each epoch, of the steps of a batch each."""
    g, ga, cosine = (
        np.array([getattr(report, field) for report in reports])
        for field in ("ascent_norm", "descent_norm", "cosine")
    )
    product = cosine * ga * g
    columns = {
        "ratio": g / ga,
        "product_over_square": product / g**2,  # ⟨gᵃ, g⟩ / ‖g‖²
        "larger_percent": 100 * (product > g**2),
        "norm": g,
    }
    return {key: values.mean(axis=1).tolist() for key, values in columns.items()}


def stage(run: dict, key: str, part: tuple[float, float]) -> float:
    start, end = (round(share * len(run[key])) for share in part)
    return float(np.mean(run[key][start : max(end, start + 1)]))


def print_results(runs: list[dict], args, console: Console) -> None:
    table = make_table("network", "rho", "", *STAGES)
    pairs = [(name, rho) for name in args.networks for rho in RHOS]
    for (name, rho), key in itertools.product(pairs, TITLES):
        digits = 1 if key == "larger_percent" else 3
        cells = (
            describe(
                [stage(run, key, part) for run in of(runs, network=name, rho=rho)],
                digits,
            )
            for part in STAGES.values()
        )
        table.add_row(name, f"{rho:g}", TITLES[key], *cells)
    console.print(table)
    for name, rho in pairs:
        accuracies = [
            run["accuracy_percent"] for run in of(runs, network=name, rho=rho)
        ]
        console.print(f"{name}, ρ = {rho:g}: test accuracy {describe(accuracies)} %")


def make_figure(runs: list[dict], args) -> Figure:
    figure = Figure((8, 0.4 + 2.8 * len(args.networks)), layout="constrained")
    panels = figure.subplots(len(args.networks), 2, squeeze=False)
    shown = list(TITLES)[:2]  # the third is 100 % almost everywhere
    cases = itertools.product(args.networks, shown)
    for axes, (name, key) in zip(panels.flat, cases, strict=True):
        for rho in RHOS:
            curves = np.array([run[key] for run in of(runs, network=name, rho=rho)])
            epochs = range(1, curves.shape[1] + 1)
            axes.plot(epochs, curves.mean(axis=0), label=f"ρ = {rho:g}", lw=1.2)
            low, high = curves.min(axis=0), curves.max(axis=0)
            axes.fill_between(epochs, low, high, alpha=0.2, lw=0)
        axes.set_title(f"{name}: {TITLES[key]}", fontsize="medium")
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.set_yscale("log")
        axes.set_ylim(*((0.05, 2) if key == "ratio" else (0.5, 20)))
        axes.yaxis.set_major_formatter("{x:g}")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__, {"seeds": 2, "epochs": 5, "networks": ["MLP"]})
    parser.count("seeds", 5, "trainings with each radius")
    parser.count("epochs", 200, "passes over the training images")
    parser.names("networks", list(NETWORKS), "to train")
    args = parser.parse(argv)
    return carry_out(NAME, args, run_all, print_results, make_figure)


if __name__ == "__main__":
    sys.exit(main())
