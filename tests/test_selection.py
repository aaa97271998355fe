"""Which examples a data rule takes, by value: ties, counts and the ends of ranges."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from doors import DOORS
from sam_optax.data import k_sam, sub_batch
from sam_optax.methods._selection import check_count, check_fraction, count_of, largest


@pytest.mark.parametrize("count", [1, 3, 6])
def test_the_largest_are_taken_and_of_equals_the_first(count):
    values = jnp.array([1.0, 5.0, -2.0, 5.0, 5.0, 0.0])
    order = [1, 3, 4, 0, 5, 2]
    np.testing.assert_array_equal(largest(values, count), order[:count])


@pytest.mark.parametrize(
    ("fraction", "size", "count"),
    [
        (0.29, 100, 29),  # the product is 28.999999999999996
        (0.57, 100, 57),
        (0.5, 7, 3),
        (0.999999, 100, 99),
        (1.0, 7, 7),
        (0.1, 9, 0),
        (1 / 3, 3, 1),
    ],
)
def test_a_fraction_is_rounded_down_but_for_rounding(fraction, size, count):
    assert count_of(fraction, size) == count


def test_a_fraction_that_selects_nothing_says_so():
    check_count("fraction", 1, 9)
    with pytest.raises(ValueError, match=r"so small that it selects none of the 9"):
        check_count("fraction", 0, 9)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.0001, np.nan])
def test_a_fraction_that_cannot_be_says_so(fraction):
    with pytest.raises(ValueError, match="fraction must be"):
        check_fraction("fraction", fraction)


def test_a_fraction_may_be_a_number_up_to_one():
    for fraction in (1, 1.0, 1e-9, np.float64(0.5)):
        check_fraction("fraction", fraction)


# --- By value: losses (w − x)² of scalars, whose gradients are 2 (w − x).


def losses(w, x):
    return jnp.square(w - x)


def one_step(rule, x, door, w=1.0, rho=0.5, **options):
    """d of one step, and the loss that it returns."""
    sam, taken = sam_optax.sam(rho), []

    def update_fn(d, state, params=None):
        taken.append(d)
        return d, state

    watch = optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)
    tx = optax.chain(sam, watch)
    step = DOORS[door](sam, tx, losses, data=rule, **options)
    w = jnp.asarray(w)
    _, _, loss = step(w, tx.init(w), jnp.asarray(x))
    return float(taken[0]), float(loss)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("k", "d"),
    [
        (1, 2 * (1.5 + 4)),  # −4 is farthest from 1, and w moves away from it
        (2, 2 * (1.5 - 0.5)),  # −4 and 5: the mean is 0.5, and w moves up
        (4, 2 * (1.5 - 0.75)),
    ],
)
def test_k_sam_takes_both_gradients_on_the_examples_of_highest_loss(door, k, d):
    x = [0.0, 5.0, 2.0, -4.0]
    taken, loss = one_step(k_sam(k), x, door)
    assert taken == pytest.approx(d, rel=1e-6)
    assert loss == pytest.approx((1 + 16 + 1 + 25) / 4, rel=1e-6)  # of all examples


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("fraction", "part"),
    [
        (0.5, [0, 2, 4]),
        (1 / 3, [0, 3]),
        (0.17, [0]),
        (0.7, [0, 1, 3, 4]),
        (1.0, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_a_sub_batch_is_spread_over_the_batch(door, fraction, part):
    """ε follows the part, and the descent has the whole batch."""
    x = np.array([0.0, 9.0, -1.0, 8.0, -3.0, 1.5])
    taken, loss = one_step(sub_batch(fraction), x, door)
    up = np.sign(1.0 - x[part].mean())
    assert taken == pytest.approx(2 * (1 + 0.5 * up - x.mean()), rel=1e-5)
    assert loss == pytest.approx(np.mean((1 - x[part]) ** 2), rel=1e-5)


def test_a_sub_batch_beside_a_step_that_does_not_ascend():
    """d is the gradient of the whole batch at w, not of the part."""
    sam = sam_optax.sam(0.5)
    x, w = jnp.array([0.0, 9.0, -1.0, 8.0]), jnp.array(1.0)
    helper = sam_optax.sam_value_and_grad(losses, sam, data=sub_batch(0.5))
    _, grads = helper(w, x, opt_state=sam.init(w), ascend=False)
    assert float(grads.gradients) == pytest.approx(2 * (1 - 4.0), rel=1e-6)


def test_counts_that_do_not_fit_the_batch_say_so():
    with pytest.raises(ValueError, match="k must be at most the size of the batch, 3"):
        one_step(k_sam(4), [1.0, 2.0, 3.0], "door1")
    with pytest.raises(ValueError, match="fraction is so small"):
        one_step(sub_batch(0.3), [1.0, 2.0, 3.0], "door1")
    for k in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="k must be an integer >= 1"):
            k_sam(k)
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match="fraction must be"):
            sub_batch(fraction)


def test_k_sam_follows_the_loss_of_each_step():
    """Under jit, in which the choice is part of the program."""
    sam = sam_optax.sam(0.5)
    helper = sam_optax.sam_value_and_grad(losses, sam, data=k_sam(1))

    @jax.jit
    def d(x):
        w = jnp.array(1.0)
        return helper(w, x, opt_state=sam.init(w))[1].gradients

    for x, farthest in (([0.0, 3.0], 3.0), ([-2.0, 3.0], -2.0)):
        away = 1 + 0.5 * np.sign(1 - farthest)
        assert float(d(jnp.array(x))) == pytest.approx(2 * (away - farthest))
