"""Groups of examples on one device: a perturbation each, and the mean of what follows.

That groups may lie on several devices, test_devices.py and test_meshes.py see.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import problem
import sam_optax
from devices import (
    KINDS,
    assert_like_one_device,
    reference,
    table,
)
from lab import assert_trees_close, gradient
from methods import TABLE
from sam_optax._doors.groups import default_map
from sam_optax.data import k_sam, sub_batch

pytestmark = pytest.mark.usefixtures("double_precision")

# --- The contract with the core, with groups written by hand.


def mean(*trees):
    return jax.tree.map(lambda *x: sum(x) / len(x), *trees)


BATCHES = [problem.batch(t, size=4) for t in range(3)]


def mean_gradient(w):
    return mean(*[gradient(w, batch) for batch in BATCHES])


def per_group_at(w):
    """What a door passes on as `per_group`."""

    def follow(path, index):
        def grad_fn(point):
            return gradient(point, BATCHES[index])

        return path(grad_fn(w), grad_fn, index)

    return lambda path: mean(*[follow(path, index) for index in range(3)])


def update_of_groups(sam, state, w):
    return sam.update(
        mean_gradient(w),
        state,
        w,
        grad_fn=mean_gradient,
        per_group=per_group_at(w),
        ascend=True,
    )


def test_d_is_the_mean_over_groups_and_state_follows_the_mean_gradient(kind):
    """On the second step, where it matters what was carried from the first."""
    row = TABLE[kind]
    if row.draws:
        pytest.skip("groups draw their own noise: see below")
    sam, w = row(), problem.params()
    _, state = sam.update(mean_gradient(w), sam.init(w), w, grad_fn=mean_gradient)
    d, after = update_of_groups(sam, state, w)
    own = []
    for batch in BATCHES:

        def grad_fn(point, batch=batch):
            return gradient(point, batch)

        own.append(sam.update(grad_fn(w), state, w, grad_fn=grad_fn, ascend=True)[0])
    assert_trees_close(d, mean(*own), rtol=1e-4, atol=1e-5)
    _, expected = sam.update(
        mean_gradient(w), state, w, grad_fn=mean_gradient, ascend=True
    )
    assert_trees_close(after.ascent_state, expected.ascent_state, rtol=1e-6)
    if row.name == "look_sam":  # it keeps what lies across the mean of the groups
        v = optax.tree.sub(d, mean_gradient(w))
        kept = after.cadence_state.kept_direction
        assert optax.tree.vdot(kept, mean_gradient(w)) == pytest.approx(0, abs=1e-5)
        assert optax.tree.vdot(kept, v) > 0.9 * optax.tree.norm(
            optax.tree.sub(v, project(v, mean_gradient(w)))
        )


def project(v, g):
    scale = optax.tree.vdot(v, g) / optax.tree.vdot(g, g)
    return jax.tree.map(lambda g: scale * g, g)


def test_a_descents_state_follows_the_mean_gradient():
    """Here, the average of gᵃ − g, of which d is the sum with g."""

    def init_fn(params):
        return jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)

    def update_fn(updates, state, params=None, *, ascent_gradient, **extra):
        step, average = state
        gap = jax.tree.map(jnp.subtract, updates, ascent_gradient)
        average = jax.tree.map(lambda a, x: 0.5 * a + 0.5 * x, average, gap)
        d = jax.tree.map(jnp.add, ascent_gradient, average)
        return d, (step + 1, average)

    sam = sam_optax.sharpness_aware(
        sam_optax.ascents.sam(0.3),
        descent=optax.GradientTransformationExtraArgs(init_fn, update_fn),
    )
    w, expected = problem.params(), jax.tree.map(jnp.zeros_like, problem.params())
    state = sam.init(w)
    for t in range(2):
        gaps = []
        for batch in BATCHES:
            g = gradient(w, batch)
            scale = 0.3 / optax.tree.norm(g)
            point = jax.tree.map(lambda w, g, s=scale: w + s * g, w, g)
            gaps.append(jax.tree.map(jnp.subtract, gradient(point, batch), g))
        expected = jax.tree.map(lambda a, x: 0.5 * a + 0.5 * x, expected, mean(*gaps))
        d, state = update_of_groups(sam, state, w)
        assert state.descent_state[0] == t + 1
        assert_trees_close(state.descent_state[1], expected, rtol=1e-4, atol=1e-5)
        total = jax.tree.map(jnp.add, mean_gradient(w), expected)
        assert_trees_close(d, total, rtol=1e-4, atol=1e-5)


# --- Random numbers.


@pytest.mark.parametrize(
    "make",
    [
        lambda: sam_optax.random_sam(0.2),
        lambda: sam_optax.rsam(0.2),
        lambda: sam_optax.esam(0.2),
    ],
    ids=["random_sam", "rsam", "esam"],
)
def test_each_group_draws_its_own_noise(make):
    """All groups see the same example here, so only the noise differs."""
    sam = make()
    seen = []

    def loss_fn(w, x):
        return jnp.mean(x @ w**2)

    w = jnp.arange(1.0, 9.0)
    helper = sam_optax.value_and_ascent_grad(loss_fn, m=1, map_groups="unroll")
    _, g, extra = helper(w, jnp.ones((4, 8)))

    def per_group(path):
        def recorded(g, evaluate, index):
            points = []
            result = path(g, lambda p: points.append(p) or evaluate(p), index)
            seen.append(points[-1])
            return result

        return extra["per_group"](recorded)

    sam.update(g, sam.init(w), w, **(extra | {"per_group": per_group}))
    assert len(seen) == 4
    for i in range(4):
        for j in range(i):
            assert np.max(np.abs(seen[i] - seen[j])) > 1e-3


# --- How groups run.


def test_one_perturbation_per_group_is_another_trajectory():
    """Or the two halves of the table would be one."""
    for method in KINDS:
        one, own = (reference(split, KINDS)[method] for split in (False, True))
        assert table.difference(one, own) > 1e-5, method


@pytest.mark.parametrize("map_groups", ["unroll", "scan"])
def test_groups_give_the_same_numbers_however_they_run(map_groups):
    replicas = table.one_device(KINDS, True, map_groups)
    assert_like_one_device(replicas, True, KINDS)


def test_one_group_of_the_whole_batch_is_one_perturbation():
    start, step = table.make_step(KINDS, m=table.DEVICES * table.GROUP)
    params = table.train(jax.jit(step), start(table.make_params()))
    assert_like_one_device([params], False, KINDS)


@pytest.mark.parametrize(
    ("devices", "count", "expected"),
    [(1, 16, "unroll"), (1, 17, "scan"), (2, 4, "vmap"), (2, 40, "vmap")],
)
def test_how_groups_run_by_default(monkeypatch, devices, count, expected):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert default_map(count) == expected
    alone = "unroll" if count <= 16 else "scan"
    assert default_map(count, is_alone=True) == alone


@pytest.mark.parametrize("map_groups", ["vmap", "unroll", "scan"])
def test_half_precision_gradients_are_averaged_in_float32(map_groups):
    """A sum of 1024 in bfloat16 stops at 256, and one in float16 overflows."""

    def loss_fn(w, x):
        return jnp.mean(jnp.sum(w * x, axis=-1))

    for dtype, size, value in (("bfloat16", 1024, 1.0), ("float16", 64, 2000.0)):
        count = size if map_groups != "unroll" else 64
        x = jnp.full((count, 2), value, dtype)
        helper = sam_optax.value_and_ascent_grad(loss_fn, m=1, map_groups=map_groups)
        _, g, extra = helper(jnp.ones(2, dtype), x)
        assert g.dtype == dtype
        np.testing.assert_array_equal(g.astype(float), value)
        again = extra["grad_fn"](jnp.ones(2, dtype))
        np.testing.assert_array_equal(again.astype(float), value)


# --- What a step of groups returns.


def test_the_value_is_that_of_the_global_batch_and_aux_gains_an_axis():
    def loss_fn(w, batch, key, mode, *, scale):
        assert mode == "train"
        x, y = batch["x"], batch["y"]
        shifted = y + jax.random.normal(key, ())
        return scale * table.loss_fn(w, x, shifted), {"first": x[0], "size": len(x)}

    x, y = table.make_batch(0)
    batch, key = {"x": x, "y": y}, jax.random.key(0)
    params, sam = table.make_params(), sam_optax.sam()
    expected = loss_fn(params, batch, key, "train", scale=2.0)[0]
    for map_groups in ("vmap", "unroll", "scan"):
        helper = sam_optax.sam_value_and_grad(
            loss_fn, sam, has_aux=True, m=4, map_groups=map_groups
        )

        @jax.jit
        def run(params, batch, key, helper=helper):
            state = sam.init(params)
            return helper(params, batch, key, "train", scale=2.0, opt_state=state)[0]

        loss, aux = run(params, batch, key)
        np.testing.assert_allclose(loss, expected, rtol=1e-12)
        np.testing.assert_array_equal(aux["first"], x[::4])
        np.testing.assert_array_equal(aux["size"], [4, 4, 4, 4])


def test_the_second_door_takes_groups_too():
    sam, tx = table.make_optimizer("fsam")
    del sam
    gradients = sam_optax.value_and_ascent_grad(
        table.loss_fn, batch_argnums=(1, 2), m=table.GROUP
    )

    @jax.jit
    def step(states, x, y):
        params, state = states["fsam"]
        _, g, extra = gradients(params, x, y)
        updates, state = tx.update(g, state, params, **extra)
        return {"fsam": (optax.apply_updates(params, updates), state)}

    params = table.make_params()
    trained = table.train(step, {"fsam": (params, tx.init(params))})
    assert_like_one_device([trained], True, ("fsam",))


@pytest.mark.parametrize("map_groups", ["vmap", "unroll", "scan"])
def test_a_step_of_groups_that_skips_descends_on_all_of_them(map_groups):
    """Also where g is that of a part of each group, and taken anew."""
    params, (x, y) = table.make_params(), table.make_batch(0)
    whole = jax.grad(table.loss_fn)(params, x, y)
    for rule in (None, sub_batch(0.5)):
        helper = sam_optax.sam_value_and_grad(
            table.loss_fn,
            sam_optax.sam(0.2),
            m=4,
            map_groups=map_groups,
            data=rule,
            batch_argnums=(1, 2),
        )
        state = sam_optax.sam(0.2).init(params)
        _, grads = helper(params, x, y, opt_state=state, ascend=False)
        assert_trees_close(grads.gradients, whole, rtol=1e-9, atol=1e-12)


def test_a_report_of_groups_averages_them():
    x, y = table.make_batch(0)
    params, sam = table.make_params(), sam_optax.sam(0.2)
    options = {"report": True, "batch_argnums": (1, 2)}
    helper = sam_optax.sam_value_and_grad(table.loss_fn, sam, m=np.int64(4), **options)
    alone = sam_optax.sam_value_and_grad(table.loss_fn, sam, **options)
    report = helper(params, x, y, opt_state=sam.init(params))[1].report
    each = [
        alone(params, x[i : i + 4], y[i : i + 4], opt_state=sam.init(params))[1].report
        for i in range(0, 16, 4)
    ]
    for field in ("perturbed_loss", "surrogate_gap", "perturbation_norm"):
        mean = np.mean([getattr(r, field) for r in each])
        np.testing.assert_allclose(getattr(report, field), mean, rtol=1e-6)


def test_data_rules_apply_within_each_group():
    def losses(w, x, y):
        hidden = jnp.tanh(x @ w["in"] + w["shift"])
        return jnp.square(hidden @ w["out"] - y)

    params, sam = table.make_params(), sam_optax.sam(0.2)
    x, y = table.make_batch(0)
    options = {"batch_argnums": (1, 2), "data": k_sam(2)}
    alone = sam_optax.sam_value_and_grad(losses, sam, **options)
    each = [
        alone(params, x[i : i + 4], y[i : i + 4], opt_state=sam.init(params))[1]
        for i in range(0, 16, 4)
    ]
    expected = jax.tree.map(lambda *d: sum(d) / 4, *[d.gradients for d in each])
    for map_groups in ("vmap", "unroll", "scan"):
        helper = sam_optax.sam_value_and_grad(
            losses, sam, m=4, map_groups=map_groups, **options
        )
        _, grads = helper(params, x, y, opt_state=sam.init(params))
        assert_trees_close(grads.gradients, expected, rtol=1e-9, atol=1e-12)


# --- Accumulation.


def test_multi_steps_after_sam_is_one_perturbation_per_micro_batch():
    """Four micro-batches of four are one batch of sixteen with m = 4."""
    sam = sam_optax.sam(0.2)
    tx = optax.chain(sam, optax.MultiSteps(optax.sgd(0.05, momentum=0.9), 4))
    helper = sam_optax.sam_value_and_grad(table.loss_fn, sam)

    @jax.jit
    def micro_step(params, state, x, y):
        _, grads = helper(params, x, y, opt_state=state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = table.make_params()
    state = tx.init(params)
    for t in range(table.STEPS):
        x, y = table.make_batch(t)
        for i in range(0, 16, 4):
            params, state = micro_step(params, state, x[i : i + 4], y[i : i + 4])
    # Optax's running mean has weights in float32.
    assert table.difference(params, reference(True, ("sam",))["sam"]) <= 1e-7


def test_accumulation_inside_of_the_loss_is_the_large_batch():
    """The loss goes through micro-batches one after another; each of its two gradients
    then is that of the whole batch."""

    def accumulated(w, x, y):
        micro = (x.reshape(4, 4, -1), y.reshape(4, 4))
        losses = jax.lax.map(jax.checkpoint(lambda b: table.loss_fn(w, *b)), micro)
        return jnp.mean(losses)

    sam, tx = table.make_optimizer("sam")
    helper = sam_optax.sam_value_and_grad(accumulated, sam)

    @jax.jit
    def step(states, x, y):
        params, state = states["sam"]
        _, grads = helper(params, x, y, opt_state=state)
        updates, state = tx.update(grads, state, params)
        return {"sam": (optax.apply_updates(params, updates), state)}

    params = table.make_params()
    trained = table.train(step, {"sam": (params, tx.init(params))})
    assert_like_one_device([trained], False, ("sam",))


# --- What it costs.


@pytest.mark.parametrize("map_groups", ["vmap", "unroll", "scan"])
def test_groups_cost_no_further_gradient(map_groups):
    """The compiler counts the body of a loop once, for `scan` that of one group."""

    def wide(w, x):
        return jnp.mean(jnp.tanh(jnp.tanh(x @ w) @ w))

    w, x = jnp.eye(64), jnp.ones((32, 64))
    sam = sam_optax.sam()
    helper = sam_optax.sam_value_and_grad(wide, sam, m=8, map_groups=map_groups)

    def step(w, x):
        loss, grads = helper(w, x, opt_state=sam.init(w))
        return loss, grads.gradients

    def count(function):
        cost = jax.jit(function).lower(w, x).compile().cost_analysis()
        return cost["flops"]

    examples = 8 if map_groups == "scan" else 32
    plain = jax.jit(jax.grad(wide)).lower(w, x[:examples]).compile().cost_analysis()
    forward = jax.jit(wide).lower(w, x[:examples]).compile().cost_analysis()["flops"]
    extra = forward if map_groups == "scan" else 0
    assert count(step) == pytest.approx(2 * plain["flops"] + extra, rel=0.15)


def test_one_after_another_does_not_keep_every_groups_gradient():
    """Of parameters that dominate: the gradients of sixteen groups, or of one."""

    def loss_fn(w, x):
        return jnp.mean(jnp.tanh(x @ w))

    w, x = jnp.ones((256, 256)), jnp.ones((16, 256))
    sam = sam_optax.sam()
    temporary = {}
    for map_groups in ("vmap", "scan"):
        helper = sam_optax.sam_value_and_grad(loss_fn, sam, m=1, map_groups=map_groups)

        def step(w, x, helper=helper):
            return helper(w, x, opt_state=sam.init(w))[1].gradients

        compiled = jax.jit(step).lower(w, x).compile()
        temporary[map_groups] = compiled.memory_analysis().temp_size_in_bytes
    assert temporary["scan"] < 6 * w.nbytes
    assert temporary["vmap"] > 16 * w.nbytes


# --- What is refused.


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        ({}, {"m": 5}, "m must divide the batch: 16 examples do not make groups of 5"),
        ({}, {"m": 4, "batch_argnums": None}, "Argument 2 of loss_fn has a first axis"),
        ({"ascent_batch": table.make_batch(1)}, {"m": 4}, "pass one of them"),
    ],
)
def test_batches_that_do_not_fit_are_errors_when_traced(call, options, message):
    helper = sam_optax.value_and_ascent_grad(
        table.loss_fn, **({"batch_argnums": (1, 2)} | options)
    )
    with pytest.raises(ValueError, match=message):
        helper(table.make_params(), *table.make_batch(0), **call)
