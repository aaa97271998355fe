"""What the papers of newer methods claim: flatness, calibration, rare classes.

    python benchmarks/papers/newer_methods.py

trains a multilayer perceptron on scikit-learn's digits, and looks at what each paper
says its method improves:

  flatness     GAM (https://arxiv.org/abs/2303.03108) and Eigen-SAM
               (https://arxiv.org/abs/2501.12666): the norm of the gradient over the
               training images at the end, and the largest within 0.2 of it; the leading
               eigenvalue of the Hessian. Eigen-SAM is also trained with what SAM chose.
  low-pass     LPF-SGD (https://arxiv.org/abs/2201.08025) and Entropy-SGD
               (https://arxiv.org/abs/1611.01838), which the paper of StableSAM compares
               with it: accuracy. `lpf_sgd_8` draws noise for each 8 images of a batch.
  calibration  bSAM (https://arxiv.org/abs/2210.01620): the negative log-likelihood and
               the expected calibration error on test images, of its mean and of the
               mean prediction over draws from its posterior (`bsam_mean`).
  rare         ImbSAM (https://arxiv.org/abs/2308.07815) and Focal-SAM
               (https://arxiv.org/abs/2505.01660): accuracy where the most frequent
               class has 50 images and the rarest one 2. The classes are put into
               another order for each seed. Accuracy is the mean over the classes, of
               all ten and of the five rare ones.

As in which_method.py, every method chooses among eight settings by its accuracy on
validation images, whose labels are right, and is then tested on new seeds. The base
optimizer is SGD with momentum 0.9, weight decay 5e-4 and a cosine decay of the learning
rate; for `adam` it is AdamW.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sam_optax
import which_method
from harness import Experiment, Runs, arguments, cases, setting_of, tuned
from loaders import load_digits, split
from sam_optax import sharpness
from training import MLP, PLAIN, Trainer, decayed_sgd, losses_of, make_trainer

TRAIN, VALIDATION, BATCH_SIZE = 700, 300, 64
MODEL = MLP((128, 128, 10))
# Images of each class where classes are rare, and of which classes they are the rare.
COUNTS = tuple(round(50 * 20 ** (-i / 9)) for i in range(10))
RARE, RARE_BATCH_SIZE = 5, 32
NEAR, CLIMBS = 0.2, 5  # where the largest norm of the gradient is looked for, and how
AS_SAM = "test with SAM's setting"
DRAWS, BINS = 32, 15  # of the posterior; of the calibration error

# --- Methods --------------------------------------------------------------------------


@functools.cache
def decayed(steps: int) -> Callable[[Any], Any]:
    return lambda learning_rate: optax.cosine_decay_schedule(learning_rate, steps)


@functools.cache
def decayed_adamw(steps: int) -> Callable[[Any], Any]:
    return lambda learning_rate: optax.adamw(
        optax.cosine_decay_schedule(learning_rate, steps), weight_decay=5e-4
    )


def bsam(schedule, hyper: dict) -> tuple:
    """It takes a learning rate in the place of a base optimizer."""
    return sam_optax.bsam(schedule, TRAIN, **hyper)


@functools.cache
def entropy_sgd(walk_rate: float) -> Callable[..., tuple]:
    """With d = w − μ, as in the authors' code."""

    def make(base, hyper):
        sam = sam_optax.entropy_sgd(walk_rate=walk_rate, as_released=True, **hyper)
        return sam, optax.chain(sam, base)

    return make


class Entry(NamedTuple):
    """A line of the tables."""

    method: Any = "sam"  # as in `make_step`
    make_base: Callable[[int], Callable[[Any], Any]] = decayed_sgd
    rates: tuple[float, ...] = (0.1, 0.025)
    rhos: tuple[float | None, ...] = (0.06, 0.12, 0.25, 0.5)
    m: int | None = None
    rule: sam_optax.data.DataRule | None = None
    draws: bool = False  # whether it takes a key
    walks: bool = False  # whether rho is the learning rate of Entropy-SGD's walk

    def settings(self) -> list[dict]:
        pairs = itertools.product(self.rhos, self.rates)
        return [{"learning_rate": rate, "rho": rho} for rho, rate in pairs]

    def hyper(self, setting: dict, key: jax.Array) -> dict:
        more: dict = {"key": jax.random.fold_in(key, 1)} if self.draws else {}
        numbers = setting_of(setting)
        if self.walks:
            del numbers["rho"]
        return numbers | more

    def trainer(self, setting: dict, steps: int, batch_size: int) -> Trainer:
        base = self.make_base(steps)
        method = self.method(setting["rho"]) if self.walks else self.method
        options = {"m": self.m, "data": self.rule, "watch": which_method.ASCENDED}
        return make_trainer(MODEL, method, base, batch_size, **options)


def as_there(name: str, **more: Any) -> Entry:
    """With the radii of which_method.py."""
    unit = which_method.UNITS.get(name, 1)
    rhos = tuple(unit * rho for rho in which_method.RHOS)
    return Entry(name, rhos=rhos, **more)


ADAM_RATES = (3e-3, 1e-3, 1e-2, 3e-4, 2e-3, 5e-3, 2e-2, 3e-2)
WALKS = (0.05, 0.1, 0.2, 0.4)  # learning rates of Entropy-SGD's walk
WALKING = {"draws": True, "walks": True}
WEIGHTS = sam_optax.data.focal_weights(COUNTS)
ENTRIES = {
    "sgd": Entry(PLAIN, rates=tuple(which_method.SGD_RATES), rhos=(None,)),
    "adam": Entry(PLAIN, decayed_adamw, ADAM_RATES, (None,)),
    "sam": Entry(),
    "gam": as_there("gam"),
    "eigen_sam": as_there("eigen_sam", draws=True),
    "stable_sam": as_there("stable_sam"),
    "lpf_sgd": as_there("lpf_sgd", draws=True),
    "lpf_sgd_8": as_there("lpf_sgd", m=8, draws=True),
    "entropy_sgd": Entry(entropy_sgd, rates=(0.4, 0.05), rhos=WALKS, **WALKING),
    "bsam": Entry(bsam, decayed, (0.3, 0.1), (0.01, 0.03, 0.1, 0.3), draws=True),
}
RARE_ENTRIES = {
    "sgd": ENTRIES["sgd"],
    "sam": ENTRIES["sam"],
    "imb_sam": Entry(rule=sam_optax.data.imb_sam(lambda x, y: y >= RARE)),
    "focal_sam": Entry(rule=sam_optax.data.focal_sam(lambda x, y: WEIGHTS[y])),
}

# --- Data and measures ----------------------------------------------------------------


def rare_digits(seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Classes in an order of the seed, of which the last ones are rare in training."""
    (x, y), *others = split(*load_digits(), (TRAIN, VALIDATION), seed)
    order = np.random.default_rng(seed).permutation(10).astype(np.int32)
    y = order[y]
    kept = [np.flatnonzero(y == i)[:count] for i, count in enumerate(COUNTS)]
    kept = np.concatenate(kept)
    return [(x[kept], y[kept]), *((x, order[y]) for x, y in others)]


def mean_loss(params, x, y):
    return losses_of(MODEL, params, x, y)[0].mean()


@jax.jit
def largest_norm_nearby(params, x, y):
    """The parameters within NEAR at which ascent of the gradient's norm finds most."""

    def norm(params):
        return optax.tree.norm(jax.grad(mean_loss)(params, x, y))

    def climb(place, _):
        rise = jax.grad(norm)(place)
        step = NEAR / optax.tree.norm(rise)
        place = jax.tree.map(lambda w, g: w + step * g, params, rise)
        return place, (place, norm(place))

    _, (places, norms) = jax.lax.scan(climb, params, length=CLIMBS)
    return jax.tree.map(lambda leaf: leaf[jnp.argmax(norms)], places)


def flatness(params, x, y) -> dict[str, float]:
    near = largest_norm_nearby(params, x, y)
    pairs = sharpness.eigenpairs(sharpness.hessian(mean_loss, params, (x, y)))
    return {
        "loss": float(mean_loss(params, x, y)),
        "norm": float(sharpness.gradient_norm(mean_loss, params, (x, y))),
        "norm_nearby": float(sharpness.gradient_norm(mean_loss, near, (x, y))),
        "eigenvalue": float(pairs.values[0]),
    }


def calibration(probabilities, y) -> dict[str, float]:
    """Accuracy in %, negative log-likelihood, and expected calibration error in %."""
    probabilities = np.asarray(probabilities, np.float64)
    sure = probabilities.max(1)
    right = probabilities.argmax(1) == y
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=right - sure, minlength=BINS)
    likelihoods = probabilities[np.arange(len(y)), y]
    return {
        "test": 100 * float(right.mean()),
        "nll": float(-np.log(np.maximum(likelihoods, 1e-12)).mean()),
        "ece": 100 * float(np.abs(gaps).sum() / len(y)),
    }


def predictions(params, x):
    return jax.nn.softmax(MODEL.apply(params, x))


def mean_prediction(state, x, key):
    """Over draws from bSAM's posterior."""
    draws = sam_optax.methods.draw_from_bsam(
        state.opt_state, state.params, examples=TRAIN, key=key, draws=DRAWS
    )
    return jnp.mean(jax.vmap(predictions, (0, None))(draws, x), 0)


def recalls(params, x, y) -> dict[str, float]:
    """Mean accuracy over the classes, in %: of all, and of the rare ones."""
    right = np.asarray(predictions(params, x)).argmax(1) == y
    found = [100 * right[y == i].mean() for i in range(10)]
    return {"test": float(np.mean(found)), "rare": float(np.mean(found[RARE:]))}


# --- The experiment -------------------------------------------------------------------


class NewerMethods(Experiment):
    same = ("tuning_seeds", "settings", "steps")
    options = arguments(
        parts=(["usual", "rare"], None, "data: all classes alike, or some rare"),
        methods=(list(ENTRIES), ["sgd", "bsam"], "which to train on the usual data"),
        seeds=(10, 2, "trainings of each method, with the setting it chose"),
        tuning_seeds=(2, 1, "trainings of each setting, for the choice"),
        settings=(8, 2, "settings to choose from, at most"),
        steps=(600, 20, "of each training, and up to a whole epoch"),
    )

    def plan(self):
        parts, seeds = self.args.parts, (self.args.tuning_seeds, self.args.seeds)
        lines = []
        if "usual" in parts:
            both = cases(part=["usual"], noise=[0, 40], method=self.args.methods)
            lines += [(case, ENTRIES[case["method"]]) for case in both]
        if "rare" in parts:
            found = RARE_ENTRIES.items()
            lines += [
                ({"part": "rare", "method": name}, entry) for name, entry in found
            ]
        for case, entry in lines:
            settings = entry.settings()[: self.args.settings]
            yield from tuned(self.runs, case, settings, *seeds)
        for run in self.runs.of(part="usual", on="test", method="sam"):
            if "eigen_sam" in self.args.methods:
                same = ("part", "noise", "learning_rate", "rho", "seed")
                case = {key: run[key] for key in same}
                yield case | {"method": "eigen_sam", "on": AS_SAM}

    def measure(self, part, on, method, seed, noise=0, **setting):
        key = jax.random.key(seed)
        is_rare = part == "rare"
        entry = (RARE_ENTRIES if is_rare else ENTRIES)[method]
        if is_rare:
            images, validation, test = rare_digits(seed)
        else:
            images, validation, test = split(
                *load_digits(), (TRAIN, VALIDATION), seed, noise
            )
        batch_size = RARE_BATCH_SIZE if is_rare else BATCH_SIZE
        steps_of_epoch = len(images[1]) // batch_size
        epochs = math.ceil(self.args.steps / steps_of_epoch)
        trainer = entry.trainer(setting, epochs * steps_of_epoch, batch_size)
        state, _ = trainer.fit(entry.hyper(setting, key), seed, images, epochs)
        if is_rare:
            found = {"validation": recalls(state.params, *validation)["test"]}
            return found | recalls(state.params, *test)
        found = {"validation": trainer.accuracies(state, validation)[0]}
        if on == "validation":
            return found
        x, y = test
        found |= calibration(predictions(state.params, x), y)
        found |= flatness(state.params, *images)
        if method == "bsam":
            mean = calibration(mean_prediction(state, x, key), y)
            found |= {f"mean_{name}": value for name, value in mean.items()}
        return found

    def report(self):
        tests = self.runs.of(on="test")
        for noise, runs in tests.of(part="usual").by("noise").items():
            groups = runs.by("method")
            at_same = self.runs.of(on=AS_SAM, noise=noise)
            groups |= {"eigen_sam, as sam": at_same} if at_same else {}
            if "bsam" in groups:
                groups["bsam_mean"] = Runs(map(of_the_mean, groups["bsam"]))
            self.report_usual(f"{noise} % wrong labels", groups)
        groups = tests.of(part="rare").by("method")
        if groups:
            columns = {"test": ("test", 1), "rare": ("rare", 1)}
            columns |= {"less SAM's": ("test", 1, "sam")}
            columns |= {"rare, less SAM's": ("rare", 1, "sam")}
            self.summary("rare classes", groups, chosen() | columns)
            self.draw("rare classes", groups, "test", "seed")

    def report_usual(self, title, groups):
        other = "sam" if "sam" in groups else "sgd"
        columns: dict[str, Any] = {"test": ("test", 1)}
        columns[f"less {other}'s"] = ("test", 1, other)
        for key, digits in (("nll", 3), ("ece", 1)):
            columns[key] = (key, digits)
            columns[f"{key}, less {other}'s"] = (key, digits, other)
        self.summary(title, groups, chosen() | columns)
        trained = {name: g for name, g in groups.items() if "norm" in g[0]}
        columns = {"training loss": ("loss", 4)}
        for key in ("norm", "norm_nearby", "eigenvalue"):
            columns[key] = functools.partial(three_digits, key=key)
            columns[f"{key}, of {other}'s"] = functools.partial(
                ratio, others=groups[other], key=key
            )
        self.summary(title, trained, columns)
        self.draw(title, trained, "eigenvalue", "seed", yscale="log")


def of_the_mean(run: dict) -> dict:
    """A run of bSAM with what its mean prediction reaches."""
    same = ("method", "seed", "learning_rate", "rho")
    mean = {name: run[f"mean_{name}"] for name in ("test", "nll", "ece")}
    return {key: run[key] for key in same} | mean


def chosen() -> dict[str, Any]:
    return {"learning rate": "learning_rate", "rho": "rho"}


def three_digits(group: Runs, key: str) -> str:
    values = group.column(key)
    return f"{np.mean(values):.3g} ± {np.std(values, ddof=1):.2g}"


def ratio(group: Runs, others: Runs, key: str) -> str:
    """The geometric mean over the seeds, and its 95 % interval."""
    logs = [[r | {"log": math.log(r[key])} for r in g] for g in (group, others)]
    mean, _, half, *_ = Runs(logs[0]).less(Runs(logs[1]), "log")
    if group is others:
        return ""
    low, middle, high = (math.exp(x) for x in (mean - half, mean, mean + half))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    NewerMethods.main()
