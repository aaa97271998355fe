"""CIFAR-10 with a ResNet-18: accuracy, cost and sharpness, also with wrong labels.

    python benchmarks/papers/cifar10.py --data DIRECTORY

This measures Tables 1 and 6 of Li et al. (https://arxiv.org/abs/2403.12350) again, with
the settings of their sections 6.1 and 6.3.3 but without cutout. Beside their methods
run GSAM, StableSAM and LookSAM, with the paper's ρ for SAM, so that they differ from
SAM in one thing. GSAM has a constant ρ, and α = 0.1 of those that Zhuang et al. search
(https://arxiv.org/abs/2203.08065, B.1). LookSAM has the k = 5 and α = 0.7 of Liu et al.
(https://arxiv.org/abs/2203.02714).

With `--noise`, that many % of the labels are replaced by any of the ten, so that one in
ten of them stays right. Accuracy is that of the last epoch. Sharpness is measured on
training images without augmentation, with running statistics and in float32: the
largest eigenvalue and the trace of the Hessian, and the surrogate gap for ρ = 0.1.

On a GPU an epoch is one program. `--budget` ends a command between epochs, before a
training that would not fit, and `--resume` goes on after those that are finished, so
that several commands make one table, of one number of epochs. For a data-centre GPU in
parts of ten minutes, in the order of importance:

    C="python benchmarks/papers/cifar10.py --data DIRECTORY --dtype bfloat16"
    C="$C --sharpness 500 --budget 480"
    $C --output probe --epochs 3 --seeds 1 --noise 0 --methods SGD SAM
    $C --resume --epochs 10 --seeds 1 --noise 0
    $C --resume --epochs 10 --seeds 1 --noise 60 80
    $C --resume --epochs 10 --seeds 3

The first tells how many epochs fit: all methods take 12 times as long as SGD, those of
both noises 10 times, and compiling and measuring come on top. The last is repeated
until nothing is missing. With JAX_COMPILATION_CACHE_DIR set, each program is compiled
once.
"""

import argparse
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from harness import Experiment, Runs, arguments, cases, integer
from loaders import DataError, Dataset, load_cifar10
from resnet import CLASSES, ResNet
from sam_optax import sharpness
from training import PLAIN, decayed_sgd, draw_batches, make_step

RATE = 0.05
RHO = 0.1  # of SAM, and of the surrogate gap
# Method of `training.make_step`, its hyperparameters, and the weight decay.
METHODS = {
    "SGD": (PLAIN, {}, 5e-4),
    "SAM": ("sam", {"rho": RHO}, 1e-3),
    "F-SAM": ("fsam", {"rho": RHO, "sigma": 1.0, "decay": 0.6}, 1e-3),
    "ASAM": ("asam", {"rho": 2.0, "eta": 0.01}, 1e-3),
    "GSAM": ("gsam", {"rho": RHO, "alpha": 0.1}, 1e-3),
    "StableSAM": ("stable_sam", {"rho": RHO}, 1e-3),
    "LookSAM": ("look_sam", {"rho": RHO, "k": 5, "alpha": 0.7}, 1e-3),
}
NOISY = ["SGD", "SAM", "F-SAM"]  # unless others are asked for
PUBLISHED = {
    0: {"SGD": 96.25, "SAM": 96.58, "F-SAM": 96.75, "ASAM": 96.63},
    60: {"SGD": 52.21, "SAM": 90.08, "F-SAM": 90.47},
    80: {"SGD": 27.86, "SAM": 31.73, "F-SAM": 59.39},
}
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the channels
PADDING = 4
EVALUATED_AT_ONCE, HESSIAN_AT_ONCE = 1000, 250
TRACE_SAMPLES = 10
CURVES = ["loss", "gradients", "seconds", "test_percent"]  # of each epoch
MEASURES = ["eigenvalue", "eigenvalue_residual", "trace", "trace_standard_error"]
MEASURES += ["gap", "train_loss_in_evaluation"]
PROGRAMS = ["epoch", "step"] if jax.default_backend() != "cpu" else ["step", "epoch"]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def take(data: Dataset, train: int, test: int) -> Dataset:
    """As many images, or as there are, at random: some files are sorted by class."""
    rng = np.random.default_rng(0)
    part = rng.permutation(len(data.train_y))[:train]
    test_part = rng.permutation(len(data.test_y))[:test]
    train_data = (data.train_x[part], data.train_y[part])
    return Dataset(*train_data, data.test_x[test_part], data.test_y[test_part])


def add_noise(labels: np.ndarray, percent: float, seed: int) -> np.ndarray:
    """Replaces that part of the labels by random ones, right or wrong."""
    rng = np.random.default_rng(seed)
    replaced = rng.permutation(len(labels))[: round(len(labels) * percent / 100)]
    noisy = labels.copy()
    noisy[replaced] = rng.integers(0, CLASSES, len(replaced))
    return noisy


def normalize(images: jax.Array) -> jax.Array:
    """uint8 -> float32, with mean 0 and standard deviation 1 in each channel."""
    return (images / 255.0 - jnp.array(MEAN)) / jnp.array(DEVIATION)


def crop_and_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Moves each image by up to 4 pixels, with black around, and mirrors half."""
    crop_key, flip_key = jax.random.split(key)
    edge = (PADDING, PADDING)
    padded = jnp.pad(images, ((0, 0), edge, edge, (0, 0)))
    corners = jax.random.randint(crop_key, (len(images), 2), 0, 2 * PADDING + 1)

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])

    cropped = jax.vmap(crop)(padded, corners)
    flipped = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
    return jnp.where(flipped, cropped[:, :, ::-1], cropped)


# --- Training -------------------------------------------------------------------------


class State(NamedTuple):
    """A network in training."""

    params: Any
    batch_stats: Any  # of the pass at the parameters, never of the perturbed one
    opt_state: Any


class Trainer:
    """How a method trains; compiled once, for all seeds and labels.

    The program is a step, or an epoch that scans over it.

    Attributes:
      init: key -> State.
      cost: seconds to compile, and bytes of memory of the program and its arguments.
    """

    def __init__(self, model, method, batch: int, epochs: int, x, y, program: str):
        name, hyper, weight_decay = method
        base = decayed_sgd(epochs * (len(x) // batch), weight_decay)(RATE)
        self.init, step = make_augmented_step(model, name, base, hyper)
        self._batch, self._is_epoch = batch, program == "epoch"

        def scan(state, key, x, y):
            batches = draw_batches(key, len(x), batch)
            return jax.lax.scan(lambda s, i: step(s, *i, x, y), state, batches)

        key = jax.random.key(0)
        inputs = (key,) if self._is_epoch else (jnp.arange(batch), key)
        function = jax.jit(scan if self._is_epoch else step, donate_argnums=0)
        state = jax.eval_shape(self.init, key)
        start = time.perf_counter()
        self._compiled = function.lower(state, *inputs, x, y).compile()
        seconds, memory = time.perf_counter() - start, self._compiled.memory_analysis()
        size = memory.output_size_in_bytes - memory.alias_size_in_bytes
        size += memory.argument_size_in_bytes + memory.temp_size_in_bytes
        self.cost = {"compile_seconds": seconds, "program_bytes": size}

    def epoch(self, state: State, key: jax.Array, x, y):
        """The next state, the mean loss, and the gradients per step."""
        if self._is_epoch:
            state, seen = self._compiled(state, key, x, y)
        else:
            steps = []
            for inputs in zip(*draw_batches(key, len(x), self._batch), strict=True):
                state, values = self._compiled(state, *inputs, x, y)
                steps.append(values)
            seen = jax.tree.map(lambda *values: jnp.stack(values), *steps)
        return state, *(values.mean() for values in seen)


def make_augmented_step(
    model: ResNet, method: str, base, hyper: dict, augment=crop_and_flip, **options
):
    """init: key -> State; step: State, index, key, x, y -> State, (loss, gradients).

    `options` are those of `make_step`, and further arguments of a step those of its
    step.
    """

    def loss_fn(params, batch_stats, images, labels):
        variables = {"params": params, "batch_stats": batch_stats}
        options = {"train": True, "mutable": ["batch_stats"]}
        logits, updated = model.apply(variables, images, **options)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updated["batch_stats"]

    options |= {"has_aux": True}
    init_optimizer, update = make_step(loss_fn, method, base, hyper, **options)

    def init(key):
        variables = init_variables(model, key)
        params = variables["params"]
        return State(params, variables["batch_stats"], init_optimizer(params))

    def step(state, index, key, x, y, **arguments):
        images = normalize(augment(key, x[index]))
        trained = state.params, state.opt_state
        params, opt_state, (loss, batch_stats), report = update(
            *trained, state.batch_stats, images, y[index], **arguments
        )
        return State(params, batch_stats, opt_state), (loss, 1 + report.ascended)

    return init, step


@functools.partial(jax.jit, static_argnums=0)
def init_variables(model: ResNet, key: jax.Array) -> Any:
    return model.init(key, jnp.zeros((1, 32, 32, 3)), train=False)


# --- Measurements ---------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def evaluate(model: ResNet, batch_stats, params, images, labels):
    """The mean loss, and how many of the images are right."""
    variables = {"params": params, "batch_stats": batch_stats}
    logits: Any = model.apply(variables, normalize(images), train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), jnp.sum(jnp.argmax(logits, axis=-1) == labels)


def evaluation_loss(*args: Any) -> jax.Array:
    return evaluate(*args)[0]


def accuracy_percent(model, state: State, x, y, at_once=EVALUATED_AT_ONCE) -> float:
    parts = [slice(i, i + at_once) for i in range(0, len(x), at_once)]
    network = model, state.batch_stats, state.params
    counts = [evaluate(*network, x[part], y[part])[1] for part in parts]
    return 100 * sum(map(int, counts)) / len(x)


def measure_sharpness(loss_fn, state: State, x, y) -> dict[str, float]:
    """Of `evaluation_loss` of a network; NaN where training diverged."""
    if not jnp.isfinite(optax.tree.norm((state.params, state.batch_stats))):
        return dict.fromkeys(MEASURES, float("nan"))
    arguments = (Partial(loss_fn, state.batch_stats), state.params, (x, y))
    options: dict[str, Any] = {"batch_size": min(len(x), HESSIAN_AT_ONCE)}
    with jax.default_matmul_precision("float32"):
        hessian = sharpness.hessian(*arguments, **options)
        pairs = sharpness.eigenpairs(hessian)
        trace = sharpness.trace(hessian, num_samples=TRACE_SAMPLES)
        gap = sharpness.surrogate_gap(*arguments, rho=RHO, **options)
    measures = (pairs.values[0], pairs.residuals[0], *trace, gap.sharpness, gap.loss)
    return dict(zip(MEASURES, map(float, measures), strict=True))


# --- The experiment -------------------------------------------------------------------


def percentage(text: str) -> int:
    if (value := integer(text, 0)) > 100:
        raise argparse.ArgumentTypeError(f"must be at most 100, got {text!r}")
    return value


class Cifar10(Experiment):
    same = ("epochs", "batch", "train", "test", "sharpness", "width", "blocks", "dtype")
    options = arguments(
        data=(None, None, "directory with CIFAR-10", {"required": True}),
        # Without it, all for right labels and NOISY for the others.
        methods=(list(METHODS), ["SGD", "SAM"], "which", {"default": None}),
        noise=([0, 60, 80], [60], "%% of random labels", {"type": percentage}),
        seeds=(3, 1, "trainings of each method"),
        epochs=(200, 2, "passes over the training images"),
        batch=(128, 16, "images in a step"),
        train=(50000, 64, "training images, a random part of them"),
        test=(10000, 64, "test images, a random part of them"),
        sharpness=(1000, 4, "training images that sharpness is measured on"),
        width=(64, 2, "channels of the first stage"),
        blocks=([2, 2, 2, 2], [1], "residual blocks in each stage"),
        dtype=("float32", None, "of the computation", {"choices": list(DTYPES)}),
        # On a CPU, XLA's convolutions are slow inside of a loop.
        program=(PROGRAMS[0], None, "compiled as one", {"choices": PROGRAMS}),
    )

    def prepare(self):
        args = self.args
        data = take(load_cifar10(args.data), args.train, args.test)
        if args.batch > len(data.train_y):
            found = f"there are {len(data.train_y)} training images"
            raise DataError(f"argument --batch: {found}")
        self.labels = data.train_y
        self.train_x, *self.test_data = map(jax.device_put, (data.train_x, *data[2:]))
        self.model = ResNet(tuple(args.blocks), args.width, DTYPES[args.dtype])
        # One function for all measurements, so that they are compiled once.
        float32 = self.model.clone(dtype=jnp.float32)
        self.loss_fn = functools.partial(evaluation_loss, float32)
        self.epoch_seconds, self.end_seconds = {}, 0.0

    def plan(self):
        """The seeds are outermost, so that the first have every method."""
        noises = dict.fromkeys(self.args.noise)
        for case in cases(seed=range(self.args.seeds), noise_percent=noises):
            usual = NOISY if case["noise_percent"] else METHODS
            for name in dict.fromkeys(self.args.methods or usual):
                yield case | {"method": name}

    @functools.cache  # noqa: B019
    def trainer(self, method: str) -> Trainer:
        args, labels = self.args, jax.device_put(self.labels)
        settings = (args.batch, args.epochs, self.train_x, labels, args.program)
        return Trainer(self.model, METHODS[method], *settings)

    def measure(self, noise_percent, method, seed):
        args, trainer = self.args, self.trainer(method)
        labels = jax.device_put(add_noise(self.labels, noise_percent, seed))
        key, points = jax.random.key(seed), []
        state = trainer.init(key)
        for epoch in range(args.epochs):
            expected = self.epoch_seconds.get(method, 0.0) * (args.epochs - epoch)
            self.claim(expected + self.end_seconds)
            start = time.perf_counter()
            epoch_key = jax.random.fold_in(key, epoch)
            state, *means = trainer.epoch(state, epoch_key, self.train_x, labels)
            point = [*map(float, means), time.perf_counter() - start]
            points.append(
                [*point, accuracy_percent(self.model, state, *self.test_data)]
            )
            if epoch:  # the first may have to compile small functions
                self.epoch_seconds[method] = time.perf_counter() - start
        start, part = time.perf_counter(), slice(args.sharpness)
        x, y = self.train_x[part], labels[part]
        measured = measure_sharpness(self.loss_fn, state, x, y)
        self.end_seconds = time.perf_counter() - start
        curves = dict(zip(CURVES, map(list, zip(*points, strict=True)), strict=True))
        seconds = float(np.median(curves["seconds"][1:] or curves["seconds"]))
        images = len(self.train_x) // args.batch * args.batch
        memory = jax.devices()[0].memory_stats() or {}  # not every backend counts
        return {
            **measured,
            **trainer.cost,
            "hyperparameters": METHODS[method][1],
            "weight_decay": METHODS[method][2],
            "test_percent": curves["test_percent"][-1],
            "train_loss": curves["loss"][-1],
            "gradients": float(np.mean(curves["gradients"])),
            "seconds_per_epoch": seconds,
            "images_per_second": images / seconds,
            "peak_bytes": memory.get("peak_bytes_in_use"),
            "device": jax.devices()[0].device_kind,
            "curves": curves,
        }

    def groups(self, **case):
        """Name -> its runs, of the methods that have some."""
        groups = self.runs.of(**case).by("method", METHODS)
        return {name: group for name, group in groups.items() if group}

    def report(self):
        for noise in sorted(self.runs.values("noise_percent")):
            groups = self.groups(noise_percent=noise)
            published = PUBLISHED.get(noise, {})
            columns = {
                "seeds": lambda group: str(len(group)),
                "test (%)": ("test_percent", 2),
                "less SGD's": ("test_percent", 2, "SGD"),
                "published": lambda g, p=published: str(p.get(g[0]["method"], "")),
                "train loss": ("train_loss", 3),
                "largest eigenvalue": ("eigenvalue", 2),
                "trace": ("trace", 0),
                "gap": ("gap", 4),
            }
            self.summary(f"{noise} % noise", groups, columns)
            curves = {name: Runs(g.column("curves")) for name, g in groups.items()}
            self.draw(f"{noise} % noise", curves, "test_percent")

        def mean(group: Runs, key="seconds_per_epoch") -> float:
            return float(np.mean(group.column(key)))

        def largest(group: Runs, key: str) -> float:
            return max(group.column(key))

        groups = self.groups()
        sgd = mean(groups["SGD"]) if "SGD" in groups else None
        columns = {
            "seconds per epoch": ("seconds_per_epoch", 2),
            "of SGD's": lambda group: f"{mean(group) / sgd:.2f}" if sgd else "",
            "images per second": ("images_per_second", 0),
            "gradients per step": lambda group: f"{mean(group, 'gradients'):.2f}",
            "to compile (s)": lambda g: f"{largest(g, 'compile_seconds'):.1f}",
            "memory (MB)": lambda g: f"{largest(g, 'program_bytes') / 1e6:.0f}",
        }
        self.summary("cost", groups, columns)


if __name__ == "__main__":
    Cifar10.main()
