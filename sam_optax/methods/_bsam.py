"""bSAM: a Gaussian posterior over the parameters, learned by SAM steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _tree
from sam_optax._checks import (
    check_constant,
    check_number,
    check_static_integer,
    require_grad_fn,
    require_params,
)
from sam_optax._hyperparameters import (
    ScalarOrSchedule,
    nan_if_negative,
    scheduled,
    unscheduled,
    value_at,
)
from sam_optax._parts import Ascent, Descent
from sam_optax._random import Key, key_stream
from sam_optax._rounding import round_to_nearest
from sam_optax._step import sharpness_aware
from sam_optax.methods._noise import NoiseState
from sam_optax.methods._record import record_further


class PrecisionState(NamedTuple):
    """State of bSAM's descent."""

    precision: optax.Updates  # s, like the parameters, at least float32


class BayesState(NamedTuple):
    """State of bSAM's optimizer."""

    bayes_step: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32
    sharpness_state: Any  # SharpnessAwareState, whose descent_state holds s
    bayes_momentum: optax.Updates  # like the parameters, at least float32


def _draw_from_posterior(examples: float, key: Key) -> Ascent:
    """The ascent ε = n/√(N s), with s from the descent."""
    keys = key_stream(key, "bsam")

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        precision: Any = None,
        group: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, NoiseState]:
        del params, extra_args
        now, later = keys.next(state.noise_key, group)
        noise = _tree.normal_like(now, updates)
        drawn = jax.tree.map(
            lambda n, s: n * jax.lax.rsqrt(s * jnp.asarray(examples, s.dtype)),
            noise,
            precision,
        )
        return drawn, NoiseState(later)

    noise = optax.GradientTransformationExtraArgs(
        lambda params: NoiseState(keys.start()), update_fn
    )
    return Ascent.of(noise, uses_gradient=False, shows_nonfinite=True)


def _ascend_by_precision(
    rho: ScalarOrSchedule, beta2: float, damping: float, start: float
) -> Descent:
    """d = ∇L(w + ρ a/s), where a = gᵃ is the gradient at the drawn point."""

    def init_fn(params: optax.Params) -> PrecisionState:
        filled = jax.tree.map(
            lambda w: jnp.full_like(w, start), _tree.at_least_float32(params)
        )
        return PrecisionState(filled)

    def part(rho):
        rho = nan_if_negative(rho)

        def update_fn(
            updates: optax.Updates,
            state: Any,
            params: optax.Params | None = None,
            *,
            grad_fn: Any = None,
            perturb: Callable[..., optax.Params] = round_to_nearest,
            **extra_args: Any,
        ) -> tuple[optax.Updates, PrecisionState]:
            del extra_args
            require_params(params, "bsam")
            require_grad_fn(grad_fn, "bsam")
            s = state.precision
            step = jax.tree.map(lambda a, s: a / s, updates, s)
            d = _tree.at_least_float32(grad_fn(perturb(params, _tree.scale(rho, step))))
            following_s = jax.tree.map(
                lambda a, s: (
                    beta2 * s + (1 - beta2) * (jnp.sqrt(s) * jnp.abs(a) + damping)
                ),
                updates,
                s,
            )
            # If a is not finite, d is: a rectifier can hide a NaN in its argument.
            d = _tree.add_scaled(d, 0, updates)
            return d, PrecisionState(following_s)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return Descent.of(
        scheduled(part, rho=rho),
        for_ascent=lambda state: {"precision": unscheduled(state).precision},
        averages_state=True,
    )


@record_further(
    title="Bayesian SAM",
    equation="a = ∇L(w + n/√(N s)), d = ∇L(w + ρ a/s), w − lr m/s",
    use="`sam, tx = bsam(learning_rate, examples)`, in place of the chain",
    source="Möllenhoff 2023",
    url="https://arxiv.org/abs/2210.01620",
    cost="2 + a forward pass",
)
def bsam(
    learning_rate: ScalarOrSchedule,
    examples: float,
    rho: ScalarOrSchedule = 0.01,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    weight_decay: float = 1e-4,
    damping: float = 0.1,
    initial_precision: float = 1.0,
    key: Key = 0,
    guard: bool = True,
    stochastic_rounding: Key | None = None,
) -> tuple[
    optax.GradientTransformationExtraArgs, optax.GradientTransformationExtraArgs
]:
    r"""Bayesian SAM (bSAM): SAM as an optimal relaxation of Bayes.

    .. math::
      a &= \nabla L\big(w + n/\sqrt{N s}\big), \quad n \sim N(0, I), \qquad
      d = \nabla L(w + \rho\, a/s) \\
      m &\leftarrow \beta_1 m + (1 - \beta_1)(d + \delta w), \qquad
      w \leftarrow w - lr\, m/s \\
      s &\leftarrow \beta_2 s + (1 - \beta_2)(\sqrt s\, |a| + \delta + \gamma)

    All products are elementwise, and the step takes s from before. The result is a
    Gaussian posterior N(w, 1/(N s)) over the parameters for N training examples. It is
    an optimizer of its own, which resembles Adam: it takes no base optimizer.

    Args:
      learning_rate: lr, a number or a schedule. The authors have 0.5 for CIFAR.
      examples: N, the number of training examples. Where data are augmented, the
        authors count each example several times.
      rho: ρ. Default 0.01, from the authors' commands for CIFAR. The perturbation is
        not divided by a norm.
      beta1: β₁, the decay of the momentum. Default 0.9, from the authors' commands.
      beta2: β₂, the decay of the precision. Default 0.999, from the authors' commands.
      weight_decay: δ, the precision of the prior over N. Default 0.0001, chosen here;
        the authors' command for CIFAR-10 comes to 0.00005.
      damping: γ ≥ 0, which keeps s away from zero. Default 0.1, from the authors' code.
      initial_precision: s at the start, > 0. Default 1, from the authors' code.
      key: an int, a typed key or a legacy one. Default 0.
      guard, stochastic_rounding: as for `sharpness_aware`. Default True and None.

    Returns:
      (sam, tx). `sam` is the SAM transformation; pass it to `sam_value_and_grad`, and
      nowhere else. `tx` is the whole optimizer; use it in place of a chain. With m=,
      each group of examples draws parameters of its own, as in the paper, and s follows
      the mean of their √s |a|.

    Raises:
      ValueError: if a number is out of its range.

    Examples:
      Train, and then predict with parameters that are drawn from the posterior:

      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> sam, tx = sam_optax.bsam(0.1, examples=1000)
      >>> loss_and_grads = sam_optax.sam_value_and_grad(lambda w: jnp.sum(w**2), sam)
      >>> w = jnp.ones(3)
      >>> opt_state = tx.init(w)
      >>> loss, grads = loss_and_grads(w, opt_state=opt_state)
      >>> updates, opt_state = tx.update(grads, opt_state, w)
      >>> w = optax.apply_updates(w, updates)
      >>> draws = sam_optax.methods.draw_from_bsam(
      ...     opt_state, w, examples=1000, key=jax.random.key(0), draws=8)
      >>> draws.shape
      (8, 3)

    References:
      Möllenhoff and Khan, `SAM as an Optimal Relaxation of Bayes
      <https://arxiv.org/abs/2210.01620>`_, ICLR 2023, Algorithm 1.

    Differences from the authors' code, with whose trajectories this was compared: none
    in the formula. There the decay of the momentum, the damping and the number of parts
    of a batch are arguments too; the parts are groups here.

    Cost: 2 gradients a step, and a forward pass for the loss; two trees are carried, in
    at least float32.
    """
    check_number("learning_rate", learning_rate, at_least=0)
    check_constant("examples", examples, at_least=1)
    check_number("rho", rho, at_least=0)
    check_constant("beta1", beta1, at_least=0, below=1)
    check_constant("beta2", beta2, at_least=0, below=1)
    check_constant("weight_decay", weight_decay, at_least=0)
    check_constant("damping", damping, at_least=0)
    check_constant("initial_precision", initial_precision, above=0)
    sam = sharpness_aware(
        _draw_from_posterior(examples, key),
        descent=_ascend_by_precision(
            rho, beta2, damping + weight_decay, initial_precision
        ),
        guard=guard,
        stochastic_rounding=stochastic_rounding,
    )

    def init_fn(params: optax.Params) -> BayesState:
        return BayesState(
            jnp.zeros((), jnp.int32), sam.init(params), _tree.zeros_like(params)
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, BayesState]:
        require_params(params, "bsam")
        step, sam_state, momentum = state
        new_sam_state: Any
        d, new_sam_state = sam.update(updates, sam_state, params, **extra_args)
        decayed = _tree.add_scaled(_tree.at_least_float32(d), weight_decay, params)
        m = _tree.add_scaled(_tree.scale(beta1, momentum), 1 - beta1, decayed)
        s = unscheduled(sam_state.descent_state).precision
        rate = value_at(learning_rate, step)
        moved = _tree.scale(-rate, jax.tree.map(jnp.divide, m, s))
        if guard:  # what is not finite shows in the updates, and is not carried
            finite = _tree.all_finite(d)
            m = jax.tree.map(lambda new, old: jnp.where(finite, new, old), m, momentum)
        return _tree.cast_like(moved, d), BayesState(
            optax.safe_increment(step), new_sam_state, m
        )

    return sam, optax.GradientTransformationExtraArgs(init_fn, update_fn)


def draw_from_bsam(
    opt_state: BayesState, params: Any, *, examples: float, key: Key, draws: int = 1
) -> Any:
    """Parameters drawn from the posterior that `bsam` has learned, N(w, 1/(N s)).

    Args:
      opt_state: the state of bsam's optimizer.
      params: w, the mean.
      examples: N, as given to `bsam`.
      key: an int, a typed key or a legacy one.
      draws: the number of draws. Default 1.

    Returns:
      A tree like the parameters, whose arrays have a first axis of draws.

    Raises:
      TypeError: if opt_state is not that of bsam's optimizer.
      ValueError: if draws is not a positive integer, or examples < 1.
    """
    if not isinstance(opt_state, BayesState):
        raise TypeError(
            "opt_state must be the state of the optimizer that bsam returns, got "
            f"{type(opt_state).__name__}."
        )
    check_static_integer("draws", draws)
    check_constant("examples", examples, at_least=1)
    part = _draw_from_posterior(examples, key)
    precision = unscheduled(opt_state.sharpness_state.descent_state).precision
    state, drawn = part.init(params), []
    for _ in range(draws):
        noise, state = part.update(precision, state, params, precision=precision)
        drawn.append(round_to_nearest(params, noise))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)
