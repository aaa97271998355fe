"""The gradient at w and that at w + ε along a training with SAM: norms and alignment.

    python benchmarks/papers/norms.py

Figures 1 and 3 of Tan et al., "Stabilizing Sharpness-aware Minimization Through A
Simple Renormalization Strategy" (https://arxiv.org/abs/2401.07250), with its radii
0.01, 0.05 and 0.2: the ratio ‖g‖/‖gᵃ‖, and whether ⟨gᵃ, g⟩ is larger than ‖g‖². The
paper trains a ResNet-18 on CIFAR-100 for 200 epochs; here it is a multilayer perceptron
and a small LeNet on scikit-learn's digits, with the paper's other settings but the
smoothing of labels: batches of 128, momentum 0.9, weight decay 5e-4, learning rate 0.1
with a cosine decay.
"""

import functools
import itertools
import math
from typing import ClassVar

import numpy as np
from flax import linen as nn

from harness import Experiment, cases, describe
from loaders import load_digits, split
from training import MLP, Trainer, decayed_sgd, make_trainer

RHOS = [0.01, 0.05, 0.2]
TRAIN, BATCH_SIZE, LEARNING_RATE = 1000, 128, 0.1
# Which epochs a mean is over, as shares of all.
STAGES = {"first tenth": (0, 0.1), "middle": (0.45, 0.55), "last tenth": (0.9, 1)}
TITLES = {
    "ratio": "‖g‖ / ‖gᵃ‖",
    "product_over_square": "⟨gᵃ, g⟩ / ‖g‖²",
    "larger_percent": "steps with ⟨gᵃ, g⟩ > ‖g‖² (%)",
}


class LeNet(nn.Module):
    """Two convolutions and three dense layers, for small square images as rows."""

    @nn.compact
    def __call__(self, x):
        side = math.isqrt(x.shape[-1])
        x = x.reshape(-1, side, side, 1)
        for features in (6, 16):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return MLP((120, 84, 10))(x.reshape(len(x), -1))


NETWORKS = {"MLP": MLP((256, 256, 10)), "LeNet": LeNet()}


@functools.cache
def trainer_of(network: str, epochs: int) -> Trainer:
    base = decayed_sgd(epochs * (TRAIN // BATCH_SIZE))
    return make_trainer(NETWORKS[network], "sam", base, BATCH_SIZE)


def summarize(reports: list) -> dict[str, list[float]]:
    """Means over each epoch, of the steps of a batch each."""
    g, ga, cosine = (
        np.array([getattr(report, field) for report in reports])
        for field in ("ascent_norm", "descent_norm", "cosine")
    )
    product = cosine * ga * g
    columns = {
        "ratio": g / ga,
        "product_over_square": product / g**2,  # ⟨gᵃ, g⟩ / ‖g‖²
        "larger_percent": 100 * (product > g**2),
        "norm": g,
    }
    return {key: values.mean(axis=1).tolist() for key, values in columns.items()}


def stage(curve: list[float], part: tuple[float, float]) -> float:
    start, end = (round(share * len(curve)) for share in part)
    return float(np.mean(curve[start : max(end, start + 1)]))


class Norms(Experiment):
    name, doc = "norms", __doc__
    options: ClassVar = {
        "seeds": (5, 2, "trainings with each radius"),
        "epochs": (200, 5, "passes over the training images"),
        "networks": (list(NETWORKS), ["MLP"], "to train"),
    }

    def plan(self):
        return cases(network=self.args.networks, rho=RHOS, seed=range(self.args.seeds))

    def measure(self, network, rho, seed):
        trainer = trainer_of(network, self.args.epochs)
        images, test = split(*load_digits(), (TRAIN,), seed)
        hyper = {"learning_rate": LEARNING_RATE, "rho": rho}
        state, reports = trainer.fit(hyper, seed, images, self.args.epochs)
        (accuracy,) = trainer.accuracies(state, test)
        return {"accuracy_percent": accuracy} | summarize(reports)

    def report(self):
        rows, pairs = [], list(cases(network=self.args.networks, rho=RHOS))
        for pair, key in itertools.product(pairs, TITLES):
            curves, digits = self.runs.column(key, **pair), 1 if "percent" in key else 3
            stages = ([stage(curve, s) for curve in curves] for s in STAGES.values())
            cells = (describe(values, digits) for values in stages)
            rows.append((pair["network"], f"{pair['rho']:g}", TITLES[key], *cells))
        self.table(("network", "rho", "", *STAGES), rows)
        for pair in pairs:
            found = describe(self.runs.column("accuracy_percent", **pair))
            network, rho = pair.values()
            self.print(f"{network}, ρ = {rho:g}: test accuracy {found} %")
        for network, key in itertools.product(self.args.networks, list(TITLES)[:2]):
            mine = self.runs.of(network=network)
            groups = {f"ρ = {rho:g}": mine.of(rho=rho) for rho in RHOS}
            self.draw(f"{network}: {TITLES[key]}", groups, key, yscale="log")


if __name__ == "__main__":
    Norms.main()
