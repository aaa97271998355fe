"""GSAM: accuracy, surrogate gap and curvature as its α and ρ vary.

    python benchmarks/papers/gsam.py

Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training"
(https://arxiv.org/abs/2203.08065), with a ViT on ImageNet:

  Figure 4: accuracy, the gap, and the largest eigenvalue, as α and ρ vary; and whether
            2h/ρ² stands for that eigenvalue.
  Figure 8: the cosine of the angle between the two gradients along a training.
  Table 2:  GSAM against min(f_p + λh), the gap as a penalty.

Here a multilayer perceptron on scikit-learn's digits, with right labels and with 40 %
of them replaced, the data and settings of friendly.py.
"""

import functools
import sys
from collections.abc import Sequence

import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console

from evidence import (
    Parser,
    carry_out,
    compare_pairs,
    describe,
    make_table,
    progress,
)
from friendly import BATCH_SIZE, RATE, TRAIN, make_data
from sam_optax import sharpness
from training import MLP, decayed_sgd, make_trainer

NAME = "gsam"
RHOS = [0.1, 0.2, 0.4]
ALPHAS = [0.0, 0.1, 0.2, 0.4]  # 0 is SAM
PENALTIES = [0.1, 0.2, 0.4]
NOISES = [0, 40]
MODEL = MLP((256, 256, 10))


def loss_fn(params, x, y):
    logits = MODEL.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@functools.cache
def trainer_of(method: str, epochs: int):
    make_base = decayed_sgd(epochs * (TRAIN // BATCH_SIZE))

    return make_trainer(MODEL, method, make_base, BATCH_SIZE)


def settings(args) -> list[tuple[str, dict[str, float]]]:
    radii = RHOS[: args.settings]
    gsam = [("gsam", {"alpha": a, "rho": r}) for r in radii for a in ALPHAS]
    penalties = PENALTIES[: args.settings]
    return gsam + [
        ("sam_plus_gap", {"lam": p, "rho": r}) for r in radii for p in penalties
    ]


def measure(params, train, rho: float) -> dict[str, float]:
    """On the training images, with the radius of the training."""
    gap = sharpness.surrogate_gap(loss_fn, params, train, rho=rho)
    worst = sharpness.worst_case(loss_fn, params, train, rho=rho)
    pairs = sharpness.eigenpairs(sharpness.hessian(loss_fn, params, train))
    numbers = {
        "gap": gap.sharpness,
        "eigenvalue": pairs.values[0],
        "estimate": sharpness.eigenvalue_from_gap(gap.sharpness, rho),
        "worst_estimate": sharpness.eigenvalue_from_gap(worst.sharpness, rho),
    }
    return {name: float(value) for name, value in numbers.items()}


def run_all(args, console: Console) -> list[dict]:
    runs = []
    chosen = settings(args)
    with progress(console, len(NOISES) * len(chosen)) as advance:
        for noise in NOISES:
            for method, hyper in chosen:
                trainer = trainer_of(method, args.epochs)
                hyper_all = {"learning_rate": RATE, **hyper}
                for seed in range(args.seeds):
                    train, validation, test = make_data(seed, noise)
                    key = jax.random.key(seed)
                    state = trainer.init(hyper_all, key, train[0])
                    cosines = []
                    for _ in range(args.epochs):
                        state, (_, report) = trainer.epoch(
                            state, hyper_all, key, *train
                        )
                        cosines.append(float(report.cosine.mean()))
                    runs.append(
                        {"method": method, "noise": noise, "seed": seed, **hyper}
                        | measure(state.params, train, hyper["rho"])
                        | {"cosine": cosines}
                        | {
                            f"{name}_percent": float(trainer.evaluate(state, *part)[1])
                            for name, part in (
                                ("validation", validation),
                                ("test", test),
                            )
                        }
                    )
                advance(f"{noise} % noise, {method} {hyper}")
    return runs


def of(runs: list[dict], **wanted) -> list[dict]:
    return [run for run in runs if all(run.get(k) == v for k, v in wanted.items())]


def column(runs: list[dict], key: str) -> list[float]:
    return [run[key] for run in runs]


def best(
    runs: list[dict], method: str, noise: float, keys: tuple[str, ...]
) -> list[dict]:
    """The runs with the setting of the best mean accuracy in validation."""
    groups: dict[tuple, list[dict]] = {}
    for run in of(runs, method=method, noise=noise):
        groups.setdefault(tuple(run[key] for key in keys), []).append(run)
    return max(groups.values(), key=lambda g: np.mean(column(g, "validation_percent")))


def print_results(runs: list[dict], args, console: Console) -> None:
    for noise in NOISES:
        table = make_table(
            f"{noise} % wrong labels, rho",
            *("alpha", "test", "gap", "largest eigenvalue", "2h/rho²", "of the worst"),
            *("cosine, first", "last epoch"),
        )
        for rho in dict.fromkeys(column(runs, "rho")):
            for alpha in ALPHAS:
                mine = of(runs, method="gsam", noise=noise, rho=rho, alpha=alpha)
                table.add_row(
                    *(f"{rho:g}", f"{alpha:g}"),
                    describe(column(mine, "test_percent")),
                    describe(column(mine, "gap"), 4),
                    describe(column(mine, "eigenvalue"), 2),
                    describe(column(mine, "estimate"), 2),
                    describe(column(mine, "worst_estimate"), 2),
                    describe([run["cosine"][0] for run in mine], 2),
                    describe([run["cosine"][-1] for run in mine], 2),
                )
        console.print(table)
        table = make_table(f"{noise} % wrong labels, by validation", "setting", "test")
        table.add_column("less SAM's", justify="right", no_wrap=True)
        sam = best(of(runs, alpha=0.0), "gsam", noise, ("rho",))
        gsam = best(
            [run for run in runs if run.get("alpha")], "gsam", noise, ("rho", "alpha")
        )
        penalty = best(runs, "sam_plus_gap", noise, ("rho", "lam"))
        for name, mine in (("SAM", sam), ("GSAM", gsam), ("min(f_p + λh)", penalty)):
            keys = ("rho", "alpha", "lam")
            setting = ", ".join(f"{k} {mine[0][k]:g}" for k in keys if k in mine[0])
            test = column(mine, "test_percent")
            pairs = str(compare_pairs(test, column(sam, "test_percent")))
            table.add_row(name, setting, describe(test), "" if mine is sam else pairs)
        console.print(table)


def make_figure(runs: list[dict], args) -> Figure:
    figure = Figure((11, 5.6), layout="constrained")
    panels = figure.subplots(len(NOISES), 4)
    titles = {"test_percent": "test accuracy (%)", "gap": "surrogate gap h"}
    titles |= {"eigenvalue": "largest eigenvalue"}
    for row, noise in zip(panels, NOISES, strict=True):
        for rho in dict.fromkeys(column(runs, "rho")):
            mine = [
                of(runs, method="gsam", noise=noise, rho=rho, alpha=a) for a in ALPHAS
            ]
            for axes, (key, title) in zip(row, titles.items(), strict=False):
                means = [np.mean(column(m, key)) for m in mine]
                spreads = [np.std(column(m, key)) for m in mine]
                axes.errorbar(
                    ALPHAS,
                    means,
                    spreads,
                    marker="o",
                    ms=4,
                    lw=1.2,
                    capsize=2,
                    label=f"ρ = {rho:g}",
                )
                axes.set_xlabel("α")
                axes.set_title(title, fontsize="medium")
                axes.grid(alpha=0.3)
            flat = [run for m in mine for run in m]
            row[3].plot(
                column(flat, "eigenvalue"),
                column(flat, "estimate"),
                "o",
                ms=3,
                alpha=0.6,
            )
        everything = of(runs, method="gsam", noise=noise)
        ends = [
            min(column(everything, "eigenvalue")),
            max(column(everything, "estimate")),
        ]
        row[3].plot(ends, ends, "k:", lw=1)
        row[3].set_xscale("log")
        row[3].set_yscale("log")
        row[3].set_xlabel("largest eigenvalue")
        row[3].set_title("2h/ρ² against it", fontsize="medium")
        row[0].set_ylabel(f"{noise} % wrong labels")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__, {"seeds": 2, "epochs": 2, "settings": 1})
    parser.count("seeds", 5, "trainings with each setting")
    parser.count("epochs", 60, "passes over the training images")
    parser.count("settings", len(RHOS), "of the radii and penalties, the first so many")
    args = parser.parse(argv)
    return carry_out(NAME, args, run_all, print_results, make_figure)


if __name__ == "__main__":
    sys.exit(main())
