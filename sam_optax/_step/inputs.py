"""What comes into a step: its examples as functions of a point, and its checks."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax import _tree
from sam_optax._checks import check_transformation, warn
from sam_optax._masks import masks_leaves
from sam_optax._parts import Cadence, Descent, as_ascent
from sam_optax._step.sameness import may_be_same


class Pass(NamedTuple):
    """What one pass over a batch yields at one point.

    Attributes:
      loss: the mean of what loss_fn returned; None if the caller of an update took the
        gradient alone.
      gradient: of the mean loss; None from a forward pass.
      aux: the auxiliary output of loss_fn, or None.
      batch: the examples that were seen.
      returned: what loss_fn returned, before the mean.
      unperturbed_loss: the loss of the same examples at the parameters; None but of
        the passes that the update of a SAM transformation asks for.
    """

    loss: Any  # shape=()
    gradient: Any = None
    aux: Any = None
    batch: Any = None
    returned: Any = None
    unperturbed_loss: Any = None  # shape=()

    @property
    def losses(self) -> jax.Array:
        """The loss of each example; an error if loss_fn does not return one each."""
        wanted = (self.batch.size,)
        if jnp.shape(self.returned) != wanted:
            raise ValueError(
                "To select examples by their loss, loss_fn must return one loss per "
                f"example, of shape {wanted}, not their mean; the mean is taken "
                f"afterwards. It returned shape {jnp.shape(self.returned)}."
            )
        return self.returned


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """Which examples the two gradients of a step see.

    Attributes:
      seen: the pass at the parameters whose loss and auxiliary output are returned. It
        may have a gradient if `ascent` is the method `gradient` of the same batch: then
        that is g, from which ε is made. Otherwise g is taken from `ascent(params)`.
      ascent: point -> the pass over the examples that ε is made from.
      descent: point -> the pass over the examples that the step descends on.
      recompute: True if g is not the gradient, at w, of the examples that the step
        descends on. A descent that compares gᵃ with that gradient, and a step without
        ascent, then take it from `descent(params)`. Default False.
      comparable: False if g is not that gradient, and it cannot be taken, because the
        examples are only known at w + ε. A method that compares gᵃ with g is then
        refused. Default True.
      only_ascent: True if the choice concerns the ascent alone. It would have no effect
        with an ascent that uses no gradient, and is refused there. Default False.
      averaged_over: the axes of devices over which the passes are averaged.
      value_slot: called once a step with (loss, aux) of the pass at w + ε, or at w if
        the step does not ascend. Default None: nobody asks.
    """

    seen: Any  # a Pass; None if the caller of an update took g itself
    ascent: Callable[[Any], Pass]
    descent: Callable[[Any], Pass]
    recompute: bool = False
    comparable: bool = True
    only_ascent: bool = False
    averaged_over: tuple[str, ...] = ()
    value_slot: Callable[[Any], Any] | None = None

    def __call__(self, point: Any) -> Any:
        """The gradient at a point, so that this serves as any grad_fn does."""
        return self.descent(point).gradient

    @property
    def sees_one_loss(self) -> bool:
        """Whether both gradients are of one loss of the same examples, at any point."""
        return self.ascent == self.descent

    def map(self, change: Callable[[Callable], Callable]) -> "Choice":
        """The same with both functions changed."""
        ascent = change(self.ascent)
        descent = ascent if self.sees_one_loss else change(self.descent)
        return self.replace(ascent=ascent, descent=descent)

    def replace(self, **fields: Any) -> "Choice":
        """The same with other fields."""
        return dataclasses.replace(self, **fields)

    @property
    def loss(self) -> Any:
        """The loss at the parameters, or None if the caller of an update took it."""
        return None if self.seen is None else self.seen.loss


def as_choice(grad_fn: Callable[[Any], Any], like: optax.Updates) -> Choice:
    """A grad_fn as a `Choice`; one that is not ours has its gradients checked."""
    if isinstance(grad_fn, Choice):
        return grad_fn

    def evaluate(point):
        result = grad_fn(point)
        # By hand, a Pass can give the loss as well, to a method that needs it.
        result = result if isinstance(result, Pass) else Pass(None, result)
        mismatch = _tree.mismatch(result.gradient, like)
        if mismatch:
            raise ValueError(
                "grad_fn must return the gradient alone, with the structure and shapes "
                f"of the parameters. In what it returned, {mismatch}. From a function "
                "with has_aux=True or from jax.value_and_grad, take the gradient out: "
                "grad_fn=lambda params: grad_with_aux(params)[0]."
            )
        return result

    return Choice(None, evaluate, evaluate)


NO_EFFECT = (
    "The ascent makes no use of a gradient, so ascent_batch=, ascent_loss_fn= and "
    "data.sub_batch, which say what that gradient is of, would have no effect. Leave "
    "them out, or take an ascent along the gradient, such as sam_optax.ascents.sam()."
)


def check_comparable(passes: Choice, descent: Descent, cadence: Cadence) -> None:
    """Refuses to compare gradients of different examples."""
    if passes.comparable or (not descent.compares and cadence.forgets):
        return
    is_plain = descent.compares and descent.uses_loss is None
    remedy = (
        " If your own descent makes no use of ascent_gradient=, say so by "
        "descents.ignoring_gradient(...)."
    )
    raise ValueError(
        "The data rule, such as data.largest_increase, takes gᵃ on the examples that "
        "it selects at w + ε, and g on all of them. This method compares gᵃ with g, "
        "and would compare the examples. Take a method that descends on gᵃ alone, such "
        "as sam or esam." + (remedy if is_plain else "")
    )


def noting(passes: Choice) -> tuple[Choice, list[Any]]:
    """The same choice, and a list of the points at which its ascent was evaluated."""
    points: list[Any] = []

    def ascent(point: Any) -> Pass:
        points.append(point)
        return passes.ascent(point)

    return passes.replace(ascent=ascent), points


def note_auxiliary(value: Any, others: list[Any]) -> None:
    """Notes the (loss, aux) of a branch; raises if that of the other differs."""
    aux = value[1] if value else ()
    for other in others:
        mismatch = _tree.mismatch(aux, other)
        if mismatch:
            raise ValueError(
                'With value_at="perturbed", the auxiliary output of loss_fn comes from '
                "w + ε on a step that ascends, and from w on one that does not. The "
                "program decides which, so both must have the same shapes, and in that "
                f"of a step that does not ascend, {mismatch}. A rule that selects "
                "examples changes their number: return an output that does not depend "
                "on it, such as a mean, or pass ascend=True or False."
            )
    others.append(aux)


def check_axes(ascent: Any, descent: Any, cadence: Any) -> None:
    given = {"ascent": ascent} | ({} if descent is None else {"descent": descent})
    for name, part in given.items():
        check_transformation(name, part)
        if _is_method(part):
            raise TypeError(
                f"{name} is a whole SAM transformation, such as sam_optax.sam(), and "
                f"must be one of its parts, such as sam_optax.{name}s."
                f"{'sam' if name == 'ascent' else 'gsam'}()."
            )
    if cadence is not None and not isinstance(cadence, Cadence):
        raise TypeError(
            f"cadence must be a sam_optax.cadences.Cadence, got {cadence!r}."
        )

    is_without_gradient = not as_ascent(ascent).uses_gradient
    if isinstance(descent, Descent) and descent.compares and is_without_gradient:
        raise ValueError(
            "The descent compares gᵃ with g, the gradient at the parameters, and the "
            "ascent makes no use of g, so that the step need not take it. To have "
            "both, at two gradients a step, take an ascent along g, such as "
            "sam_optax.ascents.sam()."
        )


def _is_method(part: Any) -> bool:
    return getattr(part.update, "__qualname__", "").startswith("sharpness_aware.")


def warn_if_descends(ascent: optax.GradientTransformation) -> None:
    """Warns of an ascent along which the loss falls, such as a base optimizer.

    It is tried on a few small gradients and their negatives: ε must not point against
    both. Noise does not, nor does what is zero. Our own need not be tried, and one that
    needs more than it is given here, such as parameters of a certain structure, cannot.
    """
    if not as_ascent(ascent).may_descend:
        return
    update = optax.with_extra_args_support(ascent).update

    def overlaps(gradients: jax.Array) -> list[jax.Array]:
        w = jnp.ones_like(gradients[0])
        state, found = ascent.init(w), []
        for g in gradients:
            perturbation, state = update(
                g, state, w, grad_fn=lambda point, g=g: g, ascent_gradient=g
            )
            found.append(_tree.dot(perturbation, g))
        return found

    gradients = np.eye(3, dtype=np.float32)
    try:
        with jax.ensure_compile_time_eval():
            signs = [jax.jit(overlaps)(sign * gradients) for sign in (1, -1)]
            falls = any(a < 0 and b < 0 for a, b in zip(*signs, strict=True))
    except Exception:
        return
    if falls:
        warn(
            "The ascent points against the gradient, so the loss falls along ε. An "
            "optimizer does so: its updates are made to be added to the parameters in "
            "a descent. To ascend, use parts that keep the sign of the gradient, such "
            "as optax.chain(sam_optax.ascents.normalize_by_global_norm(), "
            "sam_optax.ascents.scale_by_rho(0.1)), or end yours by optax.scale(-1)."
        )


def check_is_whole(params: Any) -> None:
    if masks_leaves(params):
        raise ValueError(
            "A SAM transformation inside optax.masked or optax.partition sees only "
            "part of the parameters, and the loss needs all of them. Put it outside, "
            "first in the chain, and choose what it perturbs with its mask= argument."
        )


def check_params(params: Any) -> None:
    """Refuses what has no gradient, or not the gradient of all that it holds."""
    check_is_whole(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        place = f"params{jax.tree_util.keystr(path)}"
        if not isinstance(leaf, (np.ndarray, np.generic, jax.Array, float, int)):
            raise TypeError(
                f"{place} is a {type(leaf).__name__}, and parameters are arrays. Keep "
                "everything else out of params: params, static = "
                "eqx.partition(model, eqx.is_inexact_array) for an Equinox model, and "
                "put them together again in loss_fn."
            )
        dtype = jnp.result_type(leaf)
        if not _tree.is_inexact(leaf):
            raise TypeError(
                f"{place} is {dtype}: only floating-point parameters have gradients. "
                "Keep others out of params, as eqx.partition or nnx.split do."
            )
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"{place} is {dtype}: the gradient that JAX takes is the conjugate of "
                "the direction in which the loss rises. Keep the real and the "
                "imaginary part as parameters of their own."
            )


# What the step passes to ascent and descent; see the namespaces of both.
_OWN_ARGS = (
    "ascent_gradient",
    "ascent_grad_fn",
    "group",
    "perturb",
    "perturbation",
    "perturbed_loss",
    "value_and_grad_fn",
    "descent_grad_fn",
)


def check_call(
    updates: Any, params: Any, grad_fn: Any, report: Any, extra_args: Mapping[str, Any]
) -> None:
    """What an update needs, with the remedy for the door that it came through."""
    if params is None:
        raise ValueError(
            "A SAM transformation needs the parameters: update(g, state, params)."
        )
    if grad_fn is None:
        raise ValueError(
            "A SAM transformation needs the gradient at the perturbed parameters. "
            "Either compute the gradients with sam_optax.sam_value_and_grad, and pass "
            "these on; or pass grad_fn= (parameters -> gradient, on the same batch) to "
            "tx.update, or all that sam_optax.value_and_ascent_grad returns for it "
            "(for Flax NNX, sam_optax.nnx.value_and_ascent_grad). Flax Linen's "
            "TrainState.apply_gradients forwards no extra arguments, so there it must "
            "be sam_value_and_grad. If these gradients did come from it, something has "
            "rebuilt them on their way, such as optax.flatten or a new dict: put it "
            "after SAM, or return its result by grads.replace(...)."
        )
    if report is not None and not callable(report):
        raise TypeError(
            f"report must be a function that is called with a Report, got {report!r}."
        )
    for name in _OWN_ARGS:
        if name in extra_args:
            raise ValueError(
                f"The extra argument {name!r} is one that a SAM transformation passes "
                "to its parts itself. Give yours another name. If you pass none, a "
                "whole SAM transformation, such as sam_optax.sam(), stands where one "
                "of its parts should, such as sam_optax.ascents.sam()."
            )
    check_params(params)
    mismatch = _tree.mismatch(updates, params)
    if mismatch:
        raise ValueError(
            "The gradient must have the structure and shapes of the parameters. In "
            f"this gradient, {mismatch}."
        )
    taken = grad_fn.seen if isinstance(grad_fn, Choice) else None
    mismatch = taken and _tree.mismatch(taken.gradient, updates)
    if mismatch:
        raise ValueError(
            "The gradients that came with grad_fn= are of other parameters than those "
            f"of this update: in what came, {mismatch}. In Flax NNX, pass the same "
            "wrt= to the helper and to the optimizer; two optimizers need a helper "
            "each."
        )
    if taken is not None and not may_be_same(taken.gradient, updates):
        warn(
            "The gradients are not those that came with grad_fn=: something has "
            "changed them. If it is a transformation before SAM in the chain, put it "
            "after SAM, where it acts on the gradient to descend on; before SAM, it "
            "only acts on the one that the perturbation is made of. If gradients are "
            "scaled, scale them after SAM, by optax.scale. If they are averaged over "
            "devices, pass axis_name= to the helper instead."
        )
