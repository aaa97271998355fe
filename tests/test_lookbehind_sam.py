"""Lookbehind-SAM: its trajectories, its base steps, and bad input."""

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
from lab import are_equal
from quadratic import H, W, assert_same, grad_fn, split, visit, whole
from sam_optax import ascents
from test_golden import GOLDEN, base_optimizer, mean_loss
from test_golden_drawn import assert_at, start_of

CASES = [
    pytest.param(case, id=case["name"])
    for case in json.loads((GOLDEN / "drawn.json").read_text())
    if case["method"] == "lookbehind_sam"
]
with_doors = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


@with_doors
@pytest.mark.parametrize("case", CASES)
def test_reproduces_the_authors_trajectory(case, door):
    data, values = np.load(GOLDEN / case["file"]), dict(case["hyperparameters"])
    if isinstance(values["alpha"], str):
        values["alpha"] = "adaptive"
    with jax.enable_x64(True):
        base = base_optimizer(**case["base_optimizer"])
        sam, tx = sam_optax.lookbehind_sam(base, **values)
        step = jax.jit(door(sam, tx, mean_loss))
        params = start_of(data)
        state = tx.init(params)
        for t, batch in enumerate(zip(data["X"], data["y"], strict=True)):
            params, state, loss = step(params, state, *batch)
            np.testing.assert_allclose(loss, data["loss"][t], rtol=0, atol=1e-10)
            assert_at(params, data, t)


@pytest.mark.usefixtures("double_precision")
@with_doors
@pytest.mark.parametrize("keep", [[1, 1, 1], [1, 1, 0]], ids=["all", "mask"])
def test_an_adaptive_ascent_sees_the_points_on_the_way(door, keep):
    """ASAM's ascents under a mask, with a schedule of α, and momentum of the base."""
    keep = np.array(keep, float)
    asam = ascents.asam(0.4, eta=0.1)
    sam, tx = sam_optax.lookbehind_sam(
        optax.sgd(0.1, momentum=0.5),
        k=3,
        alpha=lambda t: 0.5 + 0.1 * t,
        ascent=asam,
        mask={"x": True, "y": bool(keep[2])},
    )
    w, velocity, expected = W, 0, []
    for t in range(4):
        v, fast = w, w
        for _ in range(3):
            g, scale = H @ v, (np.abs(v) + 0.1)
            v = v + 0.4 * keep * scale**2 * g / np.linalg.norm(keep * scale * g)
            velocity = 0.5 * velocity + H @ v
            fast = fast - 0.1 * velocity
        w = w + (0.5 + 0.1 * t) * (fast - w)
        expected.append(w)
    assert_same(visit(sam, tx, door=door), np.stack(expected))


@pytest.mark.usefixtures("double_precision")
def test_the_base_optimizer_sees_the_fast_parameters():
    """Weight decay acts on them."""
    base = optax.chain(optax.add_decayed_weights(0.3), optax.sgd(0.1))
    _, tx = sam_optax.lookbehind_sam(base, rho=0.2, k=2, alpha=1.0)
    params = split(W)
    updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
    v, fast = W, W
    for _ in range(2):
        v = v + 0.2 * H @ v / np.linalg.norm(H @ v)
        fast = fast - 0.1 * (H @ v + 0.3 * fast)
    assert_same(whole(updates), fast - W)


def test_one_step_with_all_of_it_kept_is_sam():
    sam, tx = sam_optax.lookbehind_sam(optax.adam(0.1), rho=0.3, k=1, alpha=1.0)
    plain = sam_optax.sam(0.3)
    chain = optax.chain(plain, optax.adam(0.1))
    w = [problem.params(), problem.params()]
    steps = [
        jax.jit(DOORS["door1"](a, b, problem.loss))
        for a, b in ((sam, tx), (plain, chain))
    ]
    states = [tx.init(w[0]), chain.init(w[1])]
    for t in range(3):
        for i, step in enumerate(steps):
            w[i], states[i], _ = step(w[i], states[i], problem.batch(t))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), *w)


def test_a_step_takes_one_gradient_more_than_it_ascends():
    points, w = [], jnp.array([1.0, 2.0])
    _, tx = sam_optax.lookbehind_sam(optax.sgd(0.1), k=4)
    state = tx.init(w)
    tx.update(w, state, w, grad_fn=lambda q: points.append(q) or q)
    assert len(points) == 4
    assert len(state.sharpness_state.ascent_state.path_gradients) == 3


@pytest.mark.parametrize("axis_name", [None, "devices"])
def test_the_helper_takes_no_gradient_twice(axis_name):
    """The ascents and the base steps use the same one at each point on the way."""
    points, w = [], jnp.array([1.0, 2.0])

    def loss(w):
        points.append(w)
        return jnp.sum(w**2)

    sam, tx = sam_optax.lookbehind_sam(optax.sgd(0.1), k=3)
    helper = sam_optax.sam_value_and_grad(loss, sam, axis_name=axis_name)

    def step(w):
        points.clear()
        return helper(w, opt_state=tx.init(w))[1].gradients

    mesh = jax.make_mesh((2,), ("devices",))
    here = jax.sharding.PartitionSpec()
    mapped = jax.shard_map(step, mesh=mesh, in_specs=here, out_specs=here)
    jax.make_jaxpr(mapped if axis_name else step)(w)
    assert len(points) == 4


@with_doors
def test_a_resumed_run_goes_on_as_it_was(door):
    sam, tx = sam_optax.lookbehind_sam(
        optax.adam(0.1), k=3, alpha=lambda t: 0.3 + t / 9
    )
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


def test_a_bad_step_is_seen_and_leaves_no_trace():
    """The base optimizer skips each of its steps."""
    base = optax.apply_if_finite(optax.adam(0.1), 9)
    _, tx = sam_optax.lookbehind_sam(base, k=2)
    w = jnp.array([1.0, 2.0])
    _, state = tx.update(w, tx.init(w), w, grad_fn=lambda q: q)
    bad = w * jnp.nan
    updates, after = tx.update(bad, state, w, grad_fn=lambda q: bad)
    np.testing.assert_array_equal(updates, 0)
    assert after.fast_optimizer_state.total_notfinite == 2
    inner = after.fast_optimizer_state.inner_state
    assert are_equal(inner, state.fast_optimizer_state.inner_state)
    kept = after.sharpness_state.ascent_state.path_gradients
    assert np.all(np.isfinite(kept[0]))
    _, tx = sam_optax.lookbehind_sam(optax.sgd(0.1), k=2)
    updates, _ = tx.update(bad, tx.init(w), w, grad_fn=lambda q: bad)
    assert np.all(np.isnan(updates))


@pytest.mark.filterwarnings("ignore:Some perturbed parameters")
def test_dtypes_are_kept():
    w = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2)}
    _, tx = sam_optax.lookbehind_sam(optax.sgd(0.1), rho=0.5, alpha="adaptive")
    state = tx.init(w)
    updates, after = tx.update(w, state, w, grad_fn=lambda q: q)
    assert [u.dtype for u in jax.tree.leaves(updates)] == [jnp.bfloat16, jnp.float32]
    for a, b in zip(*map(jax.tree.leaves, (after, state)), strict=True):
        assert a.dtype == b.dtype


def test_impossible_arguments():
    for arguments, words in (
        ({"k": 0}, "k must be an integer >= 1"),
        ({"alpha": "fast"}, "alpha must be a number or 'adaptive', got 'fast'"),
        ({"alpha": 1.5}, "alpha must be >= 0 and <= 1"),
        ({"rho": -1.0}, "rho must be >= 0"),
        ({"ascent": ascents.msam()}, "this ascent follows something else"),
    ):
        with pytest.raises(ValueError, match=words):
            sam_optax.lookbehind_sam(optax.sgd(0.1), **arguments)
    sam, tx = sam_optax.lookbehind_sam(optax.sgd(0.1))
    helper = sam_optax.sam_value_and_grad(problem.loss, sam, m=4)
    w = problem.params()
    with pytest.raises(ValueError, match="does not go with m="):
        helper(w, problem.batch(), opt_state=tx.init(w))
    _, tx = sam_optax.lookbehind_sam(optax.sgd(0.1), mask={"a": False, "b": False})
    with pytest.raises(ValueError, match="mask"):
        tx.init({"a": jnp.ones(2), "b": jnp.ones(2)})


def test_the_base_steps_descend_on_the_loss_and_not_on_that_of_the_ascent():
    """With rho=0, both steps are of SGD on the loss, wherever the ascents lead."""
    w = jnp.array([1.0, -2.0])

    def ascent_loss(w, x):
        return jnp.sum(jnp.sin(w) * x)

    def loss(w, x):
        return jnp.sum(w**2 * x)

    sam, tx = sam_optax.lookbehind_sam(optax.sgd(1.0), rho=0.0, k=2, alpha=1.0)
    state = tx.init(w)
    loss_and_grads = sam_optax.sam_value_and_grad(loss, sam, ascent_loss_fn=ascent_loss)
    _, grads = loss_and_grads(w, jnp.ones(2), opt_state=state)
    updates, _ = tx.update(grads, state, w)
    np.testing.assert_allclose(updates, -2 * 2 * w, rtol=1e-6)


def test_a_bad_point_on_the_way_does_not_bring_back_the_gradients_before():
    """The second point is infinite, where this loss has a gradient of zero."""
    _, tx = sam_optax.lookbehind_sam(optax.sgd(0.1), rho=1.0, k=3)
    w = jnp.array([1.0, 2.0])
    updates, state = tx.update(w, tx.init(w), w, grad_fn=lambda q: q)
    assert np.all(np.isfinite(updates))

    def grad_fn(q):
        far = jnp.max(jnp.abs(q)) > 2.5
        return jnp.where(jnp.isfinite(q), jnp.where(far, jnp.inf, q), 0.0)

    updates, after = tx.update(w, state, w, grad_fn=grad_fn)
    assert np.all(np.isnan(updates))
    kept = after.sharpness_state.ascent_state.path_gradients
    assert np.all(np.isfinite(kept[0]))
