"""Every ascent's ε against its formula, on a quadratic in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

import sam_optax
from quadratic import H, W, assert_same, descend, expected, grad_fn, split, whole

pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.mark.parametrize("rho", [0.05, 1.0])
def test_sam(rho):
    assert_same(
        descend(sam_optax.sam(rho)),
        expected(lambda g, w, m: rho * g / np.linalg.norm(g)),
    )


@pytest.mark.parametrize("p", [1.5, 3.0, 10.0])
def test_sam_of_any_order(p):
    q = p / (p - 1)

    def epsilon(g, w, m):
        power = np.abs(g) ** (q - 1)
        return 0.1 * np.sign(g) * power / (np.abs(g) ** q).sum() ** (1 / p)

    assert_same(descend(sam_optax.sam(0.1, p=p)), expected(epsilon))


def test_sam_in_the_maximum_norm_follows_the_signs():
    assert_same(
        descend(sam_optax.sam(0.1, p=np.inf)),
        expected(lambda g, w, m: 0.1 * np.sign(g)),
    )


def test_sam_in_the_1_norm_moves_the_largest_entry():
    def epsilon(g, w, m):
        return 0.1 * np.sign(g) * (np.abs(g) == np.abs(g).max())

    assert_same(descend(sam_optax.sam(0.1, p=1)), expected(epsilon))


def test_the_1_norm_is_shared_between_equal_largest_entries():
    tx = sam_optax.ascents.normalize_by_global_norm(p=1)
    u, _ = tx.update(
        {"a": jnp.array([2.0, -2.0]), "b": jnp.array([1.0])}, tx.init(None)
    )
    np.testing.assert_allclose(u["a"], [0.5, -0.5])
    np.testing.assert_allclose(u["b"], [0.0])


@pytest.mark.parametrize("eta", [0.0, 0.01, 1.0])
def test_asam(eta):
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
def test_fsam(sigma, decay, as_released):
    assert_same(
        descend(sam_optax.fsam(0.2, sigma, decay, as_released=as_released)),
        expected(
            friendly(
                sigma, decay, as_released, lambda h, w: 0.2 * h / np.linalg.norm(h)
            )
        ),
    )


@pytest.mark.parametrize("as_released", [False, True])
def test_fasam(as_released):
    def epsilon(h, w):
        t = np.abs(w) + 0.1
        return 0.5 * t**2 * h / np.linalg.norm(t * h)

    assert_same(
        descend(sam_optax.fasam(0.5, 0.1, 0.5, 0.6, as_released=as_released)),
        expected(friendly(0.5, 0.6, as_released, epsilon)),
    )


def test_fsam_weighted_by_the_cosine():
    def epsilon(g, w, memory):
        memory["m"] = m = 0.6 * memory.get("m", 0) + 0.4 * g
        h = g - m @ g / np.linalg.norm(m) / np.linalg.norm(g) * m
        return 0.5 * h / np.linalg.norm(h)

    sam = sam_optax.fsam(0.5, sigma="cosine", decay=0.6)
    assert_same(descend(sam), expected(epsilon))


def test_fsam_with_sigma_one_and_a_constant_gradient_perturbs_nothing_when_settled():
    """h is exactly zero when g equals its average: no rounding noise of norm rho."""
    ascent = sam_optax.ascents.fsam(rho=1.0, as_released=True)
    g = jnp.array([0.1, 0.7])
    _, state = ascent.update(g, ascent.init(g), g)
    epsilon, _ = ascent.update(g, state, g)
    np.testing.assert_array_equal(epsilon, 0)


def test_fsam_without_memory_is_the_base_optimizer():
    """σ = 1 and λ = 0 leave nothing of h, as the docstring says."""
    assert_same(descend(sam_optax.fsam(0.5, 1.0, 0.0)), expected(lambda g, w, m: 0 * g))


def test_usam():
    assert_same(descend(sam_optax.usam(0.1)), expected(lambda g, w, m: 0.1 * g))


@pytest.mark.parametrize("eta", [0.0, 1.0, 3.0])
def test_fisher_sam(eta):
    def epsilon(g, w, m):
        inverse = 1 / (1 + eta * g**2)
        return 0.5 * inverse * g / np.sqrt(g @ (inverse * g))

    assert_same(descend(sam_optax.fisher_sam(0.5, eta)), expected(epsilon))


@pytest.mark.parametrize("as_released", [False, True])
def test_vasso(as_released):
    def epsilon(g, w, memory):
        first = as_released and "m" not in memory
        memory["m"] = m = g if first else 0.7 * memory.get("m", 0) + 0.3 * g
        return 0.5 * m / np.linalg.norm(m)

    sam = sam_optax.vasso(0.5, 0.3, as_released=as_released)
    assert_same(descend(sam), expected(epsilon))


def along_and_across(g, full):
    along = (g @ full) / (full @ full) * full
    return along, g - along


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", ["sam_full", "sam_noise"])
def test_sam_full_and_sam_noise(name, given):
    """With the full gradient passed at call time, or its average in its place."""
    sam = getattr(sam_optax, name)(0.5, decay=0.6)
    w, state, m = split(W), sam.init(split(W)), 0.0
    rng = np.random.default_rng(0)
    for _ in range(3):
        g, full = rng.normal(size=(2, 3))
        m = 0.6 * m + 0.4 * g
        extra = {"full_gradient": split(full)} if given else {}
        d, state = sam.update(split(g), state, w, grad_fn=grad_fn, **extra)
        u = along_and_across(g, full if given else m)[name == "sam_noise"]
        if np.linalg.norm(u) < 1e-12:  # the first average is along g
            u = 0 * u
        size = np.linalg.norm(u)
        assert_same(whole(d), H @ (W + 0.5 * u / (size or 1)))


def test_multi_step_sam():
    def epsilon(g, w, m):
        e = np.zeros(3)
        for _ in range(3):
            step = H @ (w + e)
            e = e + 0.5 / 3 * step / np.linalg.norm(step)
        return e

    assert_same(descend(sam_optax.multi_step_sam(0.5, steps=3)), expected(epsilon))


def test_rsam_ascends_from_the_noise():
    """With the noise read off the first gradient, ε − δ is SAM's step from there."""
    w, seen = split(W), []

    def watching(point):
        seen.append(whole(point))
        return grad_fn(point)

    sam = sam_optax.rsam(rho=0.5, sigma=0.3)
    sam.update(watching(w), sam.init(w), w, grad_fn=watching)
    _, smoothed, perturbed = seen
    g = H @ smoothed
    assert np.any(smoothed != W)
    assert_same(perturbed, smoothed + 0.5 * g / np.linalg.norm(g))
