"""What a SAM step costs beside one written by hand, on a multilayer perceptron.

    python benchmarks/step_cost.py

Times a hand-written jitted step of two gradients, both doors of `sam_optax.sam`, the
plain base optimizer and `optax.contrib.sam` (opaque), in turn, within one process, and
prints the median of the ratios to the hand-written step, with the range that holds half
of them, beside the compiler's count of flops and temporary memory.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import optax
from measure import compile_program, print_ratios

import sam_optax

RHO, LEARNING_RATE = 0.05, 0.1


def loss_fn(params, x, y):
    for w in params[:-1]:
        x = jax.nn.relu(x @ w)
    logits = x @ params[-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def by_hand(params, state, x, y):
    loss, g = jax.value_and_grad(loss_fn)(params, x, y)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in g))
    point = [w + RHO / norm * leaf for w, leaf in zip(params, g, strict=True)]
    d = jax.grad(loss_fn)(point, x, y)
    return (
        [w - LEARNING_RATE * leaf for w, leaf in zip(params, d, strict=True)],
        state,
        loss,
    )


def make_steps(params):
    """Name -> (step, state)."""
    base = optax.sgd(LEARNING_RATE)
    sam = sam_optax.sam(RHO)
    tx = optax.chain(sam, base)
    loss_and_grads = sam_optax.sam_value_and_grad(loss_fn, sam)
    opaque = optax.contrib.sam(
        base, optax.chain(optax.contrib.normalize(), optax.sgd(RHO)), opaque_mode=True
    )

    def plain(params, state, x, y):
        loss, g = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = base.update(g, state, params)
        return optax.apply_updates(params, updates), state, loss

    def door1(params, state, x, y):
        loss, grads = loss_and_grads(params, x, y, opt_state=state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def door2(params, state, x, y):
        grad_fn = jax.grad(lambda w: loss_fn(w, x, y))
        loss, g = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(g, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state, loss

    def contrib(params, state, x, y):
        def grad_fn(w, _):
            return jax.grad(loss_fn)(w, x, y)

        loss, g = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = opaque.update(g, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state, loss

    return {
        "by hand": (by_hand, ()),
        "sam, door 1": (door1, tx.init(params)),
        "sam, door 2": (door2, tx.init(params)),
        "plain SGD": (plain, base.init(params)),
        "optax.contrib.sam": (contrib, opaque.init(params)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--width", type=int, default=1024, help="(default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=60, help="(default: %(default)s)")
    args = parser.parse_args()

    keys = jax.random.split(jax.random.key(0), 5)
    widths = [256, args.width, args.width, 10]
    params = [
        jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, shape in zip(keys, itertools.pairwise(widths), strict=False)
    ]
    x = jax.random.normal(keys[3], (args.batch, 256))
    y = jax.random.randint(keys[4], (args.batch,), 0, 10)

    programs = {
        name: compile_program(step, params, state, x, y)
        for name, (step, state) in make_steps(params).items()
    }
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print(f"{sum(w.size for w in params):,} parameters, batch {args.batch}")
    print_ratios(programs, args.rounds)


if __name__ == "__main__":
    main()
