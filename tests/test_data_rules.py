"""Which examples each of the two gradients sees, against the same written by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from lab import assert_trees_close
from sam_optax.data import Choice, k_sam, largest_increase, sub_batch

RHO, RATE = 0.3, 0.1


def losses(w, x, y):
    """One loss per example."""
    return jnp.square(jnp.tanh(x @ w["in"]) @ w["out"] - y)


def losses_and_size(w, x, y):
    return losses(w, x, y), len(x)


def mean_loss(w, x, y):
    return jnp.mean(losses(w, x, y))


gradient = jax.grad(mean_loss)
BOTH = {"batch_argnums": (1, 2)}


def make_params():
    keys = jax.random.split(jax.random.key(3))
    return {
        "in": jax.random.normal(keys[0], (4, 6)),
        "out": jax.random.normal(keys[1], (6,)),
    }


def make_batch(seed=0, size=12):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(size, 4)), rng.normal(size=size)
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def perturbed(w, g):
    scale = RHO / optax.tree.norm(g)
    return jax.tree.map(lambda w, g: w + scale * g, w, g)


def pick(batch, indices):
    return tuple(x[np.asarray(indices)] for x in batch)


def first_door(sam, loss_fn, **options):
    """(loss, d) from the drop-in helper."""
    helper = sam_optax.sam_value_and_grad(loss_fn, sam, **options)

    def step(w, state, *args, extra_args=None, **kwargs):
        value, grads = helper(
            w, *args, opt_state=state, extra_args=extra_args, **kwargs
        )
        return value, *sam.update(grads, state, w)

    return step


def second_door(sam, loss_fn, **options):
    """(loss, d) where the caller updates."""
    helper = sam_optax.value_and_ascent_grad(loss_fn, **options)

    def step(w, state, *args, ascend=None, extra_args=None, **kwargs):
        value, g, extra = helper(w, *args, **kwargs)
        extra |= extra_args or {}
        return value, *sam.update(g, state, w, ascend=ascend, **extra)

    return step


@pytest.fixture(params=[first_door, second_door])
def passes(request):
    return request.param


def sam():
    return sam_optax.sam(RHO)


# --- Each rule against its equation.


@pytest.mark.parametrize(
    ("fraction", "part"),
    [
        (0.25, [0, 4, 8]),
        (1 / 3, [0, 3, 6, 9]),
        (0.5, [0, 2, 4, 6, 8, 10]),
        (0.42, [0, 2, 4, 7, 9]),
        (1.0, list(range(12))),
    ],
)
def test_a_sub_batch_makes_the_perturbation(passes, fraction, part):
    w, batch = make_params(), make_batch()
    rule = sub_batch(fraction)
    step = passes(sam(), losses_and_size, has_aux=True, data=rule, **BOTH)
    (loss, seen), d, _ = jax.jit(step)(w, sam().init(w), *batch)
    some = pick(batch, part)
    expected = gradient(perturbed(w, gradient(w, *some)), *batch)
    assert_trees_close(d, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss, mean_loss(w, *some), rtol=1e-5)
    assert seen == len(part)


def floats(state):
    return [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]


@pytest.mark.parametrize("ascend", [False, jnp.bool_(False)], ids=["static", "traced"])
def test_a_bad_batch_to_ascend_by_spoils_no_step_that_does_not_ascend(ascend):
    w, (x, y) = make_params(), make_batch()
    bad = jnp.full_like(x, jnp.nan), y
    fsam = sam_optax.fsam(RHO)
    helper = sam_optax.sam_value_and_grad(mean_loss, fsam, **BOTH)
    start = fsam.init(w)
    _, grads = helper(w, x, y, opt_state=start, ascend=ascend, ascent_batch=bad)
    d, state = fsam.update(grads, start, w)
    assert_trees_close(d, gradient(w, x, y))
    before, after = map(floats, (start, state))
    assert_trees_close(after, before)


@pytest.mark.parametrize("size", [4, 12, 48])
def test_another_batch_makes_the_perturbation(passes, size):
    """SAM-db with one of the same size, Fig. 2c of the F-SAM paper with a larger."""
    w, batch, other = make_params(), make_batch(), make_batch(1, size)
    step = passes(sam(), losses_and_size, has_aux=True, **BOTH)
    (loss, seen), d, _ = jax.jit(step)(w, sam().init(w), *batch, ascent_batch=other)
    expected = gradient(perturbed(w, gradient(w, *other)), *batch)
    assert_trees_close(d, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss, mean_loss(w, *batch), rtol=1e-5)
    assert seen == 12


@pytest.mark.parametrize(
    ("gamma", "as_released", "count"),
    [
        (0.5, False, 6),
        (0.5, True, 5),
        (0.29, False, 3),
        (0.99, True, 12),
        (1.0, False, 12),
    ],
)
def test_the_descent_selects_by_the_increase_of_the_loss(
    passes, gamma, as_released, count
):
    w, batch = make_params(), make_batch()
    rule = largest_increase(gamma, as_released=as_released)
    step = passes(sam(), losses, data=rule, **BOTH)
    loss, d, _ = jax.jit(step)(w, sam().init(w), *batch)
    there = perturbed(w, gradient(w, *batch))
    rise = losses(there, *batch) - losses(w, *batch)
    some = pick(batch, np.argsort(-np.asarray(rise))[:count])
    assert_trees_close(d, gradient(there, *some), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss, mean_loss(w, *batch), rtol=1e-5)


@pytest.mark.parametrize("m", [None, 6])
def test_a_selection_at_the_perturbed_point_is_not_compared(m):
    """g is that of other examples, and which ones is known too late."""
    w, batch = make_params(), make_batch()
    rule = largest_increase(0.5)

    def gradients_of(tx):
        helper = sam_optax.sam_value_and_grad(losses, tx, data=rule, m=m, **BOTH)
        return jax.eval_shape(
            lambda w: helper(w, *batch, opt_state=tx.init(w))[1].gradients, w
        )

    for name in ("gsam", "stable_sam", "wsam", "look_sam"):
        with pytest.raises(ValueError, match="would compare the examples"):
            gradients_of(getattr(sam_optax, name)())
    for name in ("esam", "fsam", "sam_every_k"):
        gradients_of(getattr(sam_optax, name)())


@pytest.mark.parametrize("k", [1, 5, 12])
def test_k_sam_selects_by_the_loss_for_both_gradients(passes, k):
    w, batch = make_params(), make_batch()
    rule = k_sam(k)
    step = passes(sam(), losses_and_size, has_aux=True, data=rule, **BOTH)
    (loss, seen), d, _ = jax.jit(step)(w, sam().init(w), *batch)
    some = pick(batch, np.argsort(-np.asarray(losses(w, *batch)))[:k])
    expected = gradient(perturbed(w, gradient(w, *some)), *some)
    assert_trees_close(d, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss, mean_loss(w, *batch), rtol=1e-5)
    assert seen == 12


def test_a_rule_of_ones_own(passes):
    """One function: here, the perturbation follows the first examples alone."""

    def warmest(batch, params):
        part = batch.take(slice(None, 3))
        return Choice(
            part.gradient(params), part.gradient, batch.gradient, recompute=True
        )

    w, batch = make_params(), make_batch()
    step = passes(sam(), losses, data=warmest, **BOTH)
    _, d, _ = jax.jit(step)(w, sam().init(w), *batch)
    expected = gradient(perturbed(w, gradient(w, *pick(batch, [0, 1, 2]))), *batch)
    assert_trees_close(d, expected, rtol=1e-4, atol=1e-6)


def test_a_full_gradient_reaches_the_ascent(passes):
    """SAM-full: ε along the projection of g on the gradient given."""
    w, batch = make_params(), make_batch()
    method = sam_optax.sam_full(RHO)
    full = gradient(w, *make_batch(1, 40))
    step = jax.jit(passes(method, losses))
    _, d, _ = step(w, method.init(w), *batch, extra_args={"full_gradient": full})
    g = gradient(w, *batch)
    sign = np.sign(optax.tree.vdot(g, full))
    along = jax.tree.map(lambda x: sign * x, full)
    expected = gradient(perturbed(w, along), *batch)
    assert_trees_close(d, expected, rtol=1e-4, atol=1e-6)


# --- Steps that do not ascend.


@pytest.fixture(params=["sub_batch", "ascent_batch"])
def elsewhere(request):
    """(options, call) whose g is that of other examples than the descent's."""
    if request.param == "sub_batch":
        return BOTH | {"data": sub_batch(0.25)}, {}
    return BOTH, {"ascent_batch": make_batch(1)}


@pytest.mark.parametrize("traced", [False, True])
def test_a_step_that_does_not_ascend_descends_on_the_batch(passes, elsewhere, traced):
    """Not on the examples that the perturbation would have come from."""
    options, call = elsewhere
    w, batch = make_params(), make_batch()
    method = sam_optax.fsam(RHO)
    step = jax.jit(
        passes(method, losses, **options),
        static_argnames=() if traced else "ascend",
    )
    _, d, state = step(w, method.init(w), *batch, ascend=False, **call)
    assert_trees_close(d, gradient(w, *batch), rtol=1e-4, atol=1e-6)
    # What is carried follows the examples of the ascent.
    seen = call.get("ascent_batch", pick(batch, [0, 4, 8]))
    average = jax.tree.map(lambda g: 0.1 * g, gradient(w, *seen))
    assert_trees_close(
        state.ascent_state[0].gradient_ema, average, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda rho: sam_optax.wsam(rho),
        lambda rho: sam_optax.gsam(rho, minimize="loss"),
        lambda rho: sam_optax.stable_sam(rho),
        lambda rho: sam_optax.gradient_norm_penalty(rho),
    ],
    ids=["wsam", "gsam", "stable_sam", "gradient_norm_penalty"],
)
def test_the_second_gradient_is_compared_with_that_of_its_own_examples(
    passes, elsewhere, make
):
    """Or the difference of the two would be the noise of the sampling."""
    options, call = elsewhere
    w, batch = make_params(), make_batch()
    method = make(0.0)
    step = jax.jit(passes(method, losses, **options))
    _, d, _ = step(w, method.init(w), *batch, **call)
    assert_trees_close(d, gradient(w, *batch), rtol=1e-4, atol=1e-6)


def test_look_sam_keeps_a_direction_of_the_descents_examples(passes, elsewhere):
    options, call = elsewhere
    w, batch = make_params(), make_batch()
    method = sam_optax.look_sam(RHO, k=2)
    step = jax.jit(passes(method, losses, **options))
    _, ga, state = step(w, method.init(w), *batch, **call)
    _, d, _ = step(w, state, *batch, **call)
    g = gradient(w, *batch)
    v = optax.tree.sub(
        ga, optax.tree.scale(optax.tree.vdot(ga, g) / optax.tree.vdot(g, g), g)
    )
    scale = 0.7 * optax.tree.norm(g) / optax.tree.norm(v)
    expected = jax.tree.map(lambda g, v: g + scale * v, g, v)
    assert_trees_close(d, expected, rtol=1e-3, atol=1e-5)


def test_further_ascent_steps_see_the_ascents_examples(passes, elsewhere):
    """multi_step_sam and R-SAM take gradients of their own on the way."""
    options, call = elsewhere
    w, batch = make_params(), make_batch()
    seen = call.get("ascent_batch", pick(batch, [0, 4, 8]))
    method = sam_optax.multi_step_sam(2 * RHO, steps=2)
    step = jax.jit(passes(method, losses, **options))
    _, d, _ = step(w, method.init(w), *batch, **call)
    there = perturbed(w, gradient(w, *seen))
    there = perturbed(there, gradient(there, *seen))
    assert_trees_close(d, gradient(there, *batch), rtol=1e-3, atol=1e-5)


# --- Where the examples are.


def test_a_sub_batch_of_a_very_large_batch():
    """Whose size times the number taken is beyond 32 bits."""
    x = jnp.concatenate([jnp.zeros(30000), jnp.ones(30000)])
    rule = sub_batch(0.7)
    helper = sam_optax.value_and_ascent_grad(lambda w, x: w * x, data=rule)
    loss, g, _ = helper(jnp.array(1.0), x)
    assert loss == pytest.approx(0.5, abs=1e-4)
    assert g == pytest.approx(0.5, abs=1e-4)


def test_a_numpy_batch_that_is_closed_over():
    x, y = map(np.asarray, make_batch())
    helper = sam_optax.value_and_ascent_grad(losses, data=k_sam(3), **BOTH)
    loss = jax.jit(lambda w: helper(w, x, y)[0])(make_params())
    np.testing.assert_allclose(loss, mean_loss(make_params(), x, y), rtol=1e-5)


def test_labels_bound_by_partial_are_not_overlooked():
    x, y = make_batch()
    bound = functools.partial(losses, y=y)
    helper = sam_optax.value_and_ascent_grad(bound, data=k_sam(1))
    with pytest.raises(ValueError, match=r"bound by functools\.partial"):
        helper(make_params(), x)


def keyword_losses(w, *, x, y, shift=0.0):
    return losses(w, x, y) + 0 * shift


@pytest.mark.parametrize(
    ("loss_fn", "options", "as_keywords"),
    [
        (losses, {"batch_argnums": (1, 2)}, False),
        (losses, {"batch_argnums": [1, 2]}, False),
        (losses, {"batch_argnums": (1, 2)}, True),
        (keyword_losses, {"batch_argnames": ("x", "y")}, True),
    ],
)
def test_the_batch_is_where_it_is_said_to_be(passes, loss_fn, options, as_keywords):
    w, (x, y) = make_params(), make_batch()
    data = k_sam(4)
    step = jax.jit(passes(sam(), loss_fn, data=data, **options))
    call = ((), {"x": x, "y": y}) if as_keywords else ((x, y), {})
    _, d, _ = step(w, sam().init(w), *call[0], **call[1])
    reference = passes(sam(), losses, data=data, **BOTH)
    _, expected, _ = jax.jit(reference)(w, sam().init(w), x, y)
    assert_trees_close(d, expected, rtol=1e-6)


def test_a_batch_in_one_argument_is_found_beside_keys_and_strings(passes):
    def loss_fn(w, batch, key, mode, scale=1.0):
        assert mode == "train"
        keep = jax.random.bernoulli(key, 0.5, batch["x"].shape[1:])
        return scale * losses(w, batch["x"] * keep, batch["y"])

    w, (x, y) = make_params(), make_batch()
    key = jax.random.key(0)
    step = passes(sam(), loss_fn, data=k_sam(4))
    run = functools.partial(step, w, sam().init(w))
    _, d, _ = jax.jit(lambda b, k: run(b, k, "train"))({"x": x, "y": y}, key)
    kept = x * jax.random.bernoulli(key, 0.5, (4,))
    some = pick((kept, y), np.argsort(-np.asarray(losses(w, kept, y)))[:4])
    expected = gradient(perturbed(w, gradient(w, *some)), *some)
    assert_trees_close(d, expected, rtol=1e-4, atol=1e-6)


# --- What it costs, and what it reports.


def wide_losses(w, x, y):
    return jnp.square(jnp.sum(jnp.tanh(x @ w["in"]) @ w["out"], -1) - y)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("data", "gradients"),
    [
        (None, 2),
        (sub_batch(0.25), 1.25),
        (k_sam(8), 2 * 8 / 32 + 1 / 2.5),
        (largest_increase(0.5), 1 + 0.5 + 1 / 2.5),
    ],
)
def test_the_price_of_a_rule(data, gradients):
    """In operations of a plain gradient; a forward pass of this model has two of the
    five products of its gradient."""
    w = {"in": jnp.ones((64, 64)), "out": jnp.ones((64, 64))}
    batch = make_batch(size=32)[1][:, None] * jnp.ones((32, 64)), make_batch(size=32)[1]
    step = first_door(sam(), wide_losses, data=data, batch_argnums=(1, 2))
    plain = flops(jax.grad(lambda w, *b: wide_losses(w, *b).mean()), w, *batch)
    cost = flops(lambda *a: step(*a)[1], w, sam().init(w), *batch)
    assert cost / plain == pytest.approx(gradients, rel=0.1)


@pytest.mark.parametrize(
    "data",
    [sub_batch(0.25), k_sam(4)],
    ids=["sub_batch", "k_sam"],
)
def test_the_reported_gap_is_that_of_the_examples_of_the_descent(data):
    w, batch = make_params(), make_batch()
    helper = sam_optax.sam_value_and_grad(losses, sam(), report=True, data=data, **BOTH)
    _, grads = helper(w, *batch, opt_state=sam().init(w))
    top = np.argsort(-np.asarray(losses(w, *batch)))[:4]
    is_part = data.__qualname__.startswith("sub_batch")
    ascent = pick(batch, [0, 4, 8] if is_part else top)
    descent = batch if is_part else ascent
    there = perturbed(w, gradient(w, *ascent))
    high, low = mean_loss(there, *descent), mean_loss(w, *descent)
    np.testing.assert_allclose(grads.report.perturbed_loss, high, rtol=1e-5)
    np.testing.assert_allclose(grads.report.surrogate_gap, high - low, rtol=1e-3)


# --- Bad input.


def run(loss_fn=losses, args=None, call=None, **options):
    w = make_params()
    helper = sam_optax.value_and_ascent_grad(loss_fn, **options)
    _, _, extra = helper(w, *(make_batch() if args is None else args), **(call or {}))
    extra["grad_fn"](w)


HIGHEST = BOTH | {"data": k_sam(3)}
X, Y = make_batch()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"data": k_sam(13)} | BOTH,
            "at most the size .*, 12, got 13",
        ),
        ({"data": sub_batch(0.05)} | BOTH, "selects none of the 12 examples"),
        (
            {"data": largest_increase(0.1, as_released=True)} | BOTH,
            "gamma is so small",
        ),
        (HIGHEST | {"loss_fn": mean_loss}, r"of shape \(12,\), not their mean"),
        (
            HIGHEST | {"loss_fn": lambda *a: losses(*a)[:, None]},
            r"returned shape \(12, 1\)",
        ),
        (
            {
                "data": largest_increase(0.5),
                "loss_fn": mean_loss,
                **BOTH,
            },
            r"one loss per example",
        ),
        (
            BOTH | {"call": {"ascent_batch": make_batch()[:1]}},
            "ascent_batch does not match",
        ),
        (
            BOTH | {"call": {"ascent_batch": (X[:, :2], Y)}},
            r"\(12, 2\)",
        ),
        (
            BOTH | {"call": {"ascent_batch": (X, Y.astype(jnp.int32))}},
            "same dtypes",
        ),
        (HIGHEST | {"call": {"ascent_batch": (X, Y)}}, "pass one of them"),
        ({"data": k_sam(3)}, r"Argument 2 .*batch_argnums=\(1, 2\)"),
        (HIGHEST | {"batch_argnums": (1, 3)}, "Argument 3 of loss_fn should hold"),
        (
            {"data": k_sam(3), "batch_argnames": "z"},
            "'z', which was not passed by keyword",
        ),
        (HIGHEST | {"args": (X, Y[:5])}, r"of one length.*\(12, 4\), \(5,\)"),
        (HIGHEST | {"args": (X, 1.0)}, "first axis that numbers"),
        (HIGHEST | {"args": (X, jnp.ones(()))}, "first axis that numbers"),
        (HIGHEST | {"batch_argnums": 0}, "integers >= 1, numbered as in jax.value"),
        (HIGHEST | {"batch_argnames": 1}, "must be strings"),
    ],
)
def test_what_does_not_fit_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sub_batch(0.0), "fraction must be > 0"),
        (lambda: sub_batch(1.5), "fraction must be > 0 and <= 1"),
        (lambda: largest_increase(-0.5), "gamma must be > 0"),
        (lambda: largest_increase(2.0), "gamma must be > 0 and <= 1"),
        (lambda: k_sam(0), "k must be an integer >= 1"),
        (lambda: k_sam(0.5), "k must be an integer >= 1"),
    ],
)
def test_a_rule_that_cannot_be_raises_when_building(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_rule_must_be_a_function_and_fractions_numbers():
    with pytest.raises(TypeError, match=r"data must be a data rule, such as .*0.25"):
        sam_optax.value_and_ascent_grad(losses, data=0.25)
    with pytest.raises(TypeError, match="it decides shapes"):
        sub_batch(jnp.asarray(0.5))


def test_extra_args_that_the_helper_passes_itself():
    w = make_params()
    helper = sam_optax.sam_value_and_grad(losses, sam())
    with pytest.raises(ValueError, match="extra_args has 'grad_fn', which"):
        helper(
            w, *make_batch(), opt_state=sam().init(w), extra_args={"grad_fn": gradient}
        )


def test_weighing_examples_keeps_the_auxiliary_output_of_another_loss():
    def loss_fn(w, x):
        return w * x, jnp.sum(x)

    def rule(batch, params):
        weighed = batch.weigh(jnp.array([1.0, 3.0]))
        assert weighed.user_loss_fn is None
        other = weighed.with_loss(lambda w, x: (jnp.sum(w**2 * x), jnp.float32(7)))
        there = other.gradient(params)
        return sam_optax.data.Choice(there, other.gradient, other.gradient)

    sam = sam_optax.sam(rho=0.5)
    helper = sam_optax.sam_value_and_grad(loss_fn, sam, has_aux=True, data=rule)
    (loss, aux), grads = helper(
        jnp.array(1.0), jnp.array([1.0, 2.0]), opt_state=sam.init(jnp.array(1.0))
    )
    assert (float(loss), float(aux), float(grads.gradients)) == (3.0, 7.0, 9.0)
