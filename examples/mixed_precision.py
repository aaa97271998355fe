"""Mixed precision: float32 parameters, float16 compute, and a loss scale that adapts.

The loss is scaled up so that small gradients survive float16, and the gradients are
scaled down again before SAM sees them, so that its radius does not depend on the scale.
"""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import sam_optax


def loss_fn(params, x, y):
    w1, w2, x = (a.astype(jnp.float16) for a in (*params, x))  # compute in float16
    logits = (jnp.tanh(x @ w1) @ w2).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def main() -> None:
    x, y = load_digits(return_X_y=True)
    keys = jax.random.split(jax.random.key(0))
    params = [jax.random.normal(keys[0], (64, 64)) / 64, jnp.zeros((64, 10))]
    tx = optax.chain(sam_optax.sam(0.1), optax.apply_if_finite(optax.sgd(0.3), 100))

    @jax.jit
    def step(params, opt_state, scale, x, y):
        def grad_fn(params):
            scaled = jax.grad(lambda p: scale * loss_fn(p, x, y))(params)
            return jax.tree.map(lambda g: g / scale, scaled)

        g = grad_fn(params)
        updates, opt_state = tx.update(g, opt_state, params, grad_fn=grad_fn)
        scale = jnp.where(opt_state[1].last_finite, scale * 1.01, scale / 2)
        return optax.apply_updates(params, updates), opt_state, scale

    opt_state, scale = tx.init(params), jnp.float32(2**20)  # overflows at first
    for _ in range(100):
        params, opt_state, scale = step(params, opt_state, scale, x, y)
    print(f"loss {loss_fn(params, x, y):.3f}, skipped {opt_state[1].total_notfinite}")


if __name__ == "__main__":
    main()
