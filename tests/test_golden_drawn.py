"""Trajectories of the authors' own code whose random numbers are stored with them.

Where a method draws standard normal numbers, it gets the stored ones instead, found by
the key that it draws with. So the keys are under test as well: of a method that draws
with another key, twice with one, or in another group, nothing is found.
"""

import json
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from doors import DOORS
from sam_optax import _tree
from sam_optax._random import key_stream
from test_golden import GOLDEN, NAMES, base_optimizer, mean_loss

CASES = json.loads((GOLDEN / "drawn.json").read_text())
STEPS, BATCH = 20, 16


def drawn_in(case):
    return [pytest.param(c, id=c["name"]) for c in CASES if c["method"] in case]


# --- Numbers by key.


@contextmanager
def stored_noise(monkeypatch, keys, noise, name="normal_like"):
    """Draws that return what is stored for their key, and NaN if there is nothing.

    keys: arrays of key data, (draws, ...); noise: a tree with a first axis of draws.
    """
    noise = {
        n: np.asarray(x).reshape(len(keys), *x.shape[2:]) for n, x in noise.items()
    }
    keys = np.asarray(keys)

    def draw(key, tree):
        is_ours = jnp.all(jax.random.key_data(key) == keys, axis=-1)

        def look_up(stored):
            found = jnp.asarray(stored)[jnp.argmax(is_ours)]
            return jnp.where(jnp.any(is_ours), found, jnp.nan)

        found = {n: look_up(noise[n]) for n in NAMES}
        shapes = jax.tree.map(jnp.shape, tree)
        assert shapes == jax.tree.map(jnp.shape, found)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(_tree, name, draw)
        yield


def keys_of(name, steps, group=None):
    """Key data of each step of one part, with the key 0."""
    stream = key_stream(0, name)
    data, keys = stream.start(), []
    for _ in range(steps):
        key, data = stream.next(data, group)
        keys.append(key)
    return keys


def folded(keys, count):
    """(steps · count, ...) key data: each key with the numbers of its samples."""
    return [
        jax.random.key_data(jax.random.fold_in(key, i))
        for key in keys
        for i in range(count)
    ]


def interleaved(streams):
    """(steps · streams, ...) key data of several parts, in the order of the draws."""
    steps = zip(*streams, strict=True)
    return [jax.random.key_data(key) for keys in steps for key in keys]


# --- The methods.


def noise_of(data):
    return {name: data[f"noise_{name}"] for name in NAMES}


def start_of(data):
    return {name: jnp.asarray(data[f"init_{name}"]) for name in NAMES}


def assert_reproduces(case, data, sam, door, **options):
    tx = optax.chain(sam, base_optimizer(**case["base_optimizer"]))
    # With an option, door 2 passes on the losses as well.
    options = {"batch_argnums": (1, 2)} | options
    step = jax.jit(door(sam, tx, mean_loss, **options))
    params = start_of(data)
    state = tx.init(params)
    for t, batch in enumerate(zip(data["X"], data["y"], strict=True)):
        params, state, loss = step(params, state, *batch)
        np.testing.assert_allclose(loss, data["loss"][t], rtol=0, atol=1e-10)
        assert_at(params, data, t)


def assert_at(params, data, t, prefix="params"):
    for name in NAMES:
        assert params[name].dtype == jnp.float64
        np.testing.assert_allclose(
            params[name], data[f"{prefix}_{name}"][t], rtol=0, atol=1e-10
        )


with_doors = pytest.mark.parametrize(
    "door",
    [DOORS["door1"], pytest.param(DOORS["door2"], marks=pytest.mark.slow)],
    ids=DOORS,
)


@with_doors
@pytest.mark.parametrize("how", ["unroll", "vmap", "scan"])
@pytest.mark.parametrize("case", drawn_in(["lpfsgd"]))
def test_lpf_sgd(case, door, how, monkeypatch):
    """M draws, each on its part of the batch, are M groups."""
    data, parts = np.load(GOLDEN / case["file"]), case["hyperparameters"]["M"]
    with jax.enable_x64(True):
        streams = [
            keys_of("replace_by_filter_noise", STEPS, group) for group in range(parts)
        ]
        keys = interleaved(streams)
        # One more key: that of the step from the means, which only moves the state.
        sam = sam_optax.lpf_sgd(case["hyperparameters"]["std"])
        with stored_noise(monkeypatch, keys, noise_of(data)):
            options = {"m": BATCH // parts, "map_groups": how}
            assert_reproduces(case, data, sam, door, **options)


@with_doors
@pytest.mark.parametrize("case", drawn_in(["tsam"]))
def test_tsam(case, door, monkeypatch):
    data, values = np.load(GOLDEN / case["file"]), dict(case["hyperparameters"])
    samples = values.pop("num_samples")
    with jax.enable_x64(True):
        # Their noise has a standard deviation for each entry, ours for all together.
        size = optax.tree.size(start_of(data))
        values["sigma"] = values.pop("scaling") * size**0.5
        sam = sam_optax.tsam(**values, samples=samples)
        keys = interleaved(
            [keys_of(f"ascend_from_noise tsam {i}", STEPS) for i in range(samples)]
        )
        with stored_noise(monkeypatch, keys, noise_of(data)):
            assert_reproduces(case, data, sam, door)


@with_doors
@pytest.mark.parametrize(
    "case", drawn_in(["universal_sam_trace", "universal_sam_det", "universal_sam_fro"])
)
def test_universal_sam(case, door, monkeypatch):
    data, values = np.load(GOLDEN / case["file"]), dict(case["hyperparameters"])
    kinds = {"trace": "trace", "det": "determinant", "fro": "frobenius"}
    values["kind"] = kinds[case["method"].removeprefix("universal_sam_")]
    values["samples"] = values.pop("n_samples")
    values["half_width"] = half = values.pop("half_cube_len", 1.0)
    noise, draw = noise_of(data), "normal_like"
    if values["kind"] == "determinant":  # what is drawn is uniform on [0, 1)
        noise = {name: (x / half + 1) / 2 for name, x in noise.items()}
        draw = "uniform_like"
    with jax.enable_x64(True):
        sam = sam_optax.universal_sam(**values, as_released=True)
        keys = folded(keys_of("universal_sam", STEPS), values["samples"])
        with stored_noise(monkeypatch, keys, noise, draw):
            assert_reproduces(case, data, sam, door)


@with_doors
@pytest.mark.parametrize("case", drawn_in(["entropysgd"]))
def test_entropy_sgd(case, door, monkeypatch):
    data, values = np.load(GOLDEN / case["file"]), dict(case["hyperparameters"])
    base = case["base_optimizer"]
    options = {
        "steps": values["L"],
        "walk_rate": values["langevin_lr"],
        "decay": values["langevin_beta"],
        "momentum": values["momentum"],
    }
    with jax.enable_x64(True):
        sam = sam_optax.entropy_sgd(
            values["gamma"], values["noise"], **options, as_released=True
        )
        tx = optax.chain(
            sam, optax.sgd(base["lr"], base["momentum"] or None, nesterov=True)
        )
        step = jax.jit(door(sam, tx, mean_loss))
        params = start_of(data)
        state = tx.init(params)
        if base["momentum"]:  # theirs starts at the first gradient of the loss
            first = jax.grad(mean_loss)(params, data["X"][0], data["y"][0])
            state = optax.tree.set(state, trace=first)
        keys = folded(keys_of("entropy_sgd", STEPS), values["L"])
        with stored_noise(monkeypatch, keys, noise_of(data)):
            for t, batch in enumerate(zip(data["X"], data["y"], strict=True)):
                params, state, loss = step(params, state, *batch)
                np.testing.assert_allclose(loss, data["loss"][t], rtol=0, atol=1e-10)
                assert_at(params, data, t)
