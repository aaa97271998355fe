"""What different ways to write a SAM step cost.

Run it with, for example::

    python benchmarks/designs.py
    python benchmarks/designs.py --models vit-s --width 64 --batch 4

All steps are written by hand, and compared with one that takes its two gradients one
after the other: both gradients in a `lax.scan`, the second in a `lax.cond`, ε kept in
memory, one flat buffer for all parameters, and norms that stay correct where a sum of
squares would overflow or underflow. A second table compares F-SAM with its moving
average in float32 and in bfloat16. docs/cost.md says what the library does.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
from measure import compile_program, print_ratios
from models import MODELS, make_batch, make_loss

RHO, LEARNING_RATE, DECAY = 0.05, 0.01, 0.9
LARGEST = 2.0**96  # a float32 sum of squares below it, and above 1 / it, is accurate


# --- Norms.


def plain_norm(tree: Any) -> jax.Array:
    return optax.tree.norm(tree)


def norm_of_scaled(tree: Any) -> jax.Array:
    """Divides by the largest entry first, which always takes two passes."""
    largest = optax.tree.max(jax.tree.map(jnp.abs, tree))
    scaled = optax.tree.scale(1 / largest, tree)
    return largest * optax.tree.norm(scaled)


def norm_in_loop(tree: Any) -> jax.Array:
    """A loop that ends after one pass, unless the sum of squares is not accurate."""

    def body(carry):
        count, factor, _ = carry
        square = optax.tree.norm(optax.tree.scale(factor, tree), squared=True)
        is_safe = (square >= 1 / LARGEST) & (square <= LARGEST)
        rescue = jnp.where(square > LARGEST, 1 / LARGEST, LARGEST)
        count = jnp.where(is_safe, 2, count + 1)
        return count, jnp.where(count == 2, factor, rescue), square

    start = (jnp.zeros((), jnp.int32), jnp.ones(()), jnp.zeros(()))
    _, factor, square = jax.lax.while_loop(lambda carry: carry[0] < 2, body, start)
    return jnp.sqrt(square) / factor


def norm_in_branch(tree: Any) -> jax.Array:
    """A second pass in a branch, taken if the sum of squares is not accurate."""
    square = optax.tree.norm(tree, squared=True)
    is_safe = (square >= 1 / LARGEST) & (square <= LARGEST)
    factor = jnp.where(square > LARGEST, 1 / LARGEST, LARGEST)
    rescued = jax.lax.cond(
        is_safe,
        lambda tree: jnp.sqrt(square),
        lambda tree: optax.tree.norm(optax.tree.scale(factor, tree)) / factor,
        tree,
    )
    return rescued


NORMS = {
    "norm of what is scaled first": norm_of_scaled,
    "norm in a loop": norm_in_loop,
    "norm with a branch": norm_in_branch,
}


# --- Steps: functions of (params, ...) that return the new (params, ..., loss).


def make_steps(loss_fn: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    value_and_grad = jax.value_and_grad(loss_fn)
    grad = jax.grad(loss_fn)

    def perturbed(params, g, norm=plain_norm):
        factor = RHO / norm(g)
        return jax.tree.map(lambda w, g: w + factor * g, params, g)

    def descend(params, d):
        return jax.tree.map(lambda w, d: w - LEARNING_RATE * d, params, d)

    def two_gradients(params, x, y, norm=plain_norm):
        loss, g = value_and_grad(params, x, y)
        return descend(params, grad(perturbed(params, g, norm), x, y)), loss

    def in_scan(params, x, y):
        def one_pass(carry, _):
            loss, g = value_and_grad(carry[0], x, y)
            return (perturbed(params, g), g), loss

        start = params, optax.tree.zeros_like(params)
        (_, d), losses = jax.lax.scan(one_pass, start, length=2)
        return descend(params, d), losses[0]

    def in_cond(params, x, y):
        loss, g = value_and_grad(params, x, y)
        ascend = jnp.isfinite(loss)  # True, but the compiler cannot know that
        d = jax.lax.cond(ascend, lambda: grad(perturbed(params, g), x, y), lambda: g)
        return descend(params, d), loss

    def perturbation_kept(params, x, y):
        loss, g = value_and_grad(params, x, y)
        factor = RHO / plain_norm(g)
        e = jax.tree.map(lambda g: factor * g, g)
        point = jax.tree.map(jnp.add, params, e)
        d = grad(point, x, y)
        # Restores w as point − ε, as a step does that overwrites the parameters.
        back = jax.tree.map(jnp.subtract, *jax.lax.optimization_barrier((point, e)))
        return descend(back, d), loss

    steps = {
        "two gradients": two_gradients,
        "in a scan": in_scan,
        "in a cond": in_cond,
        "perturbation kept": perturbation_kept,
    }
    for name, norm in NORMS.items():
        steps[name] = lambda params, x, y, norm=norm: two_gradients(params, x, y, norm)
    return steps


def flat_step(loss_fn: Callable[..., Any], params: Any) -> tuple[Any, Any]:
    """The step "two gradients" on one vector of all parameters; and the vector."""
    vector, unravel = jax.flatten_util.ravel_pytree(params)
    step = make_steps(lambda v, x, y: loss_fn(unravel(v), x, y))["two gradients"]
    return step, vector


def ema_step(loss_fn: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
    """F-SAM with its moving average kept in `dtype`."""
    value_and_grad = jax.value_and_grad(loss_fn)

    def step(params, ema, x, y):
        loss, g = value_and_grad(params, x, y)
        mean = jax.tree.map(lambda m, g: DECAY * m + (1 - DECAY) * g, ema, g)
        h = optax.tree.sub(g, mean)
        factor = RHO / plain_norm(h)
        point = jax.tree.map(lambda w, h: w + factor * h, params, h)
        d = jax.grad(loss_fn)(point, x, y)
        params = jax.tree.map(lambda w, d: w - LEARNING_RATE * d, params, d)
        return params, optax.tree.cast(mean, dtype), loss

    return step


# --- The command.


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["mlp", "transformer"]
    )
    parser.add_argument("--width", type=int, help="(default: the model's own)")
    parser.add_argument("--batch", type=int, help="(default: the model's own)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="dtype to compute in; parameters are float32 (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument(
        "--compiles", type=int, default=3, help="the fastest one counts (default: 3)"
    )
    args = parser.parse_args(argv)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    for name in args.models:
        model = MODELS[name]
        width, size = args.width or model.width, args.batch or model.batch
        params = model.init(jax.random.key(0), width)
        batch = make_batch(model, size)
        loss_fn = make_loss(model.predict, jnp.dtype(args.dtype))
        leaves = jax.tree.leaves(params)
        count = sum(w.size for w in leaves)
        print(
            f"\n{name}, width {width}, batch {size}: "
            f"{count:,} parameters in {len(leaves)} leaves"
        )
        steps = {name: (step, params) for name, step in make_steps(loss_fn).items()} | {
            "one flat buffer": flat_step(loss_fn, params)
        }
        # Each program gets a copy, because it overwrites its donated arguments.
        programs = {
            name: compile_program(
                step,
                jax.tree.map(jnp.copy, start),
                *batch,
                donate=(0,),
                times=args.compiles,
            )
            for name, (step, start) in steps.items()
        }
        print_ratios(programs, args.rounds, carried=1)
        print()
        programs = {
            f"fsam, average in {dtype}": compile_program(
                ema_step(loss_fn, dtype),
                jax.tree.map(jnp.copy, params),
                optax.tree.zeros_like(params, dtype=dtype),
                *batch,
                donate=(0, 1),
                times=args.compiles,
            )
            for dtype in ("float32", "bfloat16")
        }
        print_ratios(programs, args.rounds, carried=2)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
