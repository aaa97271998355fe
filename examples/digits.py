"""Compares SGD with sharpness-aware methods on digits whose labels are partly wrong.

    python examples/digits.py --quick

trains a Flax Linen network on the 8×8 images of handwritten digits that come with
scikit-learn. A part of the training labels is replaced by random ones. SGD learns these
by heart, which costs accuracy on the test images; sharpness-aware methods do so less.
A seed fixes the split into training and test images, the wrong labels, the initial
weights and the order of the batches.

With too large a rho, SAM no longer trains where F-SAM still does, as Table 6 of
https://arxiv.org/abs/2403.12350 reports for CIFAR-10:

    python examples/digits.py --methods sam fsam --noise 60 --rho 0.6

Every method of the library has a name here, and one table compares all of them:

    python examples/digits.py --methods all --noise 40
"""

import argparse
import importlib.metadata
import inspect
import json
import math
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits

import sam_optax

cross_entropy = optax.softmax_cross_entropy_with_integer_labels  # one per example

IMAGES = 1797
CLASSES = 10

# From sweeps on seeds 10 to 14 for the best mean accuracy, at 40 and 60 % noise for the
# first five and at 40 % for the others; well below a rho that no longer trains.
DEFAULT_RHO = {
    "sam": 0.5,
    "fsam": 0.6,
    "asam": 4.0,
    "fasam": 6.0,
    "usam": 1.0,
    "gsam": 0.3,
    "sam_plus_gap": 0.2,
    "stable_sam": 0.5,
    "stable_asam": 4.0,
    "stable_usam": 1.0,
    "wsam": 0.05,
    "gradient_norm_penalty": 0.7,
    "fisher_sam": 0.5,
    "vasso": 0.5,
    "sam_full": 0.5,
    "sam_noise": 0.5,
    "look_sam": 0.35,
    "sam_every_k": 1.5,
    "rst": 0.8,
    "ae_sam": 0.8,
    "esam": 0.5,
    "ssam": 0.7,
    "random_sam": 24.0,
    "rsam": 0.5,
    "multi_step_sam": 0.5,
    "k_sam": 0.2,
    "largest_increase": 0.3,
    "sub_batch": 0.7,
    "decoupled_wsam": 0.5,
}
FALLBACK_RHO = 0.3  # of methods that are not in the table

JSON, PNG = "digits.json", "digits.png"
QUICK = {"noise": [40], "seeds": 2}


# --- Data -----------------------------------------------------------------------------


class Data(NamedTuple):
    """The digits, split for one seed."""

    train_x: jax.Array  # shape=(train_size, 64), from 0 to 1
    train_y: jax.Array  # shape=(train_size,), partly wrong
    test_x: jax.Array
    test_y: jax.Array  # all right


def make_data(seed: int, noise: float, train_size: int) -> Data:
    """Splits the digits, and replaces `noise` % of the training labels.

    A replaced label is any of the ten with equal chances, so one in ten is right still.
    """
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    x = images[order] / 16
    y = labels[order]

    # The images are in random order by now, so the first ones are a random choice.
    replaced = round(train_size * noise / 100)
    noisy_y = np.concatenate([rng.integers(0, CLASSES, replaced), y[replaced:]])
    return Data(
        jnp.asarray(x[:train_size], jnp.float32),
        jnp.asarray(noisy_y[:train_size], jnp.int32),
        jnp.asarray(x[train_size:], jnp.float32),
        jnp.asarray(y[train_size:], jnp.int32),
    )


# --- Methods that are more than a transformation in a chain ---------------------------


class Selection(NamedTuple):
    """A transformation, and which examples of a batch its two gradients see."""

    transformation: str
    make_rule: Callable[[int], Callable]  # (batch size)


def largest_increase(batch_size: int) -> Callable:
    return sam_optax.largest_increase(max(0.5, 1 / batch_size))  # at least one example


def sub_batch(batch_size: int) -> Callable:
    return sam_optax.sub_batch(max(0.25, 1 / batch_size))


def k_sam(batch_size: int) -> Callable:
    return sam_optax.k_sam(max(1, batch_size // 2))


SELECTIONS = {
    "esam": Selection("esam", largest_increase),  # ESAM's mask and its selection
    "k_sam": Selection("sam", k_sam),
    "largest_increase": Selection("sam", largest_increase),
    "sub_batch": Selection("sam", sub_batch),
}


def data_rule(method: str, batch_size: int) -> Callable | None:
    """The `data=` of a method; None where both gradients see the whole batch."""
    return SELECTIONS[method].make_rule(batch_size) if method in SELECTIONS else None


class LossTerm(NamedTuple):
    """A term of the loss with what it remembers: one interface for SAF and MESA."""

    init: Callable  # (params) -> memory
    penalty: Callable  # (memory, logits, x, index) -> one number per example
    update: Callable  # (memory, params, logits, index) -> memory


def make_saf(apply: Callable, steps: int, args: argparse.Namespace) -> LossTerm:
    # A lag of 10 epochs, not the usual 3: fewer wrong labels were learned by then.
    saf = sam_optax.saf(args.train_size, CLASSES, lag=10, start=5 * steps)
    return LossTerm(
        lambda params: saf.init(),
        lambda memory, logits, x, index: saf.penalty(memory, logits, index),
        lambda memory, params, logits, index: saf.update(memory, logits, index),
    )


def make_mesa(apply: Callable, steps: int, args: argparse.Namespace) -> LossTerm:
    # Averaged over some 500 steps, as there are no more than 900 of them.
    mesa = sam_optax.mesa(decay=0.998, start=5 * steps)
    return LossTerm(
        mesa.init,
        lambda memory, logits, x, index: mesa.penalty(
            memory, logits, apply({"params": memory.average}, x)
        ),
        lambda memory, params, logits, index: mesa.update(memory, params),
    )


LOSS_TERMS = {"saf": make_saf, "mesa": make_mesa}  # (apply, steps per epoch, args)


def make_step_with_term(apply: Callable, term: LossTerm) -> Callable:
    def loss_fn(params, memory, x, y, index):
        logits = apply({"params": params}, x)
        losses = cross_entropy(logits, y) + term.penalty(memory, logits, x, index)
        return losses.mean(), logits

    loss_and_grads = jax.value_and_grad(loss_fn, has_aux=True)

    def train_step(state, x, y, index):
        (loss, logits), grads = loss_and_grads(state.params, state.memory, x, y, index)
        state = state.apply_gradients(grads=grads)
        memory = term.update(state.memory, state.params, logits, index)
        return state.replace(memory=memory), loss

    return train_step


def sam_function(method: str) -> Callable:
    """What makes the transformation from rho, for example sam_optax.fsam."""
    if method == "decoupled_wsam":
        return sam_optax.decoupled_wsam
    name = SELECTIONS[method].transformation if method in SELECTIONS else method
    return sam_optax.METHODS[name].make


def gradients_per_step(method: str) -> str:
    if method == "sgd":
        return "1"
    if method == "esam":  # METHODS has it without the selection, which decides here
        method = "largest_increase"
    return {**sam_optax.METHODS, **sam_optax.FURTHER_METHODS}[method].gradients


# --- Training -------------------------------------------------------------------------


class MLP(nn.Module):
    hidden: Sequence[int]

    @nn.compact
    def __call__(self, x):
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(CLASSES)(x)


class State(TrainState):
    memory: Any = None  # of a term of the loss, where there is one


class Trainer(NamedTuple):
    """Jitted functions for one seed.

    No vmap over the seeds: it would turn the branches of methods such as look_sam into
    the work of both sides on every step, and is slower on CPUs anyway.
    """

    create_state: Callable[..., State]  # (key)
    train_epoch: Callable[..., State]  # (state, key, train_x, train_y)
    accuracy: Callable[..., jax.Array]  # (state, test_x, test_y), in %


def make_trainer(method: str, rho: float | None, args: argparse.Namespace) -> Trainer:
    model = MLP(args.hidden)
    steps = args.train_size // args.batch_size
    learning_rate = optax.cosine_decay_schedule(args.learning_rate, steps * args.epochs)

    sgd = optax.sgd(learning_rate, momentum=0.9)
    term = None

    def loss_fn(params, x, y):  # one loss per example, since some methods choose
        return cross_entropy(model.apply({"params": params}, x), y)

    # The index says where the examples are in the training set; only SAF asks for it.
    if method == "sgd":
        tx = sgd
        loss_and_grads = jax.value_and_grad(lambda *args: loss_fn(*args).mean())

        def train_step(state, x, y, index):
            loss, grads = loss_and_grads(state.params, x, y)
            return state.apply_gradients(grads=grads), loss

    elif method in LOSS_TERMS:
        tx = sgd
        term = LOSS_TERMS[method](model.apply, steps, args)
        train_step = make_step_with_term(model.apply, term)

    else:
        radius = {} if rho is None else {"rho": rho}
        if method == "decoupled_wsam":
            sam, tx = sam_optax.decoupled_wsam(sgd, learning_rate, **radius)
        else:
            sam = sam_function(method)(**radius)  # for example sam_optax.fsam(rho=0.6)
            tx = optax.chain(sam, sgd)
        rule = data_rule(method, args.batch_size)
        loss_and_grads = sam_optax.sam_value_and_grad(
            loss_fn, sam, data=rule, batch_argnums=(1, 2)
        )

        def train_step(state, x, y, index):
            loss, grads = loss_and_grads(state.params, x, y, opt_state=state.opt_state)
            return state.apply_gradients(grads=grads), loss

    def create_state(key):
        params = model.init(key, jnp.zeros((1, 64)))["params"]
        memory = None if term is None else term.init(params)
        return State.create(apply_fn=model.apply, params=params, tx=tx, memory=memory)

    def train_epoch(state, key, x, y):
        order = jax.random.permutation(jax.random.fold_in(key, state.step), len(x))
        batches = order[: steps * args.batch_size].reshape(steps, args.batch_size)
        state, _ = jax.lax.scan(
            lambda state, index: train_step(state, x[index], y[index], index),
            state,
            batches,
        )
        return state

    def accuracy(state, x, y):
        logits = state.apply_fn({"params": state.params}, x)
        return 100 * jnp.mean(jnp.argmax(logits, axis=-1) == y)

    return Trainer(jax.jit(create_state), jax.jit(train_epoch), jax.jit(accuracy))


def train(
    trainer: Trainer,
    seeds: Sequence[int],
    noise: float,
    args: argparse.Namespace,
    after_epoch: Callable[[], Any] = lambda: None,
) -> list[float]:
    """Trains one network per seed, and returns their test accuracies in %."""
    data = [make_data(seed, noise, args.train_size) for seed in seeds]
    keys = [jax.random.key(seed) for seed in seeds]
    states = [trainer.create_state(key) for key in keys]
    for _ in range(args.epochs):
        for i, (key, split) in enumerate(zip(keys, data, strict=True)):
            states[i] = trainer.train_epoch(
                states[i], key, split.train_x, split.train_y
            )
        jax.block_until_ready(states)  # or the progress would run ahead of the work
        after_epoch()
    return [
        trainer.accuracy(state, split.test_x, split.test_y).item()
        for state, split in zip(states, data, strict=True)
    ]


# --- The comparison -------------------------------------------------------------------


class Result(NamedTuple):
    """What one method reached at one noise rate."""

    method: str
    rho: float | None
    noise_percent: float
    seeds: list[int]
    test_accuracy_percent: list[float]  # one per seed
    seconds: float

    @property
    def mean(self) -> float:
        return float(np.mean(self.test_accuracy_percent))

    @property
    def standard_deviation(self) -> float | None:
        if len(self.seeds) == 1:
            return None
        return float(np.std(self.test_accuracy_percent, ddof=1))

    def __str__(self) -> str:
        spread = self.standard_deviation
        return f"{self.mean:.1f}" + ("" if spread is None else f" ± {spread:.1f}")


def compare(args: argparse.Namespace, console: Console) -> list[Result]:
    """Trains every method at every noise rate."""
    results = []
    seeds = list(range(args.seeds))
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "epochs,")
    columns += (TimeRemainingColumn(), "left")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=args.epochs * len(args.methods) * len(args.noise))
        for method in args.methods:
            rho = args.rho[method]
            trainer = make_trainer(method, rho, args)
            for noise in args.noise:
                label = f"{method}, {noise:g} % noise"
                bar.update(task, description=label)
                start = time.perf_counter()
                accuracy = train(trainer, seeds, noise, args, lambda: bar.advance(task))
                seconds = time.perf_counter() - start
                result = Result(method, rho, noise, seeds, accuracy, seconds)
                results.append(result)
                if not console.is_terminal:  # there is no bar to watch
                    console.print(f"{label}: {result} ({seconds:.0f} s)")
    return results


def make_table(results: list[Result], args: argparse.Namespace) -> Table:
    table = Table()
    table.add_column("method")
    table.add_column("rho", justify="right")
    table.add_column("gradients per step")
    for noise in args.noise:
        table.add_column(f"{noise:g} % noise", justify="right")
    for method in args.methods:
        rho = args.rho[method]
        cost = gradients_per_step(method)
        cells = [str(result) for result in results if result.method == method]
        table.add_row(method, "" if rho is None else f"{rho:g}", cost, *cells)
    return table


def make_figure(results: list[Result], args: argparse.Namespace) -> Figure:
    """A panel per noise rate, with a row per method: its mean, and a dot per seed."""
    rates = len(args.noise)
    size = (4 + 3 * rates, 1.6 + 0.25 * max(4, len(args.methods)))
    figure = Figure(size, layout="constrained")
    panels = figure.subplots(1, rates, sharey=True, squeeze=False)[0]
    labels = [
        method if args.rho[method] is None else f"{method}, ρ = {args.rho[method]:g}"
        for method in args.methods
    ]
    for noise, axes in zip(args.noise, panels, strict=True):
        mine = [result for result in results if result.noise_percent == noise]
        rows = range(len(mine))
        for row, result in zip(rows, mine, strict=True):
            seeds = result.test_accuracy_percent
            axes.plot(seeds, [row] * len(seeds), "o", color="C0", ms=4, alpha=0.5)
            if result.method == "sgd":
                axes.axvline(result.mean, color="black", linewidth=1, linestyle="--")
        axes.plot([result.mean for result in mine], rows, "|", color="black", ms=11)
        axes.set_title(f"{noise:g} % wrong labels", fontsize="medium")
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.5, -0.5)  # downwards, as the table
    figure.supxlabel("test accuracy (%)", fontsize="medium")
    figure.suptitle(
        f"Handwritten digits with wrong labels, after {args.epochs} epochs\n"
        "dots: each seed; strokes: their mean; dashed line: the mean of SGD",
        fontsize="medium",
    )
    return figure


def write_results(
    results: list[Result], args: argparse.Namespace, seconds: float
) -> None:
    packages = ("sam_optax", "jax", "flax", "optax", "numpy", "scikit-learn")
    report = {
        "settings": {**vars(args), "output": str(args.output)},
        "results": [
            result._asdict()
            | {"mean": result.mean, "standard_deviation": result.standard_deviation}
            for result in results
        ],
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "seconds": seconds,
    }
    text = json.dumps(report, indent=2) + "\n"
    (args.output / JSON).write_text(text, encoding="utf-8")
    make_figure(results, args).savefig(args.output / PNG, dpi=150)


# --- The command line -----------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage


def checked(kind: Callable, is_valid: Callable[[Any], bool], wanted: str) -> Callable:
    def convert(text):
        try:
            value = kind(text)
            if math.isfinite(value) and is_valid(value):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")

    return convert


count = checked(int, lambda value: value > 0, "a positive integer")
positive = checked(float, lambda value: value > 0, "a positive number")
percentage = checked(float, lambda value: 0 <= value < 100, "at least 0 and below 100")
radius = checked(float, lambda value: value >= 0, "a number >= 0, or method=number")


def method_and_rho(text: str) -> tuple[str, float]:
    """(method, rho) from `method=rho`; ("", rho) from `rho` alone."""
    method, _, rho = text.rpartition("=")
    return method, radius(rho)


def all_methods() -> list[str]:
    return ["sgd", *sam_optax.METHODS, *sam_optax.FURTHER_METHODS]


def make_parser() -> Parser:
    parser = Parser(
        prog="digits.py",
        description="Compares SGD with sharpness-aware methods on scikit-learn's "
        "handwritten digits, with a part of the training labels replaced by random "
        "ones. Prints a table, and writes digits.json and digits.png.",
    )
    methods = (*all_methods(), "all")
    options = (
        ("--methods", str, ["sgd", "sam", "fsam"], f"any of {', '.join(methods)}"),
        ("--noise", percentage, [0, 40, 60], "%% of the training labels to replace"),
        ("--seeds", count, 5, "number of repetitions, with seeds 0, 1, 2, ..."),
        ("--epochs", count, 60, "passes over the training images"),
        ("--batch-size", count, 64, "images per step; an incomplete batch is dropped"),
        ("--train-size", count, 1000, "images to train on; the others are for testing"),
        ("--learning-rate", positive, 0.05, "start of the cosine decay to 0"),
        ("--hidden", count, [256, 256], "widths of the hidden layers"),
        ("--output", pathlib.Path, "results", f"directory for {JSON} and {PNG}"),
    )
    for option, kind, default, text in options:
        several = isinstance(default, list)
        shown = " ".join(map(str, default)) if several else default
        aliases = ["--method"] if option == "--methods" else []
        parser.add_argument(
            option,
            *aliases,
            type=kind,
            default=default,
            nargs="+" if several else None,
            choices=methods if option == "--methods" else None,
            metavar=option.strip("-").replace("-", "_").upper(),
            help=f"{text} (default: {shown})",
        )
    radii = ", ".join(f"{method} {rho:g}" for method, rho in DEFAULT_RHO.items())
    parser.add_argument(
        "--rho",
        type=method_and_rho,
        default=[],
        nargs="+",
        metavar="[METHOD=]RHO",
        help="how far to perturb the weights, for all methods or by name, as in "
        f"0.3 fsam=0.6 (default: {radii}, others {FALLBACK_RHO:g})",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a run of a few seconds, with --noise 40 and --seeds 2 unless these are "
        "given (default: off)",
    )
    return parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(argv)

    if "all" in args.methods:
        args.methods = all_methods()
    args.methods = list(dict.fromkeys(args.methods))  # each once
    args.noise = list(dict.fromkeys(map(float, args.noise)))

    radii = {method: default_rho(method) for method in args.methods}
    # The named ones come last, so that they win.
    for wanted, rho in sorted(args.rho, key=lambda pair: pair[0] != ""):
        if wanted and radii.get(wanted) is None:
            parser.error(f"argument --rho: {wanted!r} is not run, or has no rho")
        for method in [wanted] if wanted else args.methods:
            radii[method] = None if radii[method] is None else rho
    args.rho = radii

    if not args.batch_size <= args.train_size < IMAGES:
        parser.error(
            "argument --train-size: must be at least the batch size, "
            f"{args.batch_size}, and below {IMAGES}, got {args.train_size}"
        )
    try:
        check_writable(args.output)
    except OSError as error:
        parser.error(f"argument --output: {error.strerror}: {error.filename!r}")
    return args


def default_rho(method: str) -> float | None:
    """None for methods that have no rho."""
    if method == "sgd" or method in LOSS_TERMS:
        return None
    if "rho" not in inspect.signature(sam_function(method)).parameters:
        return None
    return DEFAULT_RHO.get(method, FALLBACK_RHO)


def check_writable(directory: pathlib.Path) -> None:
    """Raises OSError where the results could not be written; leaves no files."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in (directory / JSON, directory / PNG):
        is_new = not path.exists()
        path.open("ab").close()
        if is_new:
            path.unlink()


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    console = Console()
    start = time.perf_counter()
    results = compare(args, console)
    seconds = time.perf_counter() - start
    write_results(results, args, seconds)
    console.print("Test accuracy in %, mean ± standard deviation over seeds:")
    console.print(make_table(results, args))
    console.print(
        f"{seconds:.0f} s; {JSON} and {PNG} are in {args.output}", soft_wrap=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
