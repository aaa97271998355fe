"""Steps and small networks that the scripts share."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import sam_optax

PLAIN = "plain"  # the base optimizer alone


def make_step(
    loss_fn: Callable[..., Any],
    method: str,
    base: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    batch_argnums: tuple[int, ...] | None = None,
    m: int | None = None,
    data: sam_optax.DataRule | None = None,
    **hyperparameters: Any,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A step of a method of `sam_optax.METHODS`, or of `base` alone.

    Returns:
      init: params -> opt_state
      step: params, opt_state, *batch -> params, opt_state, loss, report, where loss is
        (loss, aux) if loss_fn has_aux. Keyword arguments are those of the function that
        `sam_value_and_grad` returns.
    """
    if method == PLAIN:
        sam = sam_optax.sam()
        ascend = {"ascend": False}  # one gradient, and no other branch in the program
    else:
        sam = sam_optax.METHODS[method].make(**hyperparameters)
        ascend = {}
    tx = optax.chain(sam, base)
    examples = {"batch_argnums": batch_argnums, "m": m, "data": data}
    loss_and_grads = sam_optax.sam_value_and_grad(
        loss_fn, sam, has_aux=has_aux, report=True, **examples
    )

    def step(params, opt_state, *batch, **arguments):
        loss, grads = loss_and_grads(
            params, *batch, opt_state=opt_state, **ascend, **arguments
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, loss, grads.report

    return tx.init, step


def gradients_per_step(method: str) -> int:
    return 1 if method == PLAIN else int(sam_optax.METHODS[method].gradients)


def decayed_sgd(
    steps: int, weight_decay: float = 5e-4
) -> Callable[[Any], optax.GradientTransformation]:
    """Learning rate -> SGD with momentum 0.9, weight decay and a cosine decay."""

    def make_base(learning_rate):
        schedule = optax.cosine_decay_schedule(learning_rate, steps)
        decay = optax.add_decayed_weights(weight_decay)
        return optax.chain(decay, optax.sgd(schedule, momentum=0.9))

    return make_base


class MLP(nn.Module):
    """A multilayer perceptron with ReLUs; the last width is the number of classes."""

    widths: Sequence[int]

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


class State(NamedTuple):
    """A network in training."""

    params: Any
    opt_state: Any
    epoch: jax.Array


class Trainer(NamedTuple):
    """How to train; `hyper` is a dict of numbers, so that all share one program.

    One seed and one setting at a time: on a CPU, four seeds under vmap take four times
    as long as one without SAM, and eight times with it, as vmap runs both sides of
    branches.
    """

    init: Callable[..., State]  # (hyper, key, x)
    epoch: Callable[..., tuple]  # (state, hyper, key, x, y) -> state, (losses, seen)
    evaluate: Callable[..., tuple]  # (state, x, y) -> mean loss, accuracy in %


def make_trainer(
    model: nn.Module,
    method: str,
    make_base: Callable[[jax.Array], optax.GradientTransformation],
    batch_size: int,
    arguments: Callable[..., dict[str, Any]] | None = None,
    m: int | None = None,
    data: sam_optax.DataRule | None = None,
    watch: Callable[[sam_optax.Report], Any] = lambda report: report,
) -> Trainer:
    """Trains a classifier; `hyper` has learning_rate and what the method takes.

    Args:
      model: the network.
      method: of `sam_optax.METHODS`, or PLAIN.
      make_base: learning rate -> base optimizer.
      batch_size: examples per step; an incomplete batch is dropped.
      arguments: (loss_fn, params, key, index, x, y) -> further arguments of the step,
        where index says which examples of x and y are in the batch.
      m: examples that share a perturbation; None for the whole batch.
      data: which examples each of the two gradients sees; None for the whole batch.
      watch: what an epoch returns of the report of each step, as an array over them.
        What is not watched takes no time.
    """

    def loss_fn(params, x, y):
        logits: Any = model.apply(params, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses if data else losses.mean()  # rules may choose by the losses

    def build(hyper):
        method_hyper = {k: v for k, v in hyper.items() if k != "learning_rate"}
        base = make_base(hyper["learning_rate"])
        examples = {"batch_argnums": (1, 2), "m": m, "data": data}
        return make_step(loss_fn, method, base, **examples, **method_hyper)

    def init(hyper, key, x):  # not jitted, so that its parts are compiled but once
        params = model.init(key, x[:1])
        return State(params, build(hyper)[0](params), jnp.zeros((), jnp.int32))

    @jax.jit
    def epoch(state, hyper, key, x, y):
        _, step = build(hyper)
        order_key, step_key = jax.random.split(jax.random.fold_in(key, state.epoch))
        steps = len(x) // batch_size
        order = jax.random.permutation(order_key, len(x))
        batches = order[: steps * batch_size].reshape(steps, batch_size)

        def body(carry, inputs):
            params, opt_state = carry
            index, key = inputs
            more = arguments(loss_fn, params, key, index, x, y) if arguments else {}
            *carry, loss, report = step(params, opt_state, x[index], y[index], **more)
            return tuple(carry), (loss, watch(report))

        keys = jax.random.split(step_key, steps)
        (params, opt_state), seen = jax.lax.scan(
            body, (state.params, state.opt_state), (batches, keys)
        )
        return State(params, opt_state, state.epoch + 1), seen

    @jax.jit
    def evaluate(state, x, y):
        logits: Any = model.apply(state.params, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), 100 * jnp.mean(jnp.argmax(logits, axis=-1) == y)

    return Trainer(init, epoch, evaluate)
