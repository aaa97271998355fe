"""Gradients that are not finite come out and never go in, whoever sees them first."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import problem
import sam_optax
from doors import DOORS
from lab import (
    all_finite,
    assert_trees_equal,
    bench,
    floats,
    gradient,
    train,
)
from methods import TABLE
from sam_optax._masks import restrict
from sam_optax._parts import as_ascent, follow


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_bad_batch_is_skipped_and_training_goes_on(kind, door, bad):
    """The base optimizer, which is behind, sees it in d."""
    tx, step = bench(kind, door).training
    w, state = train(step, problem.params(), tx.init(problem.params()), 2)
    x, y = problem.batch(2)
    after, new_state, _ = step(w, state, (x.at[0, 0].set(bad), y))
    assert not new_state[1].last_finite
    assert_trees_equal(after, w)
    assert_trees_equal(floats(new_state[0]), floats(state[0]))
    for new, old in zip(*map(jax.tree.leaves, (new_state[0], state[0])), strict=True):
        if new.dtype == jnp.uint32:
            assert np.any(new != old)
        elif jnp.issubdtype(new.dtype, jnp.integer):
            assert new == old + 1
    final, final_state = train(step, after, new_state, 3, start=3)
    assert all_finite((final, final_state))
    assert optax.tree.norm(optax.tree.sub(final, after)) > 1e-4


def with_nan(g):
    g["b"]["c"] = g["b"]["c"].at[1].set(jnp.nan)
    return g


def grad_fn(w):
    return gradient(w, problem.batch())


@pytest.mark.gradients_alone
@pytest.mark.parametrize("ascend", [False, jnp.bool_(False)], ids=["static", "traced"])
def test_a_bad_gradient_is_seen_on_a_step_that_does_not_ascend(kind, ascend):
    sam, w = TABLE[kind](guard=True), problem.params()
    g = with_nan(grad_fn(w))
    # A branch of an ascent that does not use g takes the gradient at w itself.
    takes_its_own = ascend is not False and not TABLE[kind].uses_gradient
    second = (lambda w: with_nan(grad_fn(w))) if takes_its_own else grad_fn

    def update(ascend):
        return sam.update(g, sam.init(w), w, grad_fn=second, ascend=ascend)

    d, _ = update(ascend) if ascend is False else jax.jit(update)(ascend)
    assert not all_finite(d)


@pytest.mark.gradients_alone
def test_the_guard_can_be_switched_off(kind):
    if kind == "eigen_sam":  # forgets an eigenvector that is not finite by itself
        return
    w = problem.params()
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), w)
    for guard in (True, False):
        sam = TABLE[kind](guard=guard)
        _, state = sam.update(nan, sam.init(w), w, grad_fn=lambda p: nan, ascend=True)
        assert all_finite(state) == (guard or not floats(state))


def test_an_overflow_is_seen_where_a_rectifier_would_hide_it(kind):
    """At w + NaN the gradient of a relu is zero, and d would be finite."""
    x = jnp.ones((4, 2))

    def loss_fn(w):
        return 1e30 * jnp.sum(1e30 * jax.nn.relu(x @ w))

    w = jnp.array([1.0, 2.0])
    g = jax.grad(loss_fn)(w)
    assert not all_finite(g)
    row = TABLE[kind]
    if not row.uses_gradient:  # these do not look at this gradient
        return
    sam = row()
    d, state = sam.update(g, sam.init(w), w, grad_fn=jax.grad(loss_fn), ascend=True)
    assert not all_finite(d)
    assert all_finite(state)


def test_nothing_is_nan_on_a_healthy_step():
    sam = sam_optax.fsam()
    w = jnp.ones(2)
    with jax.debug_nans(True):
        sam.update(w, sam.init(w), w, grad_fn=lambda p: p)


def test_look_sam_keeps_no_direction_of_a_bad_second_gradient():
    """Of parameters without a scalar, by which a state is judged besides."""
    sam, w = sam_optax.look_sam(0.5, k=1), jnp.array([3.0, 4.0])
    _, state = sam.update(w, sam.init(w), w, grad_fn=lambda p: p * p)
    bad = jnp.array([1.0, jnp.inf])
    _, after = sam.update(w, state, w, grad_fn=lambda p: bad)
    before = state.cadence_state
    assert np.all(before.kept_direction != 0)
    assert_trees_equal(after.cadence_state.kept_direction, before.kept_direction)
    assert after.cadence_state.reusing_step == before.reusing_step + 1


ASCENTS = sam_optax.ascents


@pytest.mark.parametrize(
    ("ascent", "knows"),
    [
        (ASCENTS.sam(), True),
        (ASCENTS.asam(), True),
        (ASCENTS.fsam(), True),
        (ASCENTS.fasam(), True),
        (ASCENTS.vasso(), True),
        (ASCENTS.fisher_sam(), True),
        (ASCENTS.sam(p=3), False),
        (ASCENTS.usam(), False),
        (optax.chain(ASCENTS.sam()), False),
    ],
)
def test_a_norm_saves_the_guard_a_look_at_g(ascent, knows):
    w = jnp.array([3.0, 4.0])
    for g, is_finite in ((w, True), (w * jnp.inf, False), (w * jnp.nan, False)):
        state = ascent.init(w)
        *_, found = as_ascent(ascent).climb(g, state, w, ascent_gradient=g)
        assert (found is not None) == knows
        assert not knows or bool(found) == is_finite


@pytest.mark.parametrize(
    "dropping", [ASCENTS.mask_at_random(0.1), optax.clip(1.0), optax.zero_nans()]
)
def test_a_norm_behind_a_part_that_drops_what_is_not_finite_does_not_hide_it(dropping):
    ascent = ASCENTS.chain(ASCENTS.subtract_ema(0.5), dropping, ASCENTS.sam(0.1))
    sam, w = sam_optax.sharpness_aware(ascent), jnp.ones(3)
    _, state = sam.update(w, sam.init(w), w, grad_fn=lambda p: p)
    for bad in (jnp.nan, jnp.inf):
        g = jnp.array([1.0, bad, 2.0])
        _, after = sam.update(g, state, w, grad_fn=lambda p: p)
        assert np.all(floats(after)[0] == floats(state)[0])
        assert np.all(floats(after)[0] != 0)


def test_what_stands_before_a_part_that_drops_g_is_not_told_by_a_norm_behind_it():
    norms = ASCENTS.chain(ASCENTS.against_momentum(), ASCENTS.sam())
    behind = ASCENTS.chain(ASCENTS.subtract_ema(), ASCENTS.against_momentum(), norms)
    for ascent, knows in ((norms, True), (behind, False)):
        w = jnp.ones(2)
        *_, found = ascent.climb(w, ascent.init(w), w)
        assert (found is not None) == knows


SHOWING = {
    "scale_by_magnitude": ASCENTS.scale_by_magnitude(),
    "subtract_ema": ASCENTS.subtract_ema(),
    "follow_ema": ASCENTS.follow_ema(),
    "scale_by_inverse_root_fisher": ASCENTS.scale_by_inverse_root_fisher(),
    "mask_at_random": ASCENTS.mask_at_random(0.1),
    "mask_leaves_at_random": ASCENTS.mask_leaves_at_random(0.1),
    "keep_largest_gradient": ASCENTS.keep_largest_gradient(0.9),
    "keep_largest_fisher": ASCENTS.keep_largest_fisher(0.9),
    "drop_and_grow": ASCENTS.drop_and_grow(0.9),
    "with_state_dtype": ASCENTS.with_state_dtype(ASCENTS.subtract_ema()),
    "by_label": ASCENTS.by_label({"all": ASCENTS.follow_ema()}, "all"),
    "scale_by_leaf_norm": ASCENTS.scale_by_leaf_norm(),
    "project_on_full_gradient": ASCENTS.project_on_full_gradient(),
    "subtract_projection": ASCENTS.subtract_projection_on_full_gradient(),
    "against_momentum": ASCENTS.against_momentum(optax.constant_schedule(0.9)),
    "given_direction": ASCENTS.given_direction(),
    "chain": ASCENTS.chain(ASCENTS.scale_by_magnitude(), ASCENTS.subtract_ema()),
}


@pytest.mark.parametrize("name", SHOWING)
def test_what_a_part_says_that_it_shows_is_not_finite_behind_it(name):
    part, w = SHOWING[name], {"a": jnp.arange(1.0, 5.0), "b": jnp.ones(2)}
    assert part.shows_nonfinite
    state, extra_args = part.init(w), {"fisher": w} if "fisher" in name else {}
    for bad in (jnp.nan, jnp.inf):
        g = {"a": jnp.arange(1.0, 5.0).at[2].set(bad), "b": jnp.ones(2)}
        if not part.uses_gradient:
            extra_args = {"direction": g}
            state = follow(part, g, state, w)
        for _ in range(2):
            u, state = part.update(g, state, w, ascent_gradient=g, **extra_args)
            assert not np.isfinite(u["a"][2])


@pytest.mark.parametrize(
    "hiding",
    [
        ASCENTS.chain(optax.clip(1.0)),
        ASCENTS.by_label({"all": optax.clip(1.0)}, "all"),
        ASCENTS.with_state_dtype(optax.clip(1.0)),
        ASCENTS.by_label(
            {"a": ASCENTS.given_direction(), "b": ASCENTS.scale_by_magnitude()},
            {"a": "a", "b": "b"},
        ),
    ],
)
def test_a_part_that_hides_what_is_not_finite_is_known_to(hiding):
    assert not hiding.shows_nonfinite
    chain = ASCENTS.chain(ASCENTS.subtract_ema(), hiding, ASCENTS.sam())
    w = {"a": jnp.ones(2), "b": jnp.ones(2)}
    *_, found = chain.climb(w, chain.init(w), w, direction=w)
    assert found is None


def test_a_norm_does_not_tell_of_a_direction_that_comes_after_it():
    chain = ASCENTS.chain(ASCENTS.sam(), ASCENTS.given_direction())
    sam, w = sam_optax.sharpness_aware(chain), jnp.ones(2)
    bad = jnp.array([jnp.nan, 1.0])
    d, _ = sam.update(w, sam.init(w), w, grad_fn=jax.nn.relu, direction=bad)
    assert np.isnan(d).all()


def test_a_mask_lets_the_norm_tell_the_guard_of_what_it_leaves():
    w = {"a": jnp.array([3.0, 4.0]), "b": jnp.ones(2)}
    sam = sam_optax.sharpness_aware(ASCENTS.fsam(0.1), mask={"a": True, "b": False})
    _, state = sam.update(w, sam.init(w), w, grad_fn=lambda p: p)
    ascent = restrict(ASCENTS.fsam(0.1), {"a": True, "b": False})
    assert ascent.climb(w, ascent.init(w), w)[2]
    for leaf, is_seen in (("a", True), ("b", False)):
        g = w | {leaf: w[leaf].at[0].set(jnp.nan)}
        d, after = sam.update(g, state, w, grad_fn=lambda p: p)
        moved = np.any(floats(after)[0] != floats(state)[0])
        assert bool(moved) == (not is_seen)
        assert all_finite(after)
        assert all_finite(d) == (not is_seen)


def test_under_a_mask_what_is_carried_of_all_leaves_is_guarded_by_all():
    """LookSAM's direction is made of g, and the norm is of a part of it."""
    w = {"a": jnp.array([3.0, 4.0]), "b": jnp.ones(2)}
    sam = sam_optax.look_sam(0.1, k=1, mask={"a": True, "b": False})
    _, state = sam.update(w, sam.init(w), w, grad_fn=lambda p: jax.tree.map(jnp.sin, p))
    g = w | {"b": jnp.array([jnp.nan, 1.0])}
    _, after = sam.update(g, state, w, grad_fn=lambda p: jax.tree.map(jnp.sin, p))
    assert all_finite(after)
    assert_trees_equal(floats(after), floats(state))
