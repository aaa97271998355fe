"""What every method has to do by itself: each contract runs over every row.

All of them but the last few look at one compiled step of a method (lab.py), mostly
after the first step, when counters, keys and averages have moved.
"""

import functools
import itertools
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lab as labs
import problem
import sam_optax
from lab import (
    HALF_MASK,
    NEVER,
    SWITCH,
    all_finite,
    are_equal,
    assert_trees_equal,
    floats,
    gradient,
    half_gradient,
    half_params,
    half_slope,
)
from methods import relative_norm
from sam_optax import SharpnessAwareState


@pytest.fixture(scope="module")
def lab(name):
    return labs.lab(name)


def cadences(row):
    """Steps that are known to ascend, and steps of the method's own cadence."""
    return [True] if row.ascends_always else [True, None]


def values_at(row, t):
    return row.values(t >= SWITCH)


# --- Hyperparameters.


def test_step_k_uses_the_kth_value_of_every_schedule(lab):
    """A schedule that switches at step 2 is a number that somebody changes then."""
    first, second = lab.row.values(0), lab.row.values(1)
    for ascend in cadences(lab.row):
        scheduled = lab.run(4, ascend=ascend)
        before = lab.run(SWITCH, ascend=ascend, first=first, switch=NEVER)
        w, state = scheduled[SWITCH][0], before[-1][1].state
        after = lab.run(2, w, state, SWITCH, ascend=ascend, second=second, switch=0)
        for (_, step), (_, by_hand) in zip(scheduled, before + after, strict=True):
            assert are_equal(step, by_hand)


def test_every_hyperparameter_makes_a_difference_from_its_step_on(lab):
    """One at a time, seen in d or in what is carried."""
    for name in lab.row.values():
        changes = []
        for ascend in cadences(lab.row):
            options = {"ascend": ascend, "second": lab.row.values(0)}
            constant = lab.run(SWITCH + 3, **options)
            options["second"] = options["second"] | {name: lab.row.values(1)[name]}
            moved = lab.run(SWITCH + 3, **options)
            changes.append(
                [
                    not are_equal((a.d, floats(a.state)), (b.d, floats(b.state)))
                    for (_, a), (_, b) in zip(constant, moved, strict=True)
                ]
            )
        changed = np.any(changes, axis=0)
        assert not changed[:SWITCH].any(), name
        assert changed[SWITCH:].any(), name


def test_the_radius_is_rho_on_every_step(lab):
    if lab.row.radius is None:
        pytest.skip("its norm is random, or not known beforehand")
    for t, (w, step) in enumerate(lab.run(SWITCH + 2)):
        values = values_at(lab.row, t)
        if t < lab.row.since:
            assert not any(np.any(e) for e in jax.tree.leaves(step.epsilon))
            continue
        radius = lab.row.radius(
            step.epsilon, w, gradient(w, problem.batch(t)), **values
        )
        assert radius == pytest.approx(values["rho"], rel=2e-4), t


def test_the_radius_is_rho_at_every_loss_scale(lab):
    if lab.row.radius is None:
        pytest.skip("its norm is random, or not known beforehand")
    scales = [1e-30, 1e-20, 1e-3, 1e3, 1e20, 1e30]
    if lab.row.radius is relative_norm:  # w + ρ g itself leaves float32
        scales = [1e-3, 1e3]
    # From w = 0, nothing of ε is lost to rounding.
    w, values = jax.tree.map(jnp.zeros_like, problem.params()), lab.row.values()
    for scale in scales:
        state = lab.init()
        for t in range(2):
            g = gradient(problem.params(), problem.batch(t))
            g = jax.tree.map(lambda x, scale=scale: x * jnp.float32(scale), g)
            step = lab.show(w, state, problem.batch(t), g, is_linear=True)
            state = step.state
            if t < lab.row.since:
                continue
            radius = lab.row.radius(step.epsilon, w, g, **values)
            assert radius == pytest.approx(values["rho"], rel=1e-5), (scale, t)


def test_without_a_radius_it_is_the_base_optimizer(lab):
    names = {"rsam": ["rho", "sigma"], "sampa": ["rho", "learning_rate"]}
    names["tsam"] = ["rho", "sigma"]
    zero = names.get(lab.row.name, lab.row.zero.split())
    nothing = dict.fromkeys(zero, 0.0)
    for ascend in cadences(lab.row):
        options = {"first": nothing, "switch": NEVER, "ascend": ascend}
        for t, (w, step) in enumerate(lab.run(4, **options)):
            if ascend:
                assert not any(np.any(e) for e in jax.tree.leaves(step.epsilon))
            g = gradient(w, problem.batch(t))
            g = jax.tree.map(lambda g: lab.row.length * g, g)
            labs.assert_trees_close(step.d, g, rtol=1e-4, atol=1e-5)


def test_impossible_numbers_raise_when_building_and_schedules_pass(lab):
    for name in lab.row.values():
        unbounded = name in ("alpha", "lam", "threshold", "tilt")
        bad = {"decay": 1.0, "gamma": 1.0, **lab.row.bad}.get(name, -0.1)
        impossible = [float("nan")]
        impossible += [] if unbounded else [bad]
        impossible += [] if name == "maximum" else [float("inf")]
        for value in impossible:
            with pytest.raises(ValueError, match="must be"):
                lab.row(**{name: value})
        with pytest.raises(TypeError, match="must be a number"):
            lab.row(**{name: "0.1"})
        lab.row(**{name: lambda step, bad=bad: bad})
        build = functools.partial(lambda x, name: lab.row(**{name: x}), name=name)
        jax.eval_shape(lambda x, build=build: build(x).init(jnp.ones(2)), bad)


def test_inject_hyperparams_leaves_static_arguments_static(lab):
    row = lab.row
    inject = optax.inject_hyperparams(row.make, static_args=row.static_args())
    tx = inject(rho=lambda step: row.rho * (1.0 + step), **row.kwargs)

    def two_steps(w):
        g, state = jax.tree.map(jnp.sin, w), tx.init(w)

        def grad_fn(point):
            return labs.with_loss(jnp.float32(0), jax.tree.map(jnp.sin, point))

        for _ in range(2):
            d, state = tx.update(g, state, w, grad_fn=grad_fn)
        return d, state.hyperparams

    d, hyperparams = jax.eval_shape(two_steps, problem.params())
    assert jax.tree.structure(d) == jax.tree.structure(problem.params())
    assert set(row.values()) - set(row.kwargs) <= set(hyperparams)


# --- Exactness, and numbers that are not.


def test_equal_gradients_give_exactly_the_gradient(lab):
    if not lab.row.is_exact:
        pytest.skip("its weighted factor is not one, as its docstring says")
    for ascend in cadences(lab.row):
        options = {"is_linear": True, "switch": NEVER, "ascend": ascend}
        for t, (w, step) in enumerate(lab.run(3, **options)):
            g = gradient(w, problem.batch(t))
            g = jax.tree.map(lambda g: lab.row.length * g, g)
            assert_trees_equal(step.d, g)


def test_a_zero_gradient_perturbs_nothing_and_spoils_nothing(lab):
    if lab.row.follows == "noise":
        pytest.skip("a random ε does not vanish with the gradient")
    w = problem.params()
    zero = jax.tree.map(jnp.zeros_like, w)
    step = lab.show(w, lab.init(), problem.batch(), zero, is_linear=True)
    assert_trees_equal((step.epsilon, step.d), (zero, zero))
    step = lab.show(w, step.state, problem.batch())
    step = lab.show(w, step.state, problem.batch(), zero, is_linear=True)
    assert all_finite((step.d, floats(step.state)))
    assert all_finite(lab.show(w, step.state, problem.batch()).d)


def assert_carries_on(new, old, new_values=None):
    """Counters count and keys change; values are as before, or as given."""
    new_values = old if new_values is None else new_values
    leaves = map(jax.tree.leaves, (new, old, new_values))
    for after, before, value in zip(*leaves, strict=True):
        if after.dtype == jnp.uint32:
            assert np.any(after != before)
        elif jnp.issubdtype(after.dtype, jnp.integer):
            assert after == before + 1
        else:
            np.testing.assert_array_equal(after, value)


def bad_batch(t, bad):
    x, y = problem.batch(t)
    return x.at[0, 0].set(bad), y


def test_a_bad_gradient_is_seen_and_not_carried(lab):
    w, before = lab.run(3)[-1]
    for bad, ascend in itertools.product(
        (jnp.nan, jnp.inf, -jnp.inf), cadences(lab.row)
    ):
        batch, g = problem.batch(3), gradient(w, problem.batch(3))
        g["b"]["c"] = g["b"]["c"].at[1].set(bad)
        if not lab.row.uses_gradient:  # g is for nothing there, so both are bad
            batch = bad_batch(3, bad)
        step = lab.show(w, before.state, batch, g, ascend=ascend)
        assert not all_finite(step.d)
        assert_carries_on(step.state, before.state)
        if ascend and lab.row.follows == "g":
            # Whatever the loss, w + ε is not finite, and so neither is gᵃ.
            assert not all_finite(step.epsilon)
        later = lab.run(2, w, step.state, 4)
        assert all_finite([(s.d, floats(s.state)) for _, s in later])


def test_a_bad_second_gradient_is_seen_and_carried_by_no_one_who_saw_it(lab):
    w, before = lab.run(3)[-1]
    g = gradient(w, problem.batch(3))
    good = lab.show(w, before.state, problem.batch(3), g)
    step = lab.show(w, before.state, bad_batch(3, jnp.nan), g)
    assert not all_finite(step.d)
    ascent, ours = step.state.ascent_state, before.state
    if lab.row.follows == "steps":
        assert_carries_on(ascent, ours.ascent_state)
    else:
        assert_carries_on(ascent, ours.ascent_state, good.state.ascent_state)
    assert_carries_on(step.state.descent_state, ours.descent_state)
    assert_carries_on(step.state.cadence_state, ours.cadence_state)


# --- What is carried.


@functools.cache
def optax_field_names():
    names = set()
    for tx in (
        optax.adamw(0.1),
        optax.MultiSteps(optax.sgd(0.1), 2),
        optax.apply_if_finite(optax.sgd(0.1), 2),
        optax.inject_hyperparams(optax.sgd)(0.1),
        optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
        optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)),
        optax.contrib.reduce_on_plateau(),
        optax.ema(0.9),
        optax.lbfgs(),
        optax.sgd(lambda step: 0.1, momentum=0.9),
    ):
        names |= field_names(tx.init(problem.params()))
    return names


def field_names(node):
    """Of all NamedTuples in a state."""
    if not isinstance(node, tuple):
        return set()
    own = set(getattr(node, "_fields", ()))
    return own.union(*map(field_names, node))


def test_state_is_arrays_of_its_own_with_names_of_our_own(lab):
    states = [lab.init(), lab.init()]
    assert isinstance(states[0], SharpnessAwareState)
    assert field_names(states[0]).isdisjoint(optax_field_names())
    leaves = jax.tree.leaves(states)
    for leaf in leaves:
        assert isinstance(leaf, jax.Array)
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        assert leaf.dtype == bool or leaf.dtype.itemsize >= 4
    # So that a donated state takes no part of another, nor of the parameters, with it.
    buffers = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    assert len(set(buffers)) == len(buffers)


def test_one_program_whatever_the_values(lab):
    """What comes out of a step goes into the next without another trace."""
    lab.run(3, first={"rho": 0.7}, w=problem.params(seed=1), switch=1)
    lab.traces = 0
    (_, step) = lab.run(2, is_linear=True)[-1]
    assert lab.traces == 0
    for after, before in zip(
        *map(jax.tree.leaves, (step.state, lab.init())), strict=True
    ):
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        assert after.weak_type == before.weak_type


def test_the_registry_counts_the_gradients_of_a_step(lab):
    if lab.row.counts_products:
        pytest.skip("a product with the Hessian is not a call of grad_fn")
    method, kwargs = sam_optax.METHODS[lab.row.name], lab.row.kwargs
    counted, points = method.gradients(**kwargs), []
    sam, w = lab.row(), problem.params()

    def grad_fn(point):
        points.append(point)
        return labs.with_loss(jnp.float32(0), point)

    jax.eval_shape(
        lambda w: sam.update(w, sam.init(w), w, grad_fn=grad_fn, ascend=True), w
    )
    second = len(points)
    if lab.row.ascends_always:
        assert counted == second + lab.row.uses_gradient
    elif "k" in kwargs or "probability" in kwargs:
        assert counted == 1 + second * kwargs.get("probability", 1 / kwargs.get("k", 1))
    else:  # it depends on the data
        assert np.isnan(counted)


def test_state_can_be_saved_and_restored(lab):
    state = lab.run(3)[-1][1].state
    saved = flax.serialization.to_bytes(state)
    for restored in (
        pickle.loads(pickle.dumps(state)),
        flax.serialization.from_bytes(lab.init(), saved),
    ):
        assert are_equal(restored, state)
        for (_, a), (_, b) in zip(
            lab.run(2, state=restored, start=3),
            lab.run(2, state=state, start=3),
            strict=True,
        ):
            assert are_equal(a, b)


# --- Masks and half precision: one program.


@pytest.mark.filterwarnings("ignore:Some perturbed parameters")
def test_half_precision_under_a_mask(lab):
    """On three steps: ε, its norm, d, their dtypes, and what is carried of them."""
    w, state = half_params(), lab.scheduled(mask=HALF_MASK).init(half_params())
    dtypes = jax.tree.map(lambda x: x.dtype, w)
    for t in range(SWITCH + 1):
        g = half_gradient(w, half_slope(t))
        step = lab.halves(state, half_slope(t))
        np.testing.assert_array_equal(step.epsilon["b"]["c"], 0)
        if lab.row.radius is not None:
            kept = [
                {"a": tree["a"], "d": tree["b"]["d"]} for tree in (step.epsilon, w, g)
            ]
            values = values_at(lab.row, t)
            radius = lab.row.radius(*kept, **values)
            wanted = values["rho"] if t >= lab.row.since else 0
            assert radius == pytest.approx(wanted, rel=6e-3), t
        assert jax.tree.map(lambda x: x.dtype, step.d) == dtypes
        if lab.row.descends_on_ga:
            point = jax.tree.map(
                lambda w, e: (w.astype(jnp.float32) + e).astype(w.dtype),
                w,
                step.epsilon,
            )
            assert_trees_equal(step.d, half_gradient(point, half_slope(t)))
        shapes = [x.shape for x in jax.tree.leaves(step.state.ascent_state)]
        assert w["b"]["c"].shape not in shapes
        for leaf in floats(step.state):
            assert leaf.dtype == jnp.float32
        state = step.state
    # An ascent that looks at the perturbed leaves alone does not see this one.
    slope = half_slope(3)
    slope["b"]["c"] = slope["b"]["c"].at[1].set(jnp.nan)
    assert not all_finite(lab.halves(state, slope).d)
