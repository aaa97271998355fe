"""What in a perturbation helps: parts of the gradient, radius, batch size, label noise.

    python benchmarks/papers/friendly.py

Four experiments of Li et al., "Friendly Sharpness-Aware Minimization"
(https://arxiv.org/abs/2403.12350), which it makes with ResNets on CIFAR, here with a
multilayer perceptron on scikit-learn's digits:

  parts   Figure 2: SAM, and SAM with its perturbation from the part of the gradient
          along the full gradient (SAM-full), from the rest of it (SAM-noise), from
          another batch (SAM-db), and from a batch of k times the size that contains
          the batch.
  radius  Figure 3: SAM and F-SAM as the radius grows.
  batch   Figure 4: SGD, SAM and F-SAM as the batch grows, with nothing else changed,
          and one radius for both.
  noise   Table 6: SGD, SAM and F-SAM as more labels are replaced by random ones.

As in the paper: SGD with momentum 0.9, weight decay 5e-4 and a cosine decay of the
learning rate from 0.05. SAM and its kin choose among six radii, and SGD among six
learning rates, by the mean accuracy on 300 validation images, whose labels are right.
SGD at 0.05 is shown beside.
Training is on 700 images and the test on 797, the same for every seed.
"""

import functools
import itertools
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from evidence import (
    Pairs,
    Parser,
    carry_out,
    compare_pairs,
    describe,
    make_table,
    progress,
)
from loaders import load_digits, split
from training import MLP, PLAIN, decayed_sgd, make_trainer

NAME = "friendly"
PARTS = ["parts", "radius", "batch", "noise"]
TRAIN, VALIDATION, BATCH_SIZE = 700, 300, 64
RATE = 0.05  # the paper's
RATES = [RATE, 0.2, 0.025, 0.0125, 0.006, 0.003]  # SGD's choice
RHOS = [0.05, 0.1, 0.2, 0.4, 0.6, 0.8]
NOISES = [0, 20, 40, 60, 80]  # % of the labels
BATCH_SIZES = [16, 64, 256, 700]
PARTS_NOISES = [0, 40]
LABELS = {"sgd": "SGD", "sam": "SAM", "fsam": "F-SAM", "sam_full": "SAM-full"}
LABELS |= {"sam_noise": "SAM-noise", "sam_db": "SAM-db"}
LABELS |= {f"{k}x": f"ascent batch {k}×" for k in (2, 4, 8)}


# --- Variants of SAM ------------------------------------------------------------------


def others(key, index, x, count: int):
    """Indices of `count` random examples that are not in the batch."""
    scores = jax.random.uniform(key, (len(x),)).at[index].set(2.0)
    return jnp.argsort(scores)[:count]


def full_gradient(loss_fn, params, key, index, x, y):
    return {"extra_args": {"full_gradient": jax.grad(loss_fn)(params, x, y)}}


def another_batch(loss_fn, params, key, index, x, y):
    other = others(key, index, x, len(index))
    return {"ascent_batch": (x[other], y[other])}


def larger_batch(k: int):
    def arguments(loss_fn, params, key, index, x, y):
        more = others(key, index, x, (k - 1) * len(index))
        larger = jnp.concatenate([index, more])
        return {"ascent_batch": (x[larger], y[larger])}

    return arguments


# Variant -> method of the library, and the further arguments of its steps.
VARIANTS = {
    "sgd": (PLAIN, None),
    "sam": ("sam", None),
    "fsam": ("fsam", None),
    "sam_full": ("sam_full", full_gradient),
    "sam_noise": ("sam_noise", full_gradient),
    "sam_db": ("sam", another_batch),
    "2x": ("sam", larger_batch(2)),
    "4x": ("sam", larger_batch(4)),
    "8x": ("sam", larger_batch(8)),
}


ABLATIONS = [variant for variant in VARIANTS if variant != "fsam"]
COLORS = {"sgd": "black", "sam": "C1", "fsam": "C0"}  # who is in the other three parts


# --- Runs -----------------------------------------------------------------------------


def make_data(seed: int, noise: float):
    """Training images with `noise` % of random labels, validation and test images."""
    return split_with_noise(load_digits(), (TRAIN, VALIDATION), seed, noise)


def split_with_noise(data, sizes: tuple[int, int], seed: int, noise: float):
    """`split`, with `noise` % of the labels of the first part replaced."""
    images, labels = data
    (x, y), validation, test = split(images, labels, sizes, seed)
    rng = np.random.default_rng(seed)
    replaced = round(len(y) * noise / 100)
    # One in ten random labels is right; the images are in random order by now.
    noisy = np.concatenate([rng.integers(0, 10, replaced), y[replaced:]])
    return (x, noisy.astype(y.dtype)), validation, test


@functools.cache
def trainer_of(variant: str, batch_size: int, epochs: int):
    make_base = decayed_sgd(epochs * (TRAIN // batch_size))

    method, arguments = VARIANTS[variant]
    model = MLP((256, 256, 10))
    return make_trainer(model, method, make_base, batch_size, arguments)


def settings_of(variant: str, args) -> list[dict[str, float]]:
    if variant == "sgd":
        settings = [{"learning_rate": rate} for rate in RATES]
    else:
        settings = [{"learning_rate": RATE, "rho": rho} for rho in RHOS]
    return settings[: args.settings]


def train(variant, setting, noise, seed, batch_size, args) -> dict:
    trainer = trainer_of(variant, batch_size, args.epochs)
    data, validation, test = make_data(seed, noise)
    key = jax.random.key(seed)
    state = trainer.init(setting, key, data[0])
    for _ in range(args.epochs):
        state, _ = trainer.epoch(state, setting, key, *data)
    accuracies = [float(trainer.evaluate(state, *x)[1]) for x in (validation, test)]
    run = {"variant": variant, "rho": None, **setting, "noise_percent": noise}
    run |= {"batch_size": batch_size, "seed": seed}
    return run | dict(zip(("validation", "test"), accuracies, strict=True))


def plan(args) -> list[tuple]:
    """(variant, setting, noise, batch size) of all runs but those of `batch`."""
    pairs = []
    if {"radius", "batch", "noise"} & set(args.parts):
        noises = NOISES if "noise" in args.parts else PARTS_NOISES
        pairs += itertools.product(COLORS, noises)
    if "parts" in args.parts:
        pairs += itertools.product(ABLATIONS, PARTS_NOISES)
    return [
        (variant, setting, noise, BATCH_SIZE)
        for variant, noise in dict.fromkeys(pairs)
        for setting in settings_of(variant, args)
    ]


def run_all(args, console: Console) -> list[dict]:
    cases = plan(args)
    sizes = [size for size in BATCH_SIZES if size != BATCH_SIZE]
    more = list(itertools.product(COLORS, PARTS_NOISES, sizes))
    more = more if "batch" in args.parts else []
    runs = []
    with progress(console, len(cases) + len(more)) as advance:

        def run(name, setting, noise, size):
            seeds = range(args.seeds)
            mine = [train(name, setting, noise, seed, size, args) for seed in seeds]
            runs.extend(mine)
            accuracy = describe([r["test"] for r in mine])
            advance(f"{name}, {setting}, noise {noise} %, batch {size}: {accuracy} %")

        for case in cases:
            run(*case)
        for variant, noise, size in more:  # with the setting of the usual batch size
            run(variant, batch_setting(runs, variant, noise), noise, size)
    return runs


def choose(runs, **wanted) -> list[dict]:
    return [run for run in runs if all(run[k] == v for k, v in wanted.items())]


def choice(runs: list[dict], variant: str, noise: float) -> dict[str, float]:
    """The setting of the best mean accuracy on validation images."""
    keys = {"variant": variant, "noise_percent": noise, "batch_size": BATCH_SIZE}
    scores = {}
    for run in choose(runs, **keys):
        scores.setdefault((run["learning_rate"], run["rho"]), []).append(
            run["validation"]
        )
    rate, rho = max(scores, key=lambda setting: np.mean(scores[setting]))
    return {"learning_rate": rate} | ({} if rho is None else {"rho": rho})


def batch_setting(runs, variant: str, noise: float) -> dict[str, float]:
    """What `batch` keeps for all sizes: F-SAM has SAM's radius, as in the paper."""
    return choice(runs, "sam" if variant == "fsam" else variant, noise)


def tests(runs, variant: str, noise: float, size: int = BATCH_SIZE, **setting):
    """Test accuracies, one per seed; with the chosen setting unless one is given."""
    setting = setting or choice(runs, variant, noise)
    keys = {"variant": variant, "noise_percent": noise, "batch_size": size}
    return [run["test"] for run in choose(runs, **keys, **setting)]


# --- Results --------------------------------------------------------------------------


def print_results(runs: list[dict], args, console: Console) -> None:
    tables = {
        "parts": parts_table,
        "radius": radius_table,
        "batch": batch_table,
    }
    for part, noise in itertools.product(tables, PARTS_NOISES):
        if part in args.parts:
            console.print(f"{part}, {noise} % noise:", tables[part](runs, noise, args))
    if "noise" in args.parts:
        console.print("noise:", noise_table(runs))
        for noise in NOISES:
            pairs = (tests(runs, variant, noise) for variant in ("fsam", "sam"))
            console.print(f"F-SAM less SAM at {noise} %: {compare_pairs(*pairs)}")


def parts_table(runs, noise, args) -> Table:
    table = make_table("perturbation", "chosen", "accuracy (%)", "less SAM's")

    def add(label, chosen, accuracies):
        pairs = compare_pairs(accuracies, tests(runs, "sam", noise))
        table.add_row(label, chosen, describe(accuracies), str(pairs))

    add(f"SGD, {RATE:g}", "", tests(runs, "sgd", noise, learning_rate=RATE))
    for variant in ABLATIONS:
        setting = choice(runs, variant, noise)
        chosen = setting.get("rho", setting["learning_rate"])
        add(LABELS[variant], f"{chosen:g}", tests(runs, variant, noise))
    return table


def radius_table(runs, noise, args) -> Table:
    rhos = [setting["rho"] for setting in settings_of("sam", args)]
    table = make_table("rho", *(f"{rho:g}" for rho in rhos))
    for variant in ("sam", "fsam"):
        cells = (tests(runs, variant, noise, rho=rho) for rho in rhos)
        table.add_row(LABELS[variant], *map(describe, cells))
    return table


def batch_table(runs, noise, args) -> Table:
    table = make_table("batch size", *map(str, BATCH_SIZES))
    for variant in COLORS:
        setting = batch_setting(runs, variant, noise)
        cells = (tests(runs, variant, noise, size, **setting) for size in BATCH_SIZES)
        table.add_row(f"{LABELS[variant]}, {setting}", *map(describe, cells))
    return table


def noise_table(runs) -> Table:
    table = make_table("labels replaced", *(f"{noise} %" for noise in NOISES))
    cells = (tests(runs, "sgd", noise, learning_rate=RATE) for noise in NOISES)
    table.add_row(f"SGD, {RATE:g}", *map(describe, cells))
    for variant in COLORS:
        cells = (tests(runs, variant, noise) for noise in NOISES)
        table.add_row(LABELS[variant], *map(describe, cells))
    return table


def make_figure(runs: list[dict], args) -> Figure:
    """A panel for each part; bars are standard deviations but where it is said."""
    figure = Figure((9, 6), layout="constrained")
    draws = {
        "parts": draw_parts,
        "radius": draw_radius,
        "batch": draw_batch,
        "noise": draw_noise,
    }
    for axes, part in zip(figure.subplots(2, 2).flat, PARTS, strict=True):
        axes.grid(alpha=0.3)
        if part in args.parts:
            draws[part](axes, runs, args)
            corner = "lower right" if part == "parts" else "lower left"
            axes.legend(fontsize="x-small", loc=corner)
    return figure


def draw_curve(axes, x, accuracies, **style) -> None:
    spread = [np.std(a, ddof=1) if len(a) > 1 else 0 for a in accuracies]
    means = [np.mean(a) for a in accuracies]
    axes.errorbar(x, means, spread, capsize=2, marker=".", **style)
    axes.set_ylabel("test accuracy (%)")


def draw_parts(axes, runs, args) -> None:
    """Differences to SAM on the same seeds, with 95 % intervals."""
    shown = [variant for variant in ABLATIONS if variant != "sam"]
    for noise, shift in zip(PARTS_NOISES, (-0.1, 0.1), strict=True):
        sam = tests(runs, "sam", noise)
        pairs = [compare_pairs(tests(runs, variant, noise), sam) for variant in shown]
        means, half_widths = ([getattr(p, k) for p in pairs] for k in Pairs._fields[:2])
        options = {"fmt": "o", "markersize": 4, "label": f"{noise} % noise"}
        axes.errorbar(np.arange(len(shown)) + shift, means, half_widths, **options)
    axes.axhline(0, color="black", linewidth=0.8)
    labels = [LABELS[variant] for variant in shown]
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    axes.set_ylabel("accuracy less SAM's (points)")


def draw_radius(axes, runs, args) -> None:
    rhos = [setting["rho"] for setting in settings_of("sam", args)]
    for noise, style in zip(PARTS_NOISES, ("-", ":"), strict=True):
        for variant in ("sam", "fsam"):
            accuracies = [tests(runs, variant, noise, rho=rho) for rho in rhos]
            label = f"{LABELS[variant]}, {noise} % noise"
            options = {"color": COLORS[variant], "linestyle": style, "label": label}
            draw_curve(axes, rhos, accuracies, **options)
    axes.set_xlabel("ρ")


def draw_batch(axes, runs, args) -> None:
    for noise, style in zip(PARTS_NOISES, ("-", ":"), strict=True):
        for variant, color in COLORS.items():
            setting = batch_setting(runs, variant, noise)
            accuracies = [
                tests(runs, variant, noise, size, **setting) for size in BATCH_SIZES
            ]
            label = f"{LABELS[variant]}, {noise} % noise"
            options = {"color": color, "linestyle": style, "label": label}
            draw_curve(axes, BATCH_SIZES, accuracies, **options)
    axes.set_xscale("log", base=2)
    axes.set_xticks(BATCH_SIZES, BATCH_SIZES)
    axes.set_xlabel("batch size")


def draw_noise(axes, runs, args) -> None:
    for variant, color in COLORS.items():
        accuracies = [tests(runs, variant, noise) for noise in NOISES]
        draw_curve(axes, NOISES, accuracies, color=color, label=LABELS[variant])
    accuracies = [tests(runs, "sgd", noise, learning_rate=RATE) for noise in NOISES]
    style = {"color": "gray", "linestyle": ":", "label": f"SGD, {RATE:g}"}
    draw_curve(axes, NOISES, accuracies, **style)
    axes.set_xlabel("labels replaced (%)")


def main(argv: Sequence[str] | None = None) -> int:
    quick = {"parts": ["radius"], "seeds": 2, "epochs": 2, "settings": 1}
    parser = Parser(__doc__, quick)
    parser.names("parts", PARTS, "experiments to make")
    parser.count("seeds", 5, "trainings of each setting")
    parser.count("epochs", 60, "passes over the training images")
    parser.count("settings", 6, "radii, or learning rates of SGD, to choose from")
    args = parser.parse(argv)
    return carry_out(NAME, args, run_all, print_results, make_figure)


if __name__ == "__main__":
    sys.exit(main())
