"""Entropy-SGD: its walk against a loop by hand, and what a method has to do."""

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
from quadratic import H, W, grad_fn, split, whole
from sam_optax import _tree
from sam_optax._random import key_stream

with_doors = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


def walk(w, gamma, noise, xi, momentum=0.0, nesterov=True, rate=0.2, decay=0.6):
    """w − μ of the paper's walk."""
    x, mu, velocity = w, w, 0
    for draw in xi:
        a = H @ x
        if momentum:
            velocity = momentum * velocity + a
            a = a + momentum * velocity if nesterov else velocity
        x = x - rate * (a - gamma * (w - x)) - np.sqrt(rate) * noise * draw
        mu = decay * mu + (1 - decay) * x
    return w - mu


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("momentum, nesterov", [(0.0, True), (0.7, True), (0.7, False)])
def test_the_walk_of_the_paper_with_its_scoping(momentum, nesterov):
    """On two steps, whose γ and noise follow schedules."""

    def gamma(t):
        return 0.3 * 1.5**t

    def noise(t):
        return 0.1 / (1 + t)

    sam = sam_optax.entropy_sgd(
        gamma,
        noise,
        steps=3,
        walk_rate=0.2,
        decay=0.6,
        momentum=momentum,
        nesterov=nesterov,
    )
    stream = key_stream(0, "entropy_sgd")
    data = stream.start()
    params = split(W)
    state = sam.init(params)
    for t in range(2):
        key, data = stream.next(data)
        drawn = [
            _tree.normal_like(jax.random.fold_in(key, i), params) for i in range(3)
        ]
        xi = [whole(tree) for tree in drawn]
        expected = gamma(t) * walk(
            whole(params), gamma(t), noise(t), xi, momentum, nesterov
        )
        d, state = sam.update(grad_fn(params), state, params, grad_fn=grad_fn)
        np.testing.assert_allclose(whole(d), expected, rtol=1e-9)
        params = jax.tree.map(lambda w, d: w - d, params, d)


@with_doors
def test_a_resumed_run_goes_on_as_it_was(door):
    sam = sam_optax.entropy_sgd(lambda t: 0.1 * (1 + t), noise=0.1, steps=3)
    tx = optax.chain(sam, optax.sgd(1.0, momentum=0.9))
    step = jax.jit(door(sam, tx, problem.loss))
    w, state = problem.params(), tx.init(problem.params())
    for t in range(4):
        if t == 2:
            state = pickle.loads(pickle.dumps(state))
            saved = w, state
        w, state, _ = step(w, state, problem.batch(t))
    again, later = saved
    for t in (2, 3):
        again, later, _ = step(again, later, problem.batch(t))
    assert are_equal((again, later), (w, state))


@pytest.mark.slow
def test_groups_walk_by_themselves_with_noise_of_their_own():
    sam, w, batch = sam_optax.entropy_sgd(0.5, 0.1, steps=2), problem.params(), None
    batch = problem.batch(size=8)
    same = jax.tree.map(lambda x: jnp.concatenate([x[:4], x[:4]]), batch)
    found = []
    for options, examples in (
        ({"m": 4}, same),
        ({}, same),
        ({"m": 4, "map_groups": "scan"}, same),
    ):
        helper = sam_optax.sam_value_and_grad(problem.loss, sam, **options)
        _, grads = helper(w, examples, opt_state=sam.init(w))
        found.append(grads.gradients)
    assert_trees_close(found[0], found[2], rtol=1e-4, atol=1e-6)
    assert np.max(np.abs(found[0]["a"] - found[1]["a"])) > 1e-4


def test_what_is_not_finite_is_seen_and_not_carried():
    sam, w = sam_optax.entropy_sgd(guard=True), jnp.ones(2)
    state = sam.init(w)
    d, after = sam.update(w * jnp.nan, state, w, grad_fn=lambda q: q * jnp.nan)
    assert np.all(np.isnan(d))
    d, _ = sam.update(w, after, w, grad_fn=lambda q: q)
    assert np.all(np.isfinite(d))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.filterwarnings("ignore:Some perturbed parameters")
def test_half_precision_parameters_have_directions_of_their_dtype(dtype):
    sam, w = sam_optax.entropy_sgd(0.5, 0.1), jnp.ones(3, dtype)
    d, _ = sam.update(w, sam.init(w), w, grad_fn=lambda q: q)
    assert d.dtype == dtype
    assert np.all(d > 0)


def test_a_step_takes_as_many_gradients_as_the_record_says():
    points, w = [], jnp.ones(2)
    sam = sam_optax.entropy_sgd(steps=4)
    sam.update(w, sam.init(w), w, grad_fn=lambda q: points.append(q) or q)
    assert len(points) == 4
    assert sam_optax.methods.FURTHER_METHODS["entropy_sgd"].cost == "n"


def test_impossible_arguments():
    for arguments, words in (
        ({"gamma": -1.0}, "gamma must be >= 0"),
        ({"noise": -1.0}, "noise must be >= 0"),
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"walk_rate": 0.0}, "walk_rate must be >= 1e-30"),
        ({"decay": 1.0}, "decay must be >= 0 and < 1"),
        ({"momentum": 1.0}, "momentum must be >= 0 and < 1"),
    ):
        with pytest.raises(ValueError, match=words):
            sam_optax.entropy_sgd(**arguments)
