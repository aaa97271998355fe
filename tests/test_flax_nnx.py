"""Flax NNX: its optimizer forwards grad_fn, and a step updates state as a plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sam_optax
import sam_optax.nnx
from lab import all_finite, assert_trees_close, assert_trees_equal
from methods import TABLE


@pytest.fixture
def sam(kind):
    return TABLE[kind]()


def data(t, size=8):
    rng = np.random.default_rng(t)
    x = jnp.asarray(rng.normal(size=(size, 3)), jnp.float32)
    return x, jnp.sin(x[:, 0])


@pytest.mark.parametrize(
    "options", [{"m": -1}, {"map_groups": "x"}, {"data": 3}, {"batch_argnums": "x"}]
)
def test_nnx_gradients_check_their_options_when_built(options):
    with pytest.raises((TypeError, ValueError)):
        sam_optax.nnx.value_and_ascent_grad(lambda model, x: x, **options)


@pytest.mark.gradients_alone
def test_nnx_optimizer_forwards_grad_fn(sam):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(3, 4, rngs=rngs)
            self.out = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.tanh(self.hidden(x)))[..., 0]

    model = Model(nnx.Rngs(0))
    tx = optax.chain(sam, optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graph, params = nnx.split(model, nnx.Param)

    def loss_of_params(params, batch):
        x, y = batch
        return jnp.mean(jnp.square(nnx.merge(graph, params, copy=True)(x) - y))

    w = nnx.to_pure_dict(params)
    opt_state = tx.init(w)
    for t in range(2):

        def grad_fn(params, t=t):
            return jax.grad(loss_of_params)(params, data(t))

        g = grad_fn(nnx.state(model, nnx.Param))
        optimizer.update(model, g, grad_fn=grad_fn)

        def pure_grad_fn(w, t=t):
            def loss(w):
                state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
                nnx.replace_by_pure_dict(state, w)
                return loss_of_params(state, data(t))

            return jax.grad(loss)(w)

        updates, opt_state = tx.update(
            pure_grad_fn(w), opt_state, w, grad_fn=pure_grad_fn
        )
        w = optax.apply_updates(w, updates)
    actual = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_trees_close(actual, w, rtol=1e-5, atol=1e-6)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.tanh(self.norm(self.hidden(x)))))[..., 0]


def nnx_loss(model, x, y):
    prediction = model(x)
    return jnp.mean(jnp.square(prediction - y)), prediction


def nnx_step(sam, **options):
    """A training step; a plain one if sam is None."""
    if sam is not None:
        gradients = sam_optax.nnx.value_and_ascent_grad(
            nnx_loss, has_aux=True, **options
        )

    def step(model, optimizer, x, y):
        if sam is None:
            value, grads = nnx.value_and_grad(nnx_loss, has_aux=True)(model, x, y)
            optimizer.update(model, grads)
        else:
            value, grads, extra_args = gradients(model, x, y)
            optimizer.update(model, grads, **extra_args)
        return value

    return step


def nnx_optimizer(model, sam, wrt=nnx.Param):
    base = optax.sgd(0.1)
    tx = base if sam is None else optax.chain(sam, base)
    return nnx.Optimizer(model, tx, wrt=wrt)


def nnx_training(sam, steps=3, **options):
    model = Nnx(nnx.Rngs(0))
    optimizer = nnx_optimizer(model, sam)
    step = nnx.jit(nnx_step(sam, **options))
    for t in range(steps):
        value = step(model, optimizer, *data(t))
    params, others = nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))
    return nnx.to_pure_dict(params), arrays(others), value


def arrays(state):
    """Pure values, random keys as their data."""
    return jax.tree.map(
        lambda x: (
            jax.random.key_data(x)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
        ),
        nnx.to_pure_dict(state),
    )


def test_nnx_state_advances_once_per_step_as_a_plain_steps_does(sam):
    """Batch statistics and random streams, bit by bit."""
    _, plain, plain_value = nnx_training(None, steps=1)
    _, others, value = nnx_training(sam, steps=1)
    assert_trees_equal(others, plain)
    assert_trees_equal(value, plain_value)


def test_nnx_passes_see_the_same_dropout_mask():
    params, others, _ = nnx_training(sam_optax.sam(0.0))
    plain, plain_others, _ = nnx_training(None)
    assert_trees_close(params, plain, rtol=1e-5, atol=1e-6)
    assert_trees_close(others, plain_others, rtol=1e-5, atol=1e-6)


def test_nnx_is_the_functional_form(sam):
    """Of the same network without state, through the first door."""
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))

    def loss_fn(model, x, y):
        return jnp.mean(jnp.square(jnp.tanh(model(x)[..., 0]) - y))

    def pure_loss_fn(params, x, y):
        prediction = jnp.tanh((x @ params["kernel"] + params["bias"])[..., 0])
        return jnp.mean(jnp.square(prediction - y))

    optimizer = nnx_optimizer(model, sam)
    gradients = sam_optax.nnx.value_and_ascent_grad(loss_fn)

    @nnx.jit
    def step(model, optimizer, x, y):
        loss, grads, extra_args = gradients(model, x, y)
        optimizer.update(model, grads, **extra_args)
        return loss

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tx = optax.chain(sam, optax.sgd(0.1))
    state = tx.init(params)
    helper = sam_optax.sam_value_and_grad(pure_loss_fn, sam)
    for t in range(3):
        loss = step(model, optimizer, *data(t))
        expected, grads = helper(params, *data(t), opt_state=state)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    actual = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_trees_close(actual, params, rtol=1e-5, atol=1e-6)


def test_nnx_trains_what_wrt_says_and_perturbs_nothing_else():
    class WithLoRA(nnx.Module):
        def __init__(self, rngs):
            self.base = nnx.Linear(3, 1, rngs=rngs)
            self.lora = nnx.LoRA(3, 2, 1, rngs=rngs)

        def __call__(self, x):
            return (self.base(x) + self.lora(x))[..., 0]

    points = []

    def loss_fn(model, x, y):
        points.append(model.base.kernel[...])
        return jnp.mean(jnp.square(model(x) - y))

    model = WithLoRA(nnx.Rngs(0))
    sam = sam_optax.sam(0.1)
    before = nnx.to_pure_dict(nnx.state(model.base))
    start = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    optimizer = nnx_optimizer(model, sam, wrt=nnx.LoRAParam)
    gradients = sam_optax.nnx.value_and_ascent_grad(loss_fn, wrt=nnx.LoRAParam)
    _, grads, extra_args = gradients(model, *data(0))
    optimizer.update(model, grads, **extra_args)
    assert len(points) == 2
    assert_trees_equal(points, [before["kernel"]] * 2)
    assert_trees_equal(nnx.to_pure_dict(nnx.state(model.base)), before)
    after = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), after, start)
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_nnx_under_vmap_and_scan():
    """An ensemble of two, and steps in a scan, are what a loop makes of each."""
    sam = sam_optax.fsam(0.1)
    step = nnx_step(sam)

    def make(seed):
        model = Nnx(nnx.Rngs(seed))
        return model, nnx_optimizer(model, sam)

    expected = []
    for seed in range(2):
        model, optimizer = make(seed)
        for t in range(2):
            nnx.jit(step)(model, optimizer, *data(t))
        expected.append(arrays(nnx.state(model)))

    @nnx.vmap
    def make_all(rngs):
        model = Nnx(rngs)
        return model

    keys = jax.random.split(jax.random.key(0), 2)
    models = make_all(nnx.Rngs(params=keys, dropout=keys))
    optimizers = nnx.vmap(lambda model: nnx_optimizer(model, sam))(models)
    batches = jax.tree.map(lambda *x: jnp.stack(x), data(0), data(1))

    @nnx.jit
    @nnx.vmap(in_axes=(0, 0, None))
    def train(model, optimizer, batches):
        @nnx.scan(in_axes=(nnx.Carry, 0))
        def run(carry, batch):
            step(*carry, *batch)
            return carry, None

        run((model, optimizer), batches)

    one, one_optimizer = make(0)

    @nnx.jit
    def train_one(model, optimizer, batches):
        @nnx.scan(in_axes=(nnx.Carry, 0))
        def run(carry, batch):
            step(*carry, *batch)
            return carry, None

        run((model, optimizer), batches)

    train_one(one, one_optimizer, batches)
    assert_trees_close(arrays(nnx.state(one)), expected[0], rtol=1e-4, atol=1e-5)
    before = nnx.to_pure_dict(nnx.state(models, nnx.Param))
    train(models, optimizers, batches)
    after = nnx.to_pure_dict(nnx.state(models, nnx.Param))
    assert all_finite(after)
    np.testing.assert_array_equal(models.dropout.rngs.count[...], [2, 2])
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert a.shape == b.shape
        assert np.max(np.abs(a - b)) > 0


def test_nnx_variables_that_a_pass_adds_are_refused():
    def loss_fn(model, x, y):
        model.seen = nnx.Variable(x)
        return jnp.mean(jnp.square(model(x)[..., 0] - y))

    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    gradients = sam_optax.nnx.value_and_ascent_grad(loss_fn)
    with pytest.raises(ValueError, match=r"adds the variable seen .*auxiliary output"):
        gradients(model, *data(0))


def test_nnx_trained_variables_that_a_pass_adds_are_refused():
    def loss_fn(model, x, y):
        model.late = nnx.Param(jnp.ones(1))
        return jnp.mean(jnp.square(model(x)[..., 0] - y))

    gradients = sam_optax.nnx.value_and_ascent_grad(loss_fn)
    with pytest.raises(ValueError, match=r"adds the variable late"):
        gradients(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), *data(0))


def test_nnx_trained_variables_that_a_pass_changes_stay_as_they_were():
    def loss_fn(model, x, y):
        model.kernel[...] = jnp.clip(model.kernel[...], -0.1, 0.1)
        return jnp.mean(jnp.square(model(x)[..., 0] - y))

    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    before = model.kernel[...]
    sam_optax.nnx.value_and_ascent_grad(loss_fn)(model, *data(0))
    assert_trees_equal(model.kernel[...], before)


@pytest.mark.parametrize("transform", [nnx.remat, nnx.jit])
def test_nnx_transforms_inside_of_the_loss(transform):
    def loss_fn(model, x, y):
        return jnp.mean(jnp.square(transform(Nnx.__call__)(model, x) - y))

    model, plain = Nnx(nnx.Rngs(0)), Nnx(nnx.Rngs(0))
    found = sam_optax.nnx.value_and_ascent_grad(loss_fn)(model, *data(0))
    expected = sam_optax.nnx.value_and_ascent_grad(
        lambda model, x, y: jnp.mean(jnp.square(model(x) - y))
    )(plain, *data(0))
    assert_trees_close(found[0], expected[0], rtol=1e-6)
    states = (nnx.state(m, nnx.BatchStat) for m in (model, plain))
    assert_trees_close(*states, rtol=1e-6)
    assert model.dropout.rngs.count[...] == plain.dropout.rngs.count[...] == 1


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit])
def test_nnx_objects_besides_the_model_cannot_be_changed(wrap):
    def with_stream(model, rngs, x):
        return jnp.mean(model(nnx.Dropout(0.5)(x, rngs=rngs)))

    def with_metric(model, metric, x):
        loss = jnp.mean(model(x))
        metric.update(values=loss)
        return loss

    def with_network(model, other, x):
        return jnp.mean(model(other(x)))

    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    network = nnx.BatchNorm(3, rngs=nnx.Rngs(2))
    for loss_fn, changed in (
        (with_stream, nnx.Rngs(1)),
        (with_metric, nnx.metrics.Average()),
        (with_network, network),
    ):
        gradients = sam_optax.nnx.value_and_ascent_grad(loss_fn)
        step = wrap(lambda *args, f=gradients: f(*args)[0])
        with pytest.raises(ValueError, match=r"an nnx.Rngs, .*or another model.*eval"):
            step(model, changed, data(0)[0])
    network.eval()
    assert np.isfinite(step(model, network, data(0)[0]))


def test_of_two_networks_in_one_module_one_is_trained():
    class Pair(nnx.Module):
        def __init__(self):
            self.generator = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
            self.other = nnx.BatchNorm(3, rngs=nnx.Rngs(1))

    pair, tx = Pair(), optax.chain(sam_optax.sam(0.5), optax.sgd(0.1))
    wrt = nnx.All(nnx.Param, nnx.PathContains("generator"))
    optimizer = nnx.Optimizer(pair, tx, wrt=wrt)
    before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(pair)))
    _, grads, extra_args = sam_optax.nnx.value_and_ascent_grad(
        lambda pair, x: jnp.mean(pair.other(pair.generator(x)) ** 3), wrt=wrt
    )(pair, data(0)[0])
    optimizer.update(pair, grads, **extra_args)
    after = nnx.as_pure(nnx.state(pair))
    assert np.any(after["generator"]["kernel"] != before["generator"]["kernel"])
    assert_trees_close(after["other"]["scale"], before["other"]["scale"], rtol=0)
    assert np.any(after["other"]["mean"] != before["other"]["mean"])


def test_nnx_helper_and_optimizer_must_train_the_same():
    def loss_fn(model, x):
        return jnp.mean(model(x) ** 2)

    model = nnx.LoRALinear(3, 2, lora_rank=1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(sam_optax.sam()), wrt=nnx.LoRAParam)
    _, grads, extra = sam_optax.nnx.value_and_ascent_grad(loss_fn)(model, data(0)[0])
    with pytest.raises(ValueError, match=r"of other parameters .*the same wrt="):
        optimizer.update(model, grads, **extra)


def test_a_mask_of_nnx_variables_says_what_to_do():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    mask = jax.tree.map(lambda _: True, nnx.state(model, nnx.Param))
    tx = optax.chain(sam_optax.sam(mask=mask), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    loss_fn = lambda model, x: jnp.mean(model(x) ** 2)  # noqa: E731
    _, grads, extra = sam_optax.nnx.value_and_ascent_grad(loss_fn)(model, data(0)[0])
    with pytest.raises(ValueError, match="pass a function of the parameters"):
        optimizer.update(model, grads, **extra)


def test_nnx_groups_average_what_they_make_of_statistics():
    params, others, (_, prediction) = nnx_training(
        sam_optax.fsam(0.1), steps=1, m=4, batch_argnums=(1, 2)
    )
    assert prediction.shape == (2, 4)
    assert others["dropout"]["rngs"]["count"] == 1
    means = []
    for half in (slice(0, 4), slice(4, 8)):
        model = Nnx(nnx.Rngs(0))
        x, y = data(0)
        nnx_loss(model, x[half], y[half])
        means.append(model.norm.mean[...])
    np.testing.assert_allclose(others["norm"]["mean"], np.mean(means, 0), rtol=1e-4)
    assert all_finite(params)


def test_a_model_without_variables_to_train_raises():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    gradients = sam_optax.nnx.value_and_ascent_grad(
        lambda model, x: jnp.mean(model(x)), wrt=nnx.LoRAParam
    )
    with pytest.raises(ValueError, match=r"no variables to train.*LoRAParam"):
        gradients(model, jnp.ones((4, 2)))


def test_labels_bound_by_a_partial_are_not_broadcast_against_a_group():
    def loss(model, x, y):
        return jnp.mean((model(x) - y) ** 2)

    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    x, y = jnp.ones((4, 3)), jnp.arange(4.0)[:, None]
    first_pass = sam_optax.nnx.value_and_ascent_grad(functools.partial(loss, y=y), m=1)
    with pytest.raises(ValueError, match=r"bound by functools\.partial"):
        first_pass(model, x)
