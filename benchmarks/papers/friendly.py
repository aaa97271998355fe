"""What in a perturbation helps: parts of the gradient, radius, batch size, label noise.

    python benchmarks/papers/friendly.py

Four experiments of Li et al., "Friendly Sharpness-Aware Minimization"
(https://arxiv.org/abs/2403.12350), which it makes with ResNets on CIFAR, here with a
multilayer perceptron on scikit-learn's digits:

  parts   Figure 2: SAM, and SAM with its perturbation from the part of the gradient
          along the full gradient (SAM-full), from the rest of it (SAM-noise), from
          another batch (SAM-db), and from a batch of k times the size that contains
          the batch.
  radius  Figure 3: SAM and F-SAM as the radius grows.
  batch   Figure 4: SGD, SAM and F-SAM as the batch grows, with nothing else changed,
          and one radius for both.
  noise   Table 6: SGD, SAM and F-SAM as more labels are replaced by random ones.

As in the paper: SGD with momentum 0.9, weight decay 5e-4 and a cosine decay of the
learning rate from 0.05. SAM and its kin choose among six radii, and SGD among six
learning rates, by the mean accuracy on 300 validation images, whose labels are right.
SGD at 0.05 is shown beside.
Training is on 700 images and the test on 797, the same for every seed.
"""

import functools
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from harness import Experiment, Runs, cases, setting_of
from loaders import load_digits, split
from training import MLP, PLAIN, Trainer, decayed_sgd, make_trainer

PARTS = ["parts", "radius", "batch", "noise"]
TRAIN, VALIDATION, BATCH_SIZE = 700, 300, 64
RATE = 0.05  # the paper's
RATES = [RATE, 0.2, 0.025, 0.0125, 0.006, 0.003]  # SGD's choice
RHOS = [0.05, 0.1, 0.2, 0.4, 0.6, 0.8]
NOISES = [0, 20, 40, 60, 80]  # % of the labels
BATCH_SIZES = [16, 64, 256, 700]
PARTS_NOISES = [0, 40]
MODEL = MLP((256, 256, 10))
LABELS = {"sgd": "SGD", "sam": "SAM", "fsam": "F-SAM", "sam_full": "SAM-full"}
LABELS |= {"sam_noise": "SAM-noise", "sam_db": "SAM-db"}
LABELS |= {f"{k}x": f"ascent batch {k}×" for k in (2, 4, 8)}


def others(key, index, x, count: int):
    """Indices of `count` random examples that are not in the batch."""
    scores = jax.random.uniform(key, (len(x),)).at[index].set(2.0)
    return jnp.argsort(scores)[:count]


def full_gradient(loss_fn, params, key, index, x, y):
    return {"extra_args": {"full_gradient": jax.grad(loss_fn)(params, x, y)}}


def another_batch(loss_fn, params, key, index, x, y):
    other = others(key, index, x, len(index))
    return {"ascent_batch": (x[other], y[other])}


def larger_batch(k: int):
    def arguments(loss_fn, params, key, index, x, y):
        more = others(key, index, x, (k - 1) * len(index))
        larger = jnp.concatenate([index, more])
        return {"ascent_batch": (x[larger], y[larger])}

    return arguments


# Variant -> method of the library, and the further arguments of its steps.
VARIANTS = {
    "sgd": (PLAIN, None),
    "sam": ("sam", None),
    "fsam": ("fsam", None),
    "sam_full": ("sam_full", full_gradient),
    "sam_noise": ("sam_noise", full_gradient),
    "sam_db": ("sam", another_batch),
    "2x": ("sam", larger_batch(2)),
    "4x": ("sam", larger_batch(4)),
    "8x": ("sam", larger_batch(8)),
}
ABLATIONS = [variant for variant in VARIANTS if variant != "fsam"]
COMPARED = ["sgd", "sam", "fsam"]  # who is in the other three parts


@functools.cache
def trainer_of(method: str, epochs: int, size: int, **options: Any) -> Trainer:
    make_base = decayed_sgd(epochs * (TRAIN // size))
    return make_trainer(MODEL, method, make_base, size, **options)


def train(method, hyper, noise, seed, epochs, size=BATCH_SIZE, **options) -> tuple:
    """Accuracies on validation and test images, state, reports, training images.

    Of the training labels, `noise` % are random.
    """
    trainer = trainer_of(method, epochs, size, **options)
    images, *parts = split(*load_digits(), (TRAIN, VALIDATION), seed, noise)
    state, reports = trainer.fit(hyper, seed, images, epochs)
    return *trainer.accuracies(state, *parts), state, reports, images


class Friendly(Experiment):
    name, doc = "friendly", __doc__
    options: ClassVar = {
        "parts": (PARTS, ["radius"], "experiments to make"),
        "seeds": (5, 2, "trainings of each setting"),
        "epochs": (60, 2, "passes over the training images"),
        "settings": (6, 1, "radii, or learning rates of SGD, to choose from"),
    }

    def plan(self):
        parts, count, pairs = set(self.args.parts), self.args.settings, []
        if parts - {"parts"}:
            noises = NOISES if "noise" in parts else PARTS_NOISES
            pairs += itertools.product(COMPARED, noises)
        if "parts" in parts:
            pairs += itertools.product(ABLATIONS, PARTS_NOISES)
        for pair in dict.fromkeys(pairs):
            rates, rhos = [RATE], RHOS[:count]
            if pair[0] == "sgd":
                rates, rhos = RATES[:count], [None]
            yield from self.cases(*pair, [BATCH_SIZE], rates, rhos)
        sizes = [size for size in BATCH_SIZES if size != BATCH_SIZE]
        for pair in (
            itertools.product(COMPARED, PARTS_NOISES) if "batch" in parts else ()
        ):
            setting = self.batch_setting(*pair)  # that of the usual batch size
            rates, rhos = [setting["learning_rate"]], [setting.get("rho")]
            yield from self.cases(*pair, sizes, rates, rhos)

    def cases(self, variant, noise, sizes, rates, rhos):
        case = {"variant": [variant], "noise_percent": [noise], "batch_size": sizes}
        seeds = range(self.args.seeds)
        return cases(**case, learning_rate=rates, rho=rhos, seed=seeds)

    def measure(self, variant, noise_percent, batch_size, seed, **setting):
        method, arguments = VARIANTS[variant]
        options = {"size": batch_size, "arguments": arguments}
        options["epochs"] = self.args.epochs
        hyper = setting_of(setting)
        validation, test, *_ = train(method, hyper, noise_percent, seed, **options)
        return {"validation": validation, "test": test}

    def chosen(self, variant: str, noise: float) -> Runs:
        """Those with the setting of the best mean accuracy on validation images."""
        case = {"variant": variant, "noise_percent": noise, "batch_size": BATCH_SIZE}
        return self.runs.of(**case).best("validation", "learning_rate", "rho")

    def batch_setting(self, variant: str, noise: float) -> dict[str, float]:
        """What `batch` keeps for all sizes: F-SAM has SAM's radius, as in the paper."""
        chosen = self.chosen("sam" if variant == "fsam" else variant, noise)
        return setting_of(chosen[0])

    def report(self):
        parts, usual = self.args.parts, self.runs.of(batch_size=BATCH_SIZE)
        untuned = usual.of(variant="sgd", learning_rate=RATE)
        for noise in PARTS_NOISES if "parts" in parts else ():
            groups = {f"SGD, {RATE:g}": untuned.of(noise_percent=noise)}
            groups |= {LABELS[v]: self.chosen(v, noise) for v in ABLATIONS}
            columns = {
                "rate": "learning_rate",
                "rho": "rho",
                "accuracy (%)": ("test", 1),
            }
            columns["less SAM's"] = ("test", None, "SAM")
            self.summary(f"parts, {noise} % noise", groups, columns)
        for noise in PARTS_NOISES if "radius" in parts else ():
            mine = usual.of(noise_percent=noise)
            groups = {LABELS[v]: mine.of(variant=v) for v in COMPARED[1:]}
            self.pivot(f"radius, {noise} % noise", groups, "test", "rho")
        for noise in PARTS_NOISES if "batch" in parts else ():
            groups = {}
            for v in COMPARED:
                setting = self.batch_setting(v, noise)
                mine = self.runs.of(variant=v, noise_percent=noise, **setting)
                groups[f"{LABELS[v]}, {setting}"] = mine
            title = f"batch size, {noise} % noise"
            self.pivot(title, groups, "test", "batch_size", xscale="log")
        if "noise" in parts:
            groups = {f"SGD, {RATE:g}": untuned}
            for v in COMPARED:
                chosen = itertools.chain(*(self.chosen(v, noise) for noise in NOISES))
                groups[LABELS[v]] = Runs(chosen)
            self.pivot("labels replaced (%)", groups, "test", "noise_percent")
            for noise in NOISES:
                fsam, sam = (self.chosen(v, noise) for v in ("fsam", "sam"))
                self.print(f"F-SAM less SAM at {noise} %: {fsam.less(sam, 'test')}")


if __name__ == "__main__":
    Friendly.main()
