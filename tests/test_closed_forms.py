"""Methods against their closed forms on quadratics, where every step is a formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from doors import DOORS
from methods import TABLE

H = np.array([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]])
W = np.array([1.0, -2.0, 0.5])


def quadratic(w):
    return 0.5 * w @ jnp.asarray(H, w.dtype) @ w


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=DOORS)
def descend(request):
    """Runs SGD after SAM on the quadratic, and returns the points it visits."""

    def run(sam, steps=4, lr=0.1):
        tx = optax.chain(sam, optax.sgd(lr))
        step = jax.jit(DOORS[request.param](sam, tx, quadratic))
        w = jnp.asarray(W)
        state, visited = tx.init(w), []
        for _ in range(steps):
            w, state, _ = step(w, state)
            visited.append(np.asarray(w))
        return np.stack(visited)

    return run


def expected(perturbation, steps=4, lr=0.1):
    """w − lr · H(w + ε), with ε a numpy function of (g, w, memory)."""
    w, memory, visited = W, {}, []
    for _ in range(steps):
        w = w - lr * H @ (w + perturbation(H @ w, w, memory))
        visited.append(w)
    return np.stack(visited)


def assert_same(actual, wanted):
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rho", [0.05, 1.0])
def test_sam(descend, rho):
    assert_same(
        descend(sam_optax.sam(rho)),
        expected(lambda g, w, m: rho * g / np.linalg.norm(g)),
    )


@pytest.mark.parametrize("p", [1.5, 3.0, 10.0])
def test_sam_of_any_order(descend, p):
    q = p / (p - 1)

    def epsilon(g, w, m):
        power = np.abs(g) ** (q - 1)
        return 0.1 * np.sign(g) * power / (np.abs(g) ** q).sum() ** (1 / p)

    assert_same(descend(sam_optax.sam(0.1, p=p)), expected(epsilon))


def test_sam_in_the_maximum_norm_follows_the_signs(descend):
    assert_same(
        descend(sam_optax.sam(0.1, p=np.inf)),
        expected(lambda g, w, m: 0.1 * np.sign(g)),
    )


def test_sam_in_the_1_norm_moves_the_largest_entry(descend):
    def epsilon(g, w, m):
        return 0.1 * np.sign(g) * (np.abs(g) == np.abs(g).max())

    assert_same(descend(sam_optax.sam(0.1, p=1)), expected(epsilon))


def test_the_1_norm_is_shared_between_equal_largest_entries():
    tx = sam_optax.normalize_by_global_norm(p=1)
    u, _ = tx.update(
        {"a": jnp.array([2.0, -2.0]), "b": jnp.array([1.0])}, tx.init(None)
    )
    np.testing.assert_allclose(u["a"], [0.5, -0.5])
    np.testing.assert_allclose(u["b"], [0.0])


@pytest.mark.parametrize("eta", [0.0, 0.01, 1.0])
def test_asam(descend, eta):
    def epsilon(g, w, m):
        t = np.abs(w) + eta
        return 0.5 * t**2 * g / np.linalg.norm(t * g)

    assert_same(descend(sam_optax.asam(0.5, eta)), expected(epsilon))


def friendly(sigma, decay, as_released, epsilon):
    """h of F-SAM, as the paper's Algorithm 1 or as the authors' code writes it."""

    def perturbation(g, w, memory):
        if as_released:
            first = "m" not in memory
            h = g if first else g - sigma * memory["m"]
            memory["m"] = g if first else decay * memory["m"] + (1 - decay) * g
        else:
            memory["m"] = decay * memory.get("m", 0) + (1 - decay) * g
            h = g - sigma * memory["m"]
        return epsilon(h, w)

    return perturbation


@pytest.mark.parametrize("sigma, decay", [(1.0, 0.9), (0.5, 0.6), (2.0, 0.0)])
@pytest.mark.parametrize("as_released", [False, True])
def test_fsam(descend, sigma, decay, as_released):
    assert_same(
        descend(sam_optax.fsam(0.2, sigma, decay, as_released=as_released)),
        expected(
            friendly(
                sigma, decay, as_released, lambda h, w: 0.2 * h / np.linalg.norm(h)
            )
        ),
    )


@pytest.mark.parametrize("as_released", [False, True])
def test_fasam(descend, as_released):
    def epsilon(h, w):
        t = np.abs(w) + 0.1
        return 0.5 * t**2 * h / np.linalg.norm(t * h)

    assert_same(
        descend(sam_optax.fasam(0.5, 0.1, 0.5, 0.6, as_released=as_released)),
        expected(friendly(0.5, 0.6, as_released, epsilon)),
    )


def test_fsam_with_sigma_one_and_a_constant_gradient_perturbs_nothing_when_settled():
    """h is exactly zero when g equals its average: no rounding noise of norm rho."""
    ascent = sam_optax.fsam_ascent(rho=1.0, as_released=True)
    g = jnp.array([0.1, 0.7])
    _, state = ascent.update(g, ascent.init(g), g)
    epsilon, _ = ascent.update(g, state, g)
    np.testing.assert_array_equal(epsilon, 0)


def test_fsam_without_memory_is_the_base_optimizer(descend):
    """σ = 1 and λ = 0 leave nothing of h, as the docstring says."""
    assert_same(descend(sam_optax.fsam(0.5, 1.0, 0.0)), expected(lambda g, w, m: 0 * g))


def test_usam(descend):
    assert_same(descend(sam_optax.usam(0.1)), expected(lambda g, w, m: 0.1 * g))


def test_every_k_takes_the_second_gradient_on_steps_0_k_2k(descend):
    sam = sam_optax.sharpness_aware(
        sam_optax.sam_ascent(0.5), cadence=sam_optax.every_k(3)
    )

    def epsilon(g, w, memory):
        memory["t"] = memory.get("t", -1) + 1
        return 0.5 * g / np.linalg.norm(g) * (memory["t"] % 3 == 0)

    assert_same(descend(sam, steps=7), expected(epsilon, steps=7))


def test_the_ascent_goes_on_while_the_cadence_skips(descend):
    """F-SAM's average sees every gradient, and its rho schedule counts every step."""
    sam = sam_optax.sharpness_aware(
        sam_optax.fsam_ascent(rho=lambda step: 0.1 * (1 + step), decay=0.6),
        cadence=sam_optax.every_k(2),
    )
    h_of = friendly(1.0, 0.6, False, lambda h, w: h)

    def epsilon(g, w, memory):
        h = h_of(g, w, memory)
        memory["t"] = t = memory.get("t", -1) + 1
        return 0.1 * (1 + t) * h / np.linalg.norm(h) * (t % 2 == 0)

    assert_same(descend(sam, steps=6), expected(epsilon, steps=6))


def test_rho_from_learning_rate_is_linear_between_the_limits():
    learning_rate = optax.cosine_decay_schedule(0.4, 100, alpha=0.25)
    rho = sam_optax.rho_from_learning_rate(
        learning_rate,
        rho_max=0.5,
        rho_min=0.05,
        learning_rate_max=0.4,
        learning_rate_min=0.1,
    )
    for step in (0, 1, 37, 99, 100, 200):
        lr = float(learning_rate(step))
        by_hand = 0.05 + (0.5 - 0.05) * (lr - 0.1) / (0.4 - 0.1)
        assert float(rho(step)) == pytest.approx(by_hand, abs=1e-12)


def test_rho_from_learning_rate_stops_at_zero_below_the_minimum():
    warmup = optax.warmup_cosine_decay_schedule(0.0, 0.4, 10, 100, end_value=0.1)
    rho = sam_optax.rho_from_learning_rate(
        warmup,
        rho_max=0.5,
        rho_min=0.05,
        learning_rate_max=0.4,
        learning_rate_min=0.1,
    )
    assert float(rho(0)) == 0.0
    assert float(rho(10)) == pytest.approx(0.5)


def test_rho_from_learning_rate_drives_a_method(descend):
    schedule = sam_optax.rho_from_learning_rate(
        lambda step: 0.1 * (1 - jnp.asarray(step, jnp.float64) / 4),
        rho_max=0.4,
        rho_min=0.0,
        learning_rate_max=0.1,
    )

    def epsilon(g, w, memory):
        memory["t"] = t = memory.get("t", -1) + 1
        return 0.4 * (1 - t / 4) * g / np.linalg.norm(g)

    assert_same(descend(sam_optax.sam(schedule)), expected(epsilon))


# --- A user's own parts, on every axis.


def test_a_descent_sees_both_gradients_and_the_perturbation(descend):
    """d = 2 gᵃ − g + ε, as a stateful transformation with schedule-like state."""

    def init_fn(params):
        return jnp.zeros((), jnp.int32)

    def update_fn(
        updates, state, params=None, *, ascent_gradient, perturbation, **extra
    ):
        d = 2 * updates - ascent_gradient + perturbation * (state % 2)
        return d, state + 1

    sam = sam_optax.sharpness_aware(
        sam_optax.sam_ascent(0.5),
        descent=optax.GradientTransformationExtraArgs(init_fn, update_fn),
    )
    w, visited = W, []
    for t in range(4):
        g = H @ w
        e = 0.5 * g / np.linalg.norm(g)
        w = w - 0.1 * (2 * H @ (w + e) - g + e * (t % 2))
        visited.append(w)
    assert_same(descend(sam), np.stack(visited))


def test_a_descent_advances_on_skipped_steps_too():
    """Its schedule must not lag behind the steps."""

    def update_fn(updates, state, params=None, **extra):
        return updates, state + 1

    descent = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros((), jnp.int32), update_fn
    )
    sam = sam_optax.sharpness_aware(
        sam_optax.sam_ascent(0.5), descent=descent, cadence=sam_optax.every_k(2)
    )
    w = jnp.asarray(W)
    state = sam.init(w)
    for _ in range(5):
        _, state = sam.update(w, state, w, grad_fn=lambda p: p)
    assert int(state.descent_state) == 5


def test_a_cadence_can_keep_something_and_substitute_it():
    """Keeps gᵃ − g from an ascending step, and adds it to g on the next."""
    cadence = sam_optax.Cadence(
        init=lambda params: (jnp.zeros((), jnp.int32), jnp.zeros_like(params)),
        decide=lambda g, state: (state[0] % 2 == 0, (state[0] + 1, state[1])),
        remember=lambda d, g, state: (state[0], d - g),
        substitute=lambda g, state: g + state[1],
    )
    sam = sam_optax.sharpness_aware(sam_optax.sam_ascent(0.5), cadence=cadence)
    w = jnp.asarray(W)
    state = sam.init(w)

    def grad_fn(p):
        return jnp.asarray(H) @ p

    d0, state = sam.update(grad_fn(w), state, w, grad_fn=grad_fn)
    kept = d0 - grad_fn(w)
    w = w - 0.1 * d0
    d1, state = sam.update(grad_fn(w), state, w, grad_fn=grad_fn)
    assert_same(d1, grad_fn(w) + kept)


def test_an_ascent_may_take_gradients_of_its_own():
    """Two ascent steps of rho/2, through the grad_fn that an ascent receives."""

    def update_fn(updates, state, params=None, *, grad_fn, **extra):
        first = 0.25 * updates / jnp.linalg.norm(updates)
        g = grad_fn(params + first)
        return first + 0.25 * g / jnp.linalg.norm(g), state

    ascent = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update_fn
    )
    w = jnp.asarray(W)

    def grad_fn(p):
        return jnp.asarray(H) @ p

    sam = sam_optax.sharpness_aware(ascent)
    d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
    e1 = 0.25 * H @ W / np.linalg.norm(H @ W)
    g1 = H @ (W + e1)
    assert_same(d, H @ (W + e1 + 0.25 * g1 / np.linalg.norm(g1)))

    # The same ascent on part of the parameters: the rest stays where it is.
    sam = sam_optax.sharpness_aware(
        optax.GradientTransformationExtraArgs(
            lambda params: optax.EmptyState(),
            lambda updates, state, params=None, *, grad_fn, **extra: (
                jax.tree.map(lambda g: 0.5 * g, grad_fn(params)),
                state,
            ),
        ),
        mask={"x": True, "y": False},
    )
    tree = {"x": w[:2], "y": w[2:]}

    def tree_grad(p):
        g = jnp.asarray(H) @ jnp.concatenate([p["x"], p["y"]])
        return {"x": g[:2], "y": g[2:]}

    d, _ = sam.update(tree_grad(tree), sam.init(tree), tree, grad_fn=tree_grad)
    shifted = W + 0.5 * (H @ W) * [1, 1, 0]
    assert_same(np.concatenate([d["x"], d["y"]]), H @ shifted)


# --- Descents, with g = Hw and gᵃ = H(w + ε) for SAM's ε.


def descending(function, steps=4, lr=0.1, rho=0.5):
    """The points of SGD on d = function(gᵃ, g, ε, w) after SAM's ascent."""
    w, visited = W, []
    for _ in range(steps):
        g = H @ w
        e = rho * g / np.linalg.norm(g)
        w = w - lr * function(H @ (w + e), g, e, w)
        visited.append(w)
    return np.stack(visited)


def orthogonal_to(v, x):
    return x - (x @ v) / (v @ v) * v


def test_gsam(descend):
    assert_same(
        descend(sam_optax.gsam(0.5, alpha=0.4)),
        descending(lambda ga, g, e, w: ga - 0.4 * orthogonal_to(ga, g)),
    )


def test_gsam_that_minimizes_the_loss(descend):
    assert_same(
        descend(sam_optax.gsam(0.5, alpha=0.4, minimize="loss")),
        descending(lambda ga, g, e, w: g + 0.4 * orthogonal_to(g, ga)),
    )


def test_gsam_leaves_the_perturbed_gradients_component_alone():
    w = jnp.asarray(W)

    def grad_fn(p):
        return jnp.asarray(H) @ p

    sam = sam_optax.gsam(0.5, alpha=0.7)
    d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
    g = H @ W
    ga = H @ (W + 0.5 * g / np.linalg.norm(g))
    assert (np.asarray(d) - ga) @ ga == pytest.approx(0, abs=1e-12)


def test_a_nearly_parallel_pair_keeps_its_direction_in_float32():
    """Where ‖gᵃ − g‖ is 1e-5 ‖g‖, the naive projection is off by 3e-3."""
    rng = np.random.default_rng(0)
    g = rng.normal(size=1000)
    ga = g + 1e-5 * rng.normal(size=1000)
    g32, ga32 = g.astype(np.float32), ga.astype(np.float32)
    descent = sam_optax.surrogate_gap(1.0)
    d, _ = descent.update(
        jnp.asarray(ga32), descent.init(g32), ascent_gradient=jnp.asarray(g32)
    )
    exact = -orthogonal_to(ga32.astype(np.float64), g32.astype(np.float64))
    actual = np.asarray(d, np.float64) - ga32
    # d itself rounds at 1e-7 of its size, which is 1e-2 of the difference; the sum over
    # the entries averages that out.
    cosine = actual @ exact / np.linalg.norm(actual) / np.linalg.norm(exact)
    assert cosine > 1 - 1e-4


def test_sam_plus_gap(descend):
    assert_same(
        descend(sam_optax.sam_plus_gap(0.5, lam=0.3)),
        descending(lambda ga, g, e, w: ga + 0.3 * (ga - g)),
    )


def test_stable_sam(descend):
    def stabilized(ga, g, e, w):
        return np.linalg.norm(g) / np.linalg.norm(ga) * ga

    assert_same(descend(sam_optax.stable_sam(0.5)), descending(stabilized))


@pytest.mark.parametrize("bounds", [(0.0, 0.5), (1.5, 3.0), (0.64, 0.8)])
def test_stable_sam_with_bounds(descend, bounds):
    def stabilized(ga, g, e, w):
        return np.clip(np.linalg.norm(g) / np.linalg.norm(ga), *bounds) * ga

    sam = sam_optax.stable_sam(0.5, minimum=bounds[0], maximum=bounds[1])
    assert_same(descend(sam), descending(stabilized))


def test_stable_asam_paper_and_released(descend):
    for released in (False, True):
        w, visited = W, []
        for _ in range(4):
            g, t = H @ w, np.abs(w) + 0.1
            e = 0.5 * t**2 * g / np.linalg.norm(t * g)
            ga = H @ (w + e)
            if released:
                factor = np.linalg.norm(w * g) / np.linalg.norm((w + e) * ga)
            else:
                factor = np.linalg.norm(g) / np.linalg.norm(ga)
            w = w - 0.1 * factor * ga
            visited.append(w)
        sam = sam_optax.stable_asam(0.5, 0.1, as_released=released)
        assert_same(descend(sam), np.stack(visited))


def test_stable_usam(descend):
    w, visited = W, []
    for _ in range(4):
        g = H @ w
        ga = H @ (w + 0.1 * g)
        w = w - 0.1 * np.linalg.norm(g) / np.linalg.norm(ga) * ga
        visited.append(w)
    assert_same(descend(sam_optax.stable_usam(0.1)), np.stack(visited))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.8])
def test_wsam(descend, gamma):
    weight = gamma / (1 - gamma)
    assert_same(
        descend(sam_optax.wsam(0.5, gamma)),
        descending(lambda ga, g, e, w: (1 - 2 * gamma) / (1 - gamma) * g + weight * ga),
    )


def test_gradient_norm_penalty(descend):
    assert_same(
        descend(sam_optax.gradient_norm_penalty(0.5, alpha=0.3)),
        descending(lambda ga, g, e, w: 0.7 * g + 0.3 * ga),
    )


@pytest.mark.parametrize("door", DOORS)
def test_decoupled_wsam_keeps_the_gap_out_of_the_momentum(door):
    sam, tx = sam_optax.decoupled_wsam(
        optax.sgd(0.1, momentum=0.9), lambda step: 0.1, rho=0.5, gamma=0.8
    )
    step = jax.jit(DOORS[door](sam, tx, quadratic))
    w, m, visited, wanted = W, np.zeros(3), [], []
    params, state = jnp.asarray(W), tx.init(jnp.asarray(W))
    for _ in range(4):
        params, state, _ = step(params, state)
        visited.append(np.asarray(params))
        g = H @ w
        ga = H @ (w + 0.5 * g / np.linalg.norm(g))
        m = 0.9 * m + g
        w = w - 0.1 * m - 0.1 * 4 * (ga - g)
        wanted.append(w)
    assert_same(np.stack(visited), np.stack(wanted))


@pytest.mark.parametrize("where", ["at w", "at w + ε"])
def test_decoupled_wsam_stays_where_it_is_after_a_bad_step(where):
    base = optax.apply_if_finite(optax.sgd(0.1), 3)
    _, tx = sam_optax.decoupled_wsam(base, 0.1, rho=0.5)
    w, good = jnp.asarray(W), lambda w: jnp.asarray(H @ np.asarray(w))
    bad = jnp.full(3, jnp.inf)
    updates, state = tx.update(good(w), tx.init(w), w, grad_fn=good)
    w = optax.apply_updates(w, updates)
    g = bad if where == "at w" else good(w)
    updates, after = tx.update(g, state, w, grad_fn=lambda w: bad)
    np.testing.assert_array_equal(updates, 0)
    assert after.descent_optimizer_state.total_notfinite == 1
    np.testing.assert_array_equal(
        after.sharpness_state.descent_state, state.sharpness_state.descent_state
    )


# --- Further ascents.


@pytest.mark.parametrize("eta", [0.0, 1.0, 3.0])
def test_fisher_sam(descend, eta):
    def epsilon(g, w, m):
        inverse = 1 / (1 + eta * g**2)
        return 0.5 * inverse * g / np.sqrt(g @ (inverse * g))

    assert_same(descend(sam_optax.fisher_sam(0.5, eta)), expected(epsilon))


@pytest.mark.parametrize("as_released", [False, True])
def test_vasso(descend, as_released):
    def epsilon(g, w, memory):
        first = as_released and "m" not in memory
        memory["m"] = m = g if first else 0.7 * memory.get("m", 0) + 0.3 * g
        return 0.5 * m / np.linalg.norm(m)

    sam = sam_optax.vasso(0.5, 0.3, as_released=as_released)
    assert_same(descend(sam), expected(epsilon))


def test_fsam_weighted_by_the_cosine(descend):
    def epsilon(g, w, memory):
        memory["m"] = m = 0.6 * memory.get("m", 0) + 0.4 * g
        h = g - m @ g / np.linalg.norm(m) / np.linalg.norm(g) * m
        return 0.5 * h / np.linalg.norm(h)

    sam = sam_optax.fsam(0.5, sigma="cosine", decay=0.6)
    assert_same(descend(sam), expected(epsilon))


def along_and_across(g, full):
    along = (g @ full) / (full @ full) * full
    return along, g - along


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", ["sam_full", "sam_noise"])
def test_sam_full_and_sam_noise(name, given):
    """With the full gradient passed at call time, or its average in its place."""
    sam = getattr(sam_optax, name)(0.5, decay=0.6)
    w, state, m = jnp.asarray(W), sam.init(jnp.asarray(W)), 0.0
    rng = np.random.default_rng(0)
    for _ in range(3):
        g, full = rng.normal(size=(2, 3))
        m = 0.6 * m + 0.4 * g
        extra = {"full_gradient": jnp.asarray(full)} if given else {}
        d, state = sam.update(
            jnp.asarray(g), state, w, grad_fn=lambda p: jnp.asarray(H) @ p, **extra
        )
        u = along_and_across(g, full if given else m)[name == "sam_noise"]
        if np.linalg.norm(u) < 1e-12:  # the first average is along g
            u = 0 * u
        size = np.linalg.norm(u)
        assert_same(d, H @ (W + 0.5 * u / (size or 1)))


def test_multi_step_sam(descend):
    def epsilon(g, w, m):
        e = np.zeros(3)
        for _ in range(3):
            step = H @ (w + e)
            e = e + 0.5 / 3 * step / np.linalg.norm(step)
        return e

    assert_same(descend(sam_optax.multi_step_sam(0.5, steps=3)), expected(epsilon))


def test_rsam_ascends_from_the_noise():
    """With the noise read off the first gradient, ε − δ is SAM's step from there."""
    w, seen = jnp.asarray(W), []

    def grad_fn(point):
        seen.append(np.asarray(point))
        return jnp.asarray(H) @ point

    sam = sam_optax.rsam(rho=0.5, sigma=0.3)
    sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
    _, smoothed, perturbed = seen
    g = H @ smoothed
    assert np.any(smoothed != W)
    assert_same(perturbed, smoothed + 0.5 * g / np.linalg.norm(g))


# --- Cadences.


def test_look_sam_reuses_the_kept_direction(descend):
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


def test_ae_sam_ascends_where_the_squared_norm_is_large():
    sam = sam_optax.ae_sam(
        rho=0.5, threshold=optax.linear_schedule(1.0, -1.0, 20), decay=0.8
    )
    w = jnp.asarray(W)
    state, mean, variance = sam.init(w), 0.0, np.exp(-20.0)
    scales = np.random.default_rng(0).uniform(0.5, 2, size=20)
    chosen, wanted = [], []
    for t, scale in enumerate(scales):
        g = scale * jnp.asarray(W)
        d, state = sam.update(g, state, w, grad_fn=lambda p: 7 * p)
        chosen.append(bool(jnp.any(d != g)))
        square = float(g @ g)
        mean = 0.8 * mean + 0.2 * square
        variance = 0.8 * variance + 0.2 * (square - mean) ** 2
        wanted.append(square >= mean + (1 - t / 10) * np.sqrt(variance))
    assert chosen == wanted
    assert 3 < sum(wanted) < 17


@pytest.mark.parametrize("name", [n for n, row in TABLE.items() if not row.draws])
def test_splitting_the_parameters_into_leaves_changes_nothing(name):
    """One norm and one projection run over all leaves."""
    row = TABLE[name]
    if "adaptive_mask" in row.kwargs:
        pytest.skip("this mask depends on the shapes of the leaves")

    def split(w):
        return {"x": w[:2], "y": w[2:]}

    def loss_of_leaves(tree):
        return quadratic(jnp.concatenate([tree["x"], tree["y"]]))

    sam = row()
    tx = optax.chain(sam, optax.sgd(0.1))
    whole, parts = jnp.asarray(W), split(jnp.asarray(W))
    results = []
    for params, loss_fn in ((whole, quadratic), (parts, loss_of_leaves)):
        step = jax.jit(DOORS["door2"](sam, tx, loss_fn))
        state = tx.init(params)
        for _ in range(4):
            params, state, _ = step(params, state)
        results.append(params)
    assert_same(np.concatenate([results[1]["x"], results[1]["y"]]), results[0])
