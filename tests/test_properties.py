"""Properties over random trees, scales and orders."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sam_optax
from methods import norm
from sam_optax import _tree

ENTRIES = st.floats(-4, 4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
# A few fixed shapes, because every new one is compiled anew.
SHAPES = [((3,),), ((2, 2), (3,)), ((), (4,), (2, 1)), ((5, 2), ())]


def arrays(shape):
    return hnp.arrays(np.float32, shape, elements=ENTRIES)


TREES = (
    st.sampled_from(SHAPES)
    .flatmap(lambda shapes: st.tuples(*map(arrays, shapes)).map(list))
    .filter(lambda tree: any(np.any(leaf) for leaf in tree))
)


def ascend(ascent, g, w=None):
    g = jax.tree.map(jnp.asarray, g)
    w = g if w is None else jax.tree.map(jnp.asarray, w)
    return ascent.update(g, ascent.init(w), w)[0]


@hypothesis.given(
    tree=TREES,
    log10_scale=st.floats(-30, 30),
    rho=st.floats(1e-3, 10),
    p=st.sampled_from([1, 1.5, 2, 3, np.inf]),
)
@hypothesis.settings(max_examples=100)
def test_the_perturbation_has_norm_rho_at_every_loss_scale(tree, log10_scale, rho, p):
    scale = np.float32(10.0**log10_scale)
    tree = [leaf * scale for leaf in tree]
    hypothesis.assume(any(np.any(np.abs(leaf) > 1e-36) for leaf in tree))
    epsilon = ascend(sam_optax.ascents.sam(rho, p=p), tree)
    assert norm(epsilon, p) == pytest.approx(rho, rel=2e-5)


@hypothesis.given(tree=TREES, log2_scale=st.integers(-90, 90))
def test_the_perturbation_does_not_depend_on_the_loss_scale(tree, log2_scale):
    ascent = sam_optax.ascents.sam(0.5)
    plain = ascend(ascent, tree)
    scaled = ascend(ascent, [leaf * np.float32(2.0**log2_scale) for leaf in tree])
    for a, b in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@hypothesis.given(tree=TREES, order=st.randoms(use_true_random=False))
def test_the_perturbation_does_not_depend_on_the_order_of_leaves(tree, order):
    positions = list(range(len(tree)))
    order.shuffle(positions)
    for ascent in (
        sam_optax.ascents.sam(0.5),
        sam_optax.ascents.sam(0.5, p=3),
        sam_optax.ascents.asam(0.5),
        sam_optax.ascents.fsam(0.5),
    ):
        plain = ascend(ascent, tree)
        shuffled = ascend(ascent, [tree[i] for i in positions])
        for i, leaf in zip(positions, shuffled, strict=True):
            np.testing.assert_allclose(leaf, plain[i], rtol=1e-5, atol=1e-7)


@hypothesis.given(data=st.data())
def test_asam_is_equivariant_under_rescaling_of_the_weights(data):
    """w → A w, g → A⁻¹ g gives ε → A ε, for every diagonal A > 0 and η = 0."""
    shape = data.draw(st.sampled_from([(3,), (2, 2)]))
    g, w = (data.draw(arrays(shape)) for _ in "gw")
    hypothesis.assume(np.any(g * w))
    scales = st.floats(0.125, 8, width=32)
    a = data.draw(hnp.arrays(np.float32, shape, elements=scales))
    for ascent in (
        sam_optax.ascents.asam(0.5, eta=0.0),
        sam_optax.ascents.fasam(0.5, eta=0.0),
    ):
        plain = ascend(ascent, [g], [w])[0]
        rescaled = ascend(ascent, [g / a], [a * w])[0]
        np.testing.assert_allclose(rescaled, a * plain, rtol=1e-4, atol=1e-6)


@hypothesis.given(tree=TREES)
def test_an_ascent_raises_the_loss_to_first_order(tree):
    for ascent in (
        sam_optax.ascents.sam(0.5),
        sam_optax.ascents.sam(0.5, p=3),
        sam_optax.ascents.sam(0.5, p=np.inf),
        sam_optax.ascents.asam(0.5),
        sam_optax.ascents.usam(0.5),
        sam_optax.ascents.fsam(0.5),
    ):
        epsilon = ascend(ascent, tree)
        assert float(_tree.dot(epsilon, [jnp.asarray(x) for x in tree])) > 0
