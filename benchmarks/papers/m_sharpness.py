"""m-sharpness: SAM with one perturbation for every m examples of an equal batch.

    python benchmarks/papers/m_sharpness.py

Foret et al., "Sharpness-Aware Minimization" (https://arxiv.org/abs/2010.01412), find
that accuracy grows as m falls. Here on scikit-learn's digits with right labels and with
40 % of them replaced, batches of 64, and m from the whole batch down to 2. Each m has
four radii to choose from, by the mean accuracy on 300 validation images; data and
settings are those of friendly.py.
"""

import functools
import itertools
import sys
from collections.abc import Sequence

import jax
from matplotlib.figure import Figure
from rich.console import Console

from evidence import (
    Parser,
    carry_out,
    column,
    compare_pairs,
    describe,
    make_table,
    progress,
)
from friendly import BATCH_SIZE, RATE, TRAIN, make_data
from training import MLP, decayed_sgd, make_trainer

NAME = "m_sharpness"
MS = [64, 16, 8, 4, 2]
RHOS = [0.1, 0.2, 0.4, 0.8]
NOISES = [0, 40]


@functools.cache
def trainer_of(m: int, epochs: int):
    make_base = decayed_sgd(epochs * (TRAIN // BATCH_SIZE))

    return make_trainer(MLP((256, 256, 10)), "sam", make_base, BATCH_SIZE, m=m)


def run_all(args, console: Console) -> list[dict]:
    settings = list(itertools.product(args.ms, NOISES, RHOS[: args.settings]))
    runs = []
    with progress(console, len(settings)) as advance:
        for m, noise, rho in settings:
            trainer = trainer_of(m, args.epochs)
            hyper = {"learning_rate": RATE, "rho": rho}
            for seed in range(args.seeds):
                train, validation, test = make_data(seed, noise)
                key = jax.random.key(seed)
                state = trainer.init(hyper, key, train[0])
                for _ in range(args.epochs):
                    state, _ = trainer.epoch(state, hyper, key, *train)
                found = {
                    f"{name}_percent": float(trainer.evaluate(state, *examples)[1])
                    for name, examples in (("validation", validation), ("test", test))
                }
                runs.append({"m": m, "noise": noise, "rho": rho, "seed": seed} | found)
            advance(f"m = {m}, {noise} % noise, rho {rho:g}")
    return runs


def chosen_radius(runs: list[dict], m: int, noise: float) -> float:
    def accuracy(rho):
        values = column(runs, "validation_percent", m=m, noise=noise, rho=rho)
        return sum(values) / len(values)

    return max(dict.fromkeys(column(runs, "rho", m=m, noise=noise)), key=accuracy)


def print_results(runs: list[dict], args, console: Console) -> None:
    for noise in NOISES:
        rhos = list(dict.fromkeys(column(runs, "rho", noise=noise)))
        table = make_table(f"{noise} % wrong labels, m", *(f"{r:g}" for r in rhos))
        for name in ("chosen rho", "test", f"less that of m = {args.ms[0]}"):
            table.add_column(name, justify="right", no_wrap=True)
        best = {}
        for m in args.ms:
            cells = [
                describe(column(runs, "test_percent", m=m, noise=noise, rho=rho))
                for rho in rhos
            ]
            rho = chosen_radius(runs, m, noise)
            best[m] = column(runs, "test_percent", m=m, noise=noise, rho=rho)
            pairs = str(compare_pairs(best[m], best[args.ms[0]]))
            less = "" if m == args.ms[0] else pairs
            table.add_row(str(m), *cells, f"{rho:g}", describe(best[m]), less)
        console.print(table)


def make_figure(runs: list[dict], args) -> Figure:
    figure = Figure((8, 3.2), layout="constrained")
    panels = figure.subplots(1, len(NOISES), squeeze=False)[0]
    for axes, noise in zip(panels, NOISES, strict=True):
        for rho in dict.fromkeys(column(runs, "rho", noise=noise)):
            values = [
                column(runs, "test_percent", m=m, noise=noise, rho=rho) for m in args.ms
            ]
            means = [sum(v) / len(v) for v in values]
            axes.plot(args.ms, means, "o-", label=f"ρ = {rho:g}", lw=1.2, ms=4)
        best = [
            column(
                runs,
                "test_percent",
                m=m,
                noise=noise,
                rho=chosen_radius(runs, m, noise),
            )
            for m in args.ms
        ]
        means = [sum(v) / len(v) for v in best]
        axes.plot(args.ms, means, "k--", label="ρ by validation", lw=1)
        low = min(means) - 3
        axes.set_ylim(low, max(means) + 0.5)
        axes.set_xscale("log", base=2)
        axes.set_xticks(args.ms, [str(m) for m in args.ms])
        axes.set_title(f"{noise} % wrong labels", fontsize="medium")
        axes.set_xlabel("m, examples that share a perturbation")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__, {"seeds": 2, "epochs": 1, "settings": 1, "ms": [64, 16]})
    parser.count("seeds", 5, "trainings with each setting")
    parser.count("epochs", 60, "passes over the training images")
    parser.count("settings", len(RHOS), "of the radii, the first so many")
    parser.add_argument("--ms", type=int, nargs="+", choices=MS, default=MS)
    args = parser.parse(argv)
    return carry_out(NAME, args, run_all, print_results, make_figure)


if __name__ == "__main__":
    sys.exit(main())
