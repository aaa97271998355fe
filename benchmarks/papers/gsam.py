"""GSAM and min(f_p + λh): accuracy, surrogate gap and curvature as α, λ and ρ vary.

    python benchmarks/papers/gsam.py

Zhuang et al. (https://arxiv.org/abs/2203.08065) train a ViT on ImageNet. This measures
again, on the data and with the settings of friendly.py:

  Figure 4: accuracy, the gap, and the largest eigenvalue, as α and ρ vary; and whether
            2h/ρ² stands for that eigenvalue.
  Figure 8: the cosine of the angle between the two gradients along a training.
  Figure 9: the gap along a training, as α varies.
  Table 2:  GSAM against min(f_p + λh), the gap as a penalty: d = gᵃ + λ(gᵃ − g).

α and λ have the same values to choose from, by the accuracy on validation images.
"""

import functools
import itertools

import jax

from friendly import MODEL, RATE, train
from harness import Experiment, Runs, arguments, cases, describe
from sam_optax import sharpness
from training import losses_of

RHOS = [0.1, 0.2, 0.4]
WEIGHTS = [0.1, 0.2, 0.4, 0.8]  # of the gap; the paper searches α and λ on one grid
KEYS = {"gsam": "alpha", "sam_plus_gap": "lam"}  # what a method calls its weight
SYMBOLS = {"gsam": "α", "sam_plus_gap": "λ"}
NOISES = [0, 40]


@jax.jit  # compiled once; else with every call, as each makes its own functions
def measure_sharpness(params, train, rho) -> dict[str, jax.Array]:
    """On the training images, with the radius of the training."""

    def loss_fn(params, x, y):
        return losses_of(MODEL, params, x, y)[0].mean()

    gap = sharpness.surrogate_gap(loss_fn, params, train, rho=rho)
    worst = sharpness.worst_case(loss_fn, params, train, rho=rho)
    pairs = sharpness.eigenpairs(sharpness.hessian(loss_fn, params, train))
    return {
        "gap": gap.sharpness,
        "eigenvalue": pairs.values[0],
        "estimate": sharpness.eigenvalue_from_gap(gap.sharpness, rho),
        "worst_estimate": sharpness.eigenvalue_from_gap(worst.sharpness, rho),
    }


def less(group: Runs, mine: Runs, weight: float | None = None) -> str:
    """Than GSAM of the same radius, and of a weight or the same one."""
    weight = group[0]["weight"] if weight is None else weight
    same = mine.of(method="gsam", rho=group[0]["rho"], weight=weight)
    return "" if same == group else group.less(same, "test_percent").show()


def end(group: Runs, key: str, digits: int, place: int = 0) -> str:
    """Of the mean over the first or the last epoch, of the batches."""
    return describe([curve[place] for curve in group.column(key)], digits)


class Gsam(Experiment):
    options = arguments(
        seeds=(5, 2, "trainings with each setting"),
        epochs=(60, 2, "passes over the training images"),
        settings=(len(RHOS), 1, "of the radii, the first so many"),
        weights=(len(WEIGHTS), 1, "of those of the gap, the first so many"),
    )

    def settings(self):
        """SAM is GSAM of weight 0."""
        rhos, weights = RHOS[: self.args.settings], WEIGHTS[: self.args.weights]
        settings = cases(rho=rhos, method=KEYS, weight=[0.0, *weights])
        return [s for s in settings if s["weight"] or s["method"] == "gsam"]

    def plan(self):
        for noise, setting in itertools.product(NOISES, self.settings()):
            for seed in range(self.args.seeds):
                yield {"noise": noise, **setting, "seed": seed}

    def measure(self, noise, method, rho, weight, seed):
        hyper = {"learning_rate": RATE, "rho": rho, KEYS[method]: weight}
        found = train(method, hyper, noise, seed, self.args.epochs)
        validation, test, state, reports, images = found
        measured = measure_sharpness(state.params, images, rho)
        return {
            "validation_percent": validation,
            "test_percent": test,
            "cosine": [float(report.cosine.mean()) for report in reports],
            "gaps": [float(report.surrogate_gap.mean()) for report in reports],
            **{key: float(value) for key, value in measured.items()},
        }

    def report(self):
        accuracy, curvature = ("test_percent", 1), {"gap": ("gap", 4)}
        curvature["eigenvalue"] = ("eigenvalue", 2)
        ends = {}
        for key, digits in (("cosine", 2), ("gaps", 3)):
            ends[f"{key}, first"] = functools.partial(end, key=key, digits=digits)
            ends[f"{key}, last"] = functools.partial(
                end, key=key, digits=digits, place=-1
            )
        for noise, mine in self.runs.by("noise").items():
            wrong, groups = f"{noise} % wrong", {}
            for setting in self.settings():
                symbol = SYMBOLS[setting["method"]]
                name = f"{setting['rho']:g}, {symbol} = {setting['weight']:g}"
                groups[name] = mine.of(**setting)
            columns = {
                "test": accuracy,
                "less SAM's": functools.partial(less, mine=mine, weight=0),
                "less GSAM's": functools.partial(less, mine=mine),
                **curvature,
                "2h/rho²": ("estimate", 2),
                "of the worst": ("worst_estimate", 2),
            }
            self.summary(f"{wrong}, rho, weight", groups, columns | ends)
            weighted = Runs(run for run in mine if run["weight"])
            chosen = {"SAM": mine.of(weight=0), "GSAM": weighted.of(method="gsam")}
            chosen["min(f_p + λh)"] = weighted.of(method="sam_plus_gap")
            by = ("validation_percent", "rho", "weight")
            chosen = {name: group.best(*by) for name, group in chosen.items()}
            columns = {"rho": "rho", "weight": "weight", "test": accuracy}
            columns |= {f"less {k}'s": (*accuracy, k) for k in ("SAM", "GSAM")}
            title = f"{wrong} labels, by validation"
            self.summary(title, chosen, columns | curvature)
            groups = {
                f"{SYMBOLS[method]}, ρ = {rho:g}": mine.of(method=method, rho=rho)
                for method, rho in itertools.product(KEYS, mine.values("rho"))
            }
            for key in ("test_percent", "gap", "eigenvalue"):
                self.draw(wrong, groups, key, "weight")
            groups = {f"SAM, {k}": g.of(weight=0) for k, g in groups.items()}
            self.draw(wrong, {k: g for k, g in groups.items() if g}, "gaps")


if __name__ == "__main__":
    Gsam.main()
