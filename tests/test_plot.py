"""The pictures show what they are given, and say what is what."""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

import sam_optax
from sam_optax import sharpness

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from sam_optax import plot

T = np.linspace(-1, 1, 9)
DENSITY = sharpness.SpectralDensity(
    jnp.array([[0.0, 1.0], [0.0, 1.2]]), jnp.array([[0.9, 0.1], [0.8, 0.2]])
)
SURFACE = sharpness.Surface(T, T[:5], 0.01 + T[:5, None] ** 2 + T**2)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def recorder(steps=4, skipped=()):
    """Records of 0, 1, 2, ... in every field, NaN where a step is skipped."""
    kept = sam_optax.Recorder()
    values = np.arange(steps, dtype=float)
    there = np.where(np.isin(values, skipped), np.nan, values)
    report = sam_optax.Report(
        there, there, values, there, there, there, np.isfinite(there)
    )
    kept.add(values, report)
    return kept


def test_a_spectrum_is_the_density_and_names_the_largest_eigenvalue():
    other = sharpness.SpectralDensity(DENSITY.nodes * 2, DENSITY.weights)
    ax = plot.spectrum({"SAM": DENSITY, "SGD": other}, width=0.05, points=500)
    assert legend(ax) == ["SAM, largest 1.2", "SGD, largest 2.4"]
    curve = ax.get_lines()[0]
    expected = DENSITY.on_grid(curve.get_xdata(), 0.05)
    np.testing.assert_allclose(curve.get_ydata(), expected)
    assert (ax.get_yscale(), ax.get_xlabel(), ax.get_ylabel()) == (
        *("log", "eigenvalue", "density"),
    )
    assert plot.spectrum({"SAM": DENSITY, "SGD": other}).get_lines()[2].get_xdata()[
        0
    ] == pytest.approx(-4 * 0.024, rel=0.01)
    bottom, top = ax.get_ylim()
    assert 0 < bottom < top < 1000
    assert list(ax.get_lines()[3].get_xdata()) == pytest.approx([2.4, 2.4])


@pytest.mark.parametrize(
    ("scale", "width", "used", "margin"),
    [(1.2, None, 0.012, 0.048), (1.2, 0.001, 0.001, 0.036), (-1, None, 0.01, 0.04)],
)
def test_how_wide_and_how_high_a_spectrum_is(scale, width, used, margin):
    """Nodes from 0 to 1.2 or -1; the lowest peak has the weight 0.1 of two vectors."""
    nodes = jnp.array([[0.0, 1.0], [0.0, 0.5]]) * scale + 0.0
    density = sharpness.SpectralDensity(nodes, jnp.array([[0.9, 0.1], [0.8, 0.2]]))
    ax = plot.spectrum(density, width=width)
    x, y = ax.get_lines()[0].get_data()
    low, high = min(scale, 0), max(scale, 0)
    assert (x[0], x[-1]) == pytest.approx((low - margin, high + margin), rel=1e-5)
    assert len(x) == 2000
    np.testing.assert_allclose(y, density.on_grid(x, used), rtol=1e-4, atol=1e-6)
    peak = 0.05 / (used * np.sqrt(2 * np.pi))
    assert ax.get_ylim()[0] == pytest.approx(peak / 3, rel=1e-5)
    assert legend(ax) == [f"largest {high:.3g}"]


def test_the_lowest_peak_of_all_spectra_that_is_more_than_rounding():
    weights = jnp.array([[1 - 1e-3, 1e-3, 1e-10]])
    low = sharpness.SpectralDensity(jnp.array([[0.0, 1.0, 2.0]]), weights)
    for both in ({"a": DENSITY, "b": low}, {"b": low, "a": DENSITY}):
        ax = plot.spectrum(both, width=0.1)
        peak = 1e-3 / (0.1 * np.sqrt(2 * np.pi))
        assert ax.get_ylim()[0] == pytest.approx(peak / 3, rel=1e-4)
        plt.close("all")


def test_a_spectrum_of_equal_values_is_as_wide_as_they_are_large():
    fives = sharpness.SpectralDensity(jnp.full((1, 2), 5.0), jnp.full((1, 2), 0.5))
    x = plot.spectrum(fives).get_lines()[0].get_xdata()
    assert (x[0], x[-1]) == pytest.approx((4.8, 5.2))


@pytest.mark.parametrize(
    ("losses", "lowest", "highest"),
    [
        # Nothing is cut off below 1000 times the smallest.
        (([0.01, 2.0], [0.5, 9.0]), 0.01, 9.0),
        # One panel of high losses beside one of low ones: 1000 times the smallest loss
        # of the panel where that is highest, but at most 1000 there.
        (([0.01, 1e9], [0.5, 1e9]), 0.01, 500.0),
        (([0.01, 1e9], [7.0, 1e9]), 0.01, 1000.0),
        (([3.0, 1e9], [7.0, 1e9]), 3.0, 3000.0),
        # A loss of zero does not stretch the scale to below a millionth.
        (([0.0, 2.0, 0.1],), 2e-6, 2.0),
        (([0.0, 0.0], [0.0, 5.0]), 5e-6, 5.0),
        (([4.0, 4.0],), 4.0, 4.004),
    ],
)
def test_the_colours_of_surfaces_end_where_the_docs_say(losses, lowest, highest):
    edges, norm = plot._levels([np.array(x) for x in losses], 10)
    np.testing.assert_allclose(edges, np.geomspace(lowest, highest, 11))
    assert (norm.vmin, norm.vmax) == (edges[0], edges[-1])
    assert isinstance(norm, matplotlib.colors.LogNorm)


@pytest.mark.parametrize(
    ("losses", "lowest", "highest"),
    [([-1.0, 3.0], -1, 3), ([-2.0, -2.0], -2, -2 + 2e-9), ([0.0, 0.0], 0, 1e-9)],
)
def test_the_colours_of_surfaces_without_a_logarithm(losses, lowest, highest):
    edges, norm = plot._levels([np.array([*losses, np.inf])], 4)
    np.testing.assert_allclose(edges, np.linspace(lowest, highest, 5))
    assert not isinstance(norm, matplotlib.colors.LogNorm)
    assert (norm.vmin, norm.vmax) == (edges[0], edges[-1])
    for constant in (0, -2):
        flat = np.full_like(SURFACE.losses, constant, dtype=np.float32)
        plot.surfaces(SURFACE._replace(losses=flat))[0].figure.canvas.draw()


def test_panels_stand_in_rows_of_three():
    axes = plot.surfaces({str(i): SURFACE for i in range(4)})
    figure = axes[0].figure
    figure.canvas.draw()
    corners = [ax.get_position() for ax in axes]
    assert corners[0].y0 == corners[2].y0 > corners[3].y0
    assert corners[0].x0 == corners[3].x0 < corners[1].x0 < corners[2].x0
    assert tuple(figure.get_size_inches()) == pytest.approx((3 * 3.4 + 0.8, 2 * 3.2))
    ticks = [tick.get_text() for tick in figure.axes[-1].get_yticklabels()]
    assert ticks[0] == "0.01" and len(ticks) == 6
    given = plt.subplots(2, 2)[1]
    used = plot.surfaces({"a": SURFACE, "b": SURFACE}, axes=given)
    assert list(used) == [given[0, 0], given[0, 1]]


def test_a_spectrum_of_one_value_can_be_drawn():
    ax = plot.spectrum(sharpness.SpectralDensity(jnp.zeros((1, 1)), jnp.ones((1, 1))))
    assert legend(ax) == ["largest 0"]


def test_lines_are_drawn_on_the_axes_that_are_given():
    _, given = plt.subplots()
    lines = {name: sharpness.Line(T, k * T**2) for k, name in enumerate(("a", "b"))}
    ax = plot.lines(lines, xlabel="along v", ax=given)
    assert ax is given
    assert legend(ax) == ["a", "b"]
    np.testing.assert_array_equal(ax.get_lines()[1].get_ydata(), T**2)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("along v", "loss")
    assert plot.lines(lines["a"]).get_legend() is None


def test_surfaces_share_their_colours_and_say_which_is_which():
    high = SURFACE._replace(losses=5 * SURFACE.losses)
    axes = plot.surfaces({"SAM": SURFACE, "SGD": high, "more": high, "last": high})
    assert [ax.get_title() for ax in axes] == ["SAM", "SGD", "more", "last"]
    levels = [ax.collections[0].levels for ax in axes]
    np.testing.assert_array_equal(levels[0], levels[1])
    norms = [ax.collections[0].norm for ax in axes]
    assert all(isinstance(norm, matplotlib.colors.LogNorm) for norm in norms)
    for ax in axes:
        (cross,) = ax.get_lines()
        assert cross.get_xydata().tolist() == [[0, 0]]
    assert levels[0][0] == pytest.approx(0.01)
    assert levels[0][-1] == pytest.approx(5 * 2.01)
    assert axes[0].get_xlim() == (-1, 1)
    assert axes[0].get_ylim() == (-1, 0)
    assert len(axes[0].figure.axes) == 5  # four panels and the colour bar


def test_one_surface_that_explodes_does_not_hide_the_others():
    exploding = SURFACE._replace(losses=1e9 ** (1 + SURFACE.losses))
    axes = plot.surfaces({"SAM": SURFACE, "SGD": exploding})
    edges = axes[0].collections[0].levels
    assert np.sum((edges > 0.01) & (edges < 2.01)) >= 4
    axes[0].figure.canvas.draw()


def test_negative_losses_have_even_levels():
    axes = plot.surfaces(SURFACE._replace(losses=SURFACE.losses - 1))
    np.testing.assert_allclose(
        axes[0].collections[0].levels, np.linspace(-0.99, 1.01, 21)
    )


def test_large_losses_spread_over_all_colours():
    losses = np.linspace(5000.0, 9000.0, SURFACE.losses.size)
    axes = plot.surfaces(SURFACE._replace(losses=losses.reshape(SURFACE.losses.shape)))
    edges = axes[0].collections[0].levels
    assert edges[0] == pytest.approx(5000.0) and edges[-1] == pytest.approx(9000.0)


def test_losses_that_overflow_or_vanish_do_not_spoil_a_surface():
    losses = np.array(SURFACE.losses)
    losses[0, 0], losses[1, 1], losses[2, 2] = np.inf, np.nan, 0
    axes = plot.surfaces(SURFACE._replace(losses=losses))
    axes[0].figure.canvas.draw()
    assert axes[0].collections[0].levels[-1] < 3


def test_training_shows_every_field_and_leaves_out_skipped_steps():
    axes = plot.training({"SAM": recorder(), "LookSAM": recorder(skipped=(1, 3))})
    assert [ax.get_title() for ax in axes] == [
        *("loss", "perturbed loss", "surrogate gap", "norms of g and gᵃ"),
        *("cosine of g and gᵃ", "norm of ε"),
    ]
    assert list(axes[0].get_lines()[1].get_xdata()) == [0, 1, 2, 3]
    for ax in (*axes[1:3], *axes[4:]):
        assert list(ax.get_lines()[1].get_xdata()) == [0, 2]
        assert list(ax.get_lines()[1].get_ydata()) == [0, 2]
    assert [ax.get_ylim()[0] == 0 for ax in axes] == [False] * 3 + [True, False, True]


def look(line):
    """What tells a line from others of the same panel."""
    return line.get_color(), line.get_linestyle(), line.get_marker()


def test_every_line_of_a_training_is_named_and_the_runs_can_be_told_apart():
    names = [f"run {i}" for i in range(10)]
    axes = plot.training({name: recorder() for name in names})
    for ax in axes:
        lines = ax.get_lines()
        assert len({look(line) for line in lines}) == len(lines)
    assert [line.get_label() for line in axes[3].get_lines()[:3]] == [
        *("run 0, ‖g‖", "run 0, ‖gᵃ‖", "run 1, ‖g‖")
    ]
    assert legend(axes[3]) == ["‖g‖", "‖gᵃ‖"]
    (runs,) = axes[0].figure.legends
    assert [text.get_text() for text in runs.get_texts()] == names
    shown = [look(line) for line in runs.get_lines()]
    assert shown == [look(line) for line in axes[0].get_lines()]
    # The legend has a place of its own.
    axes[0].figure.canvas.draw()
    below = runs.get_window_extent().y1
    assert all(ax.get_tightbbox().y0 >= below for ax in axes)


def test_a_training_alone_and_one_on_axes_that_are_given():
    axes = plot.training(recorder())
    assert axes[0].figure.legends == []
    assert [ax.get_lines()[0].get_label() for ax in axes] == [
        *("loss", "perturbed loss", "surrogate gap", "‖g‖", "cosine", "‖ε‖")
    ]
    assert [ax.get_legend() is None for ax in axes] == [True] * 3 + [False] + [True] * 2
    figure, given = plt.subplots(2, 3)
    plot.training({"SAM": recorder(), "SGD": recorder()}, axes=given)
    assert figure.legends == []
    assert legend(given[0, 0]) == ["SAM", "SGD"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot.lines({}), "nothing to draw"),
        (
            lambda: plot.training(recorder(), axes=[None] * 5),
            "6 axes are needed, got 5",
        ),
        (
            lambda: plot.surfaces(SURFACE._replace(losses=np.full((5, 9), np.nan))),
            "holds no finite loss",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- The recorder.

SCALAR = sam_optax.Report(*[jnp.float32(0.5)] * 6, ascended=jnp.bool_(True))


def test_a_recorder_joins_steps_and_stacks_of_steps():
    kept = recorder(steps=3)
    kept.add(jnp.float32(7), SCALAR)
    kept.add(jnp.float32(8), SCALAR, step=jnp.int32(10))  # as a TrainState has it
    assert len(kept) == 5
    arrays = kept.arrays()
    assert set(arrays) == {"step", "loss", *sam_optax.Report._fields}
    assert list(arrays["step"]) == [0, 1, 2, 3, 10]
    assert list(arrays["loss"]) == [0, 1, 2, 7, 8]
    assert list(arrays["cosine"]) == [0, 1, 2, 0.5, 0.5]
    kept.add(jnp.float32(9), SCALAR)
    assert kept.arrays()["step"][-1] == 11
    # What was fetched stays on the host.
    assert not any(isinstance(x, jax.Array) for v in kept._values for x in v.values())
    assert list(kept.arrays()["loss"])[:5] == [0, 1, 2, 7, 8]


def test_old_records_leave_the_device(monkeypatch):
    monkeypatch.setattr("sam_optax._recorder._KEPT_ON_DEVICE", 3)
    kept = sam_optax.Recorder()
    for step in range(10):
        kept.add(jnp.float32(step), SCALAR)
    on_device = [isinstance(v["loss"], jax.Array) for v in kept._values]
    assert on_device == [False] * 6 + [True] * 4
    assert list(kept.arrays()["loss"]) == list(range(10))


def test_a_recorder_without_steps_is_empty():
    empty = sam_optax.Recorder()
    assert len(empty) == 0
    assert all(len(values) == 0 for values in empty.arrays().values())


def test_a_recorder_hands_each_step_to_a_logger():
    rows = []
    kept = sam_optax.Recorder(log=lambda step, values: rows.append((step, values)))
    kept.add(jnp.float32(7), SCALAR, step=3)
    kept.add(jnp.ones(2), sam_optax.Report(*[jnp.arange(2.0)] * 7))
    assert [step for step, _ in rows] == [3, 4, 5]
    assert rows[0][1]["loss"] == 7
    assert [values["cosine"] for _, values in rows] == [0.5, 0, 1]
    assert all(type(x) is float for _, values in rows for x in values.values())


def test_columns_of_the_user_are_recorded_beside_the_fields():
    rows = []
    kept = sam_optax.Recorder(log=lambda step, values: rows.append(values))
    kept.add(jnp.float32(7), SCALAR, lr=0.1, accuracy=jnp.float32(0.5))
    stacked = sam_optax.Report(*[jnp.arange(2.0)] * 7)
    kept.add(jnp.ones(2), stacked, accuracy=jnp.array([0.7, 0.8]), lr=[0.2, 0.3])
    kept.add(7.0, SCALAR, lr=np.float32(0.4), accuracy=float("nan"))
    arrays = kept.arrays()
    assert list(arrays)[-2:] == ["lr", "accuracy"]
    np.testing.assert_allclose(arrays["lr"], [0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    np.testing.assert_allclose(arrays["accuracy"], [0.5, 0.7, 0.8, np.nan], rtol=1e-6)
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rows[2]["accuracy"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"those of the first: \['lr'\]. Here \['lr'\] are missing"),
        ({"lr": 1, "new": 2}, r"Here \[\] are missing, and \['new'\] are new.*'nan'"),
        ({"lr": 1, "cosine": 2}, "cannot be called 'cosine': that is a field"),
        ({"lr": [1, 2]}, r"as many steps each; their shapes are \[\(\), \(2,\)\]"),
        ({"lr": "small"}, "lr must hold real numbers, got 'small'"),
        ({"lr": 1j}, "lr must hold real numbers"),
        ({"lr": jax.random.key(0)}, "lr must hold real numbers"),
    ],
)
def test_columns_that_cannot_be_recorded(columns, message):
    kept = sam_optax.Recorder()
    kept.add(1.0, SCALAR, lr=0.1)
    with pytest.raises((ValueError, TypeError), match=message):
        kept.add(1.0, SCALAR, **columns)
    assert len(kept) == 1 and len(kept.arrays()["lr"]) == 1


@pytest.mark.parametrize("scanned", [False, True])
def test_values_of_each_device_are_no_steps(scanned):
    def step(x):
        return x, sam_optax.Report(*[x] * 7)

    count = jax.device_count()
    assert count > 1
    x = jnp.arange(3.0 * count).reshape(count, 3) if scanned else jnp.arange(count)
    loss, report = jax.pmap(step)(x * 1.0)
    kept = sam_optax.Recorder()
    with pytest.raises(ValueError, match=r"spread over devices.*lambda x: x\[0\]"):
        kept.add(loss, report)
    with pytest.raises(ValueError, match=r"shape|spread"):
        kept.add(*jax.device_get((loss, report)) if scanned else (loss, report))
    kept.add(*jax.tree.map(lambda x: x[0], (loss, report)))
    assert list(kept.arrays()["loss"]) == ([0, 1, 2] if scanned else [0])


def test_steps_of_a_scan_over_many_devices_are_steps():
    """Replicated values have one for each step, however many devices hold them."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    values = jax.device_put(jnp.arange(16.0), whole)
    kept = sam_optax.Recorder()
    kept.add(values, sam_optax.Report(*[values] * 7))
    assert len(kept) == 16


@pytest.mark.parametrize(
    ("loss", "report", "message"),
    [
        (jnp.ones(3), SCALAR, r"\(3,\)\]\.$"),
        (jnp.ones(3), sam_optax.Report(*[jnp.ones((2, 2))] * 7), "devices of a pmap"),
        (1.0, None, r"sam_value_and_grad\(..., report=True\)"),
        (jnp.ones(3), SCALAR, "as many steps each; their shapes are"),
        (jnp.ones((2, 2)), sam_optax.Report(*[jnp.ones((2, 2))] * 7), "shapes are"),
    ],
)
def test_a_recorder_takes_reports_only(loss, report, message):
    with pytest.raises((TypeError, ValueError), match=message):
        sam_optax.Recorder().add(loss, report)
    with pytest.raises(TypeError, match="step must be an integer"):
        sam_optax.Recorder().add(1.0, SCALAR, step=1.5)
    with pytest.raises(TypeError, match="step must be an integer"):
        sam_optax.Recorder().add(1.0, SCALAR, step=jnp.arange(2))
    for step in (jnp.float32(1.5), jnp.bool_(True)):
        with pytest.raises(TypeError, match="step must be an integer"):
            sam_optax.Recorder().add(1.0, SCALAR, step=step)
    with pytest.raises(TypeError, match="keeps values, not tracers"):
        jax.jit(lambda loss: sam_optax.Recorder().add(loss, SCALAR))(1.0)
    with pytest.raises(TypeError, match="log must be a function"):
        sam_optax.Recorder(log="tensorboard")
