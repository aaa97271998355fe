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
import itertools
from typing import Any, ClassVar

import jax
import optax

from friendly import MODEL, RATE, train
from harness import Experiment, Runs, describe
from sam_optax import sharpness

RHOS = [0.1, 0.2, 0.4]
WEIGHTS = [0.1, 0.2, 0.4, 0.8]  # of the gap; the paper searches α and λ on one grid
KEYS = {"gsam": "alpha", "sam_plus_gap": "lam"}  # what a method calls its weight
SYMBOLS = {"gsam": "α", "sam_plus_gap": "λ"}
NOISES = [0, 40]


def loss_fn(params, x, y):
    logits: Any = MODEL.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


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


def chosen(runs: Runs, noise: float) -> dict[str, Runs]:
    """Name -> the runs with the setting of the best mean accuracy in validation."""
    mine = runs.of(noise=noise)
    weighted = Runs(run for run in mine if run["weight"])
    groups = {"SAM": mine.of(weight=0), "GSAM": weighted.of(method="gsam")}
    groups["min(f_p + λh)"] = weighted.of(method="sam_plus_gap")
    by = ("validation_percent", "rho", "weight")
    return {name: group.best(*by) for name, group in groups.items()}


def end(key: str, place: int, digits: int):
    """Of the mean over the first or the last epoch, of the batches."""
    return lambda runs: describe([curve[place] for curve in runs.column(key)], digits)


class Gsam(Experiment):
    name, doc = "gsam", __doc__
    options: ClassVar = {
        "seeds": (5, 2, "trainings with each setting"),
        "epochs": (60, 2, "passes over the training images"),
        "settings": (len(RHOS), 1, "of the radii, the first so many"),
        "weights": (len(WEIGHTS), 1, "of those of the gap, the first so many"),
    }

    def settings(self):
        """(ρ, method, weight); SAM is GSAM of weight 0."""
        weights = WEIGHTS[: self.args.weights]
        for rho, method in itertools.product(RHOS[: self.args.settings], KEYS):
            for weight in [0.0] * (method == "gsam") + weights:
                yield rho, method, weight

    def plan(self):
        for noise, (rho, method, weight) in itertools.product(NOISES, self.settings()):
            case = {"noise": noise, "method": method, "rho": rho, "weight": weight}
            yield from (case | {"seed": seed} for seed in range(self.args.seeds))

    def measure(self, noise, method, rho, weight, seed):
        hyper = {"learning_rate": RATE, "rho": rho, KEYS[method]: weight}
        found = train(method, hyper, noise, seed, self.args.epochs)
        validation, test, state, reports, images = found
        run = {"validation_percent": validation, "test_percent": test}
        run["cosine"] = [float(report.cosine.mean()) for report in reports]
        run["gaps"] = [float(report.surrogate_gap.mean()) for report in reports]
        measured = measure(state.params, images, rho)
        return run | {key: float(value) for key, value in measured.items()}

    def report(self):
        for noise, wrong in ((noise, f"{noise} % wrong") for noise in NOISES):
            mine = self.runs.of(noise=noise)
            groups = {}
            for rho, method, weight in self.settings():
                name = f"{rho:g}, {SYMBOLS[method]} = {weight:g}"
                groups[name] = mine.of(method=method, rho=rho, weight=weight)

            def less(group, weight=None, mine=mine):
                """Than GSAM of the same radius, and of a weight or the same one."""
                weight = group[0]["weight"] if weight is None else weight
                same = mine.of(method="gsam", rho=group[0]["rho"], weight=weight)
                return "" if same == group else group.less(same, "test_percent").show()

            accuracy, curvature = ("test_percent", 1), {"gap": ("gap", 4)}
            curvature["eigenvalue"] = ("eigenvalue", 2)
            columns = {
                "test": accuracy,
                "less SAM's": functools.partial(less, weight=0),
            }
            columns |= {"less GSAM's": less, **curvature, "2h/rho²": ("estimate", 2)}
            columns |= {"of the worst": ("worst_estimate", 2)}
            for key, digits in (("cosine", 2), ("gaps", 3)):
                columns |= {f"{key}, first": end(key, 0, digits)}
                columns |= {f"{key}, last": end(key, -1, digits)}
            self.summary(f"{wrong}, rho, weight", groups, columns)
            columns = {"rho": "rho", "weight": "weight", "test": accuracy}
            columns |= {f"less {k}'s": (*accuracy, k) for k in ("SAM", "GSAM")}
            title = f"{wrong} labels, by validation"
            self.summary(title, chosen(self.runs, noise), columns | curvature)
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
