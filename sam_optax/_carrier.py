"""What `sam_value_and_grad` returns as gradients, and the transformation unpacks."""

import weakref
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jax.extend import core as jax_core


class Report(NamedTuple):
    """Measurements of one step, all scalars.

    Where the step did not ascend, all but `ascent_norm` and `ascended` are NaN.

    Attributes:
      perturbed_loss: L(w + ε).
      surrogate_gap: L(w + ε) − L(w).
      ascent_norm: ‖g‖.
      descent_norm: ‖gᵃ‖.
      cosine: of the angle between g and gᵃ.
      perturbation_norm: ‖ε‖; under groups, the mean over them.
      ascended: whether the second gradient was taken.
    """

    perturbed_loss: jax.Array  # shape=()
    surrogate_gap: jax.Array  # shape=()
    ascent_norm: jax.Array  # shape=(), at least float32
    descent_norm: jax.Array  # shape=(), at least float32
    cosine: jax.Array  # shape=(), at least float32
    perturbation_norm: jax.Array  # shape=(), at least float32
    ascended: jax.Array  # shape=(), dtype=jnp.bool_


class _Cargo:
    """State and report of one step. Equal to itself only, and never a pytree leaf."""

    def __init__(self, state: Any, report: Report | None, was_traced: bool):
        self.state = state
        self.report = report
        self.was_traced = was_traced
        self.trace = _current_traces()[0]


@jax.tree_util.register_pytree_node_class
class SharpnessAwareGradients:
    """The sharpness-aware gradient d, with the next SAM state as a stowaway.

    To everything that handles gradients this is the tree d: norms, `jax.tree.map`,
    `lax.pmean` and unscaling of the loss act on d alone. The SAM transformation in the
    optimizer chain takes d and its own next state out of it. Both must happen in the
    same jitted function.

    Attributes:
      gradients: d, with the structure of the parameters.
      report: a `Report` if `sam_value_and_grad` was built with `report=True`, or None.
    """

    def __init__(self, gradients: Any, state: Any, report: Report | None = None):
        self.gradients = gradients
        self._cargo = _Cargo(state, report, _is_traced(gradients))

    @property
    def report(self) -> Report | None:
        return self._cargo.report

    def __contains__(self, key: Any) -> bool:
        # Flax asks whether a collection of its own is among the gradients.
        del key
        return False

    def __repr__(self) -> str:
        return f"SharpnessAwareGradients({self.gradients!r})"

    def unpack(self) -> tuple[Any, Any]:
        """(d, next SAM state), if still inside the trace that computed them."""
        cargo = self._cargo
        became_argument = _is_traced(self.gradients) and not cargo.was_traced
        if became_argument or not any(
            trace() is cargo.trace() for trace in _current_traces()
        ):
            raise ValueError(
                "These gradients come from another trace. sam_value_and_grad returns "
                "the next SAM state along with them, so the optimizer's update belongs "
                "in the same jitted function: do not return them from one jitted "
                "function and pass them to another."
            )
        return self.gradients, cargo.state

    def tree_flatten(self):
        return (self.gradients,), self._cargo

    @classmethod
    def tree_unflatten(cls, cargo: _Cargo, children):
        gradients = object.__new__(cls)
        (gradients.gradients,) = children
        gradients._cargo = cargo
        return gradients


def _is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def _current_traces() -> list[weakref.ref]:
    """The current trace and those it is nested in, innermost first."""
    with jax_core.take_current_trace() as trace:
        traces = []
        while trace is not None:
            traces.append(weakref.ref(trace))
            trace = getattr(trace, "parent_trace", None)
        return traces
