"""Entropy-SGD: the direction to the average of a random walk around w."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from sam_optax import _tree
from sam_optax._checks import (
    check_constant,
    check_number,
    check_static_integer,
    check_static_number,
    require_grad_fn,
    require_params,
)
from sam_optax._hyperparameters import ScalarOrSchedule, scheduled
from sam_optax._parts import Descent
from sam_optax._random import Key, key_stream
from sam_optax._rounding import round_to_nearest
from sam_optax._step import sharpness_aware
from sam_optax.methods._descent import stay
from sam_optax.methods._noise import NoiseState
from sam_optax.methods._record import record_further


def _walk(
    gamma: ScalarOrSchedule,
    noise: ScalarOrSchedule,
    *,
    steps: int,
    walk_rate: float,
    decay: float,
    momentum: float,
    nesterov: bool,
    as_released: bool,
    key: Key,
) -> Descent:
    """The descent of `entropy_sgd`; gᵃ is the gradient where the walk begins, at w."""
    keys = key_stream(key, "entropy_sgd")

    def part(gamma, noise):
        def update_fn(
            updates: optax.Updates,
            state: Any,
            params: optax.Params | None = None,
            *,
            grad_fn: Any = None,
            perturb: Callable[..., optax.Params] = round_to_nearest,
            group: Any = None,
            **extra_args: Any,
        ) -> tuple[optax.Updates, NoiseState]:
            del extra_args
            require_params(params, "entropy_sgd")
            require_grad_fn(grad_fn, "entropy_sgd")
            now, later = keys.next(state.noise_key, group)
            # Each step moves by √η' noise ξ; theirs, by √2 of that.
            spread = noise * ((2 if as_released else 1) / walk_rate) ** 0.5
            zeros = _tree.zeros_like(updates)
            shift, mean, velocity = zeros, zeros, zeros
            for index in range(steps):
                g = updates
                if index:
                    g = _tree.at_least_float32(grad_fn(perturb(params, shift)))
                a = g
                if momentum:
                    velocity = _tree.add_scaled(_tree.scale(momentum, velocity), 1, g)
                    a = (
                        _tree.add_scaled(g, momentum, velocity)
                        if nesterov
                        else velocity
                    )
                xi = _tree.normal_like(jax.random.fold_in(now, index), updates)
                a = _tree.add_scaled(_tree.add_scaled(a, gamma, shift), spread, xi)
                if momentum and not nesterov and as_released:
                    velocity = a
                shift = _tree.add_scaled(shift, -walk_rate, a)
                mean = _tree.add_scaled(_tree.scale(decay, mean), 1 - decay, shift)
            weight = -1.0 if as_released else -gamma
            return _tree.scale(weight, mean), NoiseState(later)

        return optax.GradientTransformationExtraArgs(
            lambda params: NoiseState(keys.start()), update_fn
        )

    return Descent.of(scheduled(part, gamma=gamma, noise=noise))


@record_further(
    title="Entropy-SGD",
    equation="d = γ (w − μ), μ the average of an inner Langevin walk from w",
    use="`optax.chain(entropy_sgd(), optax.sgd(1.0))`, as the methods above",
    source="Chaudhari 2017",
    url="https://arxiv.org/abs/1611.01838",
    cost="n",
)
def entropy_sgd(
    gamma: ScalarOrSchedule = 0.01,
    noise: ScalarOrSchedule = 1e-4,
    *,
    steps: int = 5,
    walk_rate: float = 0.1,
    decay: float = 0.75,
    momentum: float = 0.0,
    nesterov: bool = True,
    as_released: bool = False,
    key: Key = 0,
    guard: bool = False,
    stochastic_rounding: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Entropy-SGD: biases descent towards wide valleys by a local entropy.

    .. math::
      x_{i+1} = x_i - \eta' \big(\nabla L(x_i) - \gamma (w - x_i)\big)
        + \sqrt{\eta'}\, \epsilon\, \xi_i, \qquad
      \mu_{i+1} = \beta \mu_i + (1 - \beta) x_{i+1}, \qquad
      d = \gamma (w - \mu_n)

    with x₀ = μ₀ = w and standard normal ξ. d is the gradient of the negative local
    entropy. It is not a gradient of the loss at one point, and does not tend to one: so
    the method stands apart from those of `METHODS`. The base optimizer after it needs a
    learning rate of the size 1/γ; with as_released=True, of the size 1.

    Args:
      gamma: γ, the strength with which the walk is held at w: a number or a schedule.
        The paper's scoping is `gamma=lambda t: 0.01 * (1 + 1e-3) ** t`. Default 0.01,
        that of the authors' class; their training script has 0.0001.
      noise: ε, the size of the noise: a number or a schedule. Default 0.0001, from the
        authors' code.
      steps: the number n of steps of the walk, a Python integer >= 1. The loop is
        unrolled. Default 5, chosen here; the paper has 20 for its larger networks.
      walk_rate: η', the learning rate of the walk. Default 0.1, from the authors' code.
      decay: β, the weight of the past in the average μ. Default 0.75, from the authors'
        code.
      momentum: that of the walk. Default 0: none, which is the default of the authors'
        class; their training script has 0.9.
      nesterov: whether the momentum of the walk is Nesterov's. Default True, as in
        their class.
      as_released: whether d = w − μ, as in the authors' code; see below. Default False.
      key: an int, a typed key or a legacy one. Default 0.
      guard, stochastic_rounding: passed on to `sharpness_aware`. Default False, as for
        `random_sam`, and None.

    Returns:
      A transformation that comes first in an optimizer chain; see `sharpness_aware`. It
      works as those of `METHODS` do, through both doors.

    Raises:
      ValueError: if a number is out of its range, or steps is not a positive integer.

    Examples:
      On f(w) = w²/2 without noise, two steps of the walk from w = 1 go to 0.9 and to
      0.9 − 0.1 · (0.9 − 0.01 · 0.1) = 0.8101, and their average is 0.93:

      >>> import jax, jax.numpy as jnp, sam_optax
      >>> sam = sam_optax.entropy_sgd(noise=0.0, steps=2, as_released=True)
      >>> grad_fn, w = jax.grad(lambda w: w**2 / 2), jnp.array(1.0)
      >>> d, _ = sam.update(grad_fn(w), sam.init(w), w, grad_fn=grad_fn)
      >>> print(f"{d:.6f}")
      0.066225

    References:
      Chaudhari et al., `Entropy-SGD: Biasing Gradient Descent Into Wide Valleys
      <https://arxiv.org/abs/1611.01838>`_, ICLR 2017.

    Differences from the authors' code. With as_released=True, its trajectories are
    reproduced, where 1 to 3 hold:
      1. d is w − μ, without the factor γ.
      2. The noise is √2 times as large.
      3. Without Nesterov's momentum, the momentum of the walk is the same array as its
         step, so the pull to w and the noise enter it.
      4. Its schedule of γ never leaves the first value. Here a schedule works.
      5. Its momentum of the outer step starts at the first gradient of the loss. Here
         it is that of your base optimizer.
      6. It draws another batch for each step of the walk. Here a step has one batch.

    A step with ascend=False passes the plain gradient on, which is some 1/γ times as
    long as d here; with the learning rate of this method, such a step is far too long.

    Cost: n gradients a step; a key is carried.
    """
    check_number("gamma", gamma, at_least=0)
    check_number("noise", noise, at_least=0)
    check_static_integer("steps", steps)
    check_constant("walk_rate", walk_rate, at_least=1e-30)
    check_constant("decay", decay, at_least=0, below=1)
    check_static_number("momentum", momentum, at_least=0, below=1)
    descent = _walk(
        gamma,
        noise,
        steps=steps,
        walk_rate=walk_rate,
        decay=decay,
        momentum=momentum,
        nesterov=nesterov,
        as_released=as_released,
        key=key,
    )
    return sharpness_aware(
        stay(), descent=descent, guard=guard, stochastic_rounding=stochastic_rounding
    )
