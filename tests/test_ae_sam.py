"""AE-SAM and AE-LookSAM against their equations, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from doors import DOORS
from quadratic import H, W, assert_same, orthogonal_to, split, whole
from sam_optax import ascents, cadences

STEPS = 24


def scales():
    """Of the losses of each step, so that gradients grow and shrink."""
    return np.random.default_rng(3).uniform(0.3, 2.0, size=STEPS)


def threshold(t):
    """The paper's c_t, from λ₂ = 1 to λ₁ = −1."""
    return t / STEPS * -1 + (1 - t / STEPS) * 1


def policy(thresholds=threshold, decay=lambda t: 0.9):
    """(‖g‖² of each step) -> whether it ascends; the mean is advanced first."""
    mean, variance, t = 0.0, np.exp(-20.0), 0

    def decide(g):
        nonlocal mean, variance, t
        square, kept = g @ g, decay(t)
        mean = kept * mean + (1 - kept) * square
        variance = kept * variance + (1 - kept) * (square - mean) ** 2
        ascends = square >= mean + thresholds(t) * np.sqrt(variance)
        t += 1
        return ascends

    return decide


def reference(decide, alpha=None):
    """(the points of SGD, the decisions); with alpha, LookSAM in between."""
    w, v, points, decisions = W, np.zeros(3), [], []
    for t, scale in enumerate(scales()):
        g = scale * H @ w
        ascends = decide(g)
        if ascends:
            d = scale * H @ (w + 0.5 * g / np.linalg.norm(g))
            v = orthogonal_to(g, d)
        else:
            d = g
            if alpha is not None:
                d = g + alpha(t) * np.linalg.norm(g) / np.linalg.norm(v) * v
        w = w - 0.02 * d
        points.append(w)
        decisions.append(ascends)
    return np.stack(points), decisions


def visit(sam, door):
    def loss(tree, scale):
        w = jnp.concatenate([tree["x"], tree["y"]])
        return scale * 0.5 * w @ jnp.asarray(H) @ w

    tx = optax.chain(sam, optax.sgd(0.02))
    step, params, points = jax.jit(door(sam, tx, loss)), split(W), []
    state = tx.init(params)
    for scale in scales():
        params, state, _ = step(params, state, scale)
        points.append(whole(params))
    return np.stack(points)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("door", DOORS)
def test_ae_sam_follows_the_papers_schedule(door):
    wanted, decisions = reference(policy())
    first, last = np.sum(decisions[:12]), np.sum(decisions[12:])
    assert 0 < first < last < 12
    sam = sam_optax.ae_sam(rho=0.5, total_steps=STEPS)
    assert_same(visit(sam, DOORS[door]), wanted)
    sam = sam_optax.ae_sam(0.5, optax.linear_schedule(1.0, -1.0, STEPS))
    assert_same(visit(sam, DOORS[door]), wanted)


@pytest.mark.usefixtures("double_precision")
def test_without_a_schedule_the_threshold_is_the_mean():
    wanted, decisions = reference(policy(lambda t: 0.0, lambda t: 0.6))
    assert decisions != reference(policy(decay=lambda t: 0.6))[1]
    assert_same(visit(sam_optax.ae_sam(rho=0.5, decay=0.6), DOORS["door2"]), wanted)


def decisions(cadence, steps):
    g, state, taken = jnp.ones(2), cadence.init(None), []
    for _ in range(steps):
        decision, state = cadence.decide(g, state)
        taken.append(bool(decision))
    return taken


def test_a_threshold_counts_from_its_own_step_on():
    steep = cadences.when_steep(lambda t: jnp.where(t < 3, 1e9, -1e9))
    for cadence in (steep, cadences.reusing(steep)):
        assert decisions(cadence, 6) == [False] * 3 + [True] * 3


def test_a_step_as_steep_as_its_mean_ascends():
    """Where the gradient is always zero, so are its mean and variance, nearly."""
    cadence = cadences.when_steep(0.0)
    decision, _ = cadence.decide(jnp.zeros(2), cadence.init(None))
    assert decision


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("door", DOORS)
def test_ae_look_sam_reuses_the_direction_of_the_last_step_that_ascended(door):
    """With α and δ on schedules of their own, which count every step."""

    def alpha(t):
        return 0.3 + 0.05 * t

    def decay(t):
        return 0.5 + 0.02 * t

    wanted, decisions = reference(policy(decay=decay), alpha)
    skipped = ~np.array(decisions)
    assert np.any(skipped[1:] & skipped[:-1]), "two in a row, after a direction is kept"
    sam = sam_optax.ae_look_sam(0.5, None, decay, alpha, total_steps=STEPS)
    assert_same(visit(sam, DOORS[door]), wanted)
    steep = cadences.when_steep(optax.linear_schedule(1.0, -1.0, STEPS), decay=decay)
    sam = sam_optax.sharpness_aware(
        ascents.sam(0.5), cadence=cadences.reusing(steep, alpha)
    )
    assert_same(visit(sam, DOORS[door]), wanted)


def test_reusing_before_anything_is_kept_is_plain_descent():
    cadence = cadences.reusing(cadences.every_k(3), alpha=0.7)
    sam, w = sam_optax.sharpness_aware(ascents.sam(0.5), cadence=cadence), jnp.ones(3)
    d, _ = sam.update(w, sam.init(w), w, grad_fn=lambda p: p, ascend=False)
    np.testing.assert_array_equal(d, w)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("per_tensor", [False, True])
def test_reusing_every_k_is_look_sam(per_tensor):
    """Step by step, with a weight on a schedule, which counts every step."""

    def alpha(t):
        return 0.3 + 0.05 * t

    ours = sam_optax.sharpness_aware(
        ascents.sam(0.5),
        cadence=cadences.reusing(cadences.every_k(3), alpha, per_tensor=per_tensor),
    )
    look_sam = sam_optax.look_sam(0.5, 3, alpha, per_tensor=per_tensor)
    door = DOORS["door2"]
    np.testing.assert_array_equal(visit(ours, door), visit(look_sam, door))


def test_reusing_lets_the_other_cadence_remember():
    counting = cadences.Cadence(
        init=lambda params: jnp.zeros(2, jnp.int32),
        decide=lambda g, state: (state[0] == 1, state.at[0].add(1)),
        remember=lambda d, g, state: state.at[1].add(1),
    )
    sam = sam_optax.sharpness_aware(
        ascents.sam(0.5), cadence=cadences.reusing(counting)
    )
    w = jnp.ones(3)
    state = sam.init(w)
    for _ in range(3):
        _, state = sam.update(w, state, w, grad_fn=lambda p: p)
    np.testing.assert_array_equal(state.cadence_state.timing_state, [3, 1])


@pytest.mark.parametrize("make", [sam_optax.ae_sam, sam_optax.ae_look_sam])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 10, "threshold": 0.0}, "not both"),
        ({"total_steps": 0}, "total_steps must be an integer >= 1"),
        ({"total_steps": 2.5}, "total_steps must be an integer >= 1"),
    ],
)
def test_a_schedule_that_cannot_be_made_says_why(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_the_number_of_steps_is_static_under_inject_hyperparams():
    w = jnp.ones(2)
    with pytest.raises(ValueError, match=r"static_args=\('total_steps',\)"):
        optax.inject_hyperparams(sam_optax.ae_sam)(total_steps=10).init(w)
    inject = optax.inject_hyperparams(sam_optax.ae_sam, static_args=("total_steps",))
    state = inject(rho=0.1, total_steps=10).init(w)
    assert set(state.hyperparams) == {"rho", "decay"}


def test_the_mean_is_kept_in_float32():
    """300² leaves float16, and 1 + 1e-3 is 1 in bfloat16."""
    cadence = cadences.when_steep(0.0, decay=0.5)
    for dtype, size in ((jnp.float16, 300.0), (jnp.bfloat16, 1.0)):
        g = jnp.full(1000, size, dtype)
        decision, state = jax.jit(cadence.decide)(g, cadence.init(g))
        assert decision
        np.testing.assert_allclose(state.squared_norm_mean, 500 * size**2, rtol=1e-6)
        np.testing.assert_allclose(
            state.squared_norm_variance, 0.5 * (500 * size**2) ** 2, rtol=1e-6
        )
        assert state.squared_norm_mean.dtype == jnp.float32


@pytest.mark.parametrize("make", [cadences.when_steep, sam_optax.ae_look_sam])
def test_numbers_that_cannot_be_say_so(make):
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match="decay must be >= 0 and < 1"):
            make(threshold=0.0, decay=decay)
    with pytest.raises(ValueError, match="threshold must be finite"):
        make(threshold=np.nan)


def test_the_standard_deviation_starts_at_the_authors_value():
    state = cadences.when_steep(0.0).init(None)
    np.testing.assert_allclose(state.squared_norm_variance, np.exp(-10) ** 2, rtol=1e-5)
    assert (state.cadence_step, state.squared_norm_mean) == (0, 0)
