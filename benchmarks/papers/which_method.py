"""Which method? All of the library on digits and MNIST: accuracy beside cost.

    python benchmarks/papers/which_method.py --data DIRECTORY

trains SGD and every method of `sam_optax.METHODS`, and three that choose examples, with
right labels and with 40 % of the training labels replaced by random ones (one in ten of
these is right by chance). SGD also runs for twice the epochs, the cost of SAM.

Of scikit-learn's digits, 700 images are to train on, 300 for validation and 797 for the
test. Those of MNIST are all from its test set, of which DIRECTORY has the files: 2,000
to train on, 1,000 for validation and 7,000 for the test. Without DIRECTORY, digits
alone. Test images are the same for every seed; the others are divided anew for each.

Batches of 64, momentum 0.9, weight decay 5e-4, a cosine decay of the learning rate, and
a multilayer perceptron. Every method chooses among eight settings by its mean accuracy
on validation images, and is then tested on new seeds. For SGD these are eight learning
rates; for the others, two learning rates times four radii, which are those of SAM times
a number for the method, as RHOS and UNITS below say. What else a method has is as the
library has it by default.

Gradients are counted on the steps that take them, a forward pass as a third of one.
Time is measured afterwards, in rounds in which every method trains for some 60 steps.
"""

import functools
import inspect
import itertools
import math
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy import stats

import sam_optax
from evidence import (
    Parser,
    carry_out,
    column,
    compare_pairs,
    describe,
    make_table,
    of,
    progress,
)
from friendly import split_with_noise
from loaders import DataError, load_digits, load_mnist_test
from training import MLP, PLAIN, Trainer, decayed_sgd, make_trainer

NAME = "which_method"
BATCH_SIZE = 64
NOISES = [0, 40]  # % of the training labels
TUNING_SEED = 1000  # the first of those for the choice of the settings
ROUNDS, TIMED_STEPS = 15, 60

SGD_RATES = [0.05, 0.1, 0.025, 0.2, 0.0125, 0.4, 0.006, 0.003]
RATES = [0.1, 0.025]
RHOS = [0.06, 0.12, 0.25, 0.5]
# For the same range to be of use: where the paper says so (ASAM, ten times), where the
# gap counts more than once (its weight in WSAM is 9), where not all steps ascend, and
# where rho is not the length of ε, or ε not along g. From validation images only.
UNITS = {
    **dict.fromkeys(("asam", "fasam", "stable_asam"), 10),
    **dict.fromkeys(("usam", "stable_usam"), 2),
    **dict.fromkeys(("rst", "ae_sam"), 2),
    "sam_every_k": 3,
    "sam_plus_gap": 0.5,
    "wsam": 0.1,
    "random_sam": 40,
}

FORWARD = 1 / 3  # of a gradient
PASSES = {  # what METHODS says -> gradients of a step that ascends; of others it is 2
    "1 + a forward pass": 1 + FORWARD,
    "2 + a forward pass": 2 + FORWARD,
    "n + 1": 3,
}


class Entry(NamedTuple):
    """A line of the tables.

    Attributes:
      method: of `sam_optax.METHODS`, or PLAIN.
      unit: RHOS are multiplied by it.
      passes: gradients of a step that ascends.
      rule: which examples the two gradients see; None for the whole batch.
      stretch: how many times the epochs of the others it trains.
    """

    method: str
    unit: float = 1
    passes: float = 2
    rule: sam_optax.DataRule | None = None
    stretch: int = 1

    def settings(self) -> list[dict[str, float]]:
        if self.method == PLAIN:
            return [{"learning_rate": rate} for rate in SGD_RATES]
        pairs = itertools.product(RHOS, RATES)
        return [{"learning_rate": rate, "rho": self.unit * rho} for rho, rate in pairs]


def make_entries() -> dict[str, Entry]:
    entries = {"sgd": Entry(PLAIN), "sgd_twice": Entry(PLAIN, stretch=2)}
    for name, method in sam_optax.METHODS.items():
        passes = PASSES.get(method.gradients, 2)
        entries[name] = Entry(name, UNITS.get(name, 1), passes)
    half = sam_optax.largest_increase(0.5)
    for name in ("esam", "largest_increase"):  # the one with its mask, as published
        method = "esam" if name == "esam" else "sam"
        entries[name] = Entry(method, 1, 1.5 + FORWARD, half)
    entries["sub_batch"] = Entry("sam", 1, 1.25, sam_optax.sub_batch(0.25))
    entries["k_sam"] = Entry("sam", 1, 1 + FORWARD, sam_optax.k_sam(BATCH_SIZE // 2))
    return entries


ENTRIES = make_entries()
BASELINES = ["sgd", "sgd_twice", "sam"]


class Task(NamedTuple):
    title: str
    sizes: tuple[int, int]  # to train on, and for validation
    widths: tuple[int, ...]


TASKS = {
    "digits": Task("digits", (700, 300), (128, 128, 10)),
    "mnist": Task("MNIST", (2000, 1000), (64, 64, 10)),
}


# --- Runs -----------------------------------------------------------------------------


@functools.cache  # settings are no part of the program
def trainer_of(name: str, task: str, epochs: int) -> Trainer:
    entry = ENTRIES[name]
    _, (train, _), widths = TASKS[task]
    return make_trainer(
        MLP(widths),
        entry.method,
        decayed_sgd(epochs * (train // BATCH_SIZE)),
        BATCH_SIZE,
        data=entry.rule,
        watch=lambda report: report.ascended,
    )


def takes_key(method: str) -> bool:
    if method == PLAIN:
        return False
    return "key" in inspect.signature(sam_optax.METHODS[method].make).parameters


def draws_of(name: str, key: jax.Array) -> dict[str, jax.Array]:
    """The key of a method that draws, so that each seed has its own."""
    return (
        {"key": jax.random.fold_in(key, 1)} if takes_key(ENTRIES[name].method) else {}
    )


def epochs_of(task: str, steps: int) -> int:
    return math.ceil(steps / (TASKS[task].sizes[0] // BATCH_SIZE))


def train_once(data, steps: int, name: str, task: str, noise, setting, seed: int):
    """One training; accuracies in %, and what it cost."""
    entry = ENTRIES[name]
    train, *parts = split_with_noise(data[task], TASKS[task].sizes, seed, noise)
    epochs = entry.stretch * epochs_of(task, steps)
    trainer = trainer_of(name, task, epochs)
    key = jax.random.key(seed)
    hyper = setting | draws_of(name, key)
    state = trainer.init(hyper, key, train[0])
    ascended = []
    for _ in range(epochs):
        state, (_, seen) = trainer.epoch(state, hyper, key, *train)
        ascended.append(seen)
    run: dict[str, Any] = {"method": name, "task": task, "noise": noise, "seed": seed}
    run |= {"rho": None, **setting}
    share = float(np.mean(ascended))
    run["gradients"] = entry.stretch * (1 + share * (entry.passes - 1))
    for part, examples in zip(("validation", "test"), parts, strict=True):
        run[part] = float(trainer.evaluate(state, *examples)[1])
    return run


def measure_times(args, data, task: str) -> list[dict]:
    """All methods in turn, so that other work on the machine slows all of them."""
    train, *_ = split_with_noise(data[task], TASKS[task].sizes, 0, 0)
    key = jax.random.key(0)
    ready = []
    for name in args.methods:
        entry = ENTRIES[name]
        trainer = trainer_of(name, task, entry.stretch * epochs_of(task, args.steps))
        hyper = entry.settings()[0] | draws_of(name, key)
        ready.append((name, trainer, hyper, trainer.init(hyper, key, train[0])))
    runs = []
    for i, (name, trainer, hyper, state) in itertools.product(range(ROUNDS), ready):
        start = time.perf_counter()
        for _ in range(epochs_of(task, TIMED_STEPS)):
            state, _ = trainer.epoch(state, hyper, key, *train)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start
        run = {"on": "time", "method": name, "task": task, "round": i}
        runs.append(run | {"seconds": seconds})
    return runs


def run_all(args, console: Console, data) -> list[dict]:
    tuning_seeds = range(TUNING_SEED, TUNING_SEED + args.tuning_seeds)
    cases = [
        (n, task, noise) for n in args.methods for task in data for noise in NOISES
    ]
    runs = []
    with progress(console, len(cases)) as advance:
        for name, task, noise in cases:
            run = functools.partial(train_once, data, args.steps, name, task, noise)
            tuning = []
            for setting in ENTRIES[name].settings()[: args.settings]:
                tried = [run(setting, seed) for seed in tuning_seeds]
                tuning.append((np.mean(column(tried, "validation")), setting))
                runs += [run | {"on": "validation"} for run in tried]
            _, best = max(tuning, key=lambda pair: pair[0])
            tests = [run(best, seed) for seed in range(args.seeds)]
            runs += [run | {"on": "test"} for run in tests]
            accuracy = describe(column(tests, "test"))
            advance(f"{name}, {task}, {noise} % noise, {best}: {accuracy} %")
    return runs + [run for task in data for run in measure_times(args, data, task)]


def tests_of(runs: list[dict], **wanted) -> list[dict]:
    return of(runs, on="test", **wanted)


def cases_of(runs: list[dict]) -> list[dict[str, Any]]:
    tasks = dict.fromkeys(column(runs, "task"))
    return [{"task": task, "noise": noise} for task in tasks for noise in NOISES]


def title_of(task: str, noise: float) -> str:
    return f"{TASKS[task].title}, {noise} % noise"


# --- Results --------------------------------------------------------------------------


def less(runs: list[dict], name: str, other: str, **case):
    """Test accuracy less that of another, on the same seeds."""
    pair = (tests_of(runs, method=method, **case) for method in (name, other))
    return compare_pairs(*(column(tests, "test") for tests in pair))


def mean_test(runs: list[dict], name: str, **case) -> float:
    return float(np.mean(column(tests_of(runs, method=name, **case), "test")))


def time_ratio(runs: list[dict], name: str, task: str) -> float:
    """Of a training to one of SGD, the median over the rounds."""
    mine, sgd = (
        column(of(runs, on="time", method=method, task=task), "seconds")
        for method in (name, "sgd")
    )
    ratios = np.divide(mine, sgd)
    return ENTRIES[name].stretch * float(np.median(ratios))


def gradients_ratio(runs: list[dict], name: str, **case) -> float:
    return float(np.mean(column(tests_of(runs, method=name, **case), "gradients")))


def is_clear(pairs) -> bool:
    """Whether the 95 % interval leaves out zero."""
    return abs(pairs.mean) > pairs.half_width


def print_results(runs: list[dict], args, console: Console) -> None:
    for case in cases_of(runs):
        console.print(case_table(runs, args.methods, case))
        compared = [name for name in args.methods if name not in BASELINES]
        pairs = {name: less(runs, name, "sam", **case) for name in compared}
        for word, sign in (("better", 1), ("worse", -1)):
            clear = [n for n, p in pairs.items() if is_clear(p) and sign * p.mean > 0]
            names = ", ".join(clear) or "none"
            console.print(f"clearly {word} than sam: {names}", soft_wrap=True)
        if pairs:
            width = np.median([p.half_width for p in pairs.values()])
            console.print(
                f"of {len(pairs)} equal methods {0.05 * len(pairs):.1f} would be so by "
                f"chance; the intervals are ± {width:.2f} points in the median"
            )
    console.print(summary_table(runs, args.methods))
    console.print("▲ ▼: clearly above, below sam on the same seeds")
    names = [name for name in args.methods if ENTRIES[name].method != PLAIN]
    if len(names) > 2:
        print_ranks(runs, names, console)


def print_ranks(runs: list[dict], names: list[str], console: Console) -> None:
    """How far the order of the methods in one case is their order in another."""
    for one, other in itertools.combinations(cases_of(runs), 2):
        ranks = (
            stats.rankdata([mean_test(runs, name, **case) for name in names])
            for case in (one, other)
        )
        titles = f"{title_of(**one)} and {title_of(**other)}"
        correlation = np.corrcoef(*ranks)[0, 1]
        console.print(f"rank correlation, {titles}: {correlation:.2f}", soft_wrap=True)


def case_table(runs: list[dict], names: list[str], case: dict[str, Any]) -> Table:
    headings = ("gradients", "time", "learning rate", "rho", "test", "less SGD's")
    table = make_table(title_of(**case), *headings, "less SAM's")
    for name in names:
        tests = tests_of(runs, method=name, **case)
        pairs = [less(runs, name, other, **case) for other in ("sgd", "sam")]
        table.add_row(
            name,
            f"{gradients_ratio(runs, name, **case):.2f}",
            f"{time_ratio(runs, name, case['task']):.2f}",
            f"{tests[0]['learning_rate']:g}{edge(runs, tests[0], 'learning_rate')}",
            f"{tests[0]['rho']:g}{edge(runs, tests[0], 'rho')}"
            if tests[0]["rho"]
            else "",
            describe(column(tests, "test")),
            *(
                "" if name == other else f"{p.mean:+.1f} ± {p.half_width:.1f}"
                for other, p in zip(("sgd", "sam"), pairs, strict=True)
            ),
        )
    return table


def edge(runs: list[dict], chosen: dict, key: str) -> str:
    """A star where the choice is the least or the largest of three or more."""
    keys = ("method", "task", "noise")
    same = {k: chosen[k] for k in keys}
    tried = set(column(of(runs, on="validation", **same), key))
    ends = (min(tried), max(tried)) if len(tried) > 2 else ()
    return "*" if chosen[key] in ends else ""


def summary_table(runs: list[dict], names: list[str]) -> Table:
    """Time is that on the last of the tasks."""
    cases = cases_of(runs)
    titles = (title_of(**case) for case in cases)
    table = make_table("method", "gradients", "time", *titles)
    for name in names:
        gradients = np.mean([gradients_ratio(runs, name, **case) for case in cases])
        cells = []
        for case in cases:
            pairs = less(runs, name, "sam", **case)
            mark = ("▲" if pairs.mean > 0 else "▼") if is_clear(pairs) else " "
            tests = tests_of(runs, method=name, **case)
            cells.append(f"{describe(column(tests, 'test'))} {mark}")
        ratio = time_ratio(runs, name, cases[-1]["task"])
        table.add_row(name, f"{gradients:.2f}", f"{ratio:.2f}", *cells)
    return table


def make_figure(runs: list[dict], args) -> Figure:
    """A panel for each case: a number for each method, and the front of the means."""
    cases = cases_of(runs)
    rows = len(cases) // 2
    figure = Figure((11, 1 + 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False).flat
    colors = matplotlib.colormaps["tab20"]
    for axes, case in zip(panels, cases, strict=True):
        points = []
        for i, name in enumerate(args.methods):
            accuracy = mean_test(runs, name, **case)
            points.append((time_ratio(runs, name, case["task"]), accuracy))
            style = (
                {"color": "black"} if name in BASELINES else {"color": colors(i % 20)}
            )
            axes.plot(*points[-1], "o", ms=11, alpha=0.35, markeredgewidth=0, **style)
            axes.annotate(
                str(i), points[-1], fontsize="x-small", ha="center", va="center"
            )
        front = [
            p for p in sorted(points) if p[1] >= max(q[1] for q in points if q <= p)
        ]
        axes.step(*zip(*front, strict=True), "k", where="post", lw=2.5, alpha=0.2)
        axes.axhline(mean_test(runs, "sam", **case), color="grey", linestyle=":", lw=1)
        accuracies = [p[1] for p in points]
        # Methods that fail are below the panel.
        shown = [a for a in accuracies if a > np.median(accuracies) - 5]
        axes.set_ylim(min(shown) - 0.3, max(shown) + 0.3)
        axes.set_title(title_of(**case), fontsize="medium")
        axes.set_xlabel("time of a training / SGD's")
        axes.set_ylabel("test accuracy (%)")
        axes.grid(alpha=0.3)
    names = "\n".join(f"{i}  {name}" for i, name in enumerate(args.methods))
    figure.legend(handles=[], title=names, loc="outside right center", alignment="left")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    quick = {"methods": ["sam", "look_sam"], "seeds": 2, "tuning_seeds": 1}
    quick |= {"settings": 2, "steps": 20}
    parser = Parser(__doc__, quick)
    parser.data("directory with the files of MNIST (default: digits alone)")
    parser.names("methods", list(ENTRIES), "which to train")
    parser.count("seeds", 10, "trainings of each method, with the setting it chose")
    parser.count("tuning-seeds", 3, "trainings of each setting, for the choice")
    parser.count("settings", 8, "settings to choose from, at most")
    parser.count("steps", 600, "of each training, and up to a whole epoch")
    args = parser.parse(argv)
    args.methods = list(dict.fromkeys([*BASELINES, *args.methods]))
    data = {"digits": load_digits()}
    try:
        data |= {"mnist": load_mnist_test(args.data)} if args.data else {}
    except DataError as error:
        parser.error(str(error))
    run = functools.partial(run_all, data=data)
    return carry_out(NAME, args, run, print_results, make_figure)


if __name__ == "__main__":
    sys.exit(main())
