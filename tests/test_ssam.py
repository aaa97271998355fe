"""SSAM by value: which entries each refresh chooses, when, and by which key."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sam_optax
from doors import DOORS
from sam_optax import _tree, ascents
from sam_optax._random import key_stream
from sam_optax.methods._order import Count
from sam_optax.methods._ssam import _keep_largest, _number_exchanged

W = {"a": jnp.zeros((3, 4)), "b": {"c": jnp.zeros(7), "d": jnp.zeros(())}}
SIZE = 20


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def like_params(vector):
    return jax.tree.unflatten(
        jax.tree.structure(W),
        [
            jnp.asarray(part.reshape(w.shape))
            for part, w in zip(
                np.split(vector, [12, 19]), jax.tree.leaves(W), strict=True
            )
        ],
    )


def gradients(steps):
    normal = np.random.default_rng(0).normal(size=(steps, SIZE))
    return [like_params(g.astype(np.float32)) for g in normal]


def largest(scores, count, among=True):
    """A mask of the entries of the largest scores."""
    mask = np.zeros(SIZE, bool)
    mask[np.argsort(-np.where(among, scores, -1.0), kind="stable")[:count]] = True
    return mask


def masks(part, gs, extra=lambda t: {}):
    """The mask that each step applies, and the one that it hands on."""
    state, ones = part.init(W), jax.tree.map(jnp.ones_like, W)
    applied, carried = [], [flat(state.perturbed)]
    for t, g in enumerate(gs):
        u, state = part.update(ones, state, W, ascent_gradient=g, **extra(t))
        applied.append(flat(u) != 0)
        carried.append(flat(state.perturbed))
        assert state.mask_step == t + 1
    return applied, carried


def keys_of(key, steps):
    stream = key_stream(key, "drop_and_grow")
    data, keys = stream.start(), []
    for _ in range(steps):
        now, data = stream.next(data)
        keys.append(now)
    return keys


# --- The refreshes of each score, against NumPy.


def test_ssam_d_exchanges_what_the_reference_exchanges():
    """Refreshes on steps 0, 3 and 6: the share, the key and the gradient of that step.

    The new mask counts from the next step on.
    """
    gs, shares = gradients(8), np.array([0.5, 1, 1, 0.25, 0, 0, 0.95, 0], np.float32)
    part = ascents.drop_and_grow(
        0.6, lambda step: jnp.asarray(shares)[step], refresh_every=3, key=5
    )
    applied, carried = masks(part, gs)
    keys = keys_of(5, 8)
    mask = largest(flat(_tree.uniform_like(keys[0], W)), 8)
    np.testing.assert_array_equal(carried[0], mask)
    for t, g in enumerate(gs):
        np.testing.assert_array_equal(applied[t], mask)
        if t % 3 == 0:
            count = round(shares[t] * 8)
            chance = flat(_tree.uniform_like(keys[t], W))
            stays = largest(np.abs(flat(g)), 8 - count, among=mask)
            mask = stays | largest(chance, count, among=~mask)
        np.testing.assert_array_equal(carried[t + 1], mask)


def test_ssam_d_exchanges_no_more_than_there_is():
    """Of 16 kept entries, all would go; but only 4 are there to take their place."""
    part = ascents.drop_and_grow(0.2, 1.0, refresh_every=1)
    (g,) = gradients(1)
    (before,), (_, after) = masks(part, [g])
    stays = largest(np.abs(flat(g)), 12, among=before)
    np.testing.assert_array_equal(after, stays | ~before)


def test_the_batch_gradient_chooses_on_the_steps_of_a_refresh():
    gs = gradients(6)
    part = ascents.keep_largest_gradient(0.7, refresh_every=4)
    applied, carried = masks(part, gs)
    for t in range(6):
        expected = largest(np.abs(flat(gs[t - t % 4])), 6)
        np.testing.assert_array_equal(applied[t], expected)
        np.testing.assert_array_equal(carried[t + 1], expected)


def test_fisher_chooses_on_the_steps_of_a_refresh():
    gs = gradients(6)
    part = ascents.keep_largest_fisher(0.7, refresh_every=4)
    scores = [jax.tree.map(jnp.square, g) for g in gradients(12)[6:]]
    for given in (lambda t: scores[t], lambda t: lambda: scores[t]):
        applied, carried = masks(part, gs, lambda t, given=given: {"fisher": given(t)})
        for t in range(6):
            expected = largest(flat(scores[t - t % 4]), 6)
            np.testing.assert_array_equal(applied[t], expected)
            np.testing.assert_array_equal(carried[t + 1], expected)


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 20), (0.68, 6), (0.99, 1)])
def test_the_number_of_kept_entries_is_rounded_and_never_zero(sparsity, kept):
    for part in (
        ascents.keep_largest_gradient(sparsity, refresh_every=2),
        ascents.drop_and_grow(sparsity, refresh_every=2),
    ):
        applied, carried = masks(part, gradients(3))
        assert {int(mask.sum()) for mask in applied + carried} == {kept}


def test_the_updates_choose_where_no_gradient_is_given():
    part = ascents.keep_largest_gradient(0.5)
    (g,) = gradients(1)
    u, _ = part.update(g, part.init(W))
    np.testing.assert_array_equal(
        flat(u), np.where(largest(abs(flat(g)), 10), flat(g), 0)
    )


def test_a_masked_entry_shows_that_it_is_not_finite():
    part = ascents.keep_largest_gradient(0.5)
    (g,) = gradients(1)
    u = like_params(np.where(largest(abs(flat(g)), 10), 1.0, np.nan))
    u, state = part.update(u, part.init(W), W, ascent_gradient=g)
    np.testing.assert_array_equal(np.isnan(flat(u)), ~flat(state.perturbed))


def test_half_precision_gives_float32_and_bools():
    half = jax.tree.map(lambda w: w.astype(jnp.float16), W)
    for part in (ascents.keep_largest_gradient(), ascents.drop_and_grow()):
        u, state = part.update(jax.tree.map(jnp.ones_like, half), part.init(half), half)
        assert {x.dtype for x in jax.tree.leaves(u)} == {jnp.dtype(jnp.float32)}
        assert {x.dtype for x in jax.tree.leaves(state.perturbed)} == {jnp.dtype(bool)}


# --- The method.


def test_the_parts_have_the_defaults_of_the_method():
    def defaults(make):
        parameters = inspect.signature(make).parameters
        shared = ("sparsity", "refresh_every", "drop", "key")
        return {name: parameters[name].default for name in shared if name in parameters}

    method = defaults(sam_optax.ssam)
    assert method["sparsity"] == 0.5
    for part in (
        ascents.keep_largest_fisher,
        ascents.keep_largest_gradient,
        ascents.drop_and_grow,
    ):
        assert defaults(part).items() <= method.items()


@pytest.mark.slow
def test_the_method_passes_on_what_it_is_given():
    """Each kind of it, in two refreshes, against the ascent put together by hand."""
    gs, drop = gradients(5), lambda step: 0.5 - 0.1 * step
    fisher = jax.tree.map(jnp.square, gs[4])
    options = {"refresh_every": 2}
    for kind, part in (
        ({}, ascents.keep_largest_gradient(0.7, **options)),
        (
            {"score": "squared_batch_gradient"},
            ascents.keep_largest_gradient(0.7, **options),
        ),
        ({"score": "fisher"}, ascents.keep_largest_fisher(0.7, **options)),
        (
            {"dynamic": True, "drop": drop, "key": 5},
            ascents.drop_and_grow(0.7, drop, key=5, **options),
        ),
    ):
        sam = sam_optax.ssam(0.3, 0.7, **kind, **options)
        extra = {"fisher": fisher} if kind.get("score") == "fisher" else {}
        applied, _ = masks(part, gs, lambda t, extra=extra: extra)
        state = sam.init(W)
        for g, mask in zip(gs, applied, strict=True):
            epsilon, state = sam.update(g, state, W, grad_fn=lambda p: p, **extra)
            wanted = mask * 0.3 * flat(g) / np.linalg.norm(flat(g))
            np.testing.assert_allclose(flat(epsilon), wanted, rtol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_groups_share_what_is_carried_and_not_what_they_choose(dynamic):
    """SSAM-F's groups choose by their own gradients; SSAM-D's use the carried mask.

    What is carried follows the mean gradient.
    """
    sam = sam_optax.ssam(1.0, 0.7, dynamic=dynamic, drop=0.5, refresh_every=2)
    groups = gradients(2)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, *groups)
    state, points = sam.init(W), []

    def per_group(path):
        def grad_fn(point):
            points.append(point)
            return point

        results = [path(g, grad_fn, i) for i, g in enumerate(groups)]
        return jax.tree.map(lambda x, y: (x + y) / 2, *results)

    def of(state):
        return state.ascent_state[1]

    before = flat(of(state).perturbed)
    _, state = sam.update(mean, state, W, grad_fn=lambda p: p, per_group=per_group)
    for g, point in zip(groups, points, strict=True):
        mask = before if dynamic else largest(np.abs(flat(g)), 6)
        np.testing.assert_allclose(
            flat(point), mask * flat(g) / np.linalg.norm(flat(g)), rtol=1e-6
        )
    make = ascents.drop_and_grow if dynamic else ascents.keep_largest_gradient
    _, (_, carried) = masks(make(0.7, refresh_every=2), [mean])
    np.testing.assert_array_equal(flat(of(state).perturbed), carried)


@pytest.mark.parametrize(
    "make",
    [
        sam_optax.ssam,
        functools.partial(sam_optax.ssam, dynamic=True),
        functools.partial(
            sam_optax.ssam, dynamic=True, drop=lambda step: jnp.float32(0.5)
        ),
        functools.partial(sam_optax.ssam, score="fisher"),
    ],
    ids=["batch_gradient", "dynamic", "scheduled", "fisher"],
)
def test_strict_dtype_promotion(make):
    def losses(w, x):
        return jnp.square(x @ flat_array(w) - 1)

    def flat_array(tree):
        return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])

    with jax.numpy_dtype_promotion("strict"):
        sam = make(0.1, refresh_every=1)
        x = jnp.ones((4, SIZE)) * jnp.arange(1.0, SIZE + 1)
        fisher = functools.partial(ascents.mean_squared_gradients, losses, W, x)
        extra = {"fisher": fisher} if sam_uses_fisher(make) else {}
        loss_and_grads = sam_optax.sam_value_and_grad(losses, sam)
        _, grads = loss_and_grads(W, x, opt_state=sam.init(W), extra_args=extra)
    assert np.all(np.isfinite(flat(grads.gradients)))


def sam_uses_fisher(make):
    return getattr(make, "keywords", {}).get("score") == "fisher"


# --- The Fisher score.

X = jax.random.normal(jax.random.key(0), (12, 3))
Y = jax.random.normal(jax.random.key(1), (12, 7))


def losses(w, x, y):
    """One per example."""
    hidden = jnp.tanh(x @ w["a"] + 0.3)
    return jnp.sum(jnp.square(hidden @ jnp.ones((4, 7)) + w["b"]["c"] - y), axis=1) * (
        1 + w["b"]["d"]
    )


def fisher_by_hand(w, x, y):
    each = [
        flat(jax.grad(lambda w, i=i: losses(w, x, y)[i])(w)).astype(np.float64)
        for i in range(len(x))
    ]
    return np.mean(np.square(each), axis=0)


@pytest.mark.parametrize("at_once", [1, 3, 8, 12, 50])
def test_the_mean_of_squared_gradients(at_once):
    w = like_params(np.linspace(-0.5, 0.5, SIZE).astype(np.float32))
    found = jax.jit(
        lambda w: ascents.mean_squared_gradients(
            losses, w, X[:11], Y[:11], at_once=at_once
        )
    )(w)
    np.testing.assert_allclose(
        flat(found), fisher_by_hand(w, X[:11], Y[:11]), rtol=1e-5
    )


def test_no_more_gradients_are_in_memory_than_it_says():
    jaxpr = jax.make_jaxpr(
        lambda w: ascents.mean_squared_gradients(losses, w, X, Y, at_once=5)
    )(W)
    assert "f32[5,3,4]" in str(jaxpr)
    assert "f32[12,3,4]" not in str(jaxpr)


@pytest.mark.slow
def test_auxiliary_outputs_mean_losses_and_half_precision():
    w = jax.tree.map(lambda w: w.astype(jnp.bfloat16), W)

    def mean_and_aux(w, x, y):
        return jnp.mean(losses(w, x, y)), {"logits": x}

    found = ascents.mean_squared_gradients(mean_and_aux, w, X, Y, has_aux=True)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(flat(found), fisher_by_hand(W, X, Y), rtol=3e-2)


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        (
            (X, Y[:3]),
            {},
            r"as many in each; got arrays of the shapes \[\(12, 3\), \(3, 7",
        ),
        ((X[:0], Y[:0]), {}, "needs examples along the first axis"),
        ((), {}, "needs examples along the first axis"),
        ((jnp.ones(()),), {}, "needs examples along the first axis"),
        ((X, Y), {"at_once": 0}, "at_once must be an integer >= 1"),
    ],
)
def test_examples_that_make_no_mean(examples, options, message):
    with pytest.raises(ValueError, match=message):
        ascents.mean_squared_gradients(losses, W, *examples, **options)


@pytest.mark.parametrize("door", DOORS)
def test_fisher_through_both_doors(door):
    """Two refreshes of a training, each by the examples and the parameters then."""
    sam = sam_optax.ssam(0.1, 0.7, score="fisher", refresh_every=2)
    tx = optax.chain(sam, optax.sgd(0.05))
    step = DOORS[door](sam, tx, losses_of_mean)

    @jax.jit
    def train_step(w, state, x, y):
        def fisher():
            return ascents.mean_squared_gradients(losses, w, x, y)

        return step(w, state, x[:4], y[:4], fisher=fisher)

    w = like_params(np.linspace(-0.5, 0.5, SIZE).astype(np.float32))
    state = tx.init(w)
    for t in range(4):
        x, y = X + 0.2 * t, Y * (1 + t)
        if t % 2 == 0:
            expected = largest(fisher_by_hand(w, x, y), 6)
        g = flat(jax.grad(losses_of_mean)(w, x[:4], y[:4]))
        point = like_params(flat(w) + expected * 0.1 * g / np.linalg.norm(g))
        d = flat(jax.grad(losses_of_mean)(point, x[:4], y[:4]))
        before = flat(w)
        w, state, _ = train_step(w, state, x, y)
        np.testing.assert_array_equal(
            flat(state[0].ascent_state[1].perturbed), expected
        )
        np.testing.assert_allclose(flat(w), before - 0.05 * d, rtol=1e-4, atol=1e-5)


def losses_of_mean(w, x, y):
    return jnp.mean(losses(w, x, y))


def test_fisher_is_only_computed_on_the_steps_of_a_refresh():
    part, calls = ascents.keep_largest_fisher(0.5, refresh_every=3), []

    def scores():
        calls.append(None)
        return np.float32(1)

    def fisher():
        one = jax.experimental.io_callback(scores, jax.ShapeDtypeStruct((), np.float32))
        return jax.tree.map(lambda w: w + one, W)

    @jax.jit
    def step(state):
        return part.update(W, state, W, fisher=fisher)[1]

    state, counts = part.init(W), []
    for _ in range(5):
        state = jax.block_until_ready(step(state))
        jax.effects_barrier()
        counts.append(len(calls))
    assert counts == [1, 1, 1, 2, 2]


@pytest.mark.slow
def test_few_examples_choose_nearly_as_all_do_and_a_batch_does_not():
    """At the minimum, where the gradients of a batch are only noise.

    A random mask of half of the entries agrees with any other in half of them.
    """
    size, examples = 400, 2000
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(examples, size)), jnp.float32)
    x *= jnp.linspace(0.7, 1.3, size)
    noise = jnp.asarray(rng.normal(size=examples), jnp.float32)

    def losses(w, x, noise):
        return jnp.square(x @ w - noise) / 2

    w = jnp.zeros(size)

    def mask_of(part, g, **extra):
        _, state = part.update(g, part.init(w), w, **extra)
        return np.asarray(state.perturbed)

    fisher = ascents.keep_largest_fisher(0.5)
    everything = mask_of(fisher, w, fisher=(x**2 * noise[:, None] ** 2).mean(axis=0))
    some = ascents.mean_squared_gradients(losses, w, x[:200], noise[:200])
    by_some = mask_of(fisher, w, fisher=some)
    g = jax.grad(lambda w: losses(w, x[:200], noise[:200]).mean())(w)
    by_batch = mask_of(ascents.keep_largest_gradient(0.5), g)
    assert (by_some == everything).mean() > 0.8
    assert (by_batch == everything).mean() < 0.65


def test_fisher_under_a_mask():
    """The entries that are not perturbed are no candidates, however large their F."""
    keep = {"a": True, "b": {"c": False, "d": True}}
    sam = sam_optax.ssam(1.0, 0.5, score="fisher", mask=keep)
    g, scores = gradients(2)
    scores = jax.tree.map(jnp.square, scores)
    scores["b"]["c"] += 100
    candidates = flat(jax.tree.map(lambda k, w: jnp.full(w.shape, k), keep, W))
    mask = largest(flat(scores), round(0.5 * 13), among=candidates)
    norm = np.linalg.norm(flat(g)[candidates])
    for fisher in (scores, lambda: scores):
        d, _ = sam.update(g, sam.init(W), W, grad_fn=lambda p: p, fisher=fisher)
        np.testing.assert_allclose(flat(d), mask * flat(g) / norm, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_fisher_that_is_not_finite_leaves_the_mask_as_it_is(bad):
    gs, good = gradients(2), jax.tree.map(jnp.square, gradients(3)[2])
    spoiled = {**good, "a": good["a"].at[0, 0].set(bad)}
    part = ascents.keep_largest_fisher(0.5, refresh_every=1)
    _, (first, *later) = masks(part, gs, lambda t: {"fisher": spoiled})
    for mask in later:
        np.testing.assert_array_equal(mask, first)


def test_groups_of_examples_share_the_fisher_mask():
    sam = sam_optax.ssam(0.1, 0.7, score="fisher")
    loss_and_grads = sam_optax.sam_value_and_grad(
        losses, sam, m=4, batch_argnums=(1, 2)
    )
    w = like_params(np.linspace(-0.5, 0.5, SIZE).astype(np.float32))

    @jax.jit
    def step(w, state):
        def fisher():
            return ascents.mean_squared_gradients(losses, w, X, Y)

        return loss_and_grads(w, X, Y, opt_state=state, extra_args={"fisher": fisher})[
            1
        ]

    mask, parts = largest(fisher_by_hand(w, X, Y), 6), []
    for i in range(0, 12, 4):
        g = flat(jax.grad(losses_of_mean)(w, X[i : i + 4], Y[i : i + 4]))
        point = like_params(flat(w) + mask * 0.1 * g / np.linalg.norm(g))
        parts.append(flat(jax.grad(losses_of_mean)(point, X[i : i + 4], Y[i : i + 4])))
    found = flat(step(w, sam.init(w)).gradients)
    np.testing.assert_allclose(found, np.mean(parts, axis=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "check_vma", [True, pytest.param(False, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("sync", [True, False])
def test_fisher_on_an_axis_of_devices(sync, check_vma):
    """Each device has its own examples; the mean over the axis is F of all of them."""
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    sam = sam_optax.ssam(0.1, 0.7, score="fisher")
    loss_and_grads = sam_optax.sam_value_and_grad(
        losses, sam, axis_name="batch", sync_perturbation=sync, batch_argnums=(1, 2)
    )

    def step(w, state, x, y):
        def fisher():
            own = ascents.mean_squared_gradients(losses, w, x, y, at_once=2)
            return jax.lax.pmean(own, "batch")

        extra = {"fisher": fisher}
        grads = loss_and_grads(w, x, y, opt_state=state, extra_args=extra)[1]
        return sam.update(grads, state, w)

    step = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), P(), P("batch"), P("batch")),
        out_specs=P(),
        check_vma=check_vma,
    )
    w = like_params(np.linspace(-0.5, 0.5, SIZE).astype(np.float32))
    d, state = jax.jit(step)(w, sam.init(w), X, Y)
    mask = largest(fisher_by_hand(w, X, Y), 6)
    np.testing.assert_array_equal(flat(state.ascent_state[1].perturbed), mask)
    parts, size = [], 12 if sync else 3
    for i in range(0, 12, size):
        g = flat(jax.grad(losses_of_mean)(w, X[i : i + size], Y[i : i + size]))
        point = like_params(flat(w) + mask * 0.1 * g / np.linalg.norm(g))
        there = jax.grad(losses_of_mean)(point, X[i : i + size], Y[i : i + size])
        parts.append(flat(there))
    np.testing.assert_allclose(flat(d), np.mean(parts, axis=0), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_fisher_on_a_mesh_with_explicit_axes():
    """Parameters and examples are spread over one axis, and the mask as they are."""
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Explicit,))
    w, x = jnp.linspace(0.5, 1.5, 24).reshape(8, 3), X[:8, :1] * jnp.arange(1.0, 9.0)

    def losses(w, x):
        return jnp.sum(jnp.tanh(x @ jax.sharding.reshard(w, P())), axis=1)

    part = ascents.keep_largest_fisher(0.5, refresh_every=1)

    def masked(w, x):
        def fisher():
            return ascents.mean_squared_gradients(losses, w, x, at_once=4)

        return part.update(w, part.init(w), w, fisher=fisher)[1].perturbed

    with jax.set_mesh(mesh):
        spread = jax.device_put((w, x), P("batch"))
        mask = jax.jit(masked)(*spread)
        assert jax.typeof(mask).sharding.spec == P("batch", None)
    with jax.set_mesh(jax.make_mesh((1,), ("one",))):
        wanted = masked(w, x)
    np.testing.assert_array_equal(mask, wanted)


@pytest.mark.parametrize(
    ("options", "fisher", "message"),
    [
        ({"score": "fisher"}, None, "so the update needs fisher="),
        ({}, W, r'Pass ssam\(score="fisher"\)'),
        ({"score": "fisher"}, {"a": W["a"]}, r"fisher must be like the parameters: \["),
        ({"score": "fisher"}, lambda: W | {"a": jnp.ones(3)}, "has shape"),
    ],
)
def test_a_fisher_that_is_missing_or_wrong(options, fisher, message):
    sam = sam_optax.ssam(**options)
    extra = {} if fisher is None else {"fisher": fisher}
    with pytest.raises(ValueError, match=message):
        sam.update(W, sam.init(W), W, grad_fn=lambda p: p, **extra)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "gradient"}, "score must be"),
        ({"score": "fisher", "dynamic": True}, "no use for score"),
        ({"dynamic": True, "drop": 1.1}, "drop must be >= 0 and <= 1, got 1.1"),
        ({"dynamic": True, "drop": -0.1}, "drop must be >= 0 and <= 1"),
        ({"sparsity": 1.0}, "sparsity must be >= 0 and < 1"),
        ({"sparsity": -0.1}, "sparsity must be >= 0 and < 1"),
        ({"refresh_every": 0}, "refresh_every must be an integer"),
    ],
)
def test_arguments_that_make_no_method(options, message):
    with pytest.raises(ValueError, match=message):
        sam_optax.ssam(**options)


@pytest.mark.parametrize(
    ("drop", "exchanged"), [(lambda t: 1.2 - 0 * t, 8), (lambda t: -0.2 - 0 * t, 0)]
)
def test_a_schedule_beyond_the_range_of_drop_is_cut_to_it(drop, exchanged):
    """Under jit, a linear schedule that ends at 0 can end a little below."""
    part = ascents.drop_and_grow(0.6, drop, refresh_every=1)
    applied, carried = masks(part, gradients(4))
    for before, after in zip(applied, carried[1:], strict=True):
        assert (before & ~after).sum() == exchanged
        assert after.sum() == 8


@pytest.mark.parametrize(
    ("share", "count", "others", "exchanged"),
    [
        (1.0, 16_777_219, 2**33, 16_777_219),  # float32 rounds it up to ..220
        (0.5, 2**33, 2**33, 2**32),
        (0.5, 8, 3, 3),
        (0.3, 8, 8, 2),
    ],
)
def test_the_number_that_is_exchanged(share, count, others, exchanged):
    found = _number_exchanged(jnp.float32(share), count, others)
    assert int(found.high) * 2**32 + int(found.low) == exchanged


def test_no_more_is_kept_than_is_eligible():
    scores = jax.tree.map(jnp.ones_like, W)
    among = like_params(np.arange(SIZE) < 5)
    kept = _keep_largest(scores, Count.of(7), among=among)
    np.testing.assert_array_equal(flat(kept), np.arange(SIZE) < 5)


def test_a_parameter_may_be_a_python_number():
    part = ascents.keep_largest_gradient(0.5)
    state = part.init({"a": 1.0, "b": jnp.ones(3)})
    assert all(leaf.dtype == jnp.bool_ for leaf in jax.tree.leaves(state.perturbed))


def test_the_fisher_losses_may_have_a_second_output_only_if_that_is_said():
    def losses(w, x):
        return (w - x) ** 2, x

    w, x = jnp.array(0.0), jnp.array([1.0, 3.0])
    f = ascents.mean_squared_gradients(losses, w, x, has_aux=True)
    assert f == 20  # the mean of (2 · 1)² and (2 · 3)²
    with pytest.raises(TypeError, match="pass has_aux=True"):
        ascents.mean_squared_gradients(losses, w, x)


@pytest.mark.parametrize("fisher", [False, True])
def test_a_mask_of_g_in_front_of_a_direction_without_g(fisher):
    """A part that reads g itself: a bad g does not enter its mask, and d is NaN."""
    reader = (
        ascents.scale_by_inverse_root_fisher()
        if fisher
        else ascents.keep_largest_gradient(0.5, refresh_every=1)
    )
    sam = sam_optax.sharpness_aware(
        ascents.chain(ascents.against_momentum(), reader, ascents.sam(0.1))
    )
    assert sam_optax.ascents.chain(ascents.against_momentum(), reader).uses_gradient
    w, state = jnp.arange(1.0, 5.0), sam.init(jnp.ones(4))

    def step(g, state):
        return sam.update(g, state, w, grad_fn=lambda point: point)

    _, state = step(w, state)
    d, after = step(w.at[0].set(jnp.nan), state)
    assert jnp.isnan(d).all()
    for new, old in zip(
        jax.tree.leaves(after.ascent_state),
        jax.tree.leaves(state.ascent_state),
        strict=True,
    ):
        if old.dtype == jnp.bool_ or jnp.issubdtype(old.dtype, jnp.floating):
            np.testing.assert_array_equal(new, old)


def test_an_ascent_whose_mask_is_made_of_g_can_have_a_batch_of_its_own():
    sam = sam_optax.sharpness_aware(
        ascents.chain(
            ascents.against_momentum(),
            ascents.keep_largest_gradient(0.5, refresh_every=1),
            ascents.sam(0.1),
        )
    )

    def loss_fn(w, x):
        return jnp.mean(x @ w)

    loss_and_grads = sam_optax.sam_value_and_grad(loss_fn, sam)
    w, x = jnp.ones(2), jnp.array([[1.0, 2.0]])
    _, grads = loss_and_grads(
        w, x, opt_state=sam.init(w), ascent_batch=jnp.array([[3.0, 1.0]])
    )
    perturbed = sam.update(grads, sam.init(w), w)[1].ascent_state[1].perturbed
    np.testing.assert_array_equal(perturbed, [True, False])
