"""Pictures of sharpness: spectra, slices of the loss, and training as it went.

Each function takes one result of `sam_optax.sharpness` (or one `Recorder`), or a dict
from names to several, which are drawn side by side in the same scales. Each draws on
the axes it is given, or on new ones, and returns them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sam_optax._recorder import Recorder
from sam_optax.sharpness import Line, SpectralDensity, Surface

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
except ImportError as error:
    raise ImportError(
        'sam_optax.plot draws with matplotlib: pip install "sam_optax[plot]".'
    ) from error


def spectrum(
    densities: SpectralDensity | Mapping[str, SpectralDensity],
    *,
    width: float | None = None,
    points: int = 2000,
    ax: Axes | None = None,
) -> Axes:
    """The density of eigenvalues on a logarithmic axis, one curve per solution.

    Args:
      densities: from `sharpness.spectral_density`, one or several by name.
      width: standard deviation of the Gaussian that each node is drawn as. Default
        None: a hundredth of the range of all nodes.
      points: of the curves. Default 2000.
      ax: where to draw. Default None: on new axes.

    Returns:
      The axes. A dashed line marks the largest node of each solution, which is close to
      its largest eigenvalue.

    Raises:
      ValueError: if there is nothing to draw.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sam_optax import plot, sharpness
      >>> H = sharpness.hessian(lambda w, x: (x @ w**2).mean(), jnp.ones(2), jnp.eye(2))
      >>> ax = plot.spectrum(sharpness.spectral_density(H))
      >>> ax.get_xlabel()
      'eigenvalue'
    """
    named = _named(densities)
    nodes = np.concatenate([np.ravel(density.nodes) for density in named.values()])
    span = float(np.ptp(nodes)) or abs(float(nodes[0])) or 1.0
    width = span / 100 if width is None else width
    margin = max(4 * width, 0.03 * span)
    grid = np.linspace(nodes.min() - margin, nodes.max() + margin, points)

    ax = _axes(ax)
    lowest = np.inf
    for i, (name, density) in enumerate(named.items()):
        curve = np.asarray(density.on_grid(grid, width))
        largest = float(np.max(density.nodes))
        ax.plot(grid, curve, color=f"C{i}", label=_label(name, largest))
        ax.axvline(largest, color=f"C{i}", linestyle="--", linewidth=1)
        # A node of the least weight that is not rounding, as high as it is drawn.
        weights = np.asarray(density.weights) / len(density.weights)
        least = weights[weights > 1e-9].min() / (width * np.sqrt(2 * np.pi))
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
      named_lines: from `sharpness.along_line` or `interpolate`, one or several by name.
      xlabel: what the distance is. Default "distance".
      ax: where to draw. Default None: on new axes.

    Returns:
      The axes.

    Raises:
      ValueError: if there is nothing to draw.

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
    """The loss over planes: a panel of contours per solution, in the same colours.

    Args:
      named_surfaces: from `sharpness.over_plane`, one or several by name.
      levels: how many, spaced evenly in the logarithm of the loss. Default 20.
      axes: an array of as many axes. Default None: new ones, in rows of three.

    Returns:
      An array of axes, shape (solutions,). A cross marks the parameters.

    Raises:
      ValueError: if there is nothing to draw, there are too few axes, or no loss is
        finite.

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
    losses = np.concatenate([np.ravel(s.losses) for s in named.values()])
    edges = _levels(losses[np.isfinite(losses)], levels)
    contours = None
    for (name, surface), ax in zip(named.items(), axes, strict=True):
        xs, ys = np.asarray(surface.xs), np.asarray(surface.ys)
        heights = np.clip(np.asarray(surface.losses), edges[0], edges[-1])
        contours = ax.contourf(xs, ys, heights, levels=edges, norm="log")
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
    """What recorders kept, over the steps: a panel per quantity, a curve per training.

    Args:
      recorders: one or several by name.
      axes: an array of six axes. Default None: new ones.

    Returns:
      An array of six axes: loss, perturbed loss, surrogate gap, the norms of both
      gradients, the cosine between them, and the norm of the perturbation.

    Raises:
      ValueError: if there is nothing to draw, or there are too few axes.

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
    axes = _panels(axes, len(_PANELS), size=(3.6, 2.5))
    for ax, (title, styles) in zip(axes, _PANELS.items(), strict=True):
        for i, (name, recorder) in enumerate(named.items()):
            arrays = recorder.arrays()
            for (field, label), style in zip(styles.items(), ("-", ":"), strict=False):
                text = ", ".join(part for part in (name, label) if part)
                # Steps without a second gradient have nothing to show in some panels.
                known = np.isfinite(arrays[field])
                steps, values = arrays["step"][known], arrays[field][known]
                ax.plot(steps, values, style, color=f"C{i}", label=text or None)
        ax.set_title(title)
        ax.set_xlabel("step")
        _legend(ax)
    return axes


# Title of a panel -> recorded fields -> what tells them apart in the legend.
_PANELS = {
    "loss": {"loss": ""},
    "perturbed loss": {"perturbed_loss": ""},
    "surrogate gap": {"surrogate_gap": ""},
    "norms of g and gᵃ": {"ascent_norm": "g", "descent_norm": "gᵃ"},
    "cosine of g and gᵃ": {"cosine": ""},
    "norm of ε": {"perturbation_norm": ""},
}


def _named(results: Any) -> dict[str, Any]:
    """By name; one alone has an empty name, which no legend shows."""
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
    return plt.subplots(layout="constrained")[1] if ax is None else ax


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


def _levels(losses: np.ndarray, count: int) -> np.ndarray:
    if losses.size == 0 or losses.max() <= 0:
        raise ValueError("No loss is finite and above zero.")
    # A loss of exactly zero would need infinitely many decades.
    lowest = max(losses.min(), losses.max() * 1e-6)
    return np.geomspace(lowest, max(losses.max(), 1.001 * lowest), count + 1)
