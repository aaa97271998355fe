"""Transformations travel between processes, as schedulers of jobs send them."""

import cloudpickle
import jax.numpy as jnp
import numpy as np
import pytest

from methods import TABLE


@pytest.mark.gradients_alone
def test_a_transformation_survives_cloudpickle(kind):
    w = jnp.array([3.0, 4.0])
    sam = TABLE[kind]()
    there = cloudpickle.loads(cloudpickle.dumps(sam))
    results = [
        tx.update(w, tx.init(w), w, grad_fn=lambda p: 2 * p, ascend=True)[0]
        for tx in (sam, there)
    ]
    np.testing.assert_array_equal(*results)
