"""What the scripts share: their options, progress, statistics, and what they write."""

import argparse
import contextlib
import importlib.metadata
import json
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from scipy import stats

PACKAGES = ("sam_optax", "jax", "jaxlib", "optax", "flax", "numpy", "scikit-learn")


# --- The command line -----------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """The options of every script; `quick` has other defaults, for a few seconds."""

    def __init__(self, doc: str | None, quick: dict[str, Any]):
        prog = pathlib.Path(sys.argv[0]).name
        super().__init__(prog=prog, description=doc and doc.splitlines()[0])
        self._quick = quick
        self.add_argument(
            "--output",
            type=pathlib.Path,
            default=pathlib.Path("results"),
            help="directory for the JSON and the figure (default: %(default)s)",
        )
        shown = " ".join(option(name, value) for name, value in quick.items())
        self.add_argument(
            "--quick", action="store_true", help=f"a run of seconds: {shown}"
        )

    def count(self, name: str, default: int, text: str) -> None:
        """Adds the option of a positive integer."""
        text = f"{text} (default: %(default)s)"
        self.add_argument(
            f"--{name}", type=positive_integer, default=default, help=text
        )

    def names(self, name: str, choices: list[str], text: str) -> None:
        """Adds the option of several of the choices; all of them by default."""
        text = f"{text}: {', '.join(choices)} (default: all)"
        options = {"nargs": "+", "choices": choices, "default": choices, "metavar": "M"}
        self.add_argument(f"--{name}", help=text, **options)

    def data(self, text: str) -> None:
        """Adds the option of a directory with data."""
        self.add_argument("--data", type=pathlib.Path, help=text)

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        args = self.parse_args(argv)
        if args.quick:
            self.set_defaults(**self._quick)
            args = self.parse_args(argv)
        try:
            args.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.error(f"argument --output: {error.strerror}: {error.filename!r}")
        return args

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage


def option(name: str, value: Any) -> str:
    """As it is written on the command line."""
    values = value if isinstance(value, list) else [value]
    return shlex.join([f"--{name.replace('_', '-')}", *map(str, values)])


def positive_integer(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")


# --- Progress and tables --------------------------------------------------------------


@contextlib.contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Yields what to call after each of `total` parts: a bar, or in a log a line."""
    start = time.perf_counter()
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn())
    columns += (TimeRemainingColumn(), "left")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def advance(label: str) -> None:
            bar.update(task, description=label, advance=1)
            if not console.is_terminal:
                seconds = time.perf_counter() - start
                console.print(f"{seconds:6.0f} s  {label}", soft_wrap=True)

        yield advance


def make_table(*columns: str) -> Table:
    """A table that a page of Markdown takes as it is printed."""
    table = Table(box=box.MARKDOWN)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


# --- Runs, as dicts -------------------------------------------------------------------


def of(runs: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Those with these values."""
    return [run for run in runs if all(run[k] == v for k, v in wanted.items())]


def column(runs: list[dict[str, Any]], key: str, **wanted: Any) -> list[Any]:
    """One value of each run with these values."""
    return [run[key] for run in of(runs, **wanted)]


# --- Statistics -----------------------------------------------------------------------


def describe(values: Sequence[float] | np.ndarray, digits: int = 1) -> str:
    """Mean ± standard deviation; the mean alone of one value."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


class Pairs(NamedTuple):
    """Differences of two methods on the same seeds.

    Attributes:
      mean: of the differences, first less second.
      half_width: of the 95 % interval of that mean, by Student's t; NaN for one seed.
      larger: on how many seeds the first is larger.
      seeds: how many there are.
    """

    mean: float
    half_width: float
    larger: int
    seeds: int

    def __str__(self) -> str:
        return (
            f"{self.mean:+.3g} ± {self.half_width:.2g} (95 %), "
            f"larger on {self.larger} of {self.seeds}"
        )


def compare_pairs(first: Sequence[float], second: Sequence[float]) -> Pairs:
    differences = np.subtract(first, second)
    n = len(differences)
    half_width = float("nan")
    if n > 1:
        error = np.std(differences, ddof=1) / n**0.5
        half_width = float(stats.t.ppf(0.975, n - 1) * error)
    return Pairs(float(differences.mean()), half_width, int((differences > 0).sum()), n)


# --- From the options to what is written ----------------------------------------------


def carry_out(
    name: str,
    args: argparse.Namespace,
    run_all: Callable[[argparse.Namespace, Console], list[dict[str, Any]]],
    print_results: Callable[[list[dict[str, Any]], argparse.Namespace, Console], None],
    make_figure: Callable[[list[dict[str, Any]], argparse.Namespace], Figure],
) -> int:
    """Makes the runs, prints their tables, and writes a JSON and a figure of `name`."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a file has room for the tables
    start = time.perf_counter()
    runs = run_all(args, console)
    seconds = time.perf_counter() - start
    print_results(runs, args, console)
    save_report(name, args, runs, seconds)
    save_figure(make_figure(runs, args), args.output / f"{name}.png")
    console.print(f"{seconds:.0f} s; {name}.json and {name}.png are in {args.output}")
    return 0


def save_report(name: str, args, runs: list[dict[str, Any]], seconds: float) -> None:
    """The JSON; one that was there stays whole until the new one is."""
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "settings": {key: plain(value) for key, value in vars(args).items()},
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "device": jax.devices()[0].device_kind,
        "seconds": seconds,
        "runs": runs,
    }
    path = report_path(name, args)
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def report_path(name: str, args) -> pathlib.Path:
    return args.output / f"{name}.json"


def save_figure(figure: Figure, path: pathlib.Path) -> None:
    """As a PNG with a palette, which takes a third of the bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def plain(value: Any) -> Any:
    return str(value) if isinstance(value, pathlib.Path) else value
