"""Functional SAM and Adam's preconditioner, by value."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from doors import DOORS
from lab import assert_trees_close
from sam_optax import ascents, data, descents

pytestmark = pytest.mark.usefixtures("double_precision")

X = np.random.default_rng(0).normal(size=(6, 3))
W = np.array([1.0, -2.0, 0.5])


def network(w, x):
    return {"up": jnp.tanh(x @ w), "down": jnp.sin(x @ w)}


def loss_of(outputs, x):
    return jnp.square(outputs["up"] - 1) + outputs["up"] * outputs["down"] + 0 * x[:, 0]


def by_hand(w, point, x=X):
    """J(point)ᵀ ∇ℓ(f(w))."""
    up, down = np.tanh(x @ w), np.sin(x @ w)
    to_up, to_down = 2 * (up - 1) + down, up
    moved = x @ point
    through = to_up / np.cosh(moved) ** 2 + to_down * np.cos(moved)
    return x.T @ through / len(x)


def unit(v):
    return v / np.linalg.norm(v)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize("m", [None, 3])
def test_only_the_network_moves_to_the_perturbed_point(door, m):
    rule = data.functional(network, loss_of)
    sam = sam_optax.sam(0.5)
    tx = optax.chain(sam, optax.sgd(0.1))
    options = {} if m is None else {"m": m}
    step = jax.jit(door(sam, tx, rule.loss_fn, data=rule, **options))
    w, state = jnp.asarray(W), tx.init(jnp.asarray(W))
    for _ in range(2):
        here, ds = np.asarray(w), []
        for part in [X] if m is None else [X[:3], X[3:]]:
            g = by_hand(here, here, part)
            ds.append(by_hand(here, here + 0.5 * unit(g), part))
        w, state, loss = step(w, state, X)
        np.testing.assert_allclose(w, here - 0.1 * np.mean(ds, 0), rtol=1e-10)
        assert loss == pytest.approx(float(np.mean(rule.loss_fn(here, X))), rel=1e-12)


def test_a_network_that_is_linear_in_its_parameters_gives_the_plain_gradient():
    rule = data.functional(lambda w, x: x @ w, lambda f, x: jnp.exp(f))
    sam, w = sam_optax.gsam(0.5), jnp.asarray(W)
    gradients = sam_optax.sam_value_and_grad(rule.loss_fn, sam, data=rule)
    _, grads = gradients(w, X, opt_state=sam.init(w))
    plain = jax.grad(lambda w: jnp.exp(X @ w).mean())(w)
    assert_trees_close(grads.gradients, plain, rtol=1e-12)


def test_auxiliary_output_and_report_are_those_of_the_two_points():
    def with_aux(outputs, x):
        return loss_of(outputs, x), outputs["up"]

    rule = data.functional(network, with_aux)
    sam, w = sam_optax.sam(0.5), jnp.asarray(W)
    gradients = sam_optax.sam_value_and_grad(
        rule.loss_fn, sam, data=rule, has_aux=True, report=True
    )
    (loss, aux), grads = gradients(w, X, opt_state=sam.init(w))
    np.testing.assert_allclose(aux, np.tanh(X @ W))
    point = W + 0.5 * unit(by_hand(W, W))
    perturbed = np.mean(loss_of(network(point, X), X))
    assert grads.report.perturbed_loss == pytest.approx(float(perturbed), rel=1e-10)
    assert grads.report.surrogate_gap == pytest.approx(
        float(perturbed - loss), rel=1e-8
    )


def test_what_does_not_belong_together_is_refused():
    rule = data.functional(network, loss_of)
    sam, w = sam_optax.sam(), jnp.asarray(W)
    other = sam_optax.sam_value_and_grad(lambda w, x: jnp.sum(w), sam, data=rule)
    with pytest.raises(ValueError, match="must be given its own"):
        other(w, X, opt_state=sam.init(w))
    with pytest.raises(TypeError, match="outputs_fn must be a function"):
        data.functional(3, loss_of)
    with pytest.raises(TypeError, match="outputs_loss must be a function"):
        data.functional(network, None)
    calls = []

    def growing(w, x):
        calls.append(w)
        return (x @ w)[: len(calls)]

    rule = data.functional(growing, lambda f, x: jnp.sum(f))
    changing = sam_optax.sam_value_and_grad(rule.loss_fn, sam, data=rule)
    with pytest.raises(ValueError, match="of the same shapes at every point"):
        changing(w, X, opt_state=sam.init(w))


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_the_perturbation_follows_adams_preconditioner(door):
    parts = ascents.divide_by_root_of("nu", 1e-3), ascents.sam(0.5)
    sam = sam_optax.sharpness_aware(ascents.chain(*parts))
    tx = optax.chain(sam, optax.adam(0.1))
    step = jax.jit(door(sam, tx, lambda w: jnp.sum(jnp.cos(w) * jnp.arange(1.0, 4.0))))
    w, state = jnp.asarray(W), tx.init(jnp.asarray(W))
    nu = np.zeros(3)
    for _ in range(3):
        here = np.asarray(w)
        g = -np.sin(here) * np.arange(1.0, 4.0)
        point = here + 0.5 * unit(g / (np.sqrt(nu) + 1e-3))
        d = -np.sin(point) * np.arange(1.0, 4.0)
        np.testing.assert_allclose(optax.tree.get(state, "nu"), nu, rtol=1e-9)
        w, state, _ = step(w, state, nu=optax.tree.get(state, "nu"))
        nu = 0.999 * nu + 0.001 * d**2


def test_a_second_moment_that_is_missing_or_of_another_shape_is_refused():
    part, w = ascents.divide_by_root_of("nu"), jnp.asarray(W)
    with pytest.raises(ValueError, match="'nu', which is missing"):
        part.update(w, part.init(w), w)
    with pytest.raises(ValueError, match="'nu' must be a tree like the parameters"):
        part.update(w, part.init(w), w, nu=jnp.ones(2))
    with pytest.raises(ValueError, match="eps must be >= 0"):
        ascents.divide_by_root_of(eps=-1.0)


@pytest.mark.parametrize("m", [None, 3])
def test_further_points_of_a_descent_come_from_the_ascents_gradient(m):
    """Away from w, the ascent's gradient is not the descent's, under this rule."""
    rule = data.functional(network, loss_of)

    def last_of_two(descent=None):
        two = ascents.ascend_repeatedly(ascents.sam(1.0), 2)
        sam = sam_optax.sharpness_aware(two, descent=descent and descent([two], tilt=0))
        grads_fn = sam_optax.sam_value_and_grad(
            rule.loss_fn, sam, data=rule, m=m, batch_argnums=1
        )
        return grads_fn(jnp.array(W), X, opt_state=sam.init(W))[1].gradients

    assert_trees_close(last_of_two(descents.tilt), last_of_two(), rtol=1e-12)


def test_the_network_runs_once_at_w_and_once_at_the_perturbed_point():
    calls = []

    def counted(w, x):
        calls.append(w)
        return network(w, x)

    rule = data.functional(counted, loss_of)
    sam = sam_optax.sam(0.5)
    helper = sam_optax.sam_value_and_grad(rule.loss_fn, sam, data=rule)
    helper(W, X, opt_state=sam.init(W))
    assert len(calls) == 2


def test_outputs_that_are_no_floats_say_where_to_compute_them():
    rule = data.functional(
        lambda w, x: {"logits": x @ w, "mask": jnp.arange(6)},
        lambda outputs, x: outputs["logits"] * outputs["mask"],
    )
    sam = sam_optax.sam()
    helper = sam_optax.sam_value_and_grad(rule.loss_fn, sam, data=rule)
    with pytest.raises(TypeError, match=r"output\['mask'\] has dtype int"):
        helper(W, X, opt_state=sam.init(W))
