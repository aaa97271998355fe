"""A report measures the step, and costs nothing where nobody reads it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import problem
import sam_optax
from doors import DOORS
from lab import gradient
from methods import TABLE, norm


@functools.cache
def reporting(name, door):
    """(sam, compiled step), the step a function of (w, state, batch, ascend)."""
    sam = TABLE[name](rho=0.3)
    first = sam_optax.sam_value_and_grad(problem.loss, sam, report=True)
    second = sam_optax.value_and_ascent_grad(problem.loss, report=True)

    @jax.jit
    def step(w, state, batch, ascend):
        if door == "door1":
            loss, grads = first(w, batch, opt_state=state, ascend=ascend)
            return loss, grads.report
        loss, g, extra_args = second(w, batch)
        sam.update(g, state, w, ascend=ascend, **extra_args)
        return loss, extra_args["report"].value

    return sam, step


@pytest.mark.gradients_alone
@pytest.mark.parametrize("door", DOORS)
def test_a_report_measures_the_step(kind, door):
    """The first and a later one, when averages and keys have moved."""
    sam, step = reporting(kind, door)
    w, state = problem.params(), sam.init(problem.params())
    for t in range(2):
        batch, points = problem.batch(t), []

        def grad_fn(point, batch=batch, points=points):
            points.append(point)
            return gradient(point, batch)

        loss, report = step(w, state, batch, jnp.bool_(True))
        g = grad_fn(w)
        d, state = sam.update(g, state, w, grad_fn=grad_fn, ascend=True)
        point = points[1:][TABLE[kind].point]  # the first is w
        ga = grad_fn(point)
        inner = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, g, ga)))
        expected = {
            "perturbed_loss": problem.loss(point, batch),
            "surrogate_gap": problem.loss(point, batch) - problem.loss(w, batch),
            "ascent_norm": norm(g),
            "descent_norm": norm(ga),
            "cosine": inner / (norm(g) * norm(ga)),
            "perturbation_norm": norm(jax.tree.map(jnp.subtract, point, w)),
            "ascended": True,
        }
        assert set(expected) == set(report._fields)
        np.testing.assert_allclose(loss, problem.loss(w, batch), rtol=1e-6)
        for name, value in expected.items():
            np.testing.assert_allclose(
                getattr(report, name), value, rtol=1e-3, atol=1e-5, err_msg=name
            )
        w = jax.tree.map(lambda w, d: w - 0.1 * d, w, d)


def test_a_skipped_step_reports_that_it_did_not_ascend(kind):
    sam, step = reporting(kind, "door1")
    w, batch = problem.params(), problem.batch()
    _, report = step(w, sam.init(w), batch, jnp.bool_(False))
    assert not report.ascended
    assert np.isnan(report.perturbed_loss)
    assert report.ascent_norm == pytest.approx(norm(gradient(w, batch)), rel=1e-5)


def test_an_unused_report_compiles_to_nothing(kind):
    sam, w = TABLE[kind](), problem.params()
    costs = []
    for report in (False, True):
        helper = sam_optax.sam_value_and_grad(problem.loss, sam, report=report)

        def step(w, state, helper=helper):
            loss, grads = helper(w, problem.batch(), opt_state=state)
            return loss, sam.update(grads, state, w)

        cost = jax.jit(step).lower(w, sam.init(w)).compile().cost_analysis()
        costs.append((cost["flops"], cost["bytes accessed"]))
    assert costs[0] == costs[1]


def test_the_update_reports_to_whoever_asks():
    """Without a loss to tell of: what it knows of the gradients alone."""
    sam, w = sam_optax.sam(0.5), jnp.array([3.0, 4.0])
    reports = []
    d, _ = sam.update(w, sam.init(w), w, grad_fn=lambda p: 2 * p, report=reports.append)
    (report,) = reports
    np.testing.assert_allclose(d, 2 * w * 5.5 / 5, rtol=1e-6)
    assert report.ascent_norm == pytest.approx(5)
    assert report.descent_norm == pytest.approx(11)
    assert report.cosine == pytest.approx(1)
    assert report.perturbation_norm == pytest.approx(0.5)
    assert np.isnan(report.perturbed_loss)
    assert report.ascended


def test_a_report_is_read_after_the_update_and_in_its_trace():
    sam, w = sam_optax.sam(), jnp.ones(2)
    helper = sam_optax.value_and_ascent_grad(jnp.sum, report=True)
    slots = []

    @jax.jit
    def step(w):
        _, g, extra_args = helper(w)
        slots.append(extra_args["report"])
        with pytest.raises(ValueError, match="There is no report yet"):
            _ = slots[0].value
        return sam.update(g, sam.init(w), w, **extra_args)[0]

    step(w)
    with pytest.raises(ValueError, match="The report belongs to another trace"):
        _ = slots[0].value
