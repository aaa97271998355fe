"""What is wrong raises, and the message says what to do instead."""

import functools
import inspect
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import problem
import sam_optax
from lab import gradient
from sam_optax import sam_value_and_grad


def state_and_params(tx):
    params = problem.params()
    return tx.init(params), params


# --- The loss function.


@pytest.mark.parametrize("name", ["ascend", "opt_state"])
def test_a_loss_parameter_with_a_name_of_ours(name):
    scope = {}
    exec(f"def loss_fn(params, batch, {name}=None): return 0.0", scope)
    with pytest.raises(ValueError, match=rf"parameter named '{name}'"):
        sam_value_and_grad(scope["loss_fn"], sam_optax.sam())


def test_a_loss_without_a_signature_is_accepted():
    sam_value_and_grad(jnp.sum, sam_optax.sam())


def test_names_of_the_loss_that_only_look_like_ours():
    sam = sam_optax.sam()
    w = jnp.ones(2)

    def loss_fn(w, params, ascend=0.0):
        return jnp.sum(w) * params + ascend

    bound = functools.partial(loss_fn, ascend=1.0)
    loss, _ = sam_value_and_grad(bound, sam)(w, params=3.0, opt_state=sam.init(w))
    assert loss == 7


def test_has_aux_without_a_pair():
    sam = sam_optax.sam()
    state, params = state_and_params(sam)
    with pytest.raises(TypeError, match=r"must return a pair \(loss, aux\)"):
        sam_value_and_grad(problem.loss, sam, has_aux=True)(
            params, problem.batch(), opt_state=state
        )


@pytest.mark.parametrize("count", [1, 3])
def test_has_aux_with_other_than_a_pair(count):
    helper = sam_optax.value_and_ascent_grad(
        lambda w: (jnp.sum(w),) * count, has_aux=True
    )
    with pytest.raises(TypeError, match=r"must return a pair \(loss, aux\)"):
        helper(jnp.ones(2))


def test_a_pair_without_has_aux():
    sam = sam_optax.sam()
    state, params = state_and_params(sam)
    with pytest.raises(TypeError, match=r"pass has_aux=True"):
        sam_value_and_grad(lambda p: (jnp.sum(p["a"]), 1), sam)(params, opt_state=state)


# --- Gradients and parameters.


@pytest.mark.parametrize("mistake", ["has_aux", "value_and_grad", "shape"])
def test_a_grad_fn_that_returns_no_gradient(mistake):
    sam = sam_optax.sam()
    state, params = state_and_params(sam)
    g = gradient(params, problem.batch())
    returns = {
        "has_aux": (g, {"accuracy": 1.0}),
        "value_and_grad": (jnp.ones(()), g),
        "shape": jax.tree.map(lambda x: x[None], g),
    }[mistake]
    with pytest.raises(
        ValueError, match=r"grad_fn must return the gradient alone.*\[0"
    ):
        sam.update(g, state, params, grad_fn=lambda p: returns)


def test_a_gradient_of_another_structure():
    sam = sam_optax.sam()
    state, params = state_and_params(sam)
    with pytest.raises(
        ValueError, match=r"In this gradient, \['b'\]\['c'\] is missing"
    ):
        sam.update({"a": params["a"]}, state, params, grad_fn=lambda p: p)


def test_a_gradient_of_another_shape():
    sam = sam_optax.sam()
    w = jnp.ones(2)
    with pytest.raises(ValueError, match=r"it has shape \(2, 1\) in place of \(2,\)"):
        sam.update(jnp.ones((2, 1)), sam.init(w), w, grad_fn=lambda p: p)


def test_integer_parameters():
    sam = sam_optax.sam()
    params = {"w": jnp.ones(2), "steps": jnp.arange(3)}
    with pytest.raises(TypeError, match=r"params\['steps'\] is int32: only floating-p"):
        sam.update(params, sam.init(params), params, grad_fn=lambda p: p)


def test_complex_parameters():
    sam = sam_optax.sam()
    params = {"w": jnp.ones(2, jnp.complex64)}
    with pytest.raises(TypeError, match=r"params\['w'\] is complex64: .*conjugate"):
        sam.update(params, sam.init(params), params, grad_fn=lambda p: p)


def test_python_scalars_as_parameters():
    sam = sam_optax.sam(rho=0.5)
    d, _ = sam.update(2.0, sam.init(1.0), 1.0, grad_fn=jax.grad(lambda w: w**2))
    assert d == 3


# --- Building.


@pytest.mark.parametrize("p", [0.5, 0, -1, float("nan")])
def test_impossible_orders_of_the_norm(p):
    with pytest.raises(ValueError, match=r"p must be >= 1"):
        sam_optax.sam(p=p)


def test_the_order_of_the_norm_is_static():
    tx = optax.inject_hyperparams(sam_optax.sam)(rho=0.1, p=3)
    with pytest.raises(TypeError, match=r"pass static_args=\('p',\)"):
        tx.init(problem.params())


@pytest.mark.parametrize("k", [0, -1, 2.5, True, "2"])
def test_impossible_periods(k):
    with pytest.raises(ValueError, match=r"k must be an integer >= 1"):
        sam_optax.cadences.every_k(k)


def test_a_learning_rate_that_is_no_schedule():
    with pytest.raises(TypeError, match=r"learning_rate must be a schedule"):
        sam_optax.rho_from_learning_rate(
            0.1, rho_max=1.0, rho_min=0.0, learning_rate_max=0.1
        )


@pytest.mark.parametrize(
    "limits, message",
    [
        ({"rho_max": -1.0}, "rho_max must be >= 0"),
        ({"rho_min": -1.0}, "rho_min must be >= 0"),
        ({"learning_rate_min": 0.1}, "learning_rate_max must be above"),
        ({"learning_rate_min": 0.2}, "learning_rate_max must be above"),
    ],
)
def test_impossible_limits_of_a_schedule(limits, message):
    defaults = {"rho_max": 1.0, "rho_min": 0.0, "learning_rate_max": 0.1}
    with pytest.raises(ValueError, match=message):
        sam_optax.rho_from_learning_rate(lambda step: 0.1, **{**defaults, **limits})


@pytest.mark.parametrize(
    "kwargs",
    [{"ascent": 0.1}, {"descent": 0.5}, {"cadence": 2}, {"ascent": sam_optax.sam}],
)
def test_axes_of_the_wrong_kind(kwargs):
    with pytest.raises(TypeError, match=r"must be an? (optax|sam_optax)\."):
        sam_optax.sharpness_aware(**{"ascent": sam_optax.ascents.sam(), **kwargs})


def test_a_hyperparameter_that_is_no_scalar():
    with pytest.raises(TypeError, match=r"rho must be a number"):
        sam_optax.sam(rho=jnp.ones(2))
    sam_optax.sam(rho=np.array(0.1))


@pytest.mark.parametrize("p", ["2", True])
def test_orders_of_the_norm_of_the_wrong_kind(p):
    for make in (sam_optax.sam, sam_optax.ascents.sam):
        with pytest.raises(TypeError, match=r"p must be a number"):
            make(p=p)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: sam_optax.descents.gsam(minimize="gap"), "minimize must be"),
        (lambda: sam_optax.descents.renormalize(0.5, 0.1), "minimum must not be above"),
        (lambda: sam_optax.wsam(gamma=1.0), "gamma must be >= 0 and < 1"),
        (lambda: sam_optax.decoupled_wsam(optax.sgd(0.1), 0.1, gamma=-1), "gamma must"),
        (lambda: sam_optax.ssam(sparsity=1.0), "sparsity must be >= 0 and < 1"),
        (lambda: sam_optax.ssam(refresh_every=0), "refresh_every must be an integer"),
        (lambda: sam_optax.look_sam(k=0), "k must be an integer >= 1"),
        (lambda: sam_optax.multi_step_sam(steps=0), "steps must be an integer >= 1"),
        (lambda: sam_optax.rst(probability=1.5), "probability must be >= 0 and <= 1"),
        (lambda: sam_optax.esam(beta=0.0), "beta must be > 0"),
    ],
)
def test_impossible_arguments_of_methods(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", sam_optax.METHODS)
def test_a_number_of_the_wrong_kind_is_called_by_its_name(name):
    make = getattr(sam_optax, name)
    numbers = [
        argument.name
        for argument in inspect.signature(make).parameters.values()
        if any(kind in str(argument.annotation) for kind in ("float", "'int'"))
    ]
    assert "rho" in numbers
    for argument in numbers:
        with pytest.raises((TypeError, ValueError), match=f"^{argument} must be"):
            make(**{argument: "text"})


@pytest.mark.parametrize("sparsity", [jnp.float32(0.5), lambda step: 0.5])
def test_what_decides_counts_is_neither_traced_nor_scheduled(sparsity):
    with pytest.raises(TypeError, match=r"static_args=\('sparsity',\)"):
        sam_optax.ssam(sparsity=sparsity)


BSAM = {"learning_rate": 0.1, "examples": 100.0}
COUNTS = {"class_counts": [2, 3]}
LOGITS = {"logits": jnp.zeros((1, 2)), "labels": jnp.zeros(1, int)}


@pytest.mark.parametrize(
    ("make", "name", "others"),
    [
        *((sam_optax.bsam, name, BSAM) for name in ("examples", "beta1", "beta2")),
        *((sam_optax.bsam, name, BSAM) for name in ("weight_decay", "damping")),
        (sam_optax.bsam, "initial_precision", BSAM),
        *((sam_optax.entropy_sgd, name, {}) for name in ("walk_rate", "decay")),
        *((sam_optax.polyak_sam, name, {}) for name in ("lower_bound", "max_step")),
        (sam_optax.polyak_sam, "weight_decay", {}),
        (sam_optax.tsam, "radius", {}),
        (sam_optax.ascents.given_direction, "sign", {}),
        *((sam_optax.mesa, name, {}) for name in ("start", "stop")),
        *((sam_optax.data.focal_weights, name, COUNTS) for name in ("gamma",)),
        (sam_optax.data.focal_weights, "sharpness", COUNTS),
        *((sam_optax.bisam_loss, name, LOGITS) for name in ("mu", "alpha")),
    ],
)
def test_what_cannot_follow_a_schedule_says_so_at_once(make, name, others):
    with pytest.raises(TypeError, match=f"{name} must be .* and cannot be a schedule"):
        make(**(others | {name: lambda step: 0.5}))


@pytest.mark.parametrize("none", [math.inf, float("inf"), np.inf, np.float64("inf")])
def test_no_bound_of_the_renormalisation_is_any_infinity(none):
    assert sam_optax.stable_sam(maximum=none)


def test_to_build_a_method_starts_no_devices():
    """`jax.distributed.initialize` may come after."""
    program = """
import jax, sam_optax
from jax._src import xla_bridge
for method in sam_optax.METHODS.values():
    method.make()
sam_optax.sam(stochastic_rounding=1)
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_sigma_is_a_number_or_cosine():
    with pytest.raises(TypeError, match=r"sigma must be a number or 'cosine'"):
        sam_optax.fsam(sigma="cos")


def test_parts_that_need_more_say_so():
    w = jnp.ones(2)
    fisher = sam_optax.ascents.scale_by_inverse_root_fisher()
    with pytest.raises(ValueError, match=r"needs ascent_gradient="):
        fisher.update(w, fisher.init(w), w)
    repeated = sam_optax.ascents.ascend_repeatedly(sam_optax.ascents.sam(), 2)
    with pytest.raises(ValueError, match=r"ascend_repeatedly needs grad_fn="):
        repeated.update(w, repeated.init(w), w)


# --- Parts and numbers of the wrong kind.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sam_optax.polyak_sam(max_step=np.float32(-1)), "max_step must be > 0"),
        (lambda: sam_optax.esam(beta=np.float32(0)), "beta must be > 0"),
        (lambda: sam_optax.mesa(temperature=np.float32(0)), "temperature must be > 0"),
        (
            lambda: sam_optax.mesa(start=np.int64(5), stop=np.int64(2)),
            "stop must be after start, 5, got 2",
        ),
        (
            lambda: sam_optax.stable_sam(minimum=np.float32(2), maximum=np.float32(1)),
            "minimum must not be above",
        ),
        (
            lambda: sam_optax.bisam_loss(jnp.zeros((1, 2)), 0, mu=np.float64(0)),
            "mu must be > 0",
        ),
        (
            lambda: sam_optax.bsam(**BSAM, initial_precision=np.float32(0)),
            "initial_precision must be > 0",
        ),
        (
            lambda: sam_optax.decoupled_wsam(optax.sgd(0.1), -0.1),
            "learning_rate must be >= 0",
        ),
    ],
)
def test_numbers_of_numpy_have_the_same_bounds(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_no_largest_step_is_any_infinity():
    assert sam_optax.polyak_sam(max_step=np.float32("inf"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sam_optax.ascents.chain(0.1), "part of a chain must be an optax"),
        (lambda: sam_optax.ascents.following(0.1, None), "ascent must be an optax"),
        (lambda: sam_optax.ascents.with_state_dtype(0.1), "ascent must be an optax"),
        (lambda: sam_optax.cadences.reusing(0.1), "cadence must be a sam_optax"),
        (lambda: sam_optax.lookbehind_sam(0.1), "base must be an optax"),
        (
            lambda: sam_optax.lookbehind_sam(optax.sgd(0.1), ascent=0.1),
            "ascent must be an optax",
        ),
        (
            lambda: sam_optax.decoupled_wsam(0.1, optax.sgd(0.1)),
            "base must be an optax",
        ),
        (
            lambda: sam_optax.decoupled_wsam(optax.sgd(0.1), None),
            "learning_rate must be a number",
        ),
        (
            lambda: sam_optax.value_and_ascent_grad(jnp.sum, foo=1),
            "unknown option 'foo'; it takes value_at, ",
        ),
    ],
)
def test_parts_of_the_wrong_kind(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    "nested",
    [
        lambda: sam_optax.ascents.chain(sam_optax.sam(), sam_optax.ascents.sam()),
        lambda: sam_optax.ascents.ascend_repeatedly(sam_optax.sam(), 2),
    ],
)
def test_a_whole_method_inside_of_an_ascent(nested):
    sam = sam_optax.sharpness_aware(nested())
    w = jnp.ones(2)
    with pytest.raises(ValueError, match="a whole SAM transformation, such as"):
        sam.update(w, sam.init(w), w, grad_fn=lambda point: point)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("bsam", lambda: sam_optax.bsam(**BSAM)),
        ("polyak_sam", lambda: sam_optax.polyak_sam(weight_decay=0.1)),
        ("lookbehind_sam", lambda: sam_optax.lookbehind_sam(optax.sgd(0.1))),
    ],
)
def test_an_optimizer_that_needs_the_parameters_says_so(name, make):
    sam, tx = make()
    w = jnp.ones(2)
    state = tx.init(w)
    _, grads = sam_value_and_grad(jnp.sum, sam)(w, opt_state=state)
    with pytest.raises(ValueError, match=f"{name} needs the parameters"):
        tx.update(grads, state)


def test_labels_bound_by_a_partial_that_something_has_wrapped():
    def loss(w, x, y):
        return jnp.mean((x @ w - y) ** 2)

    w, x, y = jnp.ones((3, 1)), jnp.ones((4, 3)), jnp.ones((4, 1))
    bound = jax.jit(functools.partial(loss, y=y))
    with pytest.raises(ValueError, match=r"bound by functools\.partial"):
        sam_optax.value_and_ascent_grad(bound, m=1)(w, x)
