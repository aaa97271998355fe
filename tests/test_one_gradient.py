"""Ascents that follow the steps, and steps that take one gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import problem
import sam_optax
from doors import DOORS
from lab import all_finite, assert_trees_close, assert_trees_equal
from quadratic import H, W, descend, grad_fn, quadratic, split, visit, whole
from sam_optax import ascents, cadences, data, descents

pytestmark = pytest.mark.usefixtures("double_precision")


def unit(v):
    length = np.linalg.norm(v)
    return v / length if length else v


def msam_by_hand(rho, decay, steps=4, lr=0.1, ascends=lambda t: True):
    w, m, points = W, np.zeros(3), []
    for t in range(steps):
        d = H @ (w - (rho * unit(m) if ascends(t) else 0))
        m = decay(t) * m + d if callable(decay) else decay * m + d
        w = w - lr * d
        points.append(w)
    return points


@pytest.mark.parametrize("decay", [0.0, 0.5, lambda t: 0.9 - 0.2 * t])
def test_the_momentum_is_that_of_the_steps_before(decay):
    points = descend(sam_optax.msam(0.3, decay))
    np.testing.assert_allclose(points, msam_by_hand(0.3, decay), rtol=1e-12)


def test_the_direction_can_be_the_base_optimizers_own_momentum():
    """Through both doors, at the same points as a momentum of its own."""
    parts = ascents.given_direction("m", sign=-1), ascents.sam(0.3)
    sam = sam_optax.sharpness_aware(ascents.chain(*parts))
    tx = optax.chain(sam, optax.sgd(0.1, momentum=0.5))
    own = sam_optax.msam(0.3, 0.5)
    expected = visit(own, optax.chain(own, optax.sgd(0.1, momentum=0.5)))
    for door in DOORS.values():
        step = jax.jit(door(sam, tx, quadratic))
        w, state = split(W), tx.init(split(W))
        for point in expected:
            momentum = optax.tree.get(state, "trace")
            w, state, _ = step(w, state, m=momentum)
            np.testing.assert_allclose(whole(w), point, rtol=1e-12)


def test_a_given_direction_is_taken_with_its_sign_under_a_mask_too():
    u = split(np.array([3.0, 4.0, 5.0]))
    for sign in (1, -2.5):
        parts = ascents.given_direction(sign=sign), ascents.sam(0.5)
        sam = sam_optax.sharpness_aware(
            ascents.chain(*parts), mask={"x": True, "y": False}
        )
        w = split(W)
        d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=lambda p: p, direction=u)
        shift = np.sign(sign) * np.array([0.3, 0.4, 0.0])
        np.testing.assert_allclose(whole(d), W + shift, rtol=1e-12)


def test_a_direction_that_is_missing_or_of_another_shape_is_refused():
    sam = sam_optax.sharpness_aware(ascents.given_direction("u"))
    w = split(W)
    with pytest.raises(ValueError, match="'u', which is missing"):
        sam.update(w, sam.init(w), w, grad_fn=grad_fn)
    with pytest.raises(ValueError, match="'u' must be a tree like the parameters"):
        sam.update(w, sam.init(w), w, grad_fn=grad_fn, u=W)


def test_a_direction_that_is_not_finite_is_seen_where_the_loss_hides_it():
    sam = sam_optax.sharpness_aware(ascents.given_direction("u"))
    w = split(W)
    u = split(W * np.array([1, np.inf, 1]))
    d, _ = sam.update(w, sam.init(w), w, grad_fn=lambda p: split(W), u=u)
    assert not all_finite(d)


# --- The number of gradients.


def test_no_gradient_is_taken_at_the_parameters():
    for sam in (
        sam_optax.msam(),
        sam_optax.random_sam(guard=True),
        sam_optax.msam(mask={"x": True, "y": False}),
    ):
        points = []

        def spied(point, points=points):
            points.append(point)
            return grad_fn(point)

        w = split(W)
        _, state = sam.update(w, sam.init(w), w, grad_fn=spied)
        sam.update(w, state, w, grad_fn=spied)
        assert len(points) == 2


def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def wide_loss(w, x):
    return jnp.mean(jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"]) ** 2)


WIDE = {"a": jnp.ones((32, 32)) / 32, "b": jnp.ones((32, 32)) / 32}
EXAMPLES = jnp.ones((2048, 32))


def door_flops(door, sam, value_at, *, read_loss=True, **options):
    tx = optax.chain(sam, optax.sgd(0.1))

    def run(w, state, x):
        w, state, loss = door(sam, tx, wide_loss, value_at=value_at)(
            w, state, x, **options
        )
        loss = getattr(loss, "value", loss)
        return (w, state, loss) if read_loss else (w, state)

    return flops(run, WIDE, tx.init(WIDE), EXAMPLES)


def plain_flops():
    def run(w, x):
        loss, g = jax.value_and_grad(wide_loss)(w, x)
        return jax.tree.map(lambda w, g: w - 0.1 * g, w, g), loss

    return flops(run, WIDE, EXAMPLES)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_a_step_has_the_work_of_one_gradient(door):
    """On the compiler's count; a forward pass is a third of it."""
    msam, plain = sam_optax.msam(), plain_flops()
    assert door_flops(door, msam, "perturbed") < 1.02 * plain
    assert door_flops(door, msam, "parameters", read_loss=False) < 1.02 * plain
    with_loss = door_flops(door, msam, "parameters")
    assert 1.2 * plain < with_loss < 1.5 * plain
    assert door_flops(door, sam_optax.sam(), "parameters") > 1.9 * plain


def test_a_cadence_takes_no_gradient_that_its_branch_does_not_need():
    """The compiler counts both branches, each of one gradient."""
    sam = sam_optax.sharpness_aware(ascents.msam(), cadence=cadences.after(3))
    both = door_flops(DOORS["door2"], sam, "perturbed")
    assert both < 2.1 * plain_flops()


# --- With the other axes.


def test_before_the_start_of_a_late_msam_its_momentum_follows_the_plain_steps():
    sam = sam_optax.sharpness_aware(ascents.msam(0.3, 0.5), cadence=cadences.after(2))
    expected = msam_by_hand(0.3, 0.5, ascends=lambda t: t >= 2)
    np.testing.assert_allclose(descend(sam), expected, rtol=1e-12)


def test_a_cadence_that_reuses_compares_with_the_gradient_at_w():
    """d = g + α ‖g‖ v/‖v‖, v the part of the last d that is orthogonal to its g."""
    sam = sam_optax.sharpness_aware(
        ascents.msam(0.3, 0.0), cadence=cadences.every_k_reusing(2, 0.7)
    )
    w, m, v, expected = W, np.zeros(3), np.zeros(3), []
    for t in range(5):
        g = H @ w
        if t % 2 == 0:
            d = H @ (w - 0.3 * unit(m))
            v = d - (d @ g) / (g @ g) * g
        else:
            d = g + 0.7 * np.linalg.norm(g) * unit(v)
        m, w = d, w - 0.1 * d
        expected.append(w)
    # On the first step there is no momentum, so nothing is orthogonal to g.
    np.testing.assert_allclose(descend(sam, steps=5), expected, rtol=1e-9, atol=1e-12)


def test_a_descent_of_ones_own_gets_the_gradient_at_w():
    def update(ga, state, params=None, *, ascent_gradient, **extra_args):
        return jax.tree.map(lambda a, g: (a + 3 * g) / 4, ga, ascent_gradient), state

    descent = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    sam = sam_optax.sharpness_aware(ascents.msam(0.3, 0.0), descent=descent)
    w, m, expected = W, np.zeros(3), []
    for _ in range(3):
        d = H @ (w - 0.3 * unit(m)) / 4 + 3 * H @ w / 4
        m, w = d, w - 0.1 * d
        expected.append(w)
    for door in DOORS.values():
        np.testing.assert_allclose(descend(sam, 3, door=door), expected, rtol=1e-12)


@pytest.mark.parametrize(
    "descent", [descents.gsam(), descents.renormalize(), descents.blend(lambda t: 0.5)]
)
@pytest.mark.parametrize(
    "ascent",
    [
        ascents.msam(),
        ascents.msam(rho=lambda t: 0.1, decay=lambda t: 0.5),
        ascents.given_direction(),
    ],
)
def test_a_descent_that_compares_with_g_needs_an_ascent_that_takes_it(ascent, descent):
    with pytest.raises(ValueError, match="makes no use of g"):
        sam_optax.sharpness_aware(ascent, descent=descent)
    sam_optax.sharpness_aware(ascents.sam(), descent=descent)


def losses(w, x):
    return jnp.square(x @ w["x"] - w["y"][0])


BATCH = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2)))


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize(
    "options", [{"m": 2, "map_groups": how} for how in ("vmap", "unroll", "scan")]
)
def test_groups_share_the_one_direction_and_the_momentum_is_of_their_mean(
    door, options
):
    sam = sam_optax.msam(0.3, 0.5)
    tx = optax.chain(sam, optax.sgd(0.1))
    ends = []
    for opts in ({}, options):
        step, w, state = jax.jit(door(sam, tx, losses, **opts)), split(W), None
        if not opts:
            step = jax.jit(DOORS["door1"](sam, tx, losses))
        state = tx.init(w)
        for _ in range(3):
            w, state, loss = step(w, state, BATCH)
        ends.append((w, state, loss))
    assert_trees_close(*ends, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_a_rule_that_selects_by_the_loss_does_so_at_w_and_at_w_plus_epsilon(door):
    sam = sam_optax.msam(0.5, 0.0)
    tx = optax.chain(sam, optax.sgd(0.1))
    rule = data.largest_increase(0.5)
    step = jax.jit(door(sam, tx, losses, data=rule))
    w, state, last = split(W), tx.init(split(W)), None
    for _ in range(3):
        point = w
        if last is not None:
            shift = 0.5 * unit(whole(last))
            point = split(whole(w) - shift)
        rise = np.asarray(losses(point, BATCH) - losses(w, BATCH))
        # Of examples that rise alike, as all do without ε, the first are taken.
        kept = np.sort(np.argsort(-rise, kind="stable")[:4])
        last = jax.grad(lambda p, kept=kept: losses(p, BATCH[kept]).mean())(point)
        expected = jax.tree.map(lambda w, d: w - 0.1 * d, w, last)
        w, state, _ = step(w, state, BATCH)
        assert_trees_close(w, expected, rtol=1e-12, atol=1e-14)


def test_the_report_measures_at_w_although_the_step_does_not():
    sam = sam_optax.msam(0.5, 0.0)
    loss_and_grads = sam_optax.sam_value_and_grad(quadratic, sam, report=True)
    tx = optax.chain(sam, optax.sgd(0.1))

    @jax.jit
    def step(w, state):
        loss, grads = loss_and_grads(w, opt_state=state)
        updates, state = tx.update(grads, state, w)
        return optax.apply_updates(w, updates), state, loss, grads.report

    w, state, *_ = step(split(W), tx.init(split(W)))
    _, _, loss, report = step(w, state)
    w, point = whole(w), whole(w) - 0.5 * unit(H @ W)
    g, ga = H @ w, H @ point
    assert loss == pytest.approx(w @ g / 2)
    assert report.ascent_norm == pytest.approx(np.linalg.norm(g))
    assert report.cosine == pytest.approx(unit(g) @ unit(ga))
    assert report.surrogate_gap == pytest.approx(point @ ga / 2 - w @ g / 2)
    assert report.perturbation_norm == pytest.approx(0.5)


# --- What follows d.


def last_step(**options):
    """u = −(the last d); the part that the docstring of `following` shows."""
    part = optax.GradientTransformation(
        init=lambda w: jax.tree.map(jnp.zeros_like, w),
        update=lambda g, last, w=None: (jax.tree.map(jnp.negative, last), last),
    )
    return ascents.following(part, lambda d, last, w: d, **options)


def test_an_ascent_of_ones_own_can_follow_d():
    own = ascents.chain(last_step(uses_gradient=False), ascents.sam(0.3))
    expected = descend(sam_optax.msam(0.3, 0.0))
    np.testing.assert_allclose(descend(sam_optax.sharpness_aware(own)), expected)
    # One that says that it uses g is the same, but for the gradients that it takes.
    own = ascents.chain(last_step(), ascents.sam(0.3))
    np.testing.assert_allclose(descend(sam_optax.sharpness_aware(own)), expected)


def test_what_follows_d_is_kept_where_d_is_not_finite():
    for part in (last_step(), last_step(uses_gradient=False)):
        sam = sam_optax.sharpness_aware(ascents.chain(part, ascents.sam(0.3)))
        w = split(W)
        _, state = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
        bad = split(W * np.array([1, 1, np.nan]))
        d, after = sam.update(grad_fn(w), state, w, grad_fn=lambda p, bad=bad: bad)
        assert not all_finite(d)
        assert_trees_equal(after, state)
        d, after = sam.update(
            bad, state, w, grad_fn=lambda p, bad=bad: bad, ascend=False
        )
        assert not all_finite(d)
        assert_trees_equal(after, state)


def test_follow_sees_the_parameters_and_a_masked_tree_of_each():
    seen = []

    def follow(d, state, params):
        seen.append((d, params))
        return state

    part = ascents.following(ascents.sam(0.3), follow)
    sam = sam_optax.sharpness_aware(part, mask={"x": True, "y": False})
    w = split(W)
    d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
    for tree, whole_tree in zip(seen[0], (d, w), strict=True):
        assert_trees_equal(tree["x"], whole_tree["x"])
        assert isinstance(tree["y"], optax.MaskedNode)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda part: optax.chain(part, ascents.scale_by_rho(0.1)),
        lambda part: optax.masked(part, {"x": True, "y": False}),
        lambda part: ascents.chain(optax.chain(part), ascents.scale_by_rho(0.1)),
        lambda part: ascents.by_label({"a": optax.chain(part)}, "a"),
        lambda part: ascents.by_label(
            {"a": part, "b": optax.chain(part)}, {"x": "a", "y": "b"}
        ),
        lambda part: ascents.chain(part, optax.chain(part)),
        lambda part: ascents.with_state_dtype(optax.chain(part)),
        lambda part: ascents.ascend_repeatedly(optax.chain(ascents.sam(), part), 2),
        lambda part: ascents.following(
            optax.chain(part), lambda d, state, params: state
        ),
        lambda part: functools.reduce(lambda inner, _: optax.chain(inner), "xyz", part),
    ],
)
def test_a_wrapper_that_would_not_hand_d_on_is_refused(wrap):
    w = split(W)
    for part in (ascents.against_momentum(), ascents.msam(), last_step()):
        sam = sam_optax.sharpness_aware(wrap(part))
        state = sam.init(w)
        with pytest.raises(ValueError, match="does not hand d on"):
            sam.update(grad_fn(w), state, w, grad_fn=grad_fn)


def test_a_tilt_refuses_an_ascent_that_follows_d_in_vain():
    hidden = optax.chain(ascents.msam(0.3))
    descent = descents.tilt([hidden])
    sam, w = sam_optax.sharpness_aware(ascents.sam(0.1), descent=descent), split(W)
    helper = sam_optax.sam_value_and_grad(quadratic, sam)
    with pytest.raises(ValueError, match="does not hand d on"):
        helper(w, opt_state=sam.init(w))


def test_labels_and_schedules_hand_d_on():
    ascent = ascents.by_label(
        {"a": ascents.msam(0.3, lambda t: 0.5), "b": ascents.msam(0.1, 0.0)},
        {"x": "a", "y": "b"},
    )
    w, m, expected = W, np.zeros(3), []
    for _ in range(3):
        shift = np.append(0.3 * unit(m[:2]), 0.1 * unit(m[2:]))
        d = H @ (w - shift)
        m = np.append(0.5 * m[:2], 0 * m[2:]) + d
        w = w - 0.1 * d
        expected.append(w)
    sam = sam_optax.sharpness_aware(ascent)
    np.testing.assert_allclose(descend(sam, 3), expected, rtol=1e-12)


def test_ascents_that_take_gradients_on_the_way_need_an_ascent_that_uses_them():
    with pytest.raises(ValueError, match="all its steps would be the same"):
        ascents.ascend_repeatedly(ascents.msam(), 2)
    with pytest.raises(ValueError, match="follows something else"):
        ascents.ascend_from_noise(ascents.msam())
    # An ascent that uses g and follows d is repeated, and follows d once.
    part = ascents.following(
        optax.GradientTransformation(lambda w: 0.0, lambda g, s, w=None: (g, s)),
        lambda d, state, w: state + d["y"][0],
    )
    sam = sam_optax.sharpness_aware(ascents.ascend_repeatedly(part, 2))
    w = split(W)
    d, state = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
    half = W + H @ W / 2
    np.testing.assert_allclose(whole(d), H @ (half + H @ half / 2), rtol=1e-12)
    assert state.ascent_state == d["y"][0]


def test_two_momenta_are_two_transformations():
    """Although ε is made of them in the same way."""
    one, other = sam_optax.msam(0.3, 0.5), sam_optax.msam(0.3, 0.9)
    tx = optax.chain(other, optax.sgd(0.1))
    _, grads = sam_optax.sam_value_and_grad(quadratic, one)(
        split(W), opt_state=tx.init(split(W))
    )
    with pytest.raises(ValueError, match=r"decay: 0\.5 and 0\.9"):
        tx.update(grads, tx.init(split(W)), split(W))


def test_evaluation_and_checkpoints_see_the_unperturbed_parameters():
    """Everything of a step but its gradient is at w."""
    w, state = problem.params(), None
    sam = sam_optax.msam(5.0, 0.0)
    tx = optax.chain(sam, optax.sgd(0.0))
    step = jax.jit(DOORS["door1"](sam, tx, problem.loss))
    state = tx.init(w)
    for t in range(3):
        after, state, loss = step(w, state, problem.batch(t))
        assert_trees_equal(after, w)
        np.testing.assert_allclose(loss, problem.loss(w, problem.batch(t)), rtol=1e-6)


# --- SAM late.


def test_before_its_start_late_sam_trains_bit_by_bit_as_the_base_optimizer():
    sam = sam_optax.late_sam(0.3, start=10)
    tx, base = optax.chain(sam, optax.adamw(0.1)), optax.adamw(0.1)
    late = jax.jit(DOORS["door1"](sam, tx, problem.loss), static_argnames="ascend")

    @jax.jit
    def plain(w, state, batch):
        loss, g = jax.value_and_grad(problem.loss)(w, batch)
        updates, state = base.update(g, state, w)
        return optax.apply_updates(w, updates), state, loss

    w = v = problem.params()
    state, plain_state = tx.init(w), base.init(w)
    for t in range(3):
        batch = problem.batch(t)
        w, state, loss = late(w, state, batch, ascend=t >= 10)
        v, plain_state, expected = plain(v, plain_state, batch)
        assert_trees_equal((w, loss), (v, expected))


def test_the_radius_of_late_sam_rises_over_the_ramp():
    sam = sam_optax.late_sam(lambda t: 0.1 * (t + 1), start=2, ramp_steps=2)
    w, expected = W, []
    for t in range(5):
        share = max(0.0, min(1.0, (t - 1) / 2))
        g = H @ w
        w = w - 0.1 * H @ (w + 0.1 * (t + 1) * share * unit(g))
        expected.append(w)
    np.testing.assert_allclose(descend(sam, 5), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": -0.1}, "rho must be >= 0"),
        ({"rho": -0.1, "ramp_steps": 2}, "rho must be >= 0"),
        ({"start": -1}, "start must be >= 0"),
        ({"ramp_steps": -1}, "ramp_steps must be an integer >= 0"),
        ({"ramp_steps": 1.5}, "ramp_steps must be an integer >= 0"),
    ],
)
def test_late_sam_refuses_what_makes_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        sam_optax.late_sam(**arguments)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: optax.inject_hyperparams(ascents.msam)(rho=0.5),
        lambda: ascents.chain(
            optax.inject_hyperparams(ascents.against_momentum)(decay=0.9),
            ascents.sam(0.5),
        ),
        lambda: optax.partition({"m": ascents.msam(0.5)}, {"x": "m", "y": "m"}),
    ],
)
def test_what_cannot_be_seen_when_built_is_refused_when_it_runs(wrap):
    sam, w = sam_optax.sharpness_aware(wrap()), split(W)
    with pytest.raises(ValueError, match="does not hand d on"):
        sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)


def test_an_ascent_that_follows_d_already_does_so_first():
    inner = ascents.against_momentum(0.5)

    def double(d, state, params):
        assert_trees_equal(params, split(W))
        return jax.tree.map(lambda x: 2 * x, state)

    outer = ascents.following(inner, double)
    assert not outer.uses_gradient
    w = split(W)
    sam = sam_optax.sharpness_aware(ascents.chain(outer, ascents.sam(0.3)))
    _, state = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
    m = state.ascent_state[0].negative_momentum
    np.testing.assert_allclose(whole(m), -2 * H @ W, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "passed"),
    [
        ({"ascent_loss_fn": lambda w, x: jnp.sum(x)}, {}),
        ({"ascent_loss_fn": lambda w, x: jnp.sum(x), "m": 2}, {}),
        ({}, {"ascent_batch": BATCH[:2]}),
        ({"data": data.sub_batch(0.5)}, {}),
        ({"data": data.sub_batch(0.5), "m": 2}, {}),
    ],
)
def test_options_of_the_ascents_gradient_are_refused_where_there_is_none(
    options, passed
):
    w = split(W)
    for sam in (sam_optax.msam(), sam_optax.random_sam()):
        gradients = sam_optax.sam_value_and_grad(losses, sam, **options)
        with pytest.raises(ValueError, match="would have no effect"):
            gradients(w, BATCH, opt_state=sam.init(w), **passed)
    for sam in (sam_optax.rsam(), sam_optax.sampa()):
        gradients = sam_optax.sam_value_and_grad(losses, sam, **options)
        gradients(w, BATCH, opt_state=sam.init(w), **passed)


@pytest.mark.parametrize("start", [2**31, np.int64(2**31), np.array(2**40)])
def test_a_start_beyond_all_steps_is_never_reached(start):
    w = split(W)
    for ramp_steps in (0, 5):
        sam = sam_optax.late_sam(0.5, start, ramp_steps=ramp_steps)
        d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
        assert_trees_equal(d, grad_fn(w))


def test_a_start_is_an_integer():
    for start in (1.5, jnp.float32(1.9), np.array(1.0)):
        with pytest.raises(TypeError, match="the number of a step"):
            sam_optax.late_sam(0.5, start)
