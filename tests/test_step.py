"""The step of `sharpness_aware` under JAX's transformations, and in Optax's chains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import problem
import sam_optax
from doors import DOORS
from lab import (
    NEVER,
    all_finite,
    assert_trees_close,
    assert_trees_equal,
    base,
    bench,
    gradient,
    lab,
    train,
)
from methods import TABLE


def grad_fn(params, step=0):
    return gradient(params, problem.batch(step))


# --- The call.


def test_what_is_missing_is_an_error(kind):
    sam, w = TABLE[kind](), problem.params()
    state = sam.init(w)
    with pytest.raises(ValueError, match=r"needs the parameters: update\(g, state, pa"):
        sam.update(w, state, grad_fn=lambda p: p)
    with pytest.raises(ValueError, match=r"sam_value_and_grad.*grad_fn=.*TrainState"):
        sam.update(w, state, w)


@pytest.mark.gradients_alone
def test_unknown_extra_arguments_are_ignored(kind):
    sam, w = TABLE[kind](), problem.params()
    update = functools.partial(sam.update, grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
    assert_trees_equal(update(epoch=3, labels=["a"]), update())


@pytest.mark.gradients_alone
def test_none_leaves_pass_through(kind):
    sam, w = TABLE[kind](), problem.params()

    def there(point):
        return {"model": grad_fn(point["model"]), "static": None, "list": [None]}

    params = {"model": w, "static": None, "list": [None]}
    d, _ = sam.update(there(params), sam.init(params), params, grad_fn=there)
    assert (d["static"], d["list"]) == (None, [None])
    bare, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
    assert_trees_close(d["model"], bare, rtol=1e-5, atol=1e-6)


# --- JAX's transformations.


def test_steps_in_a_scan_are_those_of_a_loop(kind):
    tx, step = bench(kind, "door1").training
    params = problem.params()

    @jax.jit
    def run(params, state, batches):
        def body(carry, batch):
            return step(*carry, batch)[:2], None

        return jax.lax.scan(body, (params, state), batches)[0]

    batches = jax.tree.map(lambda *x: jnp.stack(x), *map(problem.batch, range(3)))
    scanned = run(params, tx.init(params), batches)
    looped = train(step, params, tx.init(params), 3)
    assert_trees_close(scanned, looped, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("door", DOORS)
def test_parameters_and_state_can_be_donated(kind, door):
    tx, step = bench(kind, door).training
    donating = jax.jit(step, donate_argnums=(0, 1))
    params = problem.params()
    expected = train(step, params, tx.init(params), 3)
    state = tx.init(params)
    actual = train(donating, params, state, 3)
    assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert all(x.is_deleted() for x in jax.tree.leaves((params, state[0])))
    assert all_finite(tx.init(problem.params()))  # no constant went with the donation


def test_whole_trainings_can_be_mapped_over_seeds(kind):
    tx, step = bench(kind, "door1").training
    seeds = [problem.params(seed=s) for s in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *seeds)

    @jax.jit
    @jax.vmap
    def two_steps(params):
        return train(step, params, tx.init(params), 2)[0]

    mapped = two_steps(stacked)
    for i, params in enumerate(seeds):
        own = jax.tree.map(lambda x, i=i: x[i], mapped)
        alone, _ = train(step, params, tx.init(params), 2)
        assert_trees_close(own, alone, rtol=1e-5, atol=1e-6)


# --- What may follow in the chain.


def test_what_follows_sees_d(kind):
    """Clipping, weight decay and momentum after SAM act on d, as on any gradient."""

    def decaying():
        return optax.chain(
            optax.clip_by_global_norm(0.3), optax.add_decayed_weights(0.1), base()
        )

    row = TABLE[kind]
    tx, step = bench(kind, "door1").step(row(**row.values()), decaying)
    w, after, cadence = problem.params(), decaying(), {}
    actual, _ = train(jax.jit(step), w, tx.init(w), 3)
    if not row.ascends_always:
        cadence = {"ascend": None}
    sam_state, base_state = lab(kind).init(), after.init(w)
    for t in range(3):
        shown = lab(kind).show(w, sam_state, problem.batch(t), switch=NEVER, **cadence)
        updates, base_state = after.update(shown.d, base_state, w)
        w, sam_state = optax.apply_updates(w, updates), shown.state
    assert_trees_close(actual, w, rtol=1e-5, atol=1e-6)


@pytest.mark.gradients_alone
@pytest.mark.parametrize("where", ["after", "around"])
def test_multi_steps(kind, where):
    """After SAM, they average sharpness-aware gradients. Around it, g is the average of
    the micro-batches, and the second gradient that of the last of them alone."""
    sam, params = TABLE[kind](), problem.params()
    state = sam.init(params)
    first, last = (functools.partial(grad_fn, step=t) for t in range(2))
    if where == "after":
        multi = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
        tx, ds = optax.chain(sam, multi), []
        for here in (first, last):
            d, state = sam.update(here(params), state, params, grad_fn=here)
            ds.append(d)
        d = jax.tree.map(lambda a, b: (a + b) / 2, *ds)
    else:
        tx = optax.MultiSteps(optax.chain(sam, optax.sgd(0.1)), 2)
        g = jax.tree.map(lambda a, b: (a + b) / 2, first(params), last(params))
        d, _ = sam.update(g, state, params, grad_fn=last)
    w, state = params, tx.init(params)
    for here in (first, last):
        updates, state = tx.update(here(w), state, w, grad_fn=here)
        w = optax.apply_updates(w, updates)
    expected = jax.tree.map(lambda w, d: w - 0.1 * d, params, d)
    assert_trees_close(w, expected, rtol=1e-5, atol=1e-6)
    assert np.any(w["a"] != params["a"])


def test_anything_may_live_in_the_state_beside_it():
    """A bool, an infinity and a typed key in the outer state stay as they are."""

    class Odd:
        init = staticmethod(
            lambda params: (jnp.bool_(True), jnp.inf * jnp.ones(()), jax.random.key(0))
        )
        update = staticmethod(lambda updates, state, params=None: (updates, state))

    odd = optax.GradientTransformation(Odd.init, Odd.update)
    tx = optax.chain(sam_optax.sam(0.5), odd, optax.sgd(0.1))
    w = jnp.ones(3)

    def body(carry, _):
        w, state = carry
        updates, state = tx.update(w, state, w, grad_fn=lambda p: p)
        return (optax.apply_updates(w, updates), state), None

    state = tx.init(w)
    (_, after), _ = jax.lax.scan(body, (w, state), length=3)
    assert after[1][0].dtype == jnp.bool_
    assert after[1][0]
    assert after[1][1] == jnp.inf
    assert after[1][2] == state[1][2]
