"""Cost at equal quality: accuracy against gradients spent, for the cheaper methods.

    python benchmarks/quality.py

trains a multilayer perceptron on 1,000 of scikit-learn's digits, with 40 % of the
labels wrong, for several numbers of epochs with each method that spends less than two
gradients per step, beside SGD and SAM. Prints at what fraction of SAM's cost each comes
as far as SAM does, and writes quality.json and quality.png, where the Pareto front is
marked. The rho of each method was tuned on other seeds, for 60 epochs.
"""

import argparse
import json
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import sam_optax

sys.path.insert(0, str(pathlib.Path(__file__).parent / "papers"))

from harness import compare_pairs, describe, integer
from loaders import load_digits
from training import MLP, PLAIN, losses_of, make_step

FORWARD = 1 / 3  # of a gradient: the usual count, one pass of three of equal work
TRAIN, BATCH_SIZE, RATE = 1000, 64, 0.05
STEPS = TRAIN // BATCH_SIZE  # of an epoch; an incomplete batch is dropped
MODEL = MLP((256, 256, 10))


class Method(NamedTuple):
    """A method, its rho, and its gradients per step (None: it decides as it goes)."""

    name: str  # in sam_optax.METHODS, or PLAIN
    rho: float | None
    cost: float | None
    data: sam_optax.data.DataRule | None = None  # what the two gradients see
    decay: float | None = None  # of momentum-SAM
    late: float | None = None  # the part of the steps, at their end, that may ascend


HALF = sam_optax.data.largest_increase(0.5)
METHODS = {
    "sgd": Method(PLAIN, None, 1),
    "sam": Method("sam", 0.5, 2),
    "look_sam": Method("look_sam", 0.35, 1 + 1 / 5),
    "sam_every_k": Method("sam_every_k", 1.5, 1 + 1 / 5),
    "rst": Method("rst", 0.8, 1.5),
    "ae_sam": Method("ae_sam", 0.8, None),
    "sub_batch": Method("sam", 0.7, 1.25, sam_optax.data.sub_batch(0.25)),
    "largest_increase": Method("sam", 0.3, 1.5 + FORWARD, HALF),
    "esam": Method("esam", 0.5, 1.5 + FORWARD, HALF),  # with its mask
    "k_sam": Method("sam", 0.2, 1 + FORWARD, sam_optax.data.k_sam(BATCH_SIZE // 2)),
    "mesa": Method(PLAIN, None, 1 + FORWARD),
    "random_sam": Method("random_sam", 24.0, 1 + FORWARD),
    "msam_0": Method("msam", 1.4, 1, decay=0.0),
    "msam_0.9": Method("msam", 1.4, 1, decay=0.9),
    "late_sam_0.5": Method("late_sam", 0.8, 1.5, late=0.5),
    "sub_batch_4": Method("sam", 1.0, 1 + 1 / 16, sam_optax.data.sub_batch(1 / 16)),
}


class Point(NamedTuple):
    """A method trained for some epochs."""

    method: str
    epochs: int
    gradients: float  # of whole batches, in all
    accuracy: list[float]  # in %, one per seed

    @property
    def mean(self) -> float:
        return float(np.mean(self.accuracy))


def make_data(seed: int, noise: float):
    """(images, labels) to train on, `noise` % of them random, and to test."""
    images, labels = load_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    x, y = images.reshape(-1, 64)[order].astype(np.float32) / 16, labels[order]
    wrong = round(TRAIN * noise / 100)
    test = x[TRAIN:], y[TRAIN:].copy()
    y[:wrong] = rng.integers(0, 10, wrong)  # one in ten is right still
    return (x[:TRAIN], y[:TRAIN]), test


def make_training(method: str, epochs: int):
    """init: params -> state; step: state, (x, y) -> state, whether it ascended."""
    name, rho, _, data, decay, late = METHODS[method]
    sgd = optax.sgd(optax.cosine_decay_schedule(RATE, STEPS * epochs), momentum=0.9)
    if method == "mesa":
        return make_mesa(sgd)
    hyper: dict[str, Any] = {} if rho is None else {"rho": rho}
    hyper |= {} if decay is None else {"decay": decay}
    hyper |= {} if late is None else {"start": round((1 - late) * STEPS * epochs)}
    options: dict[str, Any] = {"data": data, "batch_argnums": (1, 2)}
    loss_fn = lambda *args: losses_of(MODEL, *args)[0]  # noqa: E731
    init, update = make_step(loss_fn, name, sgd, hyper, **options)

    def step(state, batch):
        *state, _, report = update(*state, *batch)
        return tuple(state), report.ascended

    return lambda params: (params, init(params)), step


def make_mesa(sgd):
    # Averaged over some 500 steps, as there are no more than 900 of them in 60 epochs.
    mesa = sam_optax.mesa(decay=0.998, start=5 * STEPS)

    def loss_fn(params, memory, x, y):
        losses, logits = losses_of(MODEL, params, x, y)
        average = MODEL.apply(memory.average, x)
        return (losses + mesa.penalty(memory, logits, average)).mean()

    def step(state, batch):
        params, opt_state, memory = state
        grads = jax.grad(loss_fn)(params, memory, *batch)
        updates, opt_state = sgd.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state, mesa.update(memory, params)), False

    return lambda params: (params, sgd.init(params), mesa.init(params)), step


def train(method: str, epochs: int, seeds: range, noise: float) -> list[float]:
    """Test accuracies in %, one per seed."""
    init, step = make_training(method, epochs)

    @jax.jit
    def train_epoch(state, key, x, y):
        order = jax.random.permutation(key, TRAIN)[: STEPS * BATCH_SIZE]
        batches = order.reshape(STEPS, BATCH_SIZE)
        return jax.lax.scan(lambda s, i: step(s, (x[i], y[i])), state, batches)[0]

    @jax.jit
    def percent_right(params, x, y):
        _, logits = losses_of(MODEL, params, x, y)
        return 100 * jnp.mean(jnp.argmax(logits, axis=-1) == y)

    accuracies = []
    for seed in seeds:
        key = jax.random.key(seed)
        data, (x, y) = make_data(seed, noise)
        state = init(jax.jit(MODEL.init)(key, data[0][:1]))
        for epoch in range(epochs):
            state = train_epoch(state, jax.random.fold_in(key, STEPS * epoch), *data)
        accuracies.append(float(percent_right(state[0], x, y)))
    return accuracies


def cost(method: str, epochs: int, noise: float) -> float:
    """Gradients per step; where it is not known, those of a training of seed 0."""
    if METHODS[method].cost is not None:
        return METHODS[method].cost
    (x, y), _ = make_data(0, noise)
    init, step = make_training(method, epochs)
    keys = jax.random.split(jax.random.key(0), epochs + 1)
    order = jax.vmap(lambda key: jax.random.permutation(key, TRAIN))(keys[1:])
    batches = order[:, : STEPS * BATCH_SIZE].reshape(-1, BATCH_SIZE)
    x, y = jnp.asarray(x), jnp.asarray(y)
    body = lambda s, i: step(s, (x[i], y[i]))  # noqa: E731
    ascended = jax.jit(lambda state: jax.lax.scan(body, state, batches)[1])
    return 1 + float(ascended(init(MODEL.init(keys[0], x[:1]))).mean())


def train_all(args: argparse.Namespace, console: Console) -> list[Point]:
    points = []
    for method in args.methods:
        for epochs in args.lengths:
            accuracy = train(method, epochs, range(args.seeds), args.noise)
            gradients = cost(method, epochs, args.noise) * STEPS * epochs
            points.append(Point(method, epochs, gradients, accuracy))
            shown = f"{describe(accuracy)} for {gradients:.0f} gradients"
            console.print(f"{method}, {epochs} epochs: {shown}")
    return points


def pareto_front(points: list[Point]) -> list[Point]:
    """The points that no cheaper one surpasses, by their means."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.gradients, -p.mean)):
        if not front or point.mean > front[-1].mean:
            front.append(point)
    return front


def comes_as_far(point: Point, goal: Point) -> bool:
    """Whether a point is within a standard error of the goal, compared seed by seed."""
    pairs = compare_pairs(point.accuracy, goal.accuracy)
    return pairs.mean >= -pairs.error


def describe_less(point: Point, goal: Point) -> str:
    """The difference to the goal, with its 95 % interval; empty for the goal itself."""
    if point == goal:
        return ""
    return compare_pairs(point.accuracy, goal.accuracy).show()


def make_table(points: list[Point], goal: Point) -> Table:
    table = Table()
    for title in ("method", "gradients per step"):
        table.add_column(title)
    for epochs in sorted({point.epochs for point in points}):
        table.add_column(f"{epochs} epochs", justify="right")
    table.add_column(f"{goal.epochs} epochs less SAM's", justify="right")
    table.add_column(f"of SAM's cost for SAM's {goal.mean:.1f} %", justify="right")
    for method in dict.fromkeys(point.method for point in points):
        mine = [point for point in points if point.method == method]
        enough = [p.gradients for p in mine if comes_as_far(p, goal)]
        fraction = f"{min(enough) / goal.gradients:.2f}" if enough else "not reached"
        per_step = mine[-1].gradients / mine[-1].epochs / STEPS
        cells = [describe(point.accuracy) for point in mine]
        (as_long,) = (point for point in mine if point.epochs == goal.epochs)
        difference = describe_less(as_long, goal)
        table.add_row(method, f"{per_step:.2f}", *cells, difference, fraction)
    return table


def make_figure(points: list[Point], goal: Point) -> Figure:
    figure = Figure((9, 6), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(point.method for point in points))
    for i, method in enumerate(methods):
        mine = [point for point in points if point.method == method]
        x = [point.gradients for point in mine]
        wrong = [100 - point.mean for point in mine]
        spread = [np.std(point.accuracy, ddof=1) for point in mine]
        style = {"marker": "osD^v<>PX*hp"[i % 12], "linewidth": 1, "capsize": 2}
        style["color"] = matplotlib.colormaps["tab20"](i % 20)
        axes.errorbar(x, wrong, spread, label=method, **style)
    front = [(point.gradients, 100 - point.mean) for point in pareto_front(points)]
    style = {"where": "post", "color": "black", "linewidth": 3, "alpha": 0.25}
    axes.step(*zip(*front, strict=True), label="Pareto front, of the means", **style)
    style = {"color": "grey", "linestyle": ":", "linewidth": 1}
    axes.axhline(100 - goal.mean, label=f"sam, {goal.epochs} epochs", **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("gradients of a batch, in all")
    axes.set_ylabel("wrong on the test set in %, mean ± standard deviation")
    figure.legend(fontsize="small", loc="outside right upper")
    return figure


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Accuracy against gradients spent, for the cheaper methods."
    )
    names = list(METHODS)
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=integer,
        default=[15, 30, 60, 120],
        help="numbers of epochs (default: 15 30 60 120); SAM's goal is that of 60, or "
        "of the longest",
    )
    parser.add_argument("--noise", type=float, default=40)
    parser.add_argument("--seeds", type=integer, default=5)
    parser.add_argument("--output", type=pathlib.Path, default="results")
    args = parser.parse_args(argv)
    args.methods = list(dict.fromkeys(["sam", *args.methods]))
    args.lengths = sorted(set(args.lengths))
    if args.seeds < 2:
        parser.error("argument --seeds: a spread takes at least 2")
    if not 0 <= args.noise < 100:
        parser.error("argument --noise: must be at least 0 and below 100")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    console = Console(width=150)
    points = train_all(args, console)
    length = 60 if 60 in args.lengths else args.lengths[-1]
    goal = next(p for p in points if (p.method, p.epochs) == ("sam", length))
    content: dict[str, Any] = {
        "noise_percent": args.noise,
        "seeds": args.seeds,
        "rho": {name: method.rho for name, method in METHODS.items()},
        "goal": goal._asdict(),
        "points": [point._asdict() for point in points],
        "pareto_front": [[p.method, p.epochs] for p in pareto_front(points)],
    }
    (args.output / "quality.json").write_text(json.dumps(content, indent=2) + "\n")
    make_figure(points, goal).savefig(args.output / "quality.png", dpi=120)
    console.print(make_table(points, goal))
    console.print(f"quality.json and quality.png are in {args.output}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
