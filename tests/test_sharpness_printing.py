"""Results print in a few lines of at most 80 columns, and compare side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_optax import sharpness
from sharpness_problem import loss_fn, network

pytestmark = pytest.mark.usefixtures("double_precision")

X = np.array([[1.0, 0.0], [0.0, 3.0]])


def bowl(w, x):
    return jnp.mean((x @ w) ** 2)


def fits(text, lines):
    assert len(text.splitlines()) <= lines
    assert max(map(len, text.splitlines())) <= 80
    return text


def test_few_numbers_are_printed_one_by_one():
    gap = sharpness.surrogate_gap(bowl, jnp.array([0.0, 1.0]), X, rho=0.1, m=1)
    assert str(gap) == repr(gap)
    assert str(gap) == (
        "Sharpness(loss=4.5, perturbed_loss=5.445, sharpness=0.945, perturbation=None)"
    )
    line = sharpness.Line(jnp.arange(6.0), np.array([1 / 3, 2e-9, np.nan, 1, 2, 12345]))
    assert str(line) == (
        "Line(distances=[0 1 2 3 4 5], losses=[0.33333 2e-09 nan 1 2 12345])"
    )
    assert str(sharpness.Estimate(jnp.bfloat16(2), 0.5)) == (
        "Estimate(mean=2, standard_error=0.5)"
    )


def test_many_numbers_are_summarised():
    grid = jnp.linspace(-1, 1, 21, dtype=jnp.float32)
    surface = sharpness.Surface(grid, grid[:7], grid * jnp.ones((7, 1), jnp.float32))
    assert str(surface) == (
        "Surface(\n"
        "  xs=<float32[21] from -1 to 1>,\n"
        "  ys=<float32[7] from -1 to -0.4>,\n"
        "  losses=<float32[7,21] from -1 to 1>,\n"
        ")"
    )
    params, data = network()
    worst = sharpness.worst_case(loss_fn, params, data, rho=0.1, steps=2)
    assert "perturbation=<3 arrays, 64 numbers>" in fits(str(worst), 6)
    alone = worst._replace(perturbation=jnp.ones((2, 3), jnp.float32))
    assert "perturbation=<float32[2,3] from 1 to 1>" in str(alone)
    assert "perturbation=<1 array, 64 numbers>" in str(
        worst._replace(perturbation=[jnp.ones(64)])
    )


def test_every_result_fits_a_screen():
    params, data = network()
    H = sharpness.hessian(loss_fn, params, data, batch_size=8)
    stream = sharpness.stream([tuple(map(np.asarray, data))] * 2)
    text = fits(str(H), 6)
    for part in ("dimension=64", "data=<2 arrays, 168 numbers>", "=HessianProduct"):
        assert part in text
    assert str(stream) == "Stream(2 batches, 48 examples)"
    streamed = sharpness.hessian(loss_fn, params, stream)
    assert "data=Stream(2 batches, 48 examples)" in fits(str(streamed), 6)
    pairs = fits(str(sharpness.eigenpairs(H, 10)), 5)
    assert "values=<float" in pairs and "vectors=<3 arrays, 640 numbers>" in pairs
    fits(str(sharpness.spectral_density(H, num_samples=2)), 4)
    fits(str(sharpness.trace(H, num_samples=2)), 1)
    wide = sharpness.Sharpness(1.0, 2.0, 3.0, {"a name": "of something " * 20})
    fits(str(wide), 6)


def test_a_traced_result_prints_its_types():
    printed = []

    @jax.jit
    def measure(w):
        gap = sharpness.surrogate_gap(bowl, w, X, rho=0.1)
        printed.append(str(gap))
        return gap.sharpness

    measure(jnp.ones(2, jnp.float32))
    assert "loss=<float64[]>" in printed[0]
    assert "perturbation=<float32[2]>" in printed[0]


# --- Several solutions in one table.


def test_a_comparison_takes_the_number_of_each_result():
    solutions = {"start": jnp.ones(2), "end": jnp.array([1.0, 0.0])}
    measures = {
        "loss": lambda w: bowl(w, X),
        "worst": lambda w: sharpness.worst_case(bowl, w, X, rho=0.1, steps=3),
        "trace": lambda w: sharpness.trace(sharpness.hessian(bowl, w, X)),
        "largest": lambda w: sharpness.eigenpairs(sharpness.hessian(bowl, w, X), 2),
        "number": lambda w: 7,
    }
    table = sharpness.compare(solutions, measures)
    assert list(table.values) == ["start", "end"]
    for name, w in solutions.items():
        row = table.values[name]
        assert list(row) == list(measures)
        assert row["loss"] == float(bowl(w, X))
        assert row["worst"] == float(measures["worst"](w).sharpness)
        assert row["trace"] == (10.0, 0.0)
        assert row["largest"] == pytest.approx(9, rel=1e-5)
        assert {type(x) for k, x in row.items() if k != "trace"} == {float}
    assert str(table).splitlines()[0].split() == ["start", "end"]
    assert str(table).splitlines()[3] == "trace    10 ± 0  10 ± 0"


def test_a_table_is_aligned_and_goes_on_below_where_it_is_wide():
    values = {
        f"solution {i}": {
            "loss": i / 3,
            "a mean": sharpness.Estimate(1e4 * i, 12.345),
        }
        for i in range(8)
    }
    blocks = str(sharpness.Comparison(values)).split("\n\n")
    assert [len(block.splitlines()) for block in blocks] == [3, 3]
    names = [block.splitlines()[0] for block in blocks]
    assert names[0].split("  ")[-1] == "solution 5"
    assert names[1].split("  ")[-1] == "solution 7"
    for block in blocks:
        lines = fits(block, 3).splitlines()
        assert len({len(line) for line in lines}) == 1
        assert [line[:6] for line in lines] == ["      ", "loss  ", "a mean"]
    assert blocks[1].splitlines() == [
        "        solution 6  solution 7",
        "loss             2       2.333",
        "a mean  6e+04 ± 12  7e+04 ± 12",
    ]


@pytest.mark.parametrize(
    ("solutions", "measures", "message"),
    [
        ({}, {"one": len}, "at least one solution and one measure"),
        ({"w": X}, {}, "at least one solution and one measure"),
        ({"w": X}, {"one": 3}, "The measure 'one' must be a function.*got 3"),
        ({"w": X}, {"one": lambda w: w}, "'one' must return one number.*it returned"),
        ({"w": X}, {"one": lambda w: "1"}, "'one' must return one number.*'1'"),
    ],
)
def test_what_cannot_be_compared(solutions, measures, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sharpness.compare(solutions, measures)
