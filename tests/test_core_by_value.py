"""What the core hands on and keeps, by value, at a step other than the first."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sam_optax
import sam_optax.nnx

W = jnp.array([3.0, 4.0])


def test_the_state_of_an_ascent_follows_g_even_if_the_second_gradient_is_bad():
    """What is made of the second gradient reverts, and the average of g goes on."""
    sam = sam_optax.sharpness_aware(
        sam_optax.ascents.fsam(decay=0.5),
        cadence=sam_optax.cadences.every_k_reusing(1),
    )
    _, state = sam.update(W, sam.init(W), W, grad_fn=lambda p: p * p)
    kept = state.cadence_state.kept_direction
    d, state = sam.update(W, state, W, grad_fn=lambda p: p * jnp.inf)
    assert not np.any(np.isfinite(d))
    np.testing.assert_allclose(state.ascent_state[0].gradient_ema, 0.75 * W, rtol=1e-6)
    np.testing.assert_array_equal(state.cadence_state.kept_direction, kept)
    assert state.cadence_state.reusing_step == 2


def test_the_state_of_a_descent_reverts_with_either_gradient():
    descent = optax.ema(0.5, debias=False)
    sam = sam_optax.sharpness_aware(sam_optax.ascents.sam(0.5), descent=descent)
    _, before = sam.update(W, sam.init(W), W, grad_fn=lambda p: p)
    np.testing.assert_allclose(before.descent_state.ema, 0.5 * 1.1 * W, rtol=1e-6)
    nan = jnp.full(2, jnp.nan)
    for g, ga in ((W, nan), (nan, W)):
        _, state = sam.update(g, before, W, grad_fn=lambda p, ga=ga: ga)
        np.testing.assert_array_equal(state.descent_state.ema, before.descent_state.ema)
        assert state.descent_state.count == 2


def test_the_helper_hands_the_mean_loss_to_the_parts():
    seen = []

    def look(updates, state, params=None, *, value=None, **extra_args):
        seen.append(value)
        return updates, state

    parts = optax.GradientTransformationExtraArgs(optax.init_empty_state, look)
    ascent = optax.chain(sam_optax.ascents.sam(0.1), parts)
    sam = sam_optax.sharpness_aware(ascent, descent=parts)
    state = sam.init(W)
    seen.clear()  # of what init tried

    def losses(w, x):
        return x * jnp.sum(w), "aux"

    helper = sam_optax.sam_value_and_grad(losses, sam, has_aux=True)
    helper(W, jnp.array([1.0, 3.0]), opt_state=state)
    assert [float(value) for value in seen] == [14, 14]


@pytest.mark.parametrize("how", ["vmap", "unroll", "scan"])
def test_means_over_groups_of_half_precision_keep_what_is_small(how):
    """In bfloat16, 256 + 1 is 256. Strict promotion refuses to widen by itself."""
    w = jnp.zeros(2, jnp.bfloat16)
    x = jnp.array([256.0, 2, 2, 2], jnp.bfloat16)

    def loss_fn(w, x):
        return jnp.sum(x.astype(jnp.float32)[:, None] * w.astype(jnp.float32))

    sam = sam_optax.sam(rho=0.0, stochastic_rounding=0)
    helper = sam_optax.sam_value_and_grad(loss_fn, sam, m=1, map_groups=how)
    with jax.numpy_dtype_promotion("strict"):
        _, grads = helper(w, x, opt_state=sam.init(w))
    assert grads.gradients.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        grads.gradients, jnp.full(2, 262 / 4).astype(jnp.bfloat16)
    )
    assert float(grads.gradients[0]) != 64


def test_a_masked_ascent_takes_its_gradients_beside_the_other_leaves():
    """The leaf that is left out stays at w, and not at zero or at w + ε."""
    points = []

    def grad_fn(point):
        points.append(point)
        return {"a": point["a"] * point["b"][0], "b": point["b"]}

    w = {"a": W, "b": jnp.array([2.0, 7.0])}
    sam = sam_optax.multi_step_sam(1.0, steps=2, mask={"a": True, "b": False})
    d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
    for point, length in zip(points[1:], (5.5, 6.0), strict=True):
        np.testing.assert_allclose(point["a"], W * length / 5, rtol=1e-6)
        np.testing.assert_array_equal(point["b"], w["b"])
    np.testing.assert_allclose(d["a"], 2 * W * 6 / 5, rtol=1e-6)


class Counting(nnx.Module):
    """A layer that counts its calls, and adds its count to the outputs."""

    def __init__(self):
        self.scale = nnx.Param(jnp.array([3.0, 4.0]))
        self.calls = nnx.Variable(jnp.array(0.0))

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1.0
        return x * self.scale[...] + self.calls[...]


def test_both_passes_of_a_module_start_from_the_same_variables():
    model = Counting()
    tx = optax.chain(sam_optax.sam(rho=0.5), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    gradients = sam_optax.nnx.value_and_ascent_grad(
        lambda model, x: jnp.mean(model(x) ** 2)
    )

    def expected(scale, calls):
        """One step by hand, on outputs scale + calls for inputs of one."""

        def gradient(w):
            return w + calls  # of the mean of two squares

        g = gradient(scale)
        return scale - 0.1 * gradient(scale + 0.5 * g / np.linalg.norm(g))

    scale = np.array([3.0, 4.0])
    for calls in (1.0, 2.0, 3.0):
        _, g, extra_args = gradients(model, jnp.ones(2))
        optimizer.update(model, g, **extra_args)
        scale = expected(scale, calls)
        np.testing.assert_allclose(model.scale[...], scale, rtol=1e-5)
        assert model.calls[...] == calls


@pytest.mark.parametrize("steps", [1, 3])
def test_rounding_draws_anew_on_each_step_and_for_each_leaf(steps):
    """With a key of its own for each step, the mean of w + ε is not rounded."""
    w = {"a": jnp.ones(4000, jnp.bfloat16), "b": jnp.ones(4000, jnp.bfloat16)}
    sam = sam_optax.usam(rho=1.0, stochastic_rounding=3)
    g = jax.tree.map(lambda x: x * 0.002, w)
    state, seen = sam.init(w), []
    for _ in range(steps):
        points = []
        _, state = sam.update(
            g, state, w, grad_fn=lambda p, points=points: points.append(p) or g
        )
        seen += [np.asarray(points[0][k], np.float32) for k in "ab"]
    for one in seen:
        assert one.mean() == pytest.approx(1.002, abs=2.5e-4)
    for i, one in enumerate(seen):
        assert all(np.any(one != other) for other in seen[:i])


def test_a_descent_receives_what_an_ascent_does():
    """Its grad_fn is that of its own group, at the point that it asks for."""
    seen = []

    def look(updates, state, params, *, grad_fn, perturb, group, perturbation, **rest):
        point = perturb(params, 2 * perturbation)
        seen.append((group, grad_fn(point), rest["ascent_gradient"], rest["mine"]))
        return updates, state

    descent = optax.GradientTransformationExtraArgs(optax.init_empty_state, look)
    sam = sam_optax.sharpness_aware(sam_optax.ascents.sam(0.5), descent=descent)

    def grad_of(scale):
        return lambda point: scale * point

    def per_group(path):
        results = [path(s * W, grad_of(s), i) for i, s in enumerate((1.0, 3.0))]
        return jax.tree.map(lambda *x: sum(x) / 2, *results)

    state = sam.init(W)
    sam.update(2 * W, state, W, grad_fn=grad_of(2.0), per_group=per_group, mine="own")
    # The last is the step from the means, by which a state would go on.
    for (group, far, g, mine), (number, scale) in zip(
        seen, ((0, 1.0), (1, 3.0), (None, 2.0)), strict=True
    ):
        assert group == number
        assert mine == "own"
        np.testing.assert_allclose(far, scale * W * 1.2, rtol=1e-6)
        np.testing.assert_allclose(g, scale * W, rtol=1e-6)


def test_parts_receive_at_least_single_precision():
    seen = []

    def look(updates, state, params=None, *, ascent_gradient, **rest):
        seen.append((updates.dtype, ascent_gradient.dtype))
        return updates, state

    part = optax.GradientTransformationExtraArgs(optax.init_empty_state, look)
    sam = sam_optax.sharpness_aware(part, descent=part, stochastic_rounding=0)
    w = W.astype(jnp.bfloat16)
    state = sam.init(w)
    seen.clear()  # of what init tried
    d, _ = sam.update(w, state, w, grad_fn=lambda point: point)
    assert seen == [(jnp.float32, jnp.float32)] * 2
    assert d.dtype == jnp.bfloat16


def test_lists_of_devices_draw_numbers_of_their_own():
    """Two lists are two groups, with the numbers 0 and 1."""
    sam = sam_optax.random_sam(rho=1.0)
    helper = sam_optax.sam_value_and_grad(
        lambda w, x: jnp.sum(w**2) / 2 + 0 * jnp.sum(x),
        sam,
        axis_name="data",
        axis_index_groups=[[0, 3], [1, 2]],
    )

    def step(x):
        return helper(W, x, opt_state=sam.init(W))[1].gradients

    mapped = jax.pmap(step, axis_name="data", devices=jax.devices()[:4])

    def per_group(path):
        results = [path(W, lambda point: point, index) for index in (0, 1)]
        return jax.tree.map(lambda *x: sum(x) / 2, *results)

    d, _ = sam.update(
        W, sam.init(W), W, grad_fn=lambda point: point, per_group=per_group
    )
    np.testing.assert_allclose(mapped(jnp.ones((4, 1)))[2], d, rtol=1e-6)


@pytest.mark.parametrize("lists", [[[0], [1]], [[0, 1, 2], [3, 4, 5]]])
def test_lists_hold_as_many_devices_as_the_axis_has(lists):
    sam = sam_optax.sam()
    helper = sam_optax.sam_value_and_grad(
        lambda w, x: jnp.sum(w * x), sam, axis_name="data", axis_index_groups=lists
    )
    mapped = jax.pmap(
        lambda x: helper(W, x, opt_state=sam.init(W))[0],
        axis_name="data",
        devices=jax.devices()[:4],
    )
    with pytest.raises(
        ValueError, match=f"it has 4, and the lists {2 * len(lists[0])}"
    ):
        mapped(jnp.ones((4, 2)))
