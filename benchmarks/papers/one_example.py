"""Two trainings on sets that differ in one example: how far they drift apart.

    python benchmarks/papers/one_example.py

Section 5.2 and Figures 5 to 7 of Tan et al. (https://arxiv.org/abs/2401.07250) train
the same network from the same start, with the same order of batches, on S, and on S
with one example replaced. After each epoch we measure the distance of the parameters,
‖w − w′‖ / √(‖w‖² + ‖w′‖²), and the generalisation error, test loss less training loss.
The optimizer is SGD without momentum, with a constant learning rate (Figure 5), weight
decay (6), or a cosine decay (7). The paper trains on MNIST. Here --data trains on 5,000
images of its test set; without it, on 1,000 of scikit-learn's digits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from harness import Experiment, arguments, cases
from loaders import load_digits, load_mnist_test, split
from training import MLP, PLAIN, make_trainer

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


@functools.cache  # so that the same base has the same trainer
def base_of(schedule: str, steps: int):
    if schedule == "weight decay":
        decay = optax.add_decayed_weights(WEIGHT_DECAY)
        return lambda rate: optax.chain(decay, optax.sgd(rate))
    if schedule == "cosine":
        return lambda rate: optax.sgd(optax.cosine_decay_schedule(rate, steps))
    return optax.sgd


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
    options = arguments(
        data=(None, None, "directory with MNIST's test set, or else the digits"),
        methods=(list(METHODS), list(METHODS)[:2], "what to compare with SGD"),
        schedules=(SCHEDULES, ["constant"], "of the learning rate, or weight decay"),
        seeds=(5, 2, "pairs of trainings of each method"),
        epochs=(60, 2, "passes over the training images"),
    )

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
        (name, hyper), epochs = METHODS[method], self.args.epochs
        hyper = {"learning_rate": LEARNING_RATE, **hyper}
        base = base_of(schedule, epochs * (self.size // BATCH_SIZE))
        trainer = make_trainer(MLP(WIDTHS), name, base, BATCH_SIZE)
        *sets, test = two_sets(*self.data, self.size, seed)
        both = (trainer.epochs(hyper, seed, images, epochs) for images in sets)
        points = []
        for (w, _), (other, _) in zip(*both, strict=True):
            loss, accuracy = trainer.evaluate(w, *sets[0])
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
        for schedule, mine in self.runs.by("schedule").items():
            groups = mine.by("method")
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
