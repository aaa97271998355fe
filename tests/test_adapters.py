"""LoRA: gradients, perturbations and states of the adapters alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sam_optax
import sam_optax.nnx
from lab import assert_trees_close, assert_trees_equal

RHO, RATE, WIDTH, RANK = 0.5, 0.1, 6, 2


def make_adapters(width=WIDTH, rank=RANK):
    rng = np.random.default_rng(0)
    # The second factor would start at zero in training. Here both have a gradient.
    return {
        "a": jnp.asarray(rng.normal(size=(width, rank)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(rank, width)), jnp.float32),
    }


def make_frozen(width=WIDTH):
    kernel = np.random.default_rng(1).normal(size=(width, width)) / width**0.5
    return {"kernel": jnp.asarray(kernel, jnp.float32)}


def batch(t, width=WIDTH, size=8):
    rng = np.random.default_rng(10 + t)
    x = jnp.asarray(rng.normal(size=(size, width)), jnp.float32)
    return x, jnp.sin(x)


def loss_fn(adapters, frozen, x, y):
    kernel = frozen["kernel"] + adapters["a"] @ adapters["b"]
    return jnp.mean(jnp.square(jnp.tanh(x @ kernel) - y))


def by_hand(adapters, frozen, steps):
    """SAM with SGD, with one norm over the adapters."""
    for t in range(steps):
        g = jax.grad(loss_fn)(adapters, frozen, *batch(t))
        norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(g)))
        epsilon = optax.tree.scale(RHO / norm, g)
        point = jax.tree.map(jnp.add, adapters, epsilon)
        d = jax.grad(loss_fn)(point, frozen, *batch(t))
        adapters = jax.tree.map(lambda w, d: w - RATE * d, adapters, d)
    return adapters


def test_adapters_as_the_parameters_train_as_by_hand():
    sam = sam_optax.sam(RHO)
    tx = optax.chain(sam, optax.sgd(RATE))
    loss_and_grads = sam_optax.sam_value_and_grad(loss_fn, sam)

    @jax.jit
    def step(adapters, state, frozen, x, y):
        _, grads = loss_and_grads(adapters, frozen, x, y, opt_state=state)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state

    adapters, frozen = make_adapters(), make_frozen()
    state = tx.init(adapters)
    for t in range(3):
        adapters, state = step(adapters, state, frozen, *batch(t))
    assert_trees_close(adapters, by_hand(make_adapters(), frozen, 3), rtol=1e-5)


def test_a_mask_and_a_partition_train_the_same_adapters():
    """One tree of all parameters, of which the optimizer trains the adapters."""
    is_adapter = {"adapters": True, "frozen": False}
    labels = {"adapters": "train", "frozen": "freeze"}
    sam = sam_optax.sam(RHO, mask=is_adapter)
    tx = optax.chain(
        sam,
        optax.partition(
            {"train": optax.sgd(RATE), "freeze": optax.set_to_zero()}, labels
        ),
    )
    loss_and_grads = sam_optax.sam_value_and_grad(
        lambda w, x, y: loss_fn(w["adapters"], w["frozen"], x, y), sam
    )

    @jax.jit
    def step(params, state, x, y):
        _, grads = loss_and_grads(params, x, y, opt_state=state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    frozen = make_frozen()
    params = {"adapters": make_adapters(), "frozen": frozen}
    state = tx.init(params)
    for t in range(3):
        params, state = step(params, state, *batch(t))
    assert_trees_equal(params["frozen"], frozen)
    assert_trees_close(
        params["adapters"], by_hand(make_adapters(), frozen, 3), rtol=1e-5
    )


def low_rank_loss(adapters, frozen, x, y):
    """As LoRA is computed: the product of its factors is never there as a matrix."""
    low_rank = x @ adapters["a"] @ adapters["b"]
    return jnp.mean(jnp.square(x @ frozen["kernel"] + low_rank - y))


def loss_of_both(params, x, y):
    return low_rank_loss(params["adapters"], params["frozen"], x, y)


def memory_of(loss_fn, sam, base, params, *args):
    """The bytes of a step's temporary memory, and those of its optimizer state."""
    tx = optax.chain(sam, base)
    loss_and_grads = sam_optax.sam_value_and_grad(loss_fn, sam)

    def step(params, state, *args):
        loss, grads = loss_and_grads(params, *args, opt_state=state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = tx.init(params)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    memory = jitted.lower(params, state, *args).compile().memory_analysis()
    kept = sum(x.nbytes for x in jax.tree.leaves(state))
    return memory.temp_size_in_bytes, kept


@pytest.mark.parametrize("trained", ["the adapters", "by a mask", "everything"])
def test_frozen_parameters_take_no_memory(trained):
    """Neither state, nor a gradient, nor a copy at w + ε."""
    width, base = 512, optax.adamw(RATE)
    adapters, frozen = make_adapters(width), make_frozen(width)
    params = {"adapters": adapters, "frozen": frozen}
    size = frozen["kernel"].nbytes
    x, y = batch(0, width)
    if trained == "the adapters":
        sam = sam_optax.fsam(RHO)
        found = memory_of(low_rank_loss, sam, base, adapters, frozen, x, y)
    elif trained == "by a mask":
        sam = sam_optax.fsam(RHO, mask={"adapters": True, "frozen": False})
        labels = {"adapters": "train", "frozen": "freeze"}
        base = optax.partition({"train": base, "freeze": optax.set_to_zero()}, labels)
        found = memory_of(loss_of_both, sam, base, params, x, y)
    else:  # what is trained does take memory, so the other cases mean something
        temporary, kept = memory_of(
            loss_of_both, sam_optax.fsam(RHO), base, params, x, y
        )
        assert temporary > size
        assert kept >= 3 * size  # F-SAM's average and AdamW's two moments
        return
    assert max(found) < size / 2


class Model(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.LoRALinear(3, 8, lora_rank=RANK, rngs=rngs)
        self.out = nnx.LoRALinear(8, 1, lora_rank=RANK, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.tanh(self.inner(x))))[..., 0]


@pytest.mark.slow
def test_nnx_trains_and_perturbs_the_adapters_alone():
    model = Model(nnx.Rngs(0))
    state = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, jax.tree.map(lambda x: x + 0.3, state))  # away from zero
    graph, adapters, frozen = nnx.split(model, nnx.LoRAParam, ...)
    adapters, frozen = nnx.to_pure_dict(adapters), nnx.to_pure_dict(frozen)
    adapters, frozen = jax.tree.map(jnp.array, (adapters, frozen))
    x = jax.random.normal(jax.random.key(1), (8, 3))
    y = jnp.sin(x[:, 0])

    def model_loss(model, x, y):
        return jnp.mean(jnp.square(model(x) - y))

    def loss_of(adapters):
        copied = nnx.merge(graph, adapters, frozen, copy=True)
        return model_loss(copied, x, y)

    g = jax.grad(loss_of)(adapters)
    scale = RHO / optax.tree.norm(g)
    d = jax.grad(loss_of)(jax.tree.map(lambda w, g: w + scale * g, adapters, g))
    expected = jax.tree.map(lambda w, d: w - RATE * d, adapters, d)

    tx = optax.chain(sam_optax.sam(RHO), optax.sgd(RATE, momentum=0.9))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    gradients = sam_optax.nnx.value_and_ascent_grad(model_loss, wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, x, y):
        _, grads, extra_args = gradients(model, x, y)
        optimizer.update(model, grads, **extra_args)

    before = jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    step(model, optimizer, x, y)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for name in ("inner", "out"):
        assert_trees_equal(after[name]["kernel"], before[name]["kernel"])
        assert_trees_equal(after[name]["bias"], before[name]["bias"])
    trained = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    assert_trees_close(trained, expected, rtol=1e-5, atol=1e-6)
    kept = [x for x in jax.tree.leaves(nnx.state(optimizer)) if x.ndim]
    assert [x.shape for x in kept] == [x.shape for x in jax.tree.leaves(adapters)]


@pytest.mark.parametrize("name", ["fsam", "gsam", "asam"])
def test_each_kind_of_method_leaves_masked_parameters_where_they_are(name):
    """The frozen matrix is never moved, not even for the second pass."""
    params = {"adapters": make_adapters(), "frozen": make_frozen()}
    mask = {"adapters": True, "frozen": False}
    sam = sam_optax.METHODS[name].make(RHO, mask=mask)
    state, points = sam.init(params), []

    def grad_fn(w):
        points.append(w)
        return jax.grad(lambda w: loss_fn(w["adapters"], w["frozen"], *batch(0)))(w)

    for _ in range(2):
        _, state = sam.update(grad_fn(params), state, params, grad_fn=grad_fn)
    for point in points[1::2]:
        assert_trees_equal(point["frozen"], params["frozen"])
        assert not np.allclose(point["adapters"]["a"], params["adapters"]["a"])
