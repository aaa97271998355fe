"""GD, SAM and StableSAM from many starts: how often each reaches a minimum.

    python benchmarks/papers/learning_rates.py

Section 5.1 and Figure 4 of Tan et al., "Stabilizing Sharpness-aware Minimization
Through A Simple Renormalization Strategy" (https://arxiv.org/abs/2401.07250). The
function x₁⁴/4 − x₁x₂ + x₂²/2 has minima at (1, 1) and (−1, −1) and a saddle at the
origin. From 10,000 starts in [−2, 2]², with each of 100 learning rates from 0.001 to
0.3, how many runs end at a minimum?

The paper does not say how many steps it takes, which radii it shows, or how near to a
minimum counts. Here, a run counts that ends within 0.1 of one; those within 0.5, so on
the way to one or in orbit around it, are counted beside.
"""

import sys
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console

from evidence import Parser, carry_out, make_table, progress
from training import PLAIN, make_step

NAME = "learning_rates"
RHOS = [0.01, 0.1, 0.5]
NEAR, AROUND = 0.1, 0.5
LABELS = {PLAIN: "GD", "sam": "SAM", "stable_sam": "StableSAM"}
COLORS = {"GD": "black", "SAM": "C1", "StableSAM": "C0"}
SHOWN = (0.001, 0.003, 0.01, 0.03, 0.1, 0.15, 0.2, 0.3)  # learning rates of the table


def f(w):
    return w[0] ** 4 / 4 - w[0] * w[1] + w[1] ** 2 / 2


@partial(jax.jit, static_argnames=("method", "steps"))
def distances(rates, starts, rho, *, method, steps):
    """How far from the nearer minimum each run ends: (learning rates, starts)."""
    hyper = {} if method == PLAIN else {"rho": rho}

    def run(rate, start):
        init, step = make_step(f, method, optax.sgd(rate), **hyper)

        def body(carry, _):
            return step(*carry)[:2], None

        (w, _), _ = jax.lax.scan(body, (start, init(start)), length=steps)
        return jnp.minimum(jnp.linalg.norm(w - 1), jnp.linalg.norm(w + 1))

    return jax.vmap(jax.vmap(run, (None, 0)), (0, None))(rates, starts)


def run_all(args, console: Console) -> list[dict]:
    rates = np.geomspace(0.001, 0.3, args.rates)
    starts = np.random.default_rng(0).uniform(-2, 2, (args.starts, 2))
    starts = jnp.asarray(starts, jnp.float32)  # the same for all
    cases = [(PLAIN, None)] + [(m, rho) for rho in RHOS for m in ("sam", "stable_sam")]
    runs = []
    with progress(console, len(cases)) as advance:
        for method, rho in cases:
            ends = [
                distances(rate, starts, rho, method=method, steps=args.steps)
                for rate in np.array_split(jnp.asarray(rates, jnp.float32), 4)
            ]
            ends = np.concatenate(ends)
            for rate, end in zip(rates.tolist(), ends, strict=True):
                run = {"method": LABELS[method], "rho": rho, "learning_rate": rate}
                shares = {"near": end < NEAR, "around": end < AROUND}
                shares["exploded"] = ~np.isfinite(end)
                for key, runs_of_it in shares.items():
                    run[f"{key}_percent"] = 100 * float(runs_of_it.mean())
                runs.append(run)
            advance(label(runs[-1]))
    return runs


def label(run: dict) -> str:
    return run["method"] + ("" if run["rho"] is None else f", ρ = {run['rho']:g}")


def by_label(runs: list[dict]) -> dict[str, list[dict]]:
    curves = {}
    for run in runs:
        curves.setdefault(label(run), []).append(run)
    return curves


def print_results(runs: list[dict], args, console: Console) -> None:
    curves = by_label(runs)
    rates = [run["learning_rate"] for run in next(iter(curves.values()))]
    shown = sorted({int(np.argmin(np.abs(np.subtract(rates, r)))) for r in SHOWN})
    table = make_table("within 0.1 (0.5), %", *(f"{rates[i]:.3f}" for i in shown))
    for name, curve in curves.items():
        pairs = ((curve[i]["near_percent"], curve[i]["around_percent"]) for i in shown)
        cells = (f"{near:.1f} ({around:.1f})" for near, around in pairs)
        table.add_row(name, *cells)
    console.print(table)
    exploded = max(run["exploded_percent"] for run in runs)
    console.print(f"at most {exploded:.1f} % of the runs with a setting are not finite")


def make_figure(runs: list[dict], args) -> Figure:
    curves = by_label(runs)
    figure = Figure((9, 3.4), layout="constrained")
    for axes, rho in zip(figure.subplots(1, len(RHOS), sharey=True), RHOS, strict=True):
        for method, color in COLORS.items():
            curve = curves.get(f"{method}, ρ = {rho:g}") or curves["GD"]
            rates = [run["learning_rate"] for run in curve]
            for key, style in (("near_percent", "-"), ("around_percent", ":")):
                axes.plot(
                    rates,
                    [run[key] for run in curve],
                    style,
                    color=color,
                    label=method if style == "-" else None,
                )
        axes.set_xscale("log")
        axes.set_title(f"ρ = {rho:g}", fontsize="medium")
        axes.set_xlabel("learning rate")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("runs (%)")
    figure.axes[0].legend()
    figure.suptitle(
        f"Runs within {NEAR} of a minimum (dotted: {AROUND}) after {args.steps} steps",
        fontsize="medium",
    )
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__, {"rates": 5, "starts": 200, "steps": 300})
    parser.count("rates", 100, "learning rates from 0.001 to 0.3, in equal ratios")
    parser.count("starts", 10000, "random starts, the same for all")
    parser.count("steps", 1000, "steps of each run")
    args = parser.parse(argv)
    return carry_out(NAME, args, run_all, print_results, make_figure)


if __name__ == "__main__":
    sys.exit(main())
