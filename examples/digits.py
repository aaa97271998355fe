"""Trains a network on digits with wrong labels, with SGD, SAM and F-SAM.

    python examples/digits.py --quick

A part of the training labels of scikit-learn's handwritten digits is replaced by random
ones. SGD learns these by heart, which costs accuracy on the test images; SAM and F-SAM
do so less. With too large a radius, SAM no longer trains where F-SAM still does:

    python examples/digits.py --methods sam fsam --noise 60 --rho 0.6
"""

import argparse
import collections
import itertools
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

import sam_optax

# Tuned on other seeds, with 40 and 60 % noise; other methods have their own defaults.
RHO = {"sam": 0.5, "fsam": 0.6}


class MLP(nn.Module):
    hidden: Sequence[int] = (256, 256)

    @nn.compact
    def __call__(self, x):
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


def make_data(seed: int, noise: float, train_size: int = 1000):
    """Returns (images, labels) to train on, with `noise` % random labels, and to test.

    A random label is any of the ten with equal chances, so one in ten is right still.
    """
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    x, y = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    train_y, wrong = y[:train_size].copy(), round(train_size * noise / 100)
    train_y[:wrong] = rng.integers(0, 10, wrong)
    return (x[:train_size], train_y), (x[train_size:], y[train_size:])


def make_method(method: str, rho: float | None, epochs: int, loss_fn: Callable):
    """Returns the optimizer, and what computes the loss and the gradients for it."""
    learning_rate = optax.cosine_decay_schedule(0.05, 1000 // 64 * epochs)
    base = optax.sgd(learning_rate, momentum=0.9)
    if method == "sgd":
        loss_and_grads = jax.value_and_grad(loss_fn)
        return base, lambda *args, opt_state: loss_and_grads(*args)
    make = getattr(sam_optax, method)
    sam = make() if rho is None else make(rho=rho)
    return optax.chain(sam, base), sam_optax.sam_value_and_grad(loss_fn, sam)


def make_trainer(model, tx, loss_and_grads: Callable, epochs: int, batch_size: int):
    """Returns a function that trains a network: (seed, (images, labels)) -> state."""

    def train_step(state, batch):
        loss, grads = loss_and_grads(state.params, *batch, opt_state=state.opt_state)
        return state.apply_gradients(grads=grads), loss

    @jax.jit
    def train_epoch(state, key, data):
        steps = len(data[0]) // batch_size  # an incomplete batch is dropped
        key = jax.random.fold_in(key, state.step)
        order = jax.random.permutation(key, len(data[0]))[: steps * batch_size]
        return jax.lax.scan(
            lambda state, batch: train_step(state, [array[batch] for array in data]),
            state,
            order.reshape(steps, batch_size),
        )[0]

    init = jax.jit(model.init)

    def train(seed, data):
        key = jax.random.key(seed)
        params = init(key, data[0][:1])["params"]
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        for _ in range(epochs):
            state = train_epoch(state, key, data)
        return state

    return train


def make_loss(model: nn.Module) -> Callable:
    def loss_fn(params, x, y):
        logits = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss_fn


def accuracy(state: TrainState, x, y) -> float:
    """Returns how many of the images the network recognizes, in %."""
    logits = state.apply_fn({"params": state.params}, x)
    return 100 * float(np.mean(np.argmax(logits, axis=-1) == y))


def compare(trainers: dict[str, Callable], noises, seeds, train_size=1000) -> dict:
    """Returns {(method, noise): the test accuracies, one for each seed}."""
    results = collections.defaultdict(list)
    runs = list(itertools.product(trainers, noises, seeds))
    for method, noise, seed in track(runs, "Training"):
        data, test = make_data(seed, noise, train_size)
        results[method, noise].append(accuracy(trainers[method](seed, data), *test))
    return results


def describe(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.1f}"


def make_table(results: dict) -> Table:
    methods, noises = (dict.fromkeys(keys) for keys in zip(*results, strict=True))
    table = Table("test accuracy in %", *(f"{noise:g} % noise" for noise in noises))
    for method in methods:
        table.add_row(method, *(describe(results[method, noise]) for noise in noises))
    return table


def make_figure(results: dict) -> Figure:
    """Draws a row for each method and noise, with a dot for each seed and the mean.

    The methods of one noise are beside each other, because these are to be compared.
    """
    results = dict(sorted(results.items(), key=lambda item: item[0][1]))
    figure = Figure((7, 1.5 + 0.25 * len(results)), layout="constrained")
    axes = figure.subplots()
    for row, seeds in enumerate(results.values()):
        axes.plot(seeds, [row] * len(seeds), "o", color="C0", markersize=4, alpha=0.5)
        axes.plot(np.mean(seeds), row, "|", color="black", markersize=11)
    labels = [f"{method}, {noise:g} % noise" for method, noise in results]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("test accuracy in %: each seed, and the mean")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    methods, default = ["sgd", *sam_optax.METHODS], ["sgd", "sam", "fsam"]
    parser.add_argument("--methods", nargs="+", choices=methods, default=default)
    parser.add_argument("--noise", nargs="+", type=float, help="%% of wrong labels")
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--rho", type=float, help="the radius, for all methods")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--quick", action="store_true", help="40 %% noise, two seeds")
    parser.add_argument("--output", type=pathlib.Path, default="results")
    args = parser.parse_args(argv)
    noises = args.noise or ([40] if args.quick else [0, 40, 60])
    seeds = range(args.seeds or (2 if args.quick else 5))

    trainers, model = {}, MLP()
    for method in args.methods:
        rho = RHO.get(method) if args.rho is None else args.rho
        prepared = make_method(method, rho, args.epochs, make_loss(model))
        trainers[method] = make_trainer(model, *prepared, args.epochs, 64)
    results = compare(trainers, noises, seeds)

    Console().print(make_table(results))
    args.output.mkdir(parents=True, exist_ok=True)
    make_figure(results).savefig(args.output / "digits.png", dpi=150)
    print(f"The plot is {args.output / 'digits.png'}.")


if __name__ == "__main__":
    main()
