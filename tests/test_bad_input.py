"""What is wrong raises, and the message says what to do instead."""

import functools
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
from lab import all_finite, assert_trees_equal, gradient
from sam_optax import sam_value_and_grad


def state_and_params(tx):
    params = problem.params()
    return tx.init(params), params


# --- The optimizer state, and the transformation given to the helper.


def test_opt_state_is_required():
    sam = sam_optax.sam()
    with pytest.raises(ValueError, match=r"pass opt_state=, the state of the whole"):
        sam_value_and_grad(problem.loss, sam)(problem.params(), problem.batch())


def test_an_optimizer_state_without_a_sam_state():
    state, params = state_and_params(optax.adam(0.1))
    helper = sam_value_and_grad(problem.loss, sam_optax.sam())
    with pytest.raises(ValueError, match=r"no SAM state .*optax.chain\(sam, base\)"):
        helper(params, problem.batch(), opt_state=state)


def test_an_optimizer_state_with_two_sam_states_lists_them():
    sam = sam_optax.sam()
    state, params = state_and_params(optax.chain(sam, sam, optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"2 SAM states \(opt_state\[0\], .*\[1\]\)"):
        sam_value_and_grad(problem.loss, sam)(params, problem.batch(), opt_state=state)


def test_the_whole_chain_passed_as_the_sam_transformation():
    """Unchecked, the learning rate would be applied twice, uphill."""
    tx = optax.chain(sam_optax.sam(), optax.sgd(0.1))
    state, params = state_and_params(tx)
    helper = sam_value_and_grad(problem.loss, tx)
    with pytest.raises(ValueError, match=r"not a chain that contains it"):
        helper(params, problem.batch(), opt_state=state)


@pytest.mark.parametrize(
    "tx", [optax.sgd(0.1), optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1))]
)
def test_a_transformation_that_is_no_sam_at_all(tx):
    state, params = state_and_params(optax.chain(sam_optax.sam(), optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"must be the SAM transformation itself"):
        sam_value_and_grad(problem.loss, tx)(params, problem.batch(), opt_state=state)


def test_something_that_is_no_transformation():
    with pytest.raises(
        TypeError, match=r"must be the SAM transformation.*got function"
    ):
        sam_value_and_grad(problem.loss, lambda g: g)


def test_another_sam_transformation_than_the_one_in_the_chain():
    state, params = state_and_params(optax.chain(sam_optax.sam(), optax.sgd(0.1)))
    helper = sam_value_and_grad(problem.loss, sam_optax.fsam())
    with pytest.raises(ValueError, match=r"opt_state\[0\] was not made by the transf"):
        helper(params, problem.batch(), opt_state=state)


def test_a_state_of_other_parameters():
    sam = sam_optax.fsam()
    state = optax.chain(sam, optax.sgd(0.1)).init({"other": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"or for other parameters"):
        sam_value_and_grad(problem.loss, sam)(
            problem.params(), problem.batch(), opt_state=state
        )


# --- Around the chain: masks and partitions belong inside.


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, {"a": True, "b": False}),
        lambda tx: optax.partition(
            {"sam": tx, "rest": optax.sgd(0.1)}, {"a": "sam", "b": "rest"}
        ),
    ],
    ids=["masked", "partition"],
)
def test_sam_inside_a_mask_or_partition(wrap):
    sam = sam_optax.fsam()
    tx = wrap(optax.chain(sam, optax.sgd(0.1)))
    state, params = state_and_params(tx)
    with pytest.raises(ValueError, match=r"optax.masked or optax.partition.*mask="):
        tx.update(params, state, params, grad_fn=lambda p: p)
    with pytest.raises(ValueError, match=r"optax.masked or optax.partition.*mask="):
        sam_value_and_grad(problem.loss, sam)(params, problem.batch(), opt_state=state)


# --- The loss function.


@pytest.mark.parametrize("name", ["ascend", "opt_state"])
def test_a_loss_parameter_with_a_name_of_ours(name):
    scope = {}
    exec(f"def loss_fn(params, batch, {name}=None): return 0.0", scope)
    with pytest.raises(ValueError, match=rf"parameter named '{name}'"):
        sam_value_and_grad(scope["loss_fn"], sam_optax.sam())


def test_a_loss_without_a_signature_is_accepted():
    sam_value_and_grad(jnp.sum, sam_optax.sam())


def test_has_aux_without_a_pair():
    sam = sam_optax.sam()
    state, params = state_and_params(sam)
    with pytest.raises(TypeError, match=r"must return a pair \(loss, aux\)"):
        sam_value_and_grad(problem.loss, sam, has_aux=True)(
            params, problem.batch(), opt_state=state
        )


def test_a_pair_without_has_aux():
    sam = sam_optax.sam()
    state, params = state_and_params(sam)
    with pytest.raises(TypeError, match=r"pass has_aux=True"):
        sam_value_and_grad(lambda p: (jnp.sum(p["a"]), 1), sam)(params, opt_state=state)


def test_a_loss_with_a_shape_is_averaged():
    def per_example(params, batch):
        x, y = batch
        hidden = jnp.tanh(x @ params["a"] + params["b"]["c"])
        return jnp.square(jnp.sum(hidden, axis=-1) * params["b"]["d"] - y)

    sam = sam_optax.sam(0.1)
    state, params = state_and_params(sam)
    results = []
    for loss_fn in (per_example, problem.loss):
        helper = sam_value_and_grad(loss_fn, sam)
        loss, grads = helper(params, problem.batch(), opt_state=state)
        results.append((loss, sam.update(grads, state, params)[0]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results
    )


# --- grad_fn, ascend, parameters.


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
    with pytest.raises(ValueError, match=r"different structures"):
        sam.update({"a": params["a"]}, state, params, grad_fn=lambda p: p)


@pytest.mark.parametrize("ascend", ["yes", 1, np.ones(2, bool), np.float32(1)])
def test_ascend_must_be_a_bool(ascend):
    sam = sam_optax.sam()
    state, params = state_and_params(sam)
    with pytest.raises(TypeError, match=r"ascend must be a bool or a scalar bool"):
        sam.update(params, state, params, grad_fn=lambda p: p, ascend=ascend)


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
        sam_optax.every_k(k)


def test_a_traced_mask():
    @jax.jit
    def build(keep):
        return sam_optax.sam(mask={"a": keep, "b": True}).init(problem.params())

    with pytest.raises(TypeError, match=r"must be Python bools"):
        build(True)


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
    ],
)
def test_impossible_limits_of_a_schedule(limits, message):
    defaults = {"rho_max": 1.0, "rho_min": 0.0, "learning_rate_max": 0.1}
    with pytest.raises(ValueError, match=message):
        sam_optax.rho_from_learning_rate(lambda step: 0.1, **{**defaults, **limits})


@pytest.mark.parametrize("key", [1.5, "seed", True])
def test_a_key_that_is_no_key(key):
    with pytest.raises(TypeError, match=r"key must be an int or a JAX random key"):
        sam_optax.sam(stochastic_rounding=key)


def test_several_keys():
    with pytest.raises(ValueError, match=r"key must be a single key"):
        sam_optax.sam(stochastic_rounding=jax.random.split(jax.random.key(0)))


@pytest.mark.parametrize("kind", ["int", "typed", "legacy", "rbg"])
def test_every_kind_of_key_is_taken(kind):
    key = {
        "int": 3,
        "typed": jax.random.key(3),
        "legacy": jax.random.PRNGKey(3),
        "rbg": jax.random.key(3, impl="rbg"),
    }[kind]
    sam = sam_optax.sam(rho=1.0, stochastic_rounding=key)
    params = problem.params(jnp.bfloat16)
    state = sam.init(params)
    _, state = sam.update(params, state, params, grad_fn=lambda p: p)
    assert state.rounding_key.dtype == jnp.uint32
    if kind != "rbg":
        _, reference = sam_optax.sam(rho=1.0, stochastic_rounding=3).update(
            params, sam.init(params), params, grad_fn=lambda p: p
        )
        assert_trees_equal(state.rounding_key, reference.rounding_key)


# --- The carrier.


def carried(sam, params, state):
    helper = sam_value_and_grad(problem.loss, sam)
    return helper(params, problem.batch(), opt_state=state)[1]


@pytest.mark.parametrize("name", ["sam", "fsam"])
def test_a_carrier_out_of_a_jitted_function_cannot_be_unpacked_outside(name):
    sam = sam_optax.METHODS[name].make()
    state, params = state_and_params(sam)
    grads = jax.jit(lambda p, s: carried(sam, p, s))(params, state)
    with pytest.raises(ValueError, match=r"another trace.*same jitted function"):
        sam.update(grads, state, params)
    with pytest.raises(ValueError, match=r"another trace.*same jitted function"):
        jax.jit(sam.update)(grads, state, params)


@pytest.mark.parametrize("name", ["sam", "fsam"])
def test_a_carrier_made_eagerly_cannot_be_passed_to_a_jitted_update(name):
    sam = sam_optax.METHODS[name].make()
    state, params = state_and_params(sam)
    grads = carried(sam, params, state)
    with pytest.raises(ValueError, match=r"another trace.*same jitted function"):
        jax.jit(sam.update)(grads, state, params)
    sam.update(grads, state, params)  # eager in both is well


def test_a_carrier_may_be_unpacked_in_an_inner_trace():
    """A user's own cond around the update, inside the same jitted function."""
    sam = sam_optax.fsam()
    state, params = state_and_params(sam)

    @jax.jit
    def step(params, state, skip):
        grads = carried(sam, params, state)
        return jax.lax.cond(
            skip,
            lambda: (jax.tree.map(jnp.zeros_like, params), state),
            lambda: sam.update(grads, state, params),
        )

    expected = sam.update(carried(sam, params, state), state, params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        step(params, state, False),
        expected,
    )
    assert not np.any(step(params, state, True)[0]["a"])


def test_a_carrier_acts_as_its_gradients_alone():
    sam = sam_optax.fsam()
    state, params = state_and_params(sam)
    grads = carried(sam, params, state)
    d, _ = sam.update(grads, state, params)
    assert_trees_equal(grads.gradients, d)
    assert len(jax.tree.leaves(grads)) == len(jax.tree.leaves(d))
    assert optax.tree.norm(grads) == optax.tree.norm(d)
    assert "params" not in grads
    assert grads.report is None
    assert repr(grads).startswith("SharpnessAwareGradients({")
    halved = jax.tree.map(lambda x: x / 2, grads)
    d_halved, halved_state = sam.update(halved, state, params)
    assert_trees_equal(d_halved, jax.tree.map(lambda x: x / 2, d))
    assert_trees_equal(halved_state, sam.update(grads, state, params)[1])


# --- Bad numbers in the middle of training.


def test_a_nan_batch_in_the_middle_of_fsam_training():
    sam = sam_optax.fsam()
    tx = optax.chain(sam, optax.apply_if_finite(optax.sgd(0.1), 3))
    state, params = state_and_params(tx)
    helper = sam_value_and_grad(problem.loss, sam)

    @jax.jit
    def step(params, state, batch):
        _, grads = helper(params, batch, opt_state=state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for t in range(8):
        x, y = problem.batch(t)
        before = params, state[0]
        params, state = step(params, state, (x * jnp.nan, y) if t == 4 else (x, y))
        if t == 4:
            assert_trees_equal((params, state[0]), before)
    assert all_finite((params, state))


def test_an_overflow_is_seen_where_a_rectifier_would_hide_it():
    """At w + NaN the gradient of a relu is zero, and d would be finite."""
    x = jnp.ones((4, 2))

    def loss_fn(w):
        return 1e30 * jnp.sum(1e30 * jax.nn.relu(x @ w))

    w = jnp.array([1.0, 2.0])
    assert not all_finite(jax.grad(loss_fn)(w))
    for name, method in sam_optax.METHODS.items():
        if name in ("random_sam", "rsam"):  # they do not look at this gradient
            continue
        sam = method.make()
        state = sam.init(w)
        d, state = sam.update(
            jax.grad(loss_fn)(w), state, w, grad_fn=jax.grad(loss_fn), ascend=True
        )
        assert not all_finite(d), method
        assert all_finite(state), method


@pytest.mark.parametrize("mask", [True, "kernel", np.bool_(False)])
def test_a_mask_that_is_no_tree(mask):
    for kwargs in ({"mask": mask}, {"adaptive_mask": mask}):
        with pytest.raises(TypeError, match=r"must be a tree of bools.*static_args"):
            sam_optax.asam(**kwargs)


@pytest.mark.parametrize("name", ["mask", "adaptive_mask"])
def test_a_mask_that_inject_hyperparams_takes_for_a_schedule(name):
    def matrices(params):
        return jax.tree.map(lambda w: jnp.ndim(w) > 1, params)

    tx = optax.inject_hyperparams(sam_optax.asam)(rho=0.1, **{name: matrices})
    with pytest.raises(TypeError, match=rf"static_args=\('{name}',\)"):
        tx.init(problem.params())
    tx = optax.inject_hyperparams(sam_optax.asam, static_args=(name,))(
        rho=0.1, **{name: matrices}
    )
    tx.init(problem.params())


def test_a_callable_tree_of_bools_is_no_function():
    class Model(dict):
        def __call__(self):
            raise AssertionError("a mask of this kind is not to be called")

    jax.tree_util.register_pytree_node(
        Model,
        lambda m: (tuple(m.values()), tuple(m)),
        lambda keys, values: Model(zip(keys, values, strict=True)),
    )
    params = Model(kernel=jnp.ones((2, 2)), bias=jnp.ones(2))
    sam = sam_optax.sam(mask=Model(kernel=True, bias=False))
    seen = []
    sam.update(
        params, sam.init(params), params, grad_fn=lambda p: seen.append(p) or params
    )
    assert_trees_equal(seen[0]["bias"], params["bias"])
    assert np.any(seen[0]["kernel"] != params["kernel"])


@pytest.mark.parametrize(
    "kwargs",
    [{"ascent": 0.1}, {"descent": 0.5}, {"cadence": 2}, {"ascent": sam_optax.sam}],
)
def test_axes_of_the_wrong_kind(kwargs):
    with pytest.raises(TypeError, match=r"must be an? (optax|sam_optax)\."):
        sam_optax.sharpness_aware(**{"ascent": sam_optax.sam_ascent(), **kwargs})


def test_the_helper_and_the_chain_disagree_about_injection():
    plain = sam_optax.sam()
    injected = optax.inject_hyperparams(sam_optax.sam)(rho=5.0)
    params = problem.params()
    for given, chained in ((plain, injected), (injected, plain)):
        state = optax.chain(chained, optax.sgd(0.1)).init(params)
        with pytest.raises(ValueError, match=r"one of the two is wrapped"):
            sam_value_and_grad(problem.loss, given)(
                params, problem.batch(), opt_state=state
            )


def test_names_of_the_loss_that_only_look_like_ours():
    sam = sam_optax.sam()
    w = jnp.ones(2)

    def loss_fn(w, params, ascend=0.0):
        return jnp.sum(w) * params + ascend

    bound = functools.partial(loss_fn, ascend=1.0)
    loss, _ = sam_value_and_grad(bound, sam)(w, params=3.0, opt_state=sam.init(w))
    assert loss == 7


def test_a_gradient_of_another_shape():
    sam = sam_optax.sam()
    w = jnp.ones(2)
    with pytest.raises(ValueError, match=r"different structures or shapes"):
        sam.update(jnp.ones((2, 1)), sam.init(w), w, grad_fn=lambda p: p)


def test_a_hyperparameter_that_is_no_scalar():
    with pytest.raises(TypeError, match=r"rho must be a number"):
        sam_optax.sam(rho=jnp.ones(2))
    sam_optax.sam(rho=np.array(0.1))


@pytest.mark.parametrize("p", ["2", True, None])
def test_orders_of_the_norm_of_the_wrong_kind(p):
    with pytest.raises(TypeError, match=r"p must be a number"):
        sam_optax.sam(p=p)


def test_a_narrow_perturbation_takes_no_digits_from_the_parameters():
    def update_fn(updates, state, params=None):
        return jax.tree.map(lambda u: jnp.zeros(u.shape, jnp.bfloat16), updates), state

    ascent = optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)
    sam = sam_optax.sharpness_aware(ascent)
    w, seen = jnp.array([1.001, 2.003]), []
    sam.update(w, sam.init(w), w, grad_fn=lambda p: seen.append(p) or w)
    np.testing.assert_array_equal(seen[0], w)


def test_python_scalars_as_parameters():
    sam = sam_optax.sam(rho=0.5)
    d, _ = sam.update(2.0, sam.init(1.0), 1.0, grad_fn=jax.grad(lambda w: w**2))
    assert d == 3


def test_nothing_is_nan_on_a_healthy_step():
    sam = sam_optax.fsam()
    w = jnp.ones(2)
    with jax.debug_nans(True):
        sam.update(w, sam.init(w), w, grad_fn=lambda p: p)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: sam_optax.surrogate_gap(minimize="gap"), "minimize must be"),
        (lambda: sam_optax.renormalize(0.5, 0.1), "minimum must not be above"),
        (lambda: sam_optax.wsam(gamma=1.0), "gamma must be >= 0 and < 1"),
        (lambda: sam_optax.decoupled_wsam(optax.sgd(0.1), 0.1, gamma=-1), "gamma must"),
        (lambda: sam_optax.ssam(sparsity=1.0), "sparsity must be >= 0 and < 1"),
        (lambda: sam_optax.ssam(refresh_every=0), "refresh_every must be an integer"),
        (lambda: sam_optax.look_sam(k=0), "k must be an integer >= 1"),
        (lambda: sam_optax.multi_step_sam(steps=0), "steps must be an integer >= 1"),
        (lambda: sam_optax.rst(probability=1.5), "probability must be >= 0 and <= 1"),
        (lambda: sam_optax.esam(beta=0.0), "keep must be > 0"),
    ],
)
def test_impossible_arguments_of_methods(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("sparsity", [jnp.float32(0.5), lambda step: 0.5])
def test_what_decides_counts_is_neither_traced_nor_scheduled(sparsity):
    with pytest.raises(TypeError, match=r"static_args=\('sparsity',\)"):
        sam_optax.ssam(sparsity=sparsity)


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
    fisher = sam_optax.scale_by_inverse_root_fisher()
    with pytest.raises(ValueError, match=r"needs ascent_gradient="):
        fisher.update(w, fisher.init(w), w)
    repeated = sam_optax.ascend_repeatedly(sam_optax.sam_ascent(), 2)
    with pytest.raises(ValueError, match=r"ascend_repeatedly needs grad_fn="):
        repeated.update(w, repeated.init(w), w)


@pytest.mark.parametrize("name", ["fsam", "look_sam", "ssam", "esam"])
def test_optax_can_map_over_what_the_state_holds_of_the_parameters(name):
    """It initialises the state with a placeholder in place of the parameters."""
    tx = optax.chain(sam_optax.METHODS[name].make(), optax.adam(0.1))
    state = tx.init(problem.params())
    same = optax.tree_utils.tree_map_params(tx, lambda leaf: leaf, state)
    assert_trees_equal(same, state)
