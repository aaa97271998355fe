"""Mistakes that would go unnoticed, and raise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import sam_optax
from lab import with_loss
from methods import FAST
from sam_optax import ascents, descents


def test_a_negative_numpy_scalar_is_a_negative_number():
    for rho in (np.array(-1.0), np.float32(-1.0)):
        with pytest.raises(ValueError, match="rho must be >= 0"):
            sam_optax.sam(rho=rho)
    sam_optax.sam(rho=np.array(1.0))


def test_a_schedule_must_return_a_scalar():
    sam = sam_optax.sam(rho=lambda step: jnp.array([0.1, 0.2]))
    w = jnp.ones(2)
    with pytest.raises(ValueError, match=r"schedule of rho .* shape \(2,\)"):
        sam.update(w, sam.init(w), w, grad_fn=lambda w: w)


def test_a_report_is_read_inside_of_the_function_that_makes_it():
    sam = sam_optax.sam()
    helper = sam_optax.sam_value_and_grad(jnp.sum, sam, report=True)

    @jax.jit
    def gradients(w):
        return helper(w, opt_state=sam.init(w))[1]

    returned = gradients(jnp.ones(2))
    with pytest.raises(ValueError, match=r"Return gradients\.report from the"):
        _ = returned.report
    assert helper(jnp.ones(2), opt_state=sam.init(jnp.ones(2)))[1].report.ascended


def test_gradients_of_another_method_are_refused():
    """Their state would take the place of the right one."""
    sam, fsam = sam_optax.sam(), sam_optax.fsam()
    w = jnp.ones(2)
    helper = sam_optax.sam_value_and_grad(jnp.sum, fsam)
    _, grads = helper(w, opt_state=fsam.init(w))
    with pytest.raises(ValueError, match="made by another SAM transformation"):
        sam.update(grads, sam.init(w), w)


@pytest.mark.parametrize("name", ["group", "perturb", "ascent_gradient"])
def test_extra_arguments_that_the_step_passes_itself_are_refused(name):
    sam = sam_optax.random_sam()
    w = jnp.ones(2)
    with pytest.raises(ValueError, match=f"{name!r} is one that a SAM transformation"):
        sam.update(w, sam.init(w), w, grad_fn=lambda w: w, **{name: 0})


def test_an_ascent_survives_being_rebuilt_as_a_tuple():
    """`jax.tree.map` and Equinox do that to transformations that are in a pytree."""
    ascent = jax.tree.map(lambda x: x, sam_optax.ascents.fsam(rho=0.5))
    sam = sam_optax.sharpness_aware(ascent)
    w = jnp.array([3.0, 4.0])
    d, _ = sam.update(w, sam.init(w), w, grad_fn=lambda w: w)
    np.testing.assert_allclose(d, 1.1 * w, rtol=1e-6)


def test_a_slot_has_no_report_before_the_update():
    _, _, extra_args = sam_optax.value_and_ascent_grad(jnp.sum, report=True)(
        jnp.ones(2)
    )
    with pytest.raises(ValueError, match="There is no report yet"):
        _ = extra_args["report"].value


def test_a_report_does_not_leave_a_branch_of_the_program():
    """A wrapper around SAM runs it in a `lax.cond`, whose tracers end with it."""
    tx = optax.apply_if_finite(optax.chain(sam_optax.sam(), optax.sgd(0.1)), 3)
    gradients = sam_optax.value_and_ascent_grad(jnp.sum, report=True)

    @jax.jit
    def step(w):
        _, g, extra_args = gradients(w)
        tx.update(g, tx.init(w), w, **extra_args)
        return extra_args["report"].value

    with pytest.raises(ValueError, match=r"MultiSteps or optax\.apply_if_finite"):
        step(jnp.ones(2))


RULES = {
    "no choice": (lambda batch, params: batch, TypeError, "must return a .*Choice"),
    "no pass": (
        lambda batch, params: choice(batch, seen=None),
        TypeError,
        "`seen` the pass",
    ),
    "a batch for a function": (
        lambda batch, params: choice(batch, ascent=batch),
        TypeError,
        "`ascent` a function of a point",
    ),
    "no gradient": (
        lambda batch, params: choice(batch, descent=batch.forward),
        TypeError,
        "`descent` must return a Pass with a gradient",
    ),
    "g of other examples": (
        lambda batch, params: choice(
            batch,
            seen=batch.gradient(params),
            ascent=batch.take(np.array([0])).gradient,
        ),
        ValueError,
        "take `seen` from batch.forward",
    ),
}


def choice(batch, **fields):
    made = {"ascent": batch.gradient, "descent": batch.gradient}
    made["seen"] = batch.forward(jnp.ones(2))
    return sam_optax.data.Choice(**(made | fields))


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_is_wrong_says_which_part(rule):
    rule, error, message = RULES[rule]
    sam = sam_optax.sam()
    helper = sam_optax.sam_value_and_grad(lambda w, x: jnp.mean(x @ w), sam, data=rule)
    with pytest.raises(error, match=message):
        helper(jnp.ones(2), jnp.ones((4, 2)), opt_state=sam.init(jnp.ones(2)))


def test_a_moved_name_says_where_it_is():
    with pytest.raises(AttributeError, match=r"take sam_optax\.ascents\.sam\."):
        _ = sam_optax.sam_ascent
    with pytest.raises(AttributeError, match=r"descents\.gsam, or sharpness"):
        _ = sam_optax.surrogate_gap
    assert not hasattr(sam_optax, "nothing_like_this")


# --- Devices: what types say of a loss under `shard_map`.


def trained_on_four_devices(loss_fn, axes=("data",), make=sam_optax.sam, **options):
    """w after one step of SGD, from w = 1 and 2 (one example per device)."""
    shape = (4, 1)[: len(axes)]
    mesh = jax.make_mesh(shape, axes, devices=jax.devices()[:4])
    sam = make(rho=0.1)
    tx = optax.chain(sam, optax.sgd(0.1))
    helper = sam_optax.sam_value_and_grad(loss_fn, sam, **options)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
    )
    def step(w, x):
        opt_state = tx.init(w)
        _, grads = helper(w, x, opt_state=opt_state)
        return optax.apply_updates(w, tx.update(grads, opt_state, w)[0])

    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.arange(8.0).reshape(4, 2), P("data"))
        return step(jnp.array([1.0, 2.0]), x)


def own_loss(w, x):
    return jnp.mean((x @ w - 1) ** 2)


def averaged_loss(w, x):
    return jax.lax.pmean(own_loss(w, x), "data")


def test_a_loss_averaged_over_the_axis_once_is_right():
    w, x = jnp.array([1.0, 2.0]), jnp.arange(8.0).reshape(4, 2)
    sam = sam_optax.sam(rho=0.1)
    d, _ = sam.update(
        jax.grad(own_loss)(w, x),
        sam.init(w),
        w,
        grad_fn=lambda w: jax.grad(own_loss)(w, x),
    )
    for loss_fn, options in ((own_loss, {"axis_name": "data"}), (averaged_loss, {})):
        actual = trained_on_four_devices(loss_fn, **options)
        np.testing.assert_allclose(actual, w - 0.1 * d, rtol=1e-5)


def test_gradients_on_the_way_are_those_of_all_devices():
    """Without a norm, which would hide that they are four times as large."""

    def make(rho):
        ascents = sam_optax.ascents
        return sam_optax.sharpness_aware(
            ascents.ascend_repeatedly(ascents.usam(rho / 100), 2)
        )

    w, x = jnp.array([1.0, 2.0]), jnp.arange(8.0).reshape(4, 2)
    sam = make(rho=0.1)
    grad_fn = jax.grad(lambda w: own_loss(w, x))
    d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
    actual = trained_on_four_devices(own_loss, make=make, axis_name="data")
    np.testing.assert_allclose(actual, w - 0.1 * d, rtol=1e-5)


@pytest.mark.parametrize("ascends", [True, False])
def test_a_report_of_unknown_losses_varies_as_its_gradients_do(ascends):
    """Both branches of a traced decision must give values of one type."""
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    sam, seen = sam_optax.sam(rho=0.5), []

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    def norms(w, ascend):
        sam.update(
            w, sam.init(w), w, grad_fn=lambda w: w, ascend=ascend, report=seen.append
        )
        return seen.pop().perturbation_norm[None]

    with jax.set_mesh(mesh):
        w = jax.device_put(jnp.arange(1.0, 9.0), P("data"))
        found = norms(w, jnp.asarray(ascends))
    np.testing.assert_allclose(found, 0.5 if ascends else np.nan, rtol=1e-6)


def test_a_report_takes_a_loss_that_is_wider_than_the_parameters():
    """Also where JAX refuses to promote dtypes by itself."""
    sam = sam_optax.sam(rho=0.5)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        w = jnp.array([3.0, 4.0], jnp.float32)
        helper = sam_optax.sam_value_and_grad(
            lambda w: jnp.sum(w.astype(jnp.float64) ** 2), sam, report=True
        )
        report = helper(w, opt_state=sam.init(w))[1].report
    assert report.perturbed_loss.dtype == jnp.float64
    assert report.surrogate_gap == pytest.approx(5.5**2 - 5**2, rel=1e-6)


def test_a_loss_averaged_over_the_axis_twice_is_refused():
    with pytest.raises(ValueError, match=r"equal along the axis 'data'.*too small"):
        trained_on_four_devices(averaged_loss, axis_name="data")


@pytest.mark.parametrize("options", [{}, {"axis_name": "model"}])
def test_a_loss_that_is_not_averaged_over_the_axis_is_refused(options):
    axes = ("data", "model")[: 1 + len(options)]
    with pytest.raises(ValueError, match=r"differs along the axis 'data'.*axis_name="):
        trained_on_four_devices(own_loss, axes, **options)


# --- What the guard looks at.


def test_a_gradient_on_the_way_that_is_not_finite_does_not_enter_the_state():
    """g is finite here, and the gradient at the noisy point is not."""
    ascent = sam_optax.ascents.ascend_from_noise(sam_optax.ascents.fsam(), sigma=1.0)
    sam = sam_optax.sharpness_aware(ascent)
    w = jnp.array([1.0, 2.0])

    def grad_fn(point):
        return point * jnp.where(jnp.all(point == w), 1.0, jnp.nan)

    d, state = sam.update(w, sam.init(w), w, grad_fn=grad_fn)
    assert np.all(np.isnan(d))
    average = state.ascent_state.smoothed_state[0]
    np.testing.assert_array_equal(average.gradient_ema, 0.0)
    assert not average.ema_started
    later, state = sam.update(w, state, w, grad_fn=lambda point: point)
    assert np.all(np.isfinite(later))


def test_a_state_that_starts_at_infinity_advances():
    plateau = optax.contrib.reduce_on_plateau(patience=1, factor=0.5)
    sam = sam_optax.sharpness_aware(optax.chain(sam_optax.ascents.sam(0.1), plateau))
    w = jnp.array([1.0, 2.0])
    state = sam.init(w)
    assert np.isinf(state.ascent_state[1].best_value)
    for _ in range(2):
        _, state = sam.update(w, state, w, grad_fn=lambda point: point, value=3.0)
    assert state.ascent_state[1].best_value == 3.0
    assert state.ascent_state[1].scale == 0.5
    _, state = sam.update(w, state, w, grad_fn=lambda point: point, value=jnp.nan)
    assert state.ascent_state[1].best_value == 3.0


# --- Scales at which ε holds must hold for d.


@pytest.mark.parametrize("scale", [1e-34, 1e-20, 1e20, 1e33])
@pytest.mark.parametrize("method", ["gsam", "stable_sam", "look_sam"])
def test_d_scales_with_the_gradients(method, scale):
    """Two steps, so that LookSAM uses what it kept on the first."""
    rng = np.random.default_rng(0)
    g = jnp.asarray(1 + rng.normal(size=64), jnp.float32)
    ga = g + jnp.asarray(rng.normal(size=64), jnp.float32)
    w = jnp.zeros(64)

    def second_d(scale):
        sam = sam_optax.METHODS[method].make(rho=0.1)
        state = sam.init(w)
        for _ in range(2):
            d, state = sam.update(scale * g, state, w, grad_fn=lambda w: scale * ga)
        return np.asarray(d, np.float64)

    np.testing.assert_allclose(second_d(scale) / scale, second_d(1.0), rtol=3e-5)


# --- Derivatives of a step, as a learned ρ takes them.


@pytest.mark.parametrize(
    "make",
    [
        *(
            pytest.param(method.make, marks=() if name in FAST else pytest.mark.slow)
            for name, method in sam_optax.METHODS.items()
        ),
        functools.partial(sam_optax.sam, p=3),
        functools.partial(sam_optax.sam, p=1.5),
        functools.partial(sam_optax.fsam, sigma="cosine"),
    ],
)
def test_a_step_can_be_differentiated_at_a_zero_gradient(make):
    w = jnp.zeros(3)

    def grad_fn(point):
        return with_loss(jnp.sum(point**2), 2 * point)

    # The parameters have no names, by which this method chooses.
    options = {"mask": lambda w: True} if make is sam_optax.sam_on else {}

    def size_of_second_d(rho):
        sam = make(rho=rho, **options)
        state = sam.init(w)
        for _ in range(2):
            d, state = sam.update(w, state, w, grad_fn=grad_fn)
        return jnp.sum(d)

    assert np.isfinite(jax.grad(size_of_second_d)(0.1))


@pytest.mark.parametrize(
    ("descent", "name"),
    [
        (descents.tilt([ascents.sam()]), "tilt"),
        (descents.add_sharpness(kind="frobenius"), "add_sharpness"),
    ],
)
def test_a_chain_around_a_descent_hands_it_the_losses(descent, name):
    chained = optax.chain(descent, optax.clip(1.0))
    sam = sam_optax.sharpness_aware(ascents.sam(), descent=chained)
    w = jnp.ones(2)
    loss_and_grads = sam_optax.sam_value_and_grad(lambda w: jnp.sum(w**2), sam)
    _, grads = loss_and_grads(w, opt_state=sam.init(w))
    alone = sam_optax.sharpness_aware(ascents.sam(), descent=descent)
    loss_and_grads = sam_optax.sam_value_and_grad(lambda w: jnp.sum(w**2), alone)
    _, unclipped = loss_and_grads(w, opt_state=alone.init(w))
    assert np.all(np.abs(unclipped.gradients) > 1)
    np.testing.assert_array_equal(grads.gradients, np.sign(unclipped.gradients))
    with pytest.raises(ValueError, match=f"{name} needs perturbed_loss= and"):
        sam.update(w, sam.init(w), w, grad_fn=lambda w: w)


def test_the_loss_that_is_wrong_is_named():
    sam, w = sam_optax.sam(), jnp.ones(2)
    loss_and_grads = sam_optax.sam_value_and_grad(
        lambda w: (jnp.sum(w**2), 0.0),
        sam,
        has_aux=True,
        ascent_loss_fn=lambda w: jnp.sum(w),
    )
    with pytest.raises(TypeError, match="ascent_loss_fn must return a pair"):
        loss_and_grads(w, opt_state=sam.init(w))
