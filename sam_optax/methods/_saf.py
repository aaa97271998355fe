"""SAF and MESA: a term of the training loss takes the place of the second gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _sharding as sharding
from sam_optax import _tree
from sam_optax._checks import (
    check_constant,
    check_number,
    check_positive_integer,
    is_integer,
)
from sam_optax._hyperparameters import ScalarOrSchedule, value_at
from sam_optax.methods._record import record_further


class TrajectoryLoss(NamedTuple):
    """A term of the training loss, with its state; what `saf` and `mesa` return."""

    init: Callable[..., Any]
    penalty: Callable[..., jax.Array]
    update: Callable[..., Any]


class SafState(NamedTuple):
    """State of `saf`: the outputs of every example on its last visits."""

    saf_step: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32
    visits: jax.Array  # shape=(examples,), dtype=jnp.int32
    past_outputs: jax.Array  # shape=(examples, lag, outputs)


class MesaState(NamedTuple):
    """State of `mesa`: the averaged model."""

    mesa_step: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32
    average: optax.Params  # like the parameters, at least float32


@record_further(
    title="Sharpness-Aware training for Free",
    equation="loss + λτ² KL(outputs of some epochs ago, outputs)",
    use="a term of the loss",
    source="Du 2022",
    url="https://arxiv.org/abs/2205.14083",
    cost="1",
)
def saf(
    num_examples: int,
    num_outputs: int,
    lag: int = 3,
    weight: ScalarOrSchedule = 0.3,
    temperature: ScalarOrSchedule = 5.0,
    *,
    start: int = 0,
    stop: int | None = None,
    dtype: Any = jnp.float32,
) -> TrajectoryLoss:
    r"""Sharpness-Aware training for Free (SAF): a KL term toward earlier outputs.

    .. math::
      L_B(w) + \frac{\lambda \tau^2}{|B|} \sum_{i \in B}
        \mathrm{KL}\big(\sigma(z_i' / \tau) \,\|\, \sigma(z_i(w) / \tau)\big)

    Here z are the model's outputs (logits), σ is the softmax, and z′ are the outputs
    that the same example had `lag` epochs ago. There is no second gradient, and no
    transformation: train with the base optimizer alone.

    Args:
      num_examples: the size of the training set.
      num_outputs: the number of outputs of the model, which is that of classes.
      lag: the number of visits of an example since z′ was stored (Ẽ in the paper).
        Default 3, that of the authors' training script; the command in their run.sh
        sets 2. The term is 0 for an example that was visited fewer times.
      weight: λ. Default 0.3, from the command in the authors' run.sh and from their
        README. Their training script itself has 0.16.
      temperature: τ. Default 5, from the paper.
      start: the first step on which the term counts. Default 0; the paper waits for 5
        epochs.
      stop: the step from which it no longer counts. Default None: it always counts.
      dtype: the dtype of the num_examples · lag · num_outputs stored numbers. Default
        float32.

    Returns:
      A `TrajectoryLoss`:

      - init() -> state.
      - penalty(state, outputs, index) -> the term for each example of the batch, of
        shape (batch,). Add it to the losses before you take their mean. outputs has
        shape (batch, num_outputs). index has shape (batch,), and holds the positions of
        the examples in the training set, each at most once. An index out of range, such
        as -1 for padding, has no term, and nothing is stored for it.
      - update(state, outputs, index) -> the next state. Call it after each step.
        Outputs that are not finite are not stored.

    Raises:
      ValueError: if a count is not a positive integer, weight < 0, temperature <= 0,
        start < 0, or stop <= start; when traced, if outputs or index have other shapes.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> saf = sam_optax.saf(num_examples=2, num_outputs=2, lag=1)
      >>> def loss_fn(w, x, y, index, saf_state):
      ...     logits = x * w
      ...     losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
      ...     return jnp.mean(losses + saf.penalty(saf_state, logits, index)), logits
      >>> w, state = jnp.array([1.0, -1.0]), saf.init()
      >>> x, y, index = jnp.ones((2, 1)), jnp.array([0, 1]), jnp.array([0, 1])
      >>> for _ in range(2):
      ...     (loss, logits), g = jax.value_and_grad(loss_fn, has_aux=True)(
      ...         w, x, y, index, state)
      ...     w, state = w - g, saf.update(state, logits, index)
      ...     print(f"{loss:.3f}")
      1.127
      0.895

    References:
      Du et al., `Sharpness-Aware Training for Free
      <https://arxiv.org/abs/2205.14083>`_, NeurIPS 2022.

    Differences from the authors' code:
      1. Their lag counts epochs of the training. Here it counts visits of the example,
         which is the same where every epoch visits every example once.
      2. They compare an example that was not visited before with outputs of zero. Here
         it has no term.
      3. Their term counts in epochs 6 to 299, counted from 0. Here it counts on every
         step, unless start and stop say otherwise.

    The factor τ² is that of their code. The paper's formula has none, so with τ = 5 a λ
    that is meant for the formula has to be divided by 25.

    Cost: 1 gradient.
    """
    check_positive_integer("num_examples", num_examples)
    check_positive_integer("num_outputs", num_outputs)
    check_positive_integer("lag", lag)
    _check_term(weight, temperature, start, stop)

    def init_fn() -> SafState:
        return SafState(
            jnp.zeros((), jnp.int32),
            jnp.zeros(num_examples, jnp.int32),
            jnp.zeros((num_examples, lag, num_outputs), dtype),
        )

    def check(outputs, index):
        if jnp.ndim(index) != 1 or jnp.shape(outputs) != (len(index), num_outputs):
            raise ValueError(
                f"outputs must have shape (batch, {num_outputs}) and index (batch,), "
                f"got {jnp.shape(outputs)} and {jnp.shape(index)}."
            )

    def locate(index):
        # Every device has all past outputs, so it can look up any example's.
        index = sharding.replicate(jnp.asarray(index, jnp.int32))
        is_known = (index >= 0) & (index < num_examples)
        return jnp.where(is_known, index, 0), is_known

    def penalty_fn(state: SafState, outputs: Any, index: Any) -> jax.Array:
        check(outputs, index)
        index, is_known = locate(index)
        visits, step = state.visits[index], state.saf_step
        past = state.past_outputs[index, visits % lag]
        divergence = _divergence(past, outputs, value_at(temperature, step))
        divergence = jnp.where(is_known & (visits >= lag), divergence, 0)
        return _weigh(divergence, weight, step, start, stop)

    def update_fn(state: SafState, outputs: Any, index: Any) -> SafState:
        check(outputs, index)
        index, is_known = locate(index)
        outputs = jax.lax.stop_gradient(jnp.asarray(outputs)).astype(dtype)
        outputs = sharding.replicate(outputs)
        is_kept = is_known & jnp.all(jnp.isfinite(outputs), axis=-1)
        # The scatter drops an index out of range.
        kept = jnp.where(is_kept, index, num_examples)
        slot = state.visits[index] % lag
        return SafState(
            optax.safe_increment(jnp.asarray(state.saf_step)),
            state.visits.at[kept].add(1, mode="drop"),
            state.past_outputs.at[kept, slot].set(outputs, mode="drop"),
        )

    return TrajectoryLoss(init_fn, penalty_fn, update_fn)


@record_further(
    title="Memory-Efficient Sharpness-Aware training",
    equation="loss + λτ² KL(outputs of the EMA model, outputs)",
    use="a term of the loss",
    source="Du 2022",
    url="https://arxiv.org/abs/2205.14083",
    cost="1 + a forward pass",
)
def mesa(
    decay: ScalarOrSchedule = 0.9995,
    weight: ScalarOrSchedule = 0.8,
    temperature: ScalarOrSchedule = 5.0,
    *,
    start: int = 0,
    stop: int | None = None,
) -> TrajectoryLoss:
    r"""Memory-Efficient Sharpness-Aware training (MESA): a KL term toward an average.

    .. math::
      L_B(w) + \frac{\lambda \tau^2}{|B|} \sum_{i \in B}
        \mathrm{KL}\big(\sigma(z_i(v) / \tau) \,\|\, \sigma(z_i(w) / \tau)\big), \qquad
      v \leftarrow \beta v + (1-\beta) w

    Here z are the model's outputs (logits), σ is the softmax, and v is an exponential
    moving average of the parameters. It is like `saf`, with a second forward pass
    instead of stored outputs.

    Args:
      decay: β in [0, 1). Default 0.9995, from the paper. For a training of few steps,
        take a smaller one.
      weight: λ. Default 0.8, from the command in the authors' run.sh and from their
        README. Their training script itself has 0.3.
      temperature: τ. Default 5, from the paper.
      start: the first step on which the term counts. Default 0; the paper waits for 5
        epochs.
      stop: the step from which it no longer counts. Default None: it always counts.

    Returns:
      A `TrajectoryLoss`:

      - init(params) -> state. Its `average` starts at the parameters, in at least
        float32.
      - penalty(state, outputs, average_outputs) -> the term for each example, of shape
        (batch,). Add it to the losses before you take their mean. average_outputs are
        the model's outputs at `state.average`; no gradient goes through them.
      - update(state, params) -> the next state. Call it after each step of the
        optimizer. It averages by `optax.incremental_update`.

    Raises:
      ValueError: if decay is outside [0, 1), weight < 0, temperature <= 0, start < 0,
        or stop <= start; when traced, if the two outputs differ in shape.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> mesa = sam_optax.mesa(decay=0.5)
      >>> def loss_fn(w, x, y, mesa_state):
      ...     logits, averaged = x * w, x * mesa_state.average
      ...     losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
      ...     return jnp.mean(losses + mesa.penalty(mesa_state, logits, averaged))
      >>> w, x, y = jnp.array([1.0, -1.0]), jnp.ones((2, 1)), jnp.array([0, 1])
      >>> state = mesa.init(w)
      >>> for _ in range(2):
      ...     loss, g = jax.value_and_grad(loss_fn)(w, x, y, state)
      ...     w = w - g
      ...     state = mesa.update(state, w)
      ...     print(f"{loss:.3f}")
      1.127
      0.888

    References:
      Du et al., `Sharpness-Aware Training for Free
      <https://arxiv.org/abs/2205.14083>`_, NeurIPS 2022.

    Differences from the authors' code:
      1. Their training script sets β to 0.9998.
      2. Their average includes the statistics of BatchNorm. Here it holds what you pass
         to `init` and `update`.
      3. Their term counts in epochs 6 to 359, counted from 0. Here it counts on every
         step, unless start and stop say otherwise.

    Cost: 1 gradient and a forward pass; one tree is carried.
    """
    check_number("decay", decay, at_least=0, below=1)
    _check_term(weight, temperature, start, stop)

    def init_fn(params: optax.Params) -> MesaState:
        # A copy, so that the parameters can be donated.
        average = jax.tree.map(jnp.array, _tree.at_least_float32(params))
        return MesaState(jnp.zeros((), jnp.int32), average)

    def penalty_fn(state: MesaState, outputs: Any, average_outputs: Any) -> jax.Array:
        if jnp.shape(outputs) != jnp.shape(average_outputs) or jnp.ndim(outputs) != 2:
            raise ValueError(
                "outputs and average_outputs must both have shape (batch, outputs), "
                f"got {jnp.shape(outputs)} and {jnp.shape(average_outputs)}."
            )
        tau = value_at(temperature, state.mesa_step)
        divergence = _divergence(average_outputs, outputs, tau)
        return _weigh(divergence, weight, state.mesa_step, start, stop)

    def update_fn(state: MesaState, params: optax.Params) -> MesaState:
        average = optax.incremental_update(
            _tree.at_least_float32(params),
            state.average,
            1 - value_at(decay, state.mesa_step),
        )
        average = _tree.cast_like(average, state.average)
        return MesaState(optax.safe_increment(jnp.asarray(state.mesa_step)), average)

    return TrajectoryLoss(init_fn, penalty_fn, update_fn)


def _divergence(target: Any, outputs: Any, temperature: Any) -> jax.Array:
    """τ² KL(σ(target/τ) ‖ σ(outputs/τ)) of each row."""
    dtype = jnp.promote_types(jnp.result_type(outputs), jnp.float32)
    target = jax.nn.log_softmax(
        jax.lax.stop_gradient(target).astype(dtype) / temperature
    )
    predicted = jax.nn.log_softmax(outputs.astype(dtype) / temperature)
    # A masked class has a target of −inf. Its term is 0 · log 0, which counts as 0.
    impossible = jnp.isneginf(target)
    difference = jnp.where(impossible, 0, target) - jnp.where(impossible, 0, predicted)
    kl = jnp.sum(jnp.exp(target) * difference, axis=-1)
    return jnp.asarray(temperature, dtype) ** 2 * kl


def _weigh(
    divergence: jax.Array,
    weight: ScalarOrSchedule,
    step: Any,
    start: int,
    stop: int | None,
) -> jax.Array:
    counts = step >= start
    if stop is not None:
        counts &= step < stop
    return jnp.where(counts, value_at(weight, step) * divergence, 0)


def _check_term(
    weight: ScalarOrSchedule,
    temperature: ScalarOrSchedule,
    start: int,
    stop: int | None,
) -> None:
    check_number("weight", weight, at_least=0)
    check_number("temperature", temperature, above=0)
    check_constant("start", start, at_least=0)
    if stop is not None:
        check_constant("stop", stop, at_least=0)
        if is_integer(start) and is_integer(stop) and stop <= start:
            raise ValueError(f"stop must be after start, {start}, got {stop}.")
