"""LPF-SGD: the gradient at a random point, with noise as large as each filter."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import require_params
from sam_optax._hyperparameters import ScalarOrSchedule
from sam_optax._masks import Mask
from sam_optax._parts import Ascent, chain
from sam_optax._random import Key, key_stream
from sam_optax._step import sharpness_aware
from sam_optax.methods._noise import NoiseState
from sam_optax.methods._record import record
from sam_optax.methods._sam import scale_by_rho


def replace_by_filter_noise(key: Key = 0) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by noise whose size is the norm of each filter.

    .. math::
      u = s_w \xi, \qquad \xi \sim N(0, I)

    s_w is the norm of the weights that lead to one output of a matrix or a kernel: of
    all entries with the same index on the last axis, as Flax lays them out. On a vector
    it is the norm of the vector. The gradient is not used, so none is taken at the
    parameters.

    Args:
      key: an int, a typed key or a legacy one. Default 0.

    Returns:
      A transformation that carries a key and needs the parameters. To combine it with
      other parts, use `ascents.chain`.

    Raises:
      ValueError: from `update`, if params is missing.
    """
    keys = key_stream(key, "replace_by_filter_noise")

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        group: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, NoiseState]:
        del extra_args
        require_params(params, "replace_by_filter_noise")
        now, later = keys.next(state.noise_key, group)
        noise = _tree.normal_like(now, updates)
        sizes = jax.tree.map(_filter_norm, _tree.at_least_float32(params))
        return _tree.multiply(noise, sizes), NoiseState(later)

    noise = optax.GradientTransformationExtraArgs(
        lambda params: NoiseState(keys.start()), update_fn
    )
    return Ascent.of(noise, uses_gradient=False, shows_nonfinite=True)


def _filter_norm(w: jax.Array) -> jax.Array:
    axes = tuple(range(max(w.ndim - 1, 1))) if w.ndim else ()
    return jnp.sqrt(jnp.sum(jnp.square(jnp.abs(w)), axis=axes, keepdims=True))


@record(
    title="LPF-SGD",
    equation="ε random, N(0, ρ² s²), s the norm of each filter",
    radius="the standard deviation of ε/s",
    source="Bisla 2022",
    url="https://arxiv.org/abs/2201.08025",
    gradients=1,
    cost="1 + a forward pass",
)
def lpf_sgd(
    rho: ScalarOrSchedule = 0.002,
    *,
    key: Key = 0,
    mask: Mask = None,
    guard: bool = False,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Low-Pass Filtering SGD (LPF-SGD): the gradient of a smoothed loss.

    .. math::
      d = \frac1M \sum_{j=1}^M \nabla L_{B_j}(w + \rho\, s_w \xi_j), \qquad
      \xi_j \sim N(0, I)

    s_w is the norm of the filter that a weight belongs to, and the B_j are M equal
    parts of the batch. M is not an argument of the method: pass m= (the batch size over
    M) to `sam_value_and_grad`, and each group of m examples draws noise of its own.
    Without m=, M = 1.

    Args:
      rho: ρ, the standard deviation of the noise relative to the filter norm: a number
        or a schedule. Default 0.002, which the authors' tables have for ResNets on
        CIFAR. They call it γ, and their code takes it as the standard deviation. For
        wider networks they let it grow over the training, to 15 to 35 times 0.0005.
        Small networks take more: with perceptrons we found 0.05 to be best.
      key: an int, a typed key or a legacy one. Default 0.
      guard: passed on to `sharpness_aware`. Default False: the method carries nothing
        that needs a guard.
      mask, stochastic_rounding: passed on to `sharpness_aware`. Default None.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`.

    Raises:
      ValueError: if rho < 0.

    Examples:
      Eight draws a step, each on its part of a batch of 128:

      >>> import jax.numpy as jnp, sam_optax
      >>> sam = sam_optax.lpf_sgd(rho=0.002)
      >>> loss_and_grads = sam_optax.sam_value_and_grad(
      ...     lambda w, x: jnp.mean((x @ w) ** 2), sam, m=128 // 8)

    References:
      Bisla, Wang and Choromanska, `Low-Pass Filtering SGD for Recovering Flat Optima in
      the Deep Learning Optimization Landscape <https://arxiv.org/abs/2201.08025>`_,
      AISTATS 2022.

    Differences from the authors' code, with whose trajectories this was compared: it
    keeps kernels as (outputs, inputs, ...), and takes the norm for each index of the
    first axis. Here it is the last axis, that of the outputs in Flax.

    Cost: 1 gradient a step, with any M; a key is carried. The loss at w takes a forward
    pass if it is used, which value_at="perturbed" saves, and a report takes the
    gradient at w.
    """
    ascent = chain(replace_by_filter_noise(key), scale_by_rho(rho))
    return sharpness_aware(
        ascent, mask=mask, guard=guard, stochastic_rounding=stochastic_rounding
    )
