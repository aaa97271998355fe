"""One transformation, in one state, makes the gradients and takes them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from methods import TABLE
from sam_optax._step.sameness import first_difference, may_be_same

W = jnp.array([3.0, 4.0])


def loss_fn(w):
    return jnp.sum(w**2) / 2


def gradients(sam, state, **options):
    return sam_optax.sam_value_and_grad(loss_fn, sam, **options)(W, opt_state=state)[1]


# --- One transformation.


def test_a_method_that_is_built_twice_is_the_same(kind):
    first, second = TABLE[kind](), TABLE[kind]()
    assert first_difference(first.update, second.update) is None
    grads = gradients(first, first.init(W))
    np.testing.assert_array_equal(
        second.update(grads, first.init(W), W)[0], grads.gradients
    )


def keeps(whether):
    return lambda params, unused=whether: True


sam = sam_optax.sam
DIFFERENT = {
    "methods": (sam_optax.gsam(), sam(), "descent"),
    "ascents": (sam(), sam_optax.usam(), "ascent"),
    "numbers": (sam(0.1), sam(0.2), "rho: 0.1 and 0.2"),
    "a NumPy number": (sam(np.float32(0.5)), sam(0.25), "rho: .*0.5.* and 0.25"),
    "steps of a cadence": (
        sam_optax.look_sam(k=2),
        sam_optax.look_sam(k=3),
        "k: 2 and 3",
    ),
    "schedules": (
        sam(optax.linear_schedule(0.0, 1.0, 10)),
        sam(optax.linear_schedule(0.0, 1.0, 11)),
        "transition_steps: 10 and 11",
    ),
    "mask and none": (sam(mask={"a": True, "b": True}), sam(), "mask"),
    "trees of a mask": (
        sam(mask={"a": True, "b": False}),
        sam(mask={"a": True, "b": True}),
        "b: False and True",
    ),
    "functions of a mask": (
        sam(mask=lambda p: jax.tree.map(lambda w: w.ndim > -1, p)),
        sam(mask=lambda p: jax.tree.map(lambda w: w.ndim > -2, p)),
        "mask: <lambda> and <lambda>",
    ),
    "defaults": (
        sam(mask=keeps(True)),
        sam(mask=keeps(False)),
        "mask: True and False",
    ),
    "partials": (
        sam(mask=functools.partial(jax.tree.map, lambda w: w.ndim > -1)),
        sam(mask=functools.partial(jax.tree.map, lambda w: w.ndim > -2)),
        "mask",
    ),
    "guards": (sam(), sam(guard=False), "guard: True and False"),
    "integer keys": (sam_optax.esam(key=0), sam_optax.esam(key=1), "key: 0 and 1"),
    "typed keys": (
        sam_optax.esam(key=jax.random.key(0)),
        sam_optax.esam(key=jax.random.key(1)),
        "key",
    ),
    "rounding": (sam(), sam(stochastic_rounding=0), "None and 0"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_transformations_that_differ_are_told_apart(what):
    one, other, words = DIFFERENT[what]
    recipes = []
    w = {"a": W, "b": W}
    for tx in (one, other):
        tx.update(w, tx.init(w), w, grad_fn=lambda w: w, maker=recipes.append)
    assert re.search(words, first_difference(*recipes))
    assert first_difference(recipes[0], recipes[0]) is None


def test_a_traced_number_is_not_a_known_one():
    known = sam(0.1)

    @jax.jit
    def difference(rho, other):
        # Two traced numbers may be the same.
        assert first_difference(sam(rho).update, sam(other).update) is None
        return first_difference(known.update, sam(rho).update) is None

    assert not difference(0.1, 0.1)


def test_numbers_may_have_gone_through_jax():
    assert first_difference(0.1, np.float32(0.1)) is None
    assert first_difference(jnp.float32(0.1), 0.1) is None
    assert first_difference(0.1, 0.1 + 1e-6) is not None
    assert first_difference(2**24, 2**24 + 1) is not None
    assert first_difference(0, 1) == "they: 0 and 1"


def test_functions_on_two_lines_are_the_same_if_they_are_written_alike():
    one = lambda w: [x + 1 for x in (w, 2)]  # noqa: E731
    other = lambda w: [x + 1 for x in (w, 2)]  # noqa: E731
    for different in (
        lambda w: [x + 2 for x in (w, 2)],
        lambda w: [x - 1 for x in (w, 2)],
        lambda w: [x + True for x in (w, 2)],
        lambda w: [x.y for x in (w, 2)],
    ):
        assert first_difference(one, different) is not None
    assert first_difference(one, other) is None


def test_no_part_takes_the_place_of_another_that_is_gone():
    """What is compared on the way must not be freed, or its number is given away."""

    def fresh(last):
        def defaults(x, *, y=1):
            return x + y

        values = [functools.partial(defaults, i) for i in range(40)]
        return [*values, lambda x, y=last: y]

    for _ in range(20):
        assert first_difference(fresh(1), fresh(2)) is not None
        assert first_difference(fresh(1), fresh(1)) is None


def test_what_refers_to_itself_is_compared_once():
    one, other = [1], [1]
    one.append(one)
    other.append(other)
    assert first_difference(one, other) is None
    other[0] = 2
    assert first_difference(one, other) == "they: 1 and 2"


def test_what_cannot_be_compared_shows_no_difference():
    class Uncomparable:
        __slots__ = ()

        def __eq__(self, other):
            raise RuntimeError

    class Slotted:
        __slots__ = ("x", "y")

        def __init__(self, x):
            self.x = x

    assert first_difference(Slotted(1), Slotted(1)) is None
    assert first_difference(Slotted(1), Slotted(2)) == "x: 1 and 2"
    assert first_difference(object(), object()) is None
    assert first_difference(Uncomparable(), Uncomparable()) is None
    assert first_difference({1, 2}, {1, 3}) is not None
    assert first_difference(jax.random.key(1), jax.random.key(1)) is None
    for one, other in (({}, {"a": 1}), ({"a": 1}, {}), ([1], [1, 2]), ([1, 2], [1])):
        assert first_difference(one, other) is not None
    assert first_difference("a", b"a") == "they: 'a' and b'a'"


def test_methods_of_equal_objects_are_equal():
    class Masks:
        def __init__(self, keep):
            self.keep = keep

        def __call__(self, params):
            return self.keep

        def of(self, params):
            return self.keep

    assert first_difference(Masks(True).of, Masks(True).of) is None
    assert first_difference(Masks(True).of, Masks(False).of) == "keep: True and False"
    assert first_difference(Masks(True), Masks(False)) == "keep: True and False"
    jitted = jax.jit(lambda w: w), jax.jit(lambda w: w + 1)
    assert first_difference(jitted[0], jitted[0]) is None
    assert first_difference(*jitted) is not None


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f])
def test_gradients_of_another_transformation_are_refused(wrap):
    helper_tx, chained = sam_optax.gsam(), sam_optax.sam()
    tx = optax.chain(chained, optax.sgd(0.1))

    @wrap
    def step(state):
        return tx.update(gradients(helper_tx, state), state, W)

    with pytest.raises(ValueError, match=r"differ in descent: .*the same object"):
        step(tx.init(W))


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f])
def test_a_chain_that_is_injected_as_a_whole_takes_its_own_sam_only(wrap):
    """Its rho is in the state, and that of another transformation would be used."""
    inject = optax.inject_hyperparams
    tx = inject(lambda lr, rho: optax.chain(sam(rho), optax.sgd(lr)))(lr=0.1, rho=0.2)
    step = wrap(lambda state: tx.update(gradients(sam(0.1), state), state, W))
    with pytest.raises(ValueError, match=r"differ in rho: .*inject the SAM transf"):
        step(tx.init(W))

    shared = sam(0.5)
    tx = inject(lambda lr: optax.chain(shared, optax.sgd(lr)))(lr=0.1)
    step = wrap(lambda state: tx.update(gradients(shared, state), state, W))
    np.testing.assert_allclose(step(tx.init(W))[0], -0.1 * 1.1 * W, rtol=1e-6)

    alone = inject(sam)(rho=0.1)
    tx = optax.chain(alone, inject(optax.sgd)(0.1))
    state = tx.init(W)
    state[0].hyperparams["rho"] = jnp.asarray(0.5)
    step = wrap(lambda state: tx.update(gradients(alone, state), state, W))
    np.testing.assert_allclose(step(state)[0], -0.1 * 1.1 * W, rtol=1e-6)


# --- One state.


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f])
def test_a_state_from_before_the_last_step_is_refused(wrap):
    fsam = sam_optax.fsam()
    tx = optax.chain(fsam, optax.sgd(0.1))

    @wrap
    def two_steps(state):
        _, later = tx.update(gradients(fsam, state), state, W)
        return tx.update(gradients(fsam, state), later, W)

    with pytest.raises(ValueError, match=r"for another optimizer state.*current"):
        two_steps(tx.init(W))


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f])
def test_gradients_are_for_one_update_only(wrap):
    scheduled = sam(lambda step: 0.1)
    tx = optax.chain(scheduled, optax.sgd(0.1))

    @wrap
    def two_updates(state):
        grads = gradients(scheduled, state)
        _, state = tx.update(grads, state, W)
        return tx.update(grads, state, W)

    with pytest.raises(ValueError, match="for one update only"):
        two_updates(tx.init(W))


@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_a_state_that_is_laid_out_anew_is_the_same(when):
    """A cast or a sharding makes other values of a trace, of which nothing is known."""
    fsam = sam_optax.fsam()
    tx = optax.chain(fsam, optax.sgd(0.1))

    @jax.jit
    def two_steps(state):
        for _ in range(2):
            anew = jax.lax.optimization_barrier(state)
            grads = gradients(fsam, state if when == "after" else anew)
            _, state = tx.update(grads, state if when == "before" else anew, W)
        return state

    if when == "before":  # the second state of the update came from the first update
        with pytest.raises(ValueError, match="for another optimizer state"):
            two_steps(tx.init(W))
        return
    state = two_steps(tx.init(W))
    np.testing.assert_allclose(
        state[0].ascent_state[0].gradient_ema, (1 - 0.9**2) * W, rtol=1e-5
    )


def test_an_equal_state_in_other_arrays_is_the_same():
    fsam = sam_optax.fsam()
    state = fsam.init(W)
    grads = gradients(fsam, state)
    copied = jax.tree.map(jnp.copy, state)
    assert fsam.update(grads, copied, W)[1].ascent_state[0].ema_started
    assert not may_be_same(state, jax.tree.map(lambda x: x + 1.0, state))
    assert may_be_same(jnp.nan, np.float32(np.nan))


def test_between_two_traces_nothing_is_known():
    outer = []

    @jax.jit
    def function(x):
        assert may_be_same(np.float32(1.0), x) and may_be_same(x, np.float32(2.0))
        outer.append(x)
        return jax.lax.cond(x > 0, lambda y: _seen(x, y), lambda y: y, x)

    def _seen(x, y):
        assert may_be_same(x, y)
        assert not may_be_same(y, y + 1)
        return y

    function(1.0)


# --- The way back from plain gradients.


def test_gradients_are_put_back():
    fsam = sam_optax.fsam(rho=0.5)
    tx = optax.chain(fsam, optax.sgd(0.1))
    state = tx.init(W)
    grads = gradients(fsam, state, report=True)
    decayed = grads.replace(jax.tree.map(lambda d, w: d + w, grads.gradients, W))
    updates, state = tx.update(decayed, state, W)
    np.testing.assert_allclose(updates, -0.1 * (grads.gradients + W), rtol=1e-6)
    assert state[0].ascent_state[0].ema_started
    assert decayed.report is grads.report
    with pytest.raises(ValueError, match=r"it has shape \(3,\) in place of \(2,\)"):
        grads.replace(jnp.ones(3))


def test_what_is_asked_of_the_tree_says_where_it_is():
    grads = gradients(sam(), sam().init(W))
    with pytest.raises(TypeError, match=r"take grads\.gradients\['a'\]"):
        grads["a"]
    with pytest.raises(AttributeError, match=r"no 'items'.*is grads\.gradients"):
        grads.items()
    assert not hasattr(grads, "unfreeze")


def test_gradients_of_two_steps_are_not_one():
    first, second = (gradients(sam(), sam().init(W)) for _ in range(2))
    with pytest.raises(ValueError, match=r"take grads\.gradients from each"):
        jax.tree.map(jnp.add, first, second)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_gradients_do_not_enter_a_jitted_function(transform):
    grads = gradients(sam(), sam().init(W))
    with pytest.raises(ValueError, match=r"outside of a jitted function.*handed"):
        transform(lambda grads: 0.0)(grads)
    assert transform(lambda d: d)(grads.gradients).shape == W.shape
