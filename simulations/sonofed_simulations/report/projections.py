"""Projections: the embedding sphere and t-SNE of backbone features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from sonofed_simulations.report.clouds import layers
from sonofed_simulations.report.figures import (
    FAINT,
    SITE_MARKERS,
    SOURCE,
    WIDTH,
    data_uri,
    drawing,
    site_colours,
)
from sonofed_simulations.report.view import ScoredView, SiteView, SourceView

Points = NDArray[np.float64]
MOST_POINTS = 1500


def sphere(views: Sequence[ScoredView]) -> tuple[str, float]:
    """The embeddings on a sphere seen from in front, a panel a site.

    Parameters
    ----------
    views : sequence of ScoredView
        One PCA over all sites gives three directions; each point is then scaled to length 1.

    Returns
    -------
    tuple
        A PNG data URI, and the share of variance that the three directions hold.
    """
    pooled = np.concatenate([view.embeddings for view in views]).astype(np.float64)
    pca = PCA(n_components=min(3, *pooled.shape)).fit(pooled)
    columns = min(4, len(views))
    rows = -(-len(views) // columns)
    with drawing(WIDTH, rows * (WIDTH / max(columns, 3) + 0.25)) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(views) :]:
            axes.set_visible(False)
        for axes, view in zip(grid.flat, views, strict=False):
            _ball(axes)
            points = np.zeros((len(view.images), 3))
            projected = pca.transform(view.embeddings.astype(np.float64))
            points[:, : projected.shape[1]] = projected
            length = np.linalg.norm(points, axis=1, keepdims=True)
            points = _tilt(points / np.maximum(length, 1e-12))
            for mask, style in layers(view.selected):
                for side, fade in ((points[:, 2] < 0, 0.3), (points[:, 2] >= 0, 1.0)):
                    shown = mask & side
                    alpha = style["alpha"] * fade
                    axes.scatter(*points[shown, :2].T, **{**style, "alpha": alpha})
            axes.set_title(view.name)
        return data_uri(figure, "png"), float(pca.explained_variance_ratio_.sum())


def tsne(views: Sequence[SiteView], source: SourceView | None, seed: int) -> tuple[str, int] | None:
    """t-SNE of backbone features: by origin, and by what was chosen.

    Parameters
    ----------
    views : sequence of SiteView
        Sites.
    source : SourceView or None
        The source's features, drawn in grey.
    seed : int
        Seed of the subsample and of the map.

    Returns
    -------
    tuple or None
        A PNG data URI and how many points it shows; None below eight points.
    """
    clouds = [view.features for view in views] + ([source.features] if source else [])
    features = np.concatenate(clouds).astype(np.float32)
    origin = np.repeat(np.arange(len(clouds)), [len(c) for c in clouds])
    flags = [view.selected for view in views]
    selected = np.concatenate([*flags, *([np.zeros(len(source.features), bool)] if source else [])])
    if len(features) < 8:
        return None
    kept = np.arange(len(features))
    if len(kept) > MOST_POINTS:
        kept = np.sort(np.random.default_rng(seed).choice(kept, MOST_POINTS, replace=False))
    features, origin, selected = features[kept], origin[kept], selected[kept]
    components = min(30, *features.shape)
    reduced = PCA(n_components=components, random_state=seed % 2**32).fit_transform(features)
    perplexity = min(30.0, (len(kept) - 1) / 3)
    settings = {"max_iter": 400, "init": "pca", "random_state": seed % 2**32}
    # Idle OpenMP threads spin between short steps: one thread is faster, and repeatable.
    with threadpool_limits(1):
        points = TSNE(perplexity=perplexity, **settings).fit_transform(reduced)
    colours = [*site_colours([v.name for v in views]).values(), SOURCE]
    names = [*(view.name for view in views), "source"]
    with drawing(WIDTH, WIDTH * 0.53) as figure:
        first, second = figure.subplots(1, 2)
        for index in reversed(range(len(clouds))):
            part = points[origin == index]
            marker = "o" if index == len(views) else SITE_MARKERS[index % len(SITE_MARKERS)]
            style = {"color": colours[index], "label": names[index], "marker": marker}
            first.scatter(*part.T, s=9, alpha=0.75, linewidths=0, **style)
        if source:
            part = points[origin == len(views)]
            second.scatter(*part.T, s=6, color=SOURCE, alpha=0.5, linewidths=0, label="source")
        target = origin < len(views)
        for (mask, style), label in zip(layers(selected), ("not chosen", "chosen"), strict=True):
            second.scatter(*points[mask & target].T, label=label, **style)
        for axes, title in ((first, "by origin"), (second, "by choice")):
            handles, labels = axes.get_legend_handles_labels()
            if axes is first:
                handles, labels = handles[::-1], labels[::-1]
            axes.set(xticks=[], yticks=[], title=title)
            axes.spines[:].set_visible(False)
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0)}
            axes.legend(handles, labels, **place, ncols=3, markerscale=2)
        return data_uri(figure, "png"), len(kept)


def _tilt(points: Points) -> Points:
    angle = np.deg2rad(22)
    cosine, sine = np.cos(angle), np.sin(angle)
    rotation = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    turned: Points = points @ rotation.T
    return turned


def _ball(axes: Axes) -> None:
    turn = np.linspace(0, 2 * np.pi, 181)
    circle = np.stack([np.cos(turn), np.zeros(181), np.sin(turn)], 1)
    pole = np.array([0, 1, 0])
    axes.fill(np.cos(turn), np.sin(turn), color="#f7f9fa", zorder=0)
    axes.plot(np.cos(turn), np.sin(turn), color=FAINT, linewidth=1)
    for latitude in np.deg2rad([-60, -30, 0, 30, 60]):
        _ring(axes, np.cos(latitude) * circle + np.sin(latitude) * pole)
    for longitude in np.deg2rad(np.arange(0, 180, 30)):
        across = np.array([np.cos(longitude), 0, np.sin(longitude)])
        _ring(axes, np.outer(np.cos(turn), across) + np.outer(np.sin(turn), pole))
    axes.set(xlim=(-1.06, 1.06), ylim=(-1.06, 1.06), aspect="equal")
    axes.set_axis_off()


def _ring(axes: Axes, ring: Points) -> None:
    turned = _tilt(ring)
    seen = np.where(turned[:, 2:] >= 0, turned[:, :2], np.nan)
    axes.plot(*seen.T, color=FAINT, linewidth=0.6, zorder=1)
