"""What a measure cannot take raises, and the message says what it expects."""

import jax.numpy as jnp
import numpy as np
import pytest

from sam_optax import sharpness

pytestmark = pytest.mark.usefixtures("double_precision")


def lose(w, x):
    return jnp.mean((x @ w) ** 2)


W, X = np.ones(2), np.ones((4, 2))


BAD = {
    "loss of each example": (
        lambda: sharpness.gradient_norm(lambda w, x: (x @ w) ** 2, W, X),
        "must return a scalar, the mean over the examples.*shape \\(4,\\)",
    ),
    "loss with auxiliary output": (
        lambda: sharpness.hessian(lambda w, x: (lose(w, x), x), W, X)(W),
        "must return the loss alone; it returned 2 values",
    ),
    "complex loss": (
        lambda: sharpness.surrogate_gap(lambda w, x: lose(w, x) * 1j, W, X, rho=1),
        "real number, got complex",
    ),
    "a loss of text": (
        lambda: sharpness.gradient_norm(lambda w, x: "low", W, X),
        "must return a scalar.*it returned low",
    ),
    "a loss in a list": (
        lambda: sharpness.gradient_norm(lambda w, x: [lose(w, x)], W, X),
        "it returned 1 values",
    ),
    "a loss of bools": (
        lambda: sharpness.surrogate_gap(lambda w, x: lose(w, x) > 0, W, X, rho=1),
        "must return a real number, got bool",
    ),
    "integer loss": (
        lambda: sharpness.surrogate_gap(lambda w, x: 3, W, X, rho=1),
        "must return a scalar",
    ),
    "no examples": (
        lambda: sharpness.gradient_norm(lose, W, np.ones((0, 2))),
        "data are empty: their shapes are \\[\\(0, 2\\)\\]",
    ),
    "no arrays": (lambda: sharpness.hessian(lose, W, ()), "data hold no arrays"),
    "uneven arrays": (
        lambda: sharpness.hessian(lose, W, (X, X[:3])),
        "the same number in each; their shapes are \\[\\(4, 2\\), \\(3, 2\\)\\]",
    ),
    "a scalar among the data": (
        lambda: sharpness.hessian(lose, W, (X, 0.1)),
        "bind it with jax.tree_util.Partial",
    ),
    "no batches": (lambda: sharpness.stream([]), "no batches"),
    "an iterator": (
        lambda: sharpness.stream(iter([X])),
        "must be a sequence.*reads the data many times.*list_iterator",
    ),
    "a set, which has no order": (
        lambda: sharpness.stream({1, 2}),
        "must be a sequence.*got set",
    ),
    "a function of the index, without a length": (
        lambda: sharpness.stream(type("F", (), {"__getitem__": lambda s, i: X})()),
        "must be a sequence.*got F",
    ),
    "an empty batch": (lambda: sharpness.stream([X[:0]]), "data are empty"),
    "batches and batch_size": (
        lambda: sharpness.hessian(lose, W, sharpness.stream([X]), batch_size=2),
        "leave out batch_size=",
    ),
    "rho < 0": (
        lambda: sharpness.worst_case(lose, W, X, rho=-0.1),
        "rho must be >= 0 and finite, got -0.1",
    ),
    "rho < 0 in an array": (
        lambda: sharpness.average_case(lose, W, X, rho=jnp.float32(-1)),
        "rho must be >= 0 and finite, got -1.0",
    ),
    "an estimate at an array of zero": (
        lambda: sharpness.eigenvalue_from_gap(0.1, rho=jnp.float32(0)),
        "rho must be > 0",
    ),
    "complex distances": (
        lambda: sharpness.along_line(lose, W, X, W, [1j]),
        "distances must be real",
    ),
    "complex direction": (
        lambda: sharpness.along_line(lose, W, X, W * 1j, [0.0]),
        "direction is complex128: only real",
    ),
    "direction of NaN": (
        lambda: sharpness.over_plane(lose, W, X, (W, W * np.nan), [0.0], [0.0]),
        "Each direction is not finite",
    ),
    "filters along another axis": (
        lambda: sharpness.filter_normalized_direction(W, filter_axis=1),
        "filter_axis must be 0 or -1, got 1",
    ),
    "a function among the parameters": (
        lambda: sharpness.hessian(lose, {"act": np.tanh, "w": W}, X),
        "params\\['act'\\] is ufunc: only real.*eqx.partition",
    ),
    "no width": (
        lambda: sharpness.spectral_density(sharpness.hessian(lose, W, X)).on_grid(X, 0),
        "width must be > 0",
    ),
    "no function": (
        lambda: sharpness.hessian(3, W, X),
        "A loss must be a function, got 3",
    ),
    "rho is NaN": (
        lambda: sharpness.surrogate_gap(lose, W, X, rho=float("nan")),
        "rho must be >= 0",
    ),
    "rho is a schedule": (
        lambda: sharpness.surrogate_gap(lose, W, X, rho=lambda step: 0.1),
        "rho must be a number or a scalar array, and cannot be a schedule",
    ),
    "rho is text": (
        lambda: sharpness.surrogate_gap(lose, W, X, rho="0.1"),
        "rho must be a number or a scalar array, .*got '0.1'",
    ),
    "step_size is an array below zero": (
        lambda: sharpness.worst_case(lose, W, X, rho=0.1, step_size=jnp.float32(-1)),
        "step_size must be >= 0 and finite, got -1.0",
    ),
    "step_size is a schedule": (
        lambda: sharpness.worst_case(lose, W, X, rho=0.1, step_size=lambda t: 1.0),
        "step_size must be a number or a scalar array, and cannot be a schedule",
    ),
    "rho is a bool": (
        lambda: sharpness.surrogate_gap(lose, W, X, rho=True),
        "rho must be a number.*got True",
    ),
    "step_size < 0": (
        lambda: sharpness.worst_case(lose, W, X, rho=0.1, step_size=-1.0),
        "step_size must be >= 0 and finite, got -1.0",
    ),
    "an end that is not finite": (
        lambda: sharpness.interpolate(lose, W, W * np.nan, X, [0.5]),
        "end is not finite",
    ),
    "unknown norm": (
        lambda: sharpness.worst_case(lose, W, X, rho=0.1, norm="l1"),
        'norm must be "l2" or "linf", got \'l1\'',
    ),
    "NaN parameters": (
        lambda: sharpness.hessian(lose, {"a": W, "b": [W * np.nan]}, X),
        "not finite at \\['b'\\]\\[0\\]",
    ),
    "infinite parameter alone": (
        lambda: sharpness.gradient_norm(lose, np.inf, X),
        "not finite at its root",
    ),
    "integer parameters": (
        lambda: sharpness.hessian(lose, {"a": np.ones(2, int)}, X),
        "\\['a'\\] is int.*only real floating-point",
    ),
    "integer parameters of a Fisher trace": (
        lambda: sharpness.fisher_trace(lose, np.ones(2, int), X),
        "is int.*only real floating-point",
    ),
    "no parameters": (lambda: sharpness.hessian(lose, {}, X), "holds no numbers"),
    "too many eigenvalues": (
        lambda: sharpness.eigenpairs(sharpness.hessian(lose, W, X), 3),
        "k must be at most the dimension, 2, got 3",
    ),
    "no eigenvalue": (
        lambda: sharpness.eigenpairs(sharpness.hessian(lose, W, X), 0),
        "k must be an integer >= 1",
    ),
    "unknown end": (
        lambda: sharpness.eigenpairs(sharpness.hessian(lose, W, X), which="both"),
        'which must be "largest" or "smallest"',
    ),
    "too many products": (
        lambda: sharpness.spectral_density(
            sharpness.hessian(lose, W, X), num_matvecs=3
        ),
        "num_matvecs must be at most the dimension, 2, got 3",
    ),
    "too few products": (
        lambda: sharpness.eigenpairs(sharpness.hessian(lose, W, X), 2, num_matvecs=1),
        "num_matvecs must be at least k = 2, got 1",
    ),
    "one sample": (
        lambda: sharpness.trace(sharpness.hessian(lose, W, X), num_samples=1),
        "at least 2, for a standard error",
    ),
    "no steps": (
        lambda: sharpness.worst_case(lose, W, X, rho=0.1, steps=0),
        "steps must be an integer >= 1",
    ),
    "groups that do not fit": (
        lambda: sharpness.surrogate_gap(lose, W, X, rho=0.1, m=3),
        "no whole number of groups of m = 3. Leave some out: x\\[: len\\(x\\) // 3",
    ),
    "batches that are no groups": (
        lambda: sharpness.surrogate_gap(lose, W, X, rho=0.1, m=2, batch_size=3),
        "batch_size must be a multiple of m = 2, got 3",
    ),
    "vector of another shape": (
        lambda: sharpness.hessian(lose, W, X)(np.ones(3)),
        "The vector must have the structure and shapes of the parameters",
    ),
    "direction of another shape": (
        lambda: sharpness.along_line(lose, W, X, np.ones(3), [0.0]),
        r"direction must have the structure and shapes of the parameters, "
        r"but it has shape \(3,\) in place of \(2,\)",
    ),
    "a complex vector": (
        lambda: sharpness.hessian(lose, W, X)(1j * W),
        "The vector must be real",
    ),
    "a plane that is a line": (
        lambda: sharpness.over_plane(
            lose, W, X, [sharpness.random_direction(W)] * 2, [0.0], [0.0]
        ),
        "Both directions lie on one line",
    ),
    "a plane that is a line, there and back": (
        lambda: sharpness.over_plane(lose, W, X, [W, -2 * W], [0.0], [0.0]),
        "Both directions lie on one line",
    ),
    "one direction": (
        lambda: sharpness.over_plane(lose, W, X, [W], [0.0], [0.0]),
        "A plane has two directions, got 1",
    ),
    "no distances": (
        lambda: sharpness.along_line(lose, W, X, W, []),
        "distances must hold at least one number",
    ),
    "other solution": (
        lambda: sharpness.interpolate(lose, W, {"a": W}, X, [0.5]),
        "end must have the structure and shapes",
    ),
    "an estimate at radius zero": (
        lambda: sharpness.eigenvalue_from_gap(0.1, rho=0),
        "rho must be > 0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_was_expected(case):
    call, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("loss", [3.0, np.float64(3), np.float32(3)], ids=str)
def test_a_constant_loss_may_be_a_plain_number(loss):
    gap = sharpness.surrogate_gap(lambda w, x: loss, W, X, rho=0.1)
    assert (float(gap.loss), float(gap.sharpness)) == (3, 0)
    np.testing.assert_array_equal(gap.perturbation, 0)


@pytest.mark.parametrize("w", [1, True, np.int32(1), "one", None])
def test_a_root_that_is_no_parameter(w):
    with pytest.raises((TypeError, ValueError), match=r"params(\.| is| holds)"):
        sharpness.gradient_norm(lose, w, X)


@pytest.mark.parametrize("w", [2.0, np.float64(2), np.float32(2)])
def test_a_root_that_is_a_number(w):
    norm = sharpness.gradient_norm(lambda w, x: w**2 * x.mean(), w, X)
    assert float(norm) == 4


@pytest.mark.parametrize("name", ["gradient_norm", "fisher_trace"])
def test_measures_take_their_arguments_by_name(name):
    measure = getattr(sharpness, name)
    whole = measure(loss_fn=lose, params=W, data=X, batch_size=2)
    assert float(whole) == pytest.approx(float(measure(lose, W, X)))


def test_a_matrix_is_equal_to_itself_alone():
    one, other = sharpness.hessian(lose, W, X), sharpness.hessian(lose, W, X)
    assert one == one and one != other
    assert len({one, other}) == 2


def test_streamed_batches_must_be_alike():
    batches = [np.ones((2, 1)), np.ones((3, 1)), np.ones((2, 1))]
    with pytest.raises(ValueError, match=r"batch 1 has .*3, 1.*expected .*2, 1"):
        sharpness.gradient_norm(
            lambda w, x: (w * x).mean(), 1.0, sharpness.stream(batches)
        )


def test_without_matfree_there_is_a_remedy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matfree.stochtrace", None)
    with pytest.raises(ImportError, match=r"pip install \"sam_optax\[sharpness\]\""):
        sharpness.trace(sharpness.hessian(lose, W, X))
