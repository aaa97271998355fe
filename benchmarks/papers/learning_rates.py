"""GD, SAM and StableSAM from many starts: how often each reaches a minimum.

    python benchmarks/papers/learning_rates.py

In section 5.1 and Figure 4 of Tan et al. (https://arxiv.org/abs/2401.07250) the
function x₁⁴/4 − x₁x₂ + x₂²/2 has minima at (1, 1) and (−1, −1) and a saddle at the
origin. The starts are random in [−2, 2]². The paper does not say its steps and radii,
or how near to a minimum counts. Here a run counts that ends within 0.1 of one; those
within 0.5, so on the way to one or in orbit around it, are counted beside.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from harness import Experiment, arguments, cases
from training import PLAIN, last_params

RHOS = [0.01, 0.1, 0.5]
NEAR, AROUND = 0.1, 0.5
METHODS = {"GD": PLAIN, "SAM": "sam", "StableSAM": "stable_sam"}
SHOWN = (0.001, 0.003, 0.01, 0.03, 0.1, 0.15, 0.2, 0.3)  # learning rates of the table


def f(w):
    return w[0] ** 4 / 4 - w[0] * w[1] + w[1] ** 2 / 2


@partial(jax.jit, static_argnames=("method", "steps"))
def distances(rates, starts, rho, *, method, steps):
    """How far from the nearer minimum each run ends: (learning rates, starts)."""

    def run(rate, start):
        w = last_params(f, method, optax.sgd(rate), rho, start, steps)
        return jnp.minimum(jnp.linalg.norm(w - 1), jnp.linalg.norm(w + 1))

    return jax.vmap(jax.vmap(run, (None, 0)), (0, None))(rates, starts)


class LearningRates(Experiment):
    options = arguments(
        rates=(100, 5, "learning rates from 0.001 to 0.3, in equal ratios"),
        starts=(10000, 200, "random starts, the same for all"),
        steps=(1000, 300, "steps of each run"),
    )

    def plan(self):
        yield {"method": "GD", "rho": None}
        yield from cases(rho=RHOS, method=["SAM", "StableSAM"])

    def measure(self, method, rho):
        """A run for each learning rate."""
        rates = np.geomspace(0.001, 0.3, self.args.rates)
        starts = np.random.default_rng(0).uniform(-2, 2, (self.args.starts, 2))
        starts = jnp.asarray(starts, jnp.float32)
        options = {"method": METHODS[method], "steps": self.args.steps}
        parts = np.array_split(jnp.asarray(rates, jnp.float32), 4)  # for the memory
        ends = [distances(part, starts, rho, **options) for part in parts]
        runs = []
        for rate, end in zip(rates.tolist(), np.concatenate(ends), strict=True):
            shares = {"near": end < NEAR, "around": end < AROUND}
            shares["exploded"] = ~np.isfinite(end)
            run = {f"{k}_percent": 100 * float(v.mean()) for k, v in shares.items()}
            runs.append({"learning_rate": rate} | run)
        return runs

    def report(self):
        groups, rows = {}, []
        for case in self.plan():
            name = f"{case['method']}, ρ = {case['rho']:g}" if case["rho"] else "GD"
            groups[name] = self.runs.of(**case)
        rates = np.array(self.runs.values("learning_rate"))
        shown = sorted({int(np.abs(rates - rate).argmin()) for rate in SHOWN})
        for name, runs in groups.items():
            near, around = (runs.column(f"{k}_percent") for k in ("near", "around"))
            rows.append((name, *(f"{near[i]:.1f} ({around[i]:.1f})" for i in shown)))
        self.table(("within 0.1 (0.5), %", *(f"{rates[i]:.3f}" for i in shown)), rows)
        exploded = max(self.runs.column("exploded_percent"))
        self.print(f"at most {exploded:.1f} % of a setting's runs are not finite")
        for key in ("near_percent", "around_percent"):
            self.draw(key, groups, key, "learning_rate", xscale="log")


if __name__ == "__main__":
    LearningRates.main()
