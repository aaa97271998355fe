"""SAMPa: its two gradients by themselves, and on two halves of the devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import sam_optax
from devices import table
from lab import assert_trees_close
from quadratic import H, W, descend, quadratic, split

pytestmark = pytest.mark.usefixtures("double_precision")


def unit(v):
    length = np.linalg.norm(v)
    return v / length if length else v


def sampa_by_hand(rho, rates, lams, momentum=0.0, decay=0.0):
    w, y, m, points = W, np.zeros(3), np.zeros(3), []
    for t, (lr, lam) in enumerate(zip(rates, lams, strict=True)):
        ahead = w - lr * (y + momentum * m + decay * w) if t else w
        p, y = H @ (w + rho * unit(y)), H @ ahead
        d = (1 - lam) * p + lam * y
        m = momentum * m + d + decay * w
        w = w - 0.1 * d
        points.append(w)
    return points


@pytest.mark.parametrize("options", [{}, {"momentum": 0.8, "weight_decay": 0.1}])
def test_schedules_of_the_learning_rate_and_of_lambda_are_followed(options):
    rates, lams = [0.1, 0.3, 0.2, 0.1], [0.2, 0.2, 0.9, 0.0]
    sam = sam_optax.sampa(
        0.5,
        lambda t: jnp.asarray(rates)[t],
        lambda t: jnp.asarray(lams)[t],
        **options,
    )
    named = {"momentum": options.get("momentum", 0.0)}
    named["decay"] = options.get("weight_decay", 0.0)
    expected = sampa_by_hand(0.5, rates, lams, **named)
    np.testing.assert_allclose(descend(sam), expected, rtol=1e-12)


def loss_fn(w, x):
    v = jnp.concatenate([w["x"], w["y"]])
    return jnp.mean(jnp.square(x @ v) + jnp.cos(x @ v))


X = np.random.default_rng(0).normal(size=(8, 3))


def make_step(sam, **options):
    tx = optax.chain(sam, optax.sgd(0.1))
    loss_and_grads = sam_optax.sam_value_and_grad(loss_fn, sam, **options)

    def step(w, state, x, **passed):
        loss, d = loss_and_grads(w, x, opt_state=state, **passed)
        updates, state = tx.update(d, state, w)
        return optax.apply_updates(w, updates), state, loss

    return step, tx


def train(step, state, batches=(X, X[::-1], X + 1)):
    w = split(W)
    for x in batches:
        w, state, loss = step(w, state, x)
    return w, state, loss


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("data", [1, 2])
def test_halves_of_the_devices_take_one_gradient_each(data, check_vma):
    """The same as one after the other, also where each half divides the batch."""
    make = functools.partial(sam_optax.sampa, 0.5, 0.1, 0.3, momentum=0.9)
    step, tx = make_step(make())
    expected = train(jax.jit(step), tx.init(split(W)))
    halves, tx = make_step(make(halves="half"), axis_name="data")
    mesh = table.make_mesh(half=2, data=data)
    halves = jax.shard_map(
        halves,
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    assert_trees_close(
        train(jax.jit(halves), tx.init(split(W))), expected, rtol=1e-12, atol=1e-13
    )


def test_each_half_has_the_work_of_one_gradient():
    """On the compiler's count for one device; the loss at w is not asked for."""

    def wide(w, x):
        return jnp.mean(jnp.tanh(jnp.tanh(x @ w) @ w) ** 2)

    w, x = jnp.eye(32) / 8, jnp.ones((2048, 32))
    mesh = table.make_mesh(half=2)

    def count(sam, wrap):
        gradients = sam_optax.sam_value_and_grad(wide, sam)
        state = sam.init(w)

        def run(w, state, x):
            d = gradients(w, x, opt_state=state)[1].gradients
            return jax.tree.map(jnp.asarray, d)

        compiled = jax.jit(wrap(run)).lower(w, state, x).compile()
        return compiled.cost_analysis()["flops"]

    def mapped(run):
        return jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P())

    plain = count(sam_optax.msam(), lambda run: run)
    assert count(sam_optax.sampa(halves="half"), mapped) < 1.05 * plain
    assert count(sam_optax.sampa(), lambda run: run) > 1.9 * plain


def test_halves_are_an_axis_of_length_two_and_see_the_same_examples():
    step, tx = make_step(sam_optax.sampa(halves="half"))
    state = tx.init(split(W))
    with pytest.raises(ValueError, match="'half' is not an axis"):
        jax.eval_shape(step, split(W), state, X)

    def mapped(size, **passed):
        return jax.shard_map(
            functools.partial(step, **passed),
            mesh=table.make_mesh(half=size),
            in_specs=P(),
            out_specs=P(),
        )

    with pytest.raises(ValueError, match="must have the length 2; it has 4"):
        jax.eval_shape(mapped(4), split(W), state, X)
    averaging, _ = make_step(sam_optax.sampa(halves="half"), axis_name="half")
    both = jax.shard_map(
        averaging, mesh=table.make_mesh(half=2), in_specs=P(), out_specs=P()
    )
    with pytest.raises(ValueError, match="averages the gradients over 'half'"):
        jax.eval_shape(both, split(W), state, X)
    with pytest.raises(ValueError, match="on the same examples"):
        jax.eval_shape(mapped(2, ascent_batch=X[:4]), split(W), state, X)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lam": 1.5}, "lam must be >= 0 and <= 1"),
        ({"learning_rate": -1.0}, "learning_rate must be >= 0"),
        ({"momentum": 1.0}, "momentum must be >= 0"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0"),
        ({"rho": -1.0}, "rho must be >= 0"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sam_optax.sampa(**arguments)


def test_momentum_is_not_traced():
    """It decides what is carried."""
    with pytest.raises(TypeError, match=r"static_args=\('momentum',\)"):
        sam_optax.sampa(momentum=jnp.array(0.9))


def test_a_part_used_alone_says_what_it_needs():
    part = sam_optax.descents.mix_with_lookahead()
    w = split(W)
    with pytest.raises(ValueError, match="needs the parameters"):
        part.update(w, part.init(w))
    with pytest.raises(ValueError, match="needs grad_fn="):
        part.update(w, part.init(w), w)


def test_a_step_that_does_not_ascend_is_plain_and_keeps_looking_ahead():
    sam = sam_optax.sampa(0.5, 0.1, 0.3)
    grad_fn = jax.grad(quadratic)
    w = split(W)
    d, state = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn, ascend=False)
    assert_trees_close(d, split(H @ W))
    _, state = sam.update(grad_fn(w), state, w, grad_fn=grad_fn, ascend=False)
    y = state.descent_state.lookahead_gradient
    assert_trees_close(y, split(H @ (W - 0.1 * H @ W)), rtol=1e-12)


def test_groups_cost_no_third_gradient():
    """The state is the mean of the groups' own; y is not taken on all examples."""

    def mlp_loss(w, x):
        return jnp.mean(jnp.square(jnp.tanh(x @ w) @ w.T))

    w, x = 0.1 * jnp.ones((64, 64)), jnp.ones((256, 64))

    def flops(sam):
        options = {"m": 128, "map_groups": "scan"}  # else XLA may see that they are one
        helper = sam_optax.sam_value_and_grad(mlp_loss, sam, **options)

        def step(w, state, x):
            _, grads = helper(w, x, opt_state=state)
            return sam.update(grads, state, w)

        compiled = jax.jit(step).lower(w, sam.init(w), x).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(sam_optax.sampa()) < 1.3 * flops(sam_optax.sam())
