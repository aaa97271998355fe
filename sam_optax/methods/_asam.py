"""ASAM: the perturbation scales with the weights."""

from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import check_number, require_params
from sam_optax._hyperparameters import ScalarOrSchedule, scheduled
from sam_optax._masks import Mask, check_mask, resolve_mask
from sam_optax._parts import Ascent, chain
from sam_optax._step import Options, sharpness_aware
from sam_optax.methods._record import record
from sam_optax.methods._sam import normalize_by_global_norm, scale_by_rho


def scale_by_magnitude(
    eta: ScalarOrSchedule = 0.01, *, adaptive_mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """Multiplies by ASAM's normalisation operator: u ↦ T_w u, with T_w = |w| + η.

    Args:
      eta, adaptive_mask: those of the method `asam`. Default 0.01 and None.

    Returns:
      A transformation that needs the parameters. It returns half-precision leaves as
      float32.

    Raises:
      ValueError: if eta is negative, or, from `update`, if params is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx, w = scale_by_magnitude(eta=0.5), jnp.array([1.0, -2.0])
      >>> tx.update(jnp.array([1.0, 1.0]), tx.init(w), w)[0].tolist()
      [1.5, 2.5]
    """
    check_number("eta", eta, at_least=0)
    check_mask("adaptive_mask", adaptive_mask)

    def part(eta):
        def by_magnitude(u, w):
            return (jnp.abs(w).astype(u.dtype) + jnp.asarray(eta, u.dtype)) * u

        def rescale(updates, params):
            require_params(params, "scale_by_magnitude")
            updates = _tree.at_least_float32(updates)
            if adaptive_mask is None:
                return jax.tree.map(by_magnitude, updates, params)
            return jax.tree.map(
                lambda adaptive, u, w: by_magnitude(u, w) if adaptive else u,
                resolve_mask(adaptive_mask, params),
                updates,
                params,
            )

        return optax.stateless(rescale)

    return Ascent.of(scheduled(part, eta=eta), shows_nonfinite=True)


def asam_ascent(
    rho: ScalarOrSchedule = 0.5,
    eta: ScalarOrSchedule = 0.01,
    *,
    adaptive_mask: Mask = None,
) -> Ascent:
    """The ascent of the method `asam`, ε = ρ T_w (T_w g/‖T_w g‖); same arguments."""
    rescale = scale_by_magnitude(eta, adaptive_mask=adaptive_mask)
    return chain(rescale, normalize_by_global_norm(), rescale, scale_by_rho(rho))


@record(
    title="Adaptive SAM",
    equation="ε = ρ T² g/‖T g‖, T = abs(w) + η",
    radius="‖T⁻¹ε‖",
    source="Kwon 2021",
    url="https://arxiv.org/abs/2102.11600",
)
def asam(
    rho: ScalarOrSchedule = 0.5,
    eta: ScalarOrSchedule = 0.01,
    *,
    adaptive_mask: Mask = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive Sharpness-Aware Minimization (ASAM).

    .. math::
      \varepsilon = \rho \frac{T_w^2 g}{\|T_w g\|}, \qquad T_w = |w| + \eta,
      \qquad d = \nabla L(w + \varepsilon)

    The neighbourhood scales with the weights. With η = 0, if the weights are rescaled
    without a change of the loss, ε is rescaled in the same way.

    Args:
      rho: the radius ρ = ‖T_w⁻¹ ε‖. Default 0.5, from the paper (CIFAR-10).
      eta: the offset η ≥ 0, which keeps T_w away from zero. Default 0.01, from the
        paper.
      adaptive_mask: the leaves that T_w applies to; where it is False, T_w = 1. A tree
        of bools (or a prefix of one), or a function of the parameters that returns one.
        Default None: T_w applies to every leaf, as in the paper's equation. The
        authors' code excludes biases alone; the second example shows how.
      options: mask=, guard= and stochastic_rounding=, passed on to `sharpness_aware`.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0 or eta < 0.

    Examples:
      On f(w) = w² from w = 2 with η = 0, ε is ρ |w| = 1, so d = 2 · 3.

      >>> import jax, jax.numpy as jnp, sam_optax
      >>> sam, w = sam_optax.asam(rho=0.5, eta=0.0), jnp.array(2.0)
      >>> grad_fn = jax.grad(lambda w: w**2)
      >>> d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
      >>> print(f"{d:.2f}")
      6.00

      The authors' code applies T_w to kernels, and to the scales of BatchNorm and
      LayerNorm, but not to biases. This mask does the same, by the names of the
      parameters:

      >>> def all_but_biases(params):
      ...     def is_scaled(path, _):
      ...         return "bias" not in [
      ...             jax.tree_util.keystr((key,), simple=True) for key in path]
      ...     return jax.tree_util.tree_map_with_path(is_scaled, params)
      >>> sam = sam_optax.asam(rho=0.5, adaptive_mask=all_but_biases)
      >>> all_but_biases({"dense": {"kernel": w, "bias": w}, "norm": {"scale": w}})
      {'dense': {'bias': False, 'kernel': True}, 'norm': {'scale': True}}

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
      Learning of Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, ICML 2021.

    Differences from the authors' code:
      1. No epsilon is added to the norm. Theirs is 1e-16.
      2. Their T_w applies only to parameters whose name contains "weight". In PyTorch,
         these are the kernels, the embeddings, and the scales of BatchNorm and
         LayerNorm. Here T_w applies to biases too, unless adaptive_mask excludes them.
      3. Their training script sets η to 0. Their class has 0.01, as here.

    Cost: 2 gradients a step; no tree is carried.
    """
    return sharpness_aware(
        asam_ascent(rho, eta, adaptive_mask=adaptive_mask), **options
    )
