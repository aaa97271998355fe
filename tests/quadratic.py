"""A quadratic, on which every step of a method is a formula in NumPy.

Its parameters lie in two leaves, so that a norm or a projection of one leaf alone is
seen; the formulas know of one vector.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from doors import door2

H = np.array([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]])
W = np.array([1.0, -2.0, 0.5])


def split(w):
    w = jnp.asarray(w)
    return {"x": w[:2], "y": w[2:]}


def whole(tree):
    return np.concatenate([tree["x"], tree["y"]])


def quadratic(tree):
    w = jnp.concatenate([tree["x"], tree["y"]])
    return 0.5 * w @ jnp.asarray(H, w.dtype) @ w


grad_fn = jax.grad(quadratic)


def descend(sam, steps=4, lr=0.1, door=door2):
    """The points that SGD after SAM visits."""
    return visit(sam, optax.chain(sam, optax.sgd(lr)), steps, door)


def visit(sam, tx, steps=4, door=door2):
    step = jax.jit(door(sam, tx, quadratic))
    params, visited = split(W), []
    state = tx.init(params)
    for _ in range(steps):
        params, state, _ = step(params, state)
        visited.append(whole(params))
    return np.stack(visited)


def expected(perturbation, steps=4, lr=0.1):
    """w − lr · H(w + ε), with ε a function of (g, w, memory)."""
    w, memory, visited = W, {}, []
    for _ in range(steps):
        w = w - lr * H @ (w + perturbation(H @ w, w, memory))
        visited.append(w)
    return np.stack(visited)


def descending(function, steps=4, lr=0.1, rho=0.5):
    """The points of SGD on d = function(gᵃ, g, ε, w) after SAM's ascent."""
    w, visited = W, []
    for _ in range(steps):
        g = H @ w
        e = rho * g / np.linalg.norm(g)
        w = w - lr * function(H @ (w + e), g, e, w)
        visited.append(w)
    return np.stack(visited)


def orthogonal_to(v, x):
    return x - (x @ v) / (v @ v) * v


def assert_same(actual, wanted):
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-12)
