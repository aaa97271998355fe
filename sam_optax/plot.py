"""Plots of sharpness: spectra, slices of the loss, and the course of training.

Each function takes one result of `sam_optax.sharpness` (`training` takes a `Recorder`),
or a dict of several by name, which it draws on the same scales to compare them. It
draws on the axes that you pass, or on new ones, and returns them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sam_optax._recorder import Recorder
from sam_optax.sharpness import Line, SpectralDensity, Surface

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.lines import Line2D
except ImportError as error:
    raise ImportError(
        'sam_optax.plot needs matplotlib. To install it: pip install "sam_optax[plot]".'
    ) from error


def spectrum(
    densities: SpectralDensity | Mapping[str, SpectralDensity],
    *,
    width: float | None = None,
    points: int = 2000,
    ax: Axes | None = None,
) -> Axes:
    """The density of eigenvalues on a logarithmic scale, one curve per solution.

    Args:
      densities: from `sharpness.spectral_density`; one, or a dict of several by name.
      width: each node is drawn as a Gaussian; this is its standard deviation. Default
        None: for each solution, a hundredth of the range of its nodes.
      points: how many points each curve has. Default 2000.
      ax: where to draw. Default None: on new axes.

    Returns:
      The axes. A dashed line marks the largest node of each solution, which is close to
      its largest eigenvalue.

    Raises:
      ValueError: if the dict is empty, nodes are not finite, or width <= 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import plot, sharpness
      >>> H = sharpness.hessian(lambda w, x: (x @ w**2).mean(), jnp.ones(2), jnp.eye(2))
      >>> ax = plot.spectrum(sharpness.spectral_density(H))
      >>> ax.get_xlabel()
      'eigenvalue'
    """
    ax = _axes(ax)
    lowest = np.inf
    for name, density in _named(densities).items():
        nodes, weights = np.asarray(density.nodes), np.asarray(density.weights)
        if not np.all(np.isfinite(nodes)):
            raise ValueError(f"The nodes of the spectrum {name!r} are not finite.")
        span = float(np.ptp(nodes)) or abs(float(nodes.max())) or 1.0
        own_width = span / 100 if width is None else width
        margin = max(4 * own_width, 0.03 * span)
        grid = np.linspace(nodes.min() - margin, nodes.max() + margin, points)
        curve = np.asarray(density.on_grid(grid, own_width))
        (line,) = ax.plot(grid, curve, label=_label(name, float(nodes.max())))
        ax.axvline(nodes.max(), color=line.get_color(), linestyle="--", linewidth=1)
        # The height of the lowest peak whose weight is more than a rounding error.
        shares = weights / len(weights)
        least = shares[shares > 1e-9].min() / (own_width * np.sqrt(2 * np.pi))
        lowest = min(lowest, least)
    ax.set_yscale("log")
    ax.set_ylim(bottom=lowest / 3)
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("density")
    ax.legend()
    return ax


def lines(
    named_lines: Line | Mapping[str, Line],
    *,
    xlabel: str = "distance",
    ax: Axes | None = None,
) -> Axes:
    """The loss along lines, one curve per solution.

    Args:
      named_lines: from `sharpness.along_line` or `sharpness.interpolate`; one, or a
        dict of several by name.
      xlabel: the label of the distances. Default "distance".
      ax: where to draw. Default None: on new axes.

    Returns:
      The axes.

    Raises:
      ValueError: if the dict is empty.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import plot, sharpness
      >>> t = jnp.linspace(-1, 1, 5)
      >>> ax = plot.lines({"wide": sharpness.Line(t, t**2),
      ...                  "sharp": sharpness.Line(t, 9 * t**2)})
      >>> ax.get_ylabel()
      'loss'
    """
    ax = _axes(ax)
    for name, line in _named(named_lines).items():
        ax.plot(np.asarray(line.distances), np.asarray(line.losses), label=name or None)
    ax.set_xlabel(xlabel)
    ax.set_ylabel("loss")
    _legend(ax)
    return ax


def surfaces(
    named_surfaces: Surface | Mapping[str, Surface],
    *,
    levels: int = 20,
    axes: Any = None,
) -> Any:
    """The loss over planes: contours in a panel per solution, with shared colours.

    Args:
      named_surfaces: from `sharpness.over_plane`; one, or a dict of several by name.
      levels: into how many intervals of colour the losses are divided. These are equal
        in the logarithm of the loss, or in the loss itself if some losses are negative.
        Default 20.
      axes: an array of axes, at least one for each solution. Default None: new ones, in
        rows of three.

    Returns:
      An array of axes, shape (solutions,). A cross marks the parameters. On the
      logarithmic scale, losses above a limit share the last colour, so that one high
      corner does not hide the rest. Take the smallest positive loss of each panel, and
      of these the largest. The limit is 1000 times that, or 1000 if it is above 1; but
      it is always 1000 times the smallest positive loss at least.

    Raises:
      ValueError: if the dict is empty, there are too few axes, or a surface has no
        finite loss.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import plot, sharpness
      >>> t = jnp.linspace(-1, 1, 5)
      >>> surface = sharpness.Surface(t, t, t[:, None]**2 + t**2)
      >>> len(plot.surfaces({"one": surface, "other": surface}))
      2
    """
    named = _named(named_surfaces)
    axes = _panels(axes, len(named), size=(3.4, 3.2))
    edges, norm = _levels([np.asarray(s.losses) for s in named.values()], levels)
    contours = None
    for (name, surface), ax in zip(named.items(), axes, strict=True):
        xs, ys = np.asarray(surface.xs), np.asarray(surface.ys)
        # Zero has no logarithm. Raising losses to the first edge does not change their
        # colour: all losses below it have the first colour.
        heights = np.ma.masked_invalid(np.maximum(surface.losses, edges[0]))
        contours = ax.contourf(xs, ys, heights, levels=edges, norm=norm, extend="both")
        ax.contour(xs, ys, heights, levels=edges[::3], colors="black", linewidths=0.4)
        ax.plot(0, 0, "w+", markersize=9, markeredgewidth=2)
        ax.set_title(name)
        ax.set_xlabel("first direction")
        ax.set_ylabel("second direction")
    bar = axes[0].figure.colorbar(contours, ax=list(axes), label="loss")
    bar.set_ticks(edges[:: max(1, levels // 5)])
    bar.set_ticklabels([f"{edge:.2g}" for edge in edges[:: max(1, levels // 5)]])
    bar.ax.minorticks_off()
    return axes


def training(
    recorders: Recorder | Mapping[str, Recorder],
    *,
    axes: Any = None,
) -> Any:
    """What recorders have recorded: a panel per quantity, a curve per training run.

    Args:
      recorders: one `Recorder`, or a dict of several by name.
      axes: an array of at least six axes. Default None: new ones.

    Returns:
      An array of six axes. Each run has one colour in all of them (and beyond eight
      runs, a marker). A legend of the runs is below new axes, or in the first of those
      that you pass. The six axes show the loss, the perturbed loss, the surrogate gap,
      the norms of the gradients g at the parameters and gᵃ at the perturbed point, the
      cosine between the two, and the norm of the perturbation ε. For steps that did not
      ascend, only the loss and ‖g‖ are drawn. NaN leaves a gap in a curve.

    Raises:
      ValueError: if the dict is empty, or there are too few axes.

    Examples:
      >>> import numpy as np, sam_optax
      >>> from sam_optax import plot
      >>> recorder = sam_optax.Recorder()
      >>> zeros = np.zeros(3)
      >>> recorder.add(zeros, sam_optax.Report(*[zeros] * 7))
      >>> len(plot.training(recorder))
      6
    """
    named = _named(recorders)
    is_own_figure = axes is None
    axes = _panels(axes, len(_PANELS), size=(3.6, 2.5))
    records = {name: recorder.arrays() for name, recorder in named.items()}
    for ax, (title, fields) in zip(axes, _PANELS.items(), strict=True):
        for i, (name, arrays) in enumerate(records.items()):
            for (field, label), dashes in zip(fields.items(), _DASHES, strict=False):
                always = field in ("loss", "ascent_norm")
                shown = always | np.asarray(arrays["ascended"], bool)
                steps, values = arrays["step"][shown], arrays[field][shown]
                text = f"{name}, {label}" if name else label
                style = _style(i) | {"markevery": max(1, len(steps) // 10)}
                ax.plot(steps, values, dashes, label=text, linewidth=1, **style)
        if title.startswith("norm"):  # from 0, or rounding would look like a change
            ax.set_ylim(0, 1.15 * max(ax.get_ylim()[1], 0) or 1)
        ax.set_title(title)
        ax.set_xlabel("step")
        if len(fields) > 1:
            # Grey, because a dash pattern is that of a field in every run.
            lines = [Line2D([], [], color="grey", linestyle=dash) for dash in _DASHES]
            ax.legend(lines, fields.values(), fontsize="small")
    if list(records) != [""]:
        lines = [Line2D([], [], **_style(i)) for i in range(len(records))]
        if is_own_figure:
            columns = min(len(records), 4)
            axes[0].figure.legend(
                lines, records, loc="outside lower center", ncols=columns
            )
        else:
            axes[0].legend(lines, records, fontsize="small")
    return axes


# The title of each panel, and the recorded fields in it with the names of their lines.
_PANELS = {
    "loss": {"loss": "loss"},
    "perturbed loss": {"perturbed_loss": "perturbed loss"},
    "surrogate gap": {"surrogate_gap": "surrogate gap"},
    "norms of g and gᵃ": {"ascent_norm": "‖g‖", "descent_norm": "‖gᵃ‖"},
    "cosine of g and gᵃ": {"cosine": "cosine"},
    "norm of ε": {"perturbation_norm": "‖ε‖"},
}
_DASHES = ("-", "--")

# The colours of Okabe and Ito, which the colour-blind can tell apart, without yellow,
# which is too light for a thin line.
_COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00"),
    *("#CC79A7", "#56B4E9", "#000000", "#999999"),
)
_MARKERS = ("", "o", "s", "^", "x")


def _style(i: int) -> dict[str, Any]:
    """What tells the i-th of several curves from the others."""
    marker = _MARKERS[i // len(_COLOURS) % len(_MARKERS)]
    return {
        "color": _COLOURS[i % len(_COLOURS)],
        "marker": marker,
        "markersize": 4,
    }


def _named(results: Any) -> dict[str, Any]:
    """Results by name. A single result gets an empty name, which no legend shows."""
    named = dict(results) if isinstance(results, Mapping) else {"": results}
    if not named:
        raise ValueError("There is nothing to draw.")
    return named


def _label(name: str, largest: float) -> str:
    return f"{name}, largest {largest:.3g}" if name else f"largest {largest:.3g}"


def _legend(ax: Axes) -> None:
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize="small")


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    ax = plt.subplots(layout="constrained")[1]
    ax.set_prop_cycle(color=_COLOURS)
    return ax


def _panels(axes: Any, count: int, size: tuple[float, float]) -> Any:
    if axes is not None:
        axes = np.ravel(axes)
        if len(axes) < count:
            raise ValueError(f"{count} axes are needed, got {len(axes)}.")
        return axes[:count]
    columns = min(count, 3)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        squeeze=False,
        figsize=(columns * size[0] + 0.8, rows * size[1]),
        layout="constrained",
    )
    for unused in axes.ravel()[count:]:
        figure.delaxes(unused)
    return axes.ravel()[:count]


def _levels(losses: list[np.ndarray], count: int) -> tuple[np.ndarray, Normalize]:
    """The edges between colours, and the scale on which they are evenly spaced."""
    known = [x[np.isfinite(x)].astype(np.float64) for x in losses]
    if not all(x.size for x in known):
        raise ValueError("A surface holds no finite loss.")
    lowest, highest = min(x.min() for x in known), max(x.max() for x in known)
    if lowest < 0 or highest == 0:
        margin = 1e-9 * max(1, abs(lowest))
        edges = np.linspace(lowest, max(highest, lowest + margin), count + 1)
        return edges, Normalize(edges[0], edges[-1])
    # A corner with huge losses, or a loss of exactly zero, must not stretch the scale
    # until the minima cannot be told apart.
    smallest = [x[x > 0].min() for x in known if np.any(x > 0)]
    limit = max(min(x, 1.0) for x in smallest)
    highest = min(highest, 1e3 * max(limit, min(smallest)))
    lowest = max(lowest, 1e-6 * highest)
    edges = np.geomspace(lowest, max(highest, 1.001 * lowest), count + 1)
    return edges, LogNorm(edges[0], edges[-1])
