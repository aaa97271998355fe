"""Radii by layer: a norm and a scale for each leaf, and an ascent for each label."""

import functools
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import check_number, require_params
from sam_optax._hyperparameters import ScalarOrSchedule, scheduled
from sam_optax._masks import Mask, check_mask, masks_leaves, resolve_mask, restrict
from sam_optax._parts import Ascent, as_ascent, follow

Labels = Any  # a tree of labels, or a function of the parameters that returns one


def normalize_by_leaf_norm() -> Ascent:
    r"""Maps each leaf of g to its own direction: u_l = g_l/‖g_l‖.

    ‖u_l‖ is 1 however small or large g_l is, short of subnormal numbers. If a leaf is
    zero, it stays zero.

    Returns:
      A stateless transformation. It returns half-precision leaves as float32. If an
      entry of a leaf is not finite, the whole of that leaf is NaN.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import ascents
      >>> tx = ascents.normalize_by_leaf_norm()
      >>> g = {"kernel": jnp.array([300.0, 400.0]), "bias": jnp.array([0.0, 0.0])}
      >>> u, _ = tx.update(g, tx.init(g))
      >>> print(u["kernel"], u["bias"])
      [0.6 0.8] [0. 0.]
    """

    def climb(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves, structure = jax.tree.flatten(updates)
        norms = [_tree.scaled_norm(leaf) for leaf in leaves]
        units = [_tree.to_unit(*pair) for pair in zip(leaves, norms, strict=True)]
        finite = [norm.is_finite for norm in norms]
        all_finite = functools.reduce(jnp.logical_and, finite, jnp.asarray(True))
        return structure.unflatten(units), state, all_finite

    return Ascent.from_climb(optax.init_empty_state, climb)


def scale_by_leaf_norm(
    eta: ScalarOrSchedule = 0.0, *, adaptive_mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies each leaf by the norm of its weights: u_l ↦ ‖w_l‖ (1 + η) u_l.

    After `normalize_by_leaf_norm` and with `scale_by_rho`, ρ is then relative to each
    layer: ‖ε_l‖ = ρ ‖w_l‖. A leaf whose weights are all zero, such as a new bias, is
    not perturbed.

    Args:
      eta, adaptive_mask: those of the method `layerwise_sam`. Default 0 and None.

    Returns:
      A transformation that needs the parameters. It returns half-precision leaves as
      float32.

    Raises:
      ValueError: if eta is negative, or, from `update`, if params is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import ascents
      >>> tx, w = ascents.scale_by_leaf_norm(), jnp.array([3.0, 4.0])
      >>> tx.update(jnp.array([1.0, 0.0]), tx.init(w), w)[0].tolist()
      [5.0, 0.0]
    """
    check_number("eta", eta, at_least=0)
    check_mask("adaptive_mask", adaptive_mask)

    def part(eta):
        def rescale(updates, params):
            require_params(params, "scale_by_leaf_norm")

            def by_norm(u, w):
                return _tree.scale(_tree.norm(w) * (1 + eta), u)

            return _scale_leaves(by_norm, updates, params, adaptive_mask)

        return optax.stateless(rescale)

    return Ascent.of(scheduled(part, eta=eta), shows_nonfinite=True)


def _scale_leaves(
    rescale: Callable[[Any, Any], Any], updates: Any, params: Any, mask: Mask
) -> Any:
    """rescale(u_l, w_l) of each leaf where the mask is True; u_l elsewhere."""
    updates = _tree.at_least_float32(updates)
    if mask is None:
        return jax.tree.map(rescale, updates, params)
    return jax.tree.map(
        lambda keep, u, w: rescale(u, w) if keep else u,
        resolve_mask(mask, params),
        updates,
        params,
    )


def fans_of_kernel(shape: tuple[int, ...]) -> tuple[int, int]:
    """(fan_in, fan_out) of a kernel as Flax lays it out: the last axis are the outputs.

    A vector is a matrix with one input.
    """
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def scale_by_fans(
    fans: Callable[[tuple[int, ...]], tuple[int, int]] = fans_of_kernel,
) -> optax.GradientTransformation:
    r"""Multiplies each leaf by √(fan_out/fan_in), the spectral scale of its shape.

    A matrix whose spectral norm is of this size changes an activation as much as the
    activation is large, whatever the width of the network. After
    `normalize_by_leaf_norm` and with `scale_by_rho`, ‖ε_l‖ = ρ √(fan_out/fan_in), so
    one ρ serves networks of several widths.

    Args:
      fans: a function from the shape of a leaf to (fan_in, fan_out). The default takes
        the last axis for the outputs and the product of all others for the inputs, as
        in Flax, and takes a vector for a matrix with one input. If you keep matrices as
        (outputs, inputs), pass your own.

    Returns:
      A stateless transformation. It returns half-precision leaves as float32.

    Raises:
      ValueError: from `update`, if fans returns a number that is not positive and
        finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import ascents
      >>> tx, u = ascents.scale_by_fans(), jnp.ones((8, 2))
      >>> print(tx.update(u, tx.init(u))[0][0])
      [0.5 0.5]

    References:
      Yang et al., `A Spectral Condition for Feature Learning
      <https://arxiv.org/abs/2310.17813>`_, 2023, and Haas et al., `Effective
      Sharpness Aware Minimization Requires Layerwise Perturbation Scaling
      <https://arxiv.org/abs/2411.00075>`_, 2024, which applies it to SAM.
    """

    def rescale(updates, params):
        del params

        def by_fans(u):
            fan_in, fan_out = fans(jnp.shape(u))
            if not (0 < fan_in < math.inf and 0 < fan_out < math.inf):
                raise ValueError(
                    "fans must return two positive numbers, (fan_in, fan_out); for the "
                    f"shape {jnp.shape(u)} it returned {(fan_in, fan_out)}."
                )
            return _tree.scale(math.sqrt(fan_out / fan_in), u)

        return jax.tree.map(by_fans, _tree.at_least_float32(updates))

    return optax.stateless(rescale)


class ByLabelState(NamedTuple):
    """State of `by_label`."""

    label_states: dict[Any, optax.OptState]


def by_label(
    ascents: Mapping[Hashable, optax.GradientTransformation], labels: Labels
) -> optax.GradientTransformationExtraArgs:
    """An ascent of its own for each group of leaves, such as one ρ per kind of layer.

    Each ascent sees the leaves with its label, and no others: its norms run over these
    leaves, and its state is kept for them. So the ε of two labels do not depend on each
    other. For different radii under one global norm, divide by that norm first::

        optax.chain(
            ascents.normalize_by_global_norm(),
            ascents.by_label({"head": ascents.scale_by_rho(0.1), ...}, labels),
        )

    Args:
      ascents: an ascent, or a part of one, for each label.
      labels: a tree of labels (or a prefix of one), or a function of the parameters
        that returns one.

    Returns:
      A transformation. An ascent that takes further gradients, such as
      `ascend_repeatedly`, takes them where only its own leaves are moved; to move all
      leaves together, put `by_label` inside of it. Ascents that draw random numbers
      draw the same ones for two labels, unless they have different keys.

    Raises:
      ValueError: if a label has no ascent; from `init` or `update`. From `init`, if no
        parameter has the label of an ascent.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import ascents
      >>> tx = ascents.by_label(
      ...     {"body": ascents.sam(rho=0.1), "head": ascents.sam(rho=1.0)},
      ...     {"layer": "body", "output": "head"})
      >>> g = {"layer": jnp.array([3.0, 4.0]), "output": jnp.array([-2.0])}
      >>> e, _ = tx.update(g, tx.init(g), g)
      >>> print(e["layer"].round(6), e["output"])
      [0.06 0.08] [-1.]
    """
    ascents = dict(ascents)
    is_function = callable(labels) and all(map(callable, jax.tree.leaves(labels)))

    def resolve(params):
        tree = labels(params) if is_function else labels
        for path, label in jax.tree_util.tree_leaves_with_path(tree):
            if label not in ascents:
                raise ValueError(
                    f"The label {label!r} at params{jax.tree_util.keystr(path)} has no "
                    f"ascent; there are ascents for {list(ascents)}."
                )
        return jax.tree.map(
            lambda label, subtree: jax.tree.map(lambda _: label, subtree), tree, params
        )

    def is_labelled(label: Hashable) -> Callable[[Any], Any]:
        return lambda params: jax.tree.map(lambda own: own == label, resolve(params))

    restricted = {
        label: restrict(ascent, is_labelled(label)) for label, ascent in ascents.items()
    }

    def init_fn(params):
        is_masked = masks_leaves(params)  # then a label may be that of masked leaves
        used = set(jax.tree.leaves(resolve(params)))
        for label in ascents:
            if not (is_masked or label in used):
                raise ValueError(
                    f"No parameter has the label {label!r}, which has an ascent. The "
                    f"labels that occur are {sorted(used, key=str)}."
                )
        return ByLabelState({k: part.init(params) for k, part in restricted.items()})

    def update_fn(updates, state, params=None, **extra_args):
        require_params(params, "by_label")
        perturbations, states = {}, {}
        for label, part in restricted.items():
            perturbations[label], states[label], _ = part.climb(
                updates, state.label_states[label], params, **extra_args
            )
        order = list(ascents)
        perturbation = jax.tree.map(
            lambda label, *candidates: candidates[order.index(label)],
            resolve(params),
            *perturbations.values(),
        )
        return perturbation, ByLabelState(states)

    def follow_fn(d, state, params):
        return ByLabelState(
            {
                label: follow(part, d, state.label_states[label], params)
                for label, part in restricted.items()
            }
        )

    each = [as_ascent(ascent) for ascent in ascents.values()]
    return Ascent.of(
        optax.GradientTransformationExtraArgs(init_fn, update_fn),
        follow=follow_fn if any(ascent.follow for ascent in each) else None,
        uses_gradient=any(ascent.uses_gradient for ascent in each),
        reads_gradient=any(ascent.reads_gradient for ascent in each),
        # A label that drops g hides its leaves of it.
        shows_nonfinite=all(ascent.shows_nonfinite for ascent in each)
        and len({ascent.uses_gradient for ascent in each}) == 1,
        may_descend=any(ascent.may_descend for ascent in each),
    )
