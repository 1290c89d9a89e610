"""Clouds of points: the two scores, and similarity to the source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.stats import gaussian_kde, wasserstein_distance

from sonofed_simulations.report.figures import (
    CHOSEN,
    INK,
    REST,
    SOFT,
    SOURCE,
    WIDTH,
    data_uri,
    drawing,
)
from sonofed_simulations.report.view import Floats, ScoredView, SiteView, SourceView

Points = NDArray[np.float64]


def scores(views: Sequence[ScoredView]) -> str:
    """Histograms of both scores and their scatter, a row a site; a PNG data URI."""
    with drawing(WIDTH, 0.35 + 1.75 * len(views)) as figure:
        grid = figure.subplots(len(views), 3, squeeze=False, sharex="col", width_ratios=(1, 1, 1.1))
        u_edges = _edges([view.uncertainty for view in views])
        r_edges = _edges([view.representativeness for view in views])
        for row, view in zip(grid, views, strict=True):
            row[2].sharey(grid[0, 2])
            _histogram(row[0], view.uncertainty, view.selected, u_edges)
            _histogram(row[1], view.representativeness, view.selected, r_edges)
            for mask, style in layers(view.selected):
                row[2].scatter(view.uncertainty[mask], view.representativeness[mask], **style)
            row[2].set_ylabel("r (radians)")
            row[0].set_ylabel(view.name, color=INK, fontweight="bold", fontsize=9)
        grid[0, 0].set_title("uncertainty u", fontweight="normal")
        grid[0, 1].set_title("representativeness r", fontweight="normal")
        grid[0, 2].set_title("both", fontweight="normal")
        for axes, label in zip(
            grid[-1], ("u (radians)", "r (radians)", "u (radians)"), strict=True
        ):
            axes.set_xlabel(label)
        return data_uri(figure, "png")


def similarity(features: Floats, source: SourceView) -> Points:
    """Cosine of each feature vector to the mean source feature (ADAptation, Table 1).

    Parameters
    ----------
    features : ndarray (N, F)
        Backbone features.
    source : SourceView
        The source's features, (M, F).

    Returns
    -------
    ndarray (N,)
        In [-1, 1].
    """
    mean = source.features.mean(axis=0).astype(np.float64)
    lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(mean)
    cosine: Points = features.astype(np.float64) @ mean / np.maximum(lengths, 1e-12)
    return cosine


def similarity_row(values: Points, source: Points) -> dict[str, float]:
    """Mean, standard deviation and Wasserstein distance to the source's own similarities."""
    distance = float(wasserstein_distance(values, source))
    return {"mean": float(values.mean()), "std": float(values.std()), "distance": distance}


def similarity_densities(views: Sequence[SiteView], source: SourceView) -> str:
    """Densities of similarity to the source before and after reconstruction; an SVG data URI."""
    columns = min(4, len(views))
    rows = -(-len(views) // columns)
    own = similarity(source.features, source)
    with drawing(WIDTH, 0.7 + 1.8 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for axes in grid.flat[len(views) :]:
            axes.set_visible(False)
        for axes, view in zip(grid.flat, views, strict=False):
            density(axes, own, SOURCE, "source images", filled=True)
            density(axes, similarity(view.features, source), CHOSEN, "this site's images")
            if view.reconstruction_features is not None:
                redrawn = similarity(view.reconstruction_features, source)
                density(axes, redrawn, "#0b6aa8", "their reconstructions")
            axes.set(yticks=[], ylim=(0, None), title=view.name)
            axes.spines["left"].set_visible(False)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3)
        figure.supxlabel("cosine similarity to the mean source feature", fontsize=8.5, color=SOFT)
        return data_uri(figure)


def density(axes: Axes, values: Points, colour: str, label: str, filled: bool = False) -> None:
    """Draw the kernel density of values (N,), or a line where they hardly differ."""
    if len(values) < 3 or np.ptp(values) < 1e-9:
        axes.axvline(float(np.mean(values)) if len(values) else 0.0, color=colour, label=label)
        return
    low, high = np.quantile(values, [0.0, 1.0])
    margin = 0.15 * (high - low)
    grid = np.linspace(low - margin, min(high + margin, 1.0), 160)
    height = gaussian_kde(values)(grid)
    if filled:
        axes.fill_between(grid, height, color=colour, alpha=0.55, linewidth=0, label=label)
    else:
        axes.plot(grid, height, color=colour, linewidth=1.6, label=label)


def _edges(values: Sequence[Floats]) -> list[float]:
    pooled = np.concatenate(values)
    edges: list[float] = np.histogram_bin_edges(pooled[np.isfinite(pooled)], bins=32).tolist()
    return edges


def _histogram(axes: Axes, values: Floats, selected: NDArray[np.bool_], edges: list[float]) -> None:
    axes.stairs(np.histogram(values, edges)[0], edges, fill=True, color=REST, alpha=0.45)
    axes.stairs(np.histogram(values[selected], edges)[0], edges, fill=True, color=CHOSEN)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def layers(selected: NDArray[np.bool_]) -> list[tuple[NDArray[np.bool_], dict[str, Any]]]:
    """Masks and scatter styles: the images not chosen below, the chosen above."""
    rest: dict[str, Any] = {"s": 9, "color": REST, "alpha": 0.55, "linewidths": 0}
    return [(~selected, rest), (selected, {**rest, "s": 16, "color": CHOSEN, "alpha": 0.9})]
