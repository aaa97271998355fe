"""Small problems whose sharpness is known from dense matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from sam_optax import sharpness

EXAMPLES, INPUTS = 24, 6


def model(params, x, y):
    return jnp.tanh(x @ params["a"] + params["b"]) @ params["c"]


def squared_error(outputs, x, y):
    return jnp.mean((outputs - y) ** 2)


def loss_fn(params, x, y):
    return squared_error(model(params, x, y), x, y)


def bowl(w, x):
    """A quadratic with Hessian diag(2 mean(x²))."""
    return jnp.mean((x @ jnp.diag(w)) ** 2) * x.shape[1]


@functools.cache
def network():
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "a": jax.random.normal(keys[0], (INPUTS, 8)),
        "b": jax.random.normal(keys[1], (8,)),
        "c": jax.random.normal(keys[2], (8,)),
    }
    x = jax.random.normal(keys[3], (EXAMPLES, INPUTS), jnp.float32)
    y = jax.random.normal(keys[4], (EXAMPLES,), jnp.float32)
    return params, (x.astype(jnp.float64), y.astype(jnp.float64))


class Rows:
    """A sequence that notes what is read; an item that is a function is called."""

    def __init__(self, items):
        self.items, self.read = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.read.append(index)
        item = self.items[index]
        return item() if callable(item) else item


def in_batches(data, size):
    """As a user's data on disk: read by index, in NumPy.

    In float32, which holds them all: JAX runs callbacks in threads of its own, where a
    local `jax.enable_x64` does not reach.
    """
    return sharpness.stream(
        [
            tuple(np.asarray(x[start : start + size], np.float32) for x in data)
            for start in range(0, EXAMPLES, size)
        ]
    )


@functools.cache
def dense(kind):
    """The matrix, formed."""
    params, (x, y) = network()
    flat, unravel = ravel_pytree(params)

    def each(w):
        return jax.vmap(lambda x, y: loss_fn(unravel(w), x[None], y[None]))(x, y)

    if kind == "hessian":
        return np.asarray(jax.hessian(lambda w: loss_fn(unravel(w), x, y))(flat))
    if kind == "gauss_newton":
        jacobian = jax.jacobian(lambda w: model(unravel(w), x, y))(flat)
        return np.asarray(2 / EXAMPLES * jacobian.T @ jacobian)
    gradients = jax.jacobian(each)(flat)
    return np.asarray(gradients.T @ gradients / EXAMPLES)


def matrix(kind, data=None, batch_size=None):
    params, whole = network()
    data = whole if data is None else data
    if kind == "gauss_newton":
        return sharpness.gauss_newton(
            model, squared_error, params, data, batch_size=batch_size
        )
    return getattr(sharpness, kind)(loss_fn, params, data, batch_size=batch_size)
