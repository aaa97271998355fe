"""Eigen-SAM: its trajectories, and its eigenvector against the dense Hessian."""

import json

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import problem
import sam_optax
from doors import DOORS
from lab import assert_trees_close
from sam_optax import ascents
from test_golden import GOLDEN, NAMES, base_optimizer, mean_loss
from test_golden_drawn import STEPS, keys_of, start_of, stored_noise
from test_golden_drawn import assert_at as assert_at_step

CASES = {
    case["name"]: case
    for case in json.loads((GOLDEN / "drawn.json").read_text())
    if case["method"] == "eigensam"
}

with_doors = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


# --- The authors' trajectories.


def make_step(case, door, **hyperparameters):
    sam = sam_optax.eigen_sam(as_released=True, **hyperparameters)
    tx = optax.chain(sam, base_optimizer(**case["base_optimizer"]))
    return tx, jax.jit(door(sam, tx, mean_loss))


def batches(data):
    return enumerate(zip(data["X"], data["y"], strict=True))


def found(opt_state):
    return opt_state[0].ascent_state[0]


@with_doors
def test_the_eigenvector_is_found_on_every_kth_step(door, monkeypatch):
    case = CASES["eigensam_rho0p2_alpha0p5_freq4_mom"]
    data, values = np.load(GOLDEN / case["file"]), dict(case["hyperparameters"])
    values |= {"k": values.pop("freq"), "steps": values.pop("power_steps")}
    with jax.enable_x64(True):
        key = jax.random.key_data(keys_of("lean_to_eigenvector", STEPS)[4])
        noise = {name: data[f"v_init_{name}"][None, None] for name in NAMES}
        tx, step = make_step(case, door, **values)
        params = start_of(data)
        state = tx.init(params)
        with stored_noise(monkeypatch, [key], noise):
            for t, batch in batches(data):
                params, state, _ = step(params, state, *batch)
                assert_at_step(params, data, t)
                v = {name: found(state).eigenvector[name] for name in NAMES}
                assert_at_step(v, data, t, prefix="v")


@with_doors
def test_along_given_directions(door):
    case = CASES["eigensam_rho0p3_alpha0p2_fixedv_sgd"]
    data = np.load(GOLDEN / case["file"])
    with jax.enable_x64(True):
        tx, step = make_step(case, door, **case["hyperparameters"], k=10**6)
        params = start_of(data)
        state = tx.init(params)
        for t, batch in batches(data):
            sam_state, *others = state
            v = {name: jnp.asarray(data[f"v_{name}"][t]) for name in NAMES}
            held = found(state)._replace(eigenvector=v)
            sam_state = sam_state._replace(
                ascent_state=(held, *sam_state.ascent_state[1:])
            )
            params, state, _ = step(params, (sam_state, *others), *batch)
            assert_at_step(params, data, t)


# --- The eigenvector.


def leading(w, batch):
    """(eigenvalue, eigenvector) of the dense Hessian, the largest in magnitude."""
    flat, unravel = jax.flatten_util.ravel_pytree(w)
    hessian = jax.hessian(lambda x: problem.loss(unravel(x), batch))(flat)
    values, vectors = np.linalg.eigh(hessian)
    largest = np.argmax(np.abs(values))
    return values[largest], vectors[:, largest]


def assert_is_leading(state, w, batch):
    v, _ = jax.flatten_util.ravel_pytree(state.ascent_state[0].eigenvector)
    _, wanted = leading(w, batch)
    assert abs(np.dot(v, wanted)) == pytest.approx(1, abs=1e-6)


@pytest.fixture
def start():
    with jax.enable_x64(True):
        x, y = problem.batch(size=16)
        batch = jnp.asarray(x, jnp.float64), jnp.asarray(y, jnp.float64)
        yield problem.params(jnp.float64), batch


def long(**options):
    return sam_optax.eigen_sam(0.1, 0.5, k=2, steps=400, **options)


def sgd(sam):
    return optax.chain(sam, optax.sgd(0.0))


@with_doors
@pytest.mark.parametrize(
    "options",
    [
        {"m": 4},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"m": 4, "map_groups": "scan"}, marks=pytest.mark.slow),
    ],
)
def test_it_is_that_of_the_dense_matrix_of_the_whole_batch(door, options, start):
    w, batch = start
    sam = long()
    tx = sgd(sam)
    step = jax.jit(door(sam, tx, problem.loss, **options))
    _, state, _ = step(w, tx.init(w), batch)
    assert_is_leading(state[0], w, batch)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_it_is_that_of_all_devices(shared, start):
    w, batch = start
    sam = long()
    tx = sgd(sam)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    P = jax.sharding.PartitionSpec
    step = DOORS["door1"](
        sam, tx, problem.loss, axis_name="data", sync_perturbation=shared
    )
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P()
    )
    _, state, _ = jax.jit(mapped)(w, tx.init(w), batch)
    assert_is_leading(state[0], w, batch)
    sharding = jax.sharding.NamedSharding(mesh, P("data"))
    plain = jax.jit(DOORS["door1"](sam, tx, problem.loss))
    _, state, _ = plain(w, tx.init(w), jax.device_put(batch, sharding))
    assert_is_leading(state[0], w, batch)


def test_it_starts_from_the_last_and_rests_in_between(start):
    """One iteration at a time, which reaches it after many steps."""
    w, batch = start
    sam = sam_optax.eigen_sam(k=2, steps=1)
    grad_fn = jax.jit(jax.grad(lambda q: problem.loss(q, batch)))
    update = jax.jit(lambda state: sam.update(grad_fn(w), state, w, grad_fn=grad_fn)[1])
    states = [sam.init(w)]
    for _ in range(300):
        states.append(update(states[-1]))

    def vector(t):
        return states[t].ascent_state[0].eigenvector["a"]

    np.testing.assert_array_equal(vector(0), 0)
    np.testing.assert_array_equal(vector(1), vector(2))
    assert np.any(vector(2) != vector(3))
    assert_is_leading(states[-1], w, batch)


@pytest.mark.slow
def test_it_is_that_of_the_perturbed_leaves(start):
    w, batch = start
    sam = long(mask={"a": False, "b": True})
    grad_fn = jax.grad(lambda q: problem.loss(q, batch))
    _, state = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
    v, _ = jax.flatten_util.ravel_pytree(state.ascent_state[0].eigenvector["b"])
    flat, unravel = jax.flatten_util.ravel_pytree(w["b"])
    values, vectors = np.linalg.eigh(
        jax.hessian(lambda b: problem.loss({"a": w["a"], "b": unravel(b)}, batch))(flat)
    )
    wanted = vectors[:, np.argmax(np.abs(values))]
    assert abs(np.dot(v, wanted)) == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_groups_share_the_eigenvector_that_is_carried(start):
    """From the second step on; on the first there is none, which is SAM."""
    w, batch = start
    sam, plain = sam_optax.eigen_sam(0.1, 0.5, k=2), sam_optax.sam(0.1)
    helper = sam_optax.sam_value_and_grad(problem.loss, sam, m=8)
    _, first = helper(w, batch, opt_state=sam.init(w))
    _, as_sam = sam_optax.sam_value_and_grad(problem.loss, plain, m=8)(
        w, batch, opt_state=plain.init(w)
    )
    assert_trees_close(first.gradients, as_sam.gradients, rtol=1e-9)
    _, state = sam.update(first, sam.init(w), w)
    d = helper(w, batch, opt_state=state)[1].gradients
    v = state.ascent_state[0].eigenvector
    parts = []
    for half in (slice(0, 8), slice(8, 16)):
        own = jax.tree.map(lambda x, half=half: x[half], batch)
        g = jax.grad(problem.loss)(w, own)
        unit = optax.tree.scale(1 / optax.tree.norm(g), g)
        overlap = optax.tree.vdot(unit, v)
        across = optax.tree.add_scale(v, -overlap, unit)
        e = optax.tree.add_scale(unit, 0.5 * jnp.sign(overlap), across)
        parts.append(jax.grad(problem.loss)(optax.tree.add_scale(w, 0.1, e), own))
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *parts)
    assert_trees_close(d, expected, rtol=1e-8, atol=1e-12)


# --- Bad input, and what is not finite.


def test_impossible_arguments():
    for name in ("k", "steps"):
        for value in (0, 1.5, True):
            with pytest.raises(ValueError, match=f"{name} must be an integer >= 1"):
                sam_optax.eigen_sam(**{name: value})
    part, w = ascents.lean_to_eigenvector(), jnp.ones(2)
    with pytest.raises(ValueError, match="lean_to_eigenvector needs the parameters"):
        part.update(w, part.init(w))
    with pytest.raises(ValueError, match="lean_to_eigenvector needs grad_fn="):
        part.update(w, part.init(w), w)


def test_a_hessian_that_is_not_finite_is_not_carried():
    sam, w = sam_optax.eigen_sam(k=1), jnp.array([0.0, 1.0])
    state = sam.init(w)

    def good(q):
        return jnp.array([2.0, 1.0]) * q

    def bad(q):  # its value is finite, and its derivative is not
        return jnp.stack([jnp.sqrt(q[0]), q[1]])

    d, state = sam.update(good(w), state, w, grad_fn=good)
    before = state.ascent_state[0].eigenvector
    assert np.all(np.isfinite(d))
    d, state = sam.update(bad(w), state, w, grad_fn=bad)
    np.testing.assert_array_equal(state.ascent_state[0].eigenvector, before)
    assert not np.all(np.isfinite(d))


def test_the_record_counts_products_with_the_hessian():
    count = sam_optax.METHODS["eigen_sam"].gradients
    assert count(k=4, steps=6) == 5
    assert count() == pytest.approx(2.1)


def test_a_search_that_found_nothing_finite_is_made_again_on_the_next_step():
    sam, w = sam_optax.eigen_sam(k=100), jnp.array([1.0, 2.0])
    state = sam.init(w)
    for scale in (jnp.inf, 1.0):

        def grad_fn(q, scale=scale):
            return jnp.array([9.0, 1.0]) * q * scale

        _, state = sam.update(grad_fn(w), state, w, grad_fn=grad_fn)
    v = state.ascent_state[0].eigenvector
    np.testing.assert_allclose(np.abs(v), [1, 0], atol=1e-3)


def test_it_is_divided_over_devices_as_the_parameters_are():
    mesh = jax.make_mesh((2,), ("data",))  # with explicit axes
    with jax.set_mesh(mesh):
        w = jax.device_put(jnp.ones((4, 2)), jax.P("data"))
        sam = sam_optax.eigen_sam()
        step = jax.jit(lambda g, state, w: sam.update(g, state, w, grad_fn=jnp.copy))
        _, state = step(w, sam.init(w), w)
    v = state.ascent_state[0].eigenvector
    assert v.sharding.spec[0] == "data"
    np.testing.assert_allclose(np.linalg.norm(v), 1, rtol=1e-5)
