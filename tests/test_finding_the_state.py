"""The helper is given a SAM transformation, and finds its state in the optimizer's."""

import jax.numpy as jnp
import optax
import optax.contrib
import pytest

import problem
import sam_optax
from lab import assert_trees_equal
from sam_optax import sam_value_and_grad


def state_and_params(tx):
    params = problem.params()
    return tx.init(params), params


def test_opt_state_is_required():
    sam = sam_optax.sam()
    with pytest.raises(ValueError, match=r"pass opt_state=, the state of the whole"):
        sam_value_and_grad(problem.loss, sam)(problem.params(), problem.batch())


def test_an_optimizer_state_without_a_sam_state():
    state, params = state_and_params(optax.adam(0.1))
    helper = sam_value_and_grad(problem.loss, sam_optax.sam())
    with pytest.raises(ValueError, match=r"no SAM state .*optax.chain\(sam, base\)"):
        helper(params, problem.batch(), opt_state=state)


def test_an_optimizer_state_with_two_sam_states_lists_them():
    sam = sam_optax.sam()
    state, params = state_and_params(optax.chain(sam, sam, optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"2 SAM states \(opt_state\[0\], .*\[1\]\)"):
        sam_value_and_grad(problem.loss, sam)(params, problem.batch(), opt_state=state)


def test_the_whole_chain_passed_as_the_sam_transformation():
    """Unchecked, the learning rate would be applied twice, uphill."""
    tx = optax.chain(sam_optax.sam(), optax.sgd(0.1))
    state, params = state_and_params(tx)
    helper = sam_value_and_grad(problem.loss, tx)
    with pytest.raises(ValueError, match=r"not a chain or another wrapper"):
        helper(params, problem.batch(), opt_state=state)


@pytest.mark.parametrize(
    "tx", [optax.sgd(0.1), optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1))]
)
def test_a_transformation_that_is_no_sam_at_all(tx):
    state, params = state_and_params(optax.chain(sam_optax.sam(), optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"must be the SAM transformation itself"):
        sam_value_and_grad(problem.loss, tx)(params, problem.batch(), opt_state=state)


def test_something_that_is_no_transformation():
    with pytest.raises(
        TypeError, match=r"must be the SAM transformation.*got function"
    ):
        sam_value_and_grad(problem.loss, lambda g: g)


def test_another_sam_transformation_than_the_one_in_the_chain():
    state, params = state_and_params(optax.chain(sam_optax.sam(), optax.sgd(0.1)))
    helper = sam_value_and_grad(problem.loss, sam_optax.fsam())
    with pytest.raises(ValueError, match=r"opt_state\[0\] was not made by the transf"):
        helper(params, problem.batch(), opt_state=state)


def test_a_state_of_other_parameters():
    sam = sam_optax.fsam()
    state = optax.chain(sam, optax.sgd(0.1)).init({"other": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"or for other parameters"):
        sam_value_and_grad(problem.loss, sam)(
            problem.params(), problem.batch(), opt_state=state
        )


def test_the_helper_and_the_chain_disagree_about_injection():
    plain = sam_optax.sam()
    injected = optax.inject_hyperparams(sam_optax.sam)(rho=5.0)
    params = problem.params()
    for given, chained in ((plain, injected), (injected, plain)):
        state = optax.chain(chained, optax.sgd(0.1)).init(params)
        with pytest.raises(ValueError, match=r"one of the two is wrapped"):
            sam_value_and_grad(problem.loss, given)(
                params, problem.batch(), opt_state=state
            )


@pytest.mark.parametrize("name", ["fsam", "look_sam", "ssam", "esam"])
def test_optax_can_map_over_what_the_state_holds_of_the_parameters(name):
    """It initialises the state with a placeholder in place of the parameters."""
    tx = optax.chain(sam_optax.METHODS[name].make(), optax.adam(0.1))
    state = tx.init(problem.params())
    same = optax.tree_utils.tree_map_params(tx, lambda leaf: leaf, state)
    assert_trees_equal(same, state)


@pytest.mark.parametrize(
    ("wrap", "remedy"),
    [
        (
            lambda tx: optax.conditionally_transform(tx, lambda step: step > 2),
            r"optax.conditionally_transform, .*cadence says .*late_sam",
        ),
        (
            lambda tx: optax.conditionally_mask(tx, lambda step: step > 2),
            r"optax.conditionally_mask, .*cadence says .*late_sam",
        ),
        (
            lambda tx: optax.contrib.mechanize(tx),
            r"optax.contrib.mechanize, .*around the base optimizer alone",
        ),
    ],
)
def test_a_wrapper_that_computes_with_gradients_is_named_with_its_remedy(wrap, remedy):
    sam, w = sam_optax.sam(), jnp.ones(2)
    tx = wrap(optax.chain(sam, optax.sgd(0.1)))
    with pytest.raises(ValueError, match=remedy):
        sam_value_and_grad(jnp.sum, sam)(w, opt_state=tx.init(w))
    with pytest.raises(ValueError, match="not a chain or another wrapper"):
        sam_value_and_grad(jnp.sum, wrap(sam))(w, opt_state=tx.init(w))


def test_gradients_that_were_rebuilt_on_their_way_are_told():
    sam = sam_optax.sam()
    tx, w = optax.chain(sam, optax.sgd(0.1)), {"a": jnp.ones(2)}
    helper = sam_value_and_grad(lambda w: jnp.sum(w["a"]), sam)
    _, grads = helper(w, opt_state=tx.init(w))
    rebuilt = {"a": grads.gradients["a"]}
    with pytest.raises(ValueError, match=r"rebuilt them .*grads.replace\(...\)"):
        tx.update(rebuilt, tx.init(w), w)
    tx.update(grads.replace(rebuilt), tx.init(w), w)


def test_a_helper_says_what_it_is_before_what_the_loss_is():
    def loss_fn(w):
        """The squared norm."""
        return jnp.sum(w**2)

    helper = sam_value_and_grad(loss_fn, sam_optax.sam())
    assert helper.__name__ == "sam_value_and_grad_loss_fn"
    first, _, last = helper.__doc__.partition("\n\n")
    assert "sam_optax.sam_value_and_grad lists" in first
    assert last == "The squared norm."
