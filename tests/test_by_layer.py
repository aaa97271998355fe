"""A norm and a scale for each leaf, and an ascent for each label, against formulas."""

import itertools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import problem
import sam_optax
from doors import DOORS, door1
from lab import assert_trees_close, assert_trees_equal, gradient
from quadratic import H, W, assert_same, descend, expected, grad_fn, split, whole
from sam_optax import ascents

LABELS = {"x": "body", "y": "head"}  # of the two leaves of the quadratic
BODY = np.array([1.0, 1.0, 0.0])


def by_label(body, head):
    return ascents.by_label({"body": body, "head": head}, LABELS)


def unit(v):
    return v / np.linalg.norm(v)


def perturbation_of(ascent, g, w, **options):
    points = []
    sam = sam_optax.sharpness_aware(ascent, **options)
    sam.update(g, sam.init(w), w, grad_fn=lambda p: points.append(p) or g)
    return jax.tree.map(jnp.subtract, points[-1], w)


# --- Labels.


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("make", [by_label, None], ids=["by_label", "partition"])
def test_each_label_has_an_ascent_with_a_norm_and_a_state_of_its_own(make, door):
    """F-SAM with a schedule of rho on two weights, and SAM on the third."""
    make = make or (
        lambda body, head: optax.partition({"body": body, "head": head}, LABELS)
    )
    fsam = ascents.fsam(rho=lambda step: 0.1 * (1 + step), decay=0.6)

    def epsilon(g, w, memory):
        memory["t"] = t = memory.get("t", -1) + 1
        memory["m"] = m = 0.6 * memory.get("m", 0) + 0.4 * g * BODY
        h = g * BODY - m
        return 0.1 * (1 + t) * unit(h) + 0.3 * unit(g * (1 - BODY))

    sam = sam_optax.sharpness_aware(make(fsam, ascents.sam(0.3)))
    assert_same(descend(sam, door=DOORS[door]), expected(epsilon))


@pytest.mark.usefixtures("double_precision")
def test_a_radius_for_each_label_under_one_norm():
    ascent = optax.chain(
        ascents.normalize_by_global_norm(),
        by_label(ascents.scale_by_rho(0.1), ascents.scale_by_rho(0.7)),
    )
    assert_same(
        descend(sam_optax.sharpness_aware(ascent)),
        expected(lambda g, w, m: unit(g) * (0.7 - 0.6 * BODY)),
    )


@pytest.mark.usefixtures("double_precision")
def test_a_label_may_look_at_g_or_take_further_gradients():
    """The second of two steps, with a step at which the head stays where it is."""
    twice = ascents.ascend_repeatedly(ascents.sam(0.5), 2)
    fisher = ascents.fisher_sam(0.3, eta=2.0)

    def epsilon(g, w, m):
        first = 0.25 * unit(g * BODY)
        body = first + 0.25 * unit(H @ (w + first) * BODY)
        g = g * (1 - BODY)
        inverse = 1 / (1 + 2 * g**2)
        return body + 0.3 * inverse * g / np.sqrt(g @ (inverse * g))

    sam = sam_optax.sharpness_aware(by_label(twice, fisher))
    assert_same(descend(sam), expected(epsilon))


@pytest.mark.usefixtures("double_precision")
def test_labels_inside_of_repeated_steps_move_together():
    inside = by_label(ascents.sam(0.5), ascents.sam(0.3))
    sam = sam_optax.sharpness_aware(ascents.ascend_repeatedly(inside, 2))

    def step(g):
        return 0.25 * unit(g * BODY) + 0.15 * unit(g * (1 - BODY))

    assert_same(
        descend(sam), expected(lambda g, w, m: step(g) + step(H @ (w + step(g))))
    )


def test_labels_under_a_mask():
    """As a function of shapes; norms run over the perturbed leaves of each label."""

    def by_rank(params):
        return jax.tree.map(lambda w: "matrix" if w.ndim > 1 else "other", params)

    w, g = problem.params(), gradient(problem.params(), problem.batch())
    mask = {"a": True, "b": {"c": True, "d": False}}
    parts = {"matrix": ascents.sam(0.1), "other": ascents.sam(0.3)}
    moved = perturbation_of(ascents.by_label(parts, by_rank), g, w, mask=mask)
    wanted = {
        "a": 0.1 * g["a"] / jnp.linalg.norm(g["a"]),
        "b": {"c": 0.3 * g["b"]["c"] / jnp.linalg.norm(g["b"]["c"]), "d": 0.0},
    }
    assert_trees_close(moved, wanted, atol=1e-6)
    # A prefix of the tree of labels, and a leaf of None.
    labels = {"a": "matrix", "b": "other", "none": None}
    w, g = w | {"none": None}, g | {"none": None}
    moved = perturbation_of(ascents.by_label(parts, labels), g, w)
    assert moved["none"] is None
    assert float(optax.tree.norm(moved["b"])) == pytest.approx(0.3, rel=1e-5)


def test_labels_with_a_perturbation_for_each_group():
    """d is the mean of gᵃ over the groups, and the state follows the mean of g."""
    labels = {"a": "body", "b": "head"}
    parts = {"body": ascents.sam(0.1), "head": ascents.fsam(0.3, decay=0.6)}
    sam = sam_optax.sharpness_aware(ascents.by_label(parts, labels))
    w, state = problem.params(), sam.init(problem.params())
    helper = sam_optax.sam_value_and_grad(problem.loss, sam, m=4)
    x, y = problem.batch(0)
    groups = [(x[:4], y[:4]), (x[4:], y[4:])]
    ds = []
    for group in groups:
        g = gradient(w, group)
        d, _ = sam.update(g, state, w, grad_fn=lambda p, b=group: gradient(p, b))
        ds.append(d)
    _, grads = helper(w, (x, y), opt_state=state)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *ds)
    assert_trees_close(grads.gradients, mean, rtol=1e-5, atol=1e-6)
    _, after = sam.update(grads, state, w)
    ema = after.ascent_state.label_states["head"][0].gradient_ema
    g = gradient(w, (x, y))
    assert_trees_close(ema["b"], jax.tree.map(lambda g: 0.4 * g, g["b"]), atol=1e-6)


def test_the_state_of_labels_goes_through_scan_and_bytes():
    labels = {"a": "body", "b": "head"}
    parts = {"body": ascents.fsam(0.1), "head": ascents.vasso(0.3)}
    sam = sam_optax.sharpness_aware(ascents.by_label(parts, labels))
    tx = optax.chain(sam, optax.sgd(0.1))
    step = door1(sam, tx, problem.loss)

    def scanned(carry, _):
        params, state, loss = step(*carry, problem.batch())
        return (params, state), loss

    start = problem.params(), tx.init(problem.params())
    carry, losses = jax.lax.scan(scanned, start, length=3)
    assert losses[2] < losses[0]
    restored = flax.serialization.from_bytes(
        tx.init(start[0]), flax.serialization.to_bytes(carry[1])
    )
    assert_trees_equal(restored, carry[1])


def test_a_tree_of_labels_may_be_callable():
    """As a module of Equinox is; it is not called."""

    class Module(dict):
        def __call__(self, params):
            raise AssertionError("labels of this kind are not to be called")

    jax.tree_util.register_pytree_node(
        Module,
        lambda m: (tuple(m.values()), tuple(m)),
        lambda keys, values: Module(zip(keys, values, strict=True)),
    )
    w = Module(split(W))
    parts = {"body": ascents.sam(0.1), "head": ascents.sam(0.3)}
    moved = perturbation_of(ascents.by_label(parts, Module(LABELS)), w, w)
    assert float(jnp.abs(moved["y"][0])) == pytest.approx(0.3, rel=1e-5)


def test_a_label_without_an_ascent():
    ascent = ascents.by_label({"body": ascents.sam()}, LABELS)
    with pytest.raises(ValueError, match=r"'head' at params\['y'\] has no ascent.*bod"):
        ascent.init(split(W))
    with pytest.raises(ValueError, match="by_label needs the parameters"):
        by_label(ascents.sam(), ascents.sam()).update(split(W), None)
    with pytest.raises(ValueError, match="scale_by_leaf_norm needs the parameters"):
        ascents.scale_by_leaf_norm().update(split(W), None)


# --- A norm and a scale for each leaf.


@pytest.mark.usefixtures("double_precision")
def test_a_norm_for_each_leaf():
    ascent = optax.chain(ascents.normalize_by_leaf_norm(), ascents.scale_by_rho(0.3))
    assert_same(
        descend(sam_optax.sharpness_aware(ascent)),
        expected(lambda g, w, m: 0.3 * (unit(g * BODY) + unit(g * (1 - BODY)))),
    )


@pytest.mark.usefixtures("double_precision")
def test_a_radius_relative_to_the_weights_of_each_leaf():
    ascent = optax.chain(
        ascents.normalize_by_leaf_norm(),
        ascents.scale_by_leaf_norm(),
        ascents.scale_by_rho(0.3),
    )

    def epsilon(g, w, m):
        sizes = np.linalg.norm(w[:2]), np.abs(w[2])
        body, head = unit(g * BODY), unit(g * (1 - BODY))
        return 0.3 * (sizes[0] * body + sizes[1] * head)

    assert_same(descend(sam_optax.sharpness_aware(ascent)), expected(epsilon))
    zero = {"x": jnp.zeros(2), "y": jnp.ones(1)}
    moved = perturbation_of(ascent, grad_fn(split(W)), zero)
    assert_same(whole(moved), [0, 0, -0.3])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_norm_of_a_leaf_is_right_at_every_scale_beside_others(scale):
    tx = ascents.normalize_by_leaf_norm()
    leaf = np.float32(scale) * jnp.array([3.0, -4.0])
    g = {"leaf": leaf, "zero": jnp.zeros((2, 2)), "none": None, "one": jnp.ones(4)}
    u, _ = jax.jit(tx.update)(g, tx.init(g))
    np.testing.assert_allclose(u["leaf"], [0.6, -0.8], rtol=1e-6)
    np.testing.assert_array_equal(u["one"], 0.5)
    np.testing.assert_array_equal(u["zero"], 0)
    assert u["none"] is None


def test_the_norm_of_a_leaf_in_half_precision():
    tx = optax.chain(ascents.normalize_by_leaf_norm(), ascents.scale_by_leaf_norm())
    g = {"half": jnp.array([300.0, 400.0], jnp.float16), "b": jnp.zeros(1, jnp.float16)}
    w = {"half": jnp.full(2, 3e4, jnp.float16), "b": jnp.ones(1, jnp.bfloat16)}
    u, _ = tx.update(g, tx.init(w), w)
    assert {leaf.dtype for leaf in jax.tree.leaves(u)} == {jnp.dtype("float32")}
    wanted = np.float32(2**0.5 * float(w["half"][0])) * np.array([0.6, 0.8])
    np.testing.assert_allclose(u["half"], wanted, rtol=1e-6)
    np.testing.assert_array_equal(u["b"], 0)


@pytest.mark.parametrize(
    ("make", "scale"), [(ascents.normalize_by_leaf_norm, 1.0), (ascents.sam, 1e-30)]
)
def test_a_leaf_that_the_loss_does_not_use_stays_where_it_is(make, scale):
    """Its gradient is a constant when the step is compiled."""
    tx = make()

    @jax.jit
    def unit_of_gradient(w):
        g = jax.grad(lambda w: scale * jnp.sum(w["used"] ** 2))(w)
        return tx.update(g, tx.init(w), w)[0]

    u = unit_of_gradient({"used": jnp.array([3.0, 4.0]), "unused": jnp.ones(2)})
    np.testing.assert_array_equal(u["unused"], 0)
    np.testing.assert_allclose(u["used"] / u["used"][0], [1, 4 / 3], rtol=1e-5)


def test_a_leaf_of_zeros_has_derivatives():
    tx = optax.chain(ascents.normalize_by_leaf_norm(), ascents.scale_by_leaf_norm())

    def first(g, w):
        return sum(jnp.sum(u) for u in jax.tree.leaves(tx.update(g, tx.init(w), w)[0]))

    g, w = {"a": jnp.zeros(2), "b": jnp.ones(2)}, {"a": jnp.ones(2), "b": jnp.zeros(2)}
    slopes = jax.grad(first, argnums=(0, 1))(g, w)
    assert_trees_equal(slopes, jax.tree.map(jnp.zeros_like, (g, w)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_leaf_that_is_not_finite_spoils_d_and_no_other_leaf_of_u(bad):
    g = {"a": jnp.array([bad, 1.0]), "b": jnp.array([3.0, 4.0])}
    tx = ascents.normalize_by_leaf_norm()
    u, _ = tx.update(g, tx.init(g))
    assert np.all(np.isnan(u["a"]))
    np.testing.assert_allclose(u["b"], [0.6, 0.8], rtol=1e-6)
    w = jax.tree.map(jnp.ones_like, g)
    sam = sam_optax.sharpness_aware(tx)
    d, _ = sam.update(g, sam.init(w), w, grad_fn=lambda p: w)
    assert np.all(np.isnan(d["b"]))


# --- Widths.

SPECTRAL = ascents.chain(
    ascents.normalize_by_leaf_norm(),
    ascents.scale_by_fans(),
    ascents.scale_by_rho(0.1),
)


def effects_of(ascent, width):
    """The outputs' change h ε of each layer, to its outputs h W, by their lengths."""
    sizes = (16, width, width, 10)
    *keys, key = jax.random.split(jax.random.key(0), 4)
    kernels = [
        jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, shape in zip(keys, itertools.pairwise(sizes), strict=True)
    ]
    x = jax.random.normal(key, (8, 16))

    def inputs_of_layers(kernels):
        inputs = [x]
        for kernel in kernels:
            inputs.append(jnp.tanh(inputs[-1] @ kernel))
        return inputs

    def loss_fn(kernels):
        targets = jnp.arange(8.0)[:, None] / 8
        return jnp.mean(jnp.square(inputs_of_layers(kernels)[-1] - targets))

    epsilon = perturbation_of(ascent, jax.grad(loss_fn)(kernels), kernels)
    layers = zip(inputs_of_layers(kernels), epsilon, kernels, strict=False)
    return np.array(
        [jnp.linalg.norm(h @ e) / jnp.linalg.norm(h @ w) for h, e, w in layers]
    )


@pytest.mark.parametrize("width", [512, pytest.param(4096, marks=pytest.mark.slow)])
def test_with_the_spectral_scale_a_perturbation_acts_alike_at_all_widths(width):
    """And without it, first and last layer see ever less and ever more of it."""
    spectral = effects_of(SPECTRAL, width) / effects_of(SPECTRAL, 64)
    assert np.all((spectral > 0.5) & (spectral < 2))
    sam = ascents.sam(0.1)
    first, _, last = effects_of(sam, width) / effects_of(sam, 64)
    growth = (width / 64) ** 0.5
    assert first < 0.7 / growth
    assert last > 0.5 * growth


def test_a_label_that_no_parameter_has_raises():
    parts = {"body": ascents.sam(0.1), "haed": ascents.sam(0.3)}
    labels = {"x": "body", "y": "body"}
    w = {"x": jnp.ones(2), "y": jnp.ones(1)}
    wanted = r"No parameter has the label 'haed'.*that occur are \['body'\]"
    with pytest.raises(ValueError, match=wanted):
        sam_optax.sharpness_aware(ascents.by_label(parts, labels)).init(w)
    # Under a mask, it may be the label of parameters that are not perturbed.
    ascent = ascents.by_label(parts, lambda tree: jax.tree.map(lambda _: "body", tree))
    sam_optax.sharpness_aware(ascent, mask={"x": True, "y": False}).init(w)
