"""Orbax: a training that stops in the middle and goes on as if it had not.

Run it twice: `python examples/orbax_resume.py /tmp/checkpoint`. The first run trains 30
steps and saves, the second one restores and trains the rest.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import sam_optax

sam = sam_optax.fsam(rho=0.1)  # carries an average of the gradient
tx = optax.chain(sam, optax.adam(1e-2))


def loss_fn(w, x):
    return jnp.mean((jnp.tanh(x @ w) - jnp.tanh(x.sum(1))) ** 2)


loss_and_grads = sam_optax.sam_value_and_grad(loss_fn, sam)


@jax.jit
def step(w, opt_state, number):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(0), number), (16, 4))
    loss, grads = loss_and_grads(w, x, opt_state=opt_state)
    updates, opt_state = tx.update(grads, opt_state, w)
    return optax.apply_updates(w, updates), opt_state, loss


def main(path: pathlib.Path) -> None:
    state = {"w": jnp.zeros(4), "opt_state": tx.init(jnp.zeros(4)), "number": 0}
    with ocp.StandardCheckpointer() as checkpointer:
        if path.exists():
            state = checkpointer.restore(path, state)
        for number in range(state["number"], state["number"] + 30):
            w, opt_state, loss = step(state["w"], state["opt_state"], number)
            state = {"w": w, "opt_state": opt_state, "number": number + 1}
        if not path.exists():
            checkpointer.save(path, state)
    print(f"{state['number']} steps, loss {loss:.6f}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).absolute())
