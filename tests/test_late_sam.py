"""SAM from a step on: the base optimizer before the switch, and SAM after it."""

import re

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from doors import DOORS
from lab import assert_trees_equal
from quadratic import W, assert_same, expected, quadratic, split, whole
from sam_optax import ascents, cadences

pytestmark = pytest.mark.usefixtures("double_precision")


def late(start):
    return sam_optax.sharpness_aware(ascents.sam(0.5), cadence=cadences.after(start))


def late_points(start, steps):
    def epsilon(g, w, memory):
        memory["t"] = t = memory.get("t", -1) + 1
        return 0.5 * g / np.linalg.norm(g) * (t >= start)

    return expected(epsilon, steps)


def trainer(start, door):
    sam = late(start)
    tx = optax.chain(sam, optax.sgd(0.1))
    return tx, jax.jit(DOORS[door](sam, tx, quadratic), static_argnames="ascend")


def visit(step, params, state, steps, ascend=lambda t: None, first=0):
    visited = []
    for t in range(first, first + steps):
        params, state, _ = step(params, state, ascend=ascend(t))
        visited.append(whole(params))
    return visited, params, state


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("start", [0, 1, 3])
def test_sam_takes_over_at_the_step_and_not_before(start, door):
    tx, step = trainer(start, door)
    params = split(W)
    visited, _, state = visit(step, params, tx.init(params), 5)
    assert_same(np.stack(visited), late_points(start, 5))
    assert int(state[0].cadence_state.cadence_step) == 5
    static, _, _ = visit(step, params, tx.init(params), 5, ascend=lambda t: t >= start)
    assert_same(np.stack(static), late_points(start, 5))


def test_a_training_that_is_resumed_knows_its_step():
    tx, step = trainer(3, "door1")
    params = split(W)
    before, params, state = visit(step, params, tx.init(params), 2)
    restored = flax.serialization.from_bytes(
        tx.init(params), flax.serialization.to_bytes(state)
    )
    assert_trees_equal(restored, state)
    after, _, _ = visit(step, params, restored, 3)
    assert_same(np.stack(before + after), late_points(3, 5))


def test_the_first_step_may_be_traced():
    """A program for all values of it, over which it is mapped."""

    def train(start):
        sam = late(start)
        tx = optax.chain(sam, optax.sgd(0.1))
        step = DOORS["door2"](sam, tx, quadratic)

        def scanned(carry, _):
            params, state, _ = step(*carry)
            return (params, state), jnp.concatenate([params["x"], params["y"]])

        carry = split(W), tx.init(split(W))
        return jax.lax.scan(scanned, carry, length=4)[1]

    visited = jax.jit(jax.vmap(train))(jnp.arange(6))
    for start in range(6):
        assert_same(visited[start], late_points(start, 4))
    np.testing.assert_array_equal(visited[4], visited[5])


def test_a_late_start_may_be_injected():
    make = optax.inject_hyperparams(late)
    sam = make(start=2)
    w, taken = split(W), []
    g, state = jax.grad(quadratic)(w), sam.init(w)
    for _ in range(4):
        d, state = sam.update(g, state, w, grad_fn=jax.grad(quadratic))
        taken.append(bool(np.any(whole(d) != whole(g))))
    assert taken == [False, False, True, True]


def test_the_program_of_the_first_part_is_that_of_the_base_optimizer():
    def text(sam, **options):
        tx = optax.chain(sam, optax.sgd(0.1))
        step = DOORS["door1"](sam, tx, quadratic)
        args = split(W), tx.init(split(W))
        program = jax.jit(lambda *args: step(*args, **options)).lower(*args)
        return program.compile().as_text()

    products = re.compile(r"= \S+ dot\(")
    plain = len(products.findall(text(sam_optax.sam(), ascend=False)))
    assert len(products.findall(text(late(3), ascend=False))) == plain
    assert len(products.findall(text(late(3), ascend=True))) > plain


@pytest.mark.parametrize("start", [-1, np.int32(-1)])
def test_a_negative_start(start):
    with pytest.raises(ValueError, match="start must be >= 0, got -1"):
        cadences.after(start)


@pytest.mark.parametrize("start", [1.5, True, "3", np.ones(2), lambda step: 3, None])
def test_a_start_that_is_no_step(start):
    with pytest.raises(TypeError, match="an integer >= 0, or a scalar array; got"):
        cadences.after(start)


def test_a_traced_start_beyond_int32_is_never_reached():
    for start in (jnp.uint32(4_000_000_000), jnp.uint32(2**31)):
        cadence = sam_optax.cadences.after(start)
        decision, _ = cadence.decide(None, cadence.init(None))
        assert not decision
