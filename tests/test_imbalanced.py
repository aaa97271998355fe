"""Rules that perturb some examples more than others, against the same by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sam_optax
from lab import assert_trees_close, assert_trees_equal
from sam_optax.data import focal_sam, focal_weights, imb_sam

RHO = 0.3
BOTH = {"batch_argnums": (1, 2)}
BY_CLASS = jnp.array([0.1, 0.4, 0.9])
HOW_MUCH = {  # the weights of an example's perturbed and of its unperturbed loss
    "imb_sam": (imb_sam(lambda x, y: y == 2), lambda y: (y == 2, y != 2)),
    "imb_sam_as_released": (
        imb_sam(lambda x, y: y == 2, as_released=True),
        lambda y: (2 * (y == 2), y != 2),
    ),
    "focal_sam": (
        focal_sam(lambda x, y: BY_CLASS[y]),
        lambda y: (BY_CLASS[y], 1 - BY_CLASS[y]),
    ),
}


@pytest.fixture(params=HOW_MUCH)
def rule_and_weights(request):
    return HOW_MUCH[request.param]


def losses(w, x, y):
    logits = jnp.tanh(x @ w["in"]) @ w["out"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)[:, 0]


def weighted_mean(w, x, y, weights):
    return jnp.mean(losses(w, x, y) * weights)


gradient = jax.grad(weighted_mean)


def make_params():
    keys = jax.random.split(jax.random.key(3))
    return {
        "in": jax.random.normal(keys[0], (4, 6)),
        "out": jax.random.normal(keys[1], (6, 3)),
    }


def make_batch(size=12):
    rng = np.random.default_rng(0)
    y = np.arange(size) % 4 % 3  # the classes are not equally frequent
    return jnp.asarray(rng.normal(size=(size, 4)), jnp.float32), jnp.asarray(y)


def perturbed(w, g):
    norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(g)))
    return jax.tree.map(lambda w, g: w + RHO * g / norm, w, g)


def by_hand(w, x, y, weights):
    """(gᵃ, its loss, that loss at w)."""
    moved, rest = weights(y)
    there = perturbed(w, gradient(w, x, y, moved))
    ga = jax.tree.map(jnp.add, gradient(there, x, y, moved), gradient(w, x, y, rest))
    low = weighted_mean(w, x, y, rest)
    high = weighted_mean(there, x, y, moved) + low
    return ga, high, weighted_mean(w, x, y, moved) + low


def take(rule, *, sam=None, **options):
    """(loss, gradients) of a step."""
    sam = sam_optax.sam(RHO) if sam is None else sam
    call = {name: options.pop(name) for name in ("ascend",) if name in options}
    helper = sam_optax.sam_value_and_grad(losses, sam, data=rule, **BOTH, **options)
    w = make_params()
    return helper(w, *make_batch(), opt_state=sam.init(w), **call)


def test_a_part_is_perturbed_and_the_rest_is_not(rule_and_weights):
    rule, weights = rule_and_weights
    loss, grads = take(rule, report=True)
    ga, high, low = by_hand(make_params(), *make_batch(), weights)
    assert_trees_close(grads.gradients, ga, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss, losses(make_params(), *make_batch()).mean())
    np.testing.assert_allclose(grads.report.perturbed_loss, high, rtol=1e-5)
    np.testing.assert_allclose(grads.report.surrogate_gap, high - low, rtol=1e-3)


def test_a_step_that_does_not_ascend_descends_on_both_parts(rule_and_weights):
    rule, weights = rule_and_weights
    w, batch = make_params(), make_batch()
    moved, rest = weights(batch[1])
    plain = gradient(w, *batch, moved + rest)
    for ascend in (False, jnp.asarray(False)):
        _, grads = take(rule, ascend=ascend)
        assert_trees_close(grads.gradients, plain, rtol=1e-4, atol=1e-6)


def test_the_second_gradient_is_compared_with_that_of_both_parts(rule_and_weights):
    """WSAM with γ = ¾ descends on g + 3 (gᵃ − g)."""
    rule, weights = rule_and_weights
    _, grads = take(rule, sam=sam_optax.wsam(RHO, 0.75))
    w, batch = make_params(), make_batch()
    moved, rest = weights(batch[1])
    ga, _, _ = by_hand(w, *batch, weights)
    wanted = jax.tree.map(
        lambda g, ga: g + 3 * (ga - g), gradient(w, *batch, moved + rest), ga
    )
    assert_trees_close(grads.gradients, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("map_groups", ["vmap", "scan"])
def test_each_group_weighs_its_own_examples(rule_and_weights, map_groups):
    """The classes of the second group of 4 are others than those of the first."""
    rule, weights = rule_and_weights
    w, (x, y) = make_params(), make_batch()
    y = y.at[4:8].set(2)
    sam = sam_optax.sam(RHO)
    helper = sam_optax.sam_value_and_grad(
        losses, sam, data=rule, m=4, map_groups=map_groups, **BOTH
    )
    _, grads = helper(w, x, y, opt_state=sam.init(w))
    parts = [by_hand(w, x[i : i + 4], y[i : i + 4], weights)[0] for i in (0, 4, 8)]
    wanted = jax.tree.map(lambda *g: sum(g) / 3, *parts)
    assert_trees_close(grads.gradients, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [imb_sam, focal_sam])
def test_on_a_mesh_with_explicit_axes(rule):
    def weights(x, y):
        by_class = jnp.array([0.1, 0.4, 0.9])
        return y == 2 if rule is imb_sam else jax.nn.one_hot(y, 3) @ by_class

    def step(w, x, y):
        sam = sam_optax.sam(RHO)
        helper = sam_optax.sam_value_and_grad(
            summed_losses, sam, data=rule(weights), **BOTH
        )
        return helper(w, x, y, opt_state=sam.init(w))[1].gradients

    def summed_losses(w, x, y):
        log_odds = jax.nn.log_softmax(jnp.tanh(x @ w["in"]) @ w["out"])
        return -jnp.sum(log_odds * jax.nn.one_hot(y, 3), -1)

    w, batch = make_params(), make_batch()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    spread, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in (("data",), ())
    )
    with jax.set_mesh(mesh):
        found = jax.jit(step)(jax.device_put(w, whole), *jax.device_put(batch, spread))
    assert_trees_close(jax.device_get(found), step(w, *batch), rtol=1e-4, atol=1e-6)


def test_without_an_example_of_the_tail_nothing_is_perturbed():
    _, grads = take(imb_sam(lambda x, y: y == 7))
    w, (x, y) = make_params(), make_batch()
    assert_trees_close(
        grads.gradients, gradient(w, x, y, jnp.ones(12)), rtol=1e-4, atol=1e-6
    )


def test_weights_of_one_are_sam():
    _, grads = take(focal_sam(lambda x, y: jnp.ones(12)))
    _, plain = take(None)
    assert_trees_close(grads.gradients, plain.gradients, rtol=1e-5, atol=1e-6)


def test_the_price_in_plain_gradients():
    """Three backward passes and two forward ones; forward is 2 of 5 products."""

    def wide(w, x, y):
        return jnp.square(jnp.sum(jnp.tanh(x @ w["in"]) @ w["out"], -1) - y)

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    w = {"in": jnp.ones((64, 64)), "out": jnp.ones((64, 64))}
    batch = jnp.ones((32, 64)), jnp.arange(32.0)
    sam = sam_optax.sam(RHO)
    rule = imb_sam(lambda x, y: y > 20)
    helper = sam_optax.sam_value_and_grad(wide, sam, data=rule, **BOTH)
    cost = flops(lambda *b: helper(w, *b, opt_state=sam.init(w))[1].gradients, *batch)
    plain = flops(jax.grad(lambda w, *b: wide(w, *b).mean()), w, *batch)
    assert cost / plain == pytest.approx(2 * 0.4 + 3 * 0.6, rel=0.1)


def test_focal_weights_are_those_of_the_paper():
    np.testing.assert_allclose(
        focal_weights([500, 120, 30], 2.0, 0.8),
        0.8 * (1 - np.array([500, 120, 30]) / 650) ** 2,
        rtol=1e-6,
    )
    assert_trees_equal(focal_weights([5, 1], gamma=0.0), jnp.array([0.5, 0.5]))


# --- Bad input.


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (imb_sam(lambda x, y: y), TypeError, "a bool for each example, got .* int32"),
        (imb_sam(lambda x, y: y[:3] == 2), ValueError, r"\(12,\).*got shape \(3,\)"),
        (focal_sam(lambda x, y: 0.5), ValueError, r"one for each example.*shape \(\)"),
    ],
)
def test_weights_that_do_not_fit_the_examples(rule, error, message):
    with pytest.raises(error, match=message):
        take(rule)


def test_losses_must_be_those_of_the_examples():
    def mean_loss(w, x, y):
        return losses(w, x, y).mean()

    helper = sam_optax.value_and_ascent_grad(
        mean_loss, data=HOW_MUCH["focal_sam"][0], **BOTH
    )
    with pytest.raises(ValueError, match=r"one loss per example.*not their mean"):
        helper(make_params(), *make_batch())


@pytest.mark.parametrize("rule", [imb_sam, focal_sam])
def test_an_array_is_not_a_function_of_the_examples(rule):
    with pytest.raises(TypeError, match="must be a function of the examples"):
        rule(jnp.ones(12))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_counts": [3, -1]}, "class_counts must be"),
        ({"class_counts": [0, 0]}, "class_counts must be"),
        ({"class_counts": 5}, "class_counts must be"),
        ({"class_counts": [1, 2], "gamma": -1.0}, "gamma must be"),
        ({"class_counts": [1, 2], "sharpness": -1.0}, "sharpness must be"),
    ],
)
def test_focal_weights_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        focal_weights(**arguments)
