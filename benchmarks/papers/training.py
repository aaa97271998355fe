"""Steps, small networks and their training, as the experiments share them."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import sam_optax

PLAIN = "plain"  # the base optimizer alone


def make_step(loss_fn, method, base, hyper: dict | None = None, **options):
    """A step of a method of `sam_optax.METHODS` with `hyper`, or of `base` alone.

    A method that stands apart is a function: base, hyper -> sam, the whole optimizer.
    `options` are those of `sam_value_and_grad`. Returns init: params -> opt_state, and
    step: params, opt_state, *batch -> params, opt_state, loss, report.
    """
    # PLAIN computes one gradient, and no other branch is in its program.
    is_plain = method == PLAIN
    ascend = {"ascend": False} if is_plain else {}
    if callable(method):
        sam, tx = method(base, hyper)
    else:
        made = None if is_plain else sam_optax.METHODS[method].make(**hyper or {})
        sam = made or sam_optax.sam()
        tx = optax.chain(sam, base)
    loss_and_grads = sam_optax.sam_value_and_grad(loss_fn, sam, report=True, **options)

    def step(params, opt_state, *batch, **arguments):
        arguments |= ascend
        loss, grads = loss_and_grads(params, *batch, opt_state=opt_state, **arguments)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, grads.report

    return tx.init, step


def last_params(f, method: str, base, rho, start, steps: int) -> jax.Array:
    """Where a training of a function of the parameters ends."""
    init, step = make_step(f, method, base, {} if method == PLAIN else {"rho": rho})

    def body(carry, _):
        return step(*carry)[:2], None

    return jax.lax.scan(body, (start, init(start)), length=steps)[0][0]


@functools.cache  # so that the same base has the same trainer
def decayed_sgd(steps: int, weight_decay: float = 5e-4) -> Callable[[Any], Any]:
    """Learning rate -> SGD with momentum 0.9, weight decay and a cosine decay."""

    def make_base(learning_rate):
        schedule = optax.cosine_decay_schedule(learning_rate, steps)
        decay = optax.add_decayed_weights(weight_decay)
        return optax.chain(decay, optax.sgd(schedule, momentum=0.9))

    return make_base


@functools.cache
def what_sampa_knows(steps: int, weight_decay: float) -> Callable[[Any], dict]:
    """Learning rate -> the arguments by which SAMPa knows `decayed_sgd`."""

    def arguments(learning_rate):
        schedule = optax.cosine_decay_schedule(learning_rate, steps)
        known = {"learning_rate": schedule, "momentum": 0.9}
        return known | {"weight_decay": weight_decay}

    return arguments


class MLP(nn.Module):
    """A multilayer perceptron with ReLUs; the last width is the number of classes."""

    widths: Sequence[int]

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


def losses_of(model: nn.Module, params, x, y) -> tuple[jax.Array, Any]:
    """The loss of each example, and the logits."""
    logits: Any = model.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y), logits


def draw_batches(key: jax.Array, examples: int, batch_size: int):
    """Indices of the batches of an epoch, and keys; an incomplete batch is dropped."""
    steps = examples // batch_size
    order_key, key = jax.random.split(key)
    order = jax.random.permutation(order_key, examples)[: steps * batch_size]
    return order.reshape(steps, batch_size), jax.random.split(key, steps)


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
    epoch: Callable[..., tuple]  # (state, hyper, key, x, y) -> state, what was watched
    evaluate: Callable[..., tuple]  # (state, x, y) -> mean loss, accuracy in %

    def epochs(self, hyper: dict, seed: int, data: tuple, count: int) -> Iterator:
        """The state after each epoch, and what was watched in it."""
        key = jax.random.key(seed)
        state = self.init(hyper, key, data[0])
        for _ in range(count):
            state, seen = self.epoch(state, hyper, key, *data)
            yield state, seen

    def fit(self, *args: Any) -> tuple[State, list]:
        """The last state of `epochs`, and what was watched in all of them."""
        everything = []
        for state, seen in self.epochs(*args):  # noqa: B007
            everything.append(seen)
        return state, everything

    def accuracies(self, state: State, *parts: tuple) -> list[float]:
        return [float(self.evaluate(state, *part)[1]) for part in parts]


@functools.cache  # settings are no part of the program
def make_trainer(
    model: nn.Module,
    method: str | Callable[..., tuple],
    make_base: Callable[[jax.Array], optax.GradientTransformation],
    batch_size: int,
    *,
    arguments: Callable[..., dict[str, Any]] | None = None,
    m: int | None = None,
    data: sam_optax.data.DataRule | None = None,
    watch: Callable[[sam_optax.Report], Any] = lambda report: report,
    program: str = "epoch",
    further: Callable[[jax.Array], dict[str, Any]] | None = None,
    ascends: Callable[[dict, int], bool] | None = None,
) -> Trainer:
    """Trains a classifier; `hyper` has learning_rate and what the method takes.

    `method` is one of `make_step`.

    `arguments`, of (loss_fn, params, key, index, x, y), gives further arguments of a
    step, where index says which examples are in the batch. `m` and `data` are those of
    `sam_value_and_grad`, and `watch` says what an epoch returns of each step's report.
    `program` says what is compiled: an epoch, or a step for networks with convolutions,
    which XLA makes slow in a loop on a CPU. `further`, of the learning rate, gives
    arguments of the method that are not numbers of `hyper`. `ascends`, of `hyper` and
    the step's number, says in Python which steps ascend, if a step is what is compiled:
    two programs without a branch, in which XLA makes convolutions slow as well.
    """

    def loss_fn(params, x, y):
        losses, _ = losses_of(model, params, x, y)
        return losses if data else losses.mean()  # rules may choose by the losses

    def build(hyper):
        hyper = dict(hyper)
        learning_rate = hyper.pop("learning_rate")
        hyper |= further(learning_rate) if further else {}
        options = {"batch_argnums": (1, 2), "m": m, "data": data}
        return make_step(loss_fn, method, make_base(learning_rate), hyper, **options)

    def init(hyper, key, x):  # not jitted, so that its parts are compiled but once
        params = model.init(key, x[:1])
        return State(params, build(hyper)[0](params), jnp.zeros((), jnp.int32))

    def one_step(carry, inputs, hyper, x, y, **more):
        index, key = inputs
        if arguments:
            more |= arguments(loss_fn, carry[0], key, index, x, y)
        *carry, _, report = build(hyper)[1](*carry, x[index], y[index], **more)
        return tuple(carry), watch(report)

    compiled_step = jax.jit(one_step, static_argnames="ascend")

    def epoch(state, hyper, key, x, y):
        key = jax.random.fold_in(key, state.epoch)
        batches = draw_batches(key, len(x), batch_size)
        if program == "epoch":
            body = functools.partial(one_step, hyper=hyper, x=x, y=y)
            carry, seen = jax.lax.scan(body, state[:2], batches)
        else:
            carry, steps = state[:2], []
            first = int(state.epoch) * len(batches[0])
            for number, inputs in enumerate(zip(*batches, strict=True), first):
                static = {"ascend": ascends(hyper, number)} if ascends else {}
                carry, watched = compiled_step(carry, inputs, hyper, x, y, **static)
                steps.append(watched)
            seen = jax.tree.map(lambda *values: jnp.stack(values), *steps)
        return State(*carry, state.epoch + 1), seen

    @jax.jit
    def evaluate(state, x, y):
        losses, logits = losses_of(model, state.params, x, y)
        return losses.mean(), 100 * jnp.mean(jnp.argmax(logits, axis=-1) == y)

    return Trainer(init, jax.jit(epoch) if program == "epoch" else epoch, evaluate)
