"""Draws the pictures of the gallery: how SGD and SAM train, and where they end.

    python examples/gallery.py

trains the network of digits.py, with wrong labels among the training data, and draws
the loss around the solutions, the spectra of their Hessians, the reports of the steps,
and the accuracy against the cost of a training. Each picture is written twice, for a
light and for a dark page.
"""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

import digits  # beside this file
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import sam_optax
from sam_optax import sharpness

matplotlib.use("Agg")  # files, no windows

import matplotlib.pyplot as plt

from sam_optax import plot

NOISE = 40
BLUE, ORANGE = "#0072B2", "#E69F00"  # of Okabe and Ito, as in sam_optax.plot
STYLES = {
    "light": {"text.color": "#333333", "axes.labelcolor": "#333333"},
    "dark": {"text.color": "#dddddd", "axes.labelcolor": "#dddddd"},
}
for style in STYLES.values():
    ink = style["text.color"]
    style |= {"axes.edgecolor": ink, "xtick.color": ink, "ytick.color": ink}
    style |= {"legend.framealpha": 0.0, "axes.spines.top": False}
    style |= {"axes.spines.right": False, "axes.facecolor": "none"}
# The cheaper methods of the last picture, with smaller radii than benchmarks/digits.py.
CHEAPER = {"sam_every_k": 0.8, "rst": 0.5, "ae_sam": 0.5}
NUDGES = {"rst": 9, "ae_sam": -9}  # their labels would stand on one another


def draw(name: str, output: pathlib.Path, picture: Callable[[], Any]) -> None:
    """Writes a picture in both styles. `picture` draws it with pyplot."""
    for style, settings in STYLES.items():
        with plt.rc_context(settings):
            picture()
            plt.savefig(
                output / f"gallery-{name}-{style}.png", dpi=110, transparent=True
            )
            plt.close("all")


def train(method: str, rho: float | None, epochs: int, data, seed: int = 0):
    """Returns the model's loss and the state after a training."""
    model = digits.MLP()
    loss_fn = digits.make_loss(model)
    prepared = digits.make_method(method, rho, epochs, loss_fn)
    return loss_fn, digits.make_trainer(model, *prepared, epochs, 64)(seed, data)


def record(rho: float, epochs: int, data) -> sam_optax.Recorder:
    """Trains with SAM, and keeps the report of every step."""
    model = digits.MLP()
    data = jax.tree.map(jnp.asarray, data)
    sam = sam_optax.sam(rho)
    tx = optax.chain(sam, optax.sgd(0.05, momentum=0.9))
    loss_and_grads = sam_optax.sam_value_and_grad(
        digits.make_loss(model), sam, report=True
    )

    def step(carry, key):
        params, opt_state = carry
        batch = jax.random.choice(key, len(data[0]), (64,), replace=False)
        loss, grads = loss_and_grads(
            params, *[array[batch] for array in data], opt_state=opt_state
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), (loss, grads.report)

    params = model.init(jax.random.key(0), data[0][:1])["params"]
    keys = jax.random.split(jax.random.key(1), 15 * epochs)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))
    recorder = sam_optax.Recorder()
    recorder.add(*run((params, tx.init(params)))[1])
    return recorder


def accuracies(epochs: int, seeds: int) -> dict[str, list[tuple[float, float]]]:
    """Method -> (gradients in units of SGD's full training, accuracy) by length."""
    curves: dict[str, list[tuple[float, float]]] = {}
    radii = {"sgd": None, "sam": digits.RHO["sam"], **CHEAPER}
    for method, rho in radii.items():
        cost = 1.0 if method == "sgd" else sam_optax.METHODS[method].gradients()
        cost = cost if np.isfinite(cost) else 1.5  # ae_sam ascends on half of its steps
        curves[method] = []
        for length in (epochs // 4, epochs // 2, epochs):
            found = []
            for seed in range(seeds):
                data, test = digits.make_data(seed, NOISE)
                found.append(
                    digits.accuracy(train(method, rho, length, data, seed)[1], *test)
                )
            curves[method].append((cost * length / epochs, float(np.mean(found))))
    return curves


def draw_accuracies(curves: dict[str, list[tuple[float, float]]]) -> None:
    ax = plt.subplots(figsize=(7.5, 4.5), layout="constrained")[1]
    colours = {"sgd": ORANGE, "sam": BLUE}
    names = {"sgd": "SGD", "sam": "SAM"}
    for method, points in curves.items():
        x, y = zip(*points, strict=True)
        colour = colours.get(method, "#999999")
        ax.plot(x, y, "o-", color=colour, linewidth=2 if method in colours else 1.2)
        ax.annotate(
            names.get(method, method),
            (x[-1], y[-1]),
            xytext=(8, NUDGES.get(method, 0)),
            textcoords="offset points",
            color=colour,
            va="center",
            weight="bold" if method in colours else "normal",
        )
    ax.set_title(f"With {NOISE} % wrong labels, longer SAM helps; longer SGD hurts")
    ax.set_xlabel("gradients, divided by those of SGD's full training")
    ax.set_ylabel("test accuracy, %")
    ax.margins(x=0.15)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3, help="of the last picture")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("results"))
    parser.add_argument("--quick", action="store_true", help="4 epochs, one seed")
    args = parser.parse_args(argv)
    if args.quick:
        args.epochs, args.seeds = 4, 1
    args.output.mkdir(parents=True, exist_ok=True)

    data, test = digits.make_data(0, NOISE)
    solutions, loss_fn = {}, None
    for name, method, rho in (("SGD", "sgd", None), ("SAM", "sam", digits.RHO["sam"])):
        loss_fn, state = train(method, rho, args.epochs, data)
        right = digits.accuracy(state, *test)
        solutions[f"{name}: {right:.0f} % of test images right"] = state.params

    ticks = jnp.linspace(-1, 1, 31)
    planes = {}
    for name, params in solutions.items():
        pair = [
            sharpness.filter_normalized_direction(params, key=key) for key in (0, 1)
        ]
        # The test images, whose labels are right.
        planes[name] = sharpness.over_plane(loss_fn, params, test, pair, ticks, ticks)

    def surfaces():
        axes = plot.surfaces(planes)
        axes[0].figure.suptitle("Around SAM's solution, the loss rises more slowly")

    draw("surfaces", args.output, surfaces)

    densities = {
        name.partition(":")[0]: sharpness.spectral_density(
            sharpness.hessian(loss_fn, params, data), num_samples=3
        )
        for name, params in solutions.items()
    }

    def spectra():
        ax = plot.spectrum(densities)
        ax.set_title("SAM's Hessian has no large eigenvalues")

    draw("spectrum", args.output, spectra)

    records = {f"ρ = {rho}": record(rho, args.epochs, data) for rho in (0.05, 0.2, 0.5)}

    def trainings():
        axes = plot.training(records)
        axes[0].figure.suptitle("A larger ρ: a larger gap, and a slower training")

    draw("training", args.output, trainings)

    curves = accuracies(args.epochs, args.seeds)
    draw("accuracy", args.output, lambda: draw_accuracies(curves))
    for method, points in curves.items():
        print(method, *[f"{cost:.2f}: {right:.1f} %" for cost, right in points])


if __name__ == "__main__":
    main()
