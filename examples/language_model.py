"""Trains a small language model with AdamW, SAM, late SAM and momentum-SAM.

    python examples/language_model.py

A decoder learns to predict the next character of the help texts that come with Python.
It computes in bfloat16, and keeps its parameters in float32. Afterwards the script
measures what is left of it when its weights are rounded to 8, 4 and 3 bits, and when it
is fine-tuned on another text, the source code of Python. It takes about five minutes on
two CPU cores, and a few seconds with --quick.
"""

import argparse
import functools
import inspect
import itertools
import pathlib
import time
import typing
from collections.abc import Sequence
from pydoc_data import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import sam_optax
import sam_optax.nnx
from sam_optax import sharpness

WINDOW, BATCH_SIZE, BITS = 64, 16, (8, 4, 3)
LEARNING_RATE, FINE_TUNING_RATE, EVALUATIONS = 1e-2, 2e-3, 10


class Block(nnx.Module):
    def __init__(self, width, heads, rngs):
        self.attention_norm = nnx.LayerNorm(width, dtype=jnp.bfloat16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, decode=False, dtype=jnp.bfloat16, rngs=rngs
        )
        self.norm = nnx.LayerNorm(width, dtype=jnp.bfloat16, rngs=rngs)
        self.inner = nnx.Linear(width, 4 * width, dtype=jnp.bfloat16, rngs=rngs)
        self.outer = nnx.Linear(4 * width, width, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, h, mask):
        h += self.attention(self.attention_norm(h), mask=mask)
        return h + self.outer(nnx.gelu(self.inner(self.norm(h))))


class Decoder(nnx.Module):
    """Computes in bfloat16. The parameters are float32, the default of Flax."""

    def __init__(self, width, heads, blocks, alphabet, rngs):
        self.embed = nnx.Embed(alphabet, width, dtype=jnp.bfloat16, rngs=rngs)
        self.place = nnx.Embed(WINDOW, width, dtype=jnp.bfloat16, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(blocks)])
        self.norm = nnx.LayerNorm(width, dtype=jnp.bfloat16, rngs=rngs)
        self.out = nnx.Linear(width, alphabet, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x):
        h = self.embed(x) + self.place(jnp.arange(WINDOW))
        mask = nnx.make_causal_mask(x)
        for block in self.blocks:
            h = block(h, mask)
        return self.out(self.norm(h)).astype(jnp.float32)  # the loss in float32


def make_windows(text: str) -> tuple[np.ndarray, np.ndarray]:
    """(ASCII codes, those that follow each), of windows that do not overlap, mixed."""
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32)
    count = (len(codes) - 1) // WINDOW
    order = np.random.default_rng(0).permutation(count)
    x, y = codes[: count * WINDOW], codes[1 : count * WINDOW + 1]
    return x.reshape(count, WINDOW)[order], y.reshape(count, WINDOW)[order]


def make_optimizers(steps: int) -> dict[str, optax.GradientTransformation]:
    base = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    return {
        "adamw": base,
        "sam": optax.chain(sam_optax.sam(rho=0.1), base),
        "late_sam": optax.chain(sam_optax.late_sam(rho=0.1, start=steps // 2), base),
        "msam": optax.chain(sam_optax.msam(rho=0.3), base),
    }


def loss_fn(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


evaluate = nnx.jit(loss_fn)


@nnx.jit
def train_step(model, optimizer, x, y):
    # AdamW alone ignores what the others need to take their second gradient.
    loss, grads, extra_args = sam_optax.nnx.value_and_ascent_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads, **extra_args)
    return loss


def train(model, tx, data, held_out, steps: int, advance) -> list[tuple[int, float]]:
    """Trains the model in place. Returns the loss on other text along the way."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng = np.random.default_rng(0)
    orders = (rng.permutation(len(data[0])) for _ in itertools.count())
    batches = (
        order[start : start + BATCH_SIZE]
        for order in orders
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE)
    )
    curve = [(0, float(evaluate(model, *held_out)))]
    for step in range(1, steps + 1):
        batch = next(batches)
        train_step(model, optimizer, *(part[batch] for part in data))
        if step % max(1, steps // EVALUATIONS) == 0 or step == steps:
            curve.append((step, float(evaluate(model, *held_out))))
        advance()
    return curve


def round_to_bits(w: jax.Array, bits: int) -> jax.Array:
    """Rounds to 2^bits − 1 equally spaced values, with a scale for each last index."""
    levels = 2 ** (bits - 1) - 1
    scale = jnp.abs(w).max(tuple(range(w.ndim - 1)), keepdims=True) / levels
    return jnp.round(w / jnp.where(scale > 0, scale, 1)) * scale


def rounded(model: Decoder, bits: int) -> Decoder:
    """A copy whose matrices, those of the linear layers, are rounded."""
    model = nnx.clone(model)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear | nnx.LinearGeneral):
            module.kernel[...] = round_to_bits(module.kernel[...], bits)
    return model


def surrogate_gap(model: Decoder, x, y) -> float:
    """How much SAM's perturbation of length 0.1 raises the loss."""
    graph, params = nnx.split(model, nnx.Param)

    def loss_of_params(params, x, y):
        return loss_fn(nnx.merge(graph, params), x, y)

    return sharpness.surrogate_gap(loss_of_params, params, (x, y), rho=0.1).sharpness


def make_figure(curves: dict[str, list], forgetting: dict[str, list]) -> Figure:
    figure = Figure((9, 3.5), layout="constrained")
    titles = "training on the first text", "fine-tuning on the second"
    panels = zip(figure.subplots(1, 2), titles, (curves, forgetting), strict=True)
    for axes, title, lines in panels:
        for name, curve in lines.items():
            axes.plot(*zip(*curve, strict=True), label=name)
        axes.set(title=title, xlabel="step", ylabel="validation loss on the first text")
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, help="of the training")
    parser.add_argument("--width", type=int, help="of the decoder, a multiple of 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a run of seconds")
    parser.add_argument("--output", type=pathlib.Path, default="results")
    args = parser.parse_args(argv)
    steps = args.steps or (8 if args.quick else 1500)
    width = args.width or (8 if args.quick else 64)
    blocks, held_out_size = (1, 16) if args.quick else (2, 500)

    text = make_windows("\n".join(text for _, text in sorted(topics.topics.items())))
    code = make_windows("\n".join(map(inspect.getsource, (argparse, inspect, typing))))
    (held_out, text), (code_held_out, code) = (
        ([part[:held_out_size] for part in data], [part[500:] for part in data])
        for data in (text, code)
    )

    optimizers, fine_steps = make_optimizers(steps), max(1, steps // 10)
    fine_tuning = optax.adamw(optax.cosine_decay_schedule(FINE_TUNING_RATE, fine_steps))
    table = Table("loss", "text", *(f"{bits} bits" for bits in BITS))
    for column in ("tuned\non code", "code", "gap", "s"):
        table.add_column(column)
    curves, forgetting = {}, {}
    with Progress() as progress:
        for name, tx in optimizers.items():
            task = progress.add_task(name, total=steps + fine_steps)
            advance = functools.partial(progress.advance, task)
            model = Decoder(width, 4, blocks, 128, nnx.Rngs(args.seed))
            start = time.perf_counter()
            curves[name] = train(model, tx, text, held_out, steps, advance)
            seconds = time.perf_counter() - start
            rounding = [evaluate(rounded(model, bits), *held_out) for bits in BITS]
            gap = surrogate_gap(model, *(part[:64] for part in text))
            forgetting[name] = train(
                model, fine_tuning, code, held_out, fine_steps, advance
            )
            losses = [curves[name][-1][1], *rounding, forgetting[name][-1][1]]
            losses += [evaluate(model, *code_held_out), gap]
            table.add_row(name, *(f"{loss:.3f}" for loss in losses), f"{seconds:.0f}")

    Console().print(table)
    print(
        "Losses on text that was held out: at the end of the training, with rounded\n"
        "weights, and after fine-tuning on code; the loss on code; the surrogate gap;\n"
        "and the time of the training, with compiling."
    )
    args.output.mkdir(parents=True, exist_ok=True)
    make_figure(curves, forgetting).savefig(args.output / "language_model.png", dpi=150)
    print(f"The plot is {args.output / 'language_model.png'}.")


if __name__ == "__main__":
    main()
