"""Ascents around ascents: what the inner one receives, and where it is evaluated."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from quadratic import H, W, assert_same, descend, grad_fn, split, whole
from sam_optax import ascents

pytestmark = pytest.mark.usefixtures("double_precision")

KEEP = {"x": True, "y": False}
KEPT = np.array([1.0, 1.0, 0.0])


def fisher(g):
    """SAM's step in the metric 1 + g², with the g that the part receives."""
    inverse = 1 / (1 + g**2)
    return 0.5 * inverse * g / np.sqrt(g @ (inverse * g))


def adaptive(g, w):
    t = np.abs(w) + 0.1
    return 0.5 * t**2 * g / np.linalg.norm(t * g)


def test_each_step_of_several_weighs_by_its_own_gradient():
    """Fisher SAM's metric is that of the gradient on the way, not of g at w."""
    sam = sam_optax.sharpness_aware(
        ascents.ascend_repeatedly(ascents.fisher_sam(0.5, 1.0), 3)
    )
    w, points = W, []
    for _ in range(3):
        e = np.zeros(3)
        for _ in range(3):
            e = e + fisher(H @ (w + e)) / 3
        w = w - 0.1 * H @ (w + e)
        points.append(w)
    assert_same(descend(sam, steps=3), np.stack(points))


def watched(ascent_of, params=None, **options):
    """The points at which one step takes gradients, as one row each."""
    params, points = split(W) if params is None else params, []

    def watching(point):
        points.append(whole(point))
        return grad_fn(point)

    sam = sam_optax.sharpness_aware(ascent_of, **options)
    sam.update(grad_fn(params), sam.init(params), params, grad_fn=watching)
    return points


def test_the_ascent_from_noise_weighs_by_the_gradient_there():
    inner = ascents.fisher_sam(0.5, 1.0)
    smoothed, perturbed = watched(ascents.ascend_from_noise(inner, sigma=0.4))
    assert np.all(smoothed != W)
    assert_same(perturbed - smoothed, fisher(H @ smoothed))


def test_the_ascent_from_noise_scales_by_the_parameters_themselves():
    inner = ascents.asam(0.5, 0.1)
    smoothed, perturbed = watched(ascents.ascend_from_noise(inner, sigma=0.4))
    assert_same(perturbed - smoothed, adaptive(H @ smoothed, W))


def test_noise_before_the_ascent_has_the_root_mean_square_sigma():
    """Over 300 draws of three entries: E‖δ‖² = σ²."""
    tx = ascents.ascend_from_noise(ascents.sam(0.0), sigma=0.4)
    params = split(W)
    state, squares = tx.init(params), []
    for _ in range(300):
        e, state = tx.update(params, state, params, grad_fn=grad_fn)
        squares.append(np.sum(whole(e) ** 2))
    deviation = 0.16 * np.sqrt(2 / 3 / 300)
    assert np.mean(squares) == pytest.approx(0.16, abs=4 * deviation)


def test_under_a_mask_gradients_on_the_way_are_at_the_whole_point():
    """Leaves that are not perturbed stay at w, and the norm leaves them out."""
    for steps in (1, 2, 3):
        points = watched(ascents.ascend_repeatedly(ascents.sam(0.5), steps), mask=KEEP)
        e, wanted = np.zeros(3), []
        for _ in range(steps):
            g = KEPT * (H @ (W + e))
            e = e + 0.5 / steps * g / np.linalg.norm(g)
            wanted.append(W + e)
        assert_same(np.stack(points), np.stack(wanted))


def test_under_a_mask_noise_is_on_its_leaves_alone():
    smoothed, perturbed = watched(
        ascents.ascend_from_noise(ascents.sam(0.5), sigma=0.4), mask=KEEP
    )
    assert smoothed[2] == W[2]
    assert np.all(smoothed[:2] != W[:2])
    g = KEPT * (H @ smoothed)
    assert_same(perturbed, smoothed + 0.5 * g / np.linalg.norm(g))


def recording(seen):
    """SAM's ascent, which notes what it receives; its state counts its calls."""

    def update_fn(updates, state, params=None, **extra):
        seen.append((updates, state, params, extra))
        return {name: 0.1 * u for name, u in updates.items()}, state + 1

    return optax.GradientTransformationExtraArgs(lambda params: 0, update_fn)


WRAPPERS = {
    "repeatedly": lambda inner: ascents.ascend_repeatedly(inner, 3),
    "from noise": lambda inner: ascents.ascend_from_noise(inner, 0.4),
    "both": lambda inner: ascents.ascend_from_noise(
        ascents.ascend_repeatedly(inner, 3), 0.4
    ),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_the_inner_ascent_receives_what_an_ascent_does(wrap):
    """Its own gradient as ascent_gradient=, the group, and the step's functions."""
    seen = []
    tx = WRAPPERS[wrap](recording(seen))
    params, rounded = split(W), []

    def perturb(w, shift):
        assert w is params  # whose dtype the point has
        rounded.append(shift)
        return optax.apply_updates(w, shift)

    shared = {"grad_fn": grad_fn, "perturb": perturb, "group": 7, "mine": "x"}
    g = grad_fn(params)
    # ascent_gradient= is g itself, as the step passes it.
    tx.update(g, tx.init(params), params, ascent_gradient=g, **shared)
    assert len(seen) == {"from noise": 1}.get(wrap, 3)
    for updates, _, w, extra in seen:
        assert w is params
        assert extra.keys() == {*shared, "ascent_gradient"}
        assert_same(whole(extra["ascent_gradient"]), whole(updates))
        for name, value in shared.items():
            assert extra[name] is value
    assert len(rounded) == {"from noise": 1, "repeatedly": 2, "both": 3}[wrap]


def test_only_the_first_of_several_steps_changes_the_state():
    seen = []
    tx = ascents.ascend_repeatedly(recording(seen), 3)
    params = split(W)
    state = tx.init(params)
    for t in range(2):
        g = grad_fn(params)
        _, state = tx.update(g, state, params, grad_fn=grad_fn)
        assert [before for _, before, _, _ in seen] == [t] * 3
        seen.clear()
        assert state == t + 1


def test_noise_differs_by_group_and_by_step_and_comes_from_the_key():
    def noise(key, group, steps=1):
        tx = ascents.ascend_from_noise(ascents.sam(0.0), 0.4, key=key)
        params = split(W)
        state = tx.init(params)
        for _ in range(steps):
            e, state = tx.update(params, state, params, grad_fn=grad_fn, group=group)
        return whole(e)

    draws = [noise(0, None), noise(0, 0), noise(0, 1), noise(1, 0), noise(0, 0, 2)]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert np.all(one != other)
    assert_same(noise(0, 1), draws[2])


def test_an_average_inside_follows_the_gradient_from_the_noise():
    tx = ascents.ascend_from_noise(ascents.fsam(0.5, decay=0.6), 0.4)
    params, seen = split(W), []

    def watching(point):
        seen.append(H @ whole(point))
        return grad_fn(point)

    state, m = tx.init(params), 0.0
    for _ in range(3):
        _, state = tx.update(grad_fn(params), state, params, grad_fn=watching)
        m = 0.6 * m + 0.4 * seen[-1]
    (ema, _) = state.smoothed_state
    assert_same(whole(ema.gradient_ema), m)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_half_precision_gradients_on_the_way_are_widened(wrap):
    seen = []
    tx = WRAPPERS[wrap](recording(seen))
    params = {"x": jnp.ones(2, jnp.float16), "y": jnp.ones(1, jnp.float16)}
    g = {name: w.astype(jnp.float32) for name, w in params.items()}
    e, _ = tx.update(g, tx.init(params), params, grad_fn=lambda p: p)
    trees = [
        e,
        *(
            tree
            for u, _, _, extra in seen
            for tree in (u, extra.get("ascent_gradient", u))
        ),
    ]
    for tree in trees:
        assert {leaf.dtype for leaf in tree.values()} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_the_inner_ascent_may_be_a_plain_transformation(wrap):
    """One that takes no extra arguments, as most of Optax's."""
    tx, params = WRAPPERS[wrap](optax.scale(0.0)), split(W)
    e, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
    assert np.all((whole(e) == 0) == (wrap == "repeatedly"))


def test_several_steps_need_the_parameters_and_their_gradient():
    tx, params = ascents.ascend_repeatedly(ascents.sam(), 2), split(W)
    with pytest.raises(ValueError, match="ascend_repeatedly needs the parameters"):
        tx.update(params, tx.init(params), grad_fn=grad_fn)
    with pytest.raises(ValueError, match=r"ascend_repeatedly needs grad_fn="):
        tx.update(params, tx.init(params), params)
    one = ascents.ascend_repeatedly(ascents.sam(), 1)
    one.update(params, one.init(params))
