"""Compiled steps, shared by the tests that use them.

XLA takes longer to compile a step than the tests take to run it, so the contracts of a
method run on two programs: one that shows everything of a step and takes whatever could
be asked of it as arguments, and one of half-precision parameters under a mask.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import problem
import sam_optax
from doors import DOORS
from methods import TABLE

SWITCH = 2  # the step at which schedules change from their first value
NEVER = 10**6


class Shown(NamedTuple):
    """What a step shows."""

    epsilon: Any  # w + ε − w, at least in float32; None on a step of the cadence
    d: Any
    state: Any


@jax.jit
def gradient(params, batch):
    return jax.grad(problem.loss)(params, batch)


def half_params():
    """Parameters of several dtypes; the one that `HALF_MASK` leaves out is not zero."""
    params = jax.tree.map(jnp.zeros_like, problem.params())
    return {
        "a": params["a"].astype(jnp.bfloat16),
        "b": {"c": params["b"]["c"] + 0.3, "d": params["b"]["d"].astype(jnp.float16)},
    }


HALF_MASK = {"a": True, "b": {"c": False, "d": True}}


def half_slope(t):
    """Of the size of 300, whose square leaves float16."""
    rng = np.random.default_rng(t)
    return jax.tree.map(
        lambda w: jnp.asarray(300 * (1 + 0.3 * rng.normal(size=w.shape)), w.dtype),
        half_params(),
    )


@jax.jit
def half_gradient(point, slope):
    """Of slope · w + 5 |w|², in the dtypes of the parameters."""
    return jax.tree.map(
        lambda s, w: (s.astype(jnp.float32) + 10 * w).astype(w.dtype), slope, point
    )


def half_loss(point, slope):
    """In float32, of which `half_gradient` is the rounded gradient."""
    terms = jax.tree.map(
        lambda s, w: jnp.sum(s.astype(jnp.float32) * w + 5 * jnp.square(w)),
        slope,
        jax.tree.map(lambda w: w.astype(jnp.float32), point),
    )
    return sum(jax.tree.leaves(terms))


def with_loss(loss, gradient):
    """What a grad_fn may return, for the methods that need the loss as well."""
    return sam_optax.data.Pass(loss, gradient)


class Lab:
    """One method."""

    def __init__(self, name):
        self.row = TABLE[name]
        self.traces = 0

    def scheduled(self, values=None, switch=SWITCH, **options):
        """The method with every hyperparameter on a schedule that switches once."""
        first, second = values or (self.row.values(0), self.row.values(1))
        schedules = {
            name: lambda t, a=first[name], b=second[name]: jnp.where(t < switch, a, b)
            for name in first
        }
        return self.row(**schedules, **options)

    def init(self, w=None):
        return self.scheduled().init(problem.params() if w is None else w)

    @functools.cached_property
    def _show(self):
        @functools.partial(jax.jit, static_argnames="ascend")
        def show(w, g, state, batch, is_linear, values, switch, ascend):
            self.traces += 1
            points = []

            def grad_fn(point):
                points.append(point)
                loss, there = jax.value_and_grad(problem.loss)(point, batch)
                return with_loss(
                    jnp.where(is_linear, optax.tree.vdot(g, point), loss),
                    jax.tree.map(lambda a, b: jnp.where(is_linear, a, b), g, there),
                )

            sam = self.scheduled(values, switch)
            d, state = sam.update(g, state, w, grad_fn=grad_fn, ascend=ascend)
            if not ascend:
                return Shown(None, d, state)
            epsilon = jax.tree.map(jnp.subtract, points[self.row.point], w)
            return Shown(epsilon, d, state)

        return show

    def show(
        self,
        w,
        state,
        batch,
        g=None,
        *,
        first=None,
        second=None,
        switch=SWITCH,
        is_linear=False,
        ascend=True,
    ):
        """One step, with ε; or one that the cadence decides on, with ascend=None.

        g is the gradient on the batch unless it is given. The loss is linear if
        is_linear: then the gradient is g everywhere. The hyperparameters have their
        first values before step `switch`, and then their second ones.
        """
        values = (self.row.values(0) | (first or {}), self.row.values(1))
        values = values[0], values[1] | (second or {})
        values = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), values)
        g = gradient(w, batch) if g is None else g
        return self._show(
            w, g, state, batch, jnp.bool_(is_linear), values, jnp.int32(switch), ascend
        )

    def run(self, steps, w=None, state=None, start=0, **options):
        """What each of some steps of SGD shows, with the parameters it begins at."""
        w = problem.params() if w is None else w
        state = self.init() if state is None else state
        shown = []
        for t in range(start, start + steps):
            step = self.show(w, state, problem.batch(t), **options)
            shown.append((w, step))
            w = jax.tree.map(lambda w, d: w - 0.1 * d, w, step.d)
            state = step.state
        return shown

    @functools.cached_property
    def halves(self):
        """One step in half precision under a mask, (state, slope) -> what it shows."""

        @jax.jit
        def show(state, slope):
            points = []

            def grad_fn(point):
                points.append(point)
                return with_loss(half_loss(point, slope), half_gradient(point, slope))

            sam = self.scheduled(mask=HALF_MASK)
            w = half_params()
            d, state = sam.update(
                half_gradient(w, slope), state, w, grad_fn=grad_fn, ascend=True
            )
            epsilon = jax.tree.map(
                lambda q, w: q.astype(jnp.float32) - w.astype(jnp.float32),
                points[self.row.point],
                w,
            )
            return Shown(epsilon, d, state)

        return show


lab = functools.cache(Lab)


# --- A method behind a door, in training.


def base():
    return optax.sgd(0.1, momentum=0.9)


class Bench:
    """One method behind one door."""

    def __init__(self, name, door):
        self.row = TABLE[name]
        self.door = DOORS[door]

    def step(self, sam, base=base, loss=problem.loss):
        """(tx, step), not compiled."""
        tx = optax.chain(sam, base())
        # With an option, the second door passes on losses as well.
        options = {"batch_argnums": 1} if self.row.needs_loss else {}
        return tx, self.door(sam, tx, loss, **options)

    @functools.cached_property
    def training(self):
        """(tx, compiled step) of SGD with momentum that skips what is not finite."""

        def finite_base():
            return optax.apply_if_finite(base(), max_consecutive_errors=5)

        tx, step = self.step(self.row(), finite_base)
        return tx, jax.jit(step)


bench = functools.cache(Bench)


def train(step, params, state, steps, start=0, **kwargs):
    for t in range(start, start + steps):
        params, state, _ = step(params, state, problem.batch(t), **kwargs)
    return params, state


# --- Comparisons.


def assert_trees_close(actual, expected, rtol=0.0, atol=0.0):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=atol
        ),
        actual,
        expected,
    )


def assert_trees_equal(actual, expected):
    assert_trees_close(actual, expected)


def are_equal(a, b):
    """Whether two trees are, bit by bit."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


def all_finite(tree):
    return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


def floats(tree):
    leaves = jax.tree.leaves(tree)
    return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
