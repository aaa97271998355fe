"""What an installed sam_optax must do, without any of its extras.

    python scripts/smoke.py

Trains a few steps with every method through both doors, and checks that the loss falls.
"""

import importlib.metadata

import jax
import jax.numpy as jnp
import optax

import sam_optax


def loss_fn(w, x, y):
    return jnp.mean((jnp.tanh(x @ w["in"]) @ w["out"] - y) ** 2)


def train(method: str) -> tuple[float, float]:
    """Returns the first and the last loss."""
    x = jax.random.normal(jax.random.key(0), (64, 3))
    y = jnp.sin(x.sum(1))
    w = {"in": 0.5 * jnp.ones((3, 8)), "out": jnp.zeros(8)}
    sam = getattr(sam_optax, method)(rho=0.01)
    tx = optax.chain(sam, optax.adam(1e-2))
    loss_and_grads = sam_optax.sam_value_and_grad(loss_fn, sam)
    extra = {"full_gradient": jax.grad(loss_fn)} if method in FULL else {}

    @jax.jit
    def step(w, opt_state):
        full = {k: f(w, x, y) for k, f in extra.items()}
        options = {"extra_args": full} if full else {}
        loss, grads = loss_and_grads(w, x, y, opt_state=opt_state, **options)
        updates, opt_state = tx.update(grads, opt_state, w)
        return optax.apply_updates(w, updates), opt_state, loss

    opt_state, losses = tx.init(w), []
    for _ in range(20):
        w, opt_state, loss = step(w, opt_state)
        losses.append(float(loss))
    return losses[0], losses[-1]


FULL = ("sam_full", "sam_noise")  # they take the full gradient as an extra argument

if __name__ == "__main__":
    installed = importlib.metadata.version("sam_optax")
    assert installed == sam_optax.__version__, (installed, sam_optax.__version__)
    for method in ("sam", "asam", "fsam", "gsam", "stable_sam", "look_sam", "sam_full"):
        first, last = train(method)
        assert last < first, (method, first, last)
    print(f"sam_optax {installed} from {sam_optax.__file__} trains.")
