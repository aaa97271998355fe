"""bSAM: its trajectories, its posterior, and what a method has to do."""

import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import problem
import sam_optax
from doors import DOORS
from lab import are_equal, assert_trees_close
from sam_optax import _tree
from sam_optax._random import key_stream
from sam_optax.methods import draw_from_bsam
from test_golden import GOLDEN, NAMES, mean_loss
from test_golden_drawn import (
    BATCH,
    STEPS,
    assert_at,
    interleaved,
    keys_of,
    noise_of,
    start_of,
    stored_noise,
)

CASES = [
    pytest.param(case, id=case["name"])
    for case in json.loads((GOLDEN / "drawn.json").read_text())
    if case["method"] == "bsam"
]
with_doors = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


def precision(opt_state):
    return opt_state.sharpness_state.descent_state.precision


def with_others(noise, count):
    """(1, draws + count, ...): the stored numbers, and some more."""
    draws = noise.reshape(-1, *noise.shape[2:])
    return np.concatenate([draws, np.ones((count, *draws.shape[1:]))])[None]


@with_doors
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "how",
    [
        "unroll",
        *(pytest.param(how, marks=pytest.mark.slow) for how in ("vmap", "scan")),
    ],
)
def test_reproduces_the_authors_trajectory(case, how, door, monkeypatch):
    data, values = np.load(GOLDEN / case["file"]), dict(case["hyperparameters"])
    parts = values.pop("msharpness")
    options = {"m": BATCH // parts, "map_groups": how, "batch_argnums": (1, 2)}
    if parts == 1 and how != "scan":
        options = {}
    groups = range(parts) if options else [None]
    with jax.enable_x64(True):
        sam, tx = sam_optax.bsam(
            case["base_optimizer"]["lr"],
            values.pop("Ndata"),
            weight_decay=values.pop("wdecay"),
            initial_precision=values.pop("s_init"),
            **values,
        )
        step = jax.jit(door(sam, tx, mean_loss, **options))
        params = start_of(data)
        state = tx.init(params)
        keys = interleaved([keys_of("bsam", STEPS, group) for group in groups])
        noise = noise_of(data)
        if options:
            # Beside the groups, a step from the means moves the state. Whatever it
            # draws, it must leave no trace.
            keys += interleaved([keys_of("bsam", STEPS)])
            noise = {name: with_others(x, STEPS) for name, x in noise.items()}
        with stored_noise(monkeypatch, keys, noise):
            for t, batch in enumerate(zip(data["X"], data["y"], strict=True)):
                params, state, loss = step(params, state, *batch)
                np.testing.assert_allclose(loss, data["loss"][t], rtol=0, atol=1e-10)
                assert_at(params, data, t)
                s = {name: precision(state)[name] for name in NAMES}
                assert_at(s, data, t, prefix="s")


def parts_of(batch):
    return [jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], batch) for i in range(2)]


@pytest.mark.slow
def test_devices_are_groups_with_draws_of_their_own():
    """A perturbation per device gives what groups of its examples give."""
    sam, tx = sam_optax.bsam(0.1, 100, rho=0.1)
    w, batch = problem.params(), problem.batch(size=8)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    P = jax.sharding.PartitionSpec
    options = {"axis_name": "data", "sync_perturbation": False}
    per_device = jax.shard_map(
        DOORS["door1"](sam, tx, problem.loss, **options),
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=P(),
    )
    grouped = DOORS["door1"](sam, tx, problem.loss, m=4)
    results = [jax.jit(step)(w, tx.init(w), batch) for step in (per_device, grouped)]
    assert_trees_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("double_precision")
def test_the_posterior_of_a_quadratic():
    """Draws have the mean w and the variance 1/(N s)."""
    _, tx = sam_optax.bsam(0.1, 50)
    w = jnp.array([1.0, -2.0])
    state = tx.init(w)
    _, state = tx.update(w, state, w, grad_fn=lambda q: jnp.array([3.0, 0.1]) * q)
    draws = draw_from_bsam(state, w, examples=50, key=3, draws=400)
    assert draws.shape == (400, 2)
    np.testing.assert_allclose(jnp.mean(draws, 0), w, atol=0.03)
    deviation = 1 / jnp.sqrt(50 * precision(state))
    np.testing.assert_allclose(jnp.std(draws, 0), deviation, rtol=0.1)
    with pytest.raises(TypeError, match="got SharpnessAwareState"):
        draw_from_bsam(state.sharpness_state, w, examples=50, key=3)


@pytest.mark.usefixtures("double_precision")
def test_a_schedule_of_rho_and_of_the_learning_rate():
    """By hand, with the drawn numbers of its key, on three steps."""
    h = jnp.array([3.0, 0.5])

    def rho(t):
        return 0.1 * (1 + t)

    def rate(t):
        return 0.2 / (1 + t)

    _, tx = sam_optax.bsam(
        rate, 50, rho, beta1=0.5, beta2=0.8, weight_decay=0.1, damping=0.3
    )
    w, s, m = jnp.array([1.0, -2.0]), jnp.ones(2), jnp.zeros(2)
    state, params = tx.init(w), w
    stream = key_stream(0, "bsam")
    data = stream.start()
    for t in range(3):
        key, data = stream.next(data)
        a = h * (w + _tree.normal_like(key, w) / jnp.sqrt(50 * s))
        m = 0.5 * m + 0.5 * (h * (w + rho(t) * a / s) + 0.1 * w)
        w, s = w - rate(t) * m / s, 0.8 * s + 0.2 * (jnp.sqrt(s) * abs(a) + 0.4)
        updates, state = tx.update(params, state, params, grad_fn=lambda q: h * q)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, w, rtol=1e-9)


def test_a_step_takes_two_gradients():
    points, w = [], jnp.ones(2)
    _, tx = sam_optax.bsam(0.1, 10)
    tx.update(w, tx.init(w), w, grad_fn=lambda q: points.append(q) or q)
    assert len(points) == 2


def test_what_is_not_finite_is_seen_and_not_carried():
    _, tx = sam_optax.bsam(0.1, 10)
    w = jnp.array([1.0, 2.0])
    _, state = tx.update(w, tx.init(w), w, grad_fn=lambda q: q)
    for number in range(2):  # the first of the two gradients, then the second
        taken = []

        def grad_fn(q, number=number, taken=taken):
            taken.append(q)
            return q * jnp.nan if len(taken) == number + 1 else jax.nn.relu(q)

        updates, after = tx.update(w, state, w, grad_fn=grad_fn)
        assert not np.all(np.isfinite(updates))
        np.testing.assert_array_equal(precision(after), precision(state))
        np.testing.assert_array_equal(after.bayes_momentum, state.bayes_momentum)
        assert np.any(
            after.sharpness_state.ascent_state.noise_key
            != state.sharpness_state.ascent_state.noise_key
        )


@with_doors
def test_a_resumed_run_goes_on_as_it_was(door):
    sam, tx = sam_optax.bsam(0.1, 100, rho=lambda t: 0.1 / (1 + t))
    step = jax.jit(door(sam, tx, problem.loss))
    w, state = problem.params(), tx.init(problem.params())
    for t in range(4):
        if t == 2:
            saved = w, pickle.loads(pickle.dumps(state))
        w, state, _ = step(w, state, problem.batch(t))
    again, later = saved
    for t in (2, 3):
        again, later, _ = step(again, later, problem.batch(t))
    assert are_equal((again, later), (w, state))


@pytest.mark.filterwarnings("ignore:Some perturbed parameters")
def test_dtypes_are_kept():
    w = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2)}
    _, tx = sam_optax.bsam(0.1, 10)
    state = tx.init(w)
    updates, after = tx.update(w, state, w, grad_fn=lambda q: q)
    assert [u.dtype for u in jax.tree.leaves(updates)] == [jnp.bfloat16, jnp.float32]
    for a, b in zip(*map(jax.tree.leaves, (after, state)), strict=True):
        assert a.dtype == b.dtype


def test_impossible_arguments():
    for arguments, words in (
        ({"learning_rate": -1.0}, "learning_rate must be >= 0"),
        ({"examples": 0}, "examples must be >= 1"),
        ({"rho": -1.0}, "rho must be >= 0"),
        ({"beta1": 1.0}, "beta1 must be >= 0 and < 1"),
        ({"beta2": 1.0}, "beta2 must be >= 0 and < 1"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0"),
        ({"damping": -1.0}, "damping must be >= 0"),
        ({"initial_precision": 0.0}, "initial_precision must be > 0 and finite"),
        ({"initial_precision": np.inf}, "initial_precision must be > 0 and finite"),
    ):
        with pytest.raises(ValueError, match=words):
            sam_optax.bsam(**{"learning_rate": 0.1, "examples": 10} | arguments)


def test_a_negative_traced_radius_shows_as_nan():
    w = jnp.array([1.0, 2.0])

    @jax.jit
    def step(rho):
        _, tx = sam_optax.bsam(0.1, 100, rho=rho)
        return tx.update(2 * w, tx.init(w), w, grad_fn=lambda q: 2 * q)[0]

    assert np.all(np.isfinite(step(0.5)))
    assert np.all(np.isnan(step(-0.5)))


def test_draws_that_are_impossible():
    _, tx = sam_optax.bsam(0.1, 100)
    w = jnp.array([1.0, 2.0])
    for wrong, message in (({"draws": 0}, "draws"), ({"examples": -1}, "examples")):
        options: dict = {"examples": 100, "key": 0} | wrong
        with pytest.raises(ValueError, match=message):
            sam_optax.methods.draw_from_bsam(tx.init(w), w, **options)
