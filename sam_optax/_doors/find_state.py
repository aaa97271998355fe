"""Where the SAM state is in the state of a whole optimizer."""

from typing import Any

import jax
import optax
import optax.contrib

from sam_optax import _tree
from sam_optax._step import SharpnessAwareState


def find_sam_state(
    tx: optax.GradientTransformation, opt_state: Any, params: Any
) -> Any:
    """The node of opt_state that is the state of tx."""
    if opt_state is None:
        raise ValueError(
            "sam_value_and_grad needs the optimizer state: pass opt_state=, the state "
            "of the whole chain, for example opt_state=train_state.opt_state."
        )
    expected = jax.eval_shape(tx.init, params)
    is_injected = _is_injected(expected)
    if not is_injected and not isinstance(expected, SharpnessAwareState):
        raise ValueError(
            "The second argument of sam_value_and_grad must be the SAM transformation "
            "itself, or optax.inject_hyperparams of it, not a chain or another wrapper "
            "that contains it: the base optimizer would be applied twice. The state of "
            f"what was passed is a {type(expected).__name__}."
        )
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        opt_state, is_leaf=lambda x: _is_injected(x) or _is_sam_state(x)
    )
    found = [(path, x) for path, x in nodes if _is_injected(x) or _is_sam_state(x)]
    if not found and _has_dict_of_sam(opt_state):
        raise ValueError(
            "The optimizer state holds dicts in the place of a SAM state, as from a "
            "checkpoint that was restored without a target. Restore it with "
            "tx.init(params) as the target."
        )
    if len(found) != 1:
        listed = ", ".join(
            "opt_state" + jax.tree_util.keystr(path) for path, _ in found
        )
        raise ValueError(
            "sam_value_and_grad found "
            + (f"{len(found)} SAM states ({listed})" if found else "no SAM state")
            + f" in the optimizer state (a {type(opt_state).__name__}), and needs "
            "exactly one. Build the optimizer as optax.chain(sam, base), with the same "
            "sam that is passed to sam_value_and_grad, and pass the state of the whole "
            "chain."
        )
    ((path, state),) = found
    _check_place(opt_state)
    if _is_injected(state) != is_injected:
        raise ValueError(
            "Pass the same SAM transformation to sam_value_and_grad that starts the "
            "chain: one of the two is wrapped in optax.inject_hyperparams, the other "
            "is not."
        )
    mismatch = _tree.mismatch(sam_state_of(state), sam_state_of(expected))
    if mismatch:
        raise ValueError(
            f"The SAM state at opt_state{jax.tree_util.keystr(path)} was not made by "
            "the transformation passed to sam_value_and_grad, or for other parameters. "
            f"In the state that was found, {mismatch}."
        )
    return state


def _check_place(opt_state: Any) -> None:
    """Refuses places in an optimizer where SAM cannot unpack what it is given."""
    wrappers = tuple(_WRAPPERS)
    for node in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, wrappers)):
        if isinstance(node, wrappers) and _holds_sam(node):
            wrapper = _WRAPPERS[type(node)]
            is_conditional = wrapper.startswith("optax.conditionally")
            raise ValueError(
                f"The SAM transformation is inside of {wrapper}, which computes with "
                "the gradients before SAM sees them. "
                + (
                    "Its cadence says on which steps SAM ascends, such as that of "
                    "sam_optax.late_sam or cadences.after; or pass ascend=. "
                    if is_conditional
                    else "Put the wrapper around the base optimizer alone, "
                    f"optax.chain(sam, {wrapper}(base, ...)). "
                )
                + "Or call tx.update with the plain gradients and grad_fn=."
            )
    _check_first(opt_state)


_WRAPPERS = {
    optax.MultiStepsState: "optax.MultiSteps",
    optax.ApplyIfFiniteState: "optax.apply_if_finite",
    optax.ConditionallyTransformState: "optax.conditionally_transform",
    optax.ConditionallyMaskState: "optax.conditionally_mask",
    optax.contrib.MechanicState: "optax.contrib.mechanize",
}


def _check_first(state: Any) -> None:
    """Refuses an optimizer before SAM in its `optax.chain`, whose state is a tuple.

    What has no state, such as clipping, may be there: it acts on d, as after SAM. But a
    chain may not, even without a state, because plain SGD is one.
    """
    if not isinstance(state, tuple) or _is_sam_state(state):
        return
    for position, member in enumerate(state):
        is_sam = _is_sam_state(member) or _is_injected(member)
        before = state[:position] if type(state) is tuple else ()
        is_chain_before = any(type(other) is tuple and other for other in before)
        if is_sam and (is_chain_before or jax.tree.leaves(before)):
            raise ValueError(
                "The SAM transformation must come first in its chain, and another one "
                "comes before it. That one would act on the gradient that the "
                "perturbation is made of, not on the one to descend on. Build the "
                "optimizer as optax.chain(sam, ...); a chain of clippings belongs "
                "after SAM as well."
            )
        _check_first(member)


def _has_dict_of_sam(opt_state: Any) -> bool:
    """Whether a SAM state has become a dict, as in a checkpoint without a target."""

    def is_dict_of_sam(node):
        fields = SharpnessAwareState._fields
        return isinstance(node, dict) and set(fields) <= set(node)

    nodes = jax.tree.leaves(opt_state, is_leaf=is_dict_of_sam)
    return any(map(is_dict_of_sam, nodes))


def _holds_sam(node: Any) -> bool:
    leaves = jax.tree.leaves(node, is_leaf=_is_sam_state)
    return any(map(_is_sam_state, leaves))


def _is_sam_state(node: Any) -> bool:
    return isinstance(node, SharpnessAwareState)


def _is_injected(node: Any) -> bool:
    return hasattr(node, "hyperparams") and _is_sam_state(
        getattr(node, "inner_state", None)
    )


def sam_state_of(state: Any) -> SharpnessAwareState:
    """The state of the SAM transformation, out of that of inject_hyperparams or not."""
    return state if _is_sam_state(state) else state.inner_state
