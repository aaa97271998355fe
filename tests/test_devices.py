"""The same numbers on many devices, along mapped axes, and on two processes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import sam_optax
from devices import (
    ALL,
    KINDS,
    REST,
    assert_like_one_device,
    table,
    trained_with_groups_of,
)
from lab import all_finite, assert_trees_close, assert_trees_equal, floats

pytestmark = pytest.mark.usefixtures("double_precision")

# --- The table.


def in_settings():
    """The methods of each kind in every setting, and slowly the rest in four."""
    names = {False: "one", True: "per_group"}
    some = [("pmap", False), ("jit, FSDP", False), ("shard_map", True), ("jit", True)]
    for setting, per_group in itertools.product(table.SETTINGS, names):
        marks = pytest.mark.slow if "no vma" in setting else ()
        case = f"{setting}-{names[per_group]}"
        yield pytest.param(setting, per_group, KINDS, marks=marks, id=f"{case}-kinds")
        if (setting, per_group) in some:
            marks = pytest.mark.slow
            yield pytest.param(setting, per_group, REST, marks=marks, id=f"{case}-rest")


@pytest.mark.parametrize(("setting", "per_group", "methods"), list(in_settings()))
def test_every_setting_gives_the_numbers_of_one_device(setting, per_group, methods):
    if (setting, methods) == ("shard_map", KINDS):
        methods += ("ssam",)  # whose branches must vary over the same axes
    replicas = table.SETTINGS[setting](methods, per_group)
    assert_like_one_device(replicas, per_group, methods)


@pytest.mark.slow
def test_every_method_gives_the_numbers_of_one_device():
    """Where groups are those of the devices, whose means come after the descent."""
    assert_like_one_device(table.SETTINGS["pmap"](REST, True), True, REST)


@pytest.mark.parametrize(
    "methods", [("look_sam",), pytest.param(ALL, marks=pytest.mark.slow)]
)
def test_two_processes_give_the_numbers_of_one(methods):
    for per_group, replicas in table.two_processes(methods).items():
        assert len(replicas) == 2
        assert_like_one_device(replicas, per_group, methods)


# --- Groups of devices, and groups on each device.


def trained_by_pmap(methods, **options):
    start, step = table.make_step(methods, axis_name="data", **options)
    params = table.train(
        jax.pmap(step, axis_name="data", devices=jax.devices()[: table.DEVICES]),
        jax.tree.map(
            lambda x: jnp.stack([x] * table.DEVICES), start(table.make_params())
        ),
        lambda batch: [x.reshape(table.DEVICES, -1, *x.shape[1:]) for x in batch],
    )
    return jax.tree.map(lambda x: x[0], params)


def test_two_devices_may_share_a_perturbation():
    """As in the original code, by index groups, or along an axis of a larger mesh."""
    methods = ("fsam", "gsam")
    expected = trained_with_groups_of(2 * table.GROUP, methods)
    by_index = trained_by_pmap(methods, axis_index_groups=[[0, 1], [2, 3]])
    assert_trees_close(by_index, expected, atol=1e-10)

    names = ("pair", "member")
    start, step = table.make_step(methods, axis_name=names, sync_perturbation="member")
    mapped = jax.shard_map(
        step,
        mesh=table.make_mesh(pair=2, member=2),
        in_specs=(P(), P(names), P(names)),
        out_specs=P(),
    )
    by_axis = table.train(jax.jit(mapped), start(table.make_params()))
    assert_trees_close(by_axis, expected, atol=1e-10)


@pytest.mark.parametrize(
    "map_groups",
    [
        "vmap",
        *(pytest.param(how, marks=pytest.mark.slow) for how in ("unroll", "scan")),
    ],
)
def test_groups_of_examples_on_each_of_several_devices(map_groups):
    methods = ("fsam", "look_sam")
    options = {"m": 2, "sync_perturbation": False, "map_groups": map_groups}
    expected = trained_with_groups_of(2, methods)
    if map_groups == "unroll":  # a map of each kind is enough for pmap
        actual = trained_by_pmap(methods, **options)
        assert_trees_close(actual, expected, atol=1e-10)
    start, step = table.make_step(methods, axis_name="data", **options)
    mapped = jax.shard_map(
        step,
        mesh=table.make_mesh(data=table.DEVICES),
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
    )
    params = table.train(jax.jit(mapped), start(table.make_params()))
    assert_trees_close(params, expected, atol=1e-10)


# --- Random methods.


RANDOM = {
    "random_sam": lambda: sam_optax.random_sam(0.2),
    "rsam": lambda: sam_optax.rsam(0.2),
    "esam": lambda: sam_optax.esam(0.2),
    "ssam": lambda: sam_optax.ssam(0.2, dynamic=True, refresh_every=1),
    "rst": lambda: sam_optax.rst(0.2, probability=0.5),
    "tsam": lambda: sam_optax.tsam(0.2, 0.2, samples=2),
    "lpf_sgd": lambda: sam_optax.lpf_sgd(0.2),
    "universal_sam": lambda: sam_optax.universal_sam(0.2, 1e-3, kind="frobenius"),
    "entropy_sgd": lambda: sam_optax.entropy_sgd(0.2, 0.1, steps=2, as_released=True),
}
SLOW = (
    "random_sam",
    "rst",
    "esam",
    "tsam",
    "rsam",
    "lpf_sgd",
    "universal_sam",
    "entropy_sgd",
)


@pytest.mark.parametrize(
    ("name", "m"),
    [
        *[(name, None) for name in RANDOM if name not in SLOW],
        ("rsam", 2),
        *[pytest.param(name, None, marks=pytest.mark.slow) for name in SLOW],
        pytest.param("esam", 2, marks=pytest.mark.slow),
    ],
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


# --- What the devices see together.


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *[(name, "m") for name in ("fsam", "vasso", "look_sam", "ae_sam", "sam_full")],
        *[(name, "pmap") for name in ("fsam", "look_sam")],
    ],
)
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


# --- What is refused.


@pytest.mark.parametrize("check_vma", [True, False])
def test_parts_of_parameters_are_not_averaged(check_vma):
    """Types say what differs between devices only where they are checked."""
    sam = sam_optax.sam(0.1)

    def loss_fn(w, x):
        whole = jax.lax.all_gather(w["w"], "data", tiled=True)
        return jnp.mean((x @ whole) ** 2)

    helper = sam_optax.sam_value_and_grad(loss_fn, sam, axis_name="data")

    def step(w, x):
        return helper(w, x, opt_state=sam.init(w))[1].gradients

    mapped = jax.shard_map(
        step,
        mesh=table.make_mesh(data=2),
        in_specs=(P("data"), P("data")),
        out_specs=P("data") if check_vma else P(),
        check_vma=check_vma,
    )
    w, x = {"w": jnp.arange(4.0)}, jnp.ones((2, 4))
    # Parts along another axis than that of the batch are no mistake.
    along_model = jax.shard_map(
        lambda w, x: (
            sam_optax.sam_value_and_grad(
                lambda w, x: jnp.mean((x * w["w"].sum()) ** 2), sam, axis_name="data"
            )(w, x, opt_state=sam.init(w))[1].gradients
        ),
        mesh=table.make_mesh(data=2, model=2),
        in_specs=(P("model"), P("data")),
        out_specs=P("model"),
        check_vma=check_vma,
    )
    assert jax.eval_shape(along_model, w, x)["w"].shape == (4,)
    if check_vma:
        with pytest.raises(ValueError, match=r"params\['w'\] differs along the axis"):
            jax.jit(mapped)(w, x)
    else:
        assert jax.eval_shape(mapped, w, x)["w"].shape == (2,)


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
