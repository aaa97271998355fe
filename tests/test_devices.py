"""The same numbers on many devices as on one, and one perturbation per group.

The device table is that of `benchmarks/device_table.py`, over every deterministic
method. What it does not show is beside it: other layouts of the mesh, the compiled
collectives, random methods, non-finite groups, accumulation, and what is refused.
"""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sam_optax
from lab import all_finite, assert_trees_close, assert_trees_equal
from sam_optax._groups import default_map

PATH = pathlib.Path(__file__).parent.parent / "benchmarks" / "device_table.py"


def load_table():
    spec = importlib.util.spec_from_file_location("device_table", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table = load_table()
ALL = list(table.METHODS)
KINDS = ["sam", "fsam", "gsam", "look_sam", "ssam"]  # one of each


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@functools.cache
def reference(per_group):
    """Parameters by method, from one device."""
    (params,) = table.one_device(ALL, per_group)
    return params


def assert_like_one_device(replicas, per_group, methods=ALL):
    for method in methods:
        own = [replica[method] for replica in replicas]
        assert table.difference(own[0], reference(per_group)[method]) <= 1e-10, method
        assert table.are_equal(own), method


# --- The table.


def test_one_perturbation_per_group_is_another_trajectory():
    """Or the two halves of the table would be one."""
    for method in ALL:
        one, own = reference(False)[method], reference(True)[method]
        assert table.difference(one, own) > 1e-5, method


@pytest.mark.parametrize("per_group", [False, True], ids=["one", "per_group"])
@pytest.mark.parametrize("setting", table.SETTINGS)
def test_every_setting_gives_the_numbers_of_one_device(setting, per_group):
    assert_like_one_device(table.SETTINGS[setting](ALL, per_group), per_group)


def test_two_processes_give_the_numbers_of_one():
    for per_group, replicas in table.two_processes(ALL).items():
        assert len(replicas) == 2
        assert_like_one_device(replicas, per_group)


@pytest.mark.parametrize("map_groups", ["vmap", "scan", None])
def test_groups_give_the_same_numbers_however_they_run(map_groups):
    replicas = table.one_device(KINDS, True, map_groups)
    assert_like_one_device(replicas, True, KINDS)


def test_one_group_of_the_whole_batch_is_one_perturbation():
    start, step = table.make_step(KINDS, m=table.DEVICES * table.GROUP)
    params = table.train(jax.jit(step), start(table.make_params()))
    assert_like_one_device([params], False, KINDS)


@pytest.mark.parametrize(
    ("devices", "count", "expected"),
    [(1, 16, "unroll"), (1, 17, "scan"), (2, 4, "vmap"), (2, 40, "vmap")],
)
def test_how_groups_run_by_default(monkeypatch, devices, count, expected):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert default_map(count) == expected
    alone = "unroll" if count <= 16 else "scan"
    assert default_map(count, is_mapped=True) == alone


@pytest.mark.parametrize("map_groups", ["vmap", "unroll", "scan"])
def test_half_precision_gradients_are_averaged_in_float32(map_groups):
    """A sum of 1024 in bfloat16 stops at 256, and one in float16 overflows."""

    def loss_fn(w, x):
        return jnp.mean(jnp.sum(w * x, axis=-1))

    for dtype, size, value in (("bfloat16", 1024, 1.0), ("float16", 64, 2000.0)):
        count = size if map_groups != "unroll" else 64
        x = jnp.full((count, 2), value, dtype)
        helper = sam_optax.value_and_ascent_grad(loss_fn, m=1, map_groups=map_groups)
        _, g, extra = helper(jnp.ones(2, dtype), x)
        assert g.dtype == dtype
        np.testing.assert_array_equal(g.astype(float), value)
        again = extra["grad_fn"](jnp.ones(2, dtype)).gradient
        np.testing.assert_array_equal(again.astype(float), value)


# --- Groups of devices, and groups on each device.


def trained_by_pmap(methods=KINDS, **options):
    start, step = table.make_step(methods, axis_name="data", **options)
    params = table.train(
        jax.pmap(step, axis_name="data", devices=jax.devices()[: table.DEVICES]),
        jax.tree.map(
            lambda x: jnp.stack([x] * table.DEVICES), start(table.make_params())
        ),
        lambda batch: [x.reshape(table.DEVICES, -1, *x.shape[1:]) for x in batch],
    )
    return jax.tree.map(lambda x: x[0], params)


def trained_with_groups_of(m, methods=KINDS):
    start, step = table.make_step(methods, m=m, map_groups="unroll")
    return table.train(jax.jit(step), start(table.make_params()))


def test_two_devices_may_share_a_perturbation():
    """As in the original code, by index groups, or along an axis of a larger mesh."""
    expected = trained_with_groups_of(2 * table.GROUP)
    by_index = trained_by_pmap(axis_index_groups=[[0, 1], [2, 3]])
    assert_trees_close(by_index, expected, atol=1e-10)

    names = ("pair", "member")
    start, step = table.make_step(KINDS, axis_name=names, sync_perturbation="member")
    mapped = jax.shard_map(
        step,
        mesh=table.make_mesh(pair=2, member=2),
        in_specs=(P(), P(names), P(names)),
        out_specs=P(),
    )
    by_axis = table.train(jax.jit(mapped), start(table.make_params()))
    assert_trees_close(by_axis, expected, atol=1e-10)


@pytest.mark.parametrize("map_groups", ["vmap", "unroll", "scan"])
def test_groups_of_examples_on_each_of_several_devices(map_groups):
    options = {"m": 2, "sync_perturbation": False, "map_groups": map_groups}
    expected = trained_with_groups_of(2)
    assert_trees_close(trained_by_pmap(**options), expected, atol=1e-10)
    start, step = table.make_step(KINDS, axis_name="data", **options)
    mapped = jax.shard_map(
        step,
        mesh=table.make_mesh(data=table.DEVICES),
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
    )
    params = table.train(jax.jit(mapped), start(table.make_params()))
    assert_trees_close(params, expected, atol=1e-10)


# --- Layouts under jit.


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


@pytest.mark.parametrize("per_group", [False, True], ids=["one", "per_group"])
@pytest.mark.parametrize("layout", ["FSDP", "tensor parallel", "both"])
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


def explicit_mesh():
    """The default of `jax.make_mesh`, where shardings are part of types."""
    mesh = jax.make_mesh(
        (table.DEVICES,), ("data",), devices=jax.devices()[: table.DEVICES]
    )
    assert mesh.axis_types == (AxisType.Explicit,)
    return mesh


@pytest.mark.parametrize("map_groups", [None, "vmap", "unroll", "scan"])
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
    expected = trained_with_groups_of(m, ["fsam"])
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
        sam_optax.k_sam(3),
        sam_optax.k_sam(4),
        sam_optax.largest_increase(0.5),
        sam_optax.sub_batch(0.25),
        sam_optax.sub_batch(0.3),
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


def updates_of_all_methods():
    """(init, update), with a gradient that is a function of every entry alone."""
    optimizers = {name: table.make_optimizer(name)[1] for name in ALL}

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


def test_no_parameter_is_gathered():
    """Of all methods' own arithmetic, only numbers leave a device, never arrays."""
    mesh = table.make_mesh(data=table.DEVICES)
    size = 4096
    params = {
        "a": jax.device_put(jnp.ones((size, 2)), NamedSharding(mesh, P("data"))),
        "b": jax.device_put(jnp.ones(size), NamedSharding(mesh, P("data"))),
    }
    init, update = updates_of_all_methods()
    compiled = jax.jit(update).lower(init(params), params).compile()
    text = compiled.as_text()
    assert "all-reduce" in text
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
    # A few shards of temporaries for each method, where one gathered tree is DEVICES.
    shard = 3 * size * 8 / table.DEVICES
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 2 * len(ALL) * shard


def test_parameters_sharded_over_explicit_axes():
    """Every method gives the same updates and state, and keeps their layout."""
    init, update = updates_of_all_methods()
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


# --- Random methods.

RANDOM = {
    "random_sam": lambda: sam_optax.random_sam(0.2),
    "rsam": lambda: sam_optax.rsam(0.2),
    "esam": lambda: sam_optax.esam(0.2),
    "ssam": lambda: sam_optax.ssam(0.2, dynamic=True, refresh_every=1),
    "rst": lambda: sam_optax.rst(0.2, probability=0.5),
}


@pytest.mark.parametrize("name", ["random_sam", "rsam", "esam"])
def test_each_group_draws_its_own_noise(name):
    """All groups see the same example here, so only the noise differs."""
    sam = RANDOM[name]()
    seen = []

    def loss_fn(w, x):
        return jnp.mean(x @ w**2)

    w = jnp.arange(1.0, 9.0)
    helper = sam_optax.value_and_ascent_grad(loss_fn, m=1, map_groups="unroll")
    _, g, extra = helper(w, jnp.ones((4, 8)))

    def per_group(path):
        def recorded(g, evaluate, index):
            points = []
            result = path(g, lambda p: points.append(p) or evaluate(p), index)
            seen.append(points[-1])
            return result

        return extra["per_group"](recorded)

    sam.update(g, sam.init(w), w, **(extra | {"per_group": per_group}))
    assert len(seen) == 4
    for i in range(4):
        for j in range(i):
            assert np.max(np.abs(seen[i] - seen[j])) > 1e-3


@pytest.mark.parametrize(
    ("name", "m"), [*[(name, None) for name in RANDOM], ("esam", 2), ("rsam", 2)]
)
def test_random_methods_agree_between_groups_and_devices(name, m):
    """With noise of their own for each group, and carried state that is one for all."""
    sam = RANDOM[name]()
    tx = optax.chain(sam, optax.sgd(0.05, momentum=0.9))
    options = {"batch_argnums": (1, 2)}
    grouped = sam_optax.sam_value_and_grad(
        table.loss_fn, sam, m=m or table.GROUP, **options
    )
    options |= {"axis_name": "data", "sync_perturbation": False}
    per_device = sam_optax.sam_value_and_grad(table.loss_fn, sam, m=m, **options)

    def make(helper):
        def step(params, state, x, y):
            _, grads = helper(params, x, y, opt_state=state)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return step

    params = table.make_params()
    expected = params, tx.init(params)
    run = jax.jit(make(grouped))
    for t in range(3):
        expected = run(*expected, *table.make_batch(t))
    states = jax.tree.map(
        lambda x: jnp.stack([x] * table.DEVICES), (params, tx.init(params))
    )
    mapped = jax.pmap(
        make(per_device), axis_name="data", devices=jax.devices()[: table.DEVICES]
    )
    for t in range(3):
        split = [
            x.reshape(table.DEVICES, -1, *x.shape[1:]) for x in table.make_batch(t)
        ]
        states = mapped(*states, *split)
    for device in range(table.DEVICES):
        replica = jax.tree.map(lambda x, device=device: x[device], states)
        assert_trees_close(replica, expected, atol=1e-10)


# --- One group that is not finite.


@pytest.mark.parametrize("setting", ["m", "pmap"])
@pytest.mark.parametrize("name", ["fsam", "vasso", "look_sam", "ae_sam", "sam_full"])
def test_a_nan_in_one_group_leaves_carried_state_everywhere(name, setting):
    sam, _ = table.make_optimizer(name)
    options = (
        {"m": table.GROUP}
        if setting == "m"
        else {"axis_name": "data", "sync_perturbation": False}
    )
    helper = sam_optax.sam_value_and_grad(
        table.loss_fn, sam, batch_argnums=(1, 2), **options
    )

    def step(params, state, x, y):
        _, grads = helper(params, x, y, opt_state=state)
        return sam.update(grads, state, params)

    def floats(state):
        return [
            x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)
        ]

    params = table.make_params()
    x, y = table.make_batch(0)
    broken = np.where(np.arange(len(y)) == 9, np.nan, y)  # in the third group
    if setting == "m":
        run, states = jax.jit(step), sam.init(params)
    else:
        devices = jax.devices()[: table.DEVICES]
        mapped = jax.pmap(step, axis_name="data", devices=devices)

        def run(params, state, x, y):
            return mapped(params, state, x.reshape(4, 4, 8), y.reshape(4, 4))

        params, states = jax.tree.map(
            lambda x: jnp.stack([x] * table.DEVICES), (params, sam.init(params))
        )
    d, states = run(params, states, x, y)
    assert all_finite((d, states))
    d, after = run(params, states, x, broken)
    assert not any(np.any(np.isfinite(leaf)) for leaf in jax.tree.leaves(d))
    assert floats(states)
    assert_trees_equal(floats(after), floats(states))


# --- What the helper returns.


def test_the_value_is_that_of_the_global_batch_and_aux_gains_an_axis():
    def loss_fn(w, batch, key, mode, *, scale):
        assert mode == "train"
        x, y = batch["x"], batch["y"]
        shifted = y + jax.random.normal(key, ())
        return scale * table.loss_fn(w, x, shifted), {"first": x[0], "size": len(x)}

    x, y = table.make_batch(0)
    batch, key = {"x": x, "y": y}, jax.random.key(0)
    params, sam = table.make_params(), sam_optax.sam()
    expected = loss_fn(params, batch, key, "train", scale=2.0)[0]
    for map_groups in ("vmap", "unroll", "scan"):
        helper = sam_optax.sam_value_and_grad(
            loss_fn, sam, has_aux=True, m=4, map_groups=map_groups
        )

        @jax.jit
        def run(params, batch, key, helper=helper):
            state = sam.init(params)
            return helper(params, batch, key, "train", scale=2.0, opt_state=state)[0]

        loss, aux = run(params, batch, key)
        np.testing.assert_allclose(loss, expected, rtol=1e-12)
        np.testing.assert_array_equal(aux["first"], x[::4])
        np.testing.assert_array_equal(aux["size"], [4, 4, 4, 4])


def test_the_loss_is_averaged_over_the_axis():
    helper = sam_optax.sam_value_and_grad(
        table.loss_fn, sam_optax.sam(), axis_name="data", report=True
    )

    def step(params, x, y):
        loss, grads = helper(params, x, y, opt_state=sam_optax.sam().init(params))
        return loss, grads.gradients, grads.report

    mapped = jax.shard_map(
        step,
        mesh=table.make_mesh(data=table.DEVICES),
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
    )
    x, y = table.make_batch(0)
    loss, d, report = jax.jit(mapped)(table.make_params(), x, y)
    plain = sam_optax.sam_value_and_grad(table.loss_fn, sam_optax.sam(), report=True)
    state = sam_optax.sam().init(table.make_params())
    expected, grads = plain(table.make_params(), x, y, opt_state=state)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    assert_trees_close(d, grads.gradients, rtol=1e-9, atol=1e-12)
    assert_trees_close(report, grads.report, rtol=1e-7)


def test_the_second_door_takes_groups_too():
    sam, tx = table.make_optimizer("fsam")
    del sam
    gradients = sam_optax.value_and_ascent_grad(
        table.loss_fn, batch_argnums=(1, 2), m=table.GROUP
    )

    @jax.jit
    def step(states, x, y):
        params, state = states["fsam"]
        _, g, extra = gradients(params, x, y)
        updates, state = tx.update(g, state, params, **extra)
        return {"fsam": (optax.apply_updates(params, updates), state)}

    params = table.make_params()
    trained = table.train(step, {"fsam": (params, tx.init(params))})
    assert_like_one_device([trained], True, ["fsam"])


@pytest.mark.parametrize("map_groups", ["vmap", "unroll", "scan"])
def test_a_step_of_groups_that_skips_descends_on_all_of_them(map_groups):
    """Also where g is that of a part of each group, and taken anew."""
    params, (x, y) = table.make_params(), table.make_batch(0)
    whole = jax.grad(table.loss_fn)(params, x, y)
    for rule in (None, sam_optax.sub_batch(0.5)):
        helper = sam_optax.sam_value_and_grad(
            table.loss_fn,
            sam_optax.sam(0.2),
            m=4,
            map_groups=map_groups,
            data=rule,
            batch_argnums=(1, 2),
        )
        state = sam_optax.sam(0.2).init(params)
        _, grads = helper(params, x, y, opt_state=state, ascend=False)
        assert_trees_close(grads.gradients, whole, rtol=1e-9, atol=1e-12)


def test_a_report_of_groups_averages_them():
    x, y = table.make_batch(0)
    params, sam = table.make_params(), sam_optax.sam(0.2)
    options = {"report": True, "batch_argnums": (1, 2)}
    helper = sam_optax.sam_value_and_grad(table.loss_fn, sam, m=np.int64(4), **options)
    alone = sam_optax.sam_value_and_grad(table.loss_fn, sam, **options)
    report = helper(params, x, y, opt_state=sam.init(params))[1].report
    each = [
        alone(params, x[i : i + 4], y[i : i + 4], opt_state=sam.init(params))[1].report
        for i in range(0, 16, 4)
    ]
    for field in ("perturbed_loss", "surrogate_gap", "perturbation_norm"):
        mean = np.mean([getattr(r, field) for r in each])
        np.testing.assert_allclose(getattr(report, field), mean, rtol=1e-6)


def test_data_rules_apply_within_each_group():
    def losses(w, x, y):
        hidden = jnp.tanh(x @ w["in"] + w["shift"])
        return jnp.square(hidden @ w["out"] - y)

    params, sam = table.make_params(), sam_optax.sam(0.2)
    x, y = table.make_batch(0)
    options = {"batch_argnums": (1, 2), "data": sam_optax.k_sam(2)}
    alone = sam_optax.sam_value_and_grad(losses, sam, **options)
    each = [
        alone(params, x[i : i + 4], y[i : i + 4], opt_state=sam.init(params))[1]
        for i in range(0, 16, 4)
    ]
    expected = jax.tree.map(lambda *d: sum(d) / 4, *[d.gradients for d in each])
    for map_groups in ("vmap", "unroll", "scan"):
        helper = sam_optax.sam_value_and_grad(
            losses, sam, m=4, map_groups=map_groups, **options
        )
        _, grads = helper(params, x, y, opt_state=sam.init(params))
        assert_trees_close(grads.gradients, expected, rtol=1e-9, atol=1e-12)


# --- Accumulation.


def test_multi_steps_after_sam_is_one_perturbation_per_micro_batch():
    """Four micro-batches of four are one batch of sixteen with m = 4."""
    sam = sam_optax.sam(0.2)
    tx = optax.chain(sam, optax.MultiSteps(optax.sgd(0.05, momentum=0.9), 4))
    helper = sam_optax.sam_value_and_grad(table.loss_fn, sam)

    @jax.jit
    def micro_step(params, state, x, y):
        _, grads = helper(params, x, y, opt_state=state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = table.make_params()
    state = tx.init(params)
    for t in range(table.STEPS):
        x, y = table.make_batch(t)
        for i in range(0, 16, 4):
            params, state = micro_step(params, state, x[i : i + 4], y[i : i + 4])
    # Optax's running mean has weights in float32.
    assert table.difference(params, reference(True)["sam"]) <= 1e-7


def test_accumulation_inside_of_the_loss_is_the_large_batch():
    """The loss goes through micro-batches one after another; each of its two gradients
    then is that of the whole batch."""

    def accumulated(w, x, y):
        micro = (x.reshape(4, 4, -1), y.reshape(4, 4))
        losses = jax.lax.map(jax.checkpoint(lambda b: table.loss_fn(w, *b)), micro)
        return jnp.mean(losses)

    sam, tx = table.make_optimizer("sam")
    helper = sam_optax.sam_value_and_grad(accumulated, sam)

    @jax.jit
    def step(states, x, y):
        params, state = states["sam"]
        _, grads = helper(params, x, y, opt_state=state)
        updates, state = tx.update(grads, state, params)
        return {"sam": (optax.apply_updates(params, updates), state)}

    params = table.make_params()
    trained = table.train(step, {"sam": (params, tx.init(params))})
    assert_like_one_device([trained], False, ["sam"])


# --- What it costs.


@pytest.mark.parametrize("map_groups", ["vmap", "unroll", "scan"])
def test_groups_cost_no_further_gradient(map_groups):
    """The compiler counts the body of a loop once, for `scan` that of one group."""

    def wide(w, x):
        return jnp.mean(jnp.tanh(jnp.tanh(x @ w) @ w))

    w, x = jnp.eye(64), jnp.ones((32, 64))
    sam = sam_optax.sam()
    helper = sam_optax.sam_value_and_grad(wide, sam, m=8, map_groups=map_groups)

    def step(w, x):
        loss, grads = helper(w, x, opt_state=sam.init(w))
        return loss, grads.gradients

    def count(function):
        cost = jax.jit(function).lower(w, x).compile().cost_analysis()
        return cost["flops"]

    examples = 8 if map_groups == "scan" else 32
    plain = jax.jit(jax.grad(wide)).lower(w, x[:examples]).compile().cost_analysis()
    forward = jax.jit(wide).lower(w, x[:examples]).compile().cost_analysis()["flops"]
    extra = forward if map_groups == "scan" else 0
    assert count(step) == pytest.approx(2 * plain["flops"] + extra, rel=0.15)


def test_one_after_another_does_not_keep_every_groups_gradient():
    """Of parameters that dominate: the gradients of sixteen groups, or of one."""

    def loss_fn(w, x):
        return jnp.mean(jnp.tanh(x @ w))

    w, x = jnp.ones((256, 256)), jnp.ones((16, 256))
    sam = sam_optax.sam()
    temporary = {}
    for map_groups in ("vmap", "scan"):
        helper = sam_optax.sam_value_and_grad(loss_fn, sam, m=1, map_groups=map_groups)

        def step(w, x, helper=helper):
            return helper(w, x, opt_state=sam.init(w))[1].gradients

        compiled = jax.jit(step).lower(w, x).compile()
        temporary[map_groups] = compiled.memory_analysis().temp_size_in_bytes
    assert temporary["scan"] < 6 * w.nbytes
    assert temporary["vmap"] > 16 * w.nbytes


# --- What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": 0}, "m must be an integer >= 1"),
        ({"m": 4, "axis_name": "data"}, "pass sync_perturbation=False with m="),
        ({"map_groups": "vmap"}, "pass m= too"),
        ({"m": 4, "map_groups": "pmap"}, "must be one of 'vmap', 'unroll', 'scan'"),
        ({"sync_perturbation": False}, "pass its axis_name= too"),
        ({"axis_index_groups": [[0], [1]]}, "pass its axis_name= too"),
        (
            {"axis_name": "data", "sync_perturbation": "model"},
            r"some of the names in axis_name, \('data',\), got 'model'",
        ),
        (
            {"axis_name": "data", "axis_index_groups": [[0, 1], [2]]},
            "lists of one length that hold every index",
        ),
        (
            {"axis_name": ("a", "b"), "axis_index_groups": [[0], [1]]},
            "along one axis_name",
        ),
    ],
)
def test_contradictory_options_are_errors_when_building(options, message):
    with pytest.raises(ValueError, match=message):
        sam_optax.sam_value_and_grad(table.loss_fn, sam_optax.sam(), **options)


def test_index_groups_must_hold_the_whole_axis():
    helper = sam_optax.value_and_ascent_grad(
        table.loss_fn, axis_name="data", axis_index_groups=[[0, 1]]
    )
    devices = jax.devices()[: table.DEVICES]
    run = jax.pmap(
        lambda x, y: helper(table.make_params(), x, y)[1],
        axis_name="data",
        devices=devices,
    )
    x, y = table.make_batch(0)
    with pytest.raises(ValueError, match="it has 4, and the lists 2"):
        run(x.reshape(4, 4, 8), y.reshape(4, 4))


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        ({}, {"m": 5}, "m must divide the batch: 16 examples do not make groups of 5"),
        ({}, {"m": 4, "batch_argnums": None}, "Argument 2 of loss_fn has a first axis"),
        ({"ascent_batch": table.make_batch(1)}, {"m": 4}, "pass one of them"),
    ],
)
def test_batches_that_do_not_fit_are_errors_when_traced(call, options, message):
    helper = sam_optax.value_and_ascent_grad(
        table.loss_fn, **({"batch_argnums": (1, 2)} | options)
    )
    with pytest.raises(ValueError, match=message):
        helper(table.make_params(), *table.make_batch(0), **call)
