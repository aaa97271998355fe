"""Optax's own transformations around and after SAM, with the right numbers.

What follows SAM in a chain must see d as if it were any gradient. The same is computed
in two stages here: d from the SAM transformation alone, then the base optimizer on d.
All chains train in one program, which compiles much faster than one for each.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import problem
import sam_optax
from lab import all_finite, assert_trees_close, assert_trees_equal

STEPS = 4


def is_matrix(params):
    return jax.tree.map(lambda w: w.ndim > 1, params)


def labels(params):
    return jax.tree.map(lambda w: "matrix" if w.ndim > 1 else "other", params)


BASES = {
    "clipping": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
    "adaptive clipping": lambda: optax.chain(
        optax.adaptive_grad_clip(0.01), optax.sgd(1)
    ),
    "weight decay": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)),
    "adamw": lambda: optax.adamw(0.01),
    "ema": lambda: optax.chain(optax.sgd(0.1), optax.ema(0.9)),
    "reduce_on_plateau": lambda: optax.chain(
        optax.sgd(0.1),
        optax.contrib.reduce_on_plateau(factor=0.5, patience=1, accumulation_size=1),
    ),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "masked": lambda: optax.chain(
        optax.masked(optax.scale(2.0), is_matrix), optax.sgd(0.1)
    ),
    "partition": lambda: optax.partition(
        {"matrix": optax.sgd(0.1), "other": optax.adam(0.01)}, labels
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.sgd(0.1), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.sgd)(
        learning_rate=optax.linear_schedule(0.1, 0.0, STEPS)
    ),
    "lbfgs": lambda: optax.chain(optax.lbfgs(linesearch=None), optax.scale(0.01)),
    "lion": lambda: optax.lion(0.01),
}
if hasattr(optax, "freeze"):  # not in the oldest version that is supported
    BASES["freeze"] = lambda: optax.chain(optax.sgd(0.1), optax.freeze(is_matrix))


def make_sam():
    return sam_optax.fsam(0.2)


def first_door(tx, sam):
    helper = sam_optax.sam_value_and_grad(problem.loss, sam)

    def step(params, state, batch):
        loss, grads = helper(params, batch, opt_state=state)
        return tx.update(grads, state, params, value=loss)

    return step


def second_door(tx, sam):
    del sam

    def step(params, state, batch):
        def grad_fn(point):
            return jax.grad(problem.loss)(point, batch)

        loss = problem.loss(params, batch)
        return tx.update(grad_fn(params), state, params, grad_fn=grad_fn, value=loss)

    return step


def two_stages(base, sam):
    """Without a chain."""
    base = optax.with_extra_args_support(base)

    def step(params, state, batch):
        def grad_fn(point):
            return jax.grad(problem.loss)(point, batch)

        d, sam_state = sam.update(grad_fn(params), state[0], params, grad_fn=grad_fn)
        value = problem.loss(params, batch)
        updates, base_state = base.update(d, state[1], params, value=value)
        return updates, (sam_state, base_state)

    return step


def train(steps, states):
    """Parameters by name, after STEPS of each."""

    @jax.jit
    def run(states, batch):
        after = {}
        for name, step in steps.items():
            params, state = states[name]
            updates, state = step(params, state, batch)
            after[name] = optax.apply_updates(params, updates), state
        return after

    for t in range(STEPS):
        states = run(states, problem.batch(t))
    return {name: params for name, (params, _) in states.items()}


@pytest.mark.parametrize(
    "door", [first_door, pytest.param(second_door, marks=pytest.mark.slow)]
)
def test_what_follows_sam_sees_d_as_any_gradient(door):
    params, steps, states, plain, plain_states = problem.params(), {}, {}, {}, {}
    for name, make in BASES.items():
        sam = make_sam()
        tx = optax.chain(sam, make())
        steps[name], states[name] = door(tx, sam), (params, tx.init(params))
        plain[name] = two_stages(make(), sam)
        plain_states[name] = params, (sam.init(params), make().init(params))
    actual, expected = train(steps, states), train(plain, plain_states)
    for name in BASES:
        assert_trees_close(actual[name], expected[name], rtol=1e-4, atol=1e-6)
        moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), actual[name], params)
        assert max(jax.tree.leaves(moved)) > 1e-4, name


def test_lookahead_around_the_chain():
    """Its fast parameters are those of the loss, and the door is the first: it forwards
    no extra arguments."""
    sam = make_sam()
    tx = optax.lookahead(optax.chain(sam, optax.sgd(0.1)), 2, 0.5)
    helper = sam_optax.sam_value_and_grad(problem.loss, sam)

    @jax.jit
    def step(params, state, batch):
        _, grads = helper(params.fast, batch, opt_state=state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = optax.LookaheadParams.init_synced(problem.params())
    state = tx.init(params)
    fast = slow = problem.params()
    chain = optax.chain(sam, optax.sgd(0.1))
    chain_state = chain.init(fast)
    for t in range(STEPS):
        params, state = step(params, state, problem.batch(t))
        _, grads = helper(fast, problem.batch(t), opt_state=chain_state)
        updates, chain_state = chain.update(grads, chain_state, fast)
        fast = optax.apply_updates(fast, updates)
        if t % 2:
            slow = jax.tree.map(lambda s, f: s + 0.5 * (f - s), slow, fast)
            fast = slow
    assert_trees_close(params.fast, fast, rtol=1e-4, atol=1e-6)
    assert_trees_close(params.slow, slow, rtol=1e-4, atol=1e-6)


def test_finite_checks_around_the_chain_miss_what_is_infinite_at_the_perturbed_point():
    """Inside, they see d, and skip the step."""
    sam = sam_optax.sam(1.0)
    inside = optax.chain(sam, optax.apply_if_finite(optax.sgd(0.1), 3))
    around = optax.apply_if_finite(optax.chain(sam, optax.sgd(0.1)), 3)
    w = jnp.array([0.9, 0.9])

    def update(tx):
        def grad_fn(w):  # finite at w, infinite a little further
            return jnp.where(w > 1, jnp.inf, 1.0)

        updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        return optax.apply_updates(w, updates), state

    after, state = update(inside)
    assert_trees_equal(after, w)
    assert state[1].total_notfinite == 1
    after, state = update(around)
    assert not all_finite(after)
    assert state.total_notfinite == 0


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    ],
    ids=["apply_if_finite", "MultiSteps"],
)
def test_the_drop_in_says_what_cannot_be_around_sam(wrap):
    sam = sam_optax.sam()
    tx = optax.chain(wrap(optax.chain(sam, optax.sgd(0.1))))
    w = jnp.ones(2)
    helper = sam_optax.sam_value_and_grad(jnp.sum, sam)
    with pytest.raises(ValueError, match=r"is inside of optax\..*alone.*grad_fn="):
        helper(w, opt_state=tx.init(w))


def test_lbfgs_with_a_line_search_looks_along_the_loss_itself():
    """It evaluates the plain loss along the direction that d gives, and so needs the
    value function that it always needs; the loss goes down."""
    sam = sam_optax.sam(0.01)
    tx = optax.chain(sam, optax.lbfgs())
    batch = problem.batch()

    def value_fn(w, grad_fn=None):  # the line search wants all extra arguments used
        del grad_fn
        return problem.loss(w, batch)

    @jax.jit
    def step(params, state):
        grad_fn = jax.grad(value_fn)
        value, g = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(
            g, state, params, grad_fn=grad_fn, value=value, grad=g, value_fn=value_fn
        )
        return optax.apply_updates(params, updates), state, value

    params, losses = problem.params(), []
    state = tx.init(params)
    for _ in range(6):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.2 * losses[0]


# --- JAX's transformations.


def test_trainings_can_be_mapped_over_rho_and_seeds():
    def train_one(rho, params):
        sam = sam_optax.sam(rho)
        tx = optax.chain(sam, optax.sgd(0.1))
        helper = sam_optax.sam_value_and_grad(problem.loss, sam)

        def body(carry, batch):
            params, state = carry
            _, grads = helper(params, batch, opt_state=state)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        batches = jax.tree.map(lambda *x: jnp.stack(x), *map(problem.batch, range(3)))
        (params, _), _ = jax.lax.scan(body, (params, tx.init(params)), batches)
        return params

    rhos = jnp.array([0.05, 0.5])
    seeds = [problem.params(seed=seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *seeds)
    mapped = jax.jit(
        jax.vmap(jax.vmap(train_one, in_axes=(None, 0)), in_axes=(0, None))
    )
    results = mapped(rhos, stacked)
    alone = jax.jit(train_one)
    for i, rho in enumerate(rhos):
        for j, params in enumerate(seeds):
            own = jax.tree.map(lambda x, i=i, j=j: x[i, j], results)
            assert_trees_close(own, alone(rho, params), rtol=1e-4, atol=1e-5)


def test_checkpointed_losses_and_programs_compiled_ahead_of_time():
    sam = make_sam()
    tx = optax.chain(sam, optax.sgd(0.1))
    plain = sam_optax.sam_value_and_grad(problem.loss, sam)
    saving = sam_optax.sam_value_and_grad(jax.checkpoint(problem.loss), sam)

    def step_with(helper):
        def step(params, state, batch):
            _, grads = helper(params, batch, opt_state=state)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return step

    params = problem.params()
    state = tx.init(params)
    arguments = params, state, problem.batch()
    ahead = jax.jit(step_with(saving)).lower(*arguments).compile()
    assert_trees_close(
        ahead(*arguments), jax.jit(step_with(plain))(*arguments), rtol=1e-5, atol=1e-6
    )
