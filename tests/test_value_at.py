"""Where the value of a step comes from, and an ascent with a loss of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import sam_optax
import sam_optax.nnx
from devices import table
from doors import DOORS
from lab import assert_trees_close
from quadratic import split, whole

pytestmark = pytest.mark.usefixtures("double_precision")

X = np.random.default_rng(0).normal(size=(8, 3))
W = np.array([1.0, -2.0, 0.5])


def loss_fn(w, x):
    """With an auxiliary output that tells where it was taken, and on what."""
    v = jnp.concatenate([w["x"], w["y"]])
    predictions = x @ v
    return jnp.mean(jnp.square(predictions) + predictions), (v, jnp.sum(x))


def by_hand(w, x=X):
    w = jnp.asarray(w)
    return np.asarray(np.mean((x @ w) ** 2 + x @ w))


def gradient(w, x=X):
    return 2 * x.T @ (x @ w) / len(x) + x.mean(0)


def unit(v):
    return v / np.linalg.norm(v)


def value_of(first):
    return getattr(first, "value", first)


def take_step(door, sam, w, state, x=X, *, tx=None, ascend=None, **options):
    """(next w, next state, (loss, aux)) through a door, jitted."""
    tx = tx or optax.chain(sam, optax.sgd(0.1))
    options = {"value_at": "perturbed", "has_aux": True} | options

    @jax.jit
    def step(w, state, x):
        if door == "door1":
            helper = sam_optax.sam_value_and_grad(loss_fn, sam, **options)
            value, d = helper(w, x, opt_state=state, ascend=ascend)
            extra = {}
        else:
            helper = sam_optax.value_and_ascent_grad(loss_fn, **options)
            value, d, extra = helper(w, x)
            extra |= {} if ascend is None else {"ascend": ascend}
        updates, state = tx.update(d, state, w, **extra)
        return optax.apply_updates(w, updates), state, value_of(value)

    return step(w, state, x)


@pytest.mark.parametrize("door", DOORS)
def test_the_value_is_that_of_the_pass_at_w_plus_epsilon(door):
    sam = sam_optax.sam(0.5)
    tx = optax.chain(sam, optax.sgd(0.1))
    w, state = split(W), tx.init(split(W))
    for _ in range(2):
        here = whole(w)
        point = here + 0.5 * unit(gradient(here))
        w, state, (loss, (seen, total)) = take_step(door, sam, w, state)
        np.testing.assert_allclose(seen, point, rtol=1e-12)
        assert loss == pytest.approx(by_hand(point), rel=1e-12)
        assert total == pytest.approx(X.sum())
        np.testing.assert_allclose(whole(w), here - 0.1 * gradient(point), rtol=1e-12)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "ascent", [sam_optax.ascents.sam(0.5), sam_optax.ascents.msam()]
)
@pytest.mark.parametrize("ascend", [False, None], ids=["known", "traced"])
def test_the_value_of_a_step_without_ascent_is_at_w(door, ascent, ascend):
    cadence = None if ascend is False else sam_optax.cadences.after(1)
    sam = sam_optax.sharpness_aware(ascent, cadence=cadence)
    tx = optax.chain(sam, optax.sgd(0.1))
    w, state, (loss, (seen, _)) = take_step(
        door, sam, split(W), tx.init(split(W)), ascend=ascend
    )
    np.testing.assert_array_equal(seen, W)
    assert loss == pytest.approx(by_hand(W), rel=1e-12)
    if ascend is None:  # and on the next step it is at w + ε
        here = whole(w)
        _, _, (loss, (seen, _)) = take_step(door, sam, w, state)
        length = 0.5 if ascent.uses_gradient else 0.3
        assert np.linalg.norm(seen - here) == pytest.approx(length)
        assert loss == pytest.approx(by_hand(np.asarray(seen)), rel=1e-12)


def test_without_an_auxiliary_output_the_value_is_the_loss_alone():
    sam = sam_optax.sam(0.5)
    tx = optax.chain(sam, optax.sgd(0.1))
    expected = by_hand(W + 0.5 * unit(gradient(W)))
    for door in DOORS.values():

        def scalar(w, x):
            return loss_fn(w, x)[0]

        step = door(sam, tx, scalar, value_at="perturbed")
        _, _, loss = step(split(W), tx.init(split(W)), X)
        assert value_of(loss) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("door", DOORS)
def test_a_data_rule_says_on_which_examples_the_value_is(door):
    """On those that the step descends on."""
    sam = sam_optax.sam(0.5)
    tx = optax.chain(sam, optax.sgd(0.1))
    rule = sam_optax.data.sub_batch(0.5)
    _, _, (loss, (seen, total)) = take_step(
        door, sam, split(W), tx.init(split(W)), data=rule
    )
    point = W + 0.5 * unit(gradient(W, X[::2]))
    np.testing.assert_allclose(seen, point, rtol=1e-12)
    assert loss == pytest.approx(by_hand(point), rel=1e-12)
    assert total == pytest.approx(X.sum())


def test_an_output_of_each_example_needs_a_step_that_is_known_to_ascend():
    """The rule keeps 2 of 8 examples, and the step without ascent sees all."""

    def losses(w, x):
        return jnp.square(x @ w), {"predictions": x @ w}

    sam = sam_optax.sam_every_k(k=2)
    helper = sam_optax.sam_value_and_grad(
        losses,
        sam,
        has_aux=True,
        data=sam_optax.data.k_sam(2),
        value_at="perturbed",
    )
    take = functools.partial(helper, W, X, opt_state=sam.init(W))
    with pytest.raises(ValueError, match=r"\['predictions'\] has shape \(8,\) in"):
        jax.jit(lambda state: helper(W, X, opt_state=state)[0])(sam.init(W))
    for ascend, size in ((True, 2), (False, 8)):
        (_, aux), _ = take(ascend=ascend)
        assert aux["predictions"].shape == (size,)


@pytest.mark.parametrize("check_vma", [True, False])
def test_over_devices_the_loss_is_the_mean_and_the_rest_is_the_devices_own(check_vma):
    sam = sam_optax.msam(0.5, 0.0)
    tx = optax.chain(sam, optax.sgd(0.1))
    mesh = table.make_mesh(i=4)

    def step(w, state, x):
        helper = sam_optax.sam_value_and_grad(
            loss_fn, sam, has_aux=True, value_at="perturbed", axis_name="i"
        )
        (loss, (_, total)), d = helper(w, x, opt_state=state)
        updates, state = tx.update(d, state, w)
        return optax.apply_updates(w, updates), state, loss, total[None]

    step = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(P(), P(), P("i")),
            out_specs=(P(), P(), P(), P("i")),
            check_vma=check_vma,
        )
    )
    w, state, loss, totals = step(split(W), tx.init(split(W)), X)
    assert loss == pytest.approx(by_hand(W), rel=1e-12)
    point = whole(w) - 0.5 * unit(gradient(W))
    here = whole(w)
    w, state, loss, totals = step(w, state, X)
    assert loss == pytest.approx(by_hand(point), rel=1e-12)
    np.testing.assert_allclose(totals, X.reshape(4, 2, 3).sum((1, 2)))
    np.testing.assert_allclose(whole(w), here - 0.1 * gradient(point), rtol=1e-12)


@pytest.mark.parametrize(
    "helper",
    [
        functools.partial(sam_optax.sam_value_and_grad, loss_fn, sam_optax.sam()),
        functools.partial(sam_optax.value_and_ascent_grad, loss_fn),
        functools.partial(sam_optax.nnx.value_and_ascent_grad, loss_fn),
    ],
)
def test_a_value_of_several_perturbations_is_refused(helper):
    for options in (
        {"m": 2},
        {"axis_name": "i", "sync_perturbation": False},
        {"axis_name": ("i", "j"), "sync_perturbation": "i"},
        {"axis_name": "i", "axis_index_groups": [[0, 1], [2, 3]]},
    ):
        with pytest.raises(ValueError, match="a loss and auxiliary output of its own"):
            helper(value_at="perturbed", **options)
    helper(value_at="perturbed", axis_name=("i", "j"))
    with pytest.raises(ValueError, match="must be 'parameters' or 'perturbed'"):
        helper(value_at="w")


def test_a_value_that_is_read_too_early_says_so():
    helper = sam_optax.value_and_ascent_grad(
        loss_fn, has_aux=True, value_at="perturbed"
    )
    value, *_ = helper(split(W), X)
    with pytest.raises(ValueError, match="There is no loss yet"):
        _ = value.value


class Model(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.asarray(W, jnp.float32))
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0))
        self.seen = nnx.Variable(jnp.zeros(3, jnp.float32))

    def __call__(self, x):
        self.seen[...] = self.w[...]
        return self.norm(x * self.w[...])


def model_loss(model, x):
    out = model(x)
    return jnp.mean(jnp.sum(out + model.w[...] ** 2, axis=-1)), out.shape[0]


@pytest.mark.parametrize("value_at", ["parameters", "perturbed"])
@pytest.mark.parametrize("has_aux", [True, False])
def test_nnx_variables_advance_in_the_pass_that_gives_the_value(value_at, has_aux):
    model = Model()
    optimizer = nnx.Optimizer(
        model, optax.chain(sam_optax.sam(0.5), optax.sgd(0.1)), wrt=nnx.Param
    )
    gradients = sam_optax.nnx.value_and_ascent_grad(
        model_loss if has_aux else lambda m, x: model_loss(m, x)[0],
        has_aux=has_aux,
        value_at=value_at,
    )

    @nnx.jit
    def step(model, optimizer, x):
        value, grads, extra_args = gradients(model, x)
        optimizer.update(model, grads, **extra_args)
        return value_of(value)

    value = step(model, optimizer, X.astype(np.float32))
    loss, count = value if has_aux else (value, 8)
    assert count == 8
    shift = np.linalg.norm(model.seen[...] - W)
    # Of all parameters; scale and bias of the normalisation move as well.
    assert (shift > 0.1) == (value_at == "perturbed")
    point = np.asarray(model.seen[...])
    assert loss > np.sum(point**2) - 1 and np.isfinite(loss)
    mean = 0.5 * (X * point).mean(0)
    np.testing.assert_allclose(model.norm.mean[...], mean, rtol=1e-4, atol=1e-6)
    assert np.any(model.w[...] != W)


# --- A loss of its own for the ascent.


def other_loss(w, x):
    v = jnp.concatenate([w["x"], w["y"]])
    return jnp.mean(jnp.abs(x @ v)), None


def other_gradient(w, x=X):
    return x.T @ np.sign(x @ w) / len(x)


@pytest.mark.parametrize("door", DOORS)
def test_the_perturbation_can_be_that_of_another_loss_on_other_examples(door):
    sam = sam_optax.gsam(0.5, 0.4)
    tx = optax.chain(sam, optax.sgd(0.1))
    others = np.random.default_rng(1).normal(size=(5, 3))
    for batch in (None, others):

        @jax.jit
        def step(w, state, batch=batch):
            options = {"has_aux": True, "ascent_loss_fn": other_loss}
            passed = {} if batch is None else {"ascent_batch": batch}
            if door == "door1":
                helper = sam_optax.sam_value_and_grad(loss_fn, sam, **options)
                value, d = helper(w, X, opt_state=state, **passed)
                extra = {}
            else:
                helper = sam_optax.value_and_ascent_grad(loss_fn, **options)
                value, d, extra = helper(w, X, **passed)
            updates, state = tx.update(d, state, w, **extra)
            return optax.apply_updates(w, updates), state, value

        w, state = split(W), tx.init(split(W))
        for _ in range(2):
            here = whole(w)
            g = gradient(here)
            ascent = other_gradient(here, X if batch is None else batch)
            ga = gradient(here + 0.5 * unit(ascent))
            d = ga - 0.4 * (g - (g @ ga) / (ga @ ga) * ga)
            w, state, (loss, (seen, _)) = step(w, state)
            np.testing.assert_allclose(whole(w), here - 0.1 * d, rtol=1e-9)
            np.testing.assert_allclose(seen, here)
            assert loss == pytest.approx(by_hand(here), rel=1e-12)


def test_groups_have_each_their_own_perturbation_of_the_other_loss():
    sam = sam_optax.sam(0.5)
    tx = optax.chain(sam, optax.sgd(0.1))
    step = jax.jit(
        DOORS["door1"](
            sam,
            tx,
            lambda w, x: loss_fn(w, x)[0],
            ascent_loss_fn=lambda w, x: other_loss(w, x)[0],
            m=4,
        )
    )
    w, *_ = step(split(W), tx.init(split(W)), X)
    ds = [
        gradient(W + 0.5 * unit(other_gradient(W, part)), part)
        for part in (X[:4], X[4:])
    ]
    np.testing.assert_allclose(whole(w), W - 0.1 * np.mean(ds, 0), rtol=1e-9)


def test_nnx_ascents_can_have_a_loss_of_their_own():
    model = Model()
    optimizer = nnx.Optimizer(
        model, optax.chain(sam_optax.sam(0.5), optax.sgd(0.1)), wrt=nnx.Param
    )
    target = jnp.array([0.0, 3.0, 4.0])
    gradients = sam_optax.nnx.value_and_ascent_grad(
        lambda model, x: jnp.sum(model.w[...] ** 2),
        ascent_loss_fn=lambda model, x: target @ model.w[...],
    )
    loss, grads, extra_args = gradients(model, X.astype(np.float32))
    optimizer.update(model, grads, **extra_args)
    assert loss == pytest.approx(W @ W)
    point = W + 0.5 * np.array([0.0, 0.6, 0.8])
    np.testing.assert_allclose(model.w[...], W - 0.2 * point, rtol=1e-6)


def test_an_ascent_loss_that_is_none_or_comes_with_a_rule_is_refused():
    sam = sam_optax.sam()
    build = functools.partial(sam_optax.sam_value_and_grad, loss_fn, sam)
    with pytest.raises(TypeError, match="ascent_loss_fn must be a function"):
        build(ascent_loss_fn=3)
    with pytest.raises(TypeError, match="ascent_loss_fn is a gradient"):
        build(ascent_loss_fn=jax.grad(lambda w, x: w))
    with pytest.raises(ValueError, match="pass one of them"):
        build(ascent_loss_fn=other_loss, data=sam_optax.data.sub_batch(0.5))


def test_methods_that_need_losses_say_so_of_a_bare_grad_fn():
    def update(ga, state, params=None, *, value_and_grad_fn, **extra_args):
        value, _ = value_and_grad_fn(params)
        return jax.tree.map(lambda x: x * value, ga), state

    descent = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    sam = sam_optax.sharpness_aware(sam_optax.ascents.sam(), descent=descent)
    w = split(W)
    with pytest.raises(ValueError, match="needs the loss beside each gradient"):
        sam.update(w, sam.init(w), w, grad_fn=lambda p: p)
    gradients = sam_optax.value_and_ascent_grad(lambda w, x: loss_fn(w, x)[0])
    _, g, extra_args = gradients(w, X)
    d, _ = sam.update(g, sam.init(w), w, **extra_args)
    point = W + 0.05 * unit(gradient(W))
    np.testing.assert_allclose(whole(d), by_hand(W) * gradient(point), rtol=1e-9)


def test_a_masked_ascent_gets_losses_and_masked_gradients():
    seen = []

    def update(g, state, params=None, *, value_and_grad_fn, **extra_args):
        seen.append(value_and_grad_fn(jax.tree.map(lambda w: w + 1, params)))
        return g, state

    ascent = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    sam = sam_optax.sharpness_aware(ascent, mask={"x": True, "y": False})
    gradients = sam_optax.value_and_ascent_grad(lambda w, x: loss_fn(w, x)[0])
    w = split(W)
    _, g, extra_args = gradients(w, X)
    sam.update(g, sam.init(w), w, **extra_args)
    (loss, g), point = seen[0], W + np.array([1, 1, 0])
    assert loss == pytest.approx(by_hand(point), rel=1e-12)
    assert_trees_close(g["x"], gradient(point)[:2], rtol=1e-9)
    assert isinstance(g["y"], optax.MaskedNode)
