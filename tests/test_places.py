"""Wrong things in a place of the API, and wrong places in a chain, raise the remedy."""

import functools

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sam_optax
import sam_optax.nnx

W = jnp.array([3.0, 4.0])
X = jnp.ones((4, 2))
sam = sam_optax.sam


def loss_fn(w, x=X):
    return jnp.mean((x @ w) ** 2)


# --- SAM comes first.


@pytest.mark.parametrize(
    "wrap", [lambda tx: tx, lambda tx: optax.chain(tx, optax.clip(9.0))]
)
def test_an_optimizer_before_sam_is_refused(wrap):
    fsam = sam_optax.fsam()
    tx = wrap(optax.chain(optax.adam(0.1), fsam))
    with pytest.raises(ValueError, match=r"must come first.*another one comes before"):
        sam_optax.sam_value_and_grad(loss_fn, fsam)(W, opt_state=tx.init(W))
    injected = optax.inject_hyperparams(sam)(rho=0.1)
    tx = wrap(optax.chain(optax.adam(0.1), injected))
    with pytest.raises(ValueError, match=r"must come first.*another one comes before"):
        sam_optax.sam_value_and_grad(loss_fn, injected)(W, opt_state=tx.init(W))
    plain = sam()  # SGD has no state, but it is a chain
    tx = wrap(optax.chain(optax.sgd(0.1), plain, optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"must come first.*another one comes before"):
        sam_optax.sam_value_and_grad(loss_fn, plain)(W, opt_state=tx.init(W))


def test_a_state_that_was_restored_as_dicts_says_how_to_restore_it():

    def as_dicts(node):
        if hasattr(node, "_asdict"):
            return {k: as_dicts(v) for k, v in node._asdict().items()}
        return [*map(as_dicts, node)] if isinstance(node, tuple) else node

    for method in (sam_optax.fsam(), sam()):
        state = optax.chain(method, optax.sgd(0.1)).init(W)
        helper = sam_optax.sam_value_and_grad(loss_fn, method)
        with pytest.raises(ValueError, match=r"with tx.init\(params\) as the target"):
            helper(W, opt_state=as_dicts(state))
    with pytest.raises(ValueError, match="found no SAM state"):
        helper(W, opt_state=as_dicts(optax.adam(0.1).init(W)))


def test_clipping_before_sam_acts_as_after_it_through_the_first_door():
    method, clip = sam_optax.sam(rho=0.1), optax.clip_by_global_norm(1.0)
    helper = sam_optax.sam_value_and_grad(loss_fn, method)
    found = []
    for parts in ((clip, method), (method, clip)):
        tx = optax.chain(*parts, optax.sgd(0.1))
        state = tx.init(W)
        found.append(tx.update(helper(W, opt_state=state)[1], state, W)[0])
    np.testing.assert_array_equal(*found)
    assert np.linalg.norm(found[0]) == pytest.approx(0.1)


@pytest.mark.parametrize("before", [optax.clip(1.0), optax.adam(0.1)])
@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f])
def test_what_comes_before_sam_is_seen_through_the_second_door(before, wrap):
    tx = optax.chain(before, sam_optax.fsam())
    with pytest.warns(UserWarning, match=r"not those that came with grad_fn="):
        wrap(lambda w: step_by_door_2(tx, w)[0])(W)


def step_by_door_2(tx, w):
    _, g, extra_args = sam_optax.value_and_ascent_grad(loss_fn)(w)
    return tx.update(g, tx.init(w), w, **extra_args)


def test_sam_may_be_in_a_chain_of_chains_and_beside_other_states():
    method = sam()
    tx = optax.chain(optax.chain(method, optax.clip(1.0)), optax.sgd(0.1))
    helper = sam_optax.sam_value_and_grad(loss_fn, method)
    loss, _ = helper(W, opt_state=tx.init(W))
    assert loss == 49
    for other in ({"average": W}, optax.adam(0.1).init(W)):
        assert helper(W, opt_state=(other, tx.init(W)))[0] == 49
    step_by_door_2(tx, W)


# --- An ascent ascends.


@pytest.mark.parametrize(
    "ascent",
    [
        optax.sgd(0.1),
        optax.adam(0.1),
        optax.sgd(optax.linear_schedule(0.0, 0.1, 10)),
        optax.chain(optax.contrib.normalize(), optax.sgd(0.1)),
        optax.chain(sam_optax.ascents.sam(), optax.scale(-1.0)),
        sam_optax.ascents.ascend_repeatedly(optax.sgd(0.1), 2),
        sam_optax.ascents.with_state_dtype(optax.sgd(0.1)),
        sam_optax.ascents.by_label({"all": optax.sgd(0.1)}, lambda w: "all"),
        sam_optax.ascents.reading_gradient(optax.sgd(0.1)),
        sam_optax.ascents.following(optax.sgd(0.1), None),
        optax.chain(
            sam_optax.ascents.scale_by_inverse_root_fisher(), optax.scale(-1.0)
        ),
    ],
)
def test_an_ascent_that_descends_is_told(ascent):
    method = sam_optax.sharpness_aware(ascent)
    with pytest.warns(UserWarning, match=r"points against the gradient"):
        method.init({"w": W})
    method.init({"w": W})  # once


@pytest.mark.parametrize(
    "ascent",
    [
        optax.chain(optax.contrib.normalize(), optax.scale(0.1)),
        optax.chain(optax.sgd(0.1), optax.scale(-1.0)),
        sam_optax.ascents.replace_by_noise(),
        sam_optax.ascents.ascend_from_noise(sam_optax.ascents.sam(), sigma=9.0),
        optax.chain(
            sam_optax.ascents.subtract_ema(1.5), sam_optax.ascents.scale_by_rho(0.1)
        ),
        # These cannot be tried on an array alone.
        optax.partition({"a": optax.sgd(0.1)}, {"w": "a"}),
        optax.scale_by_trust_ratio(),
    ],
)
def test_other_ascents_are_not(ascent):
    sam_optax.sharpness_aware(ascent).init({"w": W})


def test_an_ascent_is_tried_once_and_under_jit():
    tried = []

    def update(g, state, params):
        tried.append(g)
        return g, state

    ascent = optax.GradientTransformation(optax.init_empty_state, update)
    method = sam_optax.sharpness_aware(ascent)
    jax.jit(method.init)(W)
    first = len(tried)
    assert first > 0
    method.init(W)
    assert len(tried) == first
    descending = sam_optax.sharpness_aware(optax.sgd(0.1))
    with pytest.warns(UserWarning, match="points against the gradient"):
        jax.jit(descending.init)(W)


@pytest.mark.parametrize("part", ["ascent", "descent"])
def test_a_whole_method_is_no_part_of_one(part):
    parts = {"ascent": sam_optax.ascents.sam()} | {part: sam_optax.gsam()}
    with pytest.raises(TypeError, match=rf"{part} is a whole SAM tr.*{part}s\.g?sam"):
        sam_optax.sharpness_aware(**parts)


# --- A radius that turns out to be negative.


@pytest.mark.parametrize("make", [sam, sam_optax.asam, sam_optax.random_sam])
def test_a_scheduled_radius_below_zero_shows_in_d(make):
    method = make(rho=lambda step: 1e-3 * (2 - step))
    state, seen = method.init(W), []
    update = jax.jit(lambda s: method.update(W, s, W, grad_fn=lambda point: point))
    for _ in range(4):
        d, state = update(state)
        seen.append(bool(jnp.all(jnp.isfinite(d))))
    assert seen == [True, True, True, False]


@pytest.mark.parametrize("steps", [10, 90])
@pytest.mark.parametrize("peak", [0.1, 0.3, 2.8])
def test_a_schedule_that_ends_at_zero_ends_at_sgd(steps, peak):
    """Under jit, a linear schedule can end a little below zero."""
    method = sam(rho=optax.linear_schedule(peak, 0.0, steps))
    # All that the state holds is its counter.
    state = jax.tree.map(lambda x: jnp.int32(steps), method.init(W))
    d, _ = jax.jit(lambda s: method.update(W, s, W, grad_fn=lambda p: p))(state)
    np.testing.assert_array_equal(d, W)


def test_an_injected_radius_below_zero_shows_in_d():
    method = optax.inject_hyperparams(sam)(rho=0.1)
    state = method.init(W)
    state.hyperparams["rho"] = jnp.asarray(-0.1)
    d, _ = method.update(W, state, W, grad_fn=lambda point: point)
    assert np.all(np.isnan(d))


def test_a_schedule_of_python_numbers_raises():
    method = sam(rho=lambda step: -0.5)
    with pytest.raises(ValueError, match="rho must be >= 0"):
        method.update(W, method.init(W), W, grad_fn=lambda point: point)


# --- Parameters, losses and axes.


def test_a_whole_model_is_not_its_parameters():
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    method = sam()
    helper = sam_optax.sam_value_and_grad(lambda model, x: 0.0, method)
    with pytest.raises(TypeError, match=r"params\.activation is a .*eqx\.partition"):
        helper(model, X, opt_state=method.init(W))
    with pytest.raises(TypeError, match=r"params\.activation is a .*eqx\.partition"):
        sam_optax.value_and_ascent_grad(lambda model, x: 0.0)(model, X)


@pytest.mark.parametrize(
    "model", [nnx.Linear(2, 1, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0))]
)
def test_an_nnx_module_goes_to_the_helper_for_modules(model):
    method = sam()
    with pytest.raises(TypeError, match=r"sam_optax\.nnx\.value_and_ascent_grad"):
        sam_optax.sam_value_and_grad(lambda model, x: 0.0, method)(
            model, X, opt_state=method.init(W)
        )
    with pytest.raises(TypeError, match=r"sam_optax\.nnx\.value_and_ascent_grad"):
        sam_optax.value_and_ascent_grad(lambda model, x: 0.0)(model, X)


@pytest.mark.parametrize("take", [jax.grad, jax.value_and_grad])
def test_a_gradient_is_not_a_loss(take):
    with pytest.raises(TypeError, match=r"loss_fn is a gradient.*Pass the loss"):
        sam_optax.sam_value_and_grad(take(loss_fn), sam())
    with pytest.raises(TypeError, match=r"loss_fn is a gradient.*Pass the loss"):
        sam_optax.value_and_ascent_grad(take(loss_fn))


def test_a_gradient_with_its_arguments_bound_is_not_a_loss():
    with pytest.raises(TypeError, match=r"loss_fn is a gradient"):
        sam_optax.sam_value_and_grad(functools.partial(jax.grad(loss_fn), x=X), sam())


def test_a_derivative_by_another_argument_is_a_loss():
    force = jax.grad(lambda w, t: jnp.sum(w) * t**2, argnums=1)
    assert sam_optax.value_and_ascent_grad(force)(W, 3.0)[0] == 42


def test_a_loss_of_which_only_the_words_are_those_of_a_gradient():
    def loss(w):
        """Gradient of something, squared."""
        return jnp.sum(w**2)

    assert sam_optax.value_and_ascent_grad(loss)(W)[0] == 25


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"loss": 1.0}, "an array of losses, got dict"),
        (None, "an array of losses, got NoneType"),
        (1, "an array of losses, got int"),
        (jnp.ones(2, jnp.int32), "floating-point numbers.*got int32"),
        (jnp.ones(2, bool), "floating-point numbers.*got bool"),
        (jnp.ones(2, jnp.complex64), "floating-point numbers.*got complex64"),
    ],
)
def test_a_loss_is_a_floating_point_number(result, words):
    with pytest.raises(TypeError, match=words):
        sam_optax.value_and_ascent_grad(lambda w: result)(W)


def test_what_is_not_callable_is_not_a_loss():
    with pytest.raises(TypeError, match=r"loss_fn must be a function, got Array"):
        sam_optax.sam_value_and_grad(W, sam())


@pytest.mark.parametrize("sync", [True, False])
def test_an_axis_that_is_not_there_is_named(sync):
    method = sam()
    helper = sam_optax.sam_value_and_grad(
        loss_fn, method, axis_name="wrong", sync_perturbation=sync
    )

    def step(x):
        return helper(W, x, opt_state=method.init(W))[0]

    for mapped in (step, jax.jit(step), jax.vmap(step, axis_name="right")):
        with pytest.raises(ValueError, match=r"axis_name='wrong' is not an axis of"):
            mapped(X[None])
    with pytest.raises(ValueError, match=r"axis_name='wrong' is not an axis of"):
        jax.pmap(step, axis_name="right", devices=jax.devices()[:1])(X[None])


# --- Masks.


@pytest.mark.parametrize("name", ["mask", "adaptive_mask"])
@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        ({"a": True}, ValueError, r"says nothing of params\['b'\]\['c'\]"),
        ({"a": True, "b": None}, ValueError, r"nothing of params\['b'\]\['c'\]"),
        ({"a": True, "b": {"c": True}}, ValueError, r"nothing of params\['b'\]\['d'\]"),
        ({"a": True, "b": True, "e": True}, ValueError, r"mask has \['e'\], and"),
        (
            {"a": {"f": True}, "b": True},
            ValueError,
            r"mask has \['a'\]\['f'\], and the parameters do not",
        ),
        (
            {"a": np.array([True, False]), "b": True},
            TypeError,
            r"whole arrays.*mask\['a'\] is array",
        ),
        ({"a": 1, "b": True}, TypeError, r"True or False; mask\['a'\] is 1"),
        ({"a": "yes", "b": True}, TypeError, r"mask\['a'\] is 'yes'"),
    ],
)
def test_a_mask_that_does_not_fit(name, mask, error, words):
    params = {"a": W, "b": {"c": W, "d": None, "e": ()}}
    params["b"]["d"] = W
    method = sam_optax.asam(**{name: mask})
    with pytest.raises(error, match=words):
        method.update(params, method.init(params), params, grad_fn=lambda point: point)


@pytest.mark.parametrize(
    "mask",
    [
        {"a": True, "b": False},
        {"a": np.bool_(True), "b": {"c": False, "d": np.array(False)}},
        {"a": jnp.array(True), "b": {"c": False, "d": False}},
    ],
)
def test_a_mask_may_name_a_part_or_what_holds_no_array(mask):
    params = {"a": W, "b": {"c": W, "d": None}}
    method = sam(rho=1.0, mask=mask)
    d, _ = method.update(params, method.init(params), params, grad_fn=lambda p: p)
    np.testing.assert_allclose(d["a"], 1.2 * W, rtol=1e-6)
    np.testing.assert_array_equal(d["b"]["c"], W)


def test_a_mask_may_speak_of_an_empty_part():
    params = {"a": W, "e": {}}
    method = sam(rho=1.0, mask={"a": True, "e": False})
    d, _ = method.update(params, method.init(params), params, grad_fn=lambda p: p)
    np.testing.assert_allclose(d["a"], 1.2 * W, rtol=1e-6)


@pytest.mark.parametrize(
    ("mask", "params"),
    [(flax.core.FrozenDict({"a": True}), {"a": W}), ({"a": True}, {"a": W, "e": {}})],
)
def test_a_mask_of_other_containers(mask, params):
    method = sam(mask=mask)
    with pytest.raises(ValueError, match=r"of the same containers \(a dict is not"):
        method.update(params, method.init(params), params, grad_fn=lambda p: p)


def test_a_mask_may_be_a_callable_with_numbers_of_its_own():
    class Matrices(eqx.Module):
        rank: int

        def __call__(self, params):
            return jax.tree.map(lambda w: w.ndim >= self.rank, params)

    params = {"a": W, "b": jnp.ones((2, 2))}
    method = sam(rho=1.0, mask=Matrices(2))
    d, _ = method.update(params, method.init(params), params, grad_fn=lambda p: p)
    np.testing.assert_array_equal(d["a"], W)
    np.testing.assert_allclose(d["b"], 1.5, rtol=1e-6)


# --- A report where NaN stops the program.


@pytest.mark.parametrize("ascends", [True, False])
def test_a_report_has_no_nan_under_debug_nans(ascends):
    seen = []
    method = sam(rho=0.5)

    @jax.jit
    def step(w, ascend):
        method.update(
            w,
            method.init(w),
            w,
            grad_fn=lambda point: point,
            ascend=ascend,
            report=seen.append,
        )
        return seen.pop()

    with jax.debug_nans(True):
        report = step(W, jnp.asarray(ascends))
    assert report.ascended == ascends
    assert report.ascent_norm == 5
    assert report.perturbed_loss == report.surrogate_gap == 0  # not known here
    assert report.descent_norm == pytest.approx(5.5 if ascends else 0)
    assert report.perturbation_norm == pytest.approx(0.5 if ascends else 0)


def test_warnings_name_the_line_of_the_user():
    sam = sam_optax.sam()
    tx, w = optax.chain(sam, optax.sgd(0.1)), jnp.ones(2, jnp.bfloat16)
    with pytest.warns(UserWarning, match="swallow the whole perturbation") as found:
        tx.update(w, tx.init(w), w, grad_fn=lambda w: w)
    assert found[0].filename == __file__
    helper = sam_optax.sam_value_and_grad(jnp.sum, sam_optax.sam())
    with pytest.warns(UserWarning, match="swallow the whole perturbation") as found:
        jax.jit(lambda w: helper(w, opt_state=sam.init(w))[0])(w)
    assert found[0].filename == __file__
