"""GSAM and min(f_p + λh): accuracy, surrogate gap and curvature as α, λ and ρ vary.

    python benchmarks/papers/gsam.py

Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training"
(https://arxiv.org/abs/2203.08065), with a ViT on ImageNet:

  Figure 4: accuracy, the gap, and the largest eigenvalue, as α and ρ vary; and whether
            2h/ρ² stands for that eigenvalue.
  Figure 8: the cosine of the angle between the two gradients along a training.
  Figure 9: the gap along a training, as α varies.
  Table 2:  GSAM against min(f_p + λh), the gap as a penalty: d = gᵃ + λ(gᵃ − g).

Here a multilayer perceptron on scikit-learn's digits, with right labels and with 40 %
of them replaced, the data and settings of friendly.py. α and λ have the same values to
choose from, by the accuracy on validation images.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console

from evidence import (
    Parser,
    carry_out,
    column,
    compare_pairs,
    describe,
    make_table,
    of,
    progress,
)
from friendly import BATCH_SIZE, RATE, TRAIN, make_data
from sam_optax import sharpness
from training import MLP, decayed_sgd, make_trainer

NAME = "gsam"
RHOS = [0.1, 0.2, 0.4]
WEIGHTS = [0.1, 0.2, 0.4, 0.8]  # of the gap; the paper searches α and λ on one grid
KEYS = {"gsam": "alpha", "sam_plus_gap": "lam"}  # what a method calls its weight
SYMBOLS = {"gsam": "α", "sam_plus_gap": "λ"}
NOISES = [0, 40]
SHOWN_RHO = 0.2  # in the panel of curves
MODEL = MLP((256, 256, 10))


def loss_fn(params, x, y):
    logits: Any = MODEL.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@functools.cache
def trainer_of(method: str, epochs: int):
    make_base = decayed_sgd(epochs * (TRAIN // BATCH_SIZE))

    return make_trainer(MODEL, method, make_base, BATCH_SIZE)


def settings(args) -> list[tuple[str, float, float]]:
    """(method, ρ, weight); SAM is GSAM of weight 0."""
    return [
        (method, rho, weight)
        for rho in RHOS[: args.settings]
        for method in KEYS
        for weight in ([0.0] if method == "gsam" else []) + WEIGHTS[: args.weights]
    ]


@jax.jit  # compiled once; else with every call, as each makes its own functions
def measure(params, train, rho) -> dict[str, jax.Array]:
    """On the training images, with the radius of the training."""
    gap = sharpness.surrogate_gap(loss_fn, params, train, rho=rho)
    worst = sharpness.worst_case(loss_fn, params, train, rho=rho)
    pairs = sharpness.eigenpairs(sharpness.hessian(loss_fn, params, train))
    return {
        "gap": gap.sharpness,
        "eigenvalue": pairs.values[0],
        "estimate": sharpness.eigenvalue_from_gap(gap.sharpness, rho),
        "worst_estimate": sharpness.eigenvalue_from_gap(worst.sharpness, rho),
    }


def train(method: str, rho: float, weight: float, noise: float, seed: int, epochs: int):
    trainer = trainer_of(method, epochs)
    hyper = {"learning_rate": RATE, "rho": rho, KEYS[method]: weight}
    data, *parts = make_data(seed, noise)
    key = jax.random.key(seed)
    state = trainer.init(hyper, key, data[0])
    reports = []
    for _ in range(epochs):
        state, (_, report) = trainer.epoch(state, hyper, key, *data)
        reports.append(report)
    run = {"method": method, "noise": noise, "seed": seed, "rho": rho, "weight": weight}
    for name, part in zip(("validation", "test"), parts, strict=True):
        run[f"{name}_percent"] = float(trainer.evaluate(state, *part)[1])
    run["cosine"] = [float(report.cosine.mean()) for report in reports]
    run["gaps"] = [float(report.surrogate_gap.mean()) for report in reports]
    measured = measure(state.params, data, rho)
    return run | {name: float(value) for name, value in measured.items()}


def run_all(args, console: Console) -> list[dict]:
    cases = [(noise, *setting) for noise in NOISES for setting in settings(args)]
    runs = []
    with progress(console, len(cases)) as advance:
        for noise, method, rho, weight in cases:
            for seed in range(args.seeds):
                runs.append(train(method, rho, weight, noise, seed, args.epochs))
            advance(
                f"{noise} % noise, {method}, ρ {rho:g}, {SYMBOLS[method]} {weight:g}"
            )
    return runs


def values(runs: list[dict], key: str) -> list[Any]:
    """Those that there are, in their order."""
    return list(dict.fromkeys(column(runs, key)))


def best(runs: list[dict]) -> list[dict]:
    """The runs with the setting of the best mean accuracy in validation."""
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        groups.setdefault((run["rho"], run["weight"]), []).append(run)
    return max(groups.values(), key=lambda g: np.mean(column(g, "validation_percent")))


def chosen(runs: list[dict], noise: float) -> dict[str, list[dict]]:
    """Name -> the runs with the setting that it chose."""
    mine = of(runs, noise=noise)
    weighted = [run for run in mine if run["weight"]]
    return {
        "SAM": best(of(mine, weight=0)),
        "GSAM": best(of(weighted, method="gsam")),
        "min(f_p + λh)": best(of(weighted, method="sam_plus_gap")),
    }


def print_results(runs: list[dict], args, console: Console) -> None:
    for noise in NOISES:
        table = make_table(
            f"{noise} % wrong, rho",
            *("weight", "test", "less SAM's", "less GSAM's", "gap", "eigenvalue"),
            *("2h/rho²", "of the worst", "cos, first", "last", "h, first", "last"),
        )
        for method, rho, weight in settings(args):
            mine = of(runs, noise=noise, method=method, rho=rho, weight=weight)
            same = of(runs, noise=noise, method="gsam", rho=rho)
            table.add_row(
                *(f"{rho:g}", f"{SYMBOLS[method]} = {weight:g}" if weight else "SAM"),
                describe(column(mine, "test_percent")),
                less(mine, of(same, weight=0)),
                less(mine, of(same, weight=weight)),
                describe(column(mine, "gap"), 4),
                describe(column(mine, "eigenvalue"), 2),
                describe(column(mine, "estimate"), 2),
                describe(column(mine, "worst_estimate"), 2),
                # Means over the first and the last epoch, of the batches.
                *(
                    describe([run[key][i] for run in mine], digits)
                    for key, digits in (("cosine", 2), ("gaps", 3))
                    for i in (0, -1)
                ),
            )
        console.print(table)
        console.print(choice_table(runs, noise))


def less(runs: list[dict], others: list[dict]) -> str:
    """Test accuracy less that of others, on the same seeds."""
    if runs == others:
        return ""
    pairs = compare_pairs(*(column(r, "test_percent") for r in (runs, others)))
    return f"{pairs.mean:+.1f} ± {pairs.half_width:.1f}"


def choice_table(runs: list[dict], noise: float):
    heading = f"{noise} % wrong labels, by validation"
    numbers = ("test", "less SAM's", "less GSAM's", "gap", "eigenvalue")
    table = make_table(heading, "rho", "weight", *numbers)
    groups = chosen(runs, noise)
    for name, mine in groups.items():
        table.add_row(
            *(name, f"{mine[0]['rho']:g}", f"{mine[0]['weight']:g}"),
            describe(column(mine, "test_percent")),
            *(less(mine, groups[other]) for other in ("SAM", "GSAM")),
            describe(column(mine, "gap"), 4),
            describe(column(mine, "eigenvalue"), 2),
        )
    return table


def make_figure(runs: list[dict], args) -> Figure:
    """A row for each share of wrong labels; bars are standard deviations."""
    figure = Figure((12, 5.6), layout="constrained")
    panels = figure.subplots(len(NOISES), 5)
    for row, noise in zip(panels, NOISES, strict=True):
        mine = of(runs, noise=noise)
        for i, rho in enumerate(values(mine, "rho")):
            draw_weights(row[:3], of(mine, rho=rho), f"C{i}")
        low = min(p for p in column(mine, "test_percent") if p > 50 or args.quick)
        row[0].set_ylim(low - 0.5, max(column(mine, "test_percent")) + 0.5)
        draw_estimates(row[3], mine)
        draw_gaps(row[4], mine)
        for axes, name in ((row[2], "y"), (row[3], "x"), (row[3], "y")):
            make_logarithmic(axes, name)
        row[0].set_ylabel(f"{noise} % wrong labels")
        for axes in row:
            axes.grid(alpha=0.3)
    for axes, place in ((panels[0, 0], "left"), (panels[0, 4], "right")):
        options: Any = {"loc": f"outside lower {place}", "fontsize": "small"}
        figure.legend(*axes.get_legend_handles_labels(), ncols=3, **options)
    return figure


def draw_weights(row, runs: list[dict], color: str) -> None:
    titles = {"test_percent": "test accuracy (%)", "gap": "surrogate gap h"}
    titles |= {"eigenvalue": "largest eigenvalue"}
    weights = values(runs, "weight")
    for axes, (key, title) in zip(row, titles.items(), strict=True):
        for method, style in zip(KEYS, ("o-", "s:"), strict=True):
            mine = [
                # Both curves begin at SAM.
                of(runs, weight=weight, method=method if weight else "gsam")
                for weight in weights
            ]
            means = [np.mean(column(m, key)) for m in mine]
            spreads = [np.std(column(m, key)) for m in mine]
            label = f"{SYMBOLS[method]}, ρ = {runs[0]['rho']:g}"
            options = {"fmt": style, "ms": 3, "lw": 1.1, "capsize": 2, "label": label}
            axes.errorbar(weights, means, spreads, color=color, **options)
        axes.set_xlabel("α or λ")
        axes.set_title(title, fontsize="medium")


def draw_estimates(axes, runs: list[dict]) -> None:
    for i, rho in enumerate(values(runs, "rho")):
        mine = of(runs, rho=rho)
        columns = (column(mine, "eigenvalue"), column(mine, "estimate"))
        axes.plot(*columns, "o", ms=3, alpha=0.6, color=f"C{i}")
    # Below zero is the gap of some trainings that have failed.
    positive = [run for run in runs if run["estimate"] > 0]
    ends = [min(column(positive, "eigenvalue")), max(column(positive, "estimate"))]
    axes.plot(ends, ends, "k:", lw=1)
    axes.set_xlabel("largest eigenvalue")
    axes.set_title("2h/ρ² against it", fontsize="medium")


def make_logarithmic(axes, name: str) -> None:
    """With plain numbers at the ticks."""
    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def draw_gaps(axes, runs: list[dict]) -> None:
    rho = SHOWN_RHO if SHOWN_RHO in values(runs, "rho") else runs[0]["rho"]
    weights = values(runs, "weight")[1:]
    shown = [(m, weight) for m in KEYS for weight in weights[1::2] or weights]
    for i, (method, weight) in enumerate([("gsam", 0.0), *shown]):
        curves = column(of(runs, rho=rho, method=method, weight=weight), "gaps")
        label = f"{SYMBOLS[method]} = {weight:g}" if weight else "SAM"
        style = "-" if method == "gsam" else ":"
        epochs = range(1, len(curves[0]) + 1)
        axes.plot(
            epochs, np.mean(curves, axis=0), style, color=f"C{i + 3}", label=label
        )
    axes.set_xlabel("epoch")
    axes.set_title(f"h along training, ρ = {rho:g}", fontsize="medium")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__, {"seeds": 2, "epochs": 2, "settings": 1, "weights": 1})
    parser.count("seeds", 5, "trainings with each setting")
    parser.count("epochs", 60, "passes over the training images")
    parser.count("settings", len(RHOS), "of the radii, the first so many")
    parser.count("weights", len(WEIGHTS), "of those of the gap, the first so many")
    args = parser.parse(argv)
    return carry_out(NAME, args, run_all, print_results, make_figure)


if __name__ == "__main__":
    sys.exit(main())
