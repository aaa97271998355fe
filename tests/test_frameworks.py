"""Training scripts of Flax Linen and NNX, Equinox, Orbax, and mixed precision."""

import ast
import pathlib
import re
import runpy
import subprocess
import sys

import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import problem
import sam_optax
import sam_optax.nnx
from lab import all_finite, assert_trees_close, assert_trees_equal

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
KINDS = {
    "sam": lambda: sam_optax.sam(0.1),
    "fsam": lambda: sam_optax.fsam(0.1),
    "gsam": lambda: sam_optax.gsam(0.1),
    "look_sam": lambda: sam_optax.look_sam(0.1, k=2),
    "esam": lambda: sam_optax.esam(0.1),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]()


def data(t, size=8):
    rng = np.random.default_rng(t)
    x = jnp.asarray(rng.normal(size=(size, 3)), jnp.float32)
    return x, jnp.sin(x[:, 0])


# --- The examples.

SHORT = ["flax_linen", "flax_nnx", "equinox_mlp", "mixed_precision", "orbax_resume"]


@pytest.mark.parametrize("name", SHORT)
def test_an_example_is_short_and_learns(name, monkeypatch, capsys, tmp_path):
    path = EXAMPLES / f"{name}.py"
    source = path.read_text()
    (docstring, *_) = ast.parse(source).body
    code = [
        line for line in source.splitlines()[docstring.end_lineno :] if line.strip()
    ]
    assert len(code) <= 40
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "checkpoint")])
    for _ in range(2 if name == "orbax_resume" else 1):
        runpy.run_path(str(path), run_name="__main__")
    losses = re.findall(r"loss ([0-9.]+)", capsys.readouterr().out)
    assert float(losses[-1]) < 1.0
    assert float(losses[-1]) <= float(losses[0])


# --- Flax Linen.


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.tanh(x))
        self.sow("intermediates", "hidden", x)
        return nn.Dense(1)(x)[..., 0]


def linen_training(sam, steps=3):
    """(parameters, batch statistics, hidden layers) of a plain step if sam is None."""
    model = Linen()
    variables = model.init(jax.random.key(0), data(0)[0], train=False)
    stats = {"batch_stats": variables["batch_stats"]}

    def loss_fn(params, stats, x, y, key):
        prediction, changed = model.apply(
            {"params": params, **stats},
            x,
            rngs={"dropout": key},
            mutable=["batch_stats", "intermediates"],
        )
        hidden = changed.pop("intermediates")["hidden"][0]
        return jnp.mean(jnp.square(prediction - y)), (changed, hidden)

    base = optax.sgd(0.1)
    tx = base if sam is None else optax.chain(sam, base)
    if sam is None:
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    else:
        value_and_grad = sam_optax.sam_value_and_grad(loss_fn, sam, has_aux=True)
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)

    @jax.jit
    def step(state, stats, batch):
        key = jax.random.fold_in(jax.random.key(1), state.step)
        keywords = {} if sam is None else {"opt_state": state.opt_state}
        (_, aux), grads = value_and_grad(state.params, stats, *batch, key, **keywords)
        return state.apply_gradients(grads=grads), *aux

    for t in range(steps):
        state, stats, hidden = step(state, stats, data(t))
    return state.params, stats, hidden


def test_linen_batch_statistics_are_those_of_a_plain_step_bit_by_bit(kind):
    """Updated once, in the pass at w, whose dropout and sown outputs are a plain
    step's too."""
    _, plain, plain_hidden = linen_training(None, steps=1)
    _, stats, hidden = linen_training(kind, steps=1)
    assert_trees_equal(stats, plain)
    assert_trees_equal(hidden, plain_hidden)


def test_linen_passes_see_the_same_dropout_mask():
    """With no perturbation, the second pass is the first, and training is plain."""
    params, stats, _ = linen_training(sam_optax.sam(0.0))
    plain, plain_stats, _ = linen_training(None)
    assert_trees_close(params, plain, rtol=1e-5, atol=1e-6)
    assert_trees_close(stats, plain_stats, rtol=1e-5, atol=1e-6)


# --- Flax NNX.


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


def test_nnx_state_advances_once_per_step_as_a_plain_steps_does(kind):
    """Batch statistics and random streams, bit by bit."""
    _, plain, plain_value = nnx_training(None, steps=1)
    _, others, value = nnx_training(kind, steps=1)
    assert_trees_equal(others, plain)
    assert_trees_equal(value, plain_value)


def test_nnx_passes_see_the_same_dropout_mask():
    params, others, _ = nnx_training(sam_optax.sam(0.0))
    plain, plain_others, _ = nnx_training(None)
    assert_trees_close(params, plain, rtol=1e-5, atol=1e-6)
    assert_trees_close(others, plain_others, rtol=1e-5, atol=1e-6)


def test_nnx_is_the_functional_form(kind):
    """Of the same network without state, through the first door."""
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))

    def loss_fn(model, x, y):
        return jnp.mean(jnp.square(jnp.tanh(model(x)[..., 0]) - y))

    def pure_loss_fn(params, x, y):
        prediction = jnp.tanh((x @ params["kernel"] + params["bias"])[..., 0])
        return jnp.mean(jnp.square(prediction - y))

    optimizer = nnx_optimizer(model, kind)
    gradients = sam_optax.nnx.value_and_ascent_grad(loss_fn)

    @nnx.jit
    def step(model, optimizer, x, y):
        loss, grads, extra_args = gradients(model, x, y)
        optimizer.update(model, grads, **extra_args)
        return loss

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tx = optax.chain(kind, optax.sgd(0.1))
    state = tx.init(params)
    helper = sam_optax.sam_value_and_grad(pure_loss_fn, kind)
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


# --- Equinox.


def test_equinox_models_are_trees_of_parameters(kind):
    """With None where a leaf is not trained, and the numbers of plain arrays."""
    model = eqx.nn.MLP(3, "scalar", 4, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, x, y):
        prediction = jax.vmap(eqx.combine(params, static))(x)
        return jnp.mean(jnp.square(prediction - y))

    leaves, structure = jax.tree.flatten(params)

    def loss_of_leaves(leaves, x, y):
        return loss_fn(jax.tree.unflatten(structure, leaves), x, y)

    def train(loss_fn, params):
        tx = optax.chain(kind, optax.sgd(0.1))
        helper = sam_optax.sam_value_and_grad(loss_fn, kind)
        state = tx.init(params)

        @eqx.filter_jit
        def step(params, state, x, y):
            _, grads = helper(params, x, y, opt_state=state)
            updates, state = tx.update(grads, state, params)
            return eqx.apply_updates(params, updates), state

        for t in range(3):
            params, state = step(params, state, *data(t))
        return params

    trained = train(loss_fn, params)
    assert jax.tree.structure(trained) == structure
    expected = train(loss_of_leaves, leaves)
    assert_trees_close(jax.tree.leaves(trained), expected, rtol=1e-5, atol=1e-6)


# --- Checkpoints.

SAVED = {
    "fsam": lambda: sam_optax.fsam(0.1),
    "look_sam": lambda: sam_optax.look_sam(0.1, k=3),
    "rst": lambda: sam_optax.rst(0.1),
    "esam": lambda: sam_optax.esam(0.1),
    "ssam": lambda: sam_optax.ssam(0.1, dynamic=True, refresh_every=2),
}
HALF = 3


def saved_training():
    """(start, step): all of SAVED in one program."""
    parts = {}
    for name, make in SAVED.items():
        sam = make()
        tx = optax.chain(sam, optax.adam(0.05))
        parts[name] = sam_optax.sam_value_and_grad(problem.loss, sam), tx

    @jax.jit
    def step(states, batch):
        after = {}
        for name, (helper, tx) in parts.items():
            params, state = states[name]
            _, grads = helper(params, batch, opt_state=state)
            updates, state = tx.update(grads, state, params)
            after[name] = optax.apply_updates(params, updates), state
        return after

    params = problem.params()
    start = {name: (params, tx.init(params)) for name, (_, tx) in parts.items()}
    return start, step


def run(step, states, first, last):
    for t in range(first, last):
        states = step(states, problem.batch(t))
    return states


def restore_and_go_on(path):
    """In a process of its own: prints the bytes of the parameters at the end."""
    start, step = saved_training()
    with ocp.StandardCheckpointer() as checkpointer:
        states = checkpointer.restore(path, start)
    final = run(step, states, HALF, 2 * HALF)
    print("RESULT", bytes_of(final).hex())


def bytes_of(states):
    return b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(states))


def test_orbax_restores_in_a_new_process_bit_by_bit(tmp_path):
    start, step = saved_training()
    middle = run(step, start, 0, HALF)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", middle)
    final = run(step, middle, HALF, 2 * HALF)
    code = (
        "import conftest, sys, test_frameworks as t; t.restore_and_go_on(sys.argv[1])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "checkpoint")],
        cwd=pathlib.Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.split("RESULT ")[1].strip() == bytes_of(final).hex()

    # And into another sharding: parameters and what is shaped like them over devices.
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def sharded(x):
        spec = P("data") if x.ndim == 2 and x.shape[0] == 4 else P()
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    with ocp.StandardCheckpointer() as checkpointer:
        states = checkpointer.restore(
            tmp_path / "checkpoint", jax.tree.map(sharded, start)
        )
    assert_trees_equal(states, middle)
    assert len(states["fsam"][0]["a"].sharding.device_set) == 4
    again = run(step, states, HALF, 2 * HALF)
    assert_trees_close(again, final, rtol=1e-3, atol=1e-4)

    # And through Flax's own serialisation.
    data = flax.serialization.to_bytes(middle)
    assert_trees_equal(flax.serialization.from_bytes(start, data), middle)


# --- Mixed precision.


def half_loss(params, batch):
    """In float16, whatever the parameters are."""
    x, y = (a.astype(jnp.float16) for a in batch)
    a, c, d = (
        w.astype(jnp.float16) for w in (params["a"], params["b"]["c"], params["b"]["d"])
    )
    prediction = jnp.sum(jnp.tanh(x @ a + c), axis=-1) * d
    return jnp.mean(jnp.square(prediction - y)).astype(jnp.float32)


def scaled_step(sam, tx, loss_fn):
    """A step with a loss scale, as a user writes it."""
    del sam

    @jax.jit
    def step(params, state, batch, scale):
        def grad_fn(params):
            g = jax.grad(lambda w: loss_fn(w, batch) * scale)(params)
            return jax.tree.map(lambda g: g / scale, g)

        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    return step


def test_the_loss_scale_changes_nothing(kind):
    """Powers of two are exact, so that not a bit may differ."""
    tx = optax.chain(kind, optax.sgd(0.05, momentum=0.9))
    step = scaled_step(kind, tx, problem.loss)
    results = []
    for scale in (1.0, 2.0**12):
        params, state = problem.params(), tx.init(problem.params())
        for t in range(3):
            params, state = step(params, state, problem.batch(t), jnp.float32(scale))
        results.append(params)
    assert_trees_equal(*results)


def test_unscaling_through_the_first_door():
    """The carrier's gradients are divided by the user; its state is not touched."""
    sam = sam_optax.fsam(0.1)
    tx = optax.chain(sam, optax.sgd(0.05))

    def train(scale):
        helper = sam_optax.sam_value_and_grad(
            lambda w, b, s: s * problem.loss(w, b), sam
        )

        @jax.jit
        def step(params, state, batch):
            _, grads = helper(params, batch, jnp.float32(scale), opt_state=state)
            grads = jax.tree.map(lambda d: d / scale, grads)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params, state = problem.params(), tx.init(problem.params())
        for t in range(3):
            params, state = step(params, state, problem.batch(t))
        return params

    assert_trees_equal(train(1.0), train(2.0**10))


def test_a_float16_overflow_is_skipped_and_poisons_nothing(kind):
    tx = optax.chain(kind, optax.apply_if_finite(optax.sgd(0.05, momentum=0.9), 100))
    step = scaled_step(kind, tx, half_loss)
    params, state = problem.params(), tx.init(problem.params())
    params, state = step(params, state, problem.batch(0), jnp.float32(1.0))
    after, state = step(params, state, problem.batch(1), jnp.float32(2.0**40))
    assert_trees_equal(after, params)
    assert state[1].total_notfinite == 1
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    assert all_finite(floats)
    later, state = step(after, state, problem.batch(2), jnp.float32(1.0))
    assert all_finite(later)
    assert any(
        np.any(a != b)
        for a, b in zip(jax.tree.leaves(later), jax.tree.leaves(after), strict=True)
    )


def test_float32_parameters_with_bfloat16_compute_do_not_warn(kind):
    def loss_fn(params, batch):
        narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        return problem.loss(narrow, batch).astype(jnp.float32)

    helper = sam_optax.sam_value_and_grad(loss_fn, kind)
    params = problem.params()
    loss, grads = helper(params, problem.batch(), opt_state=kind.init(params))
    assert loss.dtype == jnp.float32
    exact = sam_optax.sam_value_and_grad(problem.loss, kind)
    _, expected = exact(params, problem.batch(), opt_state=kind.init(params))
    difference = optax.tree.norm(
        optax.tree.sub(grads.gradients, expected.gradients)
    ) / optax.tree.norm(expected.gradients)
    assert 0 < difference < 0.1
