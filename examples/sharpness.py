"""Measures how flat the minima are that SGD and sharpness-aware methods find.

    python examples/sharpness.py --quick

trains the network of digits.py with each method, and measures each solution on its
training images: SAM's one-step surrogate gap, the worst and the average case around the
parameters, the largest eigenvalues of the Hessian, its trace and the density of its
spectrum, and the loss along lines and over a plane. Prints a table, and writes
sharpness.json, sharpness.png and surfaces.png.
"""

import argparse
import json
import pathlib
import sys
from typing import Any, NamedTuple

import digits  # beside this file
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax.training.train_state import TrainState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from sam_optax import sharpness

matplotlib.use("Agg")  # files, no windows

import matplotlib.pyplot as plt

from sam_optax import plot

# Each method trains with the radius that benchmarks/digits.py has for it.
TRAINED_WITH = {
    "sgd": None,
    "sam": 0.5,
    "asam": 4.0,
    "fsam": 0.6,
    "gsam": 0.3,
    "stable_sam": 0.5,
}
RHO = 0.05  # of the measures
SLICE, PLANE = 81, 25  # points along a line, and along each side of a plane
QUICK = {"seeds": 1, "epochs": 20}


class Solution(NamedTuple):
    """One trained network, and what was measured on it."""

    params: Any
    numbers: dict[str, float]
    density: sharpness.SpectralDensity
    filters: sharpness.Line  # along a filter-normalised direction
    top: sharpness.Line  # along the top eigenvector


def train(
    method: str, seed: int, loss_fn, data, args: argparse.Namespace
) -> TrainState:
    rho = TRAINED_WITH[method]
    prepared = digits.make_method(method, rho, args.epochs, loss_fn)
    model = digits.MLP(tuple(args.hidden))
    return digits.make_trainer(model, *prepared, args.epochs, 64)(seed, data)


def measure(loss_fn, params: Any, examples, accuracy: float) -> Solution:
    H = sharpness.hessian(loss_fn, params, examples)
    gap = sharpness.surrogate_gap(loss_fn, params, examples, rho=RHO)
    worst = sharpness.worst_case(loss_fn, params, examples, rho=RHO)
    far = sharpness.worst_case(loss_fn, params, examples, rho=10 * RHO)
    average = sharpness.average_case(loss_fn, params, examples, rho=RHO / 5, samples=50)
    pairs = sharpness.eigenpairs(H, 5)
    trace = sharpness.trace(H, num_samples=50)
    numbers = {
        "test accuracy, %": accuracy,
        "loss": gap.loss,
        "gradient norm": sharpness.gradient_norm(loss_fn, params, examples),
        "surrogate gap": gap.sharpness,
        "worst case": worst.sharpness,
        "worst case, 10 rho": far.sharpness,
        "average case, rho / 5": average.mean,
        "largest eigenvalue": pairs.values[0],
        "largest / fifth": pairs.values[0] / pairs.values[4],
        "2h/rho², surrogate gap": sharpness.eigenvalue_from_gap(gap.sharpness, RHO),
        "2h/rho², worst case": sharpness.eigenvalue_from_gap(worst.sharpness, RHO),
        "trace": trace.mean,
    }
    direction = sharpness.filter_normalized_direction(params)
    return Solution(
        params,
        {name: float(value) for name, value in numbers.items()},
        sharpness.spectral_density(H, num_samples=5),
        sharpness.along_line(
            loss_fn, params, examples, direction, jnp.linspace(-1, 1, SLICE)
        ),
        sharpness.along_line(
            loss_fn, params, examples, pairs.vector(0), jnp.linspace(-2, 2, SLICE)
        ),
    )


def compare(
    loss_fn, args: argparse.Namespace, console: Console
) -> dict[str, list[Solution]]:
    """Name of a method -> its solutions, one per seed."""
    solutions = {method: [] for method in args.methods}
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "networks,")
    columns += (TimeRemainingColumn(), "left")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=args.seeds * len(args.methods))
        for seed in range(args.seeds):
            data, test_data = digits.make_data(seed, args.noise)
            for method in args.methods:
                bar.update(task, description=f"{method}, seed {seed}")
                state = train(method, seed, loss_fn, data, args)
                accuracy = digits.accuracy(state, *test_data)
                solution = measure(loss_fn, state.params, data, accuracy)
                solutions[method].append(solution)
                bar.advance(task)
                if not console.is_terminal:  # there is no bar to watch
                    console.print(f"{method}, seed {seed}: {accuracy:.1f} %")
    return solutions


def make_table(solutions: dict[str, list[Solution]]) -> Table:
    table = Table()
    table.add_column("")
    for method in solutions:
        table.add_column(method, justify="right")
    for name in next(iter(solutions.values()))[0].numbers:
        cells = []
        for several in solutions.values():
            values = [solution.numbers[name] for solution in several]
            spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3g}{spread}")
        table.add_row(name, *cells)
    return table


def draw_sharpness(firsts: dict[str, Solution], path: pathlib.Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    plot.spectrum(
        {name: solution.density for name, solution in firsts.items()}, ax=axes[0, 0]
    )
    axes[0, 0].set_title("spectrum of the Hessian")
    plot.lines(
        {name: solution.filters for name, solution in firsts.items()},
        xlabel="distance, in norms of the filters",
        ax=axes[0, 1],
    )
    axes[0, 1].set_title("along a random direction, filter-normalised")
    plot.lines({name: solution.top for name, solution in firsts.items()}, ax=axes[1, 0])
    axes[1, 0].set_title("along the eigenvector of the largest eigenvalue")
    for ax in (axes[0, 1], axes[1, 0]):
        ax.set_yscale("log")

    bars = ("largest eigenvalue", "2h/rho², worst case", "2h/rho², surrogate gap")
    places = np.arange(len(firsts))
    for i, name in enumerate(bars):
        heights = [solution.numbers[name] for solution in firsts.values()]
        label = name.replace("rho", "ρ")
        axes[1, 1].bar(places + 0.27 * (i - 1), heights, 0.25, label=label)
    axes[1, 1].set_xticks(places, firsts)
    axes[1, 1].set_title(f"the largest eigenvalue, and what gaps say (ρ = {RHO})")
    axes[1, 1].margins(y=0.25)  # room for the legend
    axes[1, 1].legend(loc="upper left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_surfaces(
    loss_fn, firsts: dict[str, Solution], examples, path: pathlib.Path
) -> None:
    surfaces = {}
    for name, solution in firsts.items():
        directions = [
            sharpness.filter_normalized_direction(solution.params, key=key)
            for key in (0, 1)
        ]
        distances = jnp.linspace(-1, 1, PLANE)
        surfaces[name] = sharpness.over_plane(
            loss_fn,
            solution.params,
            examples,
            directions,
            distances,
            distances,
        )
    axes = plot.surfaces(surfaces)
    axes[0].figure.savefig(path, dpi=120)
    plt.close(axes[0].figure)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sharpness.py",
        description="Trains the digits network with several methods, and measures how "
        "flat the minima are that they find.",
    )
    methods = list(TRAINED_WITH)
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--noise", type=float, default=0, help="%% of wrong labels")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 256])
    parser.add_argument("--output", type=pathlib.Path, default="results")
    parser.add_argument("--quick", action="store_true", help="one seed, 20 epochs")
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)  # a file has room for the table
    # One function for all solutions, so that each measure is compiled once.
    loss_fn = digits.make_loss(digits.MLP(tuple(args.hidden)))
    solutions = compare(loss_fn, args, console)
    firsts = {method: several[0] for method, several in solutions.items()}
    data, _ = digits.make_data(0, args.noise)
    draw_sharpness(firsts, args.output / "sharpness.png")
    draw_surfaces(loss_fn, firsts, data, args.output / "surfaces.png")
    numbers = {
        method: [solution.numbers for solution in several]
        for method, several in solutions.items()
    }
    content = {"rho": RHO, "noise_percent": args.noise, "solutions": numbers}
    (args.output / "sharpness.json").write_text(json.dumps(content, indent=2) + "\n")
    console.print(f"Mean over {args.seeds} seeds, measured with rho = {RHO}:")
    console.print(make_table(solutions))
    names = "sharpness.json, sharpness.png and surfaces.png"
    console.print(f"{names} are in {args.output}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
