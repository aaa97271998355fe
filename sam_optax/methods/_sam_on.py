"""SAM on normalisation layers, and SAM with a radius for each layer."""

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import optax

from sam_optax._hyperparameters import ScalarOrSchedule
from sam_optax._masks import Mask
from sam_optax._parts import Ascent, chain
from sam_optax._random import Key
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._by_layer import scale_by_leaf_norm
from sam_optax.methods._record import record
from sam_optax.methods._sam import (
    normalize_by_global_norm,
    sam_ascent,
    scale_by_rho,
)


def mask_by_name(*words: str) -> Callable[[Any], Any]:
    """A mask of the parameters that have one of some words in the names on their path.

    Args:
      words: parts of names, such as "norm". Upper and lower case are the same. A
        parameter is chosen if any name on its path contains any of the words, so "norm"
        chooses `LayerNorm_0/scale` and `norm1.weight`.

    Returns:
      A function of the parameters, for `mask=` or `adaptive_mask=` of any method.

    Raises:
      TypeError: if a word is not a string, or there is none.
      ValueError: from the mask, if no parameter has such a name.

    Examples:
      >>> import jax.numpy as jnp, sam_optax
      >>> params = {"Dense_0": {"kernel": jnp.ones((2, 2))},
      ...           "LayerNorm_0": {"scale": jnp.ones(2)}}
      >>> sam_optax.methods.mask_by_name("norm")(params)
      {'Dense_0': {'kernel': False}, 'LayerNorm_0': {'scale': True}}
    """
    if not words or not all(isinstance(word, str) and word for word in words):
        raise TypeError(f"A mask by name needs words, such as 'norm', got {words!r}.")

    def is_chosen(path: Sequence[Any], leaf: Any) -> bool:
        del leaf
        names = [jax.tree_util.keystr((key,), simple=True).lower() for key in path]
        return any(word.lower() in name for word in words for name in names)

    def mask(params: Any) -> Any:
        chosen = jax.tree_util.tree_map_with_path(is_chosen, params)
        if not any(jax.tree.leaves(chosen)):
            raise ValueError(
                f"No parameter has a name with {' or '.join(map(repr, words))} in it, "
                "so none would be perturbed. Pass mask= (a tree of bools, or "
                "sam_optax.methods.mask_by_name with other words)."
            )
        return chosen

    return mask


def normalization_layers(params: Any) -> Any:
    """The mask of SAM-ON: parameters with "norm" or "bn" in the names on their path.

    These are the words that the authors' code looks for.
    """
    return mask_by_name("norm", "bn")(params)


def layerwise_sam_ascent(
    rho: ScalarOrSchedule = 0.05,
    eta: ScalarOrSchedule = 0.0,
    *,
    p: float = 2,
    adaptive_mask: Mask = None,
) -> Ascent:
    """The ascent of the method `layerwise_sam`, ε = ρ T² g/‖T g‖; same arguments."""
    rescale = scale_by_leaf_norm(eta, adaptive_mask=adaptive_mask)
    return chain(rescale, normalize_by_global_norm(p), rescale, scale_by_rho(rho))


def _order(p: float | None) -> float:
    return 2 if p is None else p


@record(
    title="Layer-wise SAM",
    equation="ε = ρ T² g/‖T g‖, T = ‖w_l‖ (1 + η) for each tensor l",
    radius="‖T⁻¹ε‖",
    source="Müller 2023",
    url="https://arxiv.org/abs/2306.04226",
)
def layerwise_sam(
    rho: ScalarOrSchedule = 0.05,
    eta: ScalarOrSchedule = 0.0,
    *,
    p: float | None = None,
    adaptive_mask: Mask = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Layer-wise adaptive SAM: the radius of each tensor scales with its norm.

    .. math::
      \varepsilon = \rho \frac{T^2 g}{\|T g\|}, \qquad
      T_l = \|w_l\| (1 + \eta) \ \text{on the tensor } l, \qquad
      d = \nabla L(w + \varepsilon)

    It stands between `sam`, where T = 1, and `asam`, where each weight has a T of its
    own. With p = ∞, ε = ρ T sign(g).

    Args:
      rho: the radius ρ = ‖T⁻¹ ε‖_p. Default 0.05, that of `sam`.
      eta: η ≥ 0, by which each norm is enlarged. Default 0, from the paper's equation.
      p: the order of the norm, a Python number from 1 to infinity. Default None: the
        2-norm. As in `sam`, it is a static argument of `optax.inject_hyperparams`.
      adaptive_mask: the leaves that T applies to; where it is False, T = 1. A tree of
        bools (or a prefix of one), or a function of the parameters that returns one.
        Default None: T applies to every leaf. A leaf of zero weights, such as a new
        bias, is then not perturbed.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0, eta < 0 or p < 1.

    Examples:
      On normalisation layers alone, which is "layer-wise SAM-ON" of the paper:

      >>> import sam_optax
      >>> sam = sam_optax.layerwise_sam(
      ...     rho=0.1, mask=sam_optax.methods.normalization_layers)

    References:
      Müller et al., `Normalization Layers Are All That Sharpness-Aware Minimization
      Needs <https://arxiv.org/abs/2306.04226>`_, NeurIPS 2023.

    Differences from the authors' code, with whose trajectories this was compared:
      1. No epsilon is added to the norm. Theirs is 1e-16.
      2. Their T is 1 on biases, unless a switch is set; they find biases by name. Here
         adaptive_mask says so.

    Cost: 2 gradients a step; no tree is carried.
    """
    ascent = layerwise_sam_ascent(rho, eta, p=_order(p), adaptive_mask=adaptive_mask)
    return sharpness_aware(ascent, **options)


@record(
    title="SAM on normalisation layers",
    equation="ε = ρ g/‖g‖ on normalisation layers, 0 elsewhere",
    source="Müller 2023",
    url="https://arxiv.org/abs/2306.04226",
)
def sam_on(
    rho: ScalarOrSchedule = 0.5,
    *,
    p: float | None = None,
    mask: Mask = normalization_layers,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM-ON: only the normalisation layers are perturbed.

    .. math::
      \varepsilon = \rho \frac{g_N}{\|g_N\|}, \qquad d = \nabla L(w + \varepsilon)

    where g_N is g on the parameters of normalisation layers, and 0 elsewhere. All
    parameters are trained.

    Args:
      rho: the radius ρ = ‖ε‖. Default 0.5, that of the authors' training script: the
        few parameters of these layers bear, and need, a radius about ten times that of
        `sam`. Tune it.
      p: the order of the norm, a Python number from 1 to infinity. Default None: the
        2-norm. As in `sam`, it is a static argument of `optax.inject_hyperparams`.
      mask: the leaves that are perturbed. Default `methods.normalization_layers`: those
        with "norm" or "bn" in the names on their path, as in the authors' code.
      guard, stochastic_rounding: passed on to `sharpness_aware`. Default True and None.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.
      For other ascents on normalisation layers alone, pass that mask to them:
      `sam_optax.asam(mask=sam_optax.methods.normalization_layers)`.

    Raises:
      ValueError: if rho < 0 or p < 1; from init, if no parameter has such a name.

    Examples:
      >>> import jax, jax.numpy as jnp, sam_optax
      >>> params = {"dense": jnp.array(3.0), "norm": jnp.array(1.0)}
      >>> grad_fn = jax.grad(lambda w: (w["dense"] * w["norm"]) ** 2)
      >>> sam = sam_optax.sam_on(rho=1.0)
      >>> d, _ = sam.update(
      ...     grad_fn(params), sam.init(params), params, grad_fn=grad_fn)
      >>> print(f"{d['dense']:.1f} {d['norm']:.1f}")
      24.0 36.0

    References:
      Müller et al., `Normalization Layers Are All That Sharpness-Aware Minimization
      Needs <https://arxiv.org/abs/2306.04226>`_, NeurIPS 2023.

    Differences from the authors' code, with whose trajectories this was compared: no
    epsilon is added to the norm. Theirs is 1e-16.

    Cost: 2 gradients a step; no tree is carried.
    """
    return sharpness_aware(
        sam_ascent(rho, p=_order(p)),
        mask=mask,
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )
