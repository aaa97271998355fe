"""Statistics of what draws random numbers: moments, rates, keys and independence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from sam_optax import _random
from sam_optax.methods._order import Count
from sam_optax.methods._ssam import _keep_largest

DRAWS = 400
W = {"a": jnp.zeros((10, 20)), "b": jnp.zeros(300)}
G = {
    "a": jax.random.normal(jax.random.key(1), (10, 20)),
    "b": jax.random.normal(jax.random.key(2), (300,)),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def perturbations(make, draws=DRAWS):
    """ε of successive steps, flattened, from one run of the state."""
    sam = make()

    def step(state, _):
        def grad_fn(point):  # d is then w + ε, and w is zero
            return point

        d, state = sam.update(G, state, W, grad_fn=grad_fn, ascend=True)
        return state, jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(d)])

    return jax.lax.scan(step, sam.init(W), length=draws)[1]


def make_random(normalized=False, key=0):
    return lambda: sam_optax.random_sam(rho=2.0, normalized=normalized, key=key)


RANDOM = make_random()
SPHERE = make_random(normalized=True)


def esam():
    return sam_optax.esam(rho=2.0, beta=0.3)


def test_random_sam_has_the_moments_of_its_gaussian():
    epsilon = np.asarray(perturbations(RANDOM), np.float64)
    draws, p = epsilon.shape
    assert p == 500
    variance = 2.0**2 / p
    assert abs(epsilon.mean()) < 4 * np.sqrt(variance / epsilon.size)
    assert epsilon.var() == pytest.approx(variance, rel=4 * np.sqrt(2 / epsilon.size))
    fourth = (epsilon**4).mean() / variance**2
    assert fourth == pytest.approx(3, rel=4 * np.sqrt(32 / 3 / epsilon.size))
    squared_norms = (epsilon**2).sum(axis=1)
    assert squared_norms.mean() == pytest.approx(4, rel=4 * np.sqrt(2 / p / draws))


def test_normalized_random_sam_is_on_the_sphere():
    norms = np.linalg.norm(perturbations(SPHERE), axis=1)
    np.testing.assert_allclose(norms, 2.0, rtol=1e-5)


@pytest.mark.parametrize("make", [RANDOM, esam], ids=["random_sam", "esam"])
def test_steps_are_independent_and_leaves_too(make):
    epsilon = np.asarray(perturbations(make), np.float64)
    noise = epsilon - epsilon.mean(axis=0)
    noise /= noise.std(axis=0)
    successive = (noise[1:] * noise[:-1]).mean()
    assert abs(successive) < 4 / np.sqrt(noise[1:].size)
    first, second = noise[:, :200], noise[:, 200:400]
    assert abs((first * second).mean()) < 4 / np.sqrt(first.size)


def test_random_sam_is_reproducible_from_its_key():
    again, other = make_random(), make_random(key=1)
    np.testing.assert_array_equal(perturbations(RANDOM), perturbations(again))
    assert np.all(perturbations(RANDOM) != perturbations(other))


def test_esam_keeps_its_share_and_its_mean():
    epsilon = np.asarray(perturbations(esam), np.float64)
    g = np.concatenate([np.ravel(x) for x in jax.tree.leaves(G)])
    full = 2.0 * g / np.linalg.norm(g)
    kept = epsilon != 0
    assert kept.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / kept.size))
    np.testing.assert_allclose(epsilon[kept], (full / 0.3 * kept)[kept], rtol=1e-4)
    deviation = np.abs(full) * np.sqrt(0.7 / 0.3 / DRAWS)
    assert np.mean(np.abs(epsilon.mean(axis=0) - full) < 3 * deviation) > 0.98


def test_two_parts_of_one_key_draw_numbers_of_their_own():
    """Equal numbers would leave no positive noise where the mask keeps an entry."""
    ascents = sam_optax.ascents

    def make():
        parts = ascents.replace_by_noise(), ascents.mask_at_random(0.5)
        return sam_optax.sharpness_aware(optax.chain(*parts))

    epsilon = np.asarray(perturbations(make))
    kept = epsilon[epsilon != 0]
    for share in (kept.size / epsilon.size, (kept > 0).mean()):
        assert share == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(kept.size))


@pytest.mark.parametrize("seed", [2**40, 2**31, -1, 3])
def test_a_seed_may_be_any_integer_that_jax_takes(seed):
    expected = jax.random.key_data(jax.random.key(seed))
    found = jax.random.key_data(_random.typed_key(seed))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_a_key_keeps_its_kind(kind):
    stream = _random.key_stream(jax.random.key(3, impl=kind), "part")
    key, later = stream.next(stream.start())
    assert jax.random.key_impl(key) == kind
    assert later.shape == stream.start().shape


def test_two_kinds_of_parts_have_keys_of_their_own():
    names = ["replace_by_noise", "mask_at_random", "stochastic rounding"]
    streams = [_random.key_stream(7, name) for name in names]
    data = streams[0].start()
    keys = [jax.random.key_data(stream.next(data)[0]).tolist() for stream in streams]
    assert len(set(map(tuple, keys))) == 3
    for stream in streams:
        np.testing.assert_array_equal(stream.next(data)[1], streams[0].next(data)[1])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "sparsity",
    [0.3, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.0, 0.9))],
)
def test_ssam_perturbs_its_share_on_every_step(dynamic, sparsity):
    def make():
        return sam_optax.ssam(
            rho=2.0, sparsity=sparsity, dynamic=dynamic, refresh_every=3
        )

    kept = np.asarray(perturbations(make, 10)) != 0
    np.testing.assert_array_equal(kept.sum(axis=1), round((1 - sparsity) * 500))
    same = (kept[1:] == kept[:-1]).all(axis=1)
    # The gradient is constant, so SSAM-F keeps its choice; SSAM-D exchanges on steps 0,
    # 3, 6 and 9, and on no other. The next step is the first to use the new mask.
    changes = np.flatnonzero(~same) + 1
    expected = [1, 4, 7] if dynamic and sparsity else []
    assert changes.tolist() == expected


def test_ssam_f_keeps_the_largest_gradients():
    def make():
        return sam_optax.ssam(rho=2.0, sparsity=0.8)

    kept = np.asarray(perturbations(make, 1))[0] != 0
    g = np.concatenate([np.ravel(x) for x in jax.tree.leaves(G)])
    assert np.abs(g[kept]).min() > np.abs(g[~kept]).max()


def test_ssam_d_drops_the_smallest_and_grows_others():
    def make():
        return sam_optax.ssam(
            rho=2.0, sparsity=0.8, dynamic=True, drop=0.25, refresh_every=2
        )

    before, _, after = np.asarray(perturbations(make, 3)) != 0
    g = np.abs(np.concatenate([np.ravel(x) for x in jax.tree.leaves(G)]))
    dropped, grown = before & ~after, after & ~before
    assert dropped.sum() == grown.sum() == 25  # a quarter of 100
    assert g[dropped].max() < g[before & after].min()


def test_ssam_d_can_drop_nothing():
    def make():
        return sam_optax.ssam(
            rho=2.0, sparsity=0.8, dynamic=True, drop=0.0, refresh_every=1
        )

    kept = np.asarray(perturbations(make, 4)) != 0
    assert (kept == kept[0]).all()


@pytest.mark.parametrize("probability", [0.0, 0.2, 1.0])
def test_rst_ascends_with_its_probability(probability):
    sam = sam_optax.rst(rho=1.0, probability=probability, key=3)

    @jax.jit
    def decisions():
        def step(state, _):
            d, state = sam.update(G, state, W, grad_fn=lambda p: p)
            return state, jnp.any(d["b"] != G["b"])

        return jax.lax.scan(step, sam.init(W), length=2000)[1]

    chosen = np.asarray(decisions())
    deviation = np.sqrt(probability * (1 - probability) / chosen.size)
    assert abs(chosen.mean() - probability) <= 4 * deviation
    if 0 < probability < 1:
        both = (chosen[1:] & chosen[:-1]).mean()
        assert both == pytest.approx(probability**2, abs=4 * deviation)


def test_rst_follows_a_schedule_of_its_probability():
    sam = sam_optax.rst(probability=lambda step: jnp.where(step < 5, 0.0, 1.0))
    state, chosen = sam.init(W), []
    for _ in range(8):
        d, state = sam.update(G, state, W, grad_fn=lambda p: p)
        chosen.append(bool(jnp.any(d["b"] != G["b"])))
    assert chosen == [False] * 5 + [True] * 3


@pytest.mark.parametrize(
    "make",
    [
        RANDOM,
        esam,
        lambda: sam_optax.rsam(rho=0.0, sigma=1.0),
        lambda: sam_optax.sam(rho=1e-3, stochastic_rounding=0),
    ],
    ids=["random_sam", "esam", "rsam", "stochastic_rounding"],
)
def test_every_group_draws_its_own_noise(make):
    sam = make()
    rounds = bool(jax.tree.leaves(sam.init(W).rounding_key))
    dtype = jnp.bfloat16 if rounds else jnp.float32
    w, g = jax.tree.map(lambda x: (x + 1).astype(dtype), (W, G))
    seen = []

    def per_group(path):
        def grad_fn(point):
            seen.append(point)
            return g

        results = [path(g, grad_fn, index) for index in (0, 1, 0)]
        return results[0]

    sam.update(g, sam.init(w), w, grad_fn=lambda p: g, per_group=per_group)
    points = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(p)]) for p in seen]
    points = points[len(points) // 3 - 1 :: len(points) // 3]
    assert np.any(points[0] != points[1])
    np.testing.assert_array_equal(points[0], points[2])


def test_random_sam_needs_no_gradient_at_the_parameters():
    """XLA drops that backward pass: fewer flops than SAM, in both doors."""

    def loss_fn(w, x):
        return jnp.mean(jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"]) ** 2)

    w = {"a": jnp.ones((64, 128)), "b": jnp.ones((128, 64))}
    x = jnp.ones((512, 64))

    def flops(sam, door):
        if door == 1:
            helper = sam_optax.sam_value_and_grad(loss_fn, sam)

            def step(w, state):
                loss, grads = helper(w, x, opt_state=state)
                return loss, sam.update(grads, state, w)

        else:

            def step(w, state):
                grad_fn = jax.grad(lambda w: loss_fn(w, x))
                d = sam.update(grad_fn(w), state, w, grad_fn=grad_fn)
                return loss_fn(w, x), d

        compiled = jax.jit(step).lower(w, sam.init(w)).compile()
        return compiled.cost_analysis()["flops"]

    for door in (1, 2):
        random = flops(sam_optax.random_sam(), door)
        assert random < 0.85 * flops(sam_optax.sam(), door)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_largest_entries_are_found_by_counting(dtype):
    """Exactly as many as wanted, also among equals, of which the earlier ones stay."""
    rng = np.random.default_rng(0)
    keep = jax.jit(_keep_largest)
    for _ in range(10):
        shapes = {"a": (7, 5), "b": (11,)}
        scores = {
            name: jnp.asarray(np.abs(np.round(rng.normal(size=shape), 1)), dtype)
            for name, shape in shapes.items()
        }
        among = {name: rng.random(shape) < 0.6 for name, shape in shapes.items()}
        flat = np.concatenate(
            [np.where(among[k], np.asarray(scores[k], float), -1).ravel() for k in "ab"]
        )
        eligible = int(np.sum(flat >= 0))
        for count in (0, 1, eligible // 2, eligible):
            kept = keep(scores, Count.of(count), jax.tree.map(jnp.asarray, among))
            expected = np.zeros(flat.size, bool)
            expected[np.argsort(-flat, kind="stable")[:count]] = True
            actual = np.concatenate([np.ravel(kept[k]) for k in "ab"])
            np.testing.assert_array_equal(actual, expected)
