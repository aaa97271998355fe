"""Cost at equal quality: accuracy against gradients spent, for the cheaper methods.

    python benchmarks/quality.py

trains the digits network of `examples/digits.py`, with 40 % of the labels wrong, for
several numbers of epochs with each method that spends less than two gradients per step,
beside SGD and SAM. Prints at what fraction of SAM's cost each comes as far as SAM does,
and writes quality.json and quality.png, where the Pareto front is marked. The rho of
each method is the default of the example, tuned there on other seeds, for 60 epochs.
"""

import argparse
import json
import math
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from scipy import stats

import sam_optax

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))

import digits

FORWARD = 1 / 3  # of a gradient: the usual count, one pass of three of equal work

# Gradients per step with the settings of the example; ae_sam decides as it goes.
COST = {
    "sgd": 1,
    "sam": 2,
    "look_sam": 1 + 1 / 5,
    "sam_every_k": 1 + 1 / 5,
    "rst": 1.5,
    "ae_sam": None,
    "sub_batch": 1.25,
    "largest_increase": 1.5 + FORWARD,
    "esam": 1.5 + FORWARD,
    "k_sam": 1 + FORWARD,
    "mesa": 1 + FORWARD,
    "random_sam": 1 + FORWARD,
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

    @property
    def deviation(self) -> float:
        return float(np.std(self.accuracy, ddof=1))


def share_of_ascents(method: str, rho: float, args: argparse.Namespace) -> float:
    """How many of the steps take the second gradient, in a training of seed 0."""
    model = digits.MLP(args.hidden)
    data = digits.make_data(0, args.noise, args.train_size)
    steps = args.train_size // args.batch_size
    schedule = optax.cosine_decay_schedule(args.learning_rate, steps * args.epochs)
    sam = digits.sam_function(method)(rho)
    tx = optax.chain(sam, optax.sgd(schedule, momentum=0.9))

    def loss_fn(params, x, y):
        return digits.cross_entropy(model.apply({"params": params}, x), y).mean()

    loss_and_grads = sam_optax.sam_value_and_grad(loss_fn, sam, report=True)

    def step(carry, index):
        params, state = carry
        x, y = data.train_x[index], data.train_y[index]
        _, grads = loss_and_grads(params, x, y, opt_state=state)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), grads.report.ascended

    keys = jax.random.split(jax.random.key(0), args.epochs + 1)
    params = model.init(keys[0], data.train_x[:1])["params"]
    order = jax.vmap(lambda key: jax.random.permutation(key, args.train_size))(keys[1:])
    batches = order[:, : steps * args.batch_size].reshape(-1, args.batch_size)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, batches)[1])
    return float(run((params, tx.init(params))).mean())


def cost(method: str, args: argparse.Namespace) -> float:
    if COST[method] is not None:
        return COST[method]
    return 1 + share_of_ascents(method, args.rho[method], args)


def train_all(args: argparse.Namespace, console: Console) -> list[Point]:
    points = []
    steps = args.train_size // args.batch_size
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "trainings,")
    columns += (TimeRemainingColumn(), "left")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(args.methods) * len(args.lengths))
        for method in args.methods:
            for epochs in args.lengths:
                bar.update(task, description=f"{method}, {epochs} epochs")
                now = argparse.Namespace(**{**vars(args), "epochs": epochs})
                trainer = digits.make_trainer(method, args.rho[method], now)
                accuracy = digits.train(trainer, range(args.seeds), args.noise, now)
                gradients = cost(method, now) * steps * epochs
                points.append(Point(method, epochs, gradients, accuracy))
                bar.advance(task)
                if not console.is_terminal:  # there is no bar to watch
                    point = points[-1]
                    console.print(
                        f"{method}, {epochs} epochs: {point.mean:.1f} ± "
                        f"{point.deviation:.1f} for {gradients:.0f} gradients"
                    )
    return points


def pareto_front(points: list[Point]) -> list[Point]:
    """The points that no cheaper one surpasses, by their means."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.gradients, -p.mean)):
        if not front or point.mean > front[-1].mean:
            front.append(point)
    return front


def less(point: Point, goal: Point) -> tuple[float, float]:
    """Accuracy less the goal's on the same seeds: the mean and its standard error."""
    differences = np.subtract(point.accuracy, goal.accuracy)
    error = np.std(differences, ddof=1) / math.sqrt(len(differences))
    return float(np.mean(differences)), float(error)


def comes_as_far(point: Point, goal: Point) -> bool:
    """Whether a point is within a standard error of the goal, compared seed by seed."""
    mean, error = less(point, goal)
    return mean >= -error


def describe_less(point: Point, goal: Point) -> str:
    """The difference to the goal, with its 95 % interval; empty for the goal itself."""
    if point == goal:
        return ""
    mean, error = less(point, goal)
    half_width = stats.t.ppf(0.975, len(goal.accuracy) - 1) * error
    return f"{round(mean, 1) + 0.0:+.1f} ± {half_width:.1f}"  # +0.0, never -0.0


def make_table(points: list[Point], goal: Point) -> Table:
    table = Table()
    for title in ("method", "gradients per step"):
        table.add_column(title)
    lengths = sorted({point.epochs for point in points})
    for epochs in lengths:
        table.add_column(f"{epochs} epochs", justify="right")
    table.add_column(f"{goal.epochs} epochs less SAM's", justify="right")
    table.add_column(f"of SAM's cost for SAM's {goal.mean:.1f} %", justify="right")
    steps = goal.gradients / goal.epochs / COST["sam"]
    for method in dict.fromkeys(point.method for point in points):
        mine = [point for point in points if point.method == method]
        enough = [p.gradients for p in mine if comes_as_far(p, goal)]
        fraction = f"{min(enough) / goal.gradients:.2f}" if enough else "not reached"
        per_step = mine[-1].gradients / mine[-1].epochs / steps
        cells = [f"{point.mean:.1f} ± {point.deviation:.1f}" for point in mine]
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
        axes.errorbar(
            [point.gradients for point in mine],
            [100 - point.mean for point in mine],
            [point.deviation for point in mine],
            marker="osD^v<>PX*hp"[i % 12],
            color=matplotlib.colormaps["tab20"](i % 20),
            linewidth=1,
            capsize=2,
            label=method,
        )
    front = pareto_front(points)
    axes.step(
        [point.gradients for point in front],
        [100 - point.mean for point in front],
        where="post",
        color="black",
        linewidth=3,
        alpha=0.25,
        label="Pareto front, of the means",
    )
    axes.axhline(
        100 - goal.mean,
        color="grey",
        linestyle=":",
        linewidth=1,
        label=f"sam, {goal.epochs} epochs",
    )
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
    defaults = digits.parse_arguments(["--methods", *COST, "--output", "."])
    parser.set_defaults(**vars(defaults))
    parser.add_argument("--methods", nargs="+", choices=list(COST), default=list(COST))
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=digits.count,
        default=[15, 30, 60, 120],
        help="numbers of epochs (default: 15 30 60 120); SAM's goal is that of 60, or "
        "of the longest",
    )
    parser.add_argument("--noise", type=digits.percentage, default=40)
    parser.add_argument("--seeds", type=digits.count, default=5)
    parser.add_argument("--output", type=pathlib.Path, default="results")
    args = parser.parse_args(argv)
    args.methods = list(dict.fromkeys(["sam", *args.methods]))
    args.lengths = sorted(set(args.lengths))
    if args.seeds < 2:
        parser.error("argument --seeds: a spread takes at least 2")
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
        "rho": args.rho,
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
