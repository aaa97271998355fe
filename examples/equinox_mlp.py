"""Equinox: the arrays of a model are the parameters, and the rest is closed over."""

import equinox as eqx
import jax
import optax
from sklearn.datasets import load_digits

import sam_optax


def main() -> None:
    x, y = load_digits(return_X_y=True)
    model = eqx.nn.MLP(64, 10, 64, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, x, y):
        logits = jax.vmap(eqx.combine(params, static))(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    sam = sam_optax.sam(rho=0.1)
    tx = optax.chain(sam, optax.adam(1e-3))
    loss_and_grads = sam_optax.sam_value_and_grad(loss_fn, sam)

    @jax.jit
    def step(params, opt_state, x, y):
        loss, grads = loss_and_grads(params, x, y, opt_state=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params)
        return eqx.apply_updates(params, updates), opt_state, loss

    opt_state = tx.init(params)
    for _ in range(50):
        params, opt_state, loss = step(params, opt_state, x, y)
    model = eqx.combine(params, static)
    print(f"loss {loss:.3f}, first prediction {jax.numpy.argmax(model(x[0]))}")


if __name__ == "__main__":
    main()
