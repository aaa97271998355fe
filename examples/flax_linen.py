"""Flax Linen with batch statistics and dropout: `TrainState`, and one line changed."""

import flax.linen as nn
import jax
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import sam_optax


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(64)(x)))
        return nn.Dense(10)(nn.Dropout(0.2, deterministic=not train)(x))


def main() -> None:
    x, y = load_digits(return_X_y=True)
    model, sam = Model(), sam_optax.sam(rho=0.1)
    stats = model.init(jax.random.key(0), x[:1], train=False)
    tx = optax.chain(sam, optax.sgd(0.1))
    state = TrainState.create(apply_fn=model.apply, params=stats.pop("params"), tx=tx)

    def loss_fn(params, stats, x, y, key):
        logits, stats = state.apply_fn(
            {"params": params, **stats},
            x,
            True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), stats

    loss_and_grads = sam_optax.sam_value_and_grad(loss_fn, sam, has_aux=True)

    @jax.jit
    def step(state, stats, x, y):
        key = jax.random.fold_in(jax.random.key(1), state.step)
        (loss, stats), grads = loss_and_grads(
            state.params, stats, x, y, key, opt_state=state.opt_state
        )
        return state.apply_gradients(grads=grads), stats, loss

    for _ in range(50):
        state, stats, loss = step(state, stats, x, y)
    print(f"loss {loss:.3f}")


if __name__ == "__main__":
    main()
