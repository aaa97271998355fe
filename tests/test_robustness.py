"""All methods together, for long, and through gradients that should not be."""

import warnings

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import problem
from lab import all_finite, floats, with_loss
from methods import FAST, TABLE


class Everything:
    """One program that trains rows of the table at once."""

    def __init__(self, names):
        self.traces = 0
        self.parts = {}
        for name in names:
            row = TABLE[name]
            sam = row(rho=min(row.rho, 0.05))
            base = optax.apply_if_finite(optax.sgd(0.02, momentum=0.5), 10)
            self.parts[name] = optax.chain(sam, base)
        self.run = jax.jit(self._run)

    def start(self):
        params = problem.params()
        return {name: (params, tx.init(params)) for name, tx in self.parts.items()}

    def _run(self, states, batch, factor, shift):
        """A step whose gradient of the leaf `a` is factor · ∇ + shift."""
        self.traces += 1

        def grad_fn(point):
            loss, g = jax.value_and_grad(problem.loss)(point, batch)
            return with_loss(loss, {**g, "a": factor * g["a"] + shift})

        after = {}
        for name, tx in self.parts.items():
            params, state = states[name]
            updates, state = tx.update(
                grad_fn(params).gradient, state, params, grad_fn=grad_fn
            )
            after[name] = optax.apply_updates(params, updates), state
        return after


@pytest.fixture(
    scope="module",
    params=[FAST, pytest.param(TABLE, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def everything(request):
    return Everything(request.param)


@pytest.mark.parametrize(
    ("factor", "shift"),
    [(0.0, 0.0), (1e-38, 0.0), (0.0, 1e30), (1.0, np.nan), (1.0, np.inf)],
    ids=["zero", "1e-38", "1e30", "nan", "inf"],
)
def test_one_bad_gradient_is_survived(everything, factor, shift):
    """At a step in the middle, in one leaf. Parameters and carried state stay finite,
    and training goes on."""
    states = everything.start()
    for t in range(3):
        states = everything.run(states, problem.batch(t), 1.0, 0.0)
    before = states
    states = everything.run(states, problem.batch(3), factor, shift)
    for name, (params, state) in states.items():
        if abs(shift) == 1e30:  # a real gradient, and the base optimizer's business
            continue
        assert all_finite(params), name
        assert all_finite(floats(state)), name
        if not np.isfinite(shift):
            assert state[1].total_notfinite == 1, name
            for a, b in zip(
                jax.tree.leaves(params), jax.tree.leaves(before[name][0]), strict=True
            ):
                np.testing.assert_array_equal(a, b, err_msg=name)
    if abs(shift) == 1e30:
        for name, (_, state) in states.items():
            assert all_finite(floats(state[0])), name
        return
    after = states
    for t in range(4, 7):
        after = everything.run(after, problem.batch(t), 1.0, 0.0)
    for name, (params, state) in after.items():
        assert all_finite(params), name
        assert all_finite(floats(state)), name
        moved = np.abs(params["a"] - states[name][0]["a"])
        assert np.max(moved) > 1e-5, name


def test_a_thousand_steps_without_drift_leak_or_recompilation(everything):
    states = everything.start()
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype), states)
    traces = everything.traces
    batch = problem.batch()
    for t in range(1000):
        states = everything.run(states, batch, 1.0, 0.0)
        if t == 99:
            alive = len(jax.live_arrays())
    assert everything.traces <= traces + (traces == 0)
    assert len(jax.live_arrays()) <= alive
    assert jax.tree.map(lambda x: (x.shape, x.dtype), states) == kinds
    start = float(problem.loss(problem.params(), batch))
    for name, (params, state) in states.items():
        assert all_finite(params), name
        assert all_finite(floats(state)), name
        assert float(problem.loss(params, batch)) < 0.5 * start, name
        assert state[1].total_notfinite == 0, name


# --- Random trees.

# A few shapes and dtypes, because every new one is compiled anew.
LEAVES = st.sampled_from(
    [
        None,
        jnp.asarray(0.5),
        jnp.arange(3.0),
        jnp.zeros((0,)),
        jnp.ones((2, 2)),
        jnp.ones(3, jnp.bfloat16),
        jnp.full((2,), 0.1, jnp.float16),
    ]
)
TREES = st.recursive(
    LEAVES,
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.sampled_from("abc"), children, max_size=3)
        | st.tuples(children, children)
    ),
    max_leaves=5,
).map(lambda tree: {"tree": tree})


@pytest.mark.slow
def test_a_tree_of_everything_goes_through_every_method():
    """Nested, empty, of mixed dtypes, with None and arrays without entries."""
    leaves = [jnp.ones(3, jnp.bfloat16), jnp.full((2,), 0.1, jnp.float16)]
    sizes = {"number": jnp.asarray(0.5), "none": jnp.zeros((0,)), "b": jnp.ones((2, 2))}
    goes_through_every_method({"a": (None, [*leaves, {}]), **sizes})
    goes_through_every_method({"a": None, "b": ()})


@pytest.mark.slow
@hypothesis.given(params=TREES)
@hypothesis.settings(max_examples=8)
def test_any_tree_of_parameters_goes_through_every_method(params):
    goes_through_every_method(params)


def goes_through_every_method(params):
    def gradient(point):
        return jax.tree.map(lambda w: jnp.sin(w) + w, point)

    def grad_fn(point):
        return with_loss(jnp.float32(1), gradient(point))

    for name, row in TABLE.items():
        options = {}
        if row.name == "sam_on":  # it chooses by names, which these do not have
            options["mask"] = lambda w: jax.tree.map(lambda _: True, w)
        sam = row(**options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of half-precision parameters
            d, state = sam.update(
                gradient(params), sam.init(params), params, grad_fn=grad_fn
            )
        assert jax.tree.structure(d) == jax.tree.structure(params), name
        for leaf, w in zip(jax.tree.leaves(d), jax.tree.leaves(params), strict=True):
            assert (leaf.shape, leaf.dtype) == (w.shape, w.dtype), name
        assert all_finite(d), name
        assert all_finite(floats(state)), name


@pytest.mark.parametrize("leaf", [jnp.arange(3), jnp.ones(3, bool), 1])
def test_leaves_that_have_no_gradient_are_refused(leaf):
    params = {"a": jnp.ones(2), "b": leaf}
    for row in TABLE.values():
        sam = row()
        state = sam.init({"a": params["a"], "b": jnp.ones(3)})
        with pytest.raises(TypeError, match=r"params\['b'\] is .*only floating-point"):
            sam.update(params, state, params, grad_fn=lambda w: w)
