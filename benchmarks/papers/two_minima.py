"""Where GD and SAM end on two functions with a flat and a sharp minimum.

    python benchmarks/papers/two_minima.py

Figures 1 and 2 of Liu, Chen and Shi, "Sharpness-Aware Minimization for Efficiently
Improving Generalization: A Review".

Figure 2: (x − 1)² y² with learning rate 0.1, ρ = 1e-5 and 1,000 steps. The review says
that SAM ends at a flatter point than GD, with a largest Hessian eigenvalue of 0.016 for
1.225, but not where it starts. Here both run from many starts in [−2, 2]², and for
other radii as well.

Figure 1: x² (x − 1)² / (x² + 1e-4), whose minimum at 0 is much sharper than that at 1.
The review does not say its settings. Here both run from many starts in [−1, 0], where
the sharp minimum comes first, with learning rates from 1e-5 to 0.1. A run ends at the
flat minimum within 0.1 of 1, at the sharp one within 0.02 of 0, or beside both.

In float64, so that a radius of 1e-5 is not lost to rounding.
"""

import sys
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.console import Console

from evidence import (
    Parser,
    carry_out,
    compare_pairs,
    describe,
    make_table,
    of,
    progress,
)
from training import PLAIN, make_step

NAME = "two_minima"
VALLEY_RATE, VALLEY_RHOS = 0.1, [1e-5, 1e-3, 0.01, 0.1, 0.3]
REVIEW = {"GD": 1.225, "SAM": 0.016}  # largest eigenvalues at the ends, in Figure 2
RATES = np.geomspace(1e-5, 0.1, 13).tolist()
RHOS = [0.0, 1e-5, 0.001, 0.01, 0.03, 0.1, 0.3]  # GD is ρ = 0
TIME = 3.0  # steps × learning rate, at least: several times what reaches x = 0
ENDS = {"flat": "C0", "sharp": "C3", "beside": "C1"}


def valley(w):
    return (w[0] - 1) ** 2 * w[1] ** 2


def two_minima(w):
    return w**2 * (w - 1) ** 2 / (w**2 + 1e-4)


@partial(jax.jit, static_argnames=("f", "method", "steps"))
def ends(f, rate, starts, rho, *, method, steps):
    """Where each run is after its steps."""
    hyper = {} if method == PLAIN else {"rho": rho}
    init, step = make_step(f, method, optax.sgd(rate), **hyper)

    def run(start):
        def body(carry, _):
            return step(*carry)[:2], None

        return jax.lax.scan(body, (start, init(start)), length=steps)[0][0]

    return jax.vmap(run)(starts)


@jax.jit
@jax.vmap
def largest_eigenvalue(w):
    hessian = jax.hessian(valley)(w)
    return jnp.linalg.eigvalsh(jnp.where(jnp.isfinite(hessian), hessian, 0.0))[-1]


def run_valley(args, advance) -> list[dict]:
    """For each radius: where its runs end, and loss and eigenvalue there."""
    starts = np.random.default_rng(0).uniform(-2, 2, (args.starts, 2))
    runs = []
    for rho in [0.0, *VALLEY_RHOS]:
        method = "sam" if rho else PLAIN
        found = ends(valley, VALLEY_RATE, starts, rho, method=method, steps=args.steps)
        eigenvalues, losses = largest_eigenvalue(found), jax.vmap(valley)(found)
        runs.append(
            {"function": "valley", "learning_rate": VALLEY_RATE, "rho": rho}
            | {"ends": np.asarray(found).tolist()}
            | {"losses": losses.tolist(), "eigenvalues": eigenvalues.tolist()}
        )
        advance(f"(x − 1)² y², ρ = {rho:g}")
    return runs


def run_two_minima(args, advance) -> list[dict]:
    starts = np.random.default_rng(0).uniform(-1, 0, args.starts // 20)
    rates = RATES if not args.quick else RATES[6:]  # small ones take many steps
    runs = []
    for rho in RHOS:
        method = "sam" if rho else PLAIN
        for rate in rates:
            steps = max(args.steps, round(TIME / rate))
            found = ends(two_minima, rate, starts, rho, method=method, steps=steps)
            found = np.asarray(found)
            shares = {
                "flat": float(np.mean(np.abs(found - 1) < 0.1)),
                "sharp": float(np.mean(np.abs(found) < 0.02)),
            }
            shares["beside"] = 1 - sum(shares.values())
            runs.append(
                {"function": "two minima", "learning_rate": rate, "rho": rho}
                | {"steps": steps, "median_end": float(np.median(found))}
                | {f"{end}_percent": 100 * share for end, share in shares.items()}
            )
            advance(f"two minima, ρ = {rho:g}, learning rate {rate:.1e}")
    return runs


def run_all(args, console: Console) -> list[dict]:
    rates = len(RATES) if not args.quick else len(RATES[6:])
    parts = 1 + len(VALLEY_RHOS) + len(RHOS) * rates
    with jax.enable_x64(True), progress(console, parts) as advance:
        return run_valley(args, advance) + run_two_minima(args, advance)


def print_results(runs: list[dict], args, console: Console) -> None:
    gd, *others = of(runs, function="valley")
    # Where GD ends as in the review, on how many starts, and where SAM does from these.
    alike = np.abs(np.subtract(gd["eigenvalues"], REVIEW["GD"])) < 0.01
    table = make_table(
        *("rho", "largest eigenvalue", "less GD's", "SAM flatter (%)"),
        f"from the {alike.sum()} starts where GD's is {REVIEW['GD']} ± 0.01",
    )
    for run in (gd, *others):
        pairs = compare_pairs(run["eigenvalues"], gd["eigenvalues"])
        flatter = 100 * np.mean(np.less(run["eigenvalues"], gd["eigenvalues"]))
        there = np.asarray(run["eigenvalues"])[alike]
        table.add_row(
            f"{run['rho']:g}" if run["rho"] else "GD",
            describe(run["eigenvalues"], 3),
            f"{pairs.mean:.2g}",
            f"{flatter:.1f}",
            f"{describe(there, 4)}" if len(there) else "",
        )
    console.print("(x − 1)² y²:", table)

    rates = sorted({run["learning_rate"] for run in of(runs, function="two minima")})
    table = make_table("flat / sharp / beside, %", *(f"{rate:.1e}" for rate in rates))
    for rho in RHOS:
        row = [run for run in of(runs, function="two minima") if run["rho"] == rho]
        cells = (
            "/".join(f"{run[f'{end}_percent']:.0f}" for end in ENDS) for run in row
        )
        table.add_row(f"ρ = {rho:g}" if rho else "GD", *cells)
    console.print("x² (x − 1)² / (x² + 1e-4), by learning rate:", table)


def make_figure(runs: list[dict], args) -> Figure:
    figure = Figure((9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    gd, *others = of(runs, function="valley")
    for run in others:
        if run["rho"] in (1e-5, 0.01, 0.1):
            label = f"SAM, ρ = {run['rho']:g}"
            pairs = gd["eigenvalues"][:500], run["eigenvalues"][:500]
            left.plot(*pairs, ".", markersize=3, label=label)
    left.plot(*REVIEW.values(), "k*", markersize=9, label="the review")
    left.set(xscale="log", yscale="log", ylim=(1e-5, 30))
    left.set_title("(x − 1)² y²: largest eigenvalue at the end", fontsize="medium")
    left.set_xlabel("of GD")
    left.set_ylabel("of SAM from the same start")
    left.legend(fontsize="small", markerscale=1.5)
    left.grid(alpha=0.3)

    rows = of(runs, function="two minima")
    rates = sorted({run["learning_rate"] for run in rows})
    for i, run in enumerate(rows):
        at, bottom = i % len(rates), i // len(rates) - 0.5
        for end, color in ENDS.items():
            height = 0.96 * run[f"{end}_percent"] / 100
            right.bar(at, height, 0.96, bottom, color=color)
            bottom += height
    right.set_yticks(range(len(RHOS)), [f"{rho:g}" if rho else "GD" for rho in RHOS])
    ticks = range(0, len(rates), 3)
    right.set_xticks(ticks, [f"{rates[tick]:.0e}" for tick in ticks])
    right.set_xlabel("learning rate")
    right.set_ylabel("ρ")
    right.set_title("x² (x − 1)² / (x² + 1e-4): ends", fontsize="medium")
    names = {"flat": "flat minimum", "sharp": "sharp minimum", "beside": "neither"}
    handles = [Patch(color=ENDS[end], label=names[end]) for end in ENDS]
    figure.legend(handles=handles, loc="outside lower right", ncols=3, fontsize="small")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__, {"starts": 400})
    parser.count("starts", 10000, "random starts on (x − 1)² y²; a 20th on the other")
    parser.count("steps", 1000, "steps of each run; with small learning rates more")
    args = parser.parse(argv)
    return carry_out(NAME, args, run_all, print_results, make_figure)


if __name__ == "__main__":
    sys.exit(main())
