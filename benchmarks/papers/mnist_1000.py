"""SGD, SAM, Adam and others on 1,000 images of MNIST: losses and generalisation gap.

    python benchmarks/papers/mnist_1000.py --data DIRECTORY

This measures section 2.3.2 of Liu, Chen and Shi, "Sharpness-Aware Minimization for
Efficiently Improving Generalization: A Review", again, with its network, and as many
gradients for every method. The review does not say its learning rates and radius. Here
each method chooses among six settings by its loss on validation images, and then runs
on new seeds. Beside them run SGD, SAM and Adam with usual settings.

All images come from MNIST's test set, of which DIRECTORY has the files. 8,000 of them
are for the test. The other 2,000 are divided anew for each seed: 1,000 to train on, and
1,000 for validation.
"""

import itertools
from typing import NamedTuple

import optax

import sam_optax
from harness import Experiment, Runs, arguments, setting_of, tuned
from loaders import DataError, load_mnist_test, split
from training import MLP, PLAIN, make_trainer

WIDTHS, BATCH_SIZE = (500, 300, 10), 10
TRAIN, VALIDATION = 1000, 1000
COLUMNS = ("gradients", "train_loss", "loss", "gap", "accuracy_percent")

SGD_RATES = [0.001, 0.002, 0.003, 0.01, 0.03, 0.1]
ADAM_RATES = [1e-5, 3e-5, 5e-5, 1e-4, 3e-4, 1e-3]
SAM_RATES, RHOS = [0.003, 0.01], [0.05, 0.15, 0.5]


class Method(NamedTuple):
    """A method of the library on a base optimizer, and the settings to choose from."""

    name: str
    rates: list[float]
    rhos: list | None = None
    make_base: optax.GradientTransformation = optax.sgd

    def settings(self) -> list[dict]:
        pairs = itertools.product(self.rates, self.rhos or [None])
        return [{"learning_rate": rate, "rho": rho} for rate, rho in pairs]

    def gradients_per_epoch(self) -> int:
        plain = self.name == PLAIN
        gradients = 1 if plain else int(sam_optax.METHODS[self.name].gradients())
        return TRAIN // BATCH_SIZE * gradients


METHODS = {
    "SGD": Method(PLAIN, SGD_RATES),
    "SAM": Method("sam", SAM_RATES, RHOS),
    "F-SAM": Method("fsam", SAM_RATES, RHOS),
    "GSAM": Method("gsam", SAM_RATES, RHOS),
    "StableSAM": Method("stable_sam", SAM_RATES, RHOS),
    "Adam": Method(PLAIN, ADAM_RATES, None, optax.adam),
    "Adam + SAM": Method("sam", [3e-5, 1e-4], RHOS, optax.adam),
    # What one would try first, and with SGD and SAM at one learning rate.
    "SGD, usual": Method(PLAIN, [0.1]),
    "SAM, usual": Method("sam", [0.1], [0.05]),
    "Adam, usual": Method(PLAIN, [1e-3], None, optax.adam),
}


def counterpart(name: str) -> str:
    """What a method is compared with."""
    return "SGD, usual" if name.endswith("usual") else "SGD"


class Mnist1000(Experiment):
    options = arguments(
        data=(None, None, "directory of MNIST's files", {"required": True}),
        methods=(list(METHODS), ["SGD", "SAM"], "which to train"),
        seeds=(5, 1, "trainings of each method, with the setting it chose"),
        tuning_seeds=(1, 1, "trainings of each setting, for the choice"),
        settings=(6, 2, "settings to choose from, at most"),
        gradients=(15000, 200, "gradient computations of each training"),
    )

    def prepare(self):
        methods = [*map(counterpart, self.args.methods), *self.args.methods]
        self.args.methods = list(dict.fromkeys(methods))
        needed = max(METHODS[name].gradients_per_epoch() for name in methods)
        if self.args.gradients < needed:
            raise DataError(f"argument --gradients: one epoch takes {needed}")
        self.data = load_mnist_test(self.args.data)

    def plan(self):
        seeds = self.args.tuning_seeds, self.args.seeds
        for name in self.args.methods:
            settings = METHODS[name].settings()[: self.args.settings]
            by = {"by": "loss", "sign": -1}
            yield from tuned(self.runs, {"method": name}, settings, *seeds, **by)

    def measure(self, method, on, seed, **setting):
        """A training with its losses and gap on a part of the data, "on"."""
        name, *_, base = METHODS[method]
        trainer = make_trainer(MLP(WIDTHS), name, base, BATCH_SIZE)
        images, validation, test = split(*self.data, (TRAIN, VALIDATION), seed)
        examples = validation if on == "validation" else test
        gradients = METHODS[method].gradients_per_epoch()
        count = self.args.gradients // gradients
        every = max(1, count // 10) if on == "test" else count
        epochs = trainer.epochs(setting_of(setting), seed, images, count)
        points = []
        for epoch, (state, _) in enumerate(epochs, 1):
            if epoch % every == 0 or epoch == count:
                train_loss, _ = trainer.evaluate(state, *images)
                loss, accuracy = trainer.evaluate(state, *examples)
                point = (train_loss, loss, loss - train_loss, accuracy)
                points.append([epoch * gradients, *map(float, point)])
        curve = dict(zip(COLUMNS, zip(*points, strict=True), strict=True))
        return {key: values[-1] for key, values in curve.items()} | {"curve": curve}

    def report(self):
        groups = self.runs.of(on="test").by("method")
        for name, group in groups.items():
            for run, sgd in zip(group, groups[counterpart(name)], strict=True):
                run["gap_ratio"] = run["gap"] / sgd["gap"]
        columns = {
            "learning rate": "learning_rate",
            "rho": "rho",
            "train loss": ("train_loss", 3),
            "test loss": ("loss", 3),
            "lowest": lambda group: f"{min(group.column('loss')):.3f}",
            "gap": ("gap", 3),
            "gap / SGD's": ("gap_ratio", 2),
            "accuracy (%)": ("accuracy_percent", 1),
        }
        self.summary("method", groups, columns)
        for (name, group), key in itertools.product(groups.items(), COLUMNS[2:]):
            if (sgd := counterpart(name)) != name:
                pairs = group.less(groups[sgd], key)
                self.print(f"{key} of {name} less that of {sgd}: {pairs}")
        curves = {name: Runs(g.column("curve")) for name, g in groups.items()}
        for key in COLUMNS[1:4]:
            self.draw("tenths of the training", curves, key)


if __name__ == "__main__":
    Mnist1000.main()
