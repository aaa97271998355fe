"""CIFAR-10 with a ResNet-18: accuracy, cost and sharpness, also with wrong labels.

    python benchmarks/papers/cifar10.py --data DIRECTORY

Tables 1 and 6 of Li et al., "Friendly Sharpness-Aware Minimization"
(https://arxiv.org/abs/2403.12350), and beside its methods GSAM, StableSAM and LookSAM.
From its section 6.1: SGD with momentum 0.9 and a cosine decay of the learning rate from
0.05 in 200 epochs; weight decay 5e-4 for SGD and 1e-3 for the others; ρ = 0.1 for SAM
and F-SAM, with λ = 0.6 and σ = 1, and ρ = 2 for ASAM. Of the other three the paper says
nothing. They have its ρ for SAM, so that they differ from SAM in one thing: GSAM has a
constant ρ, and α = 0.1 of those that Zhuang et al. (https://arxiv.org/abs/2203.08065,
B.1) search; LookSAM the k = 5 and α = 0.7 of Liu et al.
(https://arxiv.org/abs/2203.02714). Batches are of 128, as in the paper's section 6.3.3.

Crop and flip without the paper's cutout. Of `--noise` % of the labels each is replaced
by any of the ten, so that one in ten of them stays right. Accuracy is that of the last
epoch. Sharpness is measured on training images without augmentation, with running
statistics and in float32: the largest eigenvalue and the trace of the Hessian, and the
surrogate gap for ρ = 0.1.

On a GPU an epoch is one program. The JSON is written after every epoch. `--budget` ends
a command between epochs, before a training that would not fit, and `--resume` goes on,
so that several commands make one table, of one number of epochs. For a data-centre GPU
in parts of ten minutes, in the order of importance:

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
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.tree_util import Partial
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from evidence import (
    Parser,
    carry_out,
    compare_pairs,
    describe,
    make_table,
    option,
    positive_integer,
    progress,
    report_path,
    save_report,
)
from loaders import DataError, Dataset, load_cifar10
from resnet import CLASSES, ResNet
from sam_optax import sharpness
from training import PLAIN, decayed_sgd, make_step

NAME = "cifar10"
RATE = 0.05
RHO = 0.1  # of SAM, and of the surrogate gap


class Method(NamedTuple):
    """A method of `training.make_step`, and its hyperparameters."""

    name: str
    hyper: dict[str, Any]
    weight_decay: float = 1e-3


METHODS = {
    "SGD": Method(PLAIN, {}, weight_decay=5e-4),
    "SAM": Method("sam", {"rho": RHO}),
    "F-SAM": Method("fsam", {"rho": RHO, "sigma": 1.0, "decay": 0.6}),
    "ASAM": Method("asam", {"rho": 2.0, "eta": 0.01}),
    "GSAM": Method("gsam", {"rho": RHO, "alpha": 0.1}),
    "StableSAM": Method("stable_sam", {"rho": RHO}),
    "LookSAM": Method("look_sam", {"rho": RHO, "k": 5, "alpha": 0.7}),
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
# Settings that all runs of a JSON share.
SAME = ["epochs", "batch", "train", "test", "sharpness", "width", "blocks", "dtype"]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


# --- Data -----------------------------------------------------------------------------


def take(data: Dataset, train: int, test: int) -> Dataset:
    """As many images, or as there are, at random: some files are sorted by class."""
    rng = np.random.default_rng(0)
    part = rng.permutation(len(data.train_y))[:train]
    test_part = rng.permutation(len(data.test_y))[:test]
    return Dataset(
        *(data.train_x[part], data.train_y[part]),
        *(data.test_x[test_part], data.test_y[test_part]),
    )


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


class Trainer(NamedTuple):
    """How a method trains; compiled once, for all seeds and labels.

    Attributes:
      init: key -> State.
      epoch: (State, key, x, y) -> State, mean loss, gradients per step.
      compile_seconds: what it took.
      program_bytes: memory of the program, with its arguments.
    """

    init: Callable[[jax.Array], State]
    epoch: Callable[..., tuple[State, jax.Array, jax.Array]]
    compile_seconds: float
    program_bytes: int


def make_trainer(
    model: ResNet,
    method: Method,
    batch: int,
    epochs: int,
    x: jax.Array,
    y: jax.Array,
    program: str,
) -> Trainer:
    """Compiles a step (`program` "step"), or an epoch that scans over it ("epoch")."""
    steps = len(x) // batch
    base = decayed_sgd(epochs * steps, method.weight_decay)(RATE)
    init, step = make_augmented_step(model, method, base)

    def draw(key):
        """The batches of an epoch, and a key for each."""
        order_key, key = jax.random.split(key)
        order = jax.random.permutation(order_key, len(x))[: steps * batch]
        return order.reshape(steps, batch), jax.random.split(key, steps)

    def scan(state, key, x, y):
        return jax.lax.scan(lambda s, i: step(s, *i, x, y), state, draw(key))

    def loop(state, key, x, y):
        seen = []
        for index, step_key in zip(*draw(key), strict=True):
            state, values = compiled(state, index, step_key, x, y)
            seen.append(values)
        return state, jax.tree.map(lambda *values: jnp.stack(values), *seen)

    key = jax.random.key(0)
    inputs = (key,) if program == "epoch" else (jnp.arange(batch), key)
    function = scan if program == "epoch" else step
    state = jax.eval_shape(init, key)
    start = time.perf_counter()
    compiled = jax.jit(function, donate_argnums=0).lower(state, *inputs, x, y).compile()
    seconds = time.perf_counter() - start
    run = compiled if program == "epoch" else loop

    def epoch(state, key, x, y):
        state, (losses, gradients) = run(state, key, x, y)
        return state, losses.mean(), gradients.mean()

    return Trainer(init, epoch, seconds, memory_of(compiled))


def make_augmented_step(
    model: ResNet, method: Method, base: optax.GradientTransformation
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """init: key -> State; step: State, index, key, x, y -> State, (loss, gradients)."""

    def loss_fn(params, batch_stats, images, labels):
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updated["batch_stats"]

    init_optimizer, update = make_step(
        loss_fn, method.name, base, has_aux=True, **method.hyper
    )

    def init(key):
        variables = init_variables(model, key)
        params = variables["params"]
        return State(params, variables["batch_stats"], init_optimizer(params))

    def step(state, index, key, x, y):
        images = normalize(crop_and_flip(key, x[index]))
        params, opt_state, (loss, batch_stats), report = update(
            state.params, state.opt_state, state.batch_stats, images, y[index]
        )
        return State(params, batch_stats, opt_state), (loss, 1 + report.ascended)

    return init, step


@functools.partial(jax.jit, static_argnums=0)
def init_variables(model: nn.Module, key: jax.Array) -> Any:
    return model.init(key, jnp.zeros((1, 32, 32, 3)), train=False)


def memory_of(compiled) -> int:
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes


# --- Measurements ---------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def count_right(model: nn.Module, params, batch_stats, images, labels) -> jax.Array:
    variables = {"params": params, "batch_stats": batch_stats}
    logits: Any = model.apply(variables, normalize(images), train=False)
    return jnp.sum(jnp.argmax(logits, axis=-1) == labels)


def accuracy_percent(model, state: State, x, y, at_once=EVALUATED_AT_ONCE) -> float:
    counts = [
        count_right(model, *state[:2], x[i : i + at_once], y[i : i + at_once])
        for i in range(0, len(x), at_once)
    ]
    return 100 * sum(map(int, counts)) / len(x)


def make_evaluation_loss(model: nn.Module) -> Callable[..., jax.Array]:
    def loss_fn(batch_stats, params, images, labels):
        variables = {"params": params, "batch_stats": batch_stats}
        logits: Any = model.apply(variables, normalize(images), train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    return loss_fn


def measure_sharpness(
    loss_fn: Callable[..., jax.Array], state: State, x, y
) -> dict[str, float]:
    """Of the loss that `make_evaluation_loss` makes; NaN where training diverged."""
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


# --- Runs -----------------------------------------------------------------------------


class Budget:
    """Whether a training fits into the time of a command.

    Attributes:
      epoch_seconds: by method, of the last epoch.
      end_seconds: what the measures at the end of the last training took.
    """

    def __init__(self, seconds: int | None):
        self._start = time.perf_counter()
        self._seconds = float("inf") if seconds is None else seconds
        self.epoch_seconds: dict[str, float] = {}
        self.end_seconds = 0.0

    def spent(self) -> float:
        return time.perf_counter() - self._start

    def allows(self, name: str, epochs: int) -> bool:
        """As far as it is known yet; of what is not, the beginning is allowed."""
        expected = epochs * self.epoch_seconds.get(name, 0.0) + self.end_seconds
        return self.spent() + expected < self._seconds


class Lab:
    """The data on the device, the network, and what is compiled."""

    def __init__(self, args, data: Dataset):
        self._args, self._labels = args, data.train_y
        self._train_x, self._test_x, self._test_y = (
            jax.device_put(array) for array in (data.train_x, *data[2:])
        )
        self._model = ResNet(tuple(args.blocks), args.width, DTYPES[args.dtype])
        # One function for all measurements, so that they are compiled once.
        self._loss_fn = make_evaluation_loss(self._model.clone(dtype=jnp.float32))
        self._trainers: dict[str, Trainer] = {}

    def labels(self, noise: float, seed: int) -> jax.Array:
        return jax.device_put(add_noise(self._labels, noise, seed))

    def start(self, name: str, seed: int) -> State:
        return self._trainer(name).init(jax.random.key(seed))

    def train_epoch(
        self, name: str, state: State, seed: int, epoch: int, labels: jax.Array
    ) -> tuple[State, dict[str, float]]:
        """The network after it, and its measures, one for each of `CURVES`."""
        key = jax.random.fold_in(jax.random.key(seed), epoch)
        start = time.perf_counter()
        state, loss, gradients = self._trainer(name).epoch(
            state, key, self._train_x, labels
        )
        values = {"loss": float(loss), "gradients": float(gradients)}
        values["seconds"] = time.perf_counter() - start
        values["test_percent"] = accuracy_percent(
            self._model, state, self._test_x, self._test_y
        )
        return state, values

    def measure(self, state: State, labels: jax.Array) -> dict[str, float]:
        part = slice(self._args.sharpness)
        return measure_sharpness(
            self._loss_fn, state, self._train_x[part], labels[part]
        )

    def summarize(self, name: str, curves: dict[str, list[float]]) -> dict[str, Any]:
        trainer, method = self._trainers[name], METHODS[name]
        images = len(self._train_x) // self._args.batch * self._args.batch
        seconds = float(np.median(curves["seconds"][1:] or curves["seconds"]))
        return {
            **{"hyperparameters": method.hyper, "weight_decay": method.weight_decay},
            "test_percent": curves["test_percent"][-1],
            "train_loss": curves["loss"][-1],
            "gradients": float(np.mean(curves["gradients"])),
            "seconds_per_epoch": seconds,
            "images_per_second": images / seconds,
            "compile_seconds": trainer.compile_seconds,
            "program_bytes": trainer.program_bytes,
            "peak_bytes": peak_bytes(),
            "device": jax.devices()[0].device_kind,
        }

    def _trainer(self, name: str) -> Trainer:
        if name not in self._trainers:
            method, args = METHODS[name], self._args
            self._trainers[name] = make_trainer(
                *(self._model, method, args.batch, args.epochs),
                *(self._train_x, self.labels(0, 0), args.program),
            )
        return self._trainers[name]


def plan(args) -> list[dict[str, Any]]:
    """The trainings, with the seeds outermost, so that the first have every method."""
    return [
        {"noise_percent": noise, "method": name, "seed": seed}
        for seed in range(args.seeds)
        for noise in dict.fromkeys(args.noise)
        for name in dict.fromkeys(args.methods or (NOISY if noise else METHODS))
    ]


def run_all(
    args, console: Console, data: Dataset, runs: list[dict[str, Any]], budget: Budget
) -> list[dict[str, Any]]:
    """Adds to `runs` what it lacks of the plan, and saves it after every epoch."""
    lab = Lab(args, data)
    todo = [run for run in plan(args) if not choose(runs, **run)]
    with progress(console, len(todo) * args.epochs) as advance:

        def record(run, values):
            for key, curve in run["curves"].items():
                curve.append(values[key])
            save_report(NAME, args, runs, budget.spent())
            epoch, accuracy = len(run["curves"]["seconds"]), values["test_percent"]
            advance(f"{describe_run(run)}, epoch {epoch}: {accuracy:.2f} %")

        for run in todo:
            if not budget.allows(run["method"], args.epochs):
                break
            runs.append(run)
            run |= {"finished": False, "curves": {key: [] for key in CURVES}}
            if not complete(run, lab, args, budget, record):
                break
            save_report(NAME, args, runs, budget.spent())
    missing = [run for run in todo if not run.get("finished")]
    if missing:
        console.print(
            f"The budget is spent before {describe_run(missing[0])}; {len(missing)} "
            "trainings are missing, which --resume makes."
        )
    return runs


def complete(run: dict[str, Any], lab: Lab, args, budget: Budget, record) -> bool:
    """Trains, and measures at the end; False if it was stopped before."""
    name, seed = run["method"], run["seed"]
    labels, state = lab.labels(run["noise_percent"], seed), lab.start(name, seed)
    for epoch in range(args.epochs):
        if epoch and not budget.allows(name, args.epochs - epoch):
            return False
        before = budget.spent()
        state, values = lab.train_epoch(name, state, seed, epoch, labels)
        record(run, values)
        if epoch:  # the first may have to compile small functions
            budget.epoch_seconds[name] = budget.spent() - before
    before = budget.spent()
    run |= lab.measure(state, labels)
    run |= lab.summarize(name, run["curves"]) | {"finished": True}
    budget.end_seconds = budget.spent() - before
    return True


def describe_run(run: dict[str, Any]) -> str:
    return f"{run['noise_percent']} % noise, {run['method']}, seed {run['seed']}"


def peak_bytes() -> int | None:
    """Of the device, since the command began; not every backend counts."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def choose(runs: list[dict[str, Any]], **wanted) -> list[dict[str, Any]]:
    """The finished ones of these."""
    return [
        run
        for run in runs
        if run["finished"] and all(run[key] == value for key, value in wanted.items())
    ]


# --- Results --------------------------------------------------------------------------


def column(runs: list[dict[str, Any]], key: str) -> list[float]:
    return [run[key] for run in sorted(runs, key=lambda run: run["seed"])]


def names_in(runs: list[dict[str, Any]]) -> list[str]:
    return [name for name in METHODS if choose(runs, method=name)]


def noises_in(runs: list[dict[str, Any]]) -> list[int]:
    return sorted({run["noise_percent"] for run in choose(runs)})


def print_results(runs: list[dict[str, Any]], args, console: Console) -> None:
    for noise in noises_in(runs):
        console.print(quality_table(choose(runs, noise_percent=noise), noise))
    console.print(cost_table(choose(runs)))


def quality_table(runs: list[dict[str, Any]], noise: int) -> Table:
    table = make_table(
        *(f"{noise} % noise", "seeds", "test (%)", "less SGD's", "published"),
        *("train loss", "largest eigenvalue", "trace", "gap"),
    )
    for name in names_in(runs):
        mine = choose(runs, method=name)
        table.add_row(
            *(name, str(len(mine))),
            describe(column(mine, "test_percent"), 2),
            "" if name == "SGD" else less_sgd(runs, mine),
            f"{PUBLISHED.get(noise, {}).get(name, '')}",
            describe(column(mine, "train_loss"), 3),
            describe(column(mine, "eigenvalue"), 2),
            describe(column(mine, "trace"), 0),
            describe(column(mine, "gap"), 4),
        )
    return table


def less_sgd(runs: list[dict[str, Any]], mine: list[dict[str, Any]]) -> str:
    """The difference in accuracy on the seeds that both have."""
    sgd = {run["seed"]: run for run in choose(runs, method="SGD")}
    mine = [run for run in mine if run["seed"] in sgd]
    if not mine:
        return ""
    others = [sgd[seed] for seed in column(mine, "seed")]
    pairs = compare_pairs(column(mine, "test_percent"), column(others, "test_percent"))
    return f"{pairs.mean:+.2f}" + f" ± {pairs.half_width:.2f}" * (pairs.seeds > 1)


def cost_table(runs: list[dict[str, Any]]) -> Table:
    table = make_table(
        *("cost", "seconds per epoch", "of SGD's", "images per second"),
        *("gradients per step", "seconds to compile", "memory of the program (MB)"),
    )
    sgd = column(choose(runs, method="SGD"), "seconds_per_epoch")
    for name in names_in(runs):
        mine = choose(runs, method=name)
        seconds = column(mine, "seconds_per_epoch")
        table.add_row(
            *(name, describe(seconds, 2)),
            f"{np.mean(seconds) / np.mean(sgd):.2f}" if sgd else "",
            describe(column(mine, "images_per_second"), 0),
            f"{np.mean(column(mine, 'gradients')):.2f}",
            f"{max(column(mine, 'compile_seconds')):.1f}",
            f"{max(column(mine, 'program_bytes')) / 1e6:.0f}",
        )
    return table


def make_figure(runs: list[dict[str, Any]], args) -> Figure:
    """A row for each noise: accuracy along the training, and where it ends."""
    noises = noises_in(runs) or args.noise[:1]
    figure = Figure((11, 0.6 + 2.8 * len(noises)), layout="constrained")
    panels = figure.subplots(len(noises), 3, sharey="row", squeeze=False)
    for row, noise in zip(panels, noises, strict=True):
        for name in names_in(runs):
            mine = choose(runs, method=name, noise_percent=noise)
            draw(row, name, mine)
        row[0].set_ylabel(f"{noise} % noise\ntest accuracy (%)")
        labels = ("epoch", "seconds", "largest eigenvalue")
        for axes, label in zip(row, labels, strict=True):
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
    shown = {
        label: handle
        for axes in panels[:, 0]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if shown:
        figure.legend(shown.values(), shown.keys(), loc="outside right center")
    return figure


def draw(row, name: str, runs: list[dict[str, Any]]) -> None:
    """The mean over seeds by epoch and by time, and the end of each training."""
    if not runs:
        return
    style = {"color": f"C{list(METHODS).index(name)}", "label": name}
    curves = [run["curves"] for run in runs]
    accuracy = np.mean([curve["test_percent"] for curve in curves], axis=0)
    seconds = np.cumsum(np.mean([curve["seconds"] for curve in curves], axis=0))
    row[0].plot(range(1, len(accuracy) + 1), accuracy, lw=1.2, **style)
    row[1].plot(seconds, accuracy, lw=1.2, **style)
    ends = column(runs, "eigenvalue"), column(runs, "test_percent")
    row[2].plot(*ends, "o", ms=4, **style)


# --- The command ----------------------------------------------------------------------


def finished_runs(args) -> list[dict[str, Any]]:
    """Those of the JSON that is there; raises where they were made otherwise."""
    path = report_path(NAME, args)
    if not args.resume or not path.exists():
        return []
    report = json.loads(path.read_text(encoding="utf-8"))
    for key in SAME:
        then, now = report["settings"][key], getattr(args, key)
        if then != now:
            raise DataError(
                f"argument --resume: {path} is of {option(key, then)}, not "
                f"{option(key, now)}"
            )
    return choose(report["runs"])


def percentage(text: str) -> int:
    if text.isdecimal() and int(text) <= 100:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be an integer from 0 to 100, got {text!r}")


def make_parser() -> Parser:
    quick = {"epochs": 2, "seeds": 1, "noise": [60], "methods": ["SGD", "SAM"]}
    quick |= {"train": 64, "test": 64, "batch": 16, "width": 2, "blocks": [1]}
    parser = Parser(__doc__ or "", quick | {"sharpness": 4})
    parser.data("directory with CIFAR-10 (required)")
    parser.names("methods", list(METHODS), "which to train")
    parser.set_defaults(methods=None)
    parser.add_argument(
        "--noise",
        type=percentage,
        nargs="+",
        default=[0, 60, 80],
        metavar="PERCENT",
        help="labels that are replaced (default: 0 60 80), without --methods beyond 0 "
        f"for {', '.join(NOISY)} only",
    )
    parser.count("seeds", 3, "trainings of each method")
    parser.count("epochs", 200, "passes over the training images")
    parser.count("batch", 128, "images in a step")
    parser.count("train", 50000, "training images, a random part of them")
    parser.count("test", 10000, "test images, a random part of them")
    parser.count("sharpness", 1000, "training images that sharpness is measured on")
    parser.count("width", 64, "channels of the first stage")
    parser.add_argument(
        "--blocks",
        type=positive_integer,
        nargs="+",
        default=[2, 2, 2, 2],
        metavar="N",
        help="residual blocks in each stage (default: 2 2 2 2, a ResNet-18)",
    )
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="float32",
        help="of the computation; parameters are float32 (default: %(default)s)",
    )
    parser.add_argument(
        "--program",
        choices=["epoch", "step"],
        default="step" if jax.default_backend() == "cpu" else "epoch",
        help="what is compiled as one; on a CPU, XLA's convolutions are slow inside of "
        "a loop (default: step on a CPU, else epoch)",
    )
    parser.add_argument(
        "--budget",
        type=positive_integer,
        metavar="SECONDS",
        help="end between epochs, before a training that would last longer "
        "(default: none)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the finished trainings of the JSON that is there",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse(argv)
    budget = Budget(args.budget)
    if args.data is None:
        parser.error("argument --data: a directory with CIFAR-10 is needed")
    try:
        runs = finished_runs(args)
        data = take(load_cifar10(args.data), args.train, args.test)
    except DataError as error:
        parser.error(str(error))
    if args.batch > len(data.train_y):
        parser.error(f"argument --batch: there are {len(data.train_y)} training images")
    run = functools.partial(run_all, data=data, runs=runs, budget=budget)
    return carry_out(NAME, args, run, print_results, make_figure)


if __name__ == "__main__":
    sys.exit(main())
