"""The contract, line by line, over every method and both doors."""

import functools
import pickle
import re
import warnings

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import methods
import problem
import sam_optax
from doors import door1
from lab import (
    all_finite,
    assert_trees_close,
    assert_trees_equal,
    finite_base,
    gradient,
    lab,
    schedules,
    train,
)
from sam_optax import SharpnessAwareState


def grad_fn(params, step=0):
    return gradient(params, problem.batch(step))


def perturbation_of(sam, params, g):
    """ε of a first step, seen by a grad_fn that watches where it is evaluated."""
    seen = []

    def watching(point):
        seen.append(point)
        return g

    # Static, so that no branch hides the point, whatever the cadence.
    sam.update(g, sam.init(params), params, grad_fn=watching, ascend=True)
    return jax.tree.map(
        lambda q, w: q.astype(jnp.float32) - w.astype(jnp.float32), seen[-1], params
    )


# Their ε depends on gradients at further points, not on the one at w alone.
FURTHER = (sam_optax.rsam, sam_optax.multi_step_sam)


def every_second(row):
    return sam_optax.sharpness_aware(
        row.ascent(rho=row.rho, **row.kwargs), cadence=sam_optax.every_k(2)
    )


with_ascent = pytest.mark.parametrize(
    "name", [name for name, row in methods.TABLE.items() if row.ascent]
)
both_doors = pytest.mark.parametrize("door", ["door1", "door2"])


# --- Both doors, compiled or not.


@pytest.mark.parametrize("name", methods.TABLE)
def test_the_two_doors_are_one_mathematics(name):
    results = []
    for door in ("door1", "door2"):
        bench = lab(name, door)
        results.append(train(bench.traced, problem.params(), bench.init(), 5))
    assert_trees_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_jit_with_traced_hyperparameters_equals_eager_with_numbers(bench):
    tx, step = bench.step(bench.row())
    params = problem.params()
    eager = train(step, params, tx.init(params), 2)
    jitted = train(bench.traced, params, bench.init(), 2)
    assert_trees_close(jitted, eager, rtol=1e-5, atol=1e-5)


def test_every_radius_gives_another_trajectory(bench):
    rho = bench.row.rho
    final = [
        train(bench.traced, problem.params(), bench.init(), 3, rho=r)[0]
        for r in (0.0, rho, 2 * rho)
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        gap = methods.norm(jax.tree.map(jnp.subtract, final[i], final[j]))
        assert gap > 1e-4


def test_one_trace_whatever_the_values(bench):
    train(bench.traced, problem.params(), bench.init(), 3)
    train(bench.traced, problem.params(seed=1), bench.init(), 2, rho=0.7)
    assert bench.traces == 1


# --- Line 1: what is missing, and what is unknown.


def test_missing_params_is_an_error(row):
    sam, w = row(), problem.params()
    with pytest.raises(ValueError, match=r"needs the parameters: update\(g, state, pa"):
        sam.update(w, sam.init(w), grad_fn=lambda p: p)


def test_missing_grad_fn_is_an_error(row):
    sam, w = row(), problem.params()
    with pytest.raises(ValueError, match=r"grad_fn=.*sam_value_and_grad.*TrainState"):
        sam.update(w, sam.init(w), w)


def test_unknown_extra_arguments_are_ignored(row):
    sam, w = row(), problem.params()
    known, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
    unknown, _ = sam.update(
        grad_fn(w), sam.init(w), w, grad_fn=grad_fn, epoch=3, labels=["a"]
    )
    assert_trees_equal(unknown, known)


# --- Line 2: the helper's result is that of jax.value_and_grad.


def test_value_and_aux_are_those_of_the_unperturbed_pass(row):
    sam = row()
    params = problem.params()

    def loss_fn(params, batch, *, dropout):
        x, y = batch
        keep = jax.random.bernoulli(dropout, 0.5, x.shape)
        loss = problem.loss(params, (x * keep, y))
        return loss, {"logits": params["a"] * 2, "loss": loss}

    @jax.jit
    def step(params, state, batch, dropout):
        loss_and_grads = sam_optax.sam_value_and_grad(loss_fn, sam, has_aux=True)
        value, grads = loss_and_grads(
            params, batch, dropout=dropout, opt_state=state, ascend=True
        )
        return value, sam.update(grads, state, params)[0]

    batch, dropout = problem.batch(), jax.random.key(7)
    value, d = step(params, sam.init(params), batch, dropout)
    plain = jax.value_and_grad(loss_fn, has_aux=True)
    expected, g = plain(params, batch, dropout=dropout)
    assert_trees_close(value, expected, rtol=1e-6)
    if not row.descends_on_ga or row.make in FURTHER:
        return
    # Both passes draw the same mask: at the perturbed point found by hand, the plain
    # gradient with this key is d.
    point = jax.tree.map(jnp.add, params, perturbation_of(sam, params, g))
    assert_trees_close(d, plain(point, batch, dropout=dropout)[1], rtol=1e-4, atol=1e-5)


# --- Line 3: the state is found.

WRAPPINGS = {
    "nested": (lambda sam: optax.chain(optax.chain(sam), optax.chain(optax.adam(0.1)))),
    "named": (lambda sam: optax.named_chain(("sam", sam), ("base", optax.sgd(0.1)))),
    "masked": (lambda sam: optax.masked(optax.chain(sam, optax.sgd(0.1)), True)),
    "partition": (
        lambda sam: optax.partition({"all": optax.chain(sam, optax.sgd(0.1))}, "all")
    ),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_the_state_is_found_by_class(row, wrapping):
    sam = row()
    tx = WRAPPINGS[wrapping](sam)
    params = problem.params()
    step = door1(sam, tx, problem.loss)
    state = tx.init(params)
    after = jax.eval_shape(step, params, state, problem.batch())
    assert jax.tree.structure(after[1]) == jax.tree.structure(state)


# --- Line 4: what the state is made of.


def named_tuples(node):
    """All NamedTuple nodes of a state."""
    if not isinstance(node, tuple):
        return []
    own = [node] if hasattr(node, "_fields") else []
    return sum((named_tuples(child) for child in node), own)


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
        names |= {f for n in named_tuples(tx.init(problem.params())) for f in n._fields}
    return names


def test_state_is_arrays_with_names_of_our_own(row):
    for sam in (row(**schedules(row)), row(stochastic_rounding=0)):
        state = sam.init(problem.params())
        assert isinstance(state, SharpnessAwareState)
        fields = {f for node in named_tuples(state) for f in node._fields}
        assert fields.isdisjoint(optax_field_names())
        for leaf in jax.tree.leaves(state):
            assert isinstance(leaf, jax.Array)
            assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def test_state_is_stable_under_scan_and_keeps_dtypes(bench):
    tx, step = bench.scheduled
    params = problem.params()

    @jax.jit
    def run(params, state, batches):
        def body(carry, batch):
            params, state, loss = step(*carry, batch)
            return (params, state), loss

        return jax.lax.scan(body, (params, state), batches)[0]

    batches = [problem.batch(t) for t in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    scanned = run(params, tx.init(params), stacked)
    looped = train(step, params, tx.init(params), 3)
    assert_trees_close(scanned, looped, rtol=1e-5, atol=1e-6)
    for after, before in zip(
        jax.tree.leaves(scanned[1]), jax.tree.leaves(tx.init(params)), strict=True
    ):
        assert (after.dtype, after.shape) == (before.dtype, before.shape)


def test_parameters_and_state_can_be_donated(bench):
    tx, plain = bench.scheduled
    _, step = bench.step(bench.row(**schedules(bench.row)), finite_base())
    donating = jax.jit(step, donate_argnums=(0, 1))
    expected = train(plain, problem.params(), tx.init(problem.params()), 3)
    params = problem.params()
    state = tx.init(params)
    actual = train(donating, params, state, 3)
    assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert all(x.is_deleted() for x in jax.tree.leaves((params, state[0])))
    assert all_finite(tx.init(problem.params()))  # no constant went with the donation


@pytest.mark.parametrize("how", ["pickle", "flax"])
def test_state_can_be_saved_and_restored(bench, how):
    tx, step = bench.scheduled
    params = problem.params()
    params, state = train(step, params, tx.init(params), 2)
    if how == "pickle":
        restored = pickle.loads(pickle.dumps(state))
    else:
        restored = flax.serialization.from_bytes(
            tx.init(problem.params()), flax.serialization.to_bytes(state)
        )
    assert_trees_equal(restored, state)
    assert_trees_equal(train(step, params, restored, 2), train(step, params, state, 2))


# --- Line 5: schedules (numbers and traced values: see the first tests).


def test_step_k_uses_the_kth_value_of_every_schedule(bench):
    """A schedule that switches at step 2 equals switching the number then."""
    tx, step = bench.scheduled
    params = problem.params()
    scheduled, _ = train(step, params, tx.init(params), 4)
    first = {name: low for name, (low, _) in bench.row.schedulable.items()}
    second = {name: high for name, (_, high) in bench.row.schedulable.items()}
    for switch in (1, 2, 3):
        w, state = train(bench.traced, params, bench.init(), switch, **first)
        w, _ = train(bench.traced, w, state, 4 - switch, start=switch, **second)
        gap = methods.norm(jax.tree.map(jnp.subtract, w, scheduled))
        if switch == 2:
            assert gap < 1e-5
        elif bench.row.ascends_always:
            assert gap > 1e-5, switch


def test_inject_hyperparams_schedules_rho(bench):
    """The k-th radius is the schedule's, and static options stay static."""
    row = bench.row
    inject = optax.inject_hyperparams(row.make, static_args=row.static_args)
    tx, step = bench.step(inject(rho=lambda k: row.rho * (1.0 + k), **row.kwargs))
    params = problem.params()
    actual, state = train(jax.jit(step), params, tx.init(params), 3)
    np.testing.assert_allclose(state[0].hyperparams["rho"], 3 * row.rho, rtol=1e-6)
    expected, state = params, bench.init()
    for t in range(3):
        expected, state = train(
            bench.traced, expected, state, 1, t, rho=row.rho * (1 + t)
        )
    assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_inject_hyperparams_edits_rho_in_flight(bench):
    row = bench.row
    inject = optax.inject_hyperparams(row.make, static_args=row.static_args)
    tx, step = bench.step(inject(rho=0.0, **row.kwargs))
    step = jax.jit(step)
    params, state = train(step, problem.params(), tx.init(problem.params()), 1)
    state[0].hyperparams["rho"] = jnp.asarray(row.rho)
    actual, _ = train(step, params, state, 1, start=1)
    params, state = train(bench.traced, problem.params(), bench.init(), 1, rho=0.0)
    expected, _ = train(bench.traced, params, state, 1, start=1)
    assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6)


# --- Line 6: exactness, zero and scale.


def test_equal_gradients_give_exactly_the_gradient(bench):
    if not bench.row.is_exact:
        pytest.skip("its weighted factor is not one, as its docstring says")
    seen = []

    def watch(updates, params=None):
        seen.append(updates)
        return updates

    tx, step = bench.step(bench.row(), optax.stateless(watch), problem.linear_loss)
    params = problem.params()
    step(params, tx.init(params), problem.batch())
    expected = jax.grad(problem.linear_loss)(params, problem.batch())
    assert_trees_equal(seen[0], expected)


def test_rho_zero_follows_the_base_optimizer(bench):
    params = problem.params()
    zero = {name: 0.0 for name in ("rho", "sigma") if name in bench.row.schedulable}
    if bench.row.make is not sam_optax.rsam:
        zero = {"rho": 0.0}
    actual, _ = train(bench.traced, params, bench.init(), 5, **zero)
    momentum = jax.tree.map(jnp.zeros_like, params)
    for t in range(5):
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grad_fn(params, t))
        params = jax.tree.map(lambda w, m: w - 0.1 * m, params, momentum)
    assert_trees_close(actual, params, rtol=1e-5, atol=2e-6)


def test_a_zero_gradient_gives_the_base_optimizers_step(bench):
    if not bench.row.follows_gradient:
        pytest.skip("a random ε does not vanish with the gradient")
    x, y = problem.batch()
    params, state = problem.params(), bench.init()
    # With these, prediction and target are both exactly zero, and so is the gradient.
    params["b"]["d"] = jnp.zeros(())
    batch = (x, jnp.zeros_like(y))
    assert methods.norm(gradient(params, batch)) == 0
    after, state, _ = bench.traced(params, state, batch)
    assert_trees_equal(after, params)
    assert all_finite(state)
    after, state = train(bench.traced, after, state, 2)
    assert all_finite((after, state))


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-3, 1e3, 1e20, 1e30])
def test_the_radius_is_rho_at_every_loss_scale(row, scale):
    if row.radius is None:
        pytest.skip("its norm is random, or not known beforehand")
    if row.radius is methods.relative_norm and scale not in (1e-3, 1e3):
        pytest.skip("an unnormalised ε has no radius: w + ρ g itself leaves float32")
    w = problem.params()
    g = jax.tree.map(lambda x: x * scale, grad_fn(w))
    # From w = 0, nothing of ε is lost to rounding.
    w = jax.tree.map(jnp.zeros_like, w)
    epsilon = perturbation_of(row(rho=0.5), w, g)
    assert row.radius(epsilon, w, g) == pytest.approx(0.5, rel=1e-5)


def test_the_radius_is_rho_away_from_zero_weights(row):
    if row.radius is None:
        pytest.skip("its norm is random, or not known beforehand")
    w = problem.params()
    epsilon = perturbation_of(row(), w, grad_fn(w))
    assert row.radius(epsilon, w, grad_fn(w)) == pytest.approx(row.rho, rel=1e-4)


def test_the_radius_holds_at_300_in_float16(row):
    if row.radius is None:
        pytest.skip("its norm is random, or not known beforehand")
    w = jax.tree.map(jnp.zeros_like, problem.params(jnp.float16))
    g = jax.tree.map(lambda x: jnp.full(x.shape, 300, jnp.float16), w)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        epsilon = perturbation_of(row(), w, g)
    assert row.radius(epsilon, w, g) == pytest.approx(row.rho, rel=2e-3)


# --- Line 7: gradients that are not finite.


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_gradients_come_out_and_never_go_in(bench, bad):
    tx, step = bench.scheduled
    params, state = train(step, problem.params(), tx.init(problem.params()), 2)
    x, y = problem.batch(2)
    after, new_state, _ = step(params, state, (x.at[0, 0].set(bad), y))
    assert not new_state[1].last_finite
    assert_trees_equal(after, params)
    for new, old in zip(
        jax.tree.leaves(new_state[0]), jax.tree.leaves(state[0]), strict=True
    ):
        if new.dtype == jnp.uint32:
            assert np.any(new != old)
        elif jnp.issubdtype(new.dtype, jnp.integer):
            assert new == old + 1
        else:
            np.testing.assert_array_equal(new, old)
    recovered, final_state = train(step, after, new_state, 3, start=3)
    assert all_finite(final_state)
    assert methods.norm(jax.tree.map(jnp.subtract, recovered, after)) > 1e-4


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_bad_gradient_leaves_no_finite_perturbation(row, bad):
    """Whatever the loss, w + ε is not finite, and so neither is gᵃ."""
    if not row.follows_gradient:
        pytest.skip("its ε is not made of this gradient")
    w = problem.params()
    g = grad_fn(w)
    g["b"]["c"] = g["b"]["c"].at[1].set(bad)
    assert not all_finite(perturbation_of(row(), w, g))


@pytest.mark.parametrize("ascend", [False, jnp.bool_(False)], ids=["static", "traced"])
def test_a_bad_gradient_is_seen_on_a_step_that_does_not_ascend(row, ascend):
    w = problem.params()
    sam = row(guard=True)
    g = grad_fn(w)
    g["b"]["c"] = g["b"]["c"].at[1].set(jnp.nan)
    d, _ = sam.update(g, sam.init(w), w, grad_fn=grad_fn, ascend=ascend)
    assert not all_finite(d)


def test_a_bad_gradient_outside_the_mask_is_seen(row):
    """An ascent there takes the norm of the perturbed leaves alone."""
    w = problem.params()
    mask = jax.tree.map(lambda _: True, w)
    mask["b"]["c"] = False
    sam = row(mask=mask, guard=True)
    g = grad_fn(w)
    g["b"]["c"] = g["b"]["c"].at[1].set(jnp.nan)
    d, _ = sam.update(g, sam.init(w), w, grad_fn=grad_fn, ascend=True)
    assert not all_finite(d)


def test_the_guard_can_be_switched_off(row):
    w = problem.params()
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), w)
    for guard in (True, False):
        sam = row(guard=guard)
        _, state = sam.update(nan, sam.init(w), w, grad_fn=lambda p: nan)
        assert all_finite(state) == (guard or not row.carries_floats)


# --- Line 8: dtypes.

MIXED = {"a": jnp.bfloat16, "b": {"c": jnp.float32, "d": jnp.float16}}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "mixed"])
def test_updates_keep_dtypes_and_state_is_at_least_float32(bench, dtype):
    with jax.enable_x64(dtype == "float64"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = []

        def watch(updates, params=None):
            seen.append(jax.tree.map(lambda x: x.dtype, updates))
            return updates

        tx, step = bench.step(
            bench.row(), optax.chain(optax.stateless(watch), optax.sgd(0.01))
        )
        params = problem.params()
        kinds = MIXED if dtype == "mixed" else jax.tree.map(lambda _: dtype, params)
        params = jax.tree.map(lambda x, kind: x.astype(kind), params, kinds)
        dtypes = jax.tree.map(lambda x: x.dtype, params)
        after, state, _ = jax.eval_shape(step, params, tx.init(params), problem.batch())
        assert jax.tree.map(lambda x: x.dtype, after) == dtypes
        assert seen == [dtypes]
        for leaf in jax.tree.leaves(state[0]):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                assert jnp.finfo(leaf.dtype).bits >= 32


def test_bfloat16_parameters_are_warned_of_once(bench):
    tx, step = bench.step(bench.row())
    params = problem.params(jnp.bfloat16)
    with pytest.warns(UserWarning, match=r"bfloat16.*swallow.*float32") as record:
        for _ in range(2):
            jax.eval_shape(step, params, tx.init(params), problem.batch())
    assert len(record) == 1


def test_stochastic_rounding_draws_anew_on_every_step(bench):
    tx, step = bench.step(bench.row(stochastic_rounding=0))
    step = jax.jit(functools.partial(step, ascend=True))
    params = problem.params(jnp.bfloat16)
    params, state = train(step, params, tx.init(params), 1)
    once, after, _ = step(params, state, problem.batch())
    again, _, _ = step(params, state, problem.batch())
    assert_trees_equal(once, again)
    gaps = []
    for _ in range(5):
        later_key = state[0]._replace(rounding_key=after[0].rounding_key)
        anew, after, _ = step(params, (later_key, *state[1:]), problem.batch())
        gaps.append(methods.norm(jax.tree.map(jnp.subtract, anew, once)))
    assert max(gaps) > 0
    assert after[0].rounding_key.dtype == jnp.uint32


def test_injected_hyperparameters_widen_no_state():
    """They are as wide as the widest float of the process."""
    with jax.enable_x64(True):
        sam = optax.inject_hyperparams(sam_optax.ae_sam)(rho=0.1)
        w = jnp.ones(3)
        _, state = sam.update(w, sam.init(w), w, grad_fn=lambda p: p)
        assert jax.tree.map(jnp.result_type, state) == jax.tree.map(
            jnp.result_type, sam.init(w)
        )


# --- Line 9: masks and None.


@pytest.mark.parametrize(
    "mask",
    [{"a": False, "b": True}, lambda params: {"a": False, "b": {"c": True, "d": True}}],
    ids=["prefix", "function"],
)
def test_mask_perturbs_only_part_but_every_gradient_is_real(row, mask):
    w = problem.params()
    g = grad_fn(w)
    sam = row(mask=mask)
    epsilon = perturbation_of(sam, w, g)
    np.testing.assert_array_equal(epsilon["a"], 0)
    if row.radius is not None:
        radius = row.radius(epsilon["b"], w["b"], g["b"])
        assert radius == pytest.approx(row.rho, rel=1e-4)
    d, state = sam.update(g, sam.init(w), w, grad_fn=grad_fn, ascend=True)
    assert w["a"].shape not in [x.shape for x in jax.tree.leaves(state.ascent_state)]
    if row.descends_on_ga and row.make not in FURTHER:
        point = jax.tree.map(jnp.add, w, epsilon)
        assert_trees_close(d, grad_fn(point), rtol=1e-4, atol=1e-5)


def test_none_leaves_pass_through(bench):
    def loss_fn(params, batch):
        return problem.loss(params["model"], batch)

    tx, step = bench.step(bench.row(), loss=loss_fn)
    params = {"model": problem.params(), "static": None, "list": [None]}
    after, _ = train(step, params, tx.init(params), 1)
    assert (after["static"], after["list"]) == (None, [None])
    bare, _ = train(bench.traced, problem.params(), bench.init(), 1)
    assert_trees_close(after["model"], bare, rtol=1e-5, atol=1e-6)


# --- Line 10: what may follow in the chain.


def test_what_follows_sees_d(bench):
    """Clipping, weight decay and momentum after SAM act on d, as on any gradient."""
    base = optax.chain(
        optax.clip_by_global_norm(0.3),
        optax.add_decayed_weights(0.1),
        optax.sgd(0.1, momentum=0.9),
    )
    sam = bench.row()
    tx, step = bench.step(sam, base)
    params = problem.params()
    actual, _ = train(jax.jit(step), params, tx.init(params), 3)
    w, sam_state, base_state = params, sam.init(params), base.init(params)
    for t in range(3):
        here = functools.partial(grad_fn, step=t)
        d, sam_state = sam.update(here(w), sam_state, w, grad_fn=here)
        updates, base_state = base.update(d, base_state, w)
        w = optax.apply_updates(w, updates)
    assert_trees_close(actual, w, rtol=1e-5, atol=1e-6)


def test_multi_steps_after_sam_averages_sharpness_aware_gradients(bench):
    sam = bench.row()
    multi = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    tx, step = bench.step(sam, multi)
    params = problem.params()
    actual, _ = train(jax.jit(step), params, tx.init(params), 2)
    state, ds = sam.init(params), []
    for t in range(2):
        here = functools.partial(grad_fn, step=t)
        d, state = sam.update(here(params), state, params, grad_fn=here)
        ds.append(d)
    expected = jax.tree.map(lambda w, a, b: w - 0.1 * (a + b) / 2, params, *ds)
    assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_multi_steps_around_sam_descends_on_the_last_micro_batch_only(row):
    sam = row()
    multi = optax.MultiSteps(optax.chain(sam, optax.sgd(0.1)), 2)
    params = problem.params()
    state, w = multi.init(params), params
    for t in range(2):
        here = functools.partial(grad_fn, step=t)
        updates, state = multi.update(here(w), state, w, grad_fn=here)
        w = optax.apply_updates(w, updates)
    mean = jax.tree.map(
        lambda a, b: (a + b) / 2, grad_fn(params, 0), grad_fn(params, 1)
    )
    last = functools.partial(grad_fn, step=1)
    d, _ = sam.update(mean, sam.init(params), params, grad_fn=last)
    expected = jax.tree.map(lambda w, d: w - 0.1 * d, params, d)
    assert_trees_close(w, expected, rtol=1e-5, atol=1e-6)


# --- Line 11: what is known when building.


def test_impossible_numbers_raise_when_building_and_schedules_pass(row):
    for name in row.schedulable:
        unbounded = name in ("alpha", "lam", "threshold")
        bad = {"decay": 1.0, "gamma": 1.0}.get(name, -0.1)
        impossible = [float("nan")]
        impossible += [] if unbounded else [bad]
        impossible += [] if name == "maximum" else [float("inf")]
        for value in impossible:
            with pytest.raises(ValueError, match="must be"):
                row(**{name: value})
        with pytest.raises(TypeError, match="must be a number"):
            row(**{name: "0.1"})
        row(**{name: lambda step, bad=bad: bad})
        jax.jit(lambda x, name=name: row(**{name: x}).init(jnp.ones(2)))(bad)


# --- ascend=, the static and the traced path.


def by_cadence_static_and_traced(bench, base):
    """Four steps of a cadence of two, run by itself and by the two kinds of ascend."""
    tx, step = bench.step(every_second(bench.row), base)
    static = jax.jit(step, static_argnames="ascend")
    traced = jax.jit(step)
    ways = {
        "cadence": lambda t, *args: traced(*args),
        "static": lambda t, *args: static(*args, ascend=t % 2 == 0),
        "traced": lambda t, *args: traced(*args, ascend=jnp.asarray(t % 2 == 0)),
    }
    results = {}
    for name, way in ways.items():
        params, results[name] = problem.params(), []
        state = tx.init(params)
        for t in range(4):
            params, state, _ = way(t, params, state, problem.batch(t))
            results[name].append(params)
        results[name].append(state)
    params = problem.params()
    plain, _, _ = static(params, tx.init(params), problem.batch(), ascend=False)
    return results, plain


@with_ascent
@both_doors
def test_ascend_overrides_the_cadence_and_static_equals_traced(name, door):
    bench = lab(name, door)
    results, plain = by_cadence_static_and_traced(bench, optax.sgd(0.1))
    assert_trees_close(results["static"], results["cadence"], rtol=1e-5, atol=1e-6)
    assert_trees_close(results["traced"], results["cadence"], rtol=1e-5, atol=1e-6)
    params = problem.params()
    expected = jax.tree.map(lambda w, g: w - 0.1 * g, params, grad_fn(params))
    assert_trees_close(plain, expected, rtol=1e-5, atol=1e-6)


AROUND = {
    "multi_steps": optax.MultiSteps(optax.sgd(0.1), 1).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(optax.sgd(0.1), 3),
}


@pytest.mark.parametrize("around", AROUND)
@both_doors
def test_ascend_works_through_wrappers(around, door):
    """The wrappers know nothing of the method, so one that carries state will do."""
    bench = lab("fsam", door)
    results, _ = by_cadence_static_and_traced(bench, AROUND[around])
    assert_trees_close(results["static"], results["cadence"], rtol=1e-5, atol=1e-6)
    assert_trees_close(results["traced"], results["cadence"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ascend", [True, False, "traced"])
@pytest.mark.parametrize("around", ["multi_steps", "apply_if_finite", "inject"])
def test_ascend_works_with_wrappers_around_the_whole_chain(around, ascend):
    """Door 2, where extra arguments travel from the outside in."""
    row = methods.TABLE["fsam"]
    inject = optax.inject_hyperparams(row.make)
    tx = {
        "multi_steps": lambda tx: optax.MultiSteps(
            optax.chain(row(), tx), 1
        ).gradient_transformation(),
        "apply_if_finite": lambda tx: optax.apply_if_finite(optax.chain(row(), tx), 3),
        "inject": lambda tx: optax.chain(inject(rho=row.rho), tx),
    }[around](optax.sgd(1.0))
    params = problem.params()
    value = jnp.asarray(True) if ascend == "traced" else ascend
    updates, _ = tx.update(
        grad_fn(params), tx.init(params), params, grad_fn=grad_fn, ascend=value
    )
    g = grad_fn(params)
    point = jax.tree.map(jnp.add, params, perturbation_of(row(), params, g))
    d = g if ascend is False else grad_fn(point)
    assert_trees_close(updates, jax.tree.map(jnp.negative, d), rtol=1e-4, atol=1e-5)


@with_ascent
@both_doors
def test_a_static_ascend_leaves_no_branch_in_the_program(name, door):
    bench = lab(name, door)
    tx, step = bench.step(every_second(bench.row), optax.sgd(0.1))
    params = problem.params()
    args = (params, tx.init(params), problem.batch())

    def forward_passes_and_branches(**kwargs):
        jaxpr = str(jax.make_jaxpr(lambda *args: step(*args, **kwargs))(*args))
        return len(re.findall(r"= tanh", jaxpr)), len(re.findall(r"= cond\[", jaxpr))

    passes, branches = forward_passes_and_branches(ascend=True)
    assert forward_passes_and_branches(ascend=False)[0] == passes - 1
    assert forward_passes_and_branches()[1] == branches + 1


# --- per_group.


def test_per_group_is_one_perturbation_per_group(row):
    """d is the mean of the groups' own SAM gradients; state follows the mean g. That it
    does not matter how the groups run is a test of many devices."""
    if row.draws:
        pytest.skip("groups draw their own noise: see test_random.py")
    params, groups = problem.params(), [problem.batch(t, size=4) for t in range(3)]
    grads = [gradient(params, group) for group in groups]

    def mean(*trees):
        return jax.tree.map(lambda *x: sum(x) / len(x), *trees)

    def group_step(path, g, group, index):
        return path(g, lambda w: gradient(w, group), index)

    def per_group(path):
        return mean(
            *[
                group_step(path, g, group, index)
                for index, (g, group) in enumerate(zip(grads, groups, strict=True))
            ]
        )

    def mean_gradient(w):
        return mean(*[gradient(w, group) for group in groups])

    sam, g = row(), mean(*grads)
    _, state = sam.update(g, sam.init(params), params, grad_fn=mean_gradient)
    d, new_state = sam.update(
        g,
        state,
        params,
        grad_fn=mean_gradient,
        per_group=per_group,
        ascend=True,
    )
    own = [
        sam.update(
            g,
            state,
            params,
            grad_fn=lambda w, group=group: gradient(w, group),
            ascend=True,
        )[0]
        for g, group in zip(grads, groups, strict=True)
    ]
    assert_trees_close(d, mean(*own), rtol=1e-4, atol=1e-5)
    _, expected = sam.update(g, state, params, grad_fn=mean_gradient, ascend=True)
    assert_trees_close(new_state.ascent_state, expected.ascent_state, rtol=1e-6)
    assert_trees_close(new_state.descent_state, expected.descent_state, rtol=1e-6)


# --- report=.


def test_report_measures_the_step(row):
    sam = row()
    params, batch = problem.params(), problem.batch()
    loss_and_grads = sam_optax.sam_value_and_grad(problem.loss, sam, report=True)

    @jax.jit
    def step(params, state):
        loss, grads = loss_and_grads(params, batch, opt_state=state, ascend=True)
        return loss, grads.report

    if row.make in FURTHER:
        pytest.skip("its ε is not known from g alone")
    loss, report = step(params, sam.init(params))
    g = grad_fn(params)
    epsilon = perturbation_of(sam, params, g)
    point = jax.tree.map(jnp.add, params, epsilon)
    ga = grad_fn(point)
    inner = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, g, ga)))
    expected = {
        "perturbed_loss": problem.loss(point, batch),
        "surrogate_gap": problem.loss(point, batch) - loss,
        "ascent_norm": methods.norm(g),
        "descent_norm": methods.norm(ga),
        "cosine": inner / (methods.norm(g) * methods.norm(ga)),
        "perturbation_norm": methods.norm(epsilon),
        "ascended": True,
    }
    assert set(expected) == set(report._fields)
    for name, value in expected.items():
        np.testing.assert_allclose(
            getattr(report, name), value, rtol=1e-3, atol=1e-5, err_msg=name
        )


def test_an_unused_report_compiles_to_nothing(row):
    sam = row()
    params, batch = problem.params(), problem.batch()
    costs = []
    for report in (False, True):
        loss_and_grads = sam_optax.sam_value_and_grad(problem.loss, sam, report=report)

        def step(params, state, loss_and_grads=loss_and_grads):
            loss, grads = loss_and_grads(params, batch, opt_state=state)
            return loss, sam.update(grads, state, params)

        compiled = jax.jit(step).lower(params, sam.init(params)).compile()
        cost = compiled.cost_analysis()
        costs.append((cost["flops"], cost["bytes accessed"]))
    assert costs[0] == costs[1]


def test_a_skipped_step_reports_that_it_did_not_ascend(row):
    sam = row()
    params, batch = problem.params(), problem.batch()
    loss_and_grads = sam_optax.sam_value_and_grad(problem.loss, sam, report=True)

    @jax.jit
    def step(params, state, ascend):
        _, grads = loss_and_grads(params, batch, opt_state=state, ascend=ascend)
        return grads.report

    report = step(params, sam.init(params), jnp.asarray(False))
    assert not report.ascended
    assert np.isnan(report.perturbed_loss)
    assert report.ascent_norm == pytest.approx(methods.norm(grad_fn(params)), rel=1e-5)


# --- Transforms of whole trainings.


def test_whole_trainings_can_be_mapped_over_seeds(bench):
    tx, step = bench.step(bench.row())
    seeds = [problem.params(seed=s) for s in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *seeds)

    @jax.jit
    @jax.vmap
    def two_steps(params):
        return train(step, params, tx.init(params), 2)[0]

    mapped = two_steps(stacked)
    for s, params in enumerate(seeds):
        alone, _ = train(bench.traced, params, bench.init(), 2)
        assert_trees_close(
            jax.tree.map(lambda x, s=s: x[s], mapped), alone, rtol=1e-5, atol=1e-6
        )
