"""Parameters, batches and states that lie on a mesh of devices, under jit."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sam_optax
from devices import (
    ALL,
    KINDS,
    assert_like_one_device,
    one_and_per_group,
    table,
    trained_with_groups_of,
)
from lab import assert_trees_close
from sam_optax.data import k_sam, largest_increase, sub_batch

pytestmark = pytest.mark.usefixtures("double_precision")

# --- Layouts of the parameters.


def specs_of(layout):
    """How parameters lie on a mesh with the axes data and model."""
    return {
        "FSDP": {"in": P("data"), "shift": P("data"), "out": P("data")},
        "tensor parallel": {
            "in": P(None, "model"),
            "shift": P("model"),
            "out": P("model"),
        },
        "both": {"in": P("data", "model"), "shift": P("model"), "out": P("data")},
    }[layout]


@one_and_per_group
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("FSDP", marks=pytest.mark.slow),
        pytest.param("tensor parallel", marks=pytest.mark.slow),
        "both",
    ],
)
def test_state_comes_out_with_the_shardings_it_went_in_with(layout, per_group):
    mesh = table.make_mesh(data=2, model=2)
    params = {
        name: jax.device_put(x, NamedSharding(mesh, specs_of(layout)[name]))
        for name, x in table.make_params().items()
    }
    start, step = table.make_grouped_step(KINDS, per_group)
    before = start(params)
    step = jax.jit(step)

    def place(batch):
        return [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in batch]

    after = step(before, *place(table.make_batch(0)))
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    ):
        if len(old.sharding.device_set) > 1:  # counters and keys begin on one
            assert new.sharding.is_equivalent_to(old.sharding, old.ndim), (path, new)
    trained = table.train(step, before, place)
    assert_like_one_device([trained], per_group, KINDS)


one_of_each_kind_or_all = pytest.mark.parametrize(
    "names",
    [
        pytest.param(KINDS, id="kinds"),
        pytest.param(ALL, id="all", marks=pytest.mark.slow),
    ],
)


def updates_of(names):
    """(init, update), with a gradient that is a function of every entry alone."""
    optimizers = {name: table.make_optimizer(name)[1] for name in names}

    def init(params):
        return {name: tx.init(params) for name, tx in optimizers.items()}

    def update(states, params):
        def grad_fn(point):
            return jax.tree.map(jnp.sin, point)

        return {
            name: tx.update(grad_fn(params), states[name], params, grad_fn=grad_fn)
            for name, tx in optimizers.items()
        }

    return init, update


@one_of_each_kind_or_all
def test_no_parameter_is_gathered(names):
    """Of the methods' own arithmetic, only numbers leave a device, never arrays."""
    mesh = table.make_mesh(data=table.DEVICES)
    size = 4096
    params = {
        "a": jax.device_put(jnp.ones((size, 2)), NamedSharding(mesh, P("data"))),
        "b": jax.device_put(jnp.ones(size), NamedSharding(mesh, P("data"))),
    }
    init, update = updates_of(names)
    compiled = jax.jit(update).lower(init(params), params).compile()
    text = compiled.as_text()
    assert "all-reduce" in text
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
    # A few shards of temporaries for each method, where one gathered tree is DEVICES.
    shard = 3 * size * 8 / table.DEVICES
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 2 * len(names) * shard


# --- A mesh of explicit axes.


def explicit_mesh():
    """The default of `jax.make_mesh`, where shardings are part of types."""
    mesh = jax.make_mesh(
        (table.DEVICES,), ("data",), devices=jax.devices()[: table.DEVICES]
    )
    assert mesh.axis_types == (AxisType.Explicit,)
    return mesh


@pytest.mark.parametrize(
    "map_groups",
    [
        None,
        pytest.param("vmap", marks=pytest.mark.slow),
        pytest.param("unroll", marks=pytest.mark.slow),
        "scan",
    ],
)
def test_a_mesh_of_explicit_axes_works_as_well(map_groups):
    per_group = map_groups is not None
    start, step = table.make_grouped_step(KINDS, per_group, map_groups)
    with jax.set_mesh(explicit_mesh()):
        states = jax.device_put(start(table.make_params()), P())
        params = table.train(
            jax.jit(step), states, lambda batch: jax.device_put(batch, P("data"))
        )
        assert_like_one_device([jax.device_get(params)], per_group, KINDS)


@pytest.mark.parametrize("groups", [2, 8, 16])
def test_any_number_of_groups_on_a_mesh_of_explicit_axes(groups):
    """Also fewer than devices, or not a multiple of them."""
    m = table.DEVICES * table.GROUP // groups
    expected = trained_with_groups_of(m, ("fsam",))
    start, step = table.make_step(["fsam"], m=m)
    with jax.set_mesh(explicit_mesh()):
        states = jax.device_put(start(table.make_params()), P())
        params = table.train(
            jax.jit(step), states, lambda batch: jax.device_put(batch, P("data"))
        )
    assert_trees_close(jax.device_get(params), expected, atol=1e-10)


@pytest.mark.parametrize(
    "rule",
    [
        k_sam(3),
        k_sam(4),
        largest_increase(0.5),
        sub_batch(0.25),
        sub_batch(0.3),
    ],
)
def test_data_rules_on_a_mesh_of_explicit_axes(rule):
    def losses(w, x, y):
        hidden = jnp.tanh(x @ w["in"] + w["shift"])
        return jnp.square(hidden @ w["out"] - y)

    sam = sam_optax.sam(0.2)
    helper = sam_optax.sam_value_and_grad(losses, sam, data=rule, batch_argnums=(1, 2))

    @jax.jit
    def d(w, x, y):
        return helper(w, x, y, opt_state=sam.init(w))[1].gradients

    params, batch = table.make_params(), table.make_batch(0)
    expected = d(params, *batch)
    with jax.set_mesh(explicit_mesh()):
        actual = d(jax.device_put(params, P()), *jax.device_put(batch, P("data")))
    assert_trees_close(jax.device_get(actual), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("axis", "map_groups"),
    [("data", None), ("data", "scan"), ("data", "vmap")]
    + [
        pytest.param(axis, how, marks=pytest.mark.slow)
        for axis, how in [("data", "unroll"), ("model", None), ("model", "scan")]
    ],
)
def test_groups_with_parameters_sharded_over_explicit_axes(axis, map_groups):
    """A batch over one axis, and parameters over the same one or another."""
    sam = sam_optax.fsam(0.2)

    def loss_fn(w, x, y):
        hidden = jnp.tanh(x @ jax.sharding.reshard(w["in"], P()))
        return jnp.mean(jnp.square(hidden @ jax.sharding.reshard(w["out"], P()) - y))

    helper = sam_optax.sam_value_and_grad(
        loss_fn, sam, m=4, map_groups=map_groups, batch_argnums=(1, 2)
    )

    @jax.jit
    def step(w, state, x, y):
        loss, grads = helper(w, x, y, opt_state=state)
        d, state = sam.update(grads, state, w)
        return loss, d, state

    keys = jax.random.split(jax.random.key(0), 4)
    w = {
        "in": jax.random.normal(keys[0], (4, 8)),
        "out": jax.random.normal(keys[1], (8,)),
    }
    x, y = jax.random.normal(keys[2], (16, 4)), jax.random.normal(keys[3], (16,))
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
        plain = sam_optax.sam_value_and_grad(
            lambda w, x, y: jnp.mean(jnp.square(jnp.tanh(x @ w["in"]) @ w["out"] - y)),
            sam,
            m=4,
            map_groups="unroll",
            batch_argnums=(1, 2),
        )
        _, grads = plain(w, x, y, opt_state=sam.init(w))
        expected, _ = sam.update(grads, sam.init(w), w)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(w, {"in": P(None, axis), "out": P(axis)})
        examples = jax.device_put((x, y), P("data"))
        if map_groups == "vmap":
            with pytest.raises(ValueError, match="map_groups='vmap' does not work"):
                step(sharded, sam.init(sharded), *examples)
            return
        _, d, state = step(sharded, sam.init(sharded), *examples)
        assert d["out"].sharding.spec == P(axis)
        average = state.ascent_state[0].gradient_ema
        assert average["in"].sharding.spec == P(None, axis)
    assert_trees_close(jax.device_get(d), expected, rtol=1e-9, atol=1e-12)


def test_random_numbers_are_drawn_where_they_are_needed():
    """Each device draws its part, also of the mask that rounds to bfloat16."""
    mesh = jax.make_mesh((8,), ("data",))
    size = 2**16
    with jax.set_mesh(mesh):
        w = jax.device_put(jnp.ones(size, jnp.bfloat16), P("data"))
        for sam in (
            sam_optax.sam(0.1, stochastic_rounding=0),
            sam_optax.random_sam(0.1, stochastic_rounding=0),
            sam_optax.esam(0.1, stochastic_rounding=0),
        ):

            def step(w, state, sam=sam):
                def grad_fn(w):
                    return 2 * w

                return sam.update(grad_fn(w), state, w, grad_fn=grad_fn)

            compiled = jax.jit(step).lower(w, sam.init(w)).compile()
            part = 4 * size / 8
            assert compiled.memory_analysis().temp_size_in_bytes < 10 * part


@one_of_each_kind_or_all
def test_parameters_sharded_over_explicit_axes(names):
    """Every method gives the same updates and state, and keeps their layout."""
    init, update = updates_of(names)
    update = jax.jit(update)
    params = {"a": jnp.arange(16.0).reshape(8, 2), "b": jnp.arange(4.0)}
    expected = update(init(params), params)
    with jax.set_mesh(explicit_mesh()):
        sharded = jax.device_put(params, P("data"))
        actual = update(init(sharded), sharded)
        for name, (updates, state) in actual.items():
            for leaf in [*jax.tree.leaves(updates), *jax.tree.leaves(state)]:
                if leaf.shape in {(8, 2), (4,)}:
                    assert leaf.sharding.spec[0] == "data", (name, leaf)
        actual = update({name: state for name, (_, state) in actual.items()}, sharded)
    again = update({name: state for name, (_, state) in expected.items()}, params)
    assert_trees_close(jax.device_get(actual), again, rtol=1e-9, atol=1e-12)
