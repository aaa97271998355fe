"""Flax NNX: the gradients come with what the optimizer needs for the second ones."""

import optax
from flax import nnx
from sklearn.datasets import load_digits

import sam_optax
import sam_optax.nnx


class Model(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def loss_fn(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def step(model, optimizer, x, y):
    loss, grads, extra_args = sam_optax.nnx.value_and_ascent_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads, **extra_args)
    return loss


def main() -> None:
    x, y = load_digits(return_X_y=True)
    model = Model(nnx.Rngs(0))
    tx = optax.chain(sam_optax.sam(rho=0.1), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(50):
        loss = step(model, optimizer, x, y)
    print(f"loss {loss:.3f}")


if __name__ == "__main__":
    main()
