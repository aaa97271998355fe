"""Where GD and SAM end on two functions with a flat and a sharp minimum.

    python benchmarks/papers/two_minima.py

Figures 1 and 2 of Liu, Chen and Shi, "Sharpness-Aware Minimization for Efficiently
Improving Generalization: A Review".

Figure 2 is (x − 1)² y². The review does not say where GD and SAM start: here in many
places in [−2, 2]², with its ρ = 1e-5 and larger ones.

Figure 1 is x² (x − 1)² / (x² + 1e-4), whose minimum at 0 is much sharper than that at
1. The review does not say its settings: here both start in many places in [−1, 0],
where the sharp minimum comes first, with several radii and learning rates. A run ends
at the flat minimum within 0.1 of 1, at the sharp one within 0.02 of 0, or beside both.

In float64, so that a radius of 1e-5 is not lost to rounding.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from harness import Experiment, arguments, cases, describe
from training import PLAIN, last_params

VALLEY_RATE, VALLEY_RHOS = 0.1, [0.0, 1e-5, 1e-3, 0.01, 0.1, 0.3]  # GD is ρ = 0
REVIEW = 1.225  # the largest eigenvalue where GD ends, in Figure 2
RATES = np.geomspace(1e-5, 0.1, 13).tolist()
RHOS = [0.0, 1e-5, 0.001, 0.01, 0.03, 0.1, 0.3]
TIME = 3.0  # steps × learning rate, at least: several times what reaches x = 0
ENDS = ["flat", "sharp", "beside"]


def valley(w):
    return (w[0] - 1) ** 2 * w[1] ** 2


def two_minima(w):
    return w**2 * (w - 1) ** 2 / (w**2 + 1e-4)


@partial(jax.jit, static_argnames=("f", "method", "steps"))
def ends(f, rate, starts, rho, *, method, steps):
    """Where each run is after its steps."""
    run = partial(last_params, f, method, optax.sgd(rate), rho, steps=steps)
    return jax.vmap(run)(starts)


@jax.jit
@jax.vmap
def largest_eigenvalue(w):
    hessian = jax.hessian(valley)(w)
    return jnp.linalg.eigvalsh(jnp.where(jnp.isfinite(hessian), hessian, 0.0))[-1]


class TwoMinima(Experiment):
    options = arguments(
        starts=(10000, 400, "random starts on (x − 1)² y²; a 20th on the other"),
        steps=(1000, None, "steps of each run; with small learning rates more"),
    )

    def plan(self):
        rates = [VALLEY_RATE]
        yield from cases(function=["valley"], rho=VALLEY_RHOS, learning_rate=rates)
        rates = RATES if not self.args.quick else RATES[6:]  # small ones: many steps
        yield from cases(function=["two minima"], rho=RHOS, learning_rate=rates)

    def measure(self, function, learning_rate, rho):
        measure = self.measure_valley if function == "valley" else self.measure_two
        with jax.enable_x64(True):
            return measure(learning_rate, rho, "sam" if rho else PLAIN)

    def measure_valley(self, rate, rho, method):
        """Where the runs end, and loss and eigenvalue there."""
        starts = np.random.default_rng(0).uniform(-2, 2, (self.args.starts, 2))
        found = ends(valley, rate, starts, rho, method=method, steps=self.args.steps)
        run = {"ends": found, "losses": jax.vmap(valley)(found)}
        run["eigenvalues"] = largest_eigenvalue(found)
        return {key: np.asarray(value).tolist() for key, value in run.items()}

    def measure_two(self, rate, rho, method):
        starts = np.random.default_rng(0).uniform(-1, 0, self.args.starts // 20)
        steps = max(self.args.steps, round(TIME / rate))
        found = ends(two_minima, rate, starts, rho, method=method, steps=steps)
        found = np.asarray(found)
        flat = float(np.mean(np.abs(found - 1) < 0.1))
        sharp = float(np.mean(np.abs(found) < 0.02))
        shares = zip(ENDS, (flat, sharp, 1 - sum((flat, sharp))), strict=True)
        run = {"steps": steps, "median_end": float(np.median(found))}
        return run | {f"{end}_percent": 100 * share for end, share in shares}

    def report(self):
        runs, rows = self.runs.of(function="valley"), []
        gd = np.array(runs[0]["eigenvalues"])
        # Where GD ends as in the review, on how many starts, and where SAM does.
        alike = np.abs(gd - REVIEW) < 0.01
        for run in runs:
            found = np.array(run["eigenvalues"])
            row = [f"{run['rho']:g}" if run["rho"] else "GD", describe(found, 3)]
            row += [f"{(found - gd).mean():.2g}", f"{100 * np.mean(found < gd):.1f}"]
            rows.append([*row, describe(found[alike], 4) if alike.any() else ""])
        columns = ("rho", "largest eigenvalue", "less GD's", "SAM flatter (%)")
        more = f"from the {alike.sum()} starts where GD's is {REVIEW} ± 0.01"
        self.print("(x − 1)² y²:")
        self.table((*columns, more), rows)
        runs, rows = self.runs.of(function="two minima"), []
        groups = {f"ρ = {k:g}" if k else "GD": g for k, g in runs.by("rho").items()}
        for name, group in groups.items():
            shares = zip(*(group.column(f"{end}_percent") for end in ENDS), strict=True)
            rows.append((name, *("/".join(f"{s:.0f}" for s in c) for c in shares)))
        rates = (f"{rate:.1e}" for rate in runs.values("learning_rate"))
        self.print("x² (x − 1)² / (x² + 1e-4), by learning rate:")
        self.table(("flat / sharp / beside, %", *rates), rows)
        for end in ENDS:
            self.draw(end, groups, f"{end}_percent", "learning_rate", xscale="log")


if __name__ == "__main__":
    TwoMinima.main()
