"""The gradient at w and that at w + ε along a training with SAM: norms and alignment.

    python benchmarks/papers/norms.py

This measures Figures 1 and 3 of Tan et al. (https://arxiv.org/abs/2401.07250) again,
with their radii and all other settings but the smoothing of labels. They train a
ResNet-18 on CIFAR-100. The networks here are a multilayer perceptron and a small LeNet,
on scikit-learn's digits.
"""

import itertools
import math

import numpy as np
from flax import linen as nn

from harness import Experiment, arguments, cases, describe
from loaders import load_digits, split
from training import MLP, decayed_sgd, make_trainer

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


def stage(curve: list[float], part: tuple[float, float]) -> float:
    start, end = (round(share * len(curve)) for share in part)
    return float(np.mean(curve[start : max(end, start + 1)]))


class Norms(Experiment):
    options = arguments(
        seeds=(5, 2, "trainings with each radius"),
        epochs=(200, 5, "passes over the training images"),
        networks=(list(NETWORKS), ["MLP"], "to train"),
    )

    def plan(self):
        return cases(network=self.args.networks, rho=RHOS, seed=range(self.args.seeds))

    def measure(self, network, rho, seed):
        """The accuracy, and means over the steps of each epoch."""
        base = decayed_sgd(self.args.epochs * (TRAIN // BATCH_SIZE))
        trainer = make_trainer(NETWORKS[network], "sam", base, BATCH_SIZE)
        images, test = split(*load_digits(), (TRAIN,), seed)
        hyper = {"learning_rate": LEARNING_RATE, "rho": rho}
        state, reports = trainer.fit(hyper, seed, images, self.args.epochs)
        g, ga, cosine = (
            np.array([getattr(report, field) for report in reports])
            for field in ("ascent_norm", "descent_norm", "cosine")
        )
        product = cosine * ga * g  # ⟨gᵃ, g⟩
        larger = 100 * (product > g**2)
        columns = dict(zip(TITLES, (g / ga, product / g**2, larger), strict=True))
        run = {k: v.mean(axis=1).tolist() for k, v in (columns | {"norm": g}).items()}
        return {"accuracy_percent": trainer.accuracies(state, test)[0]} | run

    def report(self):
        rows = []
        for pair in cases(network=self.args.networks, rho=RHOS):
            mine, (network, rho) = self.runs.of(**pair), pair.values()
            for key, title in TITLES.items():
                curves, digits = mine.column(key), 1 if "percent" in key else 3
                stages = ([stage(c, part) for c in curves] for part in STAGES.values())
                cells = (describe(values, digits) for values in stages)
                rows.append((network, f"{rho:g}", title, *cells))
            found = describe(mine.column("accuracy_percent"))
            self.print(f"{network}, ρ = {rho:g}: test accuracy {found} %")
        self.table(("network", "rho", "", *STAGES), rows)
        for network, key in itertools.product(self.args.networks, list(TITLES)[:2]):
            groups = self.runs.of(network=network).by("rho", RHOS)
            self.draw(f"{network}: {TITLES[key]}, by ρ", groups, key, yscale="log")


if __name__ == "__main__":
    Norms.main()
