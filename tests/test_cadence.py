"""When the second gradient is taken: cadences, `ascend=`, and what stands in for it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import problem
import sam_optax
from doors import DOORS
from lab import assert_trees_close, bench, gradient
from quadratic import (
    H,
    W,
    assert_same,
    descend,
    expected,
    orthogonal_to,
    split,
    whole,
)
from quadratic import grad_fn as quadratic_gradient
from sam_optax import ascents, cadences

ASCENTS = {
    "sam": lambda: ascents.sam(0.1),
    "fsam": lambda: ascents.fsam(0.1),
    "asam": lambda: ascents.asam(0.1),
}
every_ascent = pytest.mark.parametrize("ascent", ASCENTS)
both_doors = pytest.mark.parametrize("door", DOORS)


def grad_fn(w):
    return gradient(w, problem.batch())


def every_second(ascent):
    return sam_optax.sharpness_aware(ASCENTS[ascent](), cadence=cadences.every_k(2))


AFTER = {
    "sgd": lambda: optax.sgd(0.1),
    "multi_steps": lambda: optax.MultiSteps(
        optax.sgd(0.1), 1
    ).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.sgd(0.1), 3),
}


@pytest.mark.parametrize(
    ("ascent", "after"),
    [
        *((a, "sgd") for a in ASCENTS),
        ("fsam", "multi_steps"),
        ("fsam", "apply_if_finite"),
    ],
)
@both_doors
def test_ascend_overrides_the_cadence_and_static_equals_traced(ascent, after, door):
    tx, step = bench("sam", door).step(every_second(ascent), AFTER[after])
    static, traced = jax.jit(step, static_argnames="ascend"), jax.jit(step)
    ways = {
        "cadence": lambda t, *args: traced(*args),
        "static": lambda t, *args: static(*args, ascend=t % 2 == 0),
        "traced": lambda t, *args: traced(*args, ascend=jnp.asarray(t % 2 == 0)),
    }
    results = {}
    for name, way in ways.items():
        params, results[name] = problem.params(), []
        state = tx.init(params)
        for t in range(4):
            params, state, _ = way(t, params, state, problem.batch(t))
            results[name].append(params)
        results[name].append(state)
    assert_trees_close(results["static"], results["cadence"], rtol=1e-5, atol=1e-6)
    assert_trees_close(results["traced"], results["cadence"], rtol=1e-5, atol=1e-6)
    params = problem.params()
    plain, _, _ = static(params, tx.init(params), problem.batch(), ascend=False)
    expected = jax.tree.map(lambda w, g: w - 0.1 * g, params, grad_fn(params))
    assert_trees_close(plain, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ascend", [True, False, "traced"])
@pytest.mark.parametrize("around", ["multi_steps", "apply_if_finite", "inject"])
def test_ascend_works_with_wrappers_around_the_whole_chain(around, ascend):
    """Door 2, where extra arguments travel from the outside in."""
    inject = optax.inject_hyperparams(sam_optax.fsam)
    fsam = sam_optax.fsam(0.1)
    tx = {
        "multi_steps": lambda tx: optax.MultiSteps(
            optax.chain(fsam, tx), 1
        ).gradient_transformation(),
        "apply_if_finite": lambda tx: optax.apply_if_finite(optax.chain(fsam, tx), 3),
        "inject": lambda tx: optax.chain(inject(rho=0.1), tx),
    }[around](optax.sgd(1.0))
    w = problem.params()
    g = grad_fn(w)
    value = jnp.asarray(True) if ascend == "traced" else ascend
    updates, _ = tx.update(g, tx.init(w), w, grad_fn=grad_fn, ascend=value)
    if ascend is not False:  # F-SAM's first perturbation is along g
        scale = 0.1 / optax.tree.norm(g)
        g = grad_fn(jax.tree.map(lambda w, g: w + scale * g, w, g))
    assert_trees_close(updates, jax.tree.map(jnp.negative, g), rtol=1e-4, atol=1e-5)


@every_ascent
@both_doors
def test_a_static_ascend_leaves_no_branch_in_the_program(ascent, door):
    tx, step = bench("sam", door).step(every_second(ascent))
    params = problem.params()
    args = (params, tx.init(params), problem.batch())

    def forward_passes_and_branches(**kwargs):
        jaxpr = str(jax.make_jaxpr(lambda *args: step(*args, **kwargs))(*args))
        return len(re.findall(r"= tanh", jaxpr)), len(re.findall(r"= cond\[", jaxpr))

    passes, branches = forward_passes_and_branches(ascend=True)
    assert forward_passes_and_branches(ascend=False)[0] == passes - 1
    assert forward_passes_and_branches()[1] == branches + 1


@pytest.mark.parametrize("ascend", ["yes", 1, np.ones(2, bool), np.float32(1)])
def test_ascend_must_be_a_bool(ascend):
    sam, w = sam_optax.sam(), problem.params()
    with pytest.raises(TypeError, match=r"ascend must be a bool or a scalar bool"):
        sam.update(w, sam.init(w), w, grad_fn=lambda p: p, ascend=ascend)


# --- Each cadence against its formula, on a quadratic in float64.


@pytest.mark.usefixtures("double_precision")
def test_every_k_takes_the_second_gradient_on_steps_0_k_2k():
    sam = sam_optax.sharpness_aware(ascents.sam(0.5), cadence=cadences.every_k(3))

    def epsilon(g, w, memory):
        memory["t"] = memory.get("t", -1) + 1
        return 0.5 * g / np.linalg.norm(g) * (memory["t"] % 3 == 0)

    assert_same(descend(sam, steps=7), expected(epsilon, steps=7))


@pytest.mark.usefixtures("double_precision")
def test_the_ascent_goes_on_while_the_cadence_skips():
    """F-SAM's average sees every gradient, and its rho schedule counts every step."""
    sam = sam_optax.sharpness_aware(
        ascents.fsam(rho=lambda step: 0.1 * (1 + step), decay=0.6),
        cadence=cadences.every_k(2),
    )

    def epsilon(g, w, memory):
        memory["m"] = 0.6 * memory.get("m", 0) + 0.4 * g
        memory["t"] = t = memory.get("t", -1) + 1
        h = g - memory["m"]
        return 0.1 * (1 + t) * h / np.linalg.norm(h) * (t % 2 == 0)

    assert_same(descend(sam, steps=6), expected(epsilon, steps=6))


@pytest.mark.usefixtures("double_precision")
def test_look_sam_reuses_the_kept_direction():
    w, v, visited = W, None, []
    for t in range(7):
        g = H @ w
        if t % 3 == 0:
            ga = H @ (w + 0.5 * g / np.linalg.norm(g))
            v = orthogonal_to(g, ga)
            d = ga
        else:
            d = g + 0.7 * np.linalg.norm(g) / np.linalg.norm(v) * v
        w = w - 0.1 * d
        visited.append(w)
    assert_same(descend(sam_optax.look_sam(0.5, k=3), steps=7), np.stack(visited))


def test_look_sam_scales_up_no_rounding():
    """At rho 0, gᵃ − g is rounding, and no direction is kept of it."""
    sam = sam_optax.look_sam(rho=0.0, k=3)
    w = jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)
    g = jnp.sin(w)
    noisy = g * (1 + jnp.finfo(jnp.float32).eps * jnp.sign(jnp.cos(9 * w)))
    _, state = sam.update(g, sam.init(w), w, grad_fn=lambda p: noisy, ascend=True)
    d, _ = sam.update(g, state, w, grad_fn=lambda p: noisy, ascend=False)
    np.testing.assert_array_equal(d, g)


@pytest.mark.usefixtures("double_precision")
def test_ae_sam_ascends_where_the_squared_norm_is_large():
    sam = sam_optax.ae_sam(
        rho=0.5, threshold=optax.linear_schedule(1.0, -1.0, 20), decay=0.8
    )
    w = split(W)
    state, mean, variance = sam.init(w), 0.0, np.exp(-20.0)
    scales = np.random.default_rng(0).uniform(0.5, 2, size=20)
    chosen, wanted = [], []
    for t, scale in enumerate(scales):
        g = scale * W
        d, state = sam.update(split(g), state, w, grad_fn=quadratic_gradient)
        chosen.append(bool(np.any(whole(d) != g)))
        square = g @ g
        mean = 0.8 * mean + 0.2 * square
        variance = 0.8 * variance + 0.2 * (square - mean) ** 2
        wanted.append(square >= mean + (1 - t / 10) * np.sqrt(variance))
    assert chosen == wanted
    assert 3 < sum(wanted) < 17
