"""A user's own ascent, descent or cadence, in the place of ours."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from quadratic import H, W, assert_same, descend
from sam_optax import ascents, cadences, descents
from sam_optax._parts import as_ascent, as_descent

pytestmark = pytest.mark.usefixtures("double_precision")


def test_a_descent_sees_both_gradients_and_the_perturbation():
    """d = 2 gᵃ − g + ε, as a stateful transformation with schedule-like state."""

    def init_fn(params):
        return jnp.zeros((), jnp.int32)

    def update_fn(
        updates, state, params=None, *, ascent_gradient, perturbation, **extra
    ):
        d = jax.tree.map(
            lambda ga, g, e: 2 * ga - g + e * (state % 2),
            updates,
            ascent_gradient,
            perturbation,
        )
        return d, state + 1

    sam = sam_optax.sharpness_aware(
        ascents.sam(0.5),
        descent=optax.GradientTransformationExtraArgs(init_fn, update_fn),
    )
    w, visited = W, []
    for t in range(4):
        g = H @ w
        e = 0.5 * g / np.linalg.norm(g)
        w = w - 0.1 * (2 * H @ (w + e) - g + e * (t % 2))
        visited.append(w)
    assert_same(descend(sam), np.stack(visited))


def test_a_descent_advances_on_skipped_steps_too():
    """Its schedule must not lag behind the steps."""

    def update_fn(updates, state, params=None, **extra):
        return updates, state + 1

    descent = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros((), jnp.int32), update_fn
    )
    sam = sam_optax.sharpness_aware(
        ascents.sam(0.5),
        descent=descent,
        cadence=cadences.every_k(2),
    )
    w = jnp.asarray(W)
    state = sam.init(w)
    for _ in range(5):
        _, state = sam.update(w, state, w, grad_fn=lambda p: p)
    assert int(state.descent_state) == 5


def test_a_cadence_can_keep_something_and_substitute_it():
    """Keeps gᵃ − g from an ascending step, and adds it to g on the next."""
    cadence = cadences.Cadence(
        init=lambda params: (jnp.zeros((), jnp.int32), jnp.zeros_like(params)),
        decide=lambda g, state: (state[0] % 2 == 0, (state[0] + 1, state[1])),
        remember=lambda d, g, state: (state[0], d - g),
        substitute=lambda g, state: g + state[1],
    )
    sam = sam_optax.sharpness_aware(ascents.sam(0.5), cadence=cadence)
    w = jnp.asarray(W)
    state = sam.init(w)

    def grad_fn(p):
        return jnp.asarray(H) @ p

    d0, state = sam.update(grad_fn(w), state, w, grad_fn=grad_fn)
    kept = d0 - grad_fn(w)
    w = w - 0.1 * d0
    d1, state = sam.update(grad_fn(w), state, w, grad_fn=grad_fn)
    assert_same(d1, grad_fn(w) + kept)


def test_an_ascent_may_take_gradients_of_its_own():
    """Two ascent steps of rho/2, through the grad_fn that an ascent receives."""

    def update_fn(updates, state, params=None, *, grad_fn, **extra):
        first = 0.25 * updates / jnp.linalg.norm(updates)
        g = grad_fn(params + first)
        return first + 0.25 * g / jnp.linalg.norm(g), state

    ascent = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update_fn
    )
    w = jnp.asarray(W)

    def grad_fn(p):
        return jnp.asarray(H) @ p

    sam = sam_optax.sharpness_aware(ascent)
    d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
    e1 = 0.25 * H @ W / np.linalg.norm(H @ W)
    g1 = H @ (W + e1)
    assert_same(d, H @ (W + e1 + 0.25 * g1 / np.linalg.norm(g1)))

    # The same ascent on part of the parameters: the rest stays where it is.
    sam = sam_optax.sharpness_aware(
        optax.GradientTransformationExtraArgs(
            lambda params: optax.EmptyState(),
            lambda updates, state, params=None, *, grad_fn, **extra: (
                jax.tree.map(lambda g: 0.5 * g, grad_fn(params)),
                state,
            ),
        ),
        mask={"x": True, "y": False},
    )
    tree = {"x": w[:2], "y": w[2:]}

    def tree_grad(p):
        g = jnp.asarray(H) @ jnp.concatenate([p["x"], p["y"]])
        return {"x": g[:2], "y": g[2:]}

    d, _ = sam.update(tree_grad(tree), sam.init(tree), tree, grad_fn=tree_grad)
    shifted = W + 0.5 * (H @ W) * [1, 1, 0]
    assert_same(np.concatenate([d["x"], d["y"]]), H @ shifted)


def test_a_part_that_is_known_to_read_g_keeps_it_in_use():
    def update_fn(u, state, params=None, *, ascent_gradient, **extra_args):
        return optax.tree.scale(2.0, ascent_gradient), state

    reader = optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)

    def direction(part):
        chain = ascents.chain(ascents.against_momentum(0.0), part, ascents.sam(1.0))
        sam = sam_optax.sharpness_aware(chain)
        helper = sam_optax.sam_value_and_grad(lambda w, x: jnp.sum(w**2 * x), sam)
        w, x = jnp.array([0.0, 1.0]), jnp.ones(2)
        other = jnp.array([0.0, 3.0])
        return helper(w, x, opt_state=sam.init(w), ascent_batch=other)[1].gradients

    np.testing.assert_allclose(direction(ascents.reading_gradient(reader)), [0, 4])
    with pytest.raises(ValueError, match="The ascent makes no use of a gradient"):
        direction(reader)


def test_a_descent_of_ones_own_is_given_the_loss_or_none():
    seen = []

    def update_fn(ga, state, params=None, *, perturbed_loss, **extra_args):
        seen.append(perturbed_loss)
        return ga, state

    plain = optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
    for own in (plain, descents.ignoring_gradient(plain)):
        seen.clear()
        sam = sam_optax.sharpness_aware(ascents.sam(0.5), descent=own)
        w, helper = jnp.array(1.0), sam_optax.sam_value_and_grad(lambda w: w**2, sam)
        helper(w, opt_state=sam.init(w))
        helper(w, opt_state=sam.init(w), ascend=False)
        assert list(map(float, seen)) == [2.25, 1.0]
        sam.update(w, sam.init(w), w, grad_fn=lambda w: w)
        assert seen[2:] == [None]


def test_what_is_known_of_a_part_is_not_known_of_one_that_is_rebuilt_as_a_tuple():
    """`jax.tree.map` does that; then anything is possible of the part."""
    gsam, msam = jax.tree.map(lambda x: x, (descents.gsam(), ascents.msam()))
    assert as_descent(descents.gsam()).uses_loss is False
    assert (as_descent(gsam).compares, as_descent(gsam).uses_loss) == (True, None)
    assert (as_ascent(msam).uses_gradient, as_ascent(msam).may_descend) == (True, True)


def test_a_descent_that_ignores_g_costs_no_gradient_and_goes_with_any_examples():
    def update_fn(ga, state, params=None, *, perturbation, **extra_args):
        return optax.tree.add(ga, perturbation), state

    own = optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
    points = []

    def grad_fn(w):
        points.append(w)
        return 2 * w

    for descent, count in ((own, 2), (descents.ignoring_gradient(own), 1)):
        points.clear()
        sam = sam_optax.sharpness_aware(ascents.msam(0.5), descent=descent)
        w = jnp.array([3.0, 4.0])
        sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
        assert len(points) - 1 == count

    def largest(descent):
        sam = sam_optax.sharpness_aware(ascents.sam(0.5), descent=descent)
        rule = sam_optax.data.largest_increase(0.5)
        loss_fn = lambda w, x: w**2 * x  # noqa: E731
        helper = sam_optax.sam_value_and_grad(loss_fn, sam, data=rule)
        w, x = jnp.array(1.0), jnp.array([1.0, 3.0])
        return helper(w, x, opt_state=sam.init(w))[1].gradients

    assert largest(descents.ignoring_gradient(own)) == 2 * 1.5 * 3 + 0.5
    for unknown in (own, optax.chain(descents.gsam())):
        with pytest.raises(ValueError, match=r"would compare the examples.*ignoring_"):
            largest(unknown)
    with pytest.raises(ValueError, match="would compare the examples"):
        largest(descents.gsam())


def test_a_part_that_is_wrapped_by_ours_is_still_known_to_read_g():
    fisher = ascents.scale_by_inverse_root_fisher()
    for part in (
        ascents.by_label({"all": fisher}, "all"),
        ascents.with_state_dtype(fisher),
        ascents.chain(fisher),
        ascents.following(fisher, None),
        ascents.ascend_repeatedly(fisher, 2),
    ):
        assert part.reads_gradient
        assert ascents.chain(ascents.given_direction(), part).uses_gradient


@pytest.mark.parametrize("name", ["g", "u", "update", "own", "w", "climb", "part"])
def test_an_extra_argument_may_have_any_name_that_is_not_the_steps(name):
    w = jnp.array([3.0, 4.0])
    for make in (sam_optax.fsam, sam_optax.msam, sam_optax.esam, sam_optax.gsam):
        sam = make(rho=optax.constant_schedule(0.1), mask=lambda w: True)
        sam.update(w, sam.init(w), w, grad_fn=lambda w: w, **{name: 1})


def test_a_descent_of_ours_that_compares_cannot_ignore_g():
    with pytest.raises(ValueError, match=r"compares gᵃ with g, as descents\.gsam"):
        descents.ignoring_gradient(descents.gsam())


@pytest.mark.parametrize("ascend", [False, np.bool_(False), np.array(False)])
def test_outside_of_jit_a_step_that_does_not_ascend_asks_for_no_gradient(ascend):
    points = []
    for sam in (sam_optax.sam(), sam_optax.look_sam(k=2), sam_optax.late_sam(0.1, 3)):
        w = jnp.ones(2)
        sam.update(w, sam.init(w), w, grad_fn=points.append, ascend=ascend)
    assert not points
    every_second, w = sam_optax.sam_every_k(0.1, k=2), jnp.ones(2)
    state = every_second.init(w)
    for _ in range(4):
        _, state = every_second.update(
            w, state, w, grad_fn=lambda w: points.append(w) or w
        )
    assert len(points) == 2
