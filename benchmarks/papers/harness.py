"""The frame of every experiment: its command line, runs, tables, figure and statistics.

A script derives a class from `Experiment`. The class has the options of the command
line, a plan that yields the cases, what is measured of a case, and a report of tables.
The rest is here.
"""

import argparse
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn

import jax
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import stats

from loaders import DataError

PACKAGES = ("sam_optax", "jax", "jaxlib", "optax", "flax", "numpy", "scikit-learn")
SECONDS_BETWEEN_SAVES = 10
TUNING_SEED = 1000

# --- Statistics -----------------------------------------------------------------------


def describe(values: Sequence[float] | np.ndarray, digits: int = 1) -> str:
    """Mean ± standard deviation; the mean alone of one value, and nothing of none."""
    if len(values) == 0:
        return ""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


class Pairs(NamedTuple):
    """Differences of two methods on the same seeds."""

    mean: float  # first less second
    error: float  # the standard error of the mean; NaN for one seed
    half_width: float  # of the 95 % interval of the mean, by Student's t
    larger: int  # on how many seeds the first is larger
    seeds: int

    def __str__(self) -> str:
        interval = f"{self.mean:+.3g} ± {self.half_width:.2g} (95 %)"
        return f"{interval}, larger on {self.larger} of {self.seeds}"

    def show(self, digits: int = 1) -> str:
        mean = f"{round(self.mean, digits) + 0.0:+.{digits}f}"  # never -0.0
        return mean if self.seeds < 2 else f"{mean} ± {self.half_width:.{digits}f}"


def compare_pairs(first: Sequence[float], second: Sequence[float]) -> Pairs:
    differences = np.subtract(first, second)
    n = len(differences)
    error = np.std(differences, ddof=1) / n**0.5 if n > 1 else math.nan
    half_width = stats.t.ppf(0.975, n - 1) * error
    larger = int((differences > 0).sum())
    return Pairs(float(differences.mean()), float(error), float(half_width), larger, n)


# --- Runs -----------------------------------------------------------------------------


class Runs(list[dict[str, Any]]):
    """What was measured: a dict for each run, with its case and its numbers."""

    def of(self, **wanted: Any) -> "Runs":
        return Runs(run for run in self if wanted.items() <= run.items())

    def column(self, key: str, **wanted: Any) -> list[Any]:
        return [run[key] for run in self.of(**wanted)]

    def values(self, key: str, **wanted: Any) -> list[Any]:
        """The different values, in the order of the runs."""
        return list(dict.fromkeys(self.column(key, **wanted)))

    def by(self, key: str, values: Iterable | None = None) -> dict[Any, "Runs"]:
        """Value -> the runs with it; of these values, or of all there are."""
        values = self.values(key) if values is None else values
        return {value: self.of(**{key: value}) for value in values}

    def best(self, by: str, *keys: str, sign: int = 1) -> "Runs":
        """Of the groups that share the values of the keys, that of the best mean."""
        groups: dict[tuple, Runs] = {}
        for run in self:
            groups.setdefault(tuple(run[key] for key in keys), Runs()).append(run)
        means = [sign * np.mean(group.column(by)) for group in groups.values()]
        return list(groups.values())[int(np.argmax(np.nan_to_num(means, nan=-np.inf)))]

    def less(self, others: "Runs", key: str) -> Pairs | None:
        """The differences on the seeds that both have; None where there are none."""
        theirs = {run["seed"]: run[key] for run in others}
        pairs = [(r[key], theirs[r["seed"]]) for r in self if r["seed"] in theirs]
        return compare_pairs(*zip(*pairs, strict=True)) if pairs else None


def cases(**values: Iterable) -> Iterator[dict[str, Any]]:
    """All combinations, the last of the names varying fastest."""
    for case in itertools.product(*values.values()):
        yield dict(zip(values, case, strict=True))


def tuned(runs, case, settings, tuning_seeds, seeds, by="validation", sign=1):
    """Cases for a choice by validation on seeds from 1000, and of tests on new ones."""
    setting, *others = settings
    if others:
        validation = case | {"on": "validation"}
        for tried, i in itertools.product(settings, range(tuning_seeds)):
            yield validation | tried | {"seed": TUNING_SEED + i}
        best = runs.of(**validation).best(by, *setting, sign=sign)
        setting = {key: best[0][key] for key in setting}
    yield from (case | {"on": "test"} | setting | {"seed": i} for i in range(seeds))


def setting_of(run: dict[str, Any]) -> dict[str, float]:
    """The learning rate and the radius, where there is one."""
    keys = ("learning_rate", "rho")
    return {key: run[key] for key in keys if run[key] is not None}


# --- Experiments ----------------------------------------------------------------------


class OutOfTime(Exception):
    """The budget does not suffice for what comes next."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage


def integer(text: str, least: int = 1) -> int:
    if text.isdecimal() and int(text) >= least:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be an integer >= {least}, got {text!r}")


def arguments(**options: tuple) -> dict[str, dict[str, Any]]:
    """Arguments of `add_argument`, of (default, quick, text) or with a dict of more.

    `quick` is the default with --quick, or None where that changes nothing. By the type
    of the default, integers are positive, words are from the list that is the default,
    and None is that of a directory.
    """
    found = {}
    for name, (default, quick, text, *more) in options.items():
        given = {"default": default, "quick": quick or default, "help": text}
        if default is not None:
            given["help"] += f" (default: {default}; quick: {given['quick']})"
        first = default
        if isinstance(default, list):
            first = default[0]
            given |= {"nargs": "+", "metavar": "M"}
            given |= {"choices": default} if isinstance(first, str) else {}
        given["type"] = {int: integer, str: str}.get(type(first), pathlib.Path)
        found[name] = given | (more[0] if more else {})
    return found


OUTPUT = pathlib.Path("results"), None, "directory for the JSON and the figure"
OVERWRITING = {
    "overwrite": {"action": "store_true", "help": "lose the trainings that are there"},
}
RESUMING = {
    "budget": {"type": integer, "help": "seconds; end before a training takes longer"},
    "resume": {"action": "store_true", "help": "keep the trainings that are there"},
}


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return found | {"python": platform.python_version()}


class Experiment:
    """The frame of a script, which gives its name to the files.

    A script has `options`, which `arguments` makes; and the methods

      prepare: completes the options and reads data; raises DataError for bad input.
      plan: yields the cases. It can depend on `self.runs`, all runs until now.
      measure: case -> the numbers of a run, or of several runs that share the case.
      report: prints and draws tables.

    `same` are options that all runs of a JSON must share. A script that names some can
    resume, and has a budget.
    """

    options: ClassVar[dict[str, dict[str, Any]]]
    same: ClassVar[tuple[str, ...]] = ()

    def prepare(self) -> None:
        pass

    @classmethod
    def main(cls, argv: Sequence[str] | None = None) -> None:
        """Makes the runs, prints their tables, and writes the JSON and the figure."""
        doc = inspect.getdoc(inspect.getmodule(cls)) or ""
        parser = Parser(description=doc.splitlines()[0])
        options = cls.options | arguments(output=OUTPUT) | OVERWRITING
        quick = {n: given["quick"] for n, given in options.items() if "quick" in given}
        options |= RESUMING if cls.same else {}
        for name, given in options.items():
            given = {key: value for key, value in given.items() if key != "quick"}
            parser.add_argument(f"--{name.replace('_', '-')}", **given)
        parser.add_argument("--quick", action="store_true", help="a run of seconds")
        if parser.parse_args(argv).quick:
            parser.set_defaults(**quick)
        args = parser.parse_args(argv)
        try:
            args.output.mkdir(parents=True, exist_ok=True)
            experiment = cls(args)
        except (OSError, DataError) as error:
            parser.error(str(error))
        experiment.make_runs()
        experiment.save()
        experiment.report()
        save_figure(experiment.panels, experiment.path.with_suffix(".png"))
        experiment.print(f"{experiment.spent():.0f} s; see {experiment.path} and .png")

    def __init__(self, args: argparse.Namespace):
        self.args, self.runs, self.start = args, Runs(), time.perf_counter()
        script = pathlib.Path(inspect.getfile(type(self)))
        self.path = args.output / f"{script.stem}.json"
        # A file has room for the tables.
        self.console = Console(width=None if sys.stdout.isatty() else 200)
        self.panels: list[Callable[[Any], None]] = []  # each draws on its axes
        self.earlier: list[dict[str, str]] = []  # other versions that made runs
        report = self.read()
        self.prepare()
        if self.same and args.resume:
            self.resume(report)
        elif report and report["runs"] and not self.may_be_lost(report):
            remedy = "--resume goes on from them, " if self.same else ""
            raise DataError(
                f"{self.path} has {len(report['runs'])} runs. {remedy}--output writes "
                "to another directory, and --overwrite loses them."
            )

    def may_be_lost(self, report: dict[str, Any]) -> bool:
        return self.args.overwrite or report["settings"].get("quick", False)

    def spent(self) -> float:
        return time.perf_counter() - self.start

    def claim(self, seconds: float) -> None:
        """Raises OutOfTime where there is a budget and it has less than that left."""
        budget = getattr(self.args, "budget", None)
        if budget is not None and self.spent() + seconds >= budget:
            raise OutOfTime

    def make_runs(self) -> None:
        """Adds what is missing of the plan, and saves it now and then."""
        resumed, saved = Runs(self.runs), -math.inf
        for case in self.plan():
            if resumed.of(**case):
                continue
            label = ", ".join(f"{key} {value}" for key, value in case.items())
            try:
                self.claim(0)
                found = self.measure(**case)
            except OutOfTime:
                self.print(f"The budget ends before {label}; --resume goes on.")
                break
            except KeyboardInterrupt:
                self.save()
                remedy = "; --resume goes on" if self.same else ""
                raise SystemExit(f"Stopped in {label}{remedy}.") from None
            found = found if isinstance(found, list) else [found]
            self.runs += [case | run for run in found]
            if self.spent() - saved > SECONDS_BETWEEN_SAVES:
                saved = self.spent()
                self.save()
                self.print(f"{saved:6.0f} s  {label}")

    def save(self) -> None:
        """Writes the JSON, a line per run; an old one stays whole until it is there."""
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "versions": versions(),
            "earlier_versions": self.earlier,
            "settings": vars(self.args),
            "seconds": self.spent(),
            "device": jax.devices()[0].device_kind,
            "runs": [],
        }
        runs = ",\n".join(map(json.dumps, self.runs))
        text = json.dumps(report, default=str).removesuffix("]}") + f"\n{runs}\n]}}\n"
        unfinished = self.path.with_suffix(".json.part")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(self.path)

    def read(self) -> dict[str, Any] | None:
        """The JSON, if there is one."""
        if not self.path.exists():
            return None
        try:
            report = json.loads(self.path.read_text(encoding="utf-8"))
            complete = {"runs", "settings", "versions"} <= report.keys()
        except (ValueError, AttributeError):
            complete = False
        if not complete and self.args.overwrite:
            return None
        if not complete:
            raise DataError(
                f"{self.path} is damaged, or not a file of this script. Move it away, "
                "or write to another --output."
            )
        return report

    def resume(self, report: dict[str, Any] | None) -> None:
        """Takes the runs of the JSON; raises where they were made otherwise."""
        if report is None:
            self.print(f"There is no {self.path} to resume; this starts anew.")
            return
        for key in self.same:
            then, now = report["settings"].get(key), getattr(self.args, key)
            if then != now:
                raise DataError(f"{self.path} is of --{key} {then}, not of {now}")
        self.runs = Runs(report["runs"])
        self.earlier = report.get("earlier_versions", [])
        then, now = report["versions"], versions()
        if then != now and then not in self.earlier:
            self.earlier = [*self.earlier, then]
            changed = [f"{k} {v}" for k, v in then.items() if now.get(k) != v]
            made = ", ".join(changed) or "other packages"
            self.print(f"The runs so far are of {made}; they are kept.")

    def print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def table(self, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
        """Prints a table that a page of Markdown takes as it is."""
        table = Table(box=box.MARKDOWN)
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def summary(self, title: str, groups: dict[str, Runs], columns: dict) -> None:
        """Prints a line for each group, with its name in front.

        A column is (key, digits) for the numbers of a key; (key, digits, label) for how
        much they are above those of another group, with all there is to say if digits
        is None; a key that all runs of a group share; or a function from runs to text.
        """

        def cell(group, column):
            if callable(column):
                return column(group)
            if isinstance(column, str):
                return f"{group[0][column]:g}" if group[0][column] is not None else ""
            key, digits, *other = column
            if not other:
                return describe(group.column(key), digits)
            pairs = group.less(groups.get(other[0], Runs()), key)
            if pairs is None or group is groups[other[0]]:
                return ""
            return str(pairs) if digits is None else pairs.show(digits)

        lines = columns.values()
        rows = ([str(k), *(cell(g, c) for c in lines)] for k, g in groups.items())
        self.table((title, *columns), rows)

    def pivot(self, title, groups, key, over, digits=1, **settings) -> None:
        """Prints and draws numbers by group and by the value of another key."""
        columns, rows = sorted({run[over] for g in groups.values() for run in g}), []
        for label, group in groups.items():
            cells = group.by(over, columns).values()
            rows.append([str(label), *(describe(c.column(key), digits) for c in cells)])
        self.table((title, *(f"{x:g}" for x in columns)), rows)
        self.draw(title, groups, key, over, **settings)

    def draw(self, title, groups, key, over=None, **settings) -> None:
        """Draws mean ± standard deviation over a key, or of curves over the epochs."""

        def draw(axes):
            for label, group in groups.items():
                if over is None:
                    points = dict(enumerate(zip(*group.column(key), strict=True), 1))
                else:
                    found = group.by(over, sorted(group.values(over)))
                    points = {x: runs.column(key) for x, runs in found.items()}
                x, y = list(points), points.values()
                mean, spread = ([f(values) for values in y] for f in (np.mean, np.std))
                axes.errorbar(x, mean, spread, lw=1, marker=".", label=label)
            axes.set(title=title, xlabel=over or "epoch", ylabel=key, **settings)
            axes.legend(fontsize=6)
            axes.grid(alpha=0.3)

        self.panels.append(draw)


def save_figure(panels: list[Callable[[Any], None]], path: pathlib.Path) -> None:
    """Writes a PNG with a palette, which takes a third of the bytes."""
    columns = min(3, len(panels)) or 1
    rows = -(-len(panels) // columns) or 1
    figure = Figure((4.5 * columns, 3.2 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flat
    for axes, panel in zip(places, panels, strict=False):
        panel(axes)
    file = io.BytesIO()
    figure.savefig(file)
    image = Image.open(file).convert("RGB")
    image.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
