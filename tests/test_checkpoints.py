"""Checkpoints: a training that is saved and restored goes on bit by bit."""

import pathlib
import subprocess
import sys

import flax.serialization
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import problem
import sam_optax
from lab import assert_trees_close, assert_trees_equal

SAVED = {
    "fsam": lambda: sam_optax.fsam(0.1),
    "look_sam": lambda: sam_optax.look_sam(0.1, k=3),
    "rst": lambda: sam_optax.rst(0.1),
    "esam": lambda: sam_optax.esam(0.1),
    "ssam": lambda: sam_optax.ssam(0.1, dynamic=True, refresh_every=2),
    "eigen_sam": lambda: sam_optax.eigen_sam(0.1, k=2),
    "tsam": lambda: sam_optax.tsam(0.1, samples=2),
}


HALF = 3


def saved_training():
    """(start, step): all of SAVED in one program."""
    parts = {}
    for name, make in SAVED.items():
        sam = make()
        tx = optax.chain(sam, optax.adam(0.05))
        parts[name] = sam_optax.sam_value_and_grad(problem.loss, sam), tx

    @jax.jit
    def step(states, batch):
        after = {}
        for name, (helper, tx) in parts.items():
            params, state = states[name]
            _, grads = helper(params, batch, opt_state=state)
            updates, state = tx.update(grads, state, params)
            after[name] = optax.apply_updates(params, updates), state
        return after

    params = problem.params()
    start = {name: (params, tx.init(params)) for name, (_, tx) in parts.items()}
    return start, step


def run(step, states, first, last):
    for t in range(first, last):
        states = step(states, problem.batch(t))
    return states


def restore_and_go_on(path):
    """In a process of its own: prints the bytes of the parameters at the end."""
    start, step = saved_training()
    with ocp.StandardCheckpointer() as checkpointer:
        states = checkpointer.restore(path, start)
    final = run(step, states, HALF, 2 * HALF)
    print("RESULT", bytes_of(final).hex())


def bytes_of(states):
    return b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(states))


@pytest.mark.slow
def test_orbax_restores_in_a_new_process_bit_by_bit(tmp_path):
    start, step = saved_training()
    middle = run(step, start, 0, HALF)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", middle)
    final = run(step, middle, HALF, 2 * HALF)
    code = (
        "import conftest, sys, test_checkpoints as t; t.restore_and_go_on(sys.argv[1])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "checkpoint")],
        cwd=pathlib.Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.split("RESULT ")[1].strip() == bytes_of(final).hex()

    # And into another sharding: parameters and what is shaped like them over devices.
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def sharded(x):
        spec = P("data") if x.ndim == 2 and x.shape[0] == 4 else P()
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    with ocp.StandardCheckpointer() as checkpointer:
        states = checkpointer.restore(
            tmp_path / "checkpoint", jax.tree.map(sharded, start)
        )
    assert_trees_equal(states, middle)
    assert len(states["fsam"][0]["a"].sharding.device_set) == 4
    again = run(step, states, HALF, 2 * HALF)
    assert_trees_close(again, final, rtol=1e-3, atol=1e-4)

    # And through Flax's own serialisation.
    data = flax.serialization.to_bytes(middle)
    assert_trees_equal(flax.serialization.from_bytes(start, data), middle)
