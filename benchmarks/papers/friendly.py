"""What in a perturbation helps: parts of the gradient, radius, batch size, label noise.

    python benchmarks/papers/friendly.py

Four experiments of Li et al. (https://arxiv.org/abs/2403.12350), which they make with
ResNets on CIFAR, here with a multilayer perceptron on scikit-learn's digits:

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
learning rates, by the mean accuracy on validation images, whose labels are right. SGD
at 0.05 is shown beside.
"""

import itertools

import jax
import jax.numpy as jnp

from harness import Experiment, Runs, arguments, cases, setting_of
from loaders import load_digits, split
from training import MLP, PLAIN, decayed_sgd, make_trainer

PARTS = ["parts", "radius", "batch", "noise"]
TRAIN, VALIDATION, BATCH_SIZE = 700, 300, 64
RATE = 0.05  # the paper's
RATES = [RATE, 0.2, 0.025, 0.0125, 0.006, 0.003]  # SGD's choice
RHOS = [0.05, 0.1, 0.2, 0.4, 0.6, 0.8]
NOISES = [0, 20, 40, 60, 80]  # % of the labels
BATCH_SIZES = [16, 64, 256, 700]
PARTS_NOISES = [0, 40]
MODEL = MLP((256, 256, 10))


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
    def ascent_batch(loss_fn, params, key, index, x, y):
        more = others(key, index, x, (k - 1) * len(index))
        larger = jnp.concatenate([index, more])
        return {"ascent_batch": (x[larger], y[larger])}

    return ascent_batch


# Variant -> its label, the method of the library, and further arguments of its steps.
VARIANTS = {
    "sgd": ("SGD", PLAIN, None),
    "sam": ("SAM", "sam", None),
    "fsam": ("F-SAM", "fsam", None),
    "sam_full": ("SAM-full", "sam_full", full_gradient),
    "sam_noise": ("SAM-noise", "sam_noise", full_gradient),
    "sam_db": ("SAM-db", "sam", another_batch),
    "2x": ("ascent batch 2×", "sam", larger_batch(2)),
    "4x": ("ascent batch 4×", "sam", larger_batch(4)),
    "8x": ("ascent batch 8×", "sam", larger_batch(8)),
}
LABELS = {variant: label for variant, (label, *_) in VARIANTS.items()}
ABLATIONS = [variant for variant in VARIANTS if variant != "fsam"]
COMPARED = ["sgd", "sam", "fsam"]  # who is in the other three parts


def train(method, hyper, noise, seed, epochs, size=BATCH_SIZE, **options) -> tuple:
    """Accuracies on validation and test images, state, reports, training images.

    Of the training labels, `noise` % are random.
    """
    base = decayed_sgd(epochs * (TRAIN // size))
    trainer = make_trainer(MODEL, method, base, size, **options)
    images, *parts = split(*load_digits(), (TRAIN, VALIDATION), seed, noise)
    state, reports = trainer.fit(hyper, seed, images, epochs)
    return *trainer.accuracies(state, *parts), state, reports, images


class Friendly(Experiment):
    options = arguments(
        parts=(PARTS, ["radius"], "experiments to make"),
        seeds=(5, 2, "trainings of each setting"),
        epochs=(60, 2, "passes over the training images"),
        settings=(6, 1, "radii, or learning rates of SGD, to choose from"),
    )

    def plan(self):
        parts, count, pairs = self.args.parts, self.args.settings, []
        if set(parts) - {"parts"}:
            noises = NOISES if "noise" in parts else PARTS_NOISES
            pairs += itertools.product(COMPARED, noises)
        if "parts" in parts:
            pairs += itertools.product(ABLATIONS, PARTS_NOISES)
        for variant, noise in dict.fromkeys(pairs):
            rates, rhos = [RATE], RHOS[:count]
            if variant == "sgd":
                rates, rhos = RATES[:count], [None]
            for rate, rho in itertools.product(rates, rhos):
                yield from self.cases(variant, noise, [BATCH_SIZE], rate, rho)
        if "batch" in parts:
            sizes = [size for size in BATCH_SIZES if size != BATCH_SIZE]
            for variant, noise in itertools.product(COMPARED, PARTS_NOISES):
                setting = self.batch_setting(variant, noise)  # of the usual batch size
                rate, rho = setting["learning_rate"], setting.get("rho")
                yield from self.cases(variant, noise, sizes, rate, rho)

    def cases(self, variant, noise, sizes, rate, rho):
        case = {"variant": variant, "noise_percent": noise}
        case |= {"learning_rate": rate, "rho": rho}
        for more in cases(batch_size=sizes, seed=range(self.args.seeds)):
            yield case | more

    def measure(self, variant, noise_percent, batch_size, seed, **setting):
        _, method, more = VARIANTS[variant]
        given = method, setting_of(setting), noise_percent, seed, self.args.epochs
        validation, test, *_ = train(*given, batch_size, arguments=more)
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
        columns = {"rate": "learning_rate", "rho": "rho", "accuracy (%)": ("test", 1)}
        columns["less SAM's"] = ("test", None, "SAM")
        for noise in PARTS_NOISES if "parts" in parts else ():
            groups = {f"SGD, {RATE:g}": untuned.of(noise_percent=noise)}
            groups |= {LABELS[v]: self.chosen(v, noise) for v in ABLATIONS}
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
