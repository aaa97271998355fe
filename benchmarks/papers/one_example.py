"""Two trainings on sets that differ in one example: how far they drift apart.

    python benchmarks/papers/one_example.py

Section 5.2 and Figures 5 to 7 of Tan et al., "Stabilizing Sharpness-aware Minimization
Through A Simple Renormalization Strategy" (https://arxiv.org/abs/2401.07250): the same
network from the same start, trained with the same order of batches for 60 epochs on S,
and on S with one example replaced. Measured after each epoch are the distance of the
parameters, ‖w − w′‖ / √(‖w‖² + ‖w′‖²), and the generalisation error, test loss less
training loss. SGD without momentum; a constant learning rate (Figure 5), weight decay
(6), or a cosine decay (7).

The paper trains a network with two hidden layers of 500 on MNIST, and does not say its
learning rate, radius and batch size: here 0.1, 0.05 and 0.2, and 50. The default data
are scikit-learn's digits, with 1,000 for training; with --data, MNIST's test set, with
5,000 of its images for training.
"""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from harness import Experiment, cases
from loaders import load_digits, load_mnist_test, split
from training import MLP, PLAIN, Trainer, make_trainer

WIDTHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = (500, 500, 10), 50, 0.1, 5e-4
DIGITS_TRAIN, MNIST_TRAIN = 1000, 5000
METHODS = {
    "SGD": (PLAIN, {}),
    "SAM, ρ = 0.05": ("sam", {"rho": 0.05}),
    "StableSAM, ρ = 0.05": ("stable_sam", {"rho": 0.05}),
    "SAM, ρ = 0.2": ("sam", {"rho": 0.2}),
    "StableSAM, ρ = 0.2": ("stable_sam", {"rho": 0.2}),
}
SCHEDULES = ["constant", "weight decay", "cosine"]
MEASURES = ["distance", "generalisation_error", "accuracy_gap_percent"]


@functools.cache  # the radius is no part of the program
def trainer_of(schedule: str, method: str, steps: int) -> Trainer:
    def make_base(learning_rate):
        if schedule == "weight decay":
            decay = optax.add_decayed_weights(WEIGHT_DECAY)
            return optax.chain(decay, optax.sgd(learning_rate))
        if schedule == "cosine":
            learning_rate = optax.cosine_decay_schedule(learning_rate, steps)
        return optax.sgd(learning_rate)

    return make_trainer(MLP(WIDTHS), method, make_base, BATCH_SIZE)


def two_sets(images, labels, size: int, seed: int):
    """S, S with a random example replaced by one more, and the test images."""
    (x, y), one_more, test = split(images, labels, (size, 1), seed)
    replaced = np.random.default_rng(seed).integers(size)
    other_x, other_y = x.copy(), y.copy()
    other_x[replaced], other_y[replaced] = one_more[0][0], one_more[1][0]
    return (x, y), (other_x, other_y), test


@jax.jit
def distance(w, other):
    squares = optax.tree.norm(w, squared=True) + optax.tree.norm(other, squared=True)
    return optax.tree.norm(jax.tree.map(jnp.subtract, w, other)) / jnp.sqrt(squares)


class OneExample(Experiment):
    name, doc = "one_example", __doc__
    options: ClassVar = {
        "data": (None, None, "directory with MNIST's test set, or else the digits"),
        "methods": (list(METHODS), list(METHODS)[:2], "what to compare with SGD"),
        "schedules": (SCHEDULES, ["constant"], "of the learning rate, or weight decay"),
        "seeds": (5, 2, "pairs of trainings of each method"),
        "epochs": (60, 2, "passes over the training images"),
    }

    def prepare(self):
        self.args.methods = list(dict.fromkeys(["SGD", *self.args.methods]))
        data = self.args.data
        self.data = load_mnist_test(data) if data else load_digits()
        self.size = MNIST_TRAIN if data else DIGITS_TRAIN

    def plan(self):
        schedules, methods = self.args.schedules, self.args.methods
        return cases(schedule=schedules, method=methods, seed=range(self.args.seeds))

    def measure(self, schedule, method, seed):
        """The measures after each epoch; errors are those of the training on S."""
        name, hyper = METHODS[method]
        hyper, key = {"learning_rate": LEARNING_RATE, **hyper}, jax.random.key(seed)
        steps = self.args.epochs * (self.size // BATCH_SIZE)
        trainer = trainer_of(schedule, name, steps)
        first, second, test = two_sets(*self.data, self.size, seed)
        w = other = trainer.init(hyper, key, first[0])
        points = []
        for _ in range(self.args.epochs):
            w, _ = trainer.epoch(w, hyper, key, *first)
            other, _ = trainer.epoch(other, hyper, key, *second)
            loss, accuracy = trainer.evaluate(w, *first)
            test_loss, test_accuracy = trainer.evaluate(w, *test)
            measured = (test_loss - loss, accuracy - test_accuracy, test_accuracy)
            measured = (distance(w.params, other.params), *measured)
            points.append([*map(float, measured)])
        *curves, accuracies = zip(*points, strict=True)
        curves = dict(zip(MEASURES, curves, strict=True))
        ends = {f"last_{key}": curve[-1] for key, curve in curves.items()}
        return {**hyper, **curves, **ends, "test_accuracy_percent": accuracies[-1]}

    def report(self):
        columns = {}
        for key in MEASURES[:2]:
            columns |= {key: (f"last_{key}", 4)}
            columns |= {f"{key} less SGD's": (f"last_{key}", 4, "SGD")}
        columns |= {"test accuracy (%)": ("test_accuracy_percent", 1)}
        for schedule in self.args.schedules:
            mine = self.runs.of(schedule=schedule)
            groups = {name: mine.of(method=name) for name in self.args.methods}
            self.summary(f"{schedule}, after the last epoch", groups, columns)
            for measure in MEASURES[:2]:
                self.draw(schedule, groups, measure)
            for name, group in groups.items():
                sam = name.removeprefix("Stable")
                if sam != name and sam in groups:
                    less = group.less(groups[sam], "last_distance")
                    self.print(f"distance, {schedule}: {name} less SAM: {less}")
        self.print("Differences: mean and 95 % interval over seeds.")


if __name__ == "__main__":
    OneExample.main()
