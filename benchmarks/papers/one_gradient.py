"""One gradient a step, beyond multilayer perceptrons: does it reach SAM?

    python benchmarks/papers/one_gradient.py --data DIRECTORY

This trains a convolutional network on 3,000 images of CIFAR-10 and on 2,000 of MNIST,
which DIRECTORY holds, with right labels and with 40 % of them replaced by random ones;
and a transformer on 48,000 characters of English, which come with Python. Images are
averaged over 2 x 2 pixels, to train in seconds on a CPU. All trainings go on until the
plain optimizer has converged: SGD with momentum for the images, AdamW for the text.

Every method chooses among its settings by the accuracy on validation data with right
labels, and is then tested on new seeds. Settings are learning rates times radii, or for
`base_decay` learning rates times weight decays. `base` is the plain optimizer, and
`base_twice` that for twice the epochs. `msam_0` is momentum-SAM with a decay of 0,
`late_sam_0.5` is SAM on the last half of the steps, and `sub_batch_16th` takes the
ascent gradient of a sixteenth of the batch. On text, the accuracy is that of the next
character.

Of momentum-SAM it is also measured, at the end of each epoch and on 256 training
examples: the cosine of the angle between its perturbation and the gradient; by how much
the loss rises along its perturbation, and along SAM's of the same length.
"""

import functools
import itertools
import math
import operator
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn

import sam_optax
from cifar10 import percentage
from harness import Experiment, Runs, arguments, cases, setting_of, tuned
from loaders import (
    DataError,
    cut_text,
    load_cifar10,
    load_mnist_test,
    load_text,
    split,
)
from training import PLAIN, decayed_sgd, losses_of, make_trainer

ASCENDED = operator.attrgetter("ascended")  # one object, so that programs are shared
WINDOW, WIDTH, HEADS, BLOCKS = 32, 48, 4, 2  # of the transformer
PROBED = 256  # training examples

# --- Networks and data ----------------------------------------------------------------


class ConvNet(nn.Module):
    """Three convolutions, of which two halve the image, and a linear layer."""

    channels: Sequence[int] = (16, 32, 64)
    strides: Sequence[int] = (1, 2, 2)

    @nn.compact
    def __call__(self, x):
        for channels, stride in zip(self.channels, self.strides, strict=True):
            conv = nn.Conv(
                channels, (3, 3), stride, kernel_init=nn.initializers.he_normal()
            )
            x = nn.relu(conv(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


class Transformer(nn.Module):
    """Predicts the next character; normalises before each part of a block."""

    alphabet: int

    @nn.compact
    def __call__(self, x):
        place = self.param("place", nn.initializers.normal(0.02), (WINDOW, WIDTH))
        h = nn.Embed(self.alphabet, WIDTH)(x) + place
        mask = nn.make_causal_mask(x)
        for _ in range(BLOCKS):
            attention = nn.MultiHeadDotProductAttention(HEADS)
            h += attention(nn.LayerNorm()(h), mask=mask)
            h += nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(h))))
        return nn.Dense(self.alphabet)(nn.LayerNorm()(h))


def average_pixels(images: np.ndarray) -> np.ndarray:
    """uint8, (n, height, width, ...) -> float32, (n, height/2, width/2, channels)."""
    n, height, width, *_ = images.shape
    pairs = images.reshape(n, height // 2, 2, width // 2, 2, -1)
    return (pairs.mean((2, 4)) - 127.5).astype(np.float32)


@functools.cache
def decayed_adamw(steps: int, weight_decay: float) -> Callable[[Any], Any]:
    def make_base(learning_rate):
        schedule = optax.cosine_decay_schedule(learning_rate, steps)
        return optax.adamw(schedule, weight_decay=weight_decay)

    return make_base


class Task(NamedTuple):
    """What is trained, on which data, and the learning rates to choose from."""

    sizes: tuple[int, int]  # to train on, for validation
    batch_size: int
    epochs: int
    make_base: Callable[[int, float], Callable[[Any], Any]]
    rates: tuple[float, ...]  # the first two also for sharpness-aware methods
    decays: tuple[float, ...]  # the first one is everyone's
    rhos: tuple[float, ...]  # of SAM
    program: str = "epoch"
    noises: tuple[int, ...] = (0,)


PROGRAM = "step" if jax.default_backend() == "cpu" else "epoch"
SGD = (decayed_sgd, (0.02, 0.005, 0.05, 0.002), (5e-4, 5e-3, 1e-2))
ADAMW = (decayed_adamw, (3e-3, 1e-2, 1e-3), (1e-4, 0.1, 0.5))
TASKS = {
    "cifar": Task((3000, 2000), 64, 25, *SGD, (0.03, 0.1), PROGRAM, (0, 40)),
    "mnist": Task((2000, 1000), 64, 25, *SGD, (0.1, 0.2, 0.4), PROGRAM, (0, 40)),
    "text": Task((1500, 1000), 16, 5, *ADAMW, (0.03, 0.1)),
}
TESTED = 2000  # of the examples that are left, at most

# --- Methods --------------------------------------------------------------------------


class Entry(NamedTuple):
    """A line of the tables."""

    method: str  # of `sam_optax.METHODS`, or PLAIN
    unit: float = 1  # the radii of SAM are multiplied by it
    passes: float = 2  # gradients of a step that ascends
    rule: sam_optax.data.DataRule | None = None
    stretch: int = 1
    tries_decays: bool = False
    late: float = 1  # the part of the steps, at their end, that may ascend
    options: tuple[tuple[str, float], ...] = ()

    def settings(self, task: Task) -> list[dict]:
        decay = task.decays[:1]
        if self.method == PLAIN:
            decays = task.decays[1:] if self.tries_decays else decay
            rates = task.rates[:2] if self.tries_decays else task.rates
            found = itertools.product([None], decays, rates)
        else:
            rhos = [self.unit * rho for rho in task.rhos]
            found = itertools.product(rhos, decay, task.rates[:2])
        keys = ("rho", "weight_decay", "learning_rate")
        return [dict(zip(keys, values, strict=True)) for values in found]


SUB_BATCH = sam_optax.data.sub_batch(1 / 16)
ENTRIES = {
    "base": Entry(PLAIN),
    "base_twice": Entry(PLAIN, stretch=2),
    "base_decay": Entry(PLAIN, tries_decays=True),
    "sam": Entry("sam"),
    "msam_0": Entry("msam", 2, 1, options=(("decay", 0.0),)),
    "msam_0.9": Entry("msam", 4, 1, options=(("decay", 0.9),)),
    "late_sam_0.5": Entry("late_sam", 2, late=0.5),
    "sub_batch_16th": Entry("sam", 1, 1 + 1 / 16, SUB_BATCH),
}
BASELINES = ["base", "sam"]


def has_started(hyper: dict, step: int) -> bool:
    """Whether `late_sam` ascends, as its cadence says; here known to Python."""
    return step >= hyper["start"]


@functools.partial(jax.jit, static_argnums=0)
def probe(model, hyper, state, x, y) -> dict[str, jax.Array]:
    """How momentum-SAM's perturbation and SAM's of the same length raise the loss."""

    def loss_fn(params):
        return losses_of(model, params, x, y)[0].mean()

    def rise(perturbation):
        return loss_fn(optax.tree.add(state.params, perturbation)) - loss

    points = []

    def grad_fn(params):
        points.append(params)
        return jax.grad(loss_fn)(params)

    loss, gradient = jax.value_and_grad(loss_fn)(state.params)
    hyper = {key: value for key, value in hyper.items() if key != "learning_rate"}
    msam = sam_optax.METHODS["msam"].make(**hyper)
    msam.update(gradient, state.opt_state[0], state.params, grad_fn=grad_fn)
    own = optax.tree.sub(points[0], state.params)
    length, slope = optax.tree.norm(own), optax.tree.norm(gradient)
    return {
        "cosine": optax.tree.vdot(own, gradient) / (length * slope),
        "gap": rise(own),
        "gap_of_sam": rise(optax.tree.scale(length / slope, gradient)),
    }


# --- The experiment -------------------------------------------------------------------


class OneGradient(Experiment):
    same = ("settings", "train", "epochs")
    options = arguments(
        data=(None, None, "directory with CIFAR-10, or else the text alone"),
        tasks=(list(TASKS), ["text"], "which to train on"),
        noises=([0, 40], None, "%% of random labels of images", {"type": percentage}),
        methods=(list(ENTRIES), ["msam_0.9"], "which to train"),
        seeds=(3, 1, "trainings of each method, with the setting it chose"),
        tuning_seeds=(1, None, "trainings of each setting, for the choice"),
        settings=(9, 1, "settings to choose from, at most"),
        train=(3000, 64, "training examples, at most"),
        epochs=(30, 2, "passes over the training examples, at most"),
    )

    def prepare(self):
        self.args.methods = list(dict.fromkeys([*BASELINES, *self.args.methods]))
        self.tasks = {name: TASKS[name] for name in dict.fromkeys(self.args.tasks)}
        if not self.args.data:
            if set(self.tasks) not in ({"text"}, set(TASKS)):
                raise DataError("--tasks with images need --data")
            self.tasks = {"text": TASKS["text"]}
        self.images = {}
        if "cifar" in self.tasks:
            data = load_cifar10(self.args.data)
            images = np.concatenate([data.train_x, data.test_x])
            labels = np.concatenate([data.train_y, data.test_y])
            # A part is enough, at random, as some files are sorted by class.
            some = np.random.default_rng(0).permutation(len(labels))[:10000]
            self.images["cifar"] = images[some], labels[some]
        if "mnist" in self.tasks:
            self.images["mnist"] = load_mnist_test(self.args.data)

    def plan(self):
        """The first methods of all tasks come first."""
        seeds = (self.args.tuning_seeds, self.args.seeds)
        for method, (name, task) in itertools.product(
            self.args.methods, self.tasks.items()
        ):
            settings = ENTRIES[method].settings(task)[: self.args.settings]
            for noise in task.noises:
                if noise not in self.args.noises and len(task.noises) > 1:
                    continue
                case = {"method": method, "task": name, "noise": noise}
                yield from tuned(self.runs, case, settings, *seeds)

    def parts(self, name: str, noise: int, seed: int):
        """The network; and training, validation and test examples."""
        train, validation = TASKS[name].sizes
        sizes = (min(self.args.train, train), min(self.args.train, validation))
        if name == "text":
            parts, alphabet = cut_text(load_text(), WINDOW, sizes, seed)
            model = Transformer(alphabet)
        else:
            parts, model = self.divide(name, sizes, noise, seed), ConvNet()
        test = tuple(part[:TESTED] for part in parts[-1])
        return model, [*parts[:-1], test]

    def divide(self, name, sizes, noise, seed):
        """Images of half the size, divided by `loaders.split` and from -1 to 1."""
        images, labels = self.images[name]
        small = average_pixels(images)
        parts = split(small, labels, sizes, seed, noise)
        return [(x.reshape(-1, *small.shape[1:]), y) for x, y in parts]

    def measure(self, on, method, task, noise, seed, weight_decay, **setting):
        entry, about = ENTRIES[method], TASKS[task]
        model, (examples, *others) = self.parts(task, noise, seed)
        batch_size = min(about.batch_size, len(examples[0]))
        epochs = entry.stretch * min(self.args.epochs, about.epochs)
        steps = epochs * (len(examples[0]) // batch_size)
        hyper = setting_of(setting) | dict(entry.options)
        hyper |= {"start": round((1 - entry.late) * steps)} if entry.late < 1 else {}
        by_step = about.program == "step"
        trainer = make_trainer(
            model,
            entry.method,
            about.make_base(steps, weight_decay),
            batch_size,
            data=entry.rule,
            watch=ASCENDED,
            program=about.program,
            ascends=has_started if entry.late < 1 and by_step else None,
        )
        ascended, probes, start = [], [], time.perf_counter()
        probed = tuple(part[-PROBED:] for part in examples)
        for state, seen in trainer.epochs(hyper, seed, examples, epochs):
            ascended.append(np.mean(seen))
            if on == "test" and entry.method == "msam":
                found = probe(model, hyper, state, *probed)
                probes.append({key: float(value) for key, value in found.items()})
        seconds = time.perf_counter() - start
        validation, test = (trainer.evaluate(state, *part) for part in others)
        share = float(np.mean(ascended))
        return {
            "gradients": entry.stretch * (1 + share * (entry.passes - 1)),
            "validation": float(validation[1]),
            "test": float(test[1]),
            "test_loss": float(test[0]),
            "train_loss": float(trainer.evaluate(state, *probed)[0]),
            "seconds": seconds,
            "probes": {key: [p[key] for p in probes] for key in (probes or [{}])[0]},
        }

    def report(self):
        for case in cases(task=self.tasks, noise=self.runs.values("noise")):
            groups = self.runs.of(on="test", **case).by("method")
            if not groups:
                continue
            title = f"{case['task']}, {case['noise']} % noise"
            columns: dict = {
                "gradients": ("gradients", 2),
                "seeds": lambda group: str(len(group)),
                "learning rate": "learning_rate",
                "rho": "rho",
                "weight decay": "weight_decay",
                "test": ("test", 1),
                "less base's": ("test", 1, "base"),
                "less SAM's": ("test", 1, "sam"),
                "test loss": ("test_loss", 2),
                "train loss": ("train_loss", 3),
            }
            self.summary(title, groups, columns)
            self.draw(title, groups, "test", "gradients")
        self.report_probes()

    def report_probes(self):
        groups = {
            f"{method}, {task}, {noise} % noise": group
            for (method, task, noise), group in self.probed().items()
        }
        if groups:
            columns = {
                key: functools.partial(self.late_mean, key=key)
                for key in ("cosine", "gap", "gap_of_sam")
            }
            self.summary("epochs of the second half", groups, {"rho": "rho"} | columns)

    def probed(self) -> dict[tuple, Runs]:
        found: dict[tuple, Runs] = {}
        for run in self.runs.of(on="test"):
            if run["probes"]:
                key = (run["method"], run["task"], run["noise"])
                found.setdefault(key, Runs()).append(run)
        return found

    def late_mean(self, group: Runs, key: str) -> str:
        """The mean over the second half of the epochs, and over the seeds."""
        curves = [run["probes"][key] for run in group]
        return f"{np.mean([c[math.floor(len(c) / 2) :] for c in curves]):.3f}"


if __name__ == "__main__":
    OneGradient.main()
