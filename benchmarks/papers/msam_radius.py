"""Momentum-SAM's best radius, by batch size and by learning rate, beside SAM's.

    python benchmarks/papers/msam_radius.py

This trains a multilayer perceptron on 1,000 digits with 40 % of the labels replaced by
random ones, for 60 epochs without weight decay, and tests on the other 797 images. For
each batch size and learning rate, the table has the accuracy by radius.
"""

import itertools
import math

from harness import Experiment, arguments
from loaders import load_digits, split
from training import MLP, decayed_sgd, make_trainer

TRAIN, NOISE = 1000, 40
METHODS = {
    "sam": ("sam", {}),
    "msam_0": ("msam", {"decay": 0.0}),
    "msam_0.9": ("msam", {"decay": 0.9}),
}
# (batch size, learning rate): one of both varies.
RATES = [(64, 0.0125), (64, 0.05), (64, 0.2)]
BATCHES = [(16, 0.025), (256, 0.1)]
RHOS = [0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8]
LARGEST_OF_SAM = 1.0


class MsamRadius(Experiment):
    same = ("epochs",)
    options = arguments(
        seeds=(2, 1, "trainings of each setting"),
        epochs=(60, 1, "passes over the training images"),
        settings=(5, 1, "pairs of batch size and learning rate, at most"),
    )

    def prepare(self):
        self.data = load_digits()
        self.pairs = [*RATES, *BATCHES][: self.args.settings]

    def plan(self):
        seeds = range(self.args.seeds)
        for (batch_size, rate), name in itertools.product(self.pairs, METHODS):
            pair = {"batch_size": batch_size, "learning_rate": rate}
            for rho, seed in itertools.product(RHOS, seeds):
                if name != "sam" or rho <= LARGEST_OF_SAM:
                    yield pair | {"method": name, "rho": rho, "seed": seed}

    def measure(self, batch_size, learning_rate, method, rho, seed):
        name, more = METHODS[method]
        base = decayed_sgd(self.args.epochs * (TRAIN // batch_size), 0.0)
        trainer = make_trainer(MLP((256, 256, 10)), name, base, batch_size, watch=none)
        images, test = split(*self.data, (TRAIN,), seed, NOISE)
        hyper = {"learning_rate": learning_rate, "rho": rho} | more
        state, _ = trainer.fit(hyper, seed, images, self.args.epochs)
        (accuracy,) = trainer.accuracies(state, test)
        return {"test": accuracy if math.isfinite(accuracy) else 0.0}

    def report(self):
        for batch_size, rate in self.pairs:
            runs = self.runs.of(batch_size=batch_size, learning_rate=rate)
            title = f"batch {batch_size}, learning rate {rate:g}"
            self.pivot(title, runs.by("method"), "test", "rho")


def none(report):
    del report  # all of it would cost a gradient at the parameters
    return ()


if __name__ == "__main__":
    MsamRadius.main()
